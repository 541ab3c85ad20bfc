//! How many connections hide their source behind one address towards one remote end, and which ports that takes.
//!
//! A port of the node's serves one connection to each remote end (address, port and protocol), so remote ends run out one by
//! one. Three things keep that bounded, fair and cheap, whatever packets come:
//!
//! * Counts, by remote end and by remote end and owner. A pod gets at most half of the ports that others leave it.
//! * A map of the taken ports for each remote end of which a quarter is in use ([`Taken`]), so that a free one is found at once.
//! * A list of remote ends for which a search found nothing: they are not searched again for [`REMEMBERED`].
//!
//! Counts are kept in two rows of counters, each found by another part of a keyed hash; the smaller of two is the estimate.
//! It is never too low. It is too high by as much as others put into both counters: packets cannot choose to meet there, and
//! a table full of translations adds one or two.

use sluice_contract::LinkId;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::taken::Taken;
use super::{Conntrack, Hit};
use crate::arena::{Arena, OutOfMemory};
use crate::flow::{Direction, Flow};
use crate::hash::{Hasher, spread};
use crate::time::{Duration, Instant};

/// For how long a remote end without a free port is not searched again, unless a port of it becomes free.
pub const REMEMBERED: Duration = Duration::from_millis(250);
/// Remote ends without a free port that are remembered; one takes the place of another with the same hash.
const EXHAUSTED: usize = 256;
/// The fewest counters of a row.
const LEAST: usize = 1 << 10;

/// A remote end, and the address that hides the sources of connections to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote(u64);

impl Remote {
    /// Where answers of flow `reply` come from, and to which address.
    pub(crate) fn of(hasher: &Hasher, reply: &Flow) -> Self {
        let (from, to) = (reply.source(), reply.destination());
        let rest = u64::from(reply.source_port()) | u64::from(reply.protocol()) << 16;
        Self(if reply.is_v6() {
            hasher.hash([from.high(), from.low(), to.high(), to.low(), rest])
        } else {
            let addresses = from.low() << 32 | to.low() & 0xffff_ffff;
            hasher.hash([addresses, rest | 1 << 32])
        })
    }

    pub(super) const fn get(self) -> u64 {
        self.0
    }

    /// The same for the connections of one owner alone.
    const fn of_owner(self, owner: LinkId) -> Self {
        Self(spread(self.0 ^ owner.raw() as u64))
    }
}

/// Whether a connection's source is another one for the remote end.
#[inline]
pub(crate) fn is_hidden(original: &Flow, reply: &Flow) -> bool {
    original.source_port() != reply.destination_port() || original.source() != reply.destination()
}

/// Where a count stands in both rows of `length` counters together.
const fn cells(length: usize, hash: u64) -> [usize; 2] {
    let row = length / 2;
    let mask = row.wrapping_sub(1);
    [hash as usize & mask, row + ((hash >> 32) as usize & mask)]
}

#[inline]
fn count(counts: &[u32], hash: u64) -> u32 {
    let [first, second] = cells(counts.len(), hash);
    match (counts.get(first), counts.get(second)) {
        (Some(first), Some(second)) => *first.min(second),
        _ => 0,
    }
}

/// The ports that may hide sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Range {
    pub first: u16,
    pub count: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Exhausted {
    remote: u64,
    /// In microseconds.
    until: u64,
}

/// What is known of hidden sources.
#[derive(Debug)]
pub struct Sources<'m> {
    counts: &'m mut [u32],
    exhausted: &'m mut [Exhausted],
    taken: Taken<'m>,
}

