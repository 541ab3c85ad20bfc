//! What pods have asked, and what they have learnt: a part of its own for each pod, so that none takes another's room.

use crate::address::Address;
use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use crate::names::book::{self, Book, Entry, Index, Learnt};
use crate::names::streams::{STREAMS, Stream, Streams};
use crate::time::{Duration, Instant};
use heapless::Vec;
use sluice_contract::LinkId;
use sluice_contract::name::NameId;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Questions of a pod that wait for their answers, at most; the oldest makes room.
const ASKED: usize = 64;
/// How long an answer is waited for: longer than any resolver's own patience.
const WAIT: Duration = Duration::from_secs(30);
/// Addresses are good for this long after they should be forgotten: whoever was told of them a moment ago may still connect.
const GRACE: Duration = Duration::from_secs(5);
/// Longer than this nothing holds.
const DAY: u32 = 86_400;
/// Names that one address has for one pod, at most; the one whose time ends first makes room.
pub const KNOWN: usize = 16;
/// Places in which a pod's part may be.
const PROBES: usize = 8;

/// How much there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pods whose rules name domains.
    pub pods: usize,
    /// Addresses of each of them, all names together.
    pub addresses: usize,
}

impl Limits {
    pub const SMALL: Self = Self {
        pods: 128,
        addresses: 512,
    };
    pub const LARGE: Self = Self {
        pods: 1_024,
        addresses: 512,
    };

    /// Links whose streams of answers are followed without taking each other's room: all pods, with rules or without.
    const fn links(&self) -> usize {
        self.pods * 4
    }

    /// Bytes, at most.
    pub const fn bytes(&self) -> usize {
        let each = size_of::<Part>()
            + ASKED * size_of::<Asked>()
            + self.addresses * size_of::<Entry>()
            + (self.addresses + book::heads(self.addresses)) * size_of::<Index>();
        let streams = self.links() * STREAMS * size_of::<Stream>();
        self.pods * each + streams + 512
    }
}

const _: () = assert!(Limits::LARGE.addresses < Index::MAX as usize);

/// A pod, in one of its incarnations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    pub link: LinkId,
    pub incarnation: u32,
}

/// Whose part this is; link 0: nobody's.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Part {
    link: u32,
    incarnation: u32,
    /// Entries in use, at its beginning.
    used: u32,
    /// How many questions there were.
    asked: u32,
}

/// A question that waits.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Asked {
    key: u64,
    until: u64,
}

/// All of it.
#[derive(Debug)]
pub struct Learned<'m> {
    parts: &'m mut [Part],
    asked: &'m mut [Asked],
    entries: &'m mut [Entry],
    heads: &'m mut [Index],
    heap: &'m mut [Index],
    /// Entries of a part.
    room: usize,
    hasher: Hasher,
    looked: u64,
    pub streams: Streams<'m>,
    counts: Counts,
}

/// A name, an address that it has, and until when.
pub type Told = (NameId, Address, Instant);

/// What is counted of names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Addresses that were learnt.
    pub learnt: u64,
    /// Those that had to make room for others before their time.
    pub evicted: u64,
    /// Answers over TCP of which only the first piece was read, or nothing.
    pub cut: u64,
}

