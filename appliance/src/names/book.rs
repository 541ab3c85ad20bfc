//! The addresses that one pod learnt, by address and by the end of their time.
//!
//! Entries lie in chains by the keyed hash of their address, and in a heap whose root is the one that ends first.
//!
//! # Cost
//! An address is in one chain, with as many entries as it has names, [`KNOWN`] at most. To learn is to walk that chain and
//! to move one entry in the heap: nine levels for 512 entries, however many are there and whoever chose them.

use super::KNOWN;
use crate::address::Address;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// An address that a name has.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Entry {
    pub(super) address: Address,
    pub(super) name: u64,
    pub(super) until: u64,
    /// The next one of its chain.
    next: Index,
    /// Where the heap has it.
    place: Index,
    unused: u32,
}

/// Of an entry, one more than it is, so that zeroed memory means none.
pub(super) type Index = u16;
const NONE: Index = 0;

/// What became of an address that was learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learnt {
    /// There was room, or it was known.
    Kept,
    /// Another one went, whose time ended at this moment.
    Instead(u64),
}

/// Memory of one pod's part, and what is to be kept besides.
#[derive(Debug)]
pub(super) struct Book<'a> {
    pub(super) entries: &'a mut [Entry],
    /// Where chains begin; a power of two.
    pub(super) heads: &'a mut [Index],
    /// The first [`Self::used`] are a heap.
    pub(super) heap: &'a mut [Index],
    pub(super) used: &'a mut u32,
    /// Entries that were looked at, ever.
    pub(super) looked: &'a mut u64,
}

/// Where chains of so many entries begin.
pub(super) const fn heads(room: usize) -> usize {
    room.next_power_of_two()
}

/// The entries of one chain.
pub(super) fn chain<'a>(
    entries: &'a [Entry],
    heads: &[Index],
    hash: u64,
) -> impl Iterator<Item = &'a Entry> + use<'a> {
    let first = heads.get(bucket(heads, hash)).copied().unwrap_or(NONE);
    let get = |at: Index| entries.get(usize::from(at).checked_sub(1)?);
    core::iter::successors(get(first), move |it| get(it.next)).take(entries.len())
}

fn bucket(heads: &[Index], hash: u64) -> usize {
    // Truncation is meant: any bits of a hash do.
    hash as usize & heads.len().wrapping_sub(1)
}

