//! A packet from another node loses its outer headers, if it is one, and if that node may send it.
//!
//! Checked here: that it comes from a known node, is of our network, is whole, and that its outer checksum is right where
//! there is one. Checked by the caller, when the inner packet has been parsed: that its source lies behind that node
//! ([`crate::overlay::Overlay::may_speak_for`]). Nothing is learnt from what arrives.

use crate::address::{Address, Family};
use crate::ecn;
use crate::frame::Frame;
use crate::overlay::{Overlay, Target, Tunnel};
use crate::parse::{Fragment, Packet, Transport};
use crate::wire::{checksum, ethernet, geneve, ipv4, ipv6, protocol, udp, vxlan};
use sluice_contract::overlay::{GENEVE_CLASS, GENEVE_IDENTITY, PeerId, TunnelProtocol};
use sluice_contract::{DropReason, Identity, Mac};
use zerocopy::FromBytes;

/// Where an unwrapped packet came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub peer: PeerId,
    /// What the sending node says the sender is, if the tunnel tells.
    pub identity: Option<Identity>,
    /// The backend that the sending node gave the packet to, which is still addressed to a Service's frontend.
    pub target: Option<Target>,
}

/// What the tunnel told.
type Told = (Option<Identity>, Option<Target>);

/// What lies inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inner {
    Ethernet,
    Ip(Family),
}

/// Whether a packet from the uplink is a tunnel's: addressed to this node, with the tunnel's port or protocol.
#[inline]
pub fn is_tunnelled(overlay: &Overlay<'_>, packet: &Packet) -> bool {
    let Some(tunnel) = overlay.tunnel() else {
        return false;
    };
    if tunnel.source(packet.family) != Some(packet.destination) {
        return false;
    }
    match (tunnel.protocol, packet.transport, packet.protocol) {
        (TunnelProtocol::IpIp, _, protocol::IPIP | protocol::IPV6_IN_IP) => true,
        (TunnelProtocol::IpIp, _, _) => false,
        (_, Transport::Udp { destination, .. }, _) => destination == tunnel.port,
        _ => false,
    }
}

/// Unwraps a frame for which [`is_tunnelled`] holds. It is then the inner frame, addressed to `own`, and to be parsed
/// anew.
///
/// # Errors
/// Why the frame is to be dropped.
pub fn unwrap(
    frame: &mut Frame<'_>,
    outer: &Packet,
    overlay: &Overlay<'_>,
    own: Mac,
) -> Result<Origin, DropReason> {
    let tunnel = overlay.tunnel().ok_or(DropReason::TunnelUnready)?;
    if outer.fragment != Fragment::Whole {
        return Err(DropReason::OuterFragment);
    }
    let peer = overlay
        .peer_at(outer.source)
        .ok_or(DropReason::TunnelUnknownPeer)?;
    let network = frame.bytes().get(outer.network()..).unwrap_or_default();
    let outer_class = ecn::class_of(network, outer.family).ok_or(DropReason::Malformed)?;
    if outer.protocol == protocol::UDP {
        check_udp(frame, outer, tunnel)?;
    }
    let end = frame.bytes().len().min(outer.end as usize);
    let payload = frame.bytes().get(usize::from(outer.payload)..end);
    let (inner, (identity, target), length) =
        read_shim(tunnel, outer.protocol, payload.unwrap_or_default())?;
    let start = usize::from(outer.payload) + length;
    // What follows the outer packet is padding of the outer frame; it must not become part of the inner one.
    trim(frame, outer.end as usize)?;
    let family = match inner {
        Inner::Ethernet => {
            let family = check_ethernet(frame.bytes().get(start..), tunnel.mac)?;
            strip(frame, start)?;
            family
        }
        Inner::Ip(family) => {
            strip(frame, start - ethernet::LENGTH)?;
            family
        }
    };
    let ethertype = match family {
        Family::V4 => ethernet::IPV4,
        Family::V6 => ethernet::IPV6,
    };
    let header = ethernet::Header::new(own, tunnel.mac, ethertype);
    let (to, packet) = frame
        .bytes_mut()
        .split_at_mut_checked(ethernet::LENGTH)
        .ok_or(DropReason::TunnelHeader)?;
    to.copy_from_slice(zerocopy::IntoBytes::as_bytes(&header));
    unmark(packet, family, outer_class)?;
    Ok(Origin {
        peer,
        identity,
        target,
    })
}

