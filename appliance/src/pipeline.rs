//! The stage list: the only file that names every stage. A frame goes through it once, to its end.

use crate::apply::{Apply, Outcome};
use crate::arena::{Arena, OutOfMemory};
use crate::classify::{self, Class};
use crate::frame::Frame;
use crate::hash::Hasher;
use crate::limiter::{Cause, Limiter};
use crate::parse::{self, Packet, Parsed};
use crate::reply::{self, Trouble};
use crate::route;
use crate::stats::Stats;
use crate::tables::{Capacity, Link, Tables};
use crate::time::Instant;
use crate::verdict::{Originate, Verdict};
use crate::wire::ethernet;
use sluice_contract::{DropReason, ToGuest};

/// Why a packet does not go on, and what its sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal {
    reason: DropReason,
    answer: Option<(Trouble, Cause)>,
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self {
            reason,
            answer: None,
        }
    }
}

impl Refusal {
    const fn told(reason: DropReason, trouble: Trouble, cause: Cause) -> Self {
        Self {
            reason,
            answer: Some((trouble, cause)),
        }
    }
}

/// The dataplane of one node.
#[derive(Debug)]
pub struct Pipeline<'m> {
    tables: Tables<'m>,
    apply: Apply,
    stats: Stats<'m>,
    limiter: Limiter<'m>,
}

