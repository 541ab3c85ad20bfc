//! Longest prefix match: ranges of addresses of either family, each with a number.
//!
//! One hash table for all ranges, keyed by (length, prefix), and a list of the lengths that are in use, longest first: a
//! lookup asks once per length. Clusters use few (one block size, single addresses), so there is room for [`LENGTHS`] per
//! family and a ninth is refused. Every probe is independent of the one before, so the processor overlaps their misses.
//!
//! Memory: 20 bytes a slot, two slots a range, rounded up to a power of two, in two copies; 500 000 ranges take 42 MB.

use crate::address::{Address, Family};
use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use crate::tables::{Single, slots};
use crate::twin::{Full, Keyed, Slot, Twin};
use sluice_contract::Prefix;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Different prefix lengths of one family.
pub const LENGTHS: usize = 8;
/// Prefixes of IPv4 are prefixes of the mapped form.
const MAPPED: u8 = 96;

/// A range: its first address, and how many leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    address: Address,
    length: u8,
}

impl From<Prefix> for Range {
    fn from(prefix: Prefix) -> Self {
        let address = Address::from(prefix.address());
        let mapped = match address.family() {
            Family::V4 if prefix.address().is_ipv4() => MAPPED,
            _ => 0,
        };
        Self {
            address,
            length: prefix.length() + mapped,
        }
    }
}

impl Range {
    const fn of(address: Address, length: u8) -> Self {
        let bits = u128::from_be_bytes(address.0);
        let mask = if length == 0 {
            0
        } else {
            u128::MAX << (128 - length as u32)
        };
        Self {
            address: Address((bits & mask).to_be_bytes()),
            length,
        }
    }
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Row {
    address: Address,
    value: u16,
    length: u8,
    present: u8,
}

impl Slot for Row {}

impl Keyed for Row {
    type Key = Range;

    #[inline]
    fn key(&self) -> Option<Range> {
        (self.present != 0).then_some(Range {
            address: self.address,
            length: self.length,
        })
    }

    #[inline]
    fn hash(key: &Range, hasher: &Hasher) -> u64 {
        if key.length >= MAPPED && key.address.family() == Family::V4 {
            hasher.hash([key.address.low() & 0xffff_ffff | u64::from(key.length) << 32])
        } else {
            let high = key.address.high();
            hasher.hash([high, key.address.low() ^ u64::from(key.length)])
        }
    }
}

/// The lengths in use by one family, longest first, and how many ranges have each.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    length: [u8; LENGTHS],
    count: [u32; LENGTHS],
    used: usize,
}

impl Lengths {
    const EMPTY: Self = Self {
        length: [0; LENGTHS],
        count: [0; LENGTHS],
        used: 0,
    };

    #[inline]
    fn iter(&self) -> impl Iterator<Item = u8> {
        self.length.iter().take(self.used).copied()
    }

    fn add(&mut self, length: u8) -> Result<(), Full> {
        let at = self.iter().position(|known| known <= length);
        let at = at.unwrap_or(self.used);
        if self.iter().nth(at) != Some(length) {
            if self.used == LENGTHS {
                let capacity = LENGTHS as u32;
                return Err(Full { capacity });
            }
            self.length.copy_within(at..LENGTHS - 1, at + 1);
            self.count.copy_within(at..LENGTHS - 1, at + 1);
            self.used += 1;
            if let (Some(slot), Some(count)) = (self.length.get_mut(at), self.count.get_mut(at)) {
                (*slot, *count) = (length, 0);
            }
        }
        if let Some(count) = self.count.get_mut(at) {
            *count += 1;
        }
        Ok(())
    }

    fn take(&mut self, length: u8) {
        let Some(at) = self.iter().position(|known| known == length) else {
            return;
        };
        let Some(count) = self.count.get_mut(at) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.length.copy_within(at + 1..LENGTHS, at);
            self.count.copy_within(at + 1..LENGTHS, at);
            self.used -= 1;
        }
    }
}

