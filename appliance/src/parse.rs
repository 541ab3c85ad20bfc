//! Bytes → [`Packet`] in one pass: what every later stage asks of the headers, checked once.
//!
//! A packet that comes out is well-formed as far as the appliance reads it: all lengths hold, the transport header is at hand
//! unless this is a later fragment, no address is one that may not stand on a wire, and the offload words agree with the
//! headers. Nothing here depends on any table.

use crate::address::{Address, Family};
use crate::frame::{Frame, GsoKind};
use crate::wire::{checksum, ethernet, icmp, ipv4, ipv6, protocol, sctp, tcp, udp};
use sluice_contract::{DropReason, LinkId};
use zerocopy::FromBytes;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    Arp,
    Ip(Packet),
}

/// An IP packet. Offsets count from the start of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    pub family: Family,
    pub protocol: u8,
    /// TTL or hop limit.
    pub hops: u8,
    pub fragment: Fragment,
    /// Where the header lies that says which fragment this is: IPv4's own, or IPv6's extension.
    pub fragment_header: u16,
    /// IPv4: the sender wants no fragments. Always true of IPv6.
    pub dont_fragment: bool,
    pub transport: Transport,
    /// Where the transport header begins, or a later fragment's payload.
    pub payload: u16,
    /// Where the packet ends; what follows is padding.
    pub end: u32,
}

/// Which part of a datagram this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    Whole,
    /// The one with the transport header.
    First,
    Later,
}

/// What the transport header says that stages decide upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp {
        source: u16,
        destination: u16,
        flags: u8,
    },
    Udp {
        source: u16,
        destination: u16,
    },
    Sctp {
        source: u16,
        destination: u16,
    },
    Icmp {
        kind: u8,
        code: u8,
        id: u16,
    },
    /// A protocol without ports, or a later fragment.
    Opaque,
}

impl Transport {
    /// Source and destination port, if the protocol has any.
    pub const fn ports(self) -> Option<(u16, u16)> {
        match self {
            Self::Tcp {
                source,
                destination,
                ..
            }
            | Self::Udp {
                source,
                destination,
            }
            | Self::Sctp {
                source,
                destination,
            } => Some((source, destination)),
            Self::Icmp { .. } | Self::Opaque => None,
        }
    }
}

impl Packet {
    /// Nothing yet.
    pub const EMPTY: Self = Self {
        source: Address::UNSPECIFIED,
        destination: Address::UNSPECIFIED,
        family: Family::V4,
        protocol: 0,
        hops: 0,
        fragment: Fragment::Whole,
        fragment_header: 0,
        dont_fragment: false,
        transport: Transport::Opaque,
        payload: 0,
        end: 0,
    };

    /// Where the IP header begins.
    pub const fn network(&self) -> usize {
        ethernet::LENGTH
    }

    /// Length of the IP packet.
    pub const fn length(&self) -> usize {
        self.end as usize - ethernet::LENGTH
    }

    /// Whether this is an ICMP error, which must never be answered by another.
    pub const fn is_icmp_error(&self) -> bool {
        match (self.family, self.transport) {
            (Family::V4, Transport::Icmp { kind, .. }) => icmp::v4::is_error(kind),
            (Family::V6, Transport::Icmp { kind, .. }) => icmp::v6::is_error(kind),
            _ => false,
        }
    }

    /// Whether this is an ICMP echo request.
    pub const fn is_echo(&self) -> bool {
        match (self.family, self.transport) {
            (Family::V4, Transport::Icmp { kind, .. }) => kind == icmp::v4::ECHO,
            (Family::V6, Transport::Icmp { kind, .. }) => kind == icmp::v6::ECHO,
            _ => false,
        }
    }
}

/// Reads the headers of `frame`.
///
/// # Errors
/// Why the frame is to be dropped.
pub fn parse(frame: &Frame<'_>) -> Result<Parsed, DropReason> {
    let mut packet = Packet::EMPTY;
    Ok(match parse_into(frame, &mut packet)? {
        Content::Arp => Parsed::Arp,
        Content::Ip => Parsed::Ip(packet),
    })
}

/// What a frame carries, of which an IP packet was written elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Arp,
    Ip,
}

