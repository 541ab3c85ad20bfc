//! Packets that the appliance makes out of the one it received, in the same buffer: ARP and neighbor advertisements, echo
//! replies, ICMP errors. Whether one may be made is decided before; here it is only built.

use crate::address::{Address, Family};
use crate::frame::{Frame, Offload};
use crate::parse::{Fragment, Packet};
use crate::tables::{Link, Node};
use crate::wire::{arp, checksum, ethernet, icmp, ipv4, ipv6, protocol, tcp};
use sluice_contract::{DropReason, Mac};
use zerocopy::{FromBytes, big_endian::U16, big_endian::U32};

/// Bytes of a quoted packet in an ICMP error: as much as RFC 1812 §4.3.2.3 (576 in all) and RFC 4443 §2.4c (1280 in all) allow.
const ERROR_TOTAL4: usize = 576;
const ERROR_TOTAL6: usize = 1280;

/// What an ICMP error says, in either family's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The packet is larger than this.
    TooBig(u16),
    TimeExceeded,
    /// Nobody listens on that port.
    PortUnreachable,
    HostUnreachable,
    /// Forbidden by configuration (RFC 1812 §5.2.7.1, RFC 4443 §3.1), also when no mapping can be made (RFC 5508 REQ-8).
    Prohibited,
}

impl Trouble {
    /// Kind, code and the second word.
    const fn words(self, family: Family) -> (u8, u8, u32) {
        use icmp::{v4, v6};
        match (family, self) {
            (Family::V4, Self::TooBig(mtu)) => (v4::UNREACHABLE, v4::CODE_TOO_BIG, mtu as u32),
            (Family::V4, Self::TimeExceeded) => (v4::TIME_EXCEEDED, 0, 0),
            (Family::V4, Self::PortUnreachable) => (v4::UNREACHABLE, v4::CODE_PORT, 0),
            (Family::V4, Self::HostUnreachable) => (v4::UNREACHABLE, v4::CODE_HOST, 0),
            (Family::V4, Self::Prohibited) => (v4::UNREACHABLE, v4::CODE_PROHIBITED, 0),
            (Family::V6, Self::TooBig(mtu)) => (v6::TOO_BIG, 0, mtu as u32),
            (Family::V6, Self::TimeExceeded) => (v6::TIME_EXCEEDED, 0, 0),
            (Family::V6, Self::PortUnreachable) => (v6::UNREACHABLE, v6::CODE_PORT, 0),
            (Family::V6, Self::HostUnreachable) => (v6::UNREACHABLE, v6::CODE_ADDRESS, 0),
            (Family::V6, Self::Prohibited) => (v6::UNREACHABLE, v6::CODE_PROHIBITED, 0),
        }
    }
}

/// Turns an ARP request for the gateway into its answer.
///
/// # Errors
/// Why the frame is to be dropped: it is broken, spoofed, or asks for somebody else.
pub fn arp(frame: &mut Frame<'_>, node: &Node, link: &Link) -> Result<(), DropReason> {
    let bytes = frame.bytes_mut();
    let (header, rest) =
        ethernet::Header::mut_from_prefix(bytes).map_err(|_| DropReason::Malformed)?;
    let (packet, _) = arp::Packet::mut_from_prefix(rest).map_err(|_| DropReason::Malformed)?;
    if !packet.is_ipv4_over_ethernet() {
        return Err(DropReason::Malformed);
    }
    let sender = Address::v4(packet.sender);
    // A probe for a free address (RFC 5227) comes from 0.0.0.0.
    if packet.sender_mac != header.source || (packet.sender != [0; 4] && !link.owns(sender)) {
        return Err(DropReason::Spoof);
    }
    if packet.operation != arp::REQUEST || Address::v4(packet.target) != node.gateway4 {
        return Err(DropReason::NeighborIgnored);
    }
    let asker = packet.sender_mac;
    *header = ethernet::Header::new(Mac(asker), node.gateway_mac, ethernet::ARP);
    packet.operation = U16::new(arp::REPLY);
    packet.target_mac = asker;
    packet.sender_mac = node.gateway_mac.0;
    core::mem::swap(&mut packet.sender, &mut packet.target);
    frame.offload = Offload::default();
    Ok(())
}

