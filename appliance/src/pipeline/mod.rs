//! The stage list: the only room that names every stage. A frame goes through it once, to its end.
//!
//! ```text
//! process_batch ─ parse ─ touch ─ classify ─┬ ARP, ND, echo to the gateway → reply
//!                                           ├ fragments that came too early → held
//!                                           ├ ICMP errors → related
//!                                           └ transit ─┬ belonging: the connection knows
//!                                                      └ beginning: service → policy → nat → commit
//! ```
//!
//! A batch is parsed as a whole first, so that the cache misses of its connections overlap.

mod begin;
mod refusal;
mod related;
mod state;
mod transit;
mod tunnel;

use crate::apply::{Apply, Outcome};
use crate::arena::{Arena, OutOfMemory};
use crate::classify::{self, Class};
use crate::connection::flow_of;
use crate::conntrack::Conntrack;
use crate::decap::{self, Origin};
use crate::flow::{Flow, FlowHash};
use crate::fragments::{Fate, Piece, Released, is_piece};
use crate::frame::Frame;
use crate::hash::Hasher;
use crate::limiter::Cause;
use crate::observe::{Observer, Record, Silent, Step};
use crate::parse::{self, Fragment, Packet, Parsed};
use crate::reply;
use crate::stats::Stats;
use crate::tables::{Capacity, Link, Tables};
use crate::time::{Duration, Instant};
use crate::verdict::{Originate, Verdict};
use crate::wire::{ethernet, protocol};
use refusal::{Answer, Refusal};
use sluice_contract::service::ConnectionsRow;
use sluice_contract::{DropReason, LinkId, Mac, ToGuest};
use state::State;
use transit::Stages;

/// Frames that are parsed together: enough to hide a cache miss, few enough for their headers to stay in the first cache.
const BATCH: usize = 32;
/// How often connections are looked at while nothing is going on.
const IDLE_SWEEP: Duration = Duration::from_secs(1);
/// Headroom of a frame that waited.
const HEADROOM: usize = 64;

/// The dataplane of one node.
#[derive(Debug)]
pub struct Pipeline<'m> {
    tables: Tables<'m>,
    apply: Apply,
    stats: Stats<'m>,
    state: State<'m>,
    /// The latest moment that anybody has named.
    now: Instant,
}

