//! A batch on its way: all frames are parsed, all memory they will ask for is under way, then each goes to its end.

use super::state::State;
use super::transit::Stages;
use super::tunnel;
use crate::classify;
use crate::connection::flow_of;
use crate::decap::{self, Origin};
use crate::flow::{Flow, FlowHash};
use crate::fragments::{Fate, Piece, Released, is_piece};
use crate::frame::Frame;
use crate::group::Group;
use crate::nat::Candidates;
use crate::observe::{Observer, Silent, Step};
use crate::parse::{self, Content, Fragment, Packet};
use crate::service;
use crate::stats::Stats;
use crate::tables::{Place, Tables};
use crate::time::Instant;
use crate::verdict::{Originate, Verdict};
use heapless::Vec;
use sluice_contract::{DropReason, LinkId};

/// Frames that are parsed together: enough to hide a cache miss, few enough for their headers to stay in the first cache.
pub(super) const BATCH: usize = 32;
/// Headroom of a frame that waited.
pub(super) const HEADROOM: usize = 128;

/// What a frame was found to be, before its turn comes. Written in place: copies of what was just written stall.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) content: Result<Content, DropReason>,
    pub(super) packet: Packet,
    /// Of a packet that is no later fragment.
    pub(super) flow: Flow,
    pub(super) hash: FlowHash,
    /// The node it came from, if it came in a tunnel, which is off now.
    pub(super) origin: Option<Origin>,
    /// Bytes of the frame as it came.
    length: usize,
}

impl Ready {
    pub(super) const NOTHING: Self = Self {
        content: Err(DropReason::Malformed),
        packet: Packet::EMPTY,
        flow: Flow::NONE,
        hash: FlowHash(0),
        origin: None,
        length: 0,
    };
}

/// What a batch works with.
#[derive(Debug)]
pub(super) struct Core<'s, 'm> {
    pub(super) tables: &'s Tables<'m>,
    pub(super) stats: &'s mut Stats<'m>,
    pub(super) state: &'s mut State<'m>,
    pub(super) now: Instant,
}