/// The same as [`parse`], for batches: the packet is written where it stays. Nothing of `packet` means anything unless the
/// answer is [`Content::Ip`].
///
/// # Errors
/// As there.
#[inline]
pub fn parse_into(frame: &Frame<'_>, packet: &mut Packet) -> Result<Content, DropReason> {
    let bytes = frame.bytes();
    let (header, rest) =
        ethernet::Header::ref_from_prefix(bytes).map_err(|_| DropReason::Malformed)?;
    let available = frame.length() - ethernet::LENGTH;
    match header.ethertype.get() {
        ethernet::IPV4 => ipv4(rest, available, packet)?,
        ethernet::IPV6 => ipv6(rest, available, packet)?,
        ethernet::ARP => return Ok(Content::Arp),
        ethernet::VLAN | ethernet::VLAN_SERVICE => return Err(DropReason::VlanTag),
        _ => return Err(DropReason::EtherType),
    }
    check_offload(frame, packet)?;
    Ok(Content::Ip)
}

#[inline]
fn ipv4(bytes: &[u8], available: usize, packet: &mut Packet) -> Result<(), DropReason> {
    let (header, _) = ipv4::Header::ref_from_prefix(bytes).map_err(|_| DropReason::Malformed)?;
    let header_length = header.header_length();
    let total = usize::from(header.total_length.get());
    let whole = bytes.get(..header_length).ok_or(DropReason::Malformed)?;
    if header.version() != 4
        || header_length < ipv4::LENGTH
        || total < header_length
        || total > available
    {
        return Err(DropReason::Malformed);
    }
    if checksum::finish(checksum::sum(whole, 0)) != 0 {
        return Err(DropReason::BadChecksum);
    }
    if header_length > ipv4::LENGTH
        && ipv4::options_route(whole.get(ipv4::LENGTH..).unwrap_or_default())
    {
        return Err(DropReason::SourceRoute);
    }
    if is_martian4(header) {
        return Err(DropReason::Martian);
    }
    packet.fragment = Fragment::Whole;
    if header.fragment.get() & !ipv4::DF != 0 {
        let (offset, more) = (header.fragment_offset(), header.more_fragments());
        packet.fragment = which(offset, more);
        fragment_holds(packet.fragment, offset, more, total - header_length)?;
    }
    packet.source = Address::v4(header.source);
    packet.destination = Address::v4(header.destination);
    packet.family = Family::V4;
    packet.protocol = header.protocol;
    packet.hops = header.ttl;
    packet.fragment_header = ethernet::LENGTH as u16;
    packet.dont_fragment = header.dont_fragment();
    packet.payload = (ethernet::LENGTH + header_length) as u16;
    packet.end = (ethernet::LENGTH + total) as u32;
    with_transport(packet, bytes.get(header_length..).unwrap_or_default())
}

/// Addresses that may not stand on a wire (RFC 1812 §5.3.7): 0/8, 127/8, 240/4 but for the broadcast address as destination,
/// and groups as source.
#[inline]
fn is_martian4(header: &ipv4::Header) -> bool {
    let [source, ..] = header.source;
    let [destination, ..] = header.destination;
    let nobody = |first: u8| first == 0 || first == 127;
    nobody(source)
        || nobody(destination)
        || source >= 224
        || (destination >= 240 && header.destination != [255; 4])
}

const fn which(offset: u16, more: bool) -> Fragment {
    match (offset, more) {
        // An "atomic" fragment is a whole packet (RFC 6946).
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    }
}

#[inline]
fn ipv6(bytes: &[u8], available: usize, packet: &mut Packet) -> Result<(), DropReason> {
    let (header, rest) = ipv6::Header::ref_from_prefix(bytes).map_err(|_| DropReason::Malformed)?;
    let total = usize::from(header.payload_length.get()) + ipv6::LENGTH;
    if header.version() != 6 || total > available {
        return Err(DropReason::Malformed);
    }
    let within = rest.get(..(total - ipv6::LENGTH).min(rest.len()));
    let upper =
        ipv6::walk(header.next_header, within.unwrap_or_default()).map_err(|e| match e {
            ipv6::WalkError::Short => DropReason::Malformed,
            ipv6::WalkError::Refused => DropReason::ExtensionHeaders,
        })?;
    packet.source = Address(header.source);
    packet.destination = Address(header.destination);
    packet.protocol = upper.protocol;
    if is_martian6(packet) {
        return Err(DropReason::Martian);
    }
    packet.fragment = Fragment::Whole;
    if let Some(at) = upper.fragment {
        let (header, _) = ipv6::FragmentHeader::ref_from_prefix(rest.get(at..).unwrap_or_default())
            .map_err(|_| DropReason::Malformed)?;
        let (offset, more) = (header.offset(), header.more_fragments());
        packet.fragment = which(offset, more);
        let payload = (total - ipv6::LENGTH).saturating_sub(at + size_of::<ipv6::FragmentHeader>());
        fragment_holds(packet.fragment, offset, more, payload)?;
    }
    packet.family = Family::V6;
    packet.hops = header.hop_limit;
    packet.fragment_header = (ethernet::LENGTH + ipv6::LENGTH + upper.fragment.unwrap_or(0)) as u16;
    packet.dont_fragment = true;
    // At most the walk's depth times its longest header: below 2^16.
    packet.payload = (ethernet::LENGTH + ipv6::LENGTH + upper.offset) as u16;
    packet.end = (ethernet::LENGTH + total) as u32;
    with_transport(packet, rest.get(upper.offset..).unwrap_or_default())
}