/// What a frame was found to be, before its turn comes.
#[derive(Clone, Copy, Debug)]
struct Ready {
    parsed: Result<Parsed, DropReason>,
    flow: Option<(Flow, FlowHash)>,
    /// The node it came from, if it came in a tunnel, which is off now.
    origin: Option<Origin>,
    /// Bytes of the frame as it came.
    length: usize,
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
            state: State::new(arena, &capacity, hasher)?,
            now: Instant::ZERO,
        })
    }

    /// Sends each frame to its end and writes how it ended into `verdicts`, which is at least as long as `frames`.
    /// Frames without a verdict to write to are left alone.
    pub fn process_batch(
        &mut self,
        frames: &mut [Frame<'_>],
        verdicts: &mut [Verdict],
        now: Instant,
        out: &mut impl Originate,
    ) {
        self.now = self.now.max(now);
        for (frames, verdicts) in frames.chunks_mut(BATCH).zip(verdicts.chunks_mut(BATCH)) {
            let ready = self.look_ahead(frames);
            for ((frame, verdict), ready) in frames.iter_mut().zip(verdicts).zip(&ready) {
                *verdict = self.process(frame, ready, out, &mut Silent);
            }
        }
    }

    /// One frame, with somebody who listens. Everything else is as in [`Self::process_batch`].
    pub fn process_observed(
        &mut self,
        frame: &mut Frame<'_>,
        now: Instant,
        out: &mut impl Originate,
        record: &mut Record<false>,
    ) -> Verdict {
        self.now = self.now.max(now);
        let ready = self.prepare(frame);
        self.process(frame, &ready, out, record)
    }

    /// What would become of `frame` now, and why. Only the frame is changed.
    pub fn trace(&mut self, frame: &mut Frame<'_>, now: Instant) -> (Verdict, Record<true>) {
        let mut record = Record::default();
        self.now = self.now.max(now);
        let Ready {
            parsed,
            flow,
            origin,
            ..
        } = self.prepare(frame);
        let verdict = self.decide(frame, &parsed, flow, origin, &mut record);
        (verdict, record)
    }

    /// Parses a batch, and has the memory on its way that the packets will ask for.
    #[inline]
    fn look_ahead(&self, frames: &mut [Frame<'_>]) -> [Ready; BATCH] {
        // The first line of each frame was written by somebody else: read them all, so that the misses overlap.
        let first = frames
            .iter()
            .map(|frame| frame.bytes().first().copied().unwrap_or(0));
        core::hint::black_box(first.fold(0u8, |sum, byte| sum ^ byte));
        let nothing = Ready {
            parsed: Err(DropReason::Malformed),
            flow: None,
            origin: None,
            length: 0,
        };
        let mut ready = [nothing; BATCH];
        let mut hashes = [FlowHash(0); BATCH];
        let mut count = 0;
        for (frame, ready) in frames.iter_mut().zip(&mut ready) {
            *ready = self.prepare(frame);
            if let (Some((_, hash)), Some(slot)) = (&ready.flow, hashes.get_mut(count)) {
                *slot = *hash;
                count += 1;
            }
        }
        self.state
            .conntrack
            .touch(hashes.get(..count).unwrap_or_default());
        ready
    }

    #[inline]
    fn prepare(&self, frame: &mut Frame<'_>) -> Ready {
        let length = frame.length();
        let mut parsed = parse::parse(frame);
        let mut origin = None;
        if frame.ingress == LinkId::UPLINK
            && let Ok(Parsed::Ip(packet)) = &parsed
            && decap::is_tunnelled(self.tables.overlay(), packet)
        {
            match tunnel::unwrap(&self.tables, frame, packet) {
                Ok((inner, from)) => {
                    parsed = Ok(inner);
                    origin = Some(from);
                }
                Err(reason) => parsed = Err(reason),
            }
        }
        let flow = match &parsed {
            Ok(Parsed::Ip(packet)) if packet.fragment != Fragment::Later => {
                let flow = flow_of(packet);
                Some((flow, self.state.conntrack.hash(&flow)))
            }
            _ => None,
        };
        Ready {
            parsed,
            flow,
            origin,
            length,
        }
    }

    #[inline]
    fn process<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        ready: &Ready,
        out: &mut impl Originate,
        observer: &mut O,
    ) -> Verdict {
        self.stats.count_received(frame.ingress, ready.length);
        let piece = match &ready.parsed {
            Ok(Parsed::Ip(packet)) if is_piece(packet) => Piece::of(frame, packet),
            _ => None,
        };
        let verdict = match piece {
            None => self.decide(frame, &ready.parsed, ready.flow, ready.origin, observer),
            Some(piece) => self.fragment(frame, ready, &piece, out, observer),
        };
        self.stats
            .count_verdict(verdict, frame.ingress, frame.length(), frame.offload.gso);
        verdict
    }

    /// All stages, for a frame that stands for itself.
    #[inline]
    fn decide<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        parsed: &Result<Parsed, DropReason>,
        flow: Option<(Flow, FlowHash)>,
        origin: Option<Origin>,
        observer: &mut O,
    ) -> Verdict {
        let mut stages = Stages {
            tables: &self.tables,
            state: &mut self.state,
            now: self.now,
            origin,
            observer,
        };
        let Some(link) = stages.tables.link(frame.ingress) else {
            return Verdict::Drop(DropReason::UnknownLink);
        };
        let parsed = match parsed {
            Ok(parsed) => parsed,
            Err(reason) => return Verdict::Drop(*reason),
        };
        match stages.classified(frame, link, parsed, flow) {
            Ok(verdict) => verdict,
            Err(refusal) => stages.tell(frame, parsed, refusal),
        }
    }

    /// A fragment: the first one as any packet, the others after it. What waited for the first goes with it.
    fn fragment<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        ready: &Ready,
        piece: &Piece,
        out: &mut impl Originate,
        observer: &mut O,
    ) -> Verdict {
        let Ready {
            parsed,
            flow,
            origin,
            ..
        } = ready;
        let (flow, origin) = (*flow, *origin);
        let Some(link) = self.tables.link(frame.ingress) else {
            return Verdict::Drop(DropReason::UnknownLink);
        };
        // Nobody fills the room in another's name; of what came in a tunnel that was asked before.
        if origin.is_none()
            && let Err(reason) = classify::whole(&self.tables, frame, link, parsed)
        {
            return Verdict::Drop(reason);
        }
        let (fate, released) = self.state.fragments.arrive(piece, self.now);
        self.set_free(released, out);
        match (fate, flow) {
            (Fate::Refused(reason), _) => Verdict::Drop(reason),
            (_, Some(_)) => {
                let verdict = self.decide(frame, parsed, flow, origin, observer);
                let passed = matches!(verdict, Verdict::Forward(_));
                let flow = flow.map(|(flow, _)| flow).filter(|_| passed);
                let released = self.state.fragments.decide(piece, flow.as_ref(), self.now);
                self.set_free(released, out);
                verdict
            }
            (Fate::Of(flow), None) => {
                observer.note(Step::Fragment(flow));
                let hash = self.state.conntrack.hash(&flow);
                self.decide(frame, parsed, Some((flow, hash)), origin, observer)
            }
            (Fate::Waiting, None) => match self.state.fragments.hold(piece, frame, self.now) {
                Ok(()) => Verdict::Held,
                Err(reason) => Verdict::Drop(reason),
            },
        }
    }

    /// Frames that waited go on, or end.
    fn set_free(&mut self, released: Option<Released>, out: &mut impl Originate) {
        let Some(mut released) = released else { return };
        while let Some(waited) = self.state.fragments.take(&mut released) {
            let mut buffer = [0; HEADROOM + crate::fragments::ROOM];
            let Some(mut frame) = waited.frame(&mut buffer, HEADROOM) else {
                continue;
            };
            let verdict = match released.dropped {
                Some(reason) => Verdict::Drop(reason),
                None => self.follow(&mut frame),
            };
            let sent = match verdict {
                Verdict::Forward(link) => out.originate(link, frame.bytes(), frame.offload),
                Verdict::Reply => out.originate(frame.ingress, frame.bytes(), frame.offload),
                Verdict::Drop(_) | Verdict::Held => true,
            };
            let verdict = if sent {
                verdict
            } else {
                Verdict::Drop(DropReason::TxFull)
            };
            self.stats
                .count_released(verdict, frame.ingress, frame.length());
        }
    }

    /// A fragment that waited, now that the flow of its datagram is known.
    fn follow(&mut self, frame: &mut Frame<'_>) -> Verdict {
        let parsed = parse::parse(frame);
        let Ok(Parsed::Ip(packet)) = &parsed else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let piece = Piece::of(frame, packet);
        match piece.map(|piece| self.state.fragments.peek(&piece, self.now)) {
            Some(Fate::Of(flow)) => {
                let hash = self.state.conntrack.hash(&flow);
                self.decide(frame, &parsed, Some((flow, hash)), None, &mut Silent)
            }
            _ => Verdict::Drop(DropReason::FragmentRefused),
        }
    }

    /// Housekeeping that time asks for, at most `budget` steps of it; yields when it wants to be called again.
    pub fn sweep(
        &mut self,
        now: Instant,
        budget: usize,
        out: &mut impl Originate,
    ) -> Option<Instant> {
        self.now = self.now.max(now);
        self.state.learned.age(self.now, budget);
        let rows = u32::try_from(budget).unwrap_or(u32::MAX);
        let swept = self.state.conntrack.sweep(self.now, rows);
        let mut budget = budget.min(crate::fragments::SWEEP);
        while self.state.fragments.waiting() > 0 {
            let Some(released) = self.state.fragments.sweep(self.now, &mut budget) else {
                break;
            };
            self.set_free(Some(released), out);
        }
        if swept.behind {
            return Some(self.now);
        }
        let busy = self.state.conntrack.used() > 0 || self.state.fragments.waiting() > 0;
        let clock_step = self.state.conntrack.settings().clock_step;
        let span = if busy {
            IDLE_SWEEP
        } else {
            Duration::from_micros(clock_step.micros() / 2)
        };
        Some(self.now + span)
    }

    /// One message of a change: `Begin`, `Put`, `Remove` or `Commit`; any other is noted and does nothing.
    /// Not to be called while [`Self::is_applying`].
    pub fn configure(&mut self, message: &ToGuest) -> Outcome {
        let (apply, tables) = (&mut self.apply, &mut self.tables);
        let outcome = match message {
            ToGuest::Begin { generation, fresh } => apply.begin(tables, *generation, *fresh),
            ToGuest::Put(row) => apply.put(tables, row),
            ToGuest::Remove(key) => apply.remove(tables, *key),
            ToGuest::Commit { generation } => apply.commit(tables, *generation),
            _ => Outcome::Noted,
        };
        if let Outcome::Committed(_) = outcome {
            self.settle_connections();
        }
        outcome
    }

    /// How connections are kept may have changed: the shadow still holds what held before.
    fn settle_connections(&mut self) {
        let (row, former): (ConnectionsRow, ConnectionsRow) =
            (self.tables.connections.live, self.tables.connections.shadow);
        if row == former {
            return;
        }
        self.state.conntrack.set(state::settings(&row));
        if row.adopt_midflow > 0 {
            let span = Duration::from_secs(u64::from(row.adopt_midflow));
            self.state.conntrack.adopt_midflow(self.now + span);
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

    pub const fn conntrack(&self) -> &Conntrack<'m> {
        &self.state.conntrack
    }

    pub const fn conntrack_mut(&mut self) -> &mut Conntrack<'m> {
        &mut self.state.conntrack
    }

    pub const fn stats(&self) -> &Stats<'m> {
        &self.stats
    }

    pub const fn stats_mut(&mut self) -> &mut Stats<'m> {
        &mut self.stats
    }
}

