//! Hash → slot: buckets of one cache line, two places per hash.
//!
//! An entry goes to the first bucket of its hash; if that has few places left, to the emptier of its two. A lookup reads
//! the second bucket only if some entry of the first was displaced. So a lookup costs at most two lines and 30 tags, a
//! miss almost always one. Buckets and tags come from the keyed hash, so that nobody outside chooses them.
//!
//! Both buckets of an entry being full begins to happen when buckets are 83 % full on average; if every connection of a
//! full table is translated they are 75 % full. Should it happen nevertheless, one of the 15 entries of the first bucket
//! moves to its own second one (a line and a row read for each that is tried, 15 at most), and only if none can is the new
//! entry refused.

use crate::conntrack::region::{Bucket, WAYS, pack, unpack};
use crate::flow::FlowHash;

/// Up to so many entries an entry is put into its first bucket without looking at the second.
/// 9 lets random buckets be filled to 83 % before two full ones meet (12: 72 %), and displaces one entry in a hundred as long
/// as the table's connections are not translated, one in seven if all are; simulated with 10⁵ buckets.
const COMFORTABLE: u32 = 9;

const LOW: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x8080_8080_8080_8080;

impl Bucket {
    /// A bit for each place whose tag is `tag`; possibly more, never fewer, and the lowest is always right.
    #[inline]
    fn candidates(&self, tag: u8) -> u32 {
        let both = u128::from_le_bytes(self.tags);
        let spread = LOW.wrapping_mul(u64::from(tag));
        let low = zero_bytes(both as u64 ^ spread);
        let high = zero_bytes((both >> 64) as u64 ^ spread);
        gather(low) | (gather(high) << 8)
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
        let mut bits = self.candidates(tag);
        while bits != 0 {
            let place = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            if let (Some(t), Some(s)) = (self.tags.get(place), self.slots.get(place)) {
                let slot = unpack(*s);
                if *t == tag && is_it(slot) {
                    return Some(slot);
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

/// The marks of the eight bytes as eight bits.
#[inline]
const fn gather(marks: u64) -> u32 {
    ((marks >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32
}

/// Where a hash may lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    pub(crate) first: usize,
    pub(crate) second: usize,
    pub(crate) tag: u8,
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

impl Bucket {
    /// The slot that probably is the one of `tag`, or any slot: for touching it ahead of time. Without a branch, because
    /// one that is guessed wrong would make all the others wait. And whether there certainly is none.
    #[inline]
    pub(crate) fn guess(&self, tag: u8) -> (u32, bool) {
        let candidates = self.candidates(tag);
        let place = candidates.trailing_zeros() as usize;
        (unpack(self.slots[place.min(WAYS - 1)]), candidates == 0)
    }

    /// Whether a lookup of `tag` that begins here goes on in the other bucket, as far as tags tell.
    #[inline]
    pub(crate) fn leads_on(&self, tag: u8) -> bool {
        self.displaced != 0 && self.candidates(tag) == 0
    }
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

/// Makes room in the first bucket of `hash` by moving an entry to its other bucket. `places_of` says where the entries of a
/// slot may lie. `false`, and no change, if none can be moved.
pub(crate) fn make_room(
    buckets: &mut [Bucket],
    hash: FlowHash,
    places_of: impl Fn(u32) -> [Option<Places>; 2],
) -> bool {
    let full = Places::of(hash, buckets.len()).first;
    for place in 0..WAYS {
        let (tag, slot) = (
            buckets[full].tags[place],
            unpack(buckets[full].slots[place]),
        );
        let here = |p: &Places| p.tag == tag && (p.first == full || p.second == full);
        let places = match places_of(slot).map(|p| p.filter(here)) {
            [Some(places), None] | [None, Some(places)] => places,
            // Either flow of the connection could be meant: leave it.
            _ => continue,
        };
        let home = places.first == full;
        let other = if home { places.second } else { places.first };
        if !buckets[other].put(tag, slot) {
            continue;
        }
        buckets[full].tags[place] = 0;
        let displaced = &mut buckets[places.first].displaced;
        *displaced = if home {
            *displaced + 1
        } else {
            displaced.saturating_sub(1)
        };
        return true;
    }
    false
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
        // Twice the capacity in entries, and then twice as many again while the oldest go.
        let capacity = 60_000;
        let layout = Layout::of(capacity).unwrap();
        let mut buckets = vec![Bucket::new_zeroed(); layout.buckets];
        let mut moved = 0;
        for n in 0..4 * capacity {
            if n >= 2 * capacity {
                let oldest = n - 2 * capacity;
                assert!(remove(&mut buckets, hash(u64::from(oldest)), oldest));
            }
            let h = hash(u64::from(n));
            if !insert(&mut buckets, h, n) {
                let places = |slot| {
                    [
                        Some(Places::of(hash(u64::from(slot)), layout.buckets)),
                        None,
                    ]
                };
                assert!(make_room(&mut buckets, h, places), "at {n}");
                assert!(insert(&mut buckets, h, n), "at {n}");
                moved += 1;
            }
        }
        assert!(moved < 100, "{moved}");
        for n in 2 * capacity..4 * capacity {
            assert!(remove(&mut buckets, hash(u64::from(n)), n));
        }
        assert!(buckets.iter().all(|b| b.filled() == 0 && b.displaced == 0));
    }

    #[test]
    fn full_buckets_make_room() {
        let mut buckets = vec![Bucket::new_zeroed(); 8];
        let places = |slot| [Some(Places::of(hash(u64::from(slot)), 8)), None];
        let mut entered = 0;
        while insert(&mut buckets, hash(entered), entered as u32)
            || (make_room(&mut buckets, hash(entered), places)
                && insert(&mut buckets, hash(entered), entered as u32))
        {
            entered += 1;
        }
        assert!(entered > 8 * 15 * 9 / 10, "{entered}");
        for n in 0..entered {
            assert!(remove(&mut buckets, hash(n), n as u32), "{n}");
        }
        assert!(buckets.iter().all(|b| b.filled() == 0 && b.displaced == 0));
    }
}