impl<'m> Core<'_, 'm> {
    /// Parses a batch, and has the memory on its way that the packets will ask for.
    #[inline]
    pub(super) fn look_ahead(&self, frames: &mut [Frame<'_>], ready: &mut [Ready; BATCH]) {
        // The first line of each frame was written by somebody else: read them all, so that the misses overlap.
        let first = frames
            .iter()
            .map(|frame| frame.bytes().first().copied().unwrap_or(0));
        core::hint::black_box(first.fold(0u8, |sum, byte| sum ^ byte));
        let mut hashes = [FlowHash(0); BATCH];
        let mut whose = [0; BATCH];
        let mut count = 0;
        for (n, (frame, ready)) in frames.iter_mut().zip(ready.iter_mut()).enumerate() {
            self.prepare(frame, ready);
            if let (Ok(Content::Ip), Some(slot), Some(who)) =
                (ready.content, hashes.get_mut(count), whose.get_mut(count))
            {
                *slot = ready.hash;
                *who = n;
                count += 1;
            }
        }
        let unknown = self
            .state
            .conntrack
            .touch(hashes.get(..count).unwrap_or_default());
        if unknown != 0 {
            self.look_further(ready, &whose, unknown);
        }
    }

    /// Has the memory on its way that new connections will ask for: `unknown` has a bit for each of those at `whose`.
    fn look_further(&self, ready: &[Ready; BATCH], whose: &[usize; BATCH], unknown: u64) {
        let mut flows: Vec<&Flow, BATCH> = Vec::new();
        for (n, at) in whose.iter().enumerate() {
            let is_new = unknown >> n & 1 == 1;
            if let Some(ready) = ready
                .get(*at)
                .filter(|ready| is_new && ready.origin.is_none())
            {
                // There are no more than frames.
                let _ = flows.push(&ready.flow);
            }
        }
        let mut hashes: Vec<FlowHash, BATCH> = Vec::new();
        let hash = |flow: Flow| self.state.conntrack.hash(&flow);
        for (flow, address, port) in service::touch(self.tables, &flows) {
            let _ = hashes.push(hash(flow.with_destination(address, port)));
        }
        if let Some(nat) = self.tables.nat().filter(|nat| nat.row.masquerade_egress) {
            let leaves = |flow: &&&Flow| self.tables.place(flow.destination()) == Place::Elsewhere;
            for flow in flows.iter().filter(leaves) {
                let address = nat.address(flow.family());
                let port = Candidates::of(&self.state.hasher, nat, flow).next();
                if let (Some(address), Some(port)) = (address, port) {
                    let _ = hashes.push(hash(flow.with_source(address, port)));
                }
            }
        }
        self.state.conntrack.touch_buckets(&hashes);
    }

    #[inline]
    pub(super) fn prepare(&self, frame: &mut Frame<'_>, ready: &mut Ready) {
        ready.length = frame.length();
        ready.origin = None;
        ready.content = parse::parse_into(frame, &mut ready.packet);
        if frame.ingress == LinkId::UPLINK && ready.content == Ok(Content::Ip) {
            self.unwrap(frame, ready);
        }
        if ready.content == Ok(Content::Ip) && ready.packet.fragment != Fragment::Later {
            ready.flow = flow_of(&ready.packet);
            ready.hash = self.state.conntrack.hash(&ready.flow);
        }
    }

    /// Takes the tunnel off, if there is one.
    fn unwrap(&self, frame: &mut Frame<'_>, ready: &mut Ready) {
        if !decap::is_tunnelled(self.tables.overlay(), &ready.packet) {
            return;
        }
        match tunnel::unwrap(self.tables, frame, &mut ready.packet) {
            Ok(from) => ready.origin = Some(from),
            Err(reason) => ready.content = Err(reason),
        }
    }

    #[inline]
    pub(super) fn process<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        ready: &Ready,
        out: &mut impl Originate,
        observer: &mut O,
    ) -> Verdict {
        self.stats.count_received(frame.ingress, ready.length);
        let verdict = match ready.content {
            Ok(Content::Ip) if is_piece(&ready.packet) => {
                self.fragment(frame, ready, out, observer)
            }
            _ => self.decide(frame, ready, observer),
        };
        let verdict = match verdict {
            Verdict::Drop(DropReason::TooBig) => match self.state.cut.take() {
                Some(mtu) => self.cut(frame, ready, mtu, out, observer),
                None => verdict,
            },
            verdict => verdict,
        };
        self.stats
            .count_verdict(verdict, frame.ingress, frame.length(), frame.offload.gso);
        self.stats.would_deny = self.state.would_deny;
        verdict
    }

    /// The same for a packet that only might come: nobody counts it, and it leaves no trace.
    pub(super) fn trace<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        observer: &mut O,
    ) -> Verdict {
        let mut ready = Ready::NOTHING;
        self.prepare(frame, &mut ready);
        if ready.content == Ok(Content::Ip) && ready.packet.fragment == Fragment::Later {
            let piece = Piece::of(frame, &ready.packet);
            match piece.map(|piece| self.state.fragments.peek(&piece, self.now)) {
                Some(Fate::Of(flow)) => self.follow_flow(&mut ready, flow, observer),
                Some(Fate::Waiting) => return Verdict::Held,
                Some(Fate::Refused(reason)) => return Verdict::Drop(reason),
                None => return Verdict::Drop(DropReason::Malformed),
            }
        }
        let verdict = self.decide(frame, &ready, observer);
        match self.state.cut.take() {
            Some(mtu) => self.cut_dry(frame, &ready, mtu, observer),
            None => verdict,
        }
    }

    /// All stages, for a frame that stands for itself.
    #[inline]
    pub(super) fn decide<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        ready: &Ready,
        observer: &mut O,
    ) -> Verdict {
        let mut stages = Stages {
            tables: self.tables,
            state: self.state,
            now: self.now,
            origin: ready.origin,
            target: None,
            observer,
        };
        let Some(link) = stages.tables.link(frame.ingress) else {
            return Verdict::Drop(DropReason::UnknownLink);
        };
        let packet = &ready.packet;
        match ready.content {
            Ok(Content::Ip) => {
                let flow = (&ready.flow, ready.hash);
                match stages.classified(frame, link, packet, flow) {
                    Ok(verdict) => verdict,
                    Err(refusal) => stages.tell(frame, packet, refusal),
                }
            }
            Ok(Content::Arp) => stages.arp(frame, link).unwrap_or_else(Verdict::Drop),
            Err(reason) => Verdict::Drop(reason),
        }
    }

    /// A fragment: the first one as any packet, the others after it. What waited for the first goes with it.
    pub(super) fn fragment<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        ready: &Ready,
        out: &mut impl Originate,
        observer: &mut O,
    ) -> Verdict {
        let Some(link) = self.tables.link(frame.ingress) else {
            return Verdict::Drop(DropReason::UnknownLink);
        };
        let Some(piece) = Piece::of(frame, &ready.packet) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        // Nobody fills the room in another's name; of what came in a tunnel that was asked before.
        if ready.origin.is_none()
            && let Err(reason) = classify::whole(self.tables, frame, link, &ready.packet)
        {
            return Verdict::Drop(reason);
        }
        let group = match ready.origin {
            Some(_) => Group::TUNNEL,
            None => link.group(frame.ingress),
        };
        let (fate, released) = self.state.fragments.arrive(&piece, group, self.now);
        self.set_free(released, out);
        let first = ready.packet.fragment == Fragment::First;
        match fate {
            Fate::Refused(reason) => Verdict::Drop(reason),
            _ if first => {
                let verdict = self.decide(frame, ready, observer);
                let passed = matches!(verdict, Verdict::Forward(_)).then_some(&ready.flow);
                let released = self.state.fragments.decide(&piece, passed, self.now);
                self.set_free(released, out);
                self.state.fragments.finish(&piece, self.now);
                verdict
            }
            Fate::Of(flow) => {
                let mut ready = *ready;
                self.follow_flow(&mut ready, flow, observer);
                self.decide(frame, &ready, observer)
            }
            Fate::Waiting => {
                match self
                    .state
                    .fragments
                    .hold(&piece, frame, ready.origin, self.now)
                {
                    Ok(()) => Verdict::Held,
                    Err(reason) => Verdict::Drop(reason),
                }
            }
        }
    }

    /// A later fragment is of this flow.
    fn follow_flow<O: Observer>(&self, ready: &mut Ready, flow: Flow, observer: &mut O) {
        observer.note(Step::Fragment(flow));
        ready.flow = flow;
        ready.hash = self.state.conntrack.hash(&flow);
    }

    /// Frames that waited go on, or end.
    pub(super) fn set_free(&mut self, released: Option<Released>, out: &mut impl Originate) {
        let Some(mut released) = released else { return };
        while let Some(waited) = self.state.fragments.take(&mut released) {
            let mut buffer = [0; HEADROOM + crate::fragments::ROOM];
            let Some(mut frame) = waited.frame(&mut buffer, HEADROOM) else {
                continue;
            };
            let verdict = match released.dropped {
                Some(reason) => Verdict::Drop(reason),
                None => self.follow(&mut frame, waited.origin),
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
    fn follow(&mut self, frame: &mut Frame<'_>, origin: Option<Origin>) -> Verdict {
        let mut ready = Ready::of(frame, origin);
        let piece = Piece::of(frame, &ready.packet);
        match piece.map(|piece| self.state.fragments.peek(&piece, self.now)) {
            Some(Fate::Of(flow)) => {
                self.follow_flow(&mut ready, flow, &mut Silent);
                self.decide(frame, &ready, &mut Silent)
            }
            _ => Verdict::Drop(DropReason::FragmentRefused),
        }
    }
}
