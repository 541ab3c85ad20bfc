//! Why a packet does not go on, and what its sender is told.

use crate::limiter::Cause;
use crate::reply::Trouble;
use sluice_contract::DropReason;

/// What the sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Error(Trouble),
    /// Of TCP: the connection does not exist (RFC 9293 §3.5.2).
    Reset,
    /// Nobody is there: a reset to TCP, an unreachable port to everything else.
    Refused,
}

impl Answer {
    pub(super) const fn cause(self) -> Cause {
        match self {
            Self::Error(Trouble::TooBig(_)) => Cause::TooBig,
            Self::Error(Trouble::TimeExceeded) => Cause::TimeExceeded,
            Self::Error(_) | Self::Reset | Self::Refused => Cause::Unreachable,
        }
    }
}

/// The packet ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reason: DropReason,
    pub(super) answer: Option<Answer>,
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self {
            reason,
            answer: None,
        }
    }
}

impl Refusal {
    pub(super) const fn told(reason: DropReason, answer: Answer) -> Self {
        Self {
            reason,
            answer: Some(answer),
        }
    }
}