impl<'m> Learned<'m> {
    /// Nothing was asked.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(
        arena: &mut Arena<'m>,
        limits: &Limits,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        let Limits { pods, addresses } = *limits;
        Ok(Self {
            parts: arena.slice(pods)?,
            asked: arena.slice(pods * ASKED)?,
            entries: arena.slice(pods * addresses)?,
            heads: arena.slice(pods * book::heads(addresses))?,
            heap: arena.slice(pods * addresses)?,
            room: addresses,
            hasher,
            looked: 0,
            streams: Streams::new(arena, limits.links())?,
            counts: Counts::default(),
        })
    }

    /// The pod asks something that `key` stands for. `lives`: whether a pod is still there. `false`: there is no room for
    /// another pod.
    pub fn ask(&mut self, who: Who, key: u64, now: Instant, lives: impl Fn(Who) -> bool) -> bool {
        let Some(at) = self.find(who).or_else(|| self.claim(who, lives)) else {
            return false;
        };
        let until = (now + WAIT).micros();
        let (Some(part), Some(asked)) = (self.parts.get_mut(at), ring(self.asked, at)) else {
            return false;
        };
        // Asked again: the same answer will do.
        let place = asked.iter().position(|it| it.key == key);
        let place = place.unwrap_or(part.asked as usize % ASKED);
        if let Some(slot) = asked.get_mut(place) {
            *slot = Asked { key, until };
            part.asked = part.asked.wrapping_add(1);
        }
        true
    }

    /// Whether the pod has asked this; from now on it has not.
    pub fn answered(&mut self, who: Who, key: u64, now: Instant) -> bool {
        let asked = self.find(who).and_then(|at| ring(self.asked, at));
        let mut waiting = asked.into_iter().flatten();
        let waits = |it: &&mut Asked| it.key == key && it.until > now.micros();
        match waiting.find(waits) {
            Some(it) => {
                it.until = 0;
                true
            }
            None => false,
        }
    }

    /// The pod is told that a name has an address for so many seconds.
    pub fn learn(&mut self, who: Who, name: NameId, address: Address, seconds: u32, now: Instant) {
        let Some(at) = self.find(who) else { return };
        let span = Duration::from_secs(seconds.min(DAY).into());
        let until = (now + span + GRACE).micros();
        let hasher = self.hasher;
        let Some(mut book) = self.book(at) else {
            return;
        };
        let learnt = book.learn(|it| hash(hasher, it), address, name.0, until);
        self.counts.learnt += 1;
        let before_its_time = |ended: u64| ended > now.micros();
        let is_early = matches!(learnt, Learnt::Instead(it) if before_its_time(it));
        self.counts.evicted += u64::from(is_early);
    }

    /// The names that the pod was told an address has. `began`: for a connection that is there already, which does not end
    /// because its address may no longer be used for others.
    pub fn names(
        &self,
        who: Who,
        address: Address,
        now: Instant,
        began: bool,
    ) -> Vec<NameId, KNOWN> {
        let mut names = Vec::new();
        let Some(at) = self.find(who) else {
            return names;
        };
        let (entries, heads) = (self.entries_at(at), self.heads_at(at));
        for entry in book::chain(entries, heads, hash(self.hasher, address)) {
            let holds = began || entry.until > now.micros();
            if entry.address == address && holds && names.push(NameId(entry.name)).is_err() {
                break;
            }
        }
        names
    }

    /// All that a pod was told; what is over, too.
    #[cfg(test)]
    pub(super) fn all_of(&self, who: Who) -> impl Iterator<Item = Told> + '_ {
        let at = self.find(who);
        let entries = at.map(|at| self.entries_at(at)).unwrap_or_default();
        entries.iter().map(told)
    }

    /// The one of what a pod was told that stands there; what is over, too.
    pub fn told(&self, who: Who, index: usize) -> Option<Told> {
        let at = self.find(who)?;
        self.entries_at(at).get(index).map(told)
    }

    /// What all pods were told, one after the other: whose, and its number among all there is room for, from `cursor` on.
    pub fn next_from(&self, cursor: usize) -> Option<(Who, Told, usize)> {
        let room = self.room.max(1);
        let (first, mut index) = (cursor / room, cursor % room);
        for at in first..self.parts.len() {
            let part = self.parts.get(at)?;
            let link = u16::try_from(part.link).ok().and_then(LinkId::new);
            let entry = self.entries_at(at).get(index);
            if let (Some(link), Some(entry)) = (link, entry) {
                let incarnation = part.incarnation;
                return Some((
                    Who { link, incarnation },
                    told(entry),
                    at * room + index + 1,
                ));
            }
            index = 0;
        }
        None
    }

    /// Known addresses that were looked at for all that was learnt: what an answer costs, besides its reading.
    pub const fn looked(&self) -> u64 {
        self.looked
    }

    /// An answer to a pod was not read to its end. Counts for pods that have asked for names of their rules.
    pub fn cut(&mut self, who: Who) {
        self.counts.cut += u64::from(self.find(who).is_some());
    }

    pub const fn counts(&self) -> Counts {
        self.counts
    }

    fn entries_at(&self, at: usize) -> &[Entry] {
        let begin = at * self.room;
        let used = self.parts.get(at).map_or(0, |it| it.used as usize);
        self.entries.get(begin..begin + used).unwrap_or_default()
    }

    fn heads_at(&self, at: usize) -> &[Index] {
        let count = book::heads(self.room);
        let heads = self.heads.get(at * count..(at + 1) * count);
        heads.unwrap_or_default()
    }

    fn book(&mut self, at: usize) -> Option<Book<'_>> {
        let part = at * self.room..(at + 1) * self.room;
        let heads = book::heads(self.room);
        Some(Book {
            entries: self.entries.get_mut(part.clone())?,
            heads: self.heads.get_mut(at * heads..(at + 1) * heads)?,
            heap: self.heap.get_mut(part)?,
            used: &mut self.parts.get_mut(at)?.used,
            looked: &mut self.looked,
        })
    }

    fn places(&self, link: LinkId) -> impl Iterator<Item = usize> + use<> {
        let count = self.parts.len();
        let first = usize::from(link.raw());
        (0..PROBES.min(count)).map(move |step| (first + step) % count)
    }

    fn find(&self, who: Who) -> Option<usize> {
        let is_his = |at: &usize| {
            let part = self.parts.get(*at);
            part.is_some_and(|it| {
                it.link == u32::from(who.link.raw()) && it.incarnation == who.incarnation
            })
        };
        self.places(who.link).find(is_his)
    }

    /// Gives a pod a part that is nobody's, or whose pod is no more.
    fn claim(&mut self, who: Who, lives: impl Fn(Who) -> bool) -> Option<usize> {
        let is_free = |part: &Part| {
            let link = u16::try_from(part.link).ok().and_then(LinkId::new);
            let incarnation = part.incarnation;
            !link.is_some_and(|link| part.link != 0 && lives(Who { link, incarnation }))
        };
        let at = self
            .places(who.link)
            .find(|at| self.parts.get(*at).is_some_and(&is_free))?;
        *self.parts.get_mut(at)? = Part {
            link: who.link.raw().into(),
            incarnation: who.incarnation,
            used: 0,
            asked: 0,
        };
        ring(self.asked, at)?.fill(Asked { key: 0, until: 0 });
        self.book(at)?.heads.fill(0);
        Some(at)
    }
}

