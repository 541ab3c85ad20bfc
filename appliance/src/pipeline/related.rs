//! ICMP errors: each is about a packet that it quotes, belongs to that packet's connection, and is translated outside and inside
//! (RFC 5508 §4). An error neither refreshes nor ends a connection (REQ-6), and one about nothing known is dropped.

use super::refusal::Refusal;
use super::transit::Stages;
use crate::address::{Address, Family};
use crate::connection::{Memo, flow_of};
use crate::flow::Flow;
use crate::frame::Frame;
use crate::observe::{Observer, Step};
use crate::parse::{Fragment, Packet, quoted};
use crate::rewrite;
use crate::service::Origin;
use crate::verdict::Verdict;
use crate::wire::{checksum, icmp, protocol};
use sluice_contract::DropReason;
use zerocopy::{FromBytes, big_endian::U16};

const UNRELATED: DropReason = DropReason::IcmpUnrelated;

impl<O: Observer> Stages<'_, '_, O> {
    /// An ICMP error on its way.
    #[cold]
    pub(super) fn related(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
    ) -> Result<Verdict, Refusal> {
        let message = whole_message(frame, packet).ok_or(UNRELATED)?;
        if !sum_holds(packet, message) {
            return Err(DropReason::BadChecksum.into());
        }
        let inner = message.get(icmp::LENGTH..).ok_or(UNRELATED)?;
        let (inside, sequence) = quoted(inner, packet.family).ok_or(UNRELATED)?;
        let quoted = flow_of(&inside);
        // It is sent to whom it quotes.
        if quoted.source() != packet.destination {
            return Err(UNRELATED.into());
        }
        let found = self.state.conntrack.related(&quoted, sequence, self.now);
        let hit = found.ok_or(UNRELATED)?;
        self.observer.note(Step::Related {
            direction: hit.direction,
        });
        let memo = Memo::unpack(self.state.conntrack.attached(hit.id).words).ok_or(UNRELATED)?;
        if frame.ingress != memo.ingress(hit.direction) {
            return Err(DropReason::Spoof.into());
        }
        let leaves = self.state.conntrack.outgoing(hit).ok_or(UNRELATED)?;
        let attached = self.state.conntrack.attached(hit.id);
        let path = if attached.stamp.policy == self.tables.epoch {
            memo.path(hit.direction)
        } else {
            self.path(leaves.destination())?
        };
        let mut hop = self.hop(path)?;
        if memo.direct || self.named().is_some() {
            self.directly(frame, packet, hit, &memo, &mut hop)?;
        }
        self.has_room(frame, packet, &hop)?;
        // The other end speaks for itself, a router in between keeps its own address, which is none of the cluster's.
        let source = if packet.source == quoted.destination() {
            leaves.source()
        } else {
            self.admit(frame, packet, Origin::of(frame.ingress))?;
            packet.source
        };
        let outer = (source, leaves.destination());
        if leaves.reversed() != quoted && self.target.is_none() {
            self.observer.note(Step::Rewritten(leaves));
            translate(frame, packet, &inside, (&quoted, &leaves.reversed()), outer)
                .ok_or(UNRELATED)?;
        }
        self.send_on(frame, packet, &hop)
    }
}

/// The ICMP message, if all of it is at hand.
fn whole_message<'f>(frame: &'f Frame<'_>, packet: &Packet) -> Option<&'f [u8]> {
    if packet.fragment != Fragment::Whole {
        return None;
    }
    frame
        .bytes()
        .get(usize::from(packet.payload)..packet.end as usize)
}

/// Whether the message's checksum is right. No kernel leaves that of an ICMP error to the far side.
fn sum_holds(packet: &Packet, message: &[u8]) -> bool {
    let initial = pseudo(
        packet.family,
        packet.source,
        packet.destination,
        message.len(),
    );
    checksum::finish(checksum::sum(message, initial)) == 0
}

fn pseudo(family: Family, source: Address, destination: Address, length: usize) -> u64 {
    match family {
        Family::V4 => 0,
        Family::V6 => checksum::pseudo(source, destination, protocol::ICMP6, length),
    }
}

/// Changes the quotation from one flow to another, the outer addresses to `outer`, and sums up anew.
fn translate(
    frame: &mut Frame<'_>,
    packet: &Packet,
    inside: &Packet,
    (from, to): (&Flow, &Flow),
    (source, destination): (Address, Address),
) -> Option<()> {
    let bytes = frame.bytes_mut();
    let outer_from = Flow::new(packet.source, packet.destination, packet.protocol, 0, 0);
    let outer_to = Flow::new(source, destination, packet.protocol, 0, 0);
    rewrite::addresses(bytes.get_mut(packet.network()..)?, &outer_from, &outer_to)?;
    let message = bytes.get_mut(usize::from(packet.payload)..packet.end as usize)?;
    let inner = message.get_mut(icmp::LENGTH..)?;
    let delta = rewrite::addresses(inner, from, to)?;
    let transport = inner.get_mut(usize::from(inside.payload)..)?;
    rewrite::quoted_ports(transport, from.protocol(), delta, (from, to))?;
    let (header, _) = icmp::Header::mut_from_prefix(&mut *message).ok()?;
    header.checksum = U16::new(0);
    let initial = pseudo(packet.family, source, destination, message.len());
    let sum = checksum::finish(checksum::sum(message, initial));
    let (header, _) = icmp::Header::mut_from_prefix(message).ok()?;
    header.checksum = U16::new(sum);
    Some(())
}
