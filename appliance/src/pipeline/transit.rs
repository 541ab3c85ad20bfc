//! A packet that is to be sent on: its connection is found, or made, and says where it leaves and as what.

use super::refusal::{Answer, Refusal};
use super::state::State;
use crate::address::Address;
use crate::bandwidth::{Direction as Bandwidth, Kind, wire_bytes, wire_packets};
use crate::connection::{Memo, Path, Way, signal_of};
use crate::conntrack::{Attached, Hit, Signal, Track};
use crate::decap;
use crate::encap::{self, Told};
use crate::flow::{Direction, Flow, FlowHash};
use crate::frame::Frame;
use crate::observe::{Observer, Step};
use crate::overlay::Target;
use crate::parse::{Fragment, Packet};
use crate::reply::Trouble;
use crate::rewrite;
use crate::route::{self, NextHop};
use crate::tables::{Link, Place, Tables};
use crate::time::Instant;
use crate::verdict::Verdict;
use sluice_contract::overlay::PeerId;
use sluice_contract::policy::Established;
use sluice_contract::service::PortId;
use sluice_contract::{DropReason, Identity, LinkId};

/// The stages behind classification, for one packet.
#[derive(Debug)]
pub(super) struct Stages<'s, 'm, O> {
    pub(super) tables: &'s Tables<'m>,
    pub(super) state: &'s mut State<'m>,
    pub(super) now: Instant,
    /// The node that the packet came from, if it came in a tunnel.
    pub(super) origin: Option<decap::Origin>,
    /// The backend that is named to the next node; the packet then goes there as it is.
    pub(super) target: Option<Target>,
    pub(super) observer: &'s mut O,
}

/// What an older connection is worth under the present tables.
enum Judged {
    Good(Memo),
    /// It is over; the packet begins another one.
    Over,
}

impl<O: Observer> Stages<'_, '_, O> {
    /// Sends a packet on, which is of this flow.
    #[inline]
    pub(super) fn transit(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        (flow, hash): (&Flow, FlowHash),
    ) -> Result<Verdict, Refusal> {
        if packet.hops <= 1 {
            let answer = Answer::Error(Trouble::TimeExceeded);
            return Err(Refusal::told(DropReason::TtlExpired, answer));
        }
        if packet.is_icmp_error() {
            return self.related(frame, packet);
        }
        self.observer.note(Step::Flow(*flow));
        if self.is_about_names(packet, flow.destination_port()) {
            self.note_question(frame, packet, flow);
        }
        match self.state.conntrack.lookup(flow, hash, self.now) {
            Some(hit) => self.belonging(frame, packet, flow, hash, hit),
            None => self.beginning(frame, packet, flow, hash),
        }
    }

    /// A packet whose connection is known.
    #[inline]
    pub(super) fn belonging(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        flow: &Flow,
        hash: FlowHash,
        hit: Hit,
    ) -> Result<Verdict, Refusal> {
        let attached = self.state.conntrack.attached(hit.id);
        let current = attached.stamp.policy == self.tables.epoch;
        let memo = match Memo::unpack(attached.words) {
            Some(memo) if current => memo,
            Some(memo) => match self.judge_again(hit, &attached, &memo)? {
                Judged::Good(memo) => memo,
                Judged::Over => return self.beginning(frame, packet, flow, hash),
            },
            None => return Err(DropReason::CtInvalid.into()),
        };
        self.observer.note(Step::Connection {
            direction: hit.direction,
            state: hit.state,
            judged_again: !current,
        });
        // Who owns the addresses is behind the link from which the connection's packets came so far.
        if frame.ingress != memo.ingress(hit.direction) {
            return Err(DropReason::Spoof.into());
        }
        let mut hop = self.hop(memo.path(hit.direction))?;
        if memo.direct || self.named().is_some() {
            self.directly(frame, packet, hit, &memo, &mut hop)?;
        }
        self.has_room(frame, packet, &hop)?;
        if packet.fragment != Fragment::Later {
            let signal = signal_of(frame, packet).ok_or(DropReason::CtInvalid)?;
            match self.track(hit, &signal)? {
                Track::Belongs => {}
                Track::Anew => return self.beginning(frame, packet, flow, hash),
            }
        }
        if self.target.is_some() || !self.state.conntrack.is_translated(hit.id) {
            if self.is_about_names(packet, flow.source_port()) {
                self.note_answer(frame, packet, hit, hop.link);
            }
            return self.send_on(frame, packet, &hop);
        }
        let outgoing = self.state.conntrack.outgoing(hit);
        let outgoing = outgoing.ok_or(DropReason::CtInvalid)?;
        if self.is_about_names(packet, outgoing.source_port()) {
            self.note_answer(frame, packet, hit, hop.link);
        }
        self.send(frame, packet, flow, &outgoing, &hop)
    }

