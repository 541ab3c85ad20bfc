//! One flow becomes another: addresses and ports of a packet are replaced, and every checksum that covers them is patched, the
//! half-made ones of an offload too. Payload is neither read nor written.

use crate::address::{Address, Family};
use crate::flow::Flow;
use crate::frame::{Frame, Offload};
use crate::hash::Hasher;
use crate::parse::{Fragment, Packet};
use crate::wire::checksum::{Delta, crc32c_patch};
use crate::wire::{icmp, ipv4, ipv6, protocol, sctp, tcp, udp};
use sluice_contract::DropReason;
use zerocopy::{FromBytes, big_endian::U16, big_endian::U32};

/// Makes a packet of flow `from` one of flow `to`. Both are of the packet's family and protocol.
///
/// # Errors
/// [`DropReason::Malformed`] if a header is not at hand; the parser has seen that they are.
#[inline]
pub fn rewrite(
    frame: &mut Frame<'_>,
    packet: &Packet,
    from: &Flow,
    to: &Flow,
) -> Result<(), DropReason> {
    let offload = frame.offload;
    let bytes = frame.bytes_mut();
    let network = bytes
        .get_mut(packet.network()..)
        .ok_or(DropReason::Malformed)?;
    let addresses = addresses(network, from, to).ok_or(DropReason::Malformed)?;
    if packet.fragment == Fragment::Later {
        return Ok(());
    }
    let length = (packet.end as usize).saturating_sub(usize::from(packet.payload));
    let waits = waits(offload, packet);
    let ports_stay =
        from.source_port() == to.source_port() && from.destination_port() == to.destination_port();
    if packet.fragment == Fragment::First && packet.protocol == protocol::SCTP && !ports_stay {
        // Its checksum runs over the whole datagram, whose length nobody knows yet.
        return Err(DropReason::Malformed);
    }
    let transport = bytes
        .get_mut(usize::from(packet.payload)..)
        .ok_or(DropReason::Malformed)?;
    ports(transport, packet.protocol, addresses, to, waits, length).ok_or(DropReason::Malformed)
}

/// What the identifications of fragments from `source` are changed by where they get another source: pods that hide behind one
/// address would else use the same ones, and could guess each other's. The same for all fragments of a datagram, so nothing
/// need be remembered; identifications of one pod stay as different as they were.
pub(crate) fn mask(hasher: &Hasher, source: Address) -> u32 {
    hasher.hash([source.high(), source.low(), 0x6672_6167]) as u32
}

/// Changes the identification of a fragment by `mask`.
///
/// # Errors
/// [`DropReason::Malformed`] if a header is not at hand; the parser has seen that they are.
pub(crate) fn renumber(
    frame: &mut Frame<'_>,
    packet: &Packet,
    mask: u32,
) -> Result<(), DropReason> {
    let bytes = frame.bytes_mut();
    let header = bytes
        .get_mut(usize::from(packet.fragment_header)..)
        .ok_or(DropReason::Malformed)?;
    match packet.family {
        Family::V4 => {
            let (header, _) =
                ipv4::Header::mut_from_prefix(header).map_err(|_| DropReason::Malformed)?;
            let old = header.identification.get();
            let new = old ^ mask as u16;
            header.identification = U16::new(new);
            let change = Delta::default().word(old, new);
            header.checksum = U16::new(change.patch(header.checksum.get()));
        }
        Family::V6 => {
            let (header, _) =
                ipv6::FragmentHeader::mut_from_prefix(header).map_err(|_| DropReason::Malformed)?;
            header.identification = U32::new(header.identification.get() ^ mask);
        }
    }
    Ok(())
}

/// Whether the transport checksum waits for the far side: it then holds the pseudo-header's sum alone.
fn waits(offload: Offload, packet: &Packet) -> bool {
    offload
        .partial
        .is_some_and(|partial| partial.start == packet.payload)
}

/// Writes the addresses into the IP header at the front of `bytes`; yields what changed.
#[inline]
pub(crate) fn addresses(bytes: &mut [u8], from: &Flow, to: &Flow) -> Option<Delta> {
    let delta = Delta::default()
        .address(from.source(), to.source())
        .address(from.destination(), to.destination());
    match family(to) {
        Family::V4 => {
            let (header, _) = ipv4::Header::mut_from_prefix(bytes).ok()?;
            header.source = to.source().v4_octets();
            header.destination = to.destination().v4_octets();
            header.checksum = U16::new(delta.patch(header.checksum.get()));
        }
        Family::V6 => {
            let (header, _) = ipv6::Header::mut_from_prefix(bytes).ok()?;
            header.source = to.source().0;
            header.destination = to.destination().0;
        }
    }
    Some(delta)
}

const fn family(flow: &Flow) -> Family {
    if flow.is_v6() { Family::V6 } else { Family::V4 }
}