/// Turns a neighbor solicitation for the gateway into an advertisement (RFC 4861 §7.2.4).
///
/// # Errors
/// Why the frame is to be dropped: it is broken, from a rogue, a probe for a free address, or asks for somebody else.
pub fn neighbor(frame: &mut Frame<'_>, packet: &Packet, node: &Node) -> Result<(), DropReason> {
    let bytes = frame.bytes();
    let end = bytes.len().min(packet.end as usize);
    let message = bytes
        .get(usize::from(packet.payload)..end)
        .ok_or(DropReason::Malformed)?;
    let (header, _) = icmp::Header::ref_from_prefix(message).map_err(|_| DropReason::Malformed)?;
    let sum = checksum::pseudo(
        packet.source,
        packet.destination,
        protocol::ICMP6,
        message.len(),
    );
    // RFC 4861 §7.1.1: from this link, whole, and with the right checksum; else it is as if it had not come.
    let valid = packet.hops == 255
        && header.code == 0
        && packet.fragment == Fragment::Whole
        && frame.tail() == 0
        && usize::from(packet.payload) == ethernet::LENGTH + ipv6::LENGTH
        && checksum::finish(checksum::sum(message, sum)) == 0;
    if !valid {
        return Err(DropReason::Malformed);
    }
    match header.kind {
        icmp::v6::NEIGHBOR_SOLICITATION => {}
        icmp::v6::ROUTER_ADVERTISEMENT | icmp::v6::REDIRECT => return Err(DropReason::RogueRouter),
        _ => return Err(DropReason::NeighborIgnored),
    }
    let (solicitation, options) =
        icmp::Neighbor::ref_from_prefix(message).map_err(|_| DropReason::Malformed)?;
    let probe = packet.source == Address::UNSPECIFIED;
    match icmp::neighbor_options_have(options, icmp::SOURCE_LINK_LAYER) {
        None => return Err(DropReason::Malformed),
        Some(true) if probe => return Err(DropReason::Malformed),
        Some(_) => {}
    }
    if probe || Address(solicitation.target) != node.gateway6 {
        return Err(DropReason::NeighborIgnored);
    }
    advertise(frame, packet, node).ok_or(DropReason::Malformed)
}

fn advertise(frame: &mut Frame<'_>, packet: &Packet, node: &Node) -> Option<()> {
    const MESSAGE: usize = size_of::<icmp::Neighbor>() + size_of::<icmp::LinkLayerOption>();
    let (asked, _) = ethernet::Header::read_from_prefix(frame.bytes()).ok()?;
    if !frame.resize(ethernet::LENGTH + ipv6::LENGTH + MESSAGE) {
        return None;
    }
    let (header, rest) = ethernet::Header::mut_from_prefix(frame.bytes_mut()).ok()?;
    *header = ethernet::Header::new(asked.source(), node.gateway_mac, ethernet::IPV6);
    let (network, message) = ipv6::Header::mut_from_prefix(rest).ok()?;
    *network = ipv6::Header::new(
        node.gateway6.0,
        packet.source.0,
        protocol::ICMP6,
        MESSAGE as u16,
        255,
    );
    let (neighbor, rest) = icmp::Neighbor::mut_from_prefix(message).ok()?;
    neighbor.icmp = icmp::Header {
        kind: icmp::v6::NEIGHBOR_ADVERTISEMENT,
        code: 0,
        checksum: U16::new(0),
        rest: U32::new(icmp::ADVERTISE_FLAGS),
    };
    neighbor.target = node.gateway6.0;
    let (option, _) = icmp::LinkLayerOption::mut_from_prefix(rest).ok()?;
    *option = icmp::LinkLayerOption {
        kind: icmp::TARGET_LINK_LAYER,
        units: 1,
        mac: node.gateway_mac.0,
    };
    let sum = checksum::pseudo(node.gateway6, packet.source, protocol::ICMP6, MESSAGE);
    let sum = checksum::finish(checksum::sum(message, sum));
    let (header, _) = icmp::Header::mut_from_prefix(message).ok()?;
    header.checksum = U16::new(sum);
    frame.offload = Offload::default();
    Some(())
}