impl<O: Observer> Stages<'_, '_, O> {
    #[inline]
    fn classified(
        &mut self,
        frame: &mut Frame<'_>,
        link: &Link,
        parsed: &Parsed,
        flow: Option<(Flow, FlowHash)>,
    ) -> Result<Verdict, Refusal> {
        let header = reply::ethernet_of(frame).ok_or(DropReason::Malformed)?;
        if let Some(origin) = self.origin {
            self.observer.note(Step::Unwrapped(origin));
        } else {
            classify::link_layer(self.tables, frame.ingress, link, &header)?;
            if frame.offload.tunnel.is_some() {
                return Err(DropReason::NotServed.into());
            }
        }
        let Parsed::Ip(packet) = parsed else {
            self.may_answer(frame.ingress)?;
            reply::arp(frame, self.tables.node(), link)?;
            return Ok(Verdict::Reply);
        };
        let to = header.destination();
        let ingress = frame.ingress;
        match classify::network_layer(self.tables, ingress, link, to, packet)? {
            Class::Transit => {
                if ingress == LinkId::UPLINK && packet.is_icmp_error() {
                    self.listen_to_router(frame, packet)?;
                }
                self.transit(frame, packet, flow)
            }
            // The gateway is every pod's own; nobody else's business.
            Class::Neighbor | Class::Echo if self.origin.is_some() => {
                Err(DropReason::GatewayNotServed.into())
            }
            Class::Neighbor => {
                self.may_answer(ingress)?;
                reply::neighbor(frame, packet, self.tables.node())?;
                Ok(Verdict::Reply)
            }
            Class::Echo => {
                self.may_answer(ingress)?;
                reply::echo(frame, packet, self.tables.node().gateway_mac)?;
                Ok(Verdict::Reply)
            }
        }
    }

