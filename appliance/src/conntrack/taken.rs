//! Maps of the ports that are taken towards busy remote ends: a bit per port, and a bit per full word.
//!
//! A bit that is set is right: the port is taken. One that is not set may be wrong, because a map begins empty; each such
//! mistake costs one probe, which sets the bit. There are so many maps that every remote end of which a quarter of the
//! ports is in use can have one; a map goes to another remote end when less than an eighth is.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::sources::{Range, Remote};
use crate::arena::{Arena, OutOfMemory};

/// Places among which a remote end's map is looked for.
const WAYS: usize = 4;
/// The fewest words of all maps together: four of the largest.
const LEAST_WORDS: usize = 4 << 10;
const BITS: usize = u64::BITS as usize;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Owner {
    /// Of which remote end a map is; 0: of none.
    remote: u64,
}

/// All maps.
#[derive(Debug)]
pub(super) struct Taken<'m> {
    owners: &'m mut [Owner],
    words: &'m mut [u64],
    /// Which ports the maps are of.
    range: Range,
}

impl<'m> Taken<'m> {
    pub(super) fn new(arena: &mut Arena<'m>, connections: u32) -> Result<Self, OutOfMemory> {
        Ok(Self {
            owners: arena.slice(Self::most(connections))?,
            words: arena.slice(Self::pool(connections))?,
            range: Range::default(),
        })
    }

    pub(super) fn none() -> Self {
        Self {
            owners: &mut [],
            words: &mut [],
            range: Range::default(),
        }
    }

    pub(super) const fn bytes(connections: u32) -> usize {
        Self::most(connections) * size_of::<Owner>() + Self::pool(connections) * size_of::<u64>()
    }

    /// Remote ends that can have a quarter of 2 048 ports in use at once; of larger ranges there are fewer.
    const fn most(connections: u32) -> usize {
        connections as usize / 512 + WAYS
    }

    /// Twice the bits that are needed if all connections are to remote ends of which a quarter is in use.
    const fn pool(connections: u32) -> usize {
        let words = connections as usize * 8 / BITS;
        if words < LEAST_WORDS {
            LEAST_WORDS
        } else {
            words
        }
    }

    /// Words of one map: those of the ports, and of the words that are full.
    const fn size(range: Range) -> (usize, usize) {
        let words = (range.count as usize).div_ceil(BITS);
        (words, words.div_ceil(BITS))
    }

    /// Where the map of `remote` is.
    fn find(&self, remote: Remote) -> Option<usize> {
        let is_its = |at: &usize| {
            self.owners
                .get(*at)
                .is_some_and(|o| o.remote == remote.get())
        };
        self.places(remote).find(is_its)
    }

    fn places(&self, remote: Remote) -> impl Iterator<Item = usize> + use<> {
        let (words, full) = Self::size(self.range);
        let maps = match words {
            0 => 0,
            _ => (self.words.len() / (words + full)).min(self.owners.len()),
        };
        let first = (remote.get() >> 40) as usize;
        (0..WAYS.min(maps)).map(move |way| (first + way) % maps)
    }

    /// The map at a place: ports, and full words.
    fn map(&self, at: usize) -> Option<(&[u64], &[u64])> {
        let (words, full) = Self::size(self.range);
        let begin = at * (words + full);
        let map = self.words.get(begin..begin + words + full)?;
        map.split_at_checked(words)
    }

    fn map_mut(&mut self, at: usize) -> Option<(&mut [u64], &mut [u64])> {
        let (words, full) = Self::size(self.range);
        let begin = at * (words + full);
        let map = self.words.get_mut(begin..begin + words + full)?;
        map.split_at_mut_checked(words)
    }

    /// Gives `remote` a map, if it has none, enough of its ports are in use, and there is room.
    pub(super) fn keep(&mut self, remote: Remote, range: Range, count_of: impl Fn(u64) -> u32) {
        if range != self.range {
            self.range = range;
            self.owners.fill(Owner { remote: 0 });
        }
        if count_of(remote.get()) < range.count / 4 || self.find(remote).is_some() {
            return;
        }
        let is_idle = |at: &usize| {
            let owner = self.owners.get(*at).map_or(0, |owner| owner.remote);
            owner == 0 || count_of(owner) < range.count / 8
        };
        let Some(at) = self.places(remote).find(is_idle) else {
            return;
        };
        if let Some(owner) = self.owners.get_mut(at) {
            owner.remote = remote.get();
        }
        if let Some((ports, full)) = self.map_mut(at) {
            ports.fill(0);
            full.fill(0);
            // There are no ports behind the last.
            let rest = range.count as usize % BITS;
            if let Some(last) = ports.last_mut().filter(|_| rest != 0) {
                *last = u64::MAX << rest;
            }
        }
    }

    fn bit(&self, port: u16) -> Option<usize> {
        let bit = port.checked_sub(self.range.first)?;
        (u32::from(bit) < self.range.count).then_some(usize::from(bit))
    }

