//! Pauses between attempts: longer after each failure, and never the same for two clients.

use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use super::Patience;

/// The pauses of one task whose requests are refused.
#[derive(Debug)]
pub(crate) struct BackOff {
    patience: Patience,
    next: Duration,
}

impl BackOff {
    pub(crate) fn new(patience: Patience) -> Self {
        let next = patience.first;
        Self { patience, next }
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.patience.first;
    }

    /// From half to all of the time that it is now.
    pub(crate) fn next(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.patience.most);
        jittered(now)
    }
}

/// From half to all of a time.
pub(super) fn jittered(time: Duration) -> Duration {
    time / 2 + spread(time / 2)
}

/// From nothing to all of a time.
pub(super) fn spread(time: Duration) -> Duration {
    let random = std::hash::RandomState::new().build_hasher().finish();
    time.mul_f64((random % 1000) as f64 / 1000.0)
}
