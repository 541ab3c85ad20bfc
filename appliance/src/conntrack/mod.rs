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
//!            Err(ReplyTaken(_))  → the answers could not be told apart: choose another port; also if nothing is translated,
//!                                  since a client may reach a backend directly and by its service from one port
//!            Err(Full | Quota)   → drop with that reason
//! ct.sweep(now, budget)
//! ```
//!
//! Conntrack does not know NAT, services or policy: a translation is a reply flow that is not the reversed original one,
//! and everything else is [`Attached`], carried and never read. An id is good until the next `commit`, `sweep`, `remove`
//! or `visit`, so it is used at once and not kept. Memory: [`Conntrack::region_bytes`], less than 128 bytes a connection
//! including its index; a translated connection of IPv6 takes the space of two.
//!
//! Full: the oldest of [`Standing::Unreplied`] goes, then the oldest of [`Standing::Spent`]; then new ones are refused, except to a
//! group that has less than is its for certain (see [`Groups`]). A pod or a namespace that has its share is refused whatever the
//! rest.

mod adopt;
mod audit;
mod commit;
mod expiry;
#[cfg(feature = "testing")]
pub(crate) mod fuzz;
mod groups;
mod handshake;
mod index;
mod lists;
mod region;
mod related;
mod report;
mod row;
mod sctp;
mod segment;
mod settings;
mod sources;
mod state;
mod taken;
mod tcp;
mod touch;
mod track;

use sluice_contract::LinkId;

use crate::flow::{Direction, Flow, FlowHash};
use crate::hash::Hasher;
use crate::time::Instant;

use expiry::Clock;
use region::{Layout, Region};

pub use adopt::{AdoptError, Adopted, Adoption};
pub use audit::Fault;
pub use commit::{CommitError, NewConnection};
pub use expiry::Swept;
pub use groups::Groups;
pub use region::RegionError;
pub use report::{Counters, Entry, Talker, Visit};
pub use sctp::{Chunks, chunk};
pub use segment::{Segment, flag};
pub use settings::Settings;
pub use sources::{REMEMBERED, Range, Remote, Sources};
pub use state::{Standing, State, TIMEOUT_MAX, Timeouts};
pub use track::Track;

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
    /// Which connections hide their source.
    sources: Sources<'r>,
    groups: Groups<'r>,
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
            sources: Sources::none(),
            groups: Groups::none(),
        })
    }

    /// The same, and it counts the ports that hide sources; to be called while the table is empty.
    #[must_use]
    pub fn with_sources(self, sources: Sources<'r>) -> Self {
        Self { sources, ..self }
    }

    /// The same, and it is shared by groups; to be called while the table is empty.
    #[must_use]
    pub fn with_groups(self, groups: Groups<'r>) -> Self {
        Self { groups, ..self }
    }

    /// The hash of a flow, for `touch`, `lookup` and `open`. The reversed flow has the same.
    #[inline]
    pub fn hash(&self, flow: &Flow) -> FlowHash {
        flow.hash(&self.hasher)
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

#[cfg(test)]
mod tests;
