//! Connections: one object each, found from both directions, committed only after every stage has said yes.
//!
//! How the pipeline uses it, per batch and packet:
//!
//! ```text
//! hashes = flows.map(|f| ct.hash(f));  ct.touch(&hashes)          the batch's cache misses overlap
//! match ct.lookup(flow, hash, now)
//!   Some(hit) → stamp = ct.attached(hit.id).stamp
//!       stamp is current → ct.track(hit, signal, now)             Ok(Belongs): forward as ct.outgoing(hit)
//!                                                                 Ok(Anew): go on as after a miss
//!                                                                 Err(invalid): drop with that reason
//!       else             → judge again; ct.attach(…) the new stamp, or ct.remove(…)
//!   None → new = ct.open(flow, hash, owner, signal, now)?         tentative, on the stack
//!          service, NAT, policy: new.reply = …, new.attached = …
//!          match ct.commit(&new, now)
//!            Ok(hit)             → forward as ct.outgoing(hit)
//!            Err(Conflict(hit))  → another packet was first: track it as a hit (same backend, K-06)
//!            Err(ReplyTaken(_))  → the translation is in use: choose another port
//!            Err(Full | Quota)   → drop with that reason
//! ct.sweep(now, budget)
//! ```
//!
//! Conntrack does not know NAT, services or policy: a translation is a reply flow that is not the reversed original one,
//! and everything else is [`Attached`], carried and never read. An id is good until the next `commit`, `sweep`, `remove`
//! or `visit`, so it is used at once and not kept. Memory: [`Conntrack::region_bytes`], less than 128 bytes a connection
//! including its index; a translated connection of IPv6 takes the space of two.
//!
//! Full: the oldest of [`Standing::Unreplied`] goes, then the oldest of [`Standing::Spent`]; then new ones are refused. A
//! pod that has its share is refused whatever the rest.

mod adopt;
mod audit;
mod commit;
mod expiry;
mod index;
mod lists;
mod region;
mod related;
mod report;
mod row;
mod sctp;
mod state;
mod tcp;

use sluice_contract::LinkId;

use crate::flow::{Direction, Flow, FlowHash};
use crate::hash::Hasher;
use crate::time::{Duration, Instant};
use crate::wire::protocol;

use expiry::Clock;
use region::{Layout, Region};
use row::Tracking;
use tcp::Next;

pub use adopt::{AdoptError, Adopted, Adoption};
pub use audit::Fault;
pub use commit::{CommitError, NewConnection};
pub use expiry::Swept;
pub use region::RegionError;
pub use related::{Fragment, FragmentKey, Fragments};
pub use report::{Counters, Entry, Talker, Visit};
pub use sctp::{Chunks, chunk};
pub use state::{Standing, State, TIMEOUT_MAX, Timeouts};
pub use tcp::{Segment, flag};

/// A connection in the table. Only good until the table is next changed other than by `track` and `attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnId(u32);

impl ConnId {
    /// The number, for logs.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A packet's connection, and which way the packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    pub id: ConnId,
    pub direction: Direction,
    /// As it was before this packet.
    pub state: State,
}

/// Numbers of those who decided about a connection. They are compared at each hit and never searched for: a pod's link
/// that was reused, or a policy that was replaced, has another number, and its connections are stale (S-23, N-07, N-23).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Stamp {
    /// Incarnation of the endpoint that opened the connection.
    pub originator: u32,
    /// Incarnation of the endpoint that answers: the backend, if a service chose one.
    pub responder: u32,
    /// Generation of the policies that allowed it.
    pub policy: u32,
}

/// What the stages tie to a connection. Conntrack carries it and reads none of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Attached {
    pub stamp: Stamp,
    pub words: [u32; 4],
}

impl Attached {
    const fn from_words([a, b, c, d, e, f, g]: [u32; 7]) -> Self {
        Self {
            stamp: Stamp {
                originator: a,
                responder: b,
                policy: c,
            },
            words: [d, e, f, g],
        }
    }

    const fn to_words(self) -> [u32; 7] {
        let Stamp {
            originator,
            responder,
            policy,
        } = self.stamp;
        let [d, e, f, g] = self.words;
        [originator, responder, policy, d, e, f, g]
    }
}

