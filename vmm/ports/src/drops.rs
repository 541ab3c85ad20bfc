//! Why the host ends a frame: one reason and one counter for every way.
//!
//! The guest has its own reasons (`sluice_contract`); these are the ones between its rings and the taps.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($variant:ident $name:literal $doc:literal),+ $(,)?) => {
        /// Why a frame or a descriptor chain went no further.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum HostDrop { $(#[doc = $doc] $variant),+ }

        impl HostDrop {
            /// Every reason.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$variant),+];

            /// The name in tables and metrics.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// One sentence for a person.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $doc),+ }
            }
        }
    };
}

reasons! {
    ChainLoop "chain_loop" "The descriptor chain has no end",
    ChainOutOfRange "chain_out_of_range" "A descriptor or buffer is outside its table or guest memory",
    ChainZeroLength "chain_zero_length" "A buffer of the chain is empty",
    ChainOversized "chain_oversized" "The chain is longer than any frame",
    ChainDirection "chain_direction" "A buffer of the chain goes the wrong way",
    ChainIndirect "chain_indirect" "An indirect descriptor table is malformed",
    ShortBuffer "short_buffer" "A receive buffer is too short for the headers of a frame",
    ShortHeader "short_header" "The frame from the guest is shorter than its headers",
    MissingTag "missing_tag" "The frame from the guest does not say which link it is for",
    UnknownLink "unknown_link" "The frame from the guest is for a link that does not exist",
    BadOffload "bad_offload" "The offload fields of the frame from the guest contradict themselves",
    TapDown "tap_down" "The link's interface is down or gone",
    TapFull "tap_full" "The link's interface had no room",
    TapRefused "tap_refused" "The kernel refused the frame from the guest",
    Truncated "truncated" "A frame from a link was longer than the receive buffers",
}

impl HostDrop {
    /// The number of the reason in the ports protocol: its place in the list, which only grows at its end.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The reason of a number.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    fn index(self) -> usize {
        self as usize
    }
}

/// A counter with one writer, read from anywhere.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only ever called by the one writer, hence no atomic read-modify-write.
    pub fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// The present value.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One counter per reason.
#[derive(Debug, Default)]
pub struct Drops([Counter; HostDrop::ALL.len()]);

impl Drops {
    /// Counts one.
    pub fn count(&self, reason: HostDrop) {
        if let Some(counter) = self.0.get(reason.index()) {
            counter.add(1);
        }
    }

    /// The value of one reason.
    pub fn value(&self, reason: HostDrop) -> u64 {
        self.0.get(reason.index()).map_or(0, Counter::value)
    }

    /// The reasons that have occurred.
    pub fn seen(&self) -> impl Iterator<Item = (HostDrop, u64)> + '_ {
        HostDrop::ALL
            .into_iter()
            .map(|r| (r, self.value(r)))
            .filter(|(_, n)| *n != 0)
    }

    /// The sum over all reasons.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::value).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter_and_name() {
        let drops = Drops::default();
        for (i, reason) in HostDrop::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), i);
            drops.count(reason);
            assert_eq!(drops.value(reason), 1);
            assert_eq!(
                HostDrop::ALL
                    .iter()
                    .filter(|r| r.name() == reason.name())
                    .count(),
                1
            );
        }
        assert_eq!(drops.total(), HostDrop::ALL.len() as u64);
        assert_eq!(drops.seen().count(), HostDrop::ALL.len());
    }
}