impl<'m> Sources<'m> {
    /// For a table of so many connections.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>, connections: u32) -> Result<Self, OutOfMemory> {
        Ok(Self {
            counts: arena.slice(2 * Self::row(connections))?,
            exhausted: arena.slice(EXHAUSTED)?,
            taken: Taken::new(arena, connections)?,
        })
    }

    /// Counts nothing and refuses nothing.
    pub(super) fn none() -> Self {
        Self {
            counts: &mut [],
            exhausted: &mut [],
            taken: Taken::none(),
        }
    }

    /// Bytes that it takes from the arena.
    pub const fn bytes(connections: u32) -> usize {
        2 * Self::row(connections) * size_of::<u32>()
            + EXHAUSTED * size_of::<Exhausted>()
            + Taken::bytes(connections)
    }

    const fn row(connections: u32) -> usize {
        let half = connections as usize / 2;
        if half < LEAST { LEAST } else { half }.next_power_of_two()
    }

    fn add(&mut self, remote: Remote, step: i32) {
        for at in cells(self.counts.len(), remote.0) {
            if let Some(count) = self.counts.get_mut(at) {
                *count = count.saturating_add_signed(step);
            }
        }
    }

    /// A connection of `owner` took `port`.
    pub(super) fn take(&mut self, remote: Remote, owner: LinkId, port: u16) {
        self.add(remote, 1);
        self.add(remote.of_owner(owner), 1);
        self.taken.mark(remote, port);
    }

    /// A connection of `owner` no longer has `port`.
    pub(super) fn give_back(&mut self, remote: Remote, owner: LinkId, port: u16) {
        self.add(remote, -1);
        self.add(remote.of_owner(owner), -1);
        self.taken.clear(remote, port);
        if let Some(entry) = self.entry_mut(remote)
            && entry.remote == remote.0
        {
            entry.until = 0;
        }
    }

    fn entry_mut(&mut self, remote: Remote) -> Option<&mut Exhausted> {
        let at = (remote.0 >> 16) as usize % EXHAUSTED;
        self.exhausted.get_mut(at)
    }

    /// Whether `owner` may have another port of `range` towards `remote`.
    pub(super) fn has_share(
        &self,
        remote: Remote,
        owner: LinkId,
        range: Range,
        now: Instant,
    ) -> bool {
        let at = (remote.0 >> 16) as usize % EXHAUSTED;
        let is_exhausted =
            |entry: &Exhausted| entry.remote == remote.0 && now.micros() < entry.until;
        if self.exhausted.get(at).is_some_and(is_exhausted) {
            return false;
        }
        let used = count(self.counts, remote.0);
        if used >= range.count {
            return false;
        }
        if !owner.is_pod() {
            return true;
        }
        let own = count(self.counts, remote.of_owner(owner).0);
        let left = range.count - used.saturating_sub(own);
        own < left.div_ceil(2)
    }

    /// The next port from `near` on of which it is not known that it is taken; `Some(None)`: all are; `None`: nothing is known.
    pub(super) fn free_port(&self, remote: Remote, range: Range, near: u16) -> Option<Option<u16>> {
        self.taken.free_port(remote, range, near)
    }

    /// A search found `port` taken by another hidden source; it goes on from there.
    pub(super) fn found_taken(&mut self, remote: Remote, range: Range, port: u16) {
        let counts = &*self.counts;
        self.taken.keep(remote, range, |hash| count(counts, hash));
        self.taken.mark(remote, port);
    }

    /// A search found nothing: there is none for a while.
    pub(super) fn found_nothing(&mut self, remote: Remote, now: Instant) {
        if let Some(entry) = self.entry_mut(remote) {
            *entry = Exhausted {
                remote: remote.0,
                until: (now + REMEMBERED).micros(),
            };
        }
    }
}

impl Conntrack<'_> {
    /// Whose ports the answers of flow `reply` would come to.
    pub fn remote(&self, reply: &Flow) -> Remote {
        Remote::of(&self.hasher, reply)
    }

    /// Whether `owner` may have another port of `range` towards `remote`. Nothing is searched for that.
    pub fn has_port(&self, remote: Remote, owner: LinkId, range: Range, now: Instant) -> bool {
        self.sources.has_share(remote, owner, range, now)
    }

    /// A port to try for `remote`, from `near` on: `Some(None)` if all are known to be taken, `None` if nothing is known.
    pub fn free_port(&self, remote: Remote, range: Range, near: u16) -> Option<Option<u16>> {
        self.sources.free_port(remote, range, near)
    }

    /// A commit found the port of flow `reply` taken by `hit`.
    pub fn port_is_taken(&mut self, remote: Remote, range: Range, reply: &Flow, hit: Hit) {
        // Of another connection that only looks like it, nothing is heard when it ends.
        let is_answer = hit.direction == Direction::Reply;
        let original = self.original(hit.id).filter(|_| is_answer);
        if original.is_some_and(|original| is_hidden(&original, reply)) {
            self.sources
                .found_taken(remote, range, reply.destination_port());
        }
    }

    /// No port was found for `remote`: it is not searched again for [`REMEMBERED`].
    pub fn ports_are_exhausted(&mut self, remote: Remote, now: Instant) {
        self.sources.found_nothing(remote, now);
    }
}