    #[inline]
    fn track(&mut self, hit: Hit, signal: &Signal) -> Result<Track, Refusal> {
        let tracked = if O::DRY {
            self.state.conntrack.judge(hit, signal)
        } else {
            self.state.conntrack.track(hit, signal, self.now)
        };
        tracked.map_err(|invalid| {
            self.observer.note(Step::Invalid(invalid));
            DropReason::CtInvalid.into()
        })
    }

    /// The last steps: the packet becomes the one that leaves.
    #[inline]
    pub(super) fn send(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        flow: &Flow,
        outgoing: &Flow,
        hop: &NextHop,
    ) -> Result<Verdict, Refusal> {
        if outgoing != flow && self.target.is_none() {
            self.observer.note(Step::Rewritten(*outgoing));
            rewrite::rewrite(frame, packet, flow, outgoing)?;
            if packet.fragment != Fragment::Whole && outgoing.source() != flow.source() {
                let mask = rewrite::mask(&self.state.hasher, flow.source());
                rewrite::renumber(frame, packet, mask)?;
            }
        }
        self.send_on(frame, packet, hop)
    }

    /// The packet, as it shall arrive, gets what it needs on its way.
    #[inline]
    pub(super) fn send_on(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        hop: &NextHop,
    ) -> Result<Verdict, Refusal> {
        route::send_on(frame, packet, hop)?;
        if let Some(exit) = &hop.exit {
            let link = self.tables.link(frame.ingress);
            let sender = link.map_or(Identity::WORLD, Link::identity);
            // Who is the host there is nobody in particular here.
            let identity = if sender.is_pod() {
                sender
            } else {
                Identity::WORLD
            };
            let target = self.target;
            let told = Told { identity, target };
            encap::send(frame, packet, self.tables.overlay(), exit, hop.source, told)?;
        }
        Ok(Verdict::Forward(hop.link))
    }

    /// Whether the packet fits the way out, in length and in bandwidth.
    #[inline]
    pub(super) fn has_room(
        &mut self,
        frame: &Frame<'_>,
        packet: &Packet,
        hop: &NextHop,
    ) -> Result<(), Refusal> {
        fits(frame, packet, hop)?;
        let limited = self.tables.link(hop.link).filter(|link| link.is_limited());
        match limited {
            Some(link) => self.spend(frame, (hop.link, link), Bandwidth::Ingress),
            None => Ok(()),
        }
    }

    /// Takes the frame out of the bucket of a link's direction.
    #[cold]
    pub(super) fn spend(
        &mut self,
        frame: &Frame<'_>,
        (id, link): (LinkId, &Link),
        direction: Bandwidth,
    ) -> Result<(), Refusal> {
        if link.has_packet_rate() {
            let (what, count) = ((Kind::Packets, direction), wire_packets(frame));
            self.spend_count((id, link), what, count)?;
        }
        let Some(limit) = link.limit(direction) else {
            return Ok(());
        };
        let (whose, bytes) = ((id, link.incarnation), wire_bytes(frame));
        let now = (self.now, O::DRY);
        if self
            .state
            .meters
            .allows(whose, direction, limit, bytes, now)
        {
            return Ok(());
        }
        Err(match direction {
            Bandwidth::Egress => DropReason::BandwidthEgress.into(),
            Bandwidth::Ingress => DropReason::BandwidthIngress.into(),
        })
    }

