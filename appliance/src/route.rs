//! Where a packet leaves, and whether it fits there.

use crate::address::{Address, Family};
use crate::connection::{Path, Way};
use crate::frame::Frame;
use crate::mtu::Learned;
use crate::overlay::Exit;
use crate::parse::{Packet, Transport};
use crate::tables::{Link, Place, Tables};
use crate::wire::{ethernet, ipv4, ipv6, tcp, udp};
use sluice_contract::{DropReason, LinkId, Mac};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    pub link: LinkId,
    /// The largest IP packet that the link takes.
    pub mtu: u16,
    pub source: Mac,
    pub destination: Mac,
    /// To another node.
    pub exit: Option<Exit>,
}

/// The way to `destination`, in the form in which a connection remembers it.
///
/// # Errors
/// [`DropReason::NoRoute`]; [`DropReason::NoNeighbor`] if nothing is known of whom it would go to.
pub fn path(tables: &Tables<'_>, destination: Address) -> Result<Path, DropReason> {
    path_at(tables, destination, tables.place(destination))
}

/// The same, where it is known already at what place the destination is.
///
/// # Errors
/// [`DropReason::NoRoute`].
pub fn path_at(
    tables: &Tables<'_>,
    destination: Address,
    place: Place,
) -> Result<Path, DropReason> {
    match place {
        Place::Link(link) => return Ok(Path::to(link)),
        Place::Node { .. } => return Ok(Path::to(LinkId::HOST)),
        Place::Cluster | Place::External => return Err(DropReason::NoRoute),
        Place::Peer | Place::Elsewhere => {}
    }
    if is_link_local(destination) {
        return Err(DropReason::NoRoute);
    }
    if let Some(peer) = tables.overlay().remote(destination) {
        return Ok(Path::to_peer(peer));
    }
    bare(tables, destination)
}

/// The way by the uplink as the underlay's own hosts go, whatever lies behind a peer.
///
/// # Errors
/// [`DropReason::NoRoute`]; [`DropReason::NoNeighbor`] if nothing is known of whom it would go to.
pub fn bare(tables: &Tables<'_>, destination: Address) -> Result<Path, DropReason> {
    tables.route(destination).map(Path::to_neighbor)
}

/// 169.254/16 and fe80::/10 never leave the link they are on (RFC 3927 §7, RFC 4291 §2.5.6).
fn is_link_local(address: Address) -> bool {
    let [a, b, ..] = address.v4_octets();
    address.is_link_local6() || (address.family() == Family::V4 && (a, b) == (169, 254))
}

/// The next hop of a path.
///
/// # Errors
/// [`DropReason::NoRoute`] if its link or peer is gone, [`DropReason::NoNeighbor`] if the next hop does not answer.
#[inline]
pub fn hop(tables: &Tables<'_>, learned: &Learned<'_>, path: Path) -> Result<NextHop, DropReason> {
    let link: &Link = tables.link(path.link).ok_or(DropReason::NoRoute)?;
    let (source, destination) = match path.way {
        Way::Link => (tables.node().gateway_mac, link.mac()),
        Way::Peer(peer) => {
            let exit = tables.overlay().exit(peer, link.mtu, learned)?;
            return Ok(NextHop {
                link: path.link,
                mtu: exit.mtu,
                source: link.mac(),
                destination: exit.next_hop,
                exit: Some(exit),
            });
        }
        Way::Neighbor(id) => {
            let mac = tables.overlay().neighbor(id);
            (link.mac(), mac.ok_or(DropReason::NoNeighbor)?)
        }
    };
    Ok(NextHop {
        link: path.link,
        mtu: link.mtu,
        source,
        destination,
        exit: None,
    })
}

/// Length of the largest IP packet that this frame becomes on the wire: of itself, or of a segment.
#[inline]
pub fn wire_length(frame: &Frame<'_>, packet: &Packet) -> usize {
    match frame.offload.gso {
        None => packet.length(),
        Some(gso) => headers_length(frame, packet) + usize::from(gso.size),
    }
}

/// Length of the IP and transport headers.
fn headers_length(frame: &Frame<'_>, packet: &Packet) -> usize {
    let transport = match packet.transport {
        Transport::Tcp { .. } => frame
            .bytes()
            .get(usize::from(packet.payload)..)
            .and_then(|bytes| tcp::Header::ref_from_prefix(bytes).ok())
            .map_or(tcp::LENGTH, |(header, _)| header.header_length()),
        _ => udp::LENGTH,
    };
    usize::from(packet.payload) - ethernet::LENGTH + transport
}

/// The headers that forwarding touches, in one view.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Headers4 {
    ethernet: ethernet::Header,
    network: ipv4::Header,
}

/// The same for IPv6.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Headers6 {
    ethernet: ethernet::Header,
    network: ipv6::Header,
}

/// Writes the MAC addresses of the next hop.
pub fn address(frame: &mut Frame<'_>, hop: &NextHop) -> Option<()> {
    let (header, _) = ethernet::Header::mut_from_prefix(frame.bytes_mut()).ok()?;
    (header.destination, header.source) = (hop.destination.0, hop.source.0);
    Some(())
}

/// Writes the addresses of the next hop and takes one hop off.
///
/// # Errors
/// [`DropReason::Malformed`] if the headers are not at hand; the parser has seen that they are.
#[inline]
pub fn send_on(frame: &mut Frame<'_>, packet: &Packet, hop: &NextHop) -> Result<(), DropReason> {
    let bytes = frame.bytes_mut();
    let header = match packet.family {
        Family::V4 => {
            let (headers, _) =
                Headers4::mut_from_prefix(bytes).map_err(|_| DropReason::Malformed)?;
            headers.network.decrement_ttl();
            &mut headers.ethernet
        }
        Family::V6 => {
            let (headers, _) =
                Headers6::mut_from_prefix(bytes).map_err(|_| DropReason::Malformed)?;
            headers.network.hop_limit = headers.network.hop_limit.saturating_sub(1);
            &mut headers.ethernet
        }
    };
    header.destination = hop.destination.0;
    header.source = hop.source.0;
    Ok(())
}