/// Carries a mark of congestion over to the inner packet.
fn unmark(packet: &mut [u8], family: Family, outer: u8) -> Result<(), DropReason> {
    let least = match family {
        Family::V4 => ipv4::LENGTH,
        Family::V6 => ipv6::LENGTH,
    };
    let inner = ecn::class_of(packet, family).filter(|_| packet.len() >= least);
    let inner = inner.ok_or(DropReason::TunnelHeader)?;
    let class = ecn::unwrap(inner, outer).ok_or(DropReason::TunnelEcn)?;
    if class != inner {
        ecn::set_class(packet, family, class);
    }
    Ok(())
}

/// Checks what can be checked of the outer checksum: a zero is accepted over IPv4, and over IPv6 if so configured; one that
/// is there must be right, unless the frame did not come over a wire, or is one that the kernel has put together of several
/// it had verified.
fn check_udp(frame: &Frame<'_>, outer: &Packet, tunnel: &Tunnel) -> Result<(), DropReason> {
    let bytes = frame.bytes();
    let end = bytes.len().min(outer.end as usize);
    let datagram = bytes.get(usize::from(outer.payload)..end);
    let datagram = datagram.ok_or(DropReason::Malformed)?;
    let (header, _) = udp::Header::ref_from_prefix(datagram).map_err(|_| DropReason::Malformed)?;
    let whole = (outer.end as usize).saturating_sub(usize::from(outer.payload));
    if usize::from(header.length.get()) != whole && frame.offload.gso.is_none() {
        return Err(DropReason::TunnelHeader);
    }
    if header.checksum.get() == 0 {
        let zero = outer.family == Family::V4 || tunnel.zero_checksum6;
        return if zero {
            Ok(())
        } else {
            Err(DropReason::TunnelChecksum)
        };
    }
    let trusted = frame.offload.partial.is_some() || frame.offload.verified;
    if trusted || frame.tail() != 0 {
        return Ok(());
    }
    let pseudo = checksum::pseudo(
        outer.source,
        outer.destination,
        protocol::UDP,
        datagram.len(),
    );
    if checksum::finish(checksum::sum(datagram, pseudo)) == 0 {
        Ok(())
    } else {
        Err(DropReason::TunnelChecksum)
    }
}

/// Reads what stands between the outer IP header and the inner packet: what is inside, whose it is, where it begins.
fn read_shim(
    tunnel: &Tunnel,
    outer_protocol: u8,
    payload: &[u8],
) -> Result<(Inner, Told, usize), DropReason> {
    match tunnel.protocol {
        TunnelProtocol::IpIp => {
            let family = match outer_protocol {
                protocol::IPIP => Family::V4,
                _ => Family::V6,
            };
            Ok((Inner::Ip(family), (None, None), 0))
        }
        TunnelProtocol::Vxlan | TunnelProtocol::VxlanGbp => {
            let bytes = payload.get(udp::LENGTH..).unwrap_or_default();
            let (header, _) =
                vxlan::Header::ref_from_prefix(bytes).map_err(|_| DropReason::TunnelHeader)?;
            let vni = header.vni().ok_or(DropReason::TunnelHeader)?;
            if vni != tunnel.vni {
                return Err(DropReason::TunnelVni);
            }
            let told = tunnel.protocol == TunnelProtocol::VxlanGbp;
            let identity = header.group().filter(|group| told && *group != 0);
            let identity = identity.map(|group| Identity(u32::from(group)));
            let length = udp::LENGTH + vxlan::LENGTH;
            Ok((Inner::Ethernet, (identity, None), length))
        }
        TunnelProtocol::Geneve | TunnelProtocol::GeneveIp => read_geneve(tunnel, payload),
    }
}