impl Book<'_> {
    /// Puts or prolongs; `hash` is that of an address.
    pub(super) fn learn(
        &mut self,
        hash: impl Fn(Address) -> u64,
        address: Address,
        name: u64,
        until: u64,
    ) -> Learnt {
        let own = hash(address);
        let mut at = self.first(own);
        let (mut names, mut weakest) = (0, (u64::MAX, NONE));
        while let Some(entry) = self.entry(at) {
            *self.looked += 1;
            if entry.address == address {
                if entry.name == name {
                    let until = entry.until.max(until);
                    self.renew(at, name, until);
                    return Learnt::Kept;
                }
                names += 1;
                weakest = weakest.min((entry.until, at));
            }
            at = entry.next;
        }
        if names >= KNOWN {
            let (ended, at) = weakest;
            self.renew(at, name, until);
            return Learnt::Instead(ended);
        }
        let used = *self.used as usize;
        let (at, learnt) = if used < self.entries.len() {
            *self.used += 1;
            // Room is for fewer than an index counts, see `Limits`.
            (used as Index + 1, Learnt::Kept)
        } else {
            let at = self.heap.first().copied().unwrap_or(NONE);
            let Some(oldest) = self.entry(at) else {
                return Learnt::Kept;
            };
            self.unchain(hash(oldest.address), at);
            (at, Learnt::Instead(oldest.until))
        };
        let first = self.first(own);
        let bucket = bucket(self.heads, own);
        if let Some(head) = self.heads.get_mut(bucket) {
            *head = at;
        }
        if let Some(entry) = self.entry_mut(at) {
            (entry.address, entry.next) = (address, first);
        }
        if learnt == Learnt::Kept {
            self.set(used, at);
        }
        self.renew(at, name, until);
        learnt
    }

    fn first(&self, hash: u64) -> Index {
        let head = self.heads.get(bucket(self.heads, hash));
        head.copied().unwrap_or(NONE)
    }

    fn entry(&self, at: Index) -> Option<Entry> {
        let place = usize::from(at).checked_sub(1)?;
        self.entries.get(place).copied()
    }

    fn entry_mut(&mut self, at: Index) -> Option<&mut Entry> {
        let place = usize::from(at).checked_sub(1)?;
        self.entries.get_mut(place)
    }

    fn unchain(&mut self, hash: u64, gone: Index) {
        let next = self.entry(gone).map_or(NONE, |it| it.next);
        let bucket = bucket(self.heads, hash);
        let mut at = self.first(hash);
        if at == gone {
            if let Some(head) = self.heads.get_mut(bucket) {
                *head = next;
            }
            return;
        }
        while let Some(entry) = self.entry_mut(at) {
            if entry.next == gone {
                entry.next = next;
                *self.looked += 1;
                return;
            }
            at = entry.next;
            *self.looked += 1;
        }
    }

    /// Another name or time for an entry that is in the heap.
    fn renew(&mut self, at: Index, name: u64, until: u64) {
        let Some(entry) = self.entry_mut(at) else {
            return;
        };
        (entry.name, entry.until) = (name, until);
        let mut place = usize::from(entry.place);
        while let Some(above) = place.checked_sub(1).map(|it| it / 2)
            && self.time(place) < self.time(above)
        {
            self.swap(place, above);
            place = above;
        }
        loop {
            let below = [2 * place + 1, 2 * place + 2];
            let first = below.into_iter().min_by_key(|it| self.time(*it));
            let Some(first) = first.filter(|it| self.time(*it) < self.time(place)) else {
                return;
            };
            self.swap(place, first);
            place = first;
        }
    }

    /// When what lies at a place of the heap ends; never, behind its end.
    fn time(&self, place: usize) -> u64 {
        let used = self.heap.get(..*self.used as usize).unwrap_or_default();
        let at = used.get(place).copied().unwrap_or(NONE);
        self.entry(at).map_or(u64::MAX, |it| it.until)
    }

    fn swap(&mut self, a: usize, b: usize) {
        *self.looked += 1;
        let at = |place: usize| self.heap.get(place).copied().unwrap_or(NONE);
        let (of_a, of_b) = (at(a), at(b));
        self.set(a, of_b);
        self.set(b, of_a);
    }

    fn set(&mut self, place: usize, at: Index) {
        if let Some(slot) = self.heap.get_mut(place) {
            *slot = at;
        }
        if let Some(entry) = self.entry_mut(at) {
            // Places are as few as entries.
            entry.place = place as Index;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Learned, Limits, Who};
    use super::*;
    use crate::arena::Arena;
    use crate::hash::Hasher;
    use crate::time::{Duration, Instant};
    use proptest::prelude::*;
    use sluice_contract::LinkId;
    use sluice_contract::name::NameId;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    const SECOND: u64 = 1_000_000;
    const GRACE: u64 = 5;

    fn who() -> Who {
        Who {
            link: LinkId::new(16).unwrap(),
            incarnation: 1,
        }
    }

    fn with<T>(addresses: usize, seed: u8, work: impl FnOnce(&mut Learned<'_>) -> T) -> T {
        let limits = Limits { pods: 8, addresses };
        let mut memory = std::vec![0; limits.bytes()];
        let hasher = Hasher::new([seed; 16]);
        let mut learned = Learned::new(&mut Arena::new(&mut memory), &limits, hasher).unwrap();
        assert!(learned.ask(who(), 1, Instant::ZERO, |_| true));
        work(&mut learned)
    }

    /// Addresses as somebody might choose them who wants them to lie together.
    fn chosen(kind: usize, n: u64) -> Address {
        let mut bytes = [0; 16];
        let (high, low) = match kind {
            0 => return Address::v4((n as u32).to_be_bytes()),
            1 => return Address::v4((n as u32).swap_bytes().to_be_bytes()),
            // The same low bits, the same sum, the same exclusive or.
            2 => (n << 32, 1 << 16),
            3 => (n, u64::MAX - n),
            4 => (n, n),
            _ => (n << 48, n << 48),
        };
        bytes[..8].copy_from_slice(&u64::to_be_bytes(high));
        bytes[8..].copy_from_slice(&u64::to_be_bytes(low));
        Address(bytes)
    }

    #[test]
    fn n14_a_record_costs_the_same_however_many_addresses_are_known_and_whoever_chose_them() {
        for kind in 0..6 {
            for seed in 0..8 {
                with(512, seed, |learned| {
                    let (mut most, mut all) = (0, 0);
                    // Some answers of as many records as are looked at: learnt, then replaced, later ones first and last.
                    for n in 0..4096u64 {
                        let before = learned.looked();
                        let seconds = if n & 1024 == 0 { n } else { 8192 - n } as u32;
                        let address = chosen(kind, n);
                        learned.learn(who(), NameId(n % 3), address, seconds, Instant::ZERO);
                        let looked = learned.looked() - before;
                        (most, all) = (most.max(looked), all + looked);
                    }
                    assert!(most <= 40, "{most} of kind {kind} with seed {seed}");
                    assert!(all <= 4096 * 16, "{all} of kind {kind} with seed {seed}");
                });
            }
        }
    }

    #[test]
    fn n14_an_address_that_all_names_share_costs_no_more_than_the_names_it_may_have() {
        with(512, 3, |learned| {
            let address = chosen(0, 7);
            for n in 0..4096u64 {
                let before = learned.looked();
                let seconds = 60 + n as u32;
                learned.learn(who(), NameId(n), address, seconds, Instant::ZERO);
                assert!(learned.looked() - before <= KNOWN as u64 + 10);
            }
            let mut names: Vec<_> = learned
                .names(who(), address, Instant::ZERO, false)
                .iter()
                .map(|it| it.0)
                .collect();
            names.sort_unstable();
            // Those that hold for longest.
            let longest: Vec<_> = (4096 - KNOWN as u64..4096).collect();
            assert_eq!(names, longest);
            assert_eq!(learned.counts().evicted, 4096 - KNOWN as u64);
        });
    }

    #[derive(Clone, Debug)]
    enum Step {
        Learn(u8, u8, u32),
        Wait(u16),
        /// The pod's link has another pod now.
        Replace,
    }

    fn step() -> impl Strategy<Value = Step> {
        let learn = (0..40u8, 0..20u8, 0..200u32);
        prop_oneof![
            30 => learn.prop_map(|(address, name, seconds)| Step::Learn(address, name, seconds)),
            4 => (0..60u16).prop_map(Step::Wait),
            1 => Just(Step::Replace),
        ]
    }

    /// What is known, as simply as can be: for each address and name until when.
    type Model = BTreeMap<(u8, u8), u64>;

    /// Takes what the book learnt into the model. Whoever had to go: among those that had ended first.
    fn learn(model: &mut Model, key: (u8, u8), until: u64, room: usize, held: &Model) {
        if let Some(known) = model.get_mut(&key) {
            *known = until.max(*known);
            return;
        }
        let of_address = model.keys().filter(|it| it.0 == key.0).count();
        let crowded = of_address >= KNOWN;
        if crowded || model.len() >= room {
            let may_go = |it: &(&(u8, u8), &u64)| !crowded || it.0.0 == key.0;
            let first = *model.iter().filter(may_go).map(|it| it.1).min().unwrap();
            let gone: Vec<_> = model
                .iter()
                .filter(may_go)
                .filter(|(it, until)| **until == first && !held.contains_key(*it))
                .map(|(it, _)| *it)
                .collect();
            assert_eq!(gone.len(), 1, "one, and of those that end first");
            model.remove(&gone[0]);
        }
        model.insert(key, until);
    }

    proptest! {
        #[test]
        fn n14_the_book_is_what_a_map_would_be(
            seed: u8,
            room in prop_oneof![Just(1usize), Just(3), Just(24), Just(128)],
            steps in prop::collection::vec(step(), 1..400),
        ) {
            with(room, seed, |learned| {
                let (mut model, mut now, mut incarnation) = (Model::new(), 0, 1);
                for step in steps {
                    let who = Who { incarnation, ..who() };
                    let time = Instant::ZERO + Duration::from_secs(now);
                    match step {
                        Step::Learn(address, name, seconds) => {
                            let at = chosen(0, address.into());
                            learned.learn(who, NameId(name.into()), at, seconds, time);
                            let held = learned.all_of(who).map(|(name, address, until)| {
                                let last = address.0[15];
                                ((last, name.0 as u8), until.micros() / SECOND)
                            });
                            let held: Model = held.collect();
                            let until = now + u64::from(seconds) + GRACE;
                            learn(&mut model, (address, name), until, room, &held);
                            assert_eq!(held, model);
                        }
                        Step::Wait(seconds) => now += u64::from(seconds),
                        Step::Replace => {
                            incarnation += 1;
                            model.clear();
                            let who = Who { incarnation, ..who };
                            assert!(learned.ask(who, 1, time, |it| it.incarnation == incarnation));
                        }
                    }
                    let who = Who { incarnation, ..who };
                    let time = Instant::ZERO + Duration::from_secs(now);
                    for address in 0..40 {
                        for began in [false, true] {
                            let names = learned.names(who, chosen(0, address.into()), time, began);
                            let mut names: Vec<u64> = names.iter().map(|it| it.0).collect();
                            names.sort_unstable();
                            let of = model.iter().filter(|it| it.0.0 == address);
                            let holds = of.filter(|it| began || *it.1 > now);
                            let wanted: Vec<u64> = holds.map(|it| it.0.1.into()).collect();
                            assert_eq!(names, wanted);
                        }
                    }
                }
            });
        }
    }
}
