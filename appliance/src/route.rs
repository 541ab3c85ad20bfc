//! Where a packet leaves, and whether it fits there.

use crate::address::Address;
use crate::frame::Frame;
use crate::parse::{Packet, Transport};
use crate::tables::{Link, Tables};
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
}

/// The way to `destination`.
///
/// # Errors
/// [`DropReason::NoRoute`].
#[inline]
pub fn lookup(tables: &Tables<'_>, destination: Address) -> Result<NextHop, DropReason> {
    let id = tables.local(destination).ok_or(DropReason::NoRoute)?;
    let link: &Link = tables.link(id).ok_or(DropReason::NoRoute)?;
    Ok(NextHop {
        link: id,
        mtu: link.mtu,
        source: tables.node().gateway_mac,
        destination: link.mac(),
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

/// Writes the addresses of the next hop and takes one hop off.
///
/// # Errors
/// [`DropReason::Malformed`] if the headers are not at hand; the parser has seen that they are.
#[inline]
pub fn send_on(frame: &mut Frame<'_>, packet: &Packet, hop: &NextHop) -> Result<(), DropReason> {
    use crate::address::Family;
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
