//! A packet for another node gets its outer headers: VXLAN, Geneve or IPIP, over IPv4 or IPv6.
//!
//! Only headers are written, into the headroom; the payload is not touched and need not be at hand. Checksums: UDP over IPv4
//! goes without (RFC 7348 §5). UDP over IPv6 must have one; where the inner checksum is still to be completed, what is at hand
//! suffices to know the outer one (the inner packet will sum up to the complement of its pseudo-header's sum), else it is
//! left to the far side as the inner one's was. The outer packet is never to be fragmented, its TTL is its own; its IPv4
//! identification or IPv6 flow label is secret to this node and its peer ([`Peer::mark`]).

use crate::address::{Address, Family};
use crate::ecn;
use crate::frame::{Frame, GsoKind, Partial, Tunnel as TunnelOffload, TunnelKind};
use crate::hash::Hasher;
use crate::mtu;
use crate::overlay::{Exit, Overlay, Peer, Target, Tunnel};
use crate::parse::{Fragment, Packet};
use crate::wire::{checksum, ethernet, geneve, ipv4, ipv6, protocol, udp, vxlan};
use sluice_contract::overlay::{GENEVE_CLASS, GENEVE_IDENTITY, TunnelProtocol};
use sluice_contract::{DropReason, Identity, Mac};
use zerocopy::{FromBytes, IntoBytes, big_endian::U16};

/// Of every outer packet.
const HOPS: u8 = 64;
/// Outer source ports: the range that RFC 7348 §5 recommends.
const FIRST_PORT: u16 = 49152;

/// The ends of the tunnel.
#[derive(Clone, Copy, Debug)]
struct Way<'t> {
    tunnel: &'t Tunnel,
    peer: &'t Peer,
    /// The uplink's own MAC and the next hop's.
    source: Mac,
    next_hop: Mac,
}

/// The outer source port of a packet: the same for all packets of a flow, spread over flows. Fragments have no ports to
/// tell flows apart by, so all of a datagram go by addresses alone and stay together.
#[inline]
pub fn source_port(packet: &Packet, hasher: &Hasher) -> u16 {
    let ports = match (packet.fragment, packet.transport.ports()) {
        (Fragment::Whole, Some((source, destination))) => {
            u64::from(source) << 16 | u64::from(destination)
        }
        _ => 0,
    };
    let last = ports << 8 | u64::from(packet.protocol);
    let hash = match packet.family {
        Family::V4 => {
            let addresses = packet.source.low() << 32 | packet.destination.low() & 0xffff_ffff;
            hasher.hash([addresses, last])
        }
        Family::V6 => hasher.hash([
            packet.source.high(),
            packet.source.low(),
            packet.destination.high(),
            packet.destination.low(),
            last,
        ]),
    };
    FIRST_PORT | (hash as u16 & !FIRST_PORT)
}

/// What the tunnel tells beside the packet.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// Who the sender is.
    pub identity: Identity,
    /// The backend that the packet is for, if it is still addressed to a Service's frontend.
    pub target: Option<Target>,
}

/// What stands between the outer IP header and the inner packet.
#[derive(Clone, Copy, Debug)]
enum Shim {
    Vxlan(vxlan::Header),
    Geneve(geneve::Header, geneve::WordOption, Option<Target>),
    None,
}

impl Shim {
    /// `None`: this tunnel cannot tell the target.
    fn new(tunnel: &Tunnel, inner: Family, told: Told) -> Option<Self> {
        let vni = tunnel.vni;
        let Told { identity, target } = told;
        if target.is_some() && !tunnel.protocol.tells_backend() {
            return None;
        }
        let options = geneve::WordOption::LENGTH + target.map_or(0, Target::option_length);
        let geneve = |protocol| {
            Self::Geneve(
                geneve::Header::new(vni, protocol, options, target.is_some()),
                geneve::WordOption::new(GENEVE_CLASS, GENEVE_IDENTITY, identity.0),
                target,
            )
        };
        Some(match tunnel.protocol {
            TunnelProtocol::Vxlan => Self::Vxlan(vxlan::Header::new(vni, None)),
            TunnelProtocol::VxlanGbp => {
                // An identity that does not fit is not told: the receiver then goes by the address.
                let group = u16::try_from(identity.0).ok();
                Self::Vxlan(vxlan::Header::new(vni, group))
            }
            TunnelProtocol::Geneve => geneve(geneve::ETHERNET),
            TunnelProtocol::GeneveIp => geneve(ethertype(inner)),
            TunnelProtocol::IpIp => Self::None,
        })
    }

