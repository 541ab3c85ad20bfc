//! The first stage, and the last resort: who a frame is for, and what its sender is told if it goes no further.

use super::cut;
use super::refusal::{Answer, Refusal};
use super::transit::Stages;
use crate::bandwidth::Direction as Bandwidth;
use crate::classify::{self, Class};
use crate::ecn;
use crate::flow::{Flow, FlowHash};
use crate::frame::Frame;
use crate::limiter::Cause;
use crate::observe::{Observer, Step};
use crate::parse::Packet;
use crate::reply;
use crate::tables::Link;
use crate::verdict::Verdict;
use crate::wire::{ethernet, protocol};
use sluice_contract::{DropReason, LinkId, Mac};

impl<O: Observer> Stages<'_, '_, O> {
    /// Sends an IP packet to whom it concerns.
    #[inline]
    pub(super) fn classified(
        &mut self,
        frame: &mut Frame<'_>,
        link: &Link,
        packet: &Packet,
        flow: (&Flow, FlowHash),
    ) -> Result<Verdict, Refusal> {
        let header = reply::ethernet_of(frame).ok_or(DropReason::Malformed)?;
        if let Some(origin) = self.origin {
            self.observer.note(Step::Unwrapped(origin));
        } else {
            classify::link_layer(self.tables, frame.ingress, link, header)?;
            if frame.offload.tunnel.is_some() {
                return Err(DropReason::NotServed.into());
            }
        }
        let to = header.destination();
        let ingress = frame.ingress;
        match classify::network_layer(self.tables, ingress, link, to, packet)? {
            Class::Transit => {
                if link.is_limited() {
                    self.spend(frame, (ingress, link), Bandwidth::Egress)?;
                }
                if let Some(dscp) = link.mark() {
                    mark(frame, packet, dscp)?;
                }
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

    /// Answers ARP, if it is the appliance's to answer.
    pub(super) fn arp(
        &mut self,
        frame: &mut Frame<'_>,
        link: &Link,
    ) -> Result<Verdict, DropReason> {
        let header = reply::ethernet_of(frame).ok_or(DropReason::Malformed)?;
        classify::link_layer(self.tables, frame.ingress, link, header)?;
        self.may_answer(frame.ingress)?;
        reply::arp(frame, self.tables.node(), link)?;
        Ok(Verdict::Reply)
    }

    /// The MAC under which the appliance speaks on a link.
    pub(super) fn own_mac(&self, link: LinkId) -> Mac {
        match self.tables.link(link) {
            Some(row) if link == LinkId::UPLINK => row.mac(),
            _ => self.tables.node().gateway_mac,
        }
    }

    pub(super) fn may_answer(&mut self, link: LinkId) -> Result<(), DropReason> {
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
    pub(super) fn tell(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        refusal: Refusal,
    ) -> Verdict {
        self.observer.note(Step::Refused(refusal.reason));
        let drop = Verdict::Drop(refusal.reason);
        let Some(answer) = refusal.answer else {
            return drop;
        };
        if let Answer::Error(reply::Trouble::TooBig(mtu)) = answer
            && cut::is_possible(frame, packet, mtu)
        {
            self.state.cut = Some(mtu);
            return drop;
        }
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
        let sent = told.and_then(|()| match self.named() {
            Some(_) => self.return_to_client(frame, packet),
            None => self.return_to_sender(frame),
        });
        match sent {
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

/// Gives the packet another DSCP. Its congestion bits stay: they are the ends' and the routers' to change.
#[cold]
fn mark(frame: &mut Frame<'_>, packet: &Packet, dscp: u8) -> Result<(), DropReason> {
    let bytes = frame.bytes_mut().get_mut(ethernet::LENGTH..);
    let bytes = bytes.ok_or(DropReason::Malformed)?;
    let class = ecn::class_of(bytes, packet.family).ok_or(DropReason::Malformed)?;
    ecn::set_class(bytes, packet.family, ecn::remark(class, dscp)).ok_or(DropReason::Malformed)
}