/// Writes the ports into the transport header at the front of `bytes` and patches its checksum. `length` is that of the whole
/// segment, of which `bytes` may hold only the beginning.
#[inline]
pub(crate) fn ports(
    bytes: &mut [u8],
    number: u8,
    addresses: Delta,
    to: &Flow,
    waits: bool,
    length: usize,
) -> Option<()> {
    let (source, destination) = (to.source_port(), to.destination_port());
    match number {
        protocol::TCP => {
            let (header, _) = tcp::Header::mut_from_prefix(bytes).ok()?;
            let change = change(addresses, &mut header.source, source, waits);
            let change = self::change(change, &mut header.destination, destination, waits);
            header.checksum = U16::new(patched(change, header.checksum.get(), waits));
        }
        protocol::UDP => {
            let (header, _) = udp::Header::mut_from_prefix(bytes).ok()?;
            let change = change(addresses, &mut header.source, source, waits);
            let change = self::change(change, &mut header.destination, destination, waits);
            let old = header.checksum.get();
            // 0 says "none" and stays; a sum of 0 is written ffff (RFC 768).
            if old != 0 || waits {
                let new = patched(change, old, waits);
                header.checksum = U16::new(if new == 0 && !waits { 0xffff } else { new });
            }
        }
        protocol::SCTP => {
            let (header, _) = sctp::Header::mut_from_prefix(bytes).ok()?;
            let old = [header.source.get(), header.destination.get()];
            header.source = U16::new(source);
            header.destination = U16::new(destination);
            if !waits && old != [source, destination] {
                let differ = (u32::from(old[0] ^ source) << 16) | u32::from(old[1] ^ destination);
                let sum = crc32c_patch(header.checksum.get().swap_bytes(), differ, length);
                header.checksum = U32::new(sum.swap_bytes());
            }
        }
        protocol::ICMP | protocol::ICMP6 => {
            let (header, _) = icmp::Header::mut_from_prefix(bytes).ok()?;
            let old = header.echo_id();
            // The identifier stands on the asking side; the other side's is 0.
            let new = if source != 0 { source } else { destination };
            header.rest = U32::new((u32::from(new) << 16) | (header.rest.get() & 0xffff));
            let covered = if number == protocol::ICMP6 {
                addresses
            } else {
                Delta::default()
            };
            let change = if waits {
                covered
            } else {
                covered.word(old, new)
            };
            header.checksum = U16::new(patched(change, header.checksum.get(), waits));
        }
        _ => {}
    }
    Some(())
}

/// Replaces a port. A sum that waits covers no port yet.
#[inline]
fn change(delta: Delta, port: &mut U16, new: u16, waits: bool) -> Delta {
    let old = port.get();
    *port = U16::new(new);
    if waits { delta } else { delta.word(old, new) }
}

#[inline]
const fn patched(delta: Delta, checksum: u16, waits: bool) -> u16 {
    if waits {
        delta.patch_partial(checksum)
    } else {
        delta.patch(checksum)
    }
}

/// Writes the ports into a quoted transport header, of which perhaps only eight bytes are there. Its checksum is patched if
/// it is, and never judged (RFC 5508 REQ-3).
pub(crate) fn quoted_ports(
    bytes: &mut [u8],
    number: u8,
    addresses: Delta,
    (from, to): (&Flow, &Flow),
) -> Option<()> {
    let delta = addresses
        .word(from.source_port(), to.source_port())
        .word(from.destination_port(), to.destination_port());
    let (delta, ports, sum_at) = match number {
        protocol::TCP => (delta, true, 16),
        protocol::UDP => (delta, true, 6),
        protocol::SCTP => (delta, true, usize::MAX),
        protocol::ICMP | protocol::ICMP6 => {
            let (header, _) = icmp::Header::mut_from_prefix(bytes).ok()?;
            let new = if to.source_port() != 0 {
                to.source_port()
            } else {
                to.destination_port()
            };
            let covered = if number == protocol::ICMP6 {
                addresses
            } else {
                Delta::default()
            };
            let delta = covered.word(header.echo_id(), new);
            header.rest = U32::new((u32::from(new) << 16) | (header.rest.get() & 0xffff));
            (delta, false, 2)
        }
        _ => return Some(()),
    };
    if ports {
        bytes
            .get_mut(..2)?
            .copy_from_slice(&to.source_port().to_be_bytes());
        bytes
            .get_mut(2..4)?
            .copy_from_slice(&to.destination_port().to_be_bytes());
    }
    // Cut off: nothing to patch. UDP's 0 says that there is none.
    if let Some(field) = sum_at
        .checked_add(2)
        .and_then(|end| bytes.get_mut(sum_at..end))
        && let [a, b] = *field
        && (number != protocol::UDP || [a, b] != [0, 0])
    {
        field.copy_from_slice(&delta.patch(u16::from_be_bytes([a, b])).to_be_bytes());
    }
    Some(())
}