    /// With the UDP header.
    fn length(&self) -> usize {
        match self {
            Self::Vxlan(_) => udp::LENGTH + vxlan::LENGTH,
            Self::Geneve(_, _, target) => {
                let target = match target {
                    Some(target) => target.option_length(),
                    None => 0,
                };
                udp::LENGTH + geneve::LENGTH + geneve::WordOption::LENGTH + target
            }
            Self::None => 0,
        }
    }
}

const fn ethertype(family: Family) -> u16 {
    match family {
        Family::V4 => ethernet::IPV4,
        Family::V6 => ethernet::IPV6,
    }
}

const fn has_ethernet(protocol: TunnelProtocol) -> bool {
    !matches!(protocol, TunnelProtocol::GeneveIp | TunnelProtocol::IpIp)
}

/// Makes the frame ready to leave by the uplink whose MAC is `uplink`: wrapped, or for a direct peer with its next hop's
/// MAC. Its IP packet is as it shall arrive; `packet` is what was parsed of it.
///
/// # Errors
/// Why the frame is to be dropped.
pub fn send(
    frame: &mut Frame<'_>,
    packet: &Packet,
    overlay: &Overlay<'_>,
    exit: &Exit,
    uplink: Mac,
    told: Told,
) -> Result<(), DropReason> {
    if exit.direct {
        if told.target.is_some() {
            return Err(DropReason::TunnelUnready);
        }
        let header = ethernet::Header::new(exit.next_hop, uplink, ethertype(packet.family));
        return put(frame.bytes_mut(), &header).map(|_| ());
    }
    let tunnel = overlay.tunnel().ok_or(DropReason::NoRoute)?;
    if tunnel.clamp_mss {
        let reserved = told.target.map_or(0, Target::option_length) as u16;
        mtu::clamp_mss(frame, packet, exit.mtu.saturating_sub(reserved));
    }
    let way = Way {
        tunnel,
        peer: overlay.peer(exit.peer).ok_or(DropReason::NoRoute)?,
        source: uplink,
        next_hop: exit.next_hop,
    };
    wrap(frame, packet, &way, told, overlay.hasher())
}

fn wrap(
    frame: &mut Frame<'_>,
    packet: &Packet,
    way: &Way<'_>,
    told: Told,
    hasher: &Hasher,
) -> Result<(), DropReason> {
    let Way { tunnel, peer, .. } = way;
    let outer = peer.address.family();
    let source = tunnel.source(outer).ok_or(DropReason::TunnelUnready)?;
    let inner_class = frame
        .bytes()
        .get(ethernet::LENGTH..)
        .and_then(|bytes| ecn::class_of(bytes, packet.family))
        .ok_or(DropReason::Malformed)?;
    let shim = Shim::new(tunnel, packet.family, told).ok_or(DropReason::TunnelUnready)?;
    let network = match outer {
        Family::V4 => ipv4::LENGTH,
        Family::V6 => ipv6::LENGTH,
    };
    // Without Ethernet inside, the inner frame's Ethernet header becomes the outer one's room.
    let keeps = has_ethernet(tunnel.protocol);
    let kept = if keeps { 0 } else { ethernet::LENGTH };
    let pushed = ethernet::LENGTH + network + shim.length() - kept;
    let payload = frame.length() - kept + shim.length();
    if payload + network > usize::from(u16::MAX) {
        return Err(DropReason::TooBig);
    }
    if frame.headroom() < pushed {
        return Err(DropReason::TunnelUnready);
    }
    if keeps {
        let inner = ethernet::Header::new(peer.mac(), tunnel.mac, ethertype(packet.family));
        put(frame.bytes_mut(), &inner)?;
    }
    // IPIP has no ports.
    let port = match shim {
        Shim::None => 0,
        _ => source_port(packet, hasher),
    };
    let ends = Ends {
        source,
        destination: peer.address,
        class: ecn::wrap(inner_class, tunnel.copy_dscp),
        protocol: match (&shim, packet.family) {
            (Shim::None, Family::V4) => protocol::IPIP,
            (Shim::None, Family::V6) => protocol::IPV6_IN_IP,
            _ => protocol::UDP,
        },
        payload: payload as u16,
        mark: peer.mark(port),
    };
    frame.push(pushed).ok_or(DropReason::TunnelUnready)?;
    shift_offload(frame, packet, tunnel.protocol, outer, pushed);
    let ethernet = ethernet::Header::new(way.next_hop, way.source, ethertype(outer));
    let rest = put(frame.bytes_mut(), &ethernet)?;
    let rest = ends.write(rest)?;
    let udp = udp::Header {
        source: U16::new(port),
        destination: U16::new(tunnel.port),
        length: U16::new(ends.payload),
        checksum: U16::new(0),
    };
    match shim {
        Shim::Vxlan(header) => {
            put(put(rest, &udp)?, &header)?;
        }
        Shim::Geneve(header, option, target) => {
            let rest = put(put(put(rest, &udp)?, &header)?, &option)?;
            if let Some(target) = target {
                let option = target.to_option();
                let place = rest.get_mut(..option.len());
                place.ok_or(DropReason::Malformed)?.copy_from_slice(&option);
            }
        }
        Shim::None => return Ok(()),
    }
    if outer == Family::V6 && !tunnel.zero_checksum6 {
        checksum6(frame, &ends).ok_or(DropReason::Malformed)?;
    }
    Ok(())
}