/// Turns an echo request into its reply: addresses exchanged, type changed, checksums patched, payload untouched.
///
/// # Errors
/// Why the frame is to be dropped.
pub fn echo(frame: &mut Frame<'_>, packet: &Packet, own_mac: Mac) -> Result<(), DropReason> {
    let partial = frame.offload.partial.is_some();
    reply_headers(frame.bytes_mut(), packet, own_mac)
        .and_then(|()| {
            let rest = frame.bytes_mut().get_mut(usize::from(packet.payload)..)?;
            let (header, _) = icmp::Header::mut_from_prefix(rest).ok()?;
            let old = u16::from_be_bytes([header.kind, header.code]);
            header.kind = match packet.family {
                Family::V4 => icmp::v4::ECHO_REPLY,
                Family::V6 => icmp::v6::ECHO_REPLY,
            };
            let new = u16::from_be_bytes([header.kind, header.code]);
            if !partial {
                let delta = checksum::Delta::default().word(old, new);
                header.checksum = U16::new(delta.patch(header.checksum.get()));
            }
            Some(())
        })
        .ok_or(DropReason::Malformed)
}

/// Exchanges the addresses of both layers and gives the packet a full number of hops.
fn reply_headers(bytes: &mut [u8], packet: &Packet, own_mac: Mac) -> Option<()> {
    let (header, rest) = ethernet::Header::mut_from_prefix(bytes).ok()?;
    header.destination = header.source;
    header.source = own_mac.0;
    match packet.family {
        Family::V4 => {
            let (network, _) = ipv4::Header::mut_from_prefix(rest).ok()?;
            core::mem::swap(&mut network.source, &mut network.destination);
            let old = u16::from_be_bytes([network.ttl, network.protocol]);
            network.ttl = 64;
            let new = u16::from_be_bytes([network.ttl, network.protocol]);
            let delta = checksum::Delta::default().word(old, new);
            network.checksum = U16::new(delta.patch(network.checksum.get()));
        }
        Family::V6 => {
            let (network, _) = ipv6::Header::mut_from_prefix(rest).ok()?;
            core::mem::swap(&mut network.source, &mut network.destination);
            network.hop_limit = 64;
        }
    }
    Some(())
}

/// Whether an ICMP error about this packet may be sent at all (RFC 1122 §3.2.2, RFC 4443 §2.4e; checklist I11).
pub fn may_report(packet: &Packet, to: Mac) -> bool {
    !packet.is_icmp_error()
        && packet.fragment != Fragment::Later
        && !to.is_group()
        && !packet.destination.is_multicast()
        && !packet.destination.is_broadcast4()
        && !packet.source.is_unspecified()
}

/// Turns the packet into an ICMP error about itself, from `source` to its sender.
///
/// `None` if the buffer is too small for that; the frame is then of no use.
pub fn error(
    frame: &mut Frame<'_>,
    packet: &Packet,
    trouble: Trouble,
    source: Address,
    own_mac: Mac,
) -> Option<()> {
    let (asked, _) = ethernet::Header::read_from_prefix(frame.bytes()).ok()?;
    let network = network_length(packet.family);
    let (number, total) = match packet.family {
        Family::V4 => (protocol::ICMP, ERROR_TOTAL4),
        Family::V6 => (protocol::ICMP6, ERROR_TOTAL6),
    };
    let head = network + icmp::LENGTH;
    let at_hand = frame.bytes().len().min(packet.end as usize);
    let quote = make_room(frame, at_hand.saturating_sub(ethernet::LENGTH), head, total)?;
    let (header, rest) = ethernet::Header::mut_from_prefix(frame.bytes_mut()).ok()?;
    *header = ethernet::Header::new(asked.source(), own_mac, asked.ethertype.get());
    let length = icmp::LENGTH + quote;
    write_network(rest, source, packet.source, number, length)?;
    let sum = match packet.family {
        Family::V4 => 0,
        Family::V6 => checksum::pseudo(source, packet.source, number, length),
    };
    let (kind, code, second) = trouble.words(packet.family);
    let message = rest.get_mut(network..)?;
    let (header, _) = icmp::Header::mut_from_prefix(&mut *message).ok()?;
    *header = icmp::Header {
        kind,
        code,
        checksum: U16::new(0),
        rest: U32::new(second),
    };
    let sum = checksum::finish(checksum::sum(message, sum));
    let (header, _) = icmp::Header::mut_from_prefix(message).ok()?;
    header.checksum = U16::new(sum);
    frame.offload = Offload::default();
    Some(())
}

