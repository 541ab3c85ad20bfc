//! What can be set about the table, besides its size.

use crate::conntrack::state::Timeouts;
use crate::time::Duration;

/// Everything that can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub timeouts: Timeouts,
    /// Percent of the table that one pod's link may fill (K-04).
    pub pod_share: u8,
    /// The same for all pods of one namespace.
    pub tenant_share: u8,
    /// The same for every other link: the world's, the host's.
    pub other_share: u8,
    /// The longest time that the clock is believed to have gone on between two calls of `sweep` (K-11).
    pub clock_step: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timeouts: Timeouts::default(),
            pod_share: 25,
            tenant_share: 75,
            other_share: 100,
            clock_step: Duration::from_secs(60),
        }
    }
}
