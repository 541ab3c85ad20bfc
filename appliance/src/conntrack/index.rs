//! Hash → slot: buckets of one cache line, two places per hash.
//!
//! An entry goes to the first bucket of its hash; if that has few places left, to the emptier of its two. A lookup reads
//! the second bucket only if some entry of the first was displaced. So a lookup costs at most two lines and 30 tags, a
//! miss almost always one; nothing is ever moved. Buckets and tags come from the keyed hash, so that nobody outside
//! chooses them. Should both buckets be full the entry is refused; that needs buckets that are 83 % full on average, and if
//! every connection of a full table is translated they are 75 % full (test below).

use crate::conntrack::region::{Bucket, WAYS, pack, unpack};
use crate::flow::FlowHash;

/// Up to so many entries an entry is put into its first bucket without looking at the second.
/// 8 lets random buckets be filled to 83 % before two full ones meet (12: 72 %), and displaces no entry in a hundred as long
/// as the table's connections are not translated (12: none); simulated with 10⁵ buckets.
const COMFORTABLE: u32 = 8;

const LOW: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x8080_8080_8080_8080;

impl Bucket {
    /// A bit (the highest of a byte) for each place whose tag is `tag`; possibly more, never fewer.
    #[inline]
    fn candidates(&self, tag: u8) -> [u64; 2] {
        let [a, b] = self.tag_words();
        let spread = LOW.wrapping_mul(u64::from(tag));
        [zero_bytes(a ^ spread), zero_bytes(b ^ spread)]
    }

    #[inline]
    fn tag_words(&self) -> [u64; 2] {
        let both = u128::from_le_bytes(self.tags);
        [both as u64, (both >> 64) as u64]
    }

    fn filled(&self) -> u32 {
        self.tags.iter().map(|tag| u32::from(*tag != 0)).sum()
    }

    fn put(&mut self, tag: u8, slot: u32) -> bool {
        let free = self.tags.iter().take(WAYS).position(|tag| *tag == 0);
        let Some(place) = free else { return false };
        self.tags[place] = tag;
        self.slots[place] = pack(slot);
        true
    }

    fn take(&mut self, tag: u8, slot: u32) -> bool {
        let packed = pack(slot);
        let mut entries = self.tags.iter_mut().zip(&self.slots);
        match entries.find(|(t, s)| **t == tag && **s == packed) {
            Some((t, _)) => {
                *t = 0;
                true
            }
            None => false,
        }
    }

    #[inline]
    fn find(&self, tag: u8, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let [low, high] = self.candidates(tag);
        for (mut bits, base) in [(low, 0), (high, 8)] {
            while bits != 0 {
                let place = base + (bits.trailing_zeros() >> 3) as usize;
                bits &= bits - 1;
                if let (Some(t), Some(s)) = (self.tags.get(place), self.slots.get(place)) {
                    let slot = unpack(*s);
                    if *t == tag && is_it(slot) {
                        return Some(slot);
                    }
                }
            }
        }
        None
    }
}

/// Marks the zero bytes of a word; a byte above a marked one may be marked wrongly.
#[inline]
const fn zero_bytes(word: u64) -> u64 {
    word.wrapping_sub(LOW) & !word & HIGH
}

/// Where a hash may lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    pub(crate) first: usize,
    pub(crate) second: usize,
    tag: u8,
}

impl Places {
    #[inline]
    pub(crate) fn of(hash: FlowHash, buckets: usize) -> Self {
        let scale = |part: u64| ((part * buckets as u64) >> 32) as usize;
        let first = scale(hash.0 >> 32);
        let second = scale(hash.0 & 0xffff_ffff);
        let second = if second != first {
            second
        } else if first + 1 == buckets {
            0
        } else {
            first + 1
        };
        // 1 to 255: 0 is "empty".
        let tag = (((hash.0 & 0xff) * 255) >> 8) as u8 + 1;
        Self { first, second, tag }
    }
}

/// The slot of `hash` for which `is_it` says yes.
#[inline]
pub(crate) fn find(
    buckets: &[Bucket],
    hash: FlowHash,
    mut is_it: impl FnMut(u32) -> bool,
) -> Option<u32> {
    let places = Places::of(hash, buckets.len());
    let first = buckets.get(places.first)?;
    if let Some(slot) = first.find(places.tag, &mut is_it) {
        return Some(slot);
    }
    if first.displaced == 0 {
        return None;
    }
    buckets.get(places.second)?.find(places.tag, is_it)
}

/// The slot that probably is the one of `hash`, without asking: for touching it ahead of time.
#[inline]
pub(crate) fn guess(buckets: &[Bucket], hash: FlowHash) -> Option<u32> {
    let places = Places::of(hash, buckets.len());
    buckets.get(places.first)?.find(places.tag, |_| true)
}

/// Adds an entry. `false`, and no change, if both buckets are full.
pub(crate) fn insert(buckets: &mut [Bucket], hash: FlowHash, slot: u32) -> bool {
    let places = Places::of(hash, buckets.len());
    let filled = buckets[places.first].filled();
    if filled <= COMFORTABLE || filled <= buckets[places.second].filled() {
        return buckets[places.first].put(places.tag, slot);
    }
    let put = buckets[places.second].put(places.tag, slot);
    if put {
        buckets[places.first].displaced += 1;
    }
    put
}

/// Takes an entry away. `false` if it was not there.
pub(crate) fn remove(buckets: &mut [Bucket], hash: FlowHash, slot: u32) -> bool {
    let places = Places::of(hash, buckets.len());
    if buckets[places.first].take(places.tag, slot) {
        return true;
    }
    let taken = buckets[places.second].take(places.tag, slot);
    if taken {
        let first = &mut buckets[places.first];
        first.displaced = first.displaced.saturating_sub(1);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::region::Layout;
    use crate::hash::Hasher;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};
    use zerocopy::FromZeros;

    fn hash(n: u64) -> FlowHash {
        FlowHash(Hasher::new([3; 16]).hash([n]))
    }

    proptest! {
        #[test]
        fn finds_what_is_in_and_nothing_else(
            steps in prop::collection::vec((0u32..60, any::<bool>()), 1..300)
        ) {
            let mut buckets = vec![Bucket::new_zeroed(); 7];
            let mut reference = Vec::new();
            for (n, add) in steps {
                let h = hash(u64::from(n));
                let there = reference.contains(&n);
                if add && !there {
                    if insert(&mut buckets, h, n) {
                        reference.push(n);
                    }
                } else if !add {
                    prop_assert_eq!(remove(&mut buckets, h, n), there);
                    reference.retain(|m| *m != n);
                }
                for m in 0..60 {
                    let found = find(&buckets, hash(u64::from(m)), |slot| slot == m);
                    prop_assert_eq!(found.is_some(), reference.contains(&m));
                }
            }
            for n in reference {
                prop_assert!(remove(&mut buckets, hash(u64::from(n)), n));
            }
            prop_assert!(buckets.iter().all(|b| b.filled() == 0 && b.displaced == 0));
        }
    }

    #[test]
    fn every_connection_translated_still_fits() {
        let capacity = 600_000;
        let layout = Layout::of(capacity as u32).unwrap();
        let mut buckets = vec![Bucket::new_zeroed(); layout.buckets];
        for n in 0..2 * capacity as u32 {
            assert!(insert(&mut buckets, hash(u64::from(n)), n), "at {n}");
        }
        let displaced: u32 = buckets.iter().map(|b| u32::from(b.displaced)).sum();
        assert!(displaced < capacity as u32);
    }
}
