//! A hash that is the same today and tomorrow, here and on the next node: numbers made from it outlive the daemon.
//!
//! It is not meant to resist anybody: whoever uses it looks for collisions and steps aside.

use std::hash::{Hash, Hasher};

/// FNV-1a, and a last round that spreads it over all bits (splitmix64).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stable(u64);

impl Default for Stable {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Stable {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        let mut it = self.0;
        it = (it ^ (it >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        it = (it ^ (it >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        it ^ (it >> 31)
    }
}

/// The hash of a value.
pub(crate) fn of(value: &impl Hash) -> u64 {
    let mut hasher = Stable::default();
    value.hash(&mut hasher);
    hasher.finish()
}