fn told(entry: &Entry) -> Told {
    let until = Instant::from_micros(entry.until);
    (NameId(entry.name), entry.address, until)
}

fn hash(hasher: Hasher, address: Address) -> u64 {
    hasher.hash([address.high(), address.low()])
}

fn ring(asked: &mut [Asked], at: usize) -> Option<&mut [Asked]> {
    asked.get_mut(at * ASKED..(at + 1) * ASKED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    const LIMITS: Limits = Limits {
        pods: 8,
        addresses: 4,
    };

    fn new(memory: &mut [u8]) -> Learned<'_> {
        let hasher = Hasher::new([5; 16]);
        Learned::new(&mut Arena::new(memory), &LIMITS, hasher).unwrap()
    }

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    fn pod(link: u16, incarnation: u32) -> Who {
        Who {
            link: LinkId::new(link).unwrap(),
            incarnation,
        }
    }

    fn address(last: u8) -> Address {
        Address::v4([192, 0, 2, last])
    }

    #[test]
    fn n14_names_hold_as_long_as_said_and_a_little_longer_and_for_nobody_else() {
        let mut memory = vec![0; LIMITS.bytes()];
        let mut learned = new(&mut memory);
        let (a, b) = (pod(16, 1), pod(17, 1));
        assert!(learned.ask(a, 7, at(1), |_| true) && learned.ask(b, 8, at(1), |_| true));
        assert!(!learned.answered(b, 7, at(2)) && !learned.answered(a, 7, at(40)));
        assert!(learned.answered(a, 7, at(2)) && !learned.answered(a, 7, at(2)));
        learned.learn(a, NameId(5), address(1), 10, at(2));
        learned.learn(a, NameId(6), address(1), 0, at(2));
        let names = |learned: &Learned<'_>, who, seconds, began| {
            let names = learned.names(who, address(1), at(seconds), began);
            let mut names: vec::Vec<_> = names.iter().map(|it| it.0).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(names(&learned, a, 6, false), [5, 6]);
        assert_eq!(names(&learned, a, 16, false), [5]);
        assert_eq!(names(&learned, a, 17, false), []);
        assert_eq!(names(&learned, a, 17, true), [5, 6]);
        assert_eq!(names(&learned, b, 6, true), []);
        // Another answer prolongs, and a shorter one does not shorten.
        learned.learn(a, NameId(5), address(1), 100, at(20));
        learned.learn(a, NameId(5), address(1), 1, at(21));
        assert_eq!(names(&learned, a, 120, false), [5]);
        // Whoever has the link next knows nothing.
        assert_eq!(names(&learned, pod(16, 2), 21, true), []);
    }

    #[test]
    fn n14_a_pod_that_learns_too_much_forgets_its_own_and_nobody_elses() {
        let mut memory = vec![0; LIMITS.bytes()];
        let mut learned = new(&mut memory);
        let (a, b) = (pod(16, 1), pod(17, 1));
        for who in [a, b] {
            assert!(learned.ask(who, 1, at(1), |_| true));
        }
        learned.learn(b, NameId(1), address(99), 5, at(1));
        for last in 0..200 {
            learned.learn(a, NameId(1), address(last), 100 + u32::from(last), at(1));
        }
        let known: vec::Vec<_> = learned.all_of(a).map(|(_, it, _)| it).collect();
        assert_eq!(known, [196, 197, 198, 199].map(address));
        assert_eq!(learned.all_of(b).count(), 1);
        let Counts {
            learnt, evicted, ..
        } = learned.counts();
        assert_eq!((learnt, evicted), (201, 196));
        for key in 0..1000 {
            assert!(learned.ask(a, key, at(1), |_| true));
        }
        assert!(learned.answered(a, 999, at(1)) && !learned.answered(a, 1, at(1)));
    }

    #[test]
    fn n14_parts_are_given_to_those_who_live() {
        let mut memory = vec![0; LIMITS.bytes()];
        let mut learned = new(&mut memory);
        for link in 16..24 {
            assert!(learned.ask(pod(link, 1), 1, at(1), |_| true));
        }
        assert!(!learned.ask(pod(24, 1), 1, at(1), |_| true));
        // Pod 17 is gone; its link has another incarnation now.
        let lives = |it: Who| it != pod(17, 1);
        assert!(learned.ask(pod(24, 1), 1, at(1), lives));
        assert!(!learned.answered(pod(17, 1), 1, at(1)));
        assert!(learned.answered(pod(24, 1), 1, at(1)));
        assert!(learned.answered(pod(16, 1), 1, at(1)));
    }
}
