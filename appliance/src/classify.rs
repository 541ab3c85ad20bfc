//! Who is it from, and who is it for: the first checks of every packet, before any state is asked.

use crate::address::{Address, Family};
use crate::frame::Frame;
use crate::parse::{Fragment, Packet, Transport};
use crate::reply::ethernet_of;
use crate::tables::{Link, Tables};
use crate::wire::{ethernet, icmp, protocol};
use sluice_contract::{DropReason, LinkId, Mac};

/// What is to be done with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// To be answered or ignored by the neighbor discovery responder.
    Neighbor,
    /// An echo request to the gateway.
    Echo,
    /// To be sent on.
    Transit,
}

/// Checks the frame's addresses, which every kind of packet has to pass.
///
/// # Errors
/// Why the frame is to be dropped.
#[inline]
pub fn link_layer(
    tables: &Tables<'_>,
    ingress: LinkId,
    link: &Link,
    header: &ethernet::Header,
) -> Result<(), DropReason> {
    let source = header.source();
    let honest = if ingress == LinkId::UPLINK {
        !source.is_group()
    } else {
        source == link.mac()
    };
    if !honest {
        return Err(DropReason::Spoof);
    }
    let to = header.destination();
    let own = if ingress == LinkId::UPLINK {
        link.mac()
    } else {
        tables.node().gateway_mac
    };
    if to == own || to.is_group() {
        Ok(())
    } else {
        Err(DropReason::NotForUs)
    }
}

/// Decides what an IP packet is, after [`link_layer`] has passed it.
///
/// # Errors
/// Why the frame is to be dropped.
#[inline]
pub fn network_layer(
    tables: &Tables<'_>,
    ingress: LinkId,
    link: &Link,
    to: Mac,
    packet: &Packet,
) -> Result<Class, DropReason> {
    let neighbor = is_neighbor(packet);
    if ingress != LinkId::UPLINK && !link.owns(packet.source) {
        // A link-local or unspecified source never leaves the link: it may speak to the gateway and no further.
        let discovery = packet.source.is_link_local6() || packet.source == Address::UNSPECIFIED;
        let on_link = neighbor || packet.destination == tables.node().gateway6;
        if !discovery || !on_link {
            return Err(refuse_unowned(packet));
        }
    }
    if neighbor {
        return Ok(Class::Neighbor);
    }
    if to.is_group() || packet.destination.is_multicast() || packet.destination.is_broadcast4() {
        return Err(DropReason::Multicast);
    }
    if packet.destination == tables.node().gateway(packet.family) {
        if packet.is_echo() && packet.fragment == Fragment::Whole {
            return Ok(Class::Echo);
        }
        return Err(DropReason::GatewayNotServed);
    }
    if packet.source.is_link_local6() || packet.source == Address::UNSPECIFIED {
        return Err(DropReason::Spoof);
    }
    Ok(Class::Transit)
}

/// Both checks at once, for a packet whose turn has not come yet.
///
/// # Errors
/// Why the frame is to be dropped.
pub fn whole(
    tables: &Tables<'_>,
    frame: &Frame<'_>,
    link: &Link,
    packet: &Packet,
) -> Result<(), DropReason> {
    let header = ethernet_of(frame).ok_or(DropReason::Malformed)?;
    link_layer(tables, frame.ingress, link, header)?;
    network_layer(tables, frame.ingress, link, header.destination(), packet).map(|_| ())
}

/// What the kernel of an honest pod says from its link-local address (multicast listener reports) is no spoof.
fn refuse_unowned(packet: &Packet) -> DropReason {
    if packet.source.is_link_local6() && packet.destination.is_multicast() {
        DropReason::Multicast
    } else {
        DropReason::Spoof
    }
}

fn is_neighbor(packet: &Packet) -> bool {
    packet.protocol == protocol::ICMP6
        && packet.family == Family::V6
        && matches!(packet.transport, Transport::Icmp { kind, .. } if icmp::v6::is_neighbor(kind))
}