fn read_geneve(tunnel: &Tunnel, payload: &[u8]) -> Result<(Inner, Told, usize), DropReason> {
    let bytes = payload.get(udp::LENGTH..).unwrap_or_default();
    let (header, rest) =
        geneve::Header::ref_from_prefix(bytes).map_err(|_| DropReason::TunnelHeader)?;
    if header.version() != 0 || header.is_control() {
        return Err(DropReason::TunnelHeader);
    }
    let length = header.options_length();
    let options = rest.get(..length).ok_or(DropReason::TunnelHeader)?;
    if header.vni() != tunnel.vni {
        return Err(DropReason::TunnelVni);
    }
    let told = read_options(options)?;
    let inner = match header.protocol.get() {
        geneve::ETHERNET => Inner::Ethernet,
        ethernet::IPV4 => Inner::Ip(Family::V4),
        ethernet::IPV6 => Inner::Ip(Family::V6),
        _ => return Err(DropReason::TunnelHeader),
    };
    Ok((inner, told, udp::LENGTH + geneve::LENGTH + length))
}

fn read_options(options: &[u8]) -> Result<Told, DropReason> {
    let (mut identity, mut target) = (None, None);
    let walked = geneve::walk(options, |header, data| {
        let told = Target::of_option(header, data);
        target = told.or(target);
        match data {
            [a, b, c, d] if header.class == GENEVE_CLASS && header.kind == GENEVE_IDENTITY => {
                identity = Some(Identity(u32::from_be_bytes([*a, *b, *c, *d])));
                true
            }
            _ => told.is_some(),
        }
    });
    match walked {
        Ok(()) => Ok((identity, target)),
        Err(geneve::OptionError::Broken) => Err(DropReason::TunnelHeader),
        Err(geneve::OptionError::Critical) => Err(DropReason::TunnelOption),
    }
}

/// The inner frame must be for this node's end of the tunnel, and IP: there is no ARP, no broadcast and no VLAN inside.
fn check_ethernet(bytes: Option<&[u8]>, own: Mac) -> Result<Family, DropReason> {
    let (header, _) = ethernet::Header::ref_from_prefix(bytes.unwrap_or_default())
        .map_err(|_| DropReason::TunnelHeader)?;
    if header.destination().is_group() {
        return Err(DropReason::Multicast);
    }
    if header.destination() != own {
        return Err(DropReason::NotForUs);
    }
    match header.ethertype.get() {
        ethernet::IPV4 => Ok(Family::V4),
        ethernet::IPV6 => Ok(Family::V6),
        ethernet::VLAN | ethernet::VLAN_SERVICE => Err(DropReason::VlanTag),
        _ => Err(DropReason::EtherType),
    }
}

/// Cuts padding off the end, if it is at hand.
fn trim(frame: &mut Frame<'_>, end: usize) -> Result<(), DropReason> {
    if frame.tail() == 0 && frame.bytes().len() > end && !frame.resize(end) {
        return Err(DropReason::Malformed);
    }
    Ok(())
}

/// Takes the outer headers off; the offload words then count from the new start.
fn strip(frame: &mut Frame<'_>, bytes: usize) -> Result<(), DropReason> {
    if !frame.pull(bytes) {
        return Err(DropReason::TunnelHeader);
    }
    let by = u16::try_from(bytes).map_err(|_| DropReason::TunnelHeader)?;
    let offload = &mut frame.offload;
    // Verified was the outer checksum, if any; the inner one is then for the receiving pod to verify.
    offload.verified = false;
    offload.tunnel = None;
    // An outer checksum that was still to be completed is gone with its header.
    offload.partial = offload.partial.and_then(|mut partial| {
        partial.start = partial.start.checked_sub(by)?;
        Some(partial)
    });
    if let Some(gso) = &mut offload.gso {
        gso.header = gso.header.checked_sub(by).ok_or(DropReason::Malformed)?;
    }
    Ok(())
}

/// What an ICMP error from the underlay says about a packet that this node wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Complaint {
    pub peer: PeerId,
    /// The MTU of the router's next hop.
    pub mtu: u16,
    /// It quotes a packet that this node really sent. If not, it is a guess, or about a packet of an earlier appliance.
    pub genuine: bool,
}

/// Segments of one frame that are told apart by their IPv4 identification: whoever cuts a frame counts it up from the first.
const SEGMENTS: u16 = 64;