    /// Whether a pod may open another connection, and the one it is for may get one.
    pub(super) fn may_connect(&mut self, from: LinkId, to: LinkId) -> Result<(), Refusal> {
        for (id, direction) in [(from, Bandwidth::Egress), (to, Bandwidth::Ingress)] {
            let link = self.tables.link(id);
            if let Some(link) = link.filter(|link| link.has_connection_rate()) {
                self.spend_count((id, link), (Kind::Connections, direction), 1)?;
            }
        }
        Ok(())
    }

    /// Takes packets or connections out of a bucket of a link.
    fn spend_count(
        &mut self,
        (id, link): (LinkId, &Link),
        (kind, direction): (Kind, Bandwidth),
        count: u64,
    ) -> Result<(), Refusal> {
        let rates = self.tables.rates(id);
        let Some(rate) = rates.and_then(|rates| rates.rate(kind, direction)) else {
            return Ok(());
        };
        let (whose, when) = ((id, link.incarnation), (self.now, O::DRY));
        let meters = &mut self.state.meters;
        if meters.allows_count(whose, (kind, direction), rate, count, when) {
            return Ok(());
        }
        Err(match (kind, direction) {
            (Kind::Packets, Bandwidth::Egress) => DropReason::PacketRateEgress.into(),
            (Kind::Packets, Bandwidth::Ingress) => DropReason::PacketRateIngress.into(),
            (Kind::Connections, Bandwidth::Egress) => DropReason::ConnectionRateEgress.into(),
            (Kind::Connections, Bandwidth::Ingress) => DropReason::ConnectionRateIngress.into(),
        })
    }

    /// The way out of a path.
    #[inline]
    pub(super) fn hop(&mut self, path: Path) -> Result<NextHop, Refusal> {
        self.observer.note(Step::Route(path));
        let hop = route::hop(self.tables, &self.state.learned, path);
        hop.map_err(|reason| match reason {
            DropReason::NoNeighbor => {
                Refusal::told(reason, Answer::Error(Trouble::HostUnreachable))
            }
            _ => reason.into(),
        })
    }

    /// The way to an address; if it ends at a neighbor nobody knows, that one is asked for.
    pub(super) fn path(&mut self, destination: Address) -> Result<Path, DropReason> {
        self.path_at(destination, self.tables.place(destination))
    }

    /// The same, where the destination's place is known already.
    pub(super) fn path_at(
        &mut self,
        destination: Address,
        place: Place,
    ) -> Result<Path, DropReason> {
        let path = route::path_at(self.tables, destination, place);
        self.asking(destination, path)
    }

    fn asking(
        &mut self,
        destination: Address,
        path: Result<Path, DropReason>,
    ) -> Result<Path, DropReason> {
        if path == Err(DropReason::NoNeighbor) && !O::DRY {
            self.state.wanted.note(destination, self.now);
        }
        path
    }

    /// The connection was made under other tables: are its ends still the same, does its backend still serve, does policy still
    /// allow it, and where does it leave now?
    #[cold]
    fn judge_again(
        &mut self,
        hit: Hit,
        attached: &Attached,
        memo: &Memo,
    ) -> Result<Judged, Refusal> {
        let ct = &self.state.conntrack;
        let (Some(original), Some(reply)) = (ct.original(hit.id), ct.reply(hit.id)) else {
            return Ok(Judged::Over);
        };
        let (client, backend) = (original.source(), reply.source());
        let same_ends = self.incarnation(memo.path(Direction::Reply).link)
            == attached.stamp.originator
            && self.incarnation_at(backend) == attached.stamp.responder;
        if !same_ends || self.became_a_service(memo, &original) {
            return Ok(self.over(hit));
        }
        if let Some(service) = memo.service
            && !self.still_serves(service, &reply)
        {
            return self.backend_gone(hit, &original);
        }
        let mut memo = *memo;
        let ingress = memo.path(Direction::Reply).link;
        if self.tables.policy().established() == Established::Judged {
            let begun = original.with_destination(backend, reply.source_port());
            match self.policy(ingress, &begun, self.tables.place(backend), true) {
                Ok(rule) => memo.rule = rule,
                Err(refusal) => {
                    self.over(hit);
                    return Err(refusal);
                }
            }
        }
        let tunnelled = match memo.path(Direction::Reply).way {
            Way::Peer(peer) => Some(peer),
            _ => None,
        };
        let former = memo.path(Direction::Original);
        let there = self.path(backend)?;
        if memo.direct && !self.still_direct(former, there) {
            return Ok(self.over(hit));
        }
        let back = match former.way {
            Way::Peer(_) if memo.direct => Path::to(ingress),
            _ => self.path_back(ingress, client, tunnelled)?,
        };
        memo.paths = [there, back];
        if !O::DRY {
            let mut attached = *attached;
            attached.stamp.policy = self.tables.epoch;
            attached.words = memo.pack();
            self.state.conntrack.attach(hit.id, attached);
        }
        Ok(Judged::Good(memo))
    }