/// The same for IPv6 (RFC 4291 §2.5): loopback, unspecified, IPv4-mapped, and groups as source. `::` is also the source of a
/// pod that has no address yet; neighbor discovery deals with it.
#[inline]
fn is_martian6(packet: &Packet) -> bool {
    let (source, destination) = (packet.source, packet.destination);
    if source == Address::UNSPECIFIED {
        return packet.protocol != protocol::ICMP6 || !destination.is_multicast();
    }
    source.is_martian_in(Family::V6)
        || destination.is_martian_in(Family::V6)
        || source.high() >> 56 == 0xff
}

/// A fragment must carry something, in whole units of eight unless it is the last, and end within a datagram.
fn fragment_holds(
    fragment: Fragment,
    offset: u16,
    more: bool,
    payload: usize,
) -> Result<(), DropReason> {
    let broken = fragment != Fragment::Whole
        && (payload == 0
            || (more && !payload.is_multiple_of(8))
            || usize::from(offset) + payload > usize::from(u16::MAX));
    if broken {
        Err(DropReason::Malformed)
    } else {
        Ok(())
    }
}

/// Reads the transport header at the front of `bytes`, which is what is at hand behind the IP headers.
#[inline]
fn with_transport(packet: &mut Packet, bytes: &[u8]) -> Result<(), DropReason> {
    packet.transport = Transport::Opaque;
    if packet.fragment == Fragment::Later {
        return Ok(());
    }
    let length = (packet.end as usize).saturating_sub(usize::from(packet.payload));
    let short = if packet.fragment == Fragment::First {
        DropReason::FragmentTiny
    } else {
        DropReason::Malformed
    };
    let bytes = bytes.get(..length.min(bytes.len())).unwrap_or_default();
    packet.transport = match (packet.protocol, packet.family) {
        (protocol::TCP, _) => {
            let (header, _) = tcp::Header::ref_from_prefix(bytes).map_err(|_| short)?;
            let header_length = header.header_length();
            if header_length < tcp::LENGTH {
                return Err(DropReason::Malformed);
            }
            if bytes.len() < header_length {
                return Err(short);
            }
            Transport::Tcp {
                source: header.source.get(),
                destination: header.destination.get(),
                flags: header.flags,
            }
        }
        (protocol::UDP, _) => {
            let (header, _) = udp::Header::ref_from_prefix(bytes).map_err(|_| short)?;
            let said = usize::from(header.length.get());
            if said < udp::LENGTH || (packet.fragment == Fragment::Whole && said > length) {
                return Err(DropReason::Malformed);
            }
            Transport::Udp {
                source: header.source.get(),
                destination: header.destination.get(),
            }
        }
        (protocol::SCTP, _) => {
            let (header, _) = sctp::Header::ref_from_prefix(bytes).map_err(|_| short)?;
            Transport::Sctp {
                source: header.source.get(),
                destination: header.destination.get(),
            }
        }
        (protocol::ICMP, Family::V4) | (protocol::ICMP6, Family::V6) => {
            let (header, _) = icmp::Header::ref_from_prefix(bytes).map_err(|_| short)?;
            Transport::Icmp {
                kind: header.kind,
                code: header.code,
                id: header.echo_id(),
            }
        }
        _ => Transport::Opaque,
    };
    Ok(())
}