/// The table, in two copies.
#[derive(Debug)]
pub struct Lpm<'m> {
    rows: Twin<'m, Row>,
    /// By family.
    lengths: Single<[Lengths; 2]>,
}

const fn index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl<'m> Lpm<'m> {
    /// Room for `capacity` ranges.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>, capacity: u32, hasher: Hasher) -> Result<Self, OutOfMemory> {
        Ok(Self {
            rows: Twin::keyed(arena, capacity, hasher)?,
            lengths: Single {
                live: [Lengths::EMPTY; 2],
                shadow: [Lengths::EMPTY; 2],
            },
        })
    }

    /// Bytes that a table of that capacity takes, at most.
    pub fn bytes(capacity: u32) -> usize {
        2 * slots(capacity) * size_of::<Row>() + slots(capacity) / 64 + 192
    }

    /// The number of the longest range in which `address` lies.
    ///
    /// # Cost
    /// One hash and, mostly, one cache miss per prefix length in use in that family.
    #[inline]
    pub fn find(&self, address: Address) -> Option<u16> {
        let [four, six] = &self.lengths.live;
        let lengths = match address.family() {
            Family::V4 => four,
            Family::V6 => six,
        };
        lengths
            .iter()
            .find_map(|length| self.rows.find(Range::of(address, length)))
            .map(|row| row.value)
    }

    /// The number of exactly this range in the shadow.
    pub fn at(&self, prefix: Prefix) -> Option<u16> {
        self.rows.find_shadow(prefix.into()).map(|row| row.value)
    }

    /// Puts a range into the shadow; yields the number it had before.
    ///
    /// # Errors
    /// [`Full`]: of ranges, or of lengths.
    pub fn put(&mut self, prefix: Prefix, value: u16) -> Result<Option<u16>, Full> {
        let Range { address, length } = prefix.into();
        let row = Row {
            address,
            value,
            length,
            present: 1,
        };
        let known = self.at(prefix).is_some();
        if !known {
            self.lengths_of(prefix).add(length)?;
        }
        let old = self.rows.put(row);
        if old.is_err() && !known {
            self.lengths_of(prefix).take(length);
        }
        old.map(|old| old.map(|row| row.value))
    }

    /// Takes a range out of the shadow; yields the number it had.
    pub fn remove(&mut self, prefix: Prefix) -> Option<u16> {
        let range = Range::from(prefix);
        let row = self.rows.remove(range)?;
        self.lengths_of(prefix).take(range.length);
        Some(row.value)
    }

    fn lengths_of(&mut self, prefix: Prefix) -> &mut Lengths {
        let [four, six] = &mut self.lengths.shadow;
        match index(Address::from(prefix.address()).family()) {
            0 => four,
            _ => six,
        }
    }

    /// Ranges in force.
    pub const fn length(&self) -> u32 {
        self.rows.length()
    }

    pub(crate) fn clear(&mut self) {
        self.rows.clear();
        self.lengths.shadow = [Lengths::EMPTY; 2];
    }

    pub(crate) fn clear_slice(&mut self, budget: &mut usize) -> bool {
        self.rows.clear_slice(budget)
    }

    pub(crate) fn sync_slice(&mut self, budget: &mut usize) -> bool {
        self.lengths.shadow = self.lengths.live;
        self.rows.sync_slice(budget)
    }

    pub(crate) fn exchange(&mut self) {
        self.rows.exchange();
        core::mem::swap(&mut self.lengths.live, &mut self.lengths.shadow);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::net::IpAddr;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec;
    use std::vec::Vec;

    fn prefix(six: bool, bits: u8, length: u8) -> Prefix {
        // Few different bits, so that ranges nest.
        let (address, length): (IpAddr, u8) = if six {
            let length = [0, 7, 8, 64, 120, 128][usize::from(length) % 6];
            let value = u128::from(bits) << 120 | u128::from(bits);
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            (IpAddr::V6((value & mask).into()), length)
        } else {
            let length = [0, 7, 8, 16, 24, 32][usize::from(length) % 6];
            let value = u32::from(bits) << 24 | u32::from(bits);
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            (IpAddr::V4((value & mask).into()), length)
        };
        Prefix::new(address, length).unwrap()
    }

    proptest! {
        #[test]
        fn it_finds_what_a_scan_finds(
            steps in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<u8>(), any::<u8>(), any::<u16>()), 0..120),
            probes in proptest::collection::vec((any::<bool>(), any::<u8>()), 1..40),
        ) {
            let mut memory = vec![0u8; 1 << 16];
            let mut lpm = Lpm::new(&mut Arena::new(&mut memory), 200, Hasher::new([1; 16])).unwrap();
            let mut model: BTreeMap<Prefix, u16> = BTreeMap::new();
            for (put, six, bits, length, value) in steps {
                let prefix = prefix(six, bits, length);
                if put {
                    prop_assert_eq!(lpm.put(prefix, value), Ok(model.insert(prefix, value)));
                } else {
                    prop_assert_eq!(lpm.remove(prefix), model.remove(&prefix));
                }
            }
            lpm.exchange();
            for (six, bits) in probes {
                let address = prefix(six, bits, 5).address();
                let expected = model.iter().filter(|(p, _)| p.contains(address))
                    .max_by_key(|(p, _)| p.length()).map(|(_, v)| *v);
                prop_assert_eq!(lpm.find(address.into()), expected, "{}", address);
            }
        }
    }

    #[test]
    fn a_ninth_length_is_refused_and_leaves_no_trace() {
        let mut memory = vec![0u8; 1 << 16];
        let mut lpm = Lpm::new(&mut Arena::new(&mut memory), 200, Hasher::new([1; 16])).unwrap();
        let of = |length: u8| Prefix::new(IpAddr::from([0; 4]), length).unwrap();
        for length in 0..8 {
            assert_eq!(lpm.put(of(length), 1), Ok(None));
        }
        assert_eq!(lpm.put(of(9), 1), Err(Full { capacity: 8 }));
        assert_eq!(lpm.remove(of(3)), Some(1));
        assert_eq!(lpm.put(of(9), 1), Ok(None));
    }

    #[test]
    fn o04_half_a_million_ranges_are_found_in_42_megabytes() {
        let mut memory = vec![0u8; 44 << 20];
        let mut arena = Arena::new(&mut memory);
        let before = arena.left();
        let mut lpm = Lpm::new(&mut arena, 500_000, Hasher::new([9; 16])).unwrap();
        let used = before - arena.left();
        assert!(used < 43 << 20, "{used}");
        // 480 000 single addresses and 20 000 blocks of 64, spread over 5 000 peers.
        let address = |n: u32| IpAddr::from((0x0a00_0000 + n * 7).to_be_bytes());
        let block = |n: u32| IpAddr::from((0x6400_0000 + n * 64).to_be_bytes());
        for n in 0..500_000u32 {
            let peer = (n % 5_000) as u16;
            let row = if n < 480_000 {
                Prefix::new(address(n), 32)
            } else {
                Prefix::new(block(n - 480_000), 26)
            };
            assert_eq!(lpm.put(row.unwrap(), peer), Ok(None));
        }
        lpm.exchange();
        let order: Vec<u32> = (0..500_000u32)
            .map(|n| n.wrapping_mul(2_654_435_761) % 500_000)
            .collect();
        let start = std::time::Instant::now();
        for n in &order {
            let at = if *n < 480_000 {
                address(*n)
            } else {
                block(*n - 480_000)
            };
            assert_eq!(lpm.find(at.into()), Some((n % 5_000) as u16));
        }
        let each = start.elapsed().as_nanos() / order.len() as u128;
        std::println!("500 000 ranges, 2 lengths: {used} bytes, {each} ns a lookup");
    }
}