/// Writes `header` to the front of `bytes`; yields what follows.
fn put<'b, T: IntoBytes + zerocopy::Immutable>(
    bytes: &'b mut [u8],
    header: &T,
) -> Result<&'b mut [u8], DropReason> {
    let (to, rest) = bytes
        .split_at_mut_checked(size_of::<T>())
        .ok_or(DropReason::Malformed)?;
    to.copy_from_slice(header.as_bytes());
    Ok(rest)
}

/// The outer IP header.
struct Ends {
    source: Address,
    destination: Address,
    class: u8,
    protocol: u8,
    /// Bytes behind it.
    payload: u16,
    /// [`Peer::mark`]
    mark: u32,
}

impl Ends {
    fn write<'b>(&self, bytes: &'b mut [u8]) -> Result<&'b mut [u8], DropReason> {
        match self.destination.family() {
            Family::V4 => {
                let (from, to) = (self.source.v4_octets(), self.destination.v4_octets());
                let header = ipv4::Header::new(from, to, self.protocol, self.payload)
                    .identified(self.mark as u16);
                let rest = put(&mut *bytes, &header)?.len();
                ecn::set_class(bytes, Family::V4, self.class);
                let at = bytes.len() - rest;
                Ok(bytes.get_mut(at..).unwrap_or_default())
            }
            Family::V6 => {
                let (from, to) = (self.source.0, self.destination.0);
                let header = ipv6::Header::new(from, to, self.protocol, self.payload, HOPS)
                    .labelled(self.mark);
                let rest = put(&mut *bytes, &header)?.len();
                ecn::set_class(bytes, Family::V6, self.class);
                let at = bytes.len() - rest;
                Ok(bytes.get_mut(at..).unwrap_or_default())
            }
        }
    }
}

/// The offload words count from the frame's new start, and say that they speak of the packet inside.
fn shift_offload(
    frame: &mut Frame<'_>,
    packet: &Packet,
    protocol: TunnelProtocol,
    outer: Family,
    pushed: usize,
) {
    let by = pushed as u16;
    let offload = &mut frame.offload;
    // What the device verified is no longer the outermost checksum.
    offload.verified = false;
    if let Some(partial) = &mut offload.partial {
        partial.start = partial.start.saturating_add(by);
    }
    if let Some(gso) = &mut offload.gso {
        gso.header = gso.header.saturating_add(by);
        let cut_by_devices = has_ethernet(protocol) && gso.kind != GsoKind::Udp;
        offload.tunnel = Some(TunnelOffload {
            kind: match outer {
                Family::V4 if cut_by_devices => TunnelKind::Udp4,
                Family::V6 if cut_by_devices => TunnelKind::Udp6,
                _ => TunnelKind::Other,
            },
            network: (packet.network() + pushed) as u16,
            checksum: false,
        });
    }
}

/// Fills in the outer UDP checksum of an IPv6 packet, or says who has to.
fn checksum6(frame: &mut Frame<'_>, ends: &Ends) -> Option<()> {
    const AT: usize = ethernet::LENGTH + ipv6::LENGTH;
    let length = usize::from(ends.payload);
    let pseudo = checksum::pseudo(ends.source, ends.destination, protocol::UDP, length);
    let value = match (frame.offload.partial, &mut frame.offload.tunnel) {
        (_, Some(tunnel)) => {
            tunnel.checksum = true;
            checksum::fold(pseudo)
        }
        (Some(inner), None) => {
            let seed = usize::from(inner.start) + usize::from(inner.offset);
            let covered = frame.bytes().get(AT..usize::from(inner.start))?;
            let seed = frame.bytes().get(seed..seed + 2)?;
            let rest = u64::from(!u16::from_be_bytes([*seed.first()?, *seed.last()?]));
            match checksum::finish(checksum::sum(covered, pseudo + rest)) {
                0 => 0xffff,
                sum => sum,
            }
        }
        (None, None) => {
            frame.offload.partial = Some(Partial {
                start: AT as u16,
                offset: udp::CHECKSUM_OFFSET,
            });
            checksum::fold(pseudo)
        }
    };
    let (header, _) = udp::Header::mut_from_prefix(frame.bytes_mut().get_mut(AT..)?).ok()?;
    header.checksum = U16::new(value);
    Some(())
}