    /// The MAC under which the appliance speaks on a link.
    fn own_mac(&self, link: LinkId) -> Mac {
        match self.tables.link(link) {
            Some(row) if link == LinkId::UPLINK => row.mac(),
            _ => self.tables.node().gateway_mac,
        }
    }

    fn may_answer(&mut self, link: LinkId) -> Result<(), DropReason> {
        if self.may_speak(link, Cause::Answer) {
            Ok(())
        } else {
            Err(DropReason::RateLimited)
        }
    }

    fn may_speak(&mut self, link: LinkId, cause: Cause) -> bool {
        if O::DRY {
            self.state.limiter.would_allow(link, cause, self.now)
        } else {
            self.state.limiter.allows(link, cause, self.now)
        }
    }

    /// Turns a refused packet into an answer to its sender, if one may be sent; else it ends as a drop for its reason.
    #[cold]
    fn tell(&mut self, frame: &mut Frame<'_>, parsed: &Parsed, refusal: Refusal) -> Verdict {
        let drop = Verdict::Drop(refusal.reason);
        let (Parsed::Ip(packet), Some(answer)) = (parsed, refusal.answer) else {
            return drop;
        };
        let Some(header) = reply::ethernet_of(frame) else {
            return drop;
        };
        let may = reply::may_report(packet, header.destination())
            && self.flow_may(packet, answer)
            && self.may_speak(frame.ingress, answer.cause());
        if !may {
            return drop;
        }
        let own_mac = self.own_mac(frame.ingress);
        let tcp = packet.protocol == protocol::TCP;
        let told = match answer {
            Answer::Reset | Answer::Refused if tcp => reply::reset(frame, packet, own_mac),
            Answer::Reset => None,
            Answer::Refused => self.report(frame, packet, reply::Trouble::PortUnreachable),
            Answer::Error(trouble) => self.report(frame, packet, trouble),
        };
        match told.and_then(|()| self.return_to_sender(frame)) {
            Some(()) => Verdict::Reply,
            None => drop,
        }
    }

    fn flow_may(&mut self, packet: &Packet, answer: Answer) -> bool {
        let (from, to) = (packet.source, packet.destination);
        answer.cause() != Cause::TooBig
            || O::DRY
            || self.state.limiter.allows_flow(from, to, self.now)
    }

    /// An ICMP error, in the node's name where it has one.
    fn report(
        &self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        trouble: reply::Trouble,
    ) -> Option<()> {
        let nat = self.tables.nat();
        let source = nat.and_then(|nat| nat.address(packet.family));
        // The gateway is only known to pods of this node; others know the node.
        let tunnel = self.origin.and(self.tables.overlay().tunnel());
        let source = source.or(tunnel.and_then(|tunnel| tunnel.source(packet.family)));
        let source = source.unwrap_or(self.tables.node().gateway(packet.family));
        reply::error(frame, packet, trouble, source, self.own_mac(frame.ingress))
    }
}

const _: () = assert!(ethernet::LENGTH == 14);