/// What of a packet, besides its flow, connection tracking wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Tcp(Segment),
    Sctp(Chunks),
    /// An ICMP query: echo request and the like.
    Query,
    /// The answer to one.
    Answer,
    /// UDP, and every protocol of which nothing is known.
    Datagram,
}

/// Why a packet is not part of its connection, or begins none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invalid {
    /// The signal is not of the flow's protocol.
    Protocol,
    /// TCP flags that do not occur together.
    Flags,
    /// Neither known nor the beginning of anything (and mid-flow adoption is off), or out of turn in a handshake.
    NotOpening,
    /// TCP: the sequence number is outside the window.
    Sequence,
    /// TCP: it acknowledges what was never sent, or long ago.
    Acknowledgment,
    /// TCP: a RST that its receiver would not accept.
    Reset,
    /// SCTP: the verification tag is not the association's.
    Tag,
    /// An ICMP answer to no question, or a question against the direction of the questions.
    Unsolicited,
    /// The connection ended between lookup and now.
    Gone,
}

/// What a valid packet of a known connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// Part of the connection.
    Belongs,
    /// The beginning of another connection with the same flow; the old one is gone. Go on as after a miss.
    Anew,
}

/// Everything that can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub timeouts: Timeouts,
    /// Percent of the table that one pod's link may fill (K-04).
    pub pod_share: u8,
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
            other_share: 100,
            clock_step: Duration::from_secs(60),
        }
    }
}

/// The table.
#[derive(Debug)]
pub struct Conntrack<'r> {
    region: Region<'r>,
    hasher: Hasher,
    settings: Settings,
    clock: Clock,
    /// The last place of the wheel that was emptied, counted from the beginning.
    cursor: u64,
    /// Until when flows may be picked up without their handshake.
    midflow_until: Instant,
    counters: Counters,
}

impl<'r> Conntrack<'r> {
    /// Bytes of a region for `capacity` connections.
    ///
    /// # Errors
    /// [`RegionError::Capacity`].
    pub fn region_bytes(capacity: u32) -> Result<usize, RegionError> {
        Ok(Layout::of(capacity)?.length)
    }

    /// An empty table in `region`, which begins at a multiple of 64 and is overwritten.
    ///
    /// # Errors
    /// [`RegionError`], naming what does not fit.
    pub fn new(
        region: &'r mut [u8],
        capacity: u32,
        settings: Settings,
        hasher: Hasher,
        now: Instant,
    ) -> Result<Self, RegionError> {
        let clock = Clock::new(now, settings.clock_step);
        let tick = clock.tick_at(now);
        let region = Region::format(region, capacity, &hasher)?;
        region.header.tick = tick;
        Ok(Self {
            region,
            hasher,
            settings,
            clock,
            cursor: Self::first_cursor(tick),
            midflow_until: Instant::ZERO,
            counters: Counters::default(),
        })
    }

    /// The hash of a flow, for `touch`, `lookup` and `open`. The reversed flow has the same.
    #[inline]
    pub fn hash(&self, flow: &Flow) -> FlowHash {
        flow.hash(&self.hasher)
    }

    /// Brings what lookups of these hashes will read into the cache, all at once. For batches; changes nothing.
    #[inline]
    pub fn touch(&self, hashes: &[FlowHash]) {
        let mut sum = 0;
        for hash in hashes {
            let places = index::Places::of(*hash, self.region.buckets.len());
            if let Some(bucket) = self.region.buckets.get(places.first) {
                sum ^= u32::from(bucket.reserved);
            }
        }
        for hash in hashes {
            let slot = index::guess(self.region.buckets, *hash).unwrap_or(0) as usize;
            if let Some(row) = self.region.rows.get(slot) {
                sum ^= row.seen;
            }
            if let Some(detail) = self.region.details.get(slot) {
                sum ^= detail.attached[0] ^ u32::from(detail.seal);
            }
        }
        core::hint::black_box(sum);
    }

    /// The connection that a packet of `flow` belongs to.
    ///
    /// # Cost
    /// One bucket and one row per direction; a second bucket if entries were displaced; never more than 30 tags.
    #[inline]
    pub fn lookup(&self, flow: &Flow, hash: FlowHash, now: Instant) -> Option<Hit> {
        let hit = self.find(flow, hash)?;
        (!self.is_over(hit, self.clock.tick_at(now))).then_some(hit)
    }