/// Puts `head` bytes between the Ethernet header and the packet, and cuts the packet so that both fit `total`; yields how much
/// of the packet is left. In the headroom where there is enough, else by moving the quote.
fn make_room(frame: &mut Frame<'_>, packet: usize, head: usize, total: usize) -> Option<usize> {
    let quote = packet.min(total - head);
    if frame.push(head).is_some() {
        return frame
            .resize(ethernet::LENGTH + head + quote)
            .then_some(quote);
    }
    let fits = frame.resize(ethernet::LENGTH + head + quote);
    let quote = if fits {
        quote
    } else {
        quote.checked_sub(head)?
    };
    if !fits && !frame.resize(ethernet::LENGTH + head + quote) {
        return None;
    }
    let from = ethernet::LENGTH..ethernet::LENGTH + quote;
    let bytes = frame.bytes_mut();
    if from.end + head > bytes.len() {
        return None;
    }
    bytes.copy_within(from, ethernet::LENGTH + head);
    Some(quote)
}

/// Turns a TCP segment into the reset that refuses it (RFC 9293 §3.10.7.1).
///
/// `None` if it is a reset itself, or if the headers are not at hand.
pub fn reset(frame: &mut Frame<'_>, packet: &Packet, own_mac: Mac) -> Option<()> {
    let bytes = frame.bytes();
    let (asked, _) =
        tcp::Header::read_from_prefix(bytes.get(usize::from(packet.payload)..)?).ok()?;
    if asked.has(tcp::RST) {
        return None;
    }
    let (ethernet, _) = ethernet::Header::read_from_prefix(bytes).ok()?;
    let length = (packet.end as usize).checked_sub(usize::from(packet.payload))?;
    let data = length.checked_sub(asked.header_length())?;
    let phantom = u32::from(asked.has(tcp::SYN)) + u32::from(asked.has(tcp::FIN));
    let (sequence, acknowledgment, flags) = if asked.has(tcp::ACK) {
        (asked.acknowledgment.get(), 0, tcp::RST)
    } else {
        let next = asked.sequence.get().wrapping_add(u32::try_from(data).ok()?);
        (0, next.wrapping_add(phantom), tcp::RST | tcp::ACK)
    };
    let network = network_length(packet.family);
    if !frame.resize(ethernet::LENGTH + network + tcp::LENGTH) {
        return None;
    }
    let (header, rest) = ethernet::Header::mut_from_prefix(frame.bytes_mut()).ok()?;
    *header = ethernet::Header::new(ethernet.source(), own_mac, ethernet.ethertype.get());
    let (from, to) = (packet.destination, packet.source);
    write_network(rest, from, to, protocol::TCP, tcp::LENGTH)?;
    let segment = rest.get_mut(network..)?;
    let (header, _) = tcp::Header::mut_from_prefix(&mut *segment).ok()?;
    *header = tcp::Header {
        source: asked.destination,
        destination: asked.source,
        sequence: U32::new(sequence),
        acknowledgment: U32::new(acknowledgment),
        data_offset: (tcp::LENGTH as u8 / 4) << 4,
        flags,
        window: U16::new(0),
        checksum: U16::new(0),
        urgent: U16::new(0),
    };
    let sum = checksum::pseudo(from, to, protocol::TCP, tcp::LENGTH);
    let sum = checksum::finish(checksum::sum(segment, sum));
    let (header, _) = tcp::Header::mut_from_prefix(segment).ok()?;
    header.checksum = U16::new(sum);
    frame.offload = Offload::default();
    Some(())
}

const fn network_length(family: Family) -> usize {
    match family {
        Family::V4 => ipv4::LENGTH,
        Family::V6 => ipv6::LENGTH,
    }
}

/// Writes the IP header of a packet that the appliance makes.
fn write_network(
    bytes: &mut [u8],
    from: Address,
    to: Address,
    number: u8,
    payload: usize,
) -> Option<()> {
    let payload = u16::try_from(payload).ok()?;
    match from.family() {
        Family::V4 => {
            let (header, _) = ipv4::Header::mut_from_prefix(bytes).ok()?;
            *header = ipv4::Header::new(from.v4_octets(), to.v4_octets(), number, payload);
        }
        Family::V6 => {
            let (header, _) = ipv6::Header::mut_from_prefix(bytes).ok()?;
            *header = ipv6::Header::new(from.0, to.0, number, payload, 64);
        }
    }
    Some(())
}

/// The Ethernet header, for who needs its addresses after parsing.
#[inline]
pub fn ethernet_of<'f>(frame: &'f Frame<'_>) -> Option<&'f ethernet::Header> {
    ethernet::Header::ref_from_prefix(frame.bytes())
        .ok()
        .map(|(header, _)| header)
}