/// The offload words come from the far side of the ring: they must fit the frame they stand for.
#[inline]
fn check_offload(frame: &Frame<'_>, packet: &Packet) -> Result<(), DropReason> {
    if let Some(partial) = frame.offload.partial {
        let end = usize::from(partial.start) + usize::from(partial.offset) + 2;
        if end > frame.bytes().len() || usize::from(partial.start) < usize::from(packet.payload) {
            return Err(DropReason::Malformed);
        }
    }
    if let Some(gso) = frame.offload.gso {
        let fits = match gso.kind {
            GsoKind::Tcp4 => packet.family == Family::V4 && packet.protocol == protocol::TCP,
            GsoKind::Tcp6 => packet.family == Family::V6 && packet.protocol == protocol::TCP,
            GsoKind::Udp => packet.protocol == protocol::UDP,
        };
        // The words of a tunnelled frame are about the packet inside; they are checked when it has been unwrapped.
        let tunnelled = frame.ingress == LinkId::UPLINK && frame.offload.tunnel.is_some();
        let fits = fits || tunnelled;
        if !fits || gso.size == 0 || packet.fragment != Fragment::Whole {
            return Err(DropReason::Malformed);
        }
    }
    Ok(())
}

/// The packet that an ICMP error quotes, with offsets from its own start, and its TCP sequence number. Only the first eight bytes of
/// its transport header need be there (RFC 792); options are skipped.
pub fn quoted(bytes: &[u8], family: Family) -> Option<(Packet, Option<u32>)> {
    let mut packet = match family {
        Family::V4 => quoted4(bytes)?,
        Family::V6 => quoted6(bytes)?,
    };
    let rest = bytes.get(usize::from(packet.payload)..)?;
    let [a, b, c, d, e, f, g, h, ..] = *rest else {
        return None;
    };
    let source = u16::from_be_bytes([a, b]);
    let destination = u16::from_be_bytes([c, d]);
    packet.transport = match (packet.protocol, family) {
        (protocol::TCP, _) => Transport::Tcp {
            source,
            destination,
            flags: 0,
        },
        (protocol::UDP, _) => Transport::Udp {
            source,
            destination,
        },
        (protocol::SCTP, _) => Transport::Sctp {
            source,
            destination,
        },
        (protocol::ICMP, Family::V4) | (protocol::ICMP6, Family::V6) => Transport::Icmp {
            kind: a,
            code: b,
            id: u16::from_be_bytes([e, f]),
        },
        _ => Transport::Opaque,
    };
    let sequence = (packet.protocol == protocol::TCP).then(|| u32::from_be_bytes([e, f, g, h]));
    // Nobody reports an error about an error; whoever claims to is after something else.
    (!packet.is_icmp_error()).then_some((packet, sequence))
}

fn quoted4(bytes: &[u8]) -> Option<Packet> {
    let (header, _) = ipv4::Header::ref_from_prefix(bytes).ok()?;
    let header_length = header.header_length();
    let whole = bytes.get(..header_length)?;
    let valid = header.version() == 4
        && header_length >= ipv4::LENGTH
        && header.fragment_offset() == 0
        && checksum::finish(checksum::sum(whole, 0)) == 0;
    valid.then(|| Packet {
        source: Address::v4(header.source),
        destination: Address::v4(header.destination),
        family: Family::V4,
        protocol: header.protocol,
        hops: header.ttl,
        fragment: Fragment::Whole,
        fragment_header: 0,
        dont_fragment: header.dont_fragment(),
        transport: Transport::Opaque,
        payload: header_length as u16,
        end: u32::from(header.total_length.get()),
    })
}

fn quoted6(bytes: &[u8]) -> Option<Packet> {
    let (header, rest) = ipv6::Header::ref_from_prefix(bytes).ok()?;
    let upper = ipv6::walk(header.next_header, rest).ok()?;
    if let Some(at) = upper.fragment {
        let (fragment, _) = ipv6::FragmentHeader::ref_from_prefix(rest.get(at..)?).ok()?;
        if fragment.offset() != 0 {
            return None;
        }
    }
    let mapped = Address(header.source).family() == Family::V4
        || Address(header.destination).family() == Family::V4;
    (header.version() == 6 && !mapped).then(|| Packet {
        source: Address(header.source),
        destination: Address(header.destination),
        family: Family::V6,
        protocol: upper.protocol,
        hops: header.hop_limit,
        fragment: Fragment::Whole,
        fragment_header: 0,
        dont_fragment: true,
        transport: Transport::Opaque,
        payload: (ipv6::LENGTH + upper.offset) as u16,
        end: u32::from(header.payload_length.get()) + ipv6::LENGTH as u32,
    })
}