    fn over(&mut self, hit: Hit) -> Judged {
        if !O::DRY {
            self.state.conntrack.remove(hit.id);
        }
        Judged::Over
    }

    /// A connection that was none of a Service's, to an address that is one's now.
    fn became_a_service(&self, memo: &Memo, original: &Flow) -> bool {
        let place = self.tables.place(original.destination());
        memo.service.is_none() && crate::service::frontend(self.tables, original, place).is_ok()
    }

    fn still_serves(&self, service: PortId, reply: &Flow) -> bool {
        let services = self.tables.services();
        let serving = services.port(service).and_then(|port| port.serving());
        serving.is_some_and(|set| services.has(set, reply.source(), reply.source_port()))
    }

    /// The backend no longer serves. A datagram goes to another one; a TCP client is told, if that is configured; and what still
    /// comes from the backend must not leave untranslated.
    fn backend_gone(&mut self, hit: Hit, original: &Flow) -> Result<Judged, Refusal> {
        let tcp = original.protocol() == crate::wire::protocol::TCP;
        let reset = self.tables.nat().is_some_and(|nat| nat.row.reset_gone);
        let over = self.over(hit);
        match hit.direction {
            Direction::Reply => Err(DropReason::SvcBackendGone.into()),
            Direction::Original if !tcp => Ok(over),
            Direction::Original if reset => {
                Err(Refusal::told(DropReason::SvcBackendGone, Answer::Reset))
            }
            Direction::Original => Err(DropReason::SvcBackendGone.into()),
        }
    }

    /// Which incarnation of its pod is behind a link; 0: none.
    pub(super) fn incarnation(&self, link: LinkId) -> u32 {
        self.tables.link(link).map_or(0, |link| link.incarnation)
    }

    /// The same of the link that owns an address; 0 for an address that is behind none.
    fn incarnation_at(&self, address: Address) -> u32 {
        self.incarnation_of(self.tables.place(address))
    }

    /// The same of what is at a place.
    pub(super) fn incarnation_of(&self, place: Place) -> u32 {
        match place {
            Place::Link(link) => self.incarnation(link),
            _ => 0,
        }
    }

    /// Where answers to `client` leave, whose packets came from `ingress`, or from a node whose own address it is: that node's
    /// business is answered as it was asked.
    pub(super) fn path_back(
        &mut self,
        ingress: LinkId,
        client: Address,
        tunnelled: Option<PeerId>,
    ) -> Result<Path, Refusal> {
        if ingress != LinkId::UPLINK {
            return Ok(Path::to(ingress));
        }
        let is_node = self.tables.place(client) == Place::Peer;
        match tunnelled {
            Some(peer) if is_node || self.tables.overlay().peer_at(client) == Some(peer) => {
                Ok(Path::to_peer(peer))
            }
            None if is_node => {
                let path = route::bare(self.tables, client);
                Ok(self.asking(client, path)?)
            }
            _ => Ok(self.path(client)?),
        }
    }
}

/// Whether the packet, or each of its segments, fits the way out. What the node probes a way with is of the sizes that are
/// in question.
#[inline]
fn fits(frame: &Frame<'_>, packet: &Packet, hop: &NextHop) -> Result<(), Refusal> {
    if route::wire_length(frame, packet) > usize::from(hop.mtu) && frame.ingress != LinkId::PROBES {
        let answer = Answer::Error(Trouble::TooBig(hop.mtu));
        return Err(Refusal::told(DropReason::TooBig, answer));
    }
    Ok(())
}