    #[inline]
    fn find(&self, flow: &Flow, hash: FlowHash) -> Option<Hit> {
        let mut direction = Direction::Original;
        let slot = index::find(self.region.buckets, hash, |slot| {
            match self.region.direction_of(slot, flow) {
                Some(found) => {
                    direction = found;
                    true
                }
                None => false,
            }
        })?;
        Some(Hit {
            id: ConnId(slot),
            direction,
            state: State::from_raw(self.region.rows.get(slot as usize)?.state)?,
        })
    }

    /// Whether its time is over, though it was not swept away yet.
    #[inline]
    fn is_over(&self, hit: Hit, tick: u64) -> bool {
        let seen = self.region.rows[hit.id.0 as usize].seen;
        (tick as u32).wrapping_sub(seen) >= self.settings.timeouts.ticks(hit.state)
    }

    /// Judges a packet of a known connection, and lets it take effect if it is valid: state, windows, time of last use.
    ///
    /// # Errors
    /// [`Invalid`]: the packet is to be dropped; it has changed nothing.
    #[inline]
    pub fn track(&mut self, hit: Hit, signal: &Signal, now: Instant) -> Result<Track, Invalid> {
        let slot = hit.id.0;
        if !self.region.is_connection(slot) {
            return Err(self.counters.count_invalid(Invalid::Gone));
        }
        let detail = &self.region.details[slot as usize];
        let flow_protocol = self.region.rows[slot as usize].protocol;
        let state = State::from_raw(self.region.rows[slot as usize].state).unwrap_or(hit.state);
        let mut tracking = Tracking::None;
        let next = match (signal, flow_protocol) {
            (Signal::Tcp(segment), protocol::TCP) => {
                let mut tcp = detail.tcp(state);
                let next = tcp.advance(state, hit.direction, segment);
                tracking = Tracking::Tcp(tcp);
                next
            }
            (Signal::Sctp(chunks), protocol::SCTP) => {
                let mut tags = detail.tags(state);
                let next = tags.advance(state, hit.direction, chunks);
                tracking = Tracking::Sctp(tags);
                next
            }
            _ => datagram(state, hit.direction, signal),
        };
        match next {
            Ok(Next::To(new)) => {
                let tick = self.clock.tick_at(now);
                self.region.rows[slot as usize].seen = tick as u32;
                self.settle(slot, state, new, &tracking, tick);
                Ok(Track::Belongs)
            }
            Ok(Next::Aside) => {
                self.settle(slot, state, state, &tracking, 0);
                Ok(Track::Belongs)
            }
            Ok(Next::Reopen) => {
                self.discard(slot);
                self.counters.reopened += 1;
                Ok(Track::Anew)
            }
            Err(invalid) => Err(self.counters.count_invalid(invalid)),
        }
    }

    /// Writes what tracking has found, and moves the connection to where its new state belongs.
    #[inline]
    fn settle(&mut self, slot: u32, old: State, new: State, tracking: &Tracking, tick: u64) {
        let moved = old.standing() != new.standing();
        if moved {
            self.region.list_remove(slot, old.standing());
            self.count_standing(slot, old.standing(), new.standing());
        }
        let detail = &mut self.region.details[slot as usize];
        detail.store(new, tracking);
        if old != new || !matches!(tracking, Tracking::None) {
            detail.seal = detail.expected_seal(new as u8);
        }
        if old == new {
            return;
        }
        self.region.rows[slot as usize].state = new as u8;
        if moved {
            self.region.list_push(slot, new.standing());
        }
        let timeouts = &self.settings.timeouts;
        if timeouts.ticks(new) < timeouts.ticks(old) {
            self.hasten(slot, tick + u64::from(timeouts.ticks(new)));
        }
    }

    fn count_standing(&mut self, slot: u32, old: Standing, new: Standing) {
        let owner = usize::from(self.region.rows[slot as usize].owner);
        if let Some(owner) = self.region.owners.get_mut(owner) {
            owner.unreplied -= u32::from(old == Standing::Unreplied);
            owner.unreplied += u32::from(new == Standing::Unreplied);
        }
    }