/// Reads an ICMP "too big" that quotes one of this node's tunnel packets to a known peer. Addresses and ports are easy to
/// guess; [`Peer::mark`] is not, so only who saw such a packet makes a genuine complaint.
///
/// [`Peer::mark`]: crate::overlay::Peer::mark
pub fn complaint(frame: &Frame<'_>, packet: &Packet, overlay: &Overlay<'_>) -> Option<Complaint> {
    let tunnel = overlay.tunnel()?;
    let own = tunnel.source(packet.family)?;
    if packet.destination != own || packet.fragment != Fragment::Whole {
        return None;
    }
    let (mtu, quote) = too_big(frame, packet)?;
    let quote = Quote::read(quote, packet.family)?;
    let ports = quote.transport.first_chunk::<4>();
    let (ours, port) = match tunnel.protocol {
        TunnelProtocol::IpIp => {
            let is_ours = matches!(quote.protocol, protocol::IPIP | protocol::IPV6_IN_IP);
            (is_ours, 0)
        }
        _ => {
            let [a, b, c, d] = *ports?;
            let to_tunnel = u16::from_be_bytes([c, d]) == tunnel.port;
            let is_ours = quote.protocol == protocol::UDP && to_tunnel;
            (is_ours, u16::from_be_bytes([a, b]))
        }
    };
    if quote.source != own || !ours {
        return None;
    }
    let id = overlay.peer_at(quote.destination)?;
    let mark = overlay.peer(id)?.mark(port);
    let is_marked = match quote.mark {
        Mark::Identification(id) => id.wrapping_sub(mark as u16) < SEGMENTS,
        Mark::Label(label) => label == mark & 0xf_ffff,
    };
    Some(Complaint {
        peer: id,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        // What fits is no reason to complain.
        genuine: is_marked && mtu < quote.length,
    })
}

/// The MTU that an ICMP "too big" tells, and what it quotes; `None` if it is none, or its checksum is wrong.
fn too_big<'f>(frame: &'f Frame<'_>, packet: &Packet) -> Option<(u32, &'f [u8])> {
    use crate::wire::icmp;
    let end = frame.bytes().len().min(packet.end as usize);
    let message = frame.bytes().get(usize::from(packet.payload)..end)?;
    let (header, quote) = icmp::Header::ref_from_prefix(message).ok()?;
    let mtu = match (packet.family, packet.transport) {
        (Family::V4, Transport::Icmp { kind, code, .. })
            if kind == icmp::v4::UNREACHABLE && code == icmp::v4::CODE_TOO_BIG =>
        {
            header.rest.get() & 0xffff
        }
        (Family::V6, Transport::Icmp { kind, .. }) if kind == icmp::v6::TOO_BIG => {
            header.rest.get()
        }
        _ => return None,
    };
    if frame.tail() == 0 && !frame.offload.verified && frame.offload.partial.is_none() {
        let pseudo = match packet.family {
            Family::V4 => 0,
            Family::V6 => checksum::pseudo(
                packet.source,
                packet.destination,
                protocol::ICMP6,
                message.len(),
            ),
        };
        if checksum::finish(checksum::sum(message, pseudo)) != 0 {
            return None;
        }
    }
    Some((mtu, quote))
}

/// Where a packet carries [`crate::overlay::Peer::mark`].
enum Mark {
    Identification(u16),
    Label(u32),
}

/// A quoted packet, as far as it matters; ours have no extension headers.
struct Quote<'q> {
    source: Address,
    destination: Address,
    protocol: u8,
    /// Of the whole packet, in bytes.
    length: u32,
    mark: Mark,
    transport: &'q [u8],
}

impl<'q> Quote<'q> {
    fn read(bytes: &'q [u8], family: Family) -> Option<Self> {
        match family {
            Family::V4 => {
                let (header, _) = ipv4::Header::ref_from_prefix(bytes).ok()?;
                Some(Self {
                    source: Address::v4(header.source),
                    destination: Address::v4(header.destination),
                    protocol: header.protocol,
                    length: header.total_length.get().into(),
                    mark: Mark::Identification(header.identification.get()),
                    transport: bytes.get(header.header_length().max(ipv4::LENGTH)..)?,
                })
            }
            Family::V6 => {
                let (header, transport) = ipv6::Header::ref_from_prefix(bytes).ok()?;
                Some(Self {
                    source: Address(header.source),
                    destination: Address(header.destination),
                    protocol: header.next_header,
                    length: ipv6::LENGTH as u32 + u32::from(header.payload_length.get()),
                    mark: Mark::Label(header.flow_label()),
                    transport,
                })
            }
        }
    }
}