impl<'m> Pipeline<'m> {
    /// A dataplane without any link, in memory from `arena`. `seed` must be secret and random.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(
        arena: &mut Arena<'m>,
        capacity: Capacity,
        seed: [u8; 16],
    ) -> Result<Self, OutOfMemory> {
        let hasher = Hasher::new(seed);
        Ok(Self {
            tables: Tables::new(arena, &capacity, hasher)?,
            apply: Apply::default(),
            stats: Stats::new(arena)?,
            limiter: Limiter::new(arena, hasher)?,
        })
    }

    /// Sends each frame to its end and writes how it ended into `verdicts`, which is at least as long as `frames`.
    /// Frames without a verdict to write to are left alone.
    pub fn process_batch(
        &mut self,
        frames: &mut [Frame<'_>],
        verdicts: &mut [Verdict],
        now: Instant,
        _out: &mut impl Originate,
    ) {
        for (frame, verdict) in frames.iter_mut().zip(verdicts) {
            self.stats.count_received(frame.ingress, frame.length());
            *verdict = self.process(frame, now);
            self.stats
                .count_verdict(*verdict, frame.ingress, frame.length(), frame.offload.gso);
        }
    }

    /// Housekeeping that time asks for, at most `budget` steps of it; yields when it wants to be called again.
    pub fn sweep(
        &mut self,
        _now: Instant,
        _budget: usize,
        _out: &mut impl Originate,
    ) -> Option<Instant> {
        None
    }

    /// One message of a change: `Begin`, `Put`, `Remove` or `Commit`; any other is noted and does nothing.
    /// Not to be called while [`Self::is_applying`].
    pub fn configure(&mut self, message: &ToGuest) -> Outcome {
        let (apply, tables) = (&mut self.apply, &mut self.tables);
        match message {
            ToGuest::Begin { generation, fresh } => apply.begin(tables, *generation, *fresh),
            ToGuest::Put(row) => apply.put(tables, row),
            ToGuest::Remove(key) => apply.remove(tables, *key),
            ToGuest::Commit { generation } => apply.commit(tables, *generation),
            _ => Outcome::Noted,
        }
    }

    /// Forgets a change in progress.
    pub fn abort(&mut self) {
        self.apply.abort(&mut self.tables);
    }

    /// Whether [`Self::work`] has something to do, before which no message of a change may come.
    pub fn is_applying(&self) -> bool {
        self.apply.is_busy()
    }

    /// A slice of the work that a change left behind, at most `budget` rows of it; `true` when nothing is left.
    pub fn work(&mut self, budget: usize) -> bool {
        self.apply.work(&mut self.tables, budget)
    }

    pub const fn tables(&self) -> &Tables<'m> {
        &self.tables
    }

    pub const fn stats(&self) -> &Stats<'m> {
        &self.stats
    }

    pub const fn stats_mut(&mut self) -> &mut Stats<'m> {
        &mut self.stats
    }

    #[inline]
    fn process(&mut self, frame: &mut Frame<'_>, now: Instant) -> Verdict {
        let Some(link) = self.tables.link(frame.ingress).copied() else {
            return Verdict::Drop(DropReason::UnknownLink);
        };
        let parsed = match parse::parse(frame) {
            Ok(parsed) => parsed,
            Err(reason) => return Verdict::Drop(reason),
        };
        match self.stages(frame, &link, &parsed, now) {
            Ok(verdict) => verdict,
            Err(Refusal {
                reason,
                answer: Some((trouble, cause)),
            }) => self.tell(frame, &parsed, reason, trouble, cause, now),
            Err(Refusal {
                reason,
                answer: None,
            }) => Verdict::Drop(reason),
        }
    }

    #[inline]
    fn stages(
        &mut self,
        frame: &mut Frame<'_>,
        link: &Link,
        parsed: &Parsed,
        now: Instant,
    ) -> Result<Verdict, Refusal> {
        let header = reply::ethernet_of(frame).ok_or(DropReason::Malformed)?;
        classify::link_layer(&self.tables, frame.ingress, link, &header)?;
        let (class, packet) = match parsed {
            Parsed::Arp => return self.answer_arp(frame, link, now),
            Parsed::Ip(packet) => {
                let to = header.destination();
                let class = classify::network_layer(&self.tables, frame.ingress, link, to, packet)?;
                (class, packet)
            }
        };
        match class {
            Class::Neighbor => {
                self.may_answer(frame, now)?;
                reply::neighbor(frame, packet, self.tables.node())?;
                Ok(Verdict::Reply)
            }
            Class::Echo => {
                self.may_answer(frame, now)?;
                reply::echo(frame, packet, self.tables.node().gateway_mac)?;
                Ok(Verdict::Reply)
            }
            Class::Transit => self.transit(frame, packet),
        }
    }

    #[inline]
    fn transit(&mut self, frame: &mut Frame<'_>, packet: &Packet) -> Result<Verdict, Refusal> {
        if packet.hops <= 1 {
            let cause = Cause::TimeExceeded;
            return Err(Refusal::told(
                DropReason::TtlExpired,
                Trouble::TimeExceeded,
                cause,
            ));
        }
        let hop = route::lookup(&self.tables, packet.destination)?;
        if route::wire_length(frame, packet) > usize::from(hop.mtu) {
            let trouble = Trouble::TooBig(hop.mtu);
            return Err(Refusal::told(DropReason::TooBig, trouble, Cause::TooBig));
        }
        route::send_on(frame, packet, &hop)?;
        Ok(Verdict::Forward(hop.link))
    }

    fn answer_arp(
        &mut self,
        frame: &mut Frame<'_>,
        link: &Link,
        now: Instant,
    ) -> Result<Verdict, Refusal> {
        self.may_answer(frame, now)?;
        reply::arp(frame, self.tables.node(), link)?;
        Ok(Verdict::Reply)
    }

    fn may_answer(&mut self, frame: &Frame<'_>, now: Instant) -> Result<(), DropReason> {
        if self.limiter.allows(frame.ingress, Cause::Answer, now) {
            Ok(())
        } else {
            Err(DropReason::RateLimited)
        }
    }

    /// Turns a refused packet into an error about itself, if one may be sent; else it ends as a drop for its reason.
    #[cold]
    fn tell(
        &mut self,
        frame: &mut Frame<'_>,
        parsed: &Parsed,
        reason: DropReason,
        trouble: Trouble,
        cause: Cause,
        now: Instant,
    ) -> Verdict {
        let drop = Verdict::Drop(reason);
        let (Parsed::Ip(packet), Some(header)) = (parsed, reply::ethernet_of(frame)) else {
            return drop;
        };
        let flow_may = cause != Cause::TooBig
            || self
                .limiter
                .allows_flow(packet.source, packet.destination, now);
        let may = reply::may_report(packet, header.destination())
            && flow_may
            && self.limiter.allows(frame.ingress, cause, now);
        if !may {
            return drop;
        }
        let node = self.tables.node();
        let source = node.gateway(packet.family);
        match reply::error(frame, packet, trouble, source, node.gateway_mac) {
            Some(()) => Verdict::Reply,
            None => drop,
        }
    }
}

const _: () = assert!(ethernet::LENGTH == 14);