    /// What was attached to a connection; nothing, if it is gone.
    #[inline]
    pub fn attached(&self, id: ConnId) -> Attached {
        match self.region.details.get(id.0 as usize) {
            Some(detail) if self.region.is_connection(id.0) => detail.attached(),
            _ => Attached::default(),
        }
    }

    /// Attaches something else.
    pub fn attach(&mut self, id: ConnId, attached: Attached) {
        if self.region.is_connection(id.0) {
            let words = attached.to_words();
            self.region.details[id.0 as usize].attached = words;
            let row = &mut self.region.rows[id.0 as usize];
            row.check = row.expected_check(&words, &self.hasher);
        }
    }

    /// The flow that opened the connection.
    pub fn original(&self, id: ConnId) -> Option<Flow> {
        let row = self.region.rows.get(id.0 as usize)?;
        self.region.is_connection(id.0).then(|| row.original())
    }

    /// The flow of the answers, as they arrive here.
    pub fn reply(&self, id: ConnId) -> Option<Flow> {
        let row = self.region.rows.get(id.0 as usize)?;
        self.region
            .is_connection(id.0)
            .then(|| self.region.reply_of(row))
    }

    /// The flow that the packet has to have when it leaves; equal to its own unless the connection is translated.
    #[inline]
    pub fn outgoing(&self, hit: Hit) -> Option<Flow> {
        Some(match hit.direction {
            Direction::Original => self.reply(hit.id)?.reversed(),
            Direction::Reply => self.original(hit.id)?.reversed(),
        })
    }

    /// Whether packets of the connection are changed on their way.
    #[inline]
    pub fn is_translated(&self, id: ConnId) -> bool {
        let row = self.region.rows.get(id.0 as usize);
        row.is_some_and(|row| row.is_translated()) && self.region.is_connection(id.0)
    }

    /// Whose share of the table it is in: the link of the packet that opened it.
    pub fn owner(&self, id: ConnId) -> Option<LinkId> {
        let row = self.region.rows.get(id.0 as usize)?;
        LinkId::new(row.owner).filter(|_| self.region.is_connection(id.0))
    }

    /// Ends a connection now.
    pub fn remove(&mut self, id: ConnId) {
        if self.region.is_connection(id.0) {
            self.discard(id.0);
            self.counters.removed += 1;
        }
    }

    /// From now until `until`, connections may be picked up without their handshake (K-09): for the first start on a node
    /// whose connections are already running. Whether policy allows them both ways is for the caller to ask.
    pub fn adopt_midflow(&mut self, until: Instant) {
        self.midflow_until = until;
    }

    /// What is set.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Sets everything anew. A shorter timeout takes effect at the next packet's lookup, and frees its row within 268 s.
    pub fn set(&mut self, settings: Settings) {
        self.clock.set_step(settings.clock_step);
        self.settings = settings;
    }

    /// How many connections can be held.
    pub fn capacity(&self) -> u32 {
        self.region.header.capacity
    }

    /// Slots in use: connections, plus one for each translated connection of IPv6.
    pub fn used(&self) -> u32 {
        self.region.header.used
    }
}

/// Protocols without a handshake.
#[inline]
fn datagram(state: State, direction: Direction, signal: &Signal) -> Result<Next, Invalid> {
    let reply = direction == Direction::Reply;
    Ok(Next::To(match (state, signal) {
        (State::UdpUnreplied, Signal::Datagram) if reply => State::UdpReplied,
        (State::UdpReplied, Signal::Datagram) if !reply => State::UdpStream,
        (State::UdpUnreplied | State::UdpReplied | State::UdpStream, Signal::Datagram) => state,
        (State::EchoUnreplied | State::EchoReplied, Signal::Answer) if reply => State::EchoReplied,
        (State::EchoUnreplied | State::EchoReplied, Signal::Query) if !reply => state,
        (State::EchoUnreplied | State::EchoReplied, Signal::Query | Signal::Answer) => {
            return Err(Invalid::Unsolicited);
        }
        (State::OtherUnreplied, Signal::Datagram) if reply => State::OtherReplied,
        (State::OtherUnreplied | State::OtherReplied, Signal::Datagram) => state,
        _ => return Err(Invalid::Protocol),
    }))
}

#[cfg(test)]
mod tests;