    pub(super) fn mark(&mut self, remote: Remote, port: u16) {
        let (Some(bit), Some(at)) = (self.bit(port), self.find(remote)) else {
            return;
        };
        let Some((ports, full)) = self.map_mut(at) else {
            return;
        };
        if let Some(word) = ports.get_mut(bit / BITS) {
            *word |= 1 << (bit % BITS);
            if *word == u64::MAX
                && let Some(full) = full.get_mut(bit / BITS / BITS)
            {
                *full |= 1 << (bit / BITS % BITS);
            }
        }
    }

    pub(super) fn clear(&mut self, remote: Remote, port: u16) {
        let (Some(bit), Some(at)) = (self.bit(port), self.find(remote)) else {
            return;
        };
        let Some((ports, full)) = self.map_mut(at) else {
            return;
        };
        if let Some(word) = ports.get_mut(bit / BITS) {
            *word &= !(1 << (bit % BITS));
        }
        if let Some(full) = full.get_mut(bit / BITS / BITS) {
            *full &= !(1 << (bit / BITS % BITS));
        }
    }

    /// The next port from `near` on, and from the beginning behind the last, whose bit is not set.
    ///
    /// # Cost
    /// Two words of the map, and at most 18 of full ones.
    pub(super) fn free_port(&self, remote: Remote, range: Range, near: u16) -> Option<Option<u16>> {
        if range != self.range {
            return None;
        }
        let (ports, full) = self.map(self.find(remote)?)?;
        let start = self.bit(near)?;
        let here = ports.get(start / BITS)? | ((1 << (start % BITS)) - 1);
        let bit = if here == u64::MAX {
            match free_word(full, start / BITS + 1, ports.len()) {
                Some(word) => {
                    let free = ports.get(word)?.trailing_ones() as usize;
                    word * BITS + free
                }
                None => return Some(None),
            }
        } else {
            start / BITS * BITS + here.trailing_ones() as usize
        };
        let port = u32::from(range.first) + u32::try_from(bit).ok()?;
        Some(u16::try_from(port).ok())
    }
}

/// The next word from `start` on, and from the beginning behind the last of `count`, that is not full.
fn free_word(full: &[u64], start: usize, count: usize) -> Option<usize> {
    let start = if start >= count { 0 } else { start };
    let words = full.len();
    for step in 0..=words {
        let at = (start / BITS + step) % words;
        let mut seen = *full.get(at)?;
        if step == 0 {
            seen |= (1 << (start % BITS)) - 1;
        }
        if at + 1 == words && !count.is_multiple_of(BITS) {
            seen |= u64::MAX << (count % BITS);
        }
        if seen != u64::MAX {
            return Some(at * BITS + seen.trailing_ones() as usize);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;
    use crate::flow::Flow;
    use crate::hash::Hasher;
    use std::vec;

    fn remote(n: u8) -> Remote {
        let flow = Flow::new(Address::v4([9, 9, 9, n]), Address::v4([1; 4]), 17, 53, 0);
        Remote::of(&Hasher::new([3; 16]), &flow)
    }

    #[test]
    fn e03_a_map_yields_every_port_of_its_range_once() {
        for (first, count) in [
            (60_000, 1),
            (1, 63),
            (5, 64),
            (1_024, 64_512),
            (61_440, 4_096),
            (7, 129),
        ] {
            let mut memory = vec![0u8; 1 << 20];
            let mut taken = Taken::new(&mut Arena::new(&mut memory), 4_096).unwrap();
            let range = Range { first, count };
            assert_eq!(taken.free_port(remote(1), range, first), None);
            taken.keep(remote(1), range, |_| count);
            let near = first + (count / 3) as u16;
            for n in 0..count {
                let port = taken.free_port(remote(1), range, near).unwrap().unwrap();
                assert!(
                    (first..=first + (count - 1) as u16).contains(&port),
                    "{n}: {port}"
                );
                taken.mark(remote(1), port);
            }
            assert_eq!(taken.free_port(remote(1), range, near), Some(None));
            let back = first + (count - 1) as u16;
            taken.clear(remote(1), back);
            assert_eq!(taken.free_port(remote(1), range, near), Some(Some(back)));
        }
    }

    #[test]
    fn a_map_goes_to_another_remote_end_only_when_it_is_idle() {
        let mut memory = vec![0u8; 1 << 20];
        let mut taken = Taken::new(&mut Arena::new(&mut memory), 4_096).unwrap();
        let range = Range {
            first: 1_024,
            count: 64_512,
        };
        for n in 0..200 {
            taken.keep(remote(n), range, |_| 20_000);
        }
        let kept = |taken: &Taken<'_>| {
            (0..200)
                .filter(|n| taken.find(remote(*n)).is_some())
                .count()
        };
        assert_eq!(kept(&taken), 4, "as many as there is room for");
        assert!(taken.find(remote(199)).is_none());
        let only = remote(199).get();
        taken.keep(
            remote(199),
            range,
            |hash| if hash == only { 20_000 } else { 0 },
        );
        assert!(taken.find(remote(199)).is_some());
        taken.keep(remote(198), Range { first: 1, count: 9 }, |_| 9);
        assert_eq!(kept(&taken), 1, "another range, other maps");
    }
}
