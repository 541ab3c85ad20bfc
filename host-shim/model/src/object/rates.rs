//! How many packets and new connections a pod may send and be sent in a second, as its annotations say.

use std::num::NonZeroU32;

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    PerSecond(NonZeroU32),
    /// None, whatever the node's default is.
    Unlimited,
}

impl Rate {
    /// The limit, where `default` is the node's.
    pub fn or_default(this: Option<Self>, default: Option<NonZeroU32>) -> Option<NonZeroU32> {
        match this {
            Some(Self::PerSecond(rate)) => Some(rate),
            Some(Self::Unlimited) => None,
            None => default,
        }
    }
}

/// All limits of a pod, as the pod sees directions; `None`: the node's default counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub ingress_packets: Option<Rate>,
    pub egress_packets: Option<Rate>,
    /// Connections that others open to it.
    pub ingress_connections: Option<Rate>,
    /// Connections that it opens.
    pub egress_connections: Option<Rate>,
}
