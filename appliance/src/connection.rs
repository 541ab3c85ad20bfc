//! A packet as connection tracking sees it, and what the stages remember with a connection.

use crate::conntrack::{Chunks, Segment, Signal};
use crate::flow::Flow;
use crate::frame::Frame;
use crate::parse::{Packet, Transport};
use crate::wire::{icmp, sctp, tcp};
use crate::{Direction, Family};
use sluice_contract::LinkId;
use sluice_contract::overlay::{NextHopId, PeerId};
use sluice_contract::policy::RuleId;
use sluice_contract::service::PortId;
use zerocopy::FromBytes;

/// The flow of a packet that is whole or a first fragment.
#[inline]
pub fn flow_of(packet: &Packet) -> Flow {
    let (source, destination) = match packet.transport {
        Transport::Tcp {
            source,
            destination,
            ..
        }
        | Transport::Udp {
            source,
            destination,
        }
        | Transport::Sctp {
            source,
            destination,
        } => (source, destination),
        Transport::Icmp { kind, id, .. } => match query(packet.family, kind) {
            Some(Signal::Query) => (id, 0),
            Some(_) => (0, id),
            None => (0, 0),
        },
        Transport::Opaque => (0, 0),
    };
    Flow::new(
        packet.source,
        packet.destination,
        packet.protocol,
        source,
        destination,
    )
}

/// Whether an ICMP message is a question or an answer. Only echo is passed on; other queries may be dropped (RFC 5508 REQ-10).
const fn query(family: Family, kind: u8) -> Option<Signal> {
    match (family, kind) {
        (Family::V4, icmp::v4::ECHO) | (Family::V6, icmp::v6::ECHO) => Some(Signal::Query),
        (Family::V4, icmp::v4::ECHO_REPLY) | (Family::V6, icmp::v6::ECHO_REPLY) => {
            Some(Signal::Answer)
        }
        _ => None,
    }
}

/// What the packet says to its connection; `None`: an ICMP message that has none.
#[inline]
pub fn signal_of(frame: &Frame<'_>, packet: &Packet) -> Option<Signal> {
    Some(match packet.transport {
        Transport::Tcp { .. } => Signal::Tcp(segment(frame, packet)?),
        Transport::Sctp { .. } => Signal::Sctp(chunks(frame, packet)?),
        Transport::Icmp { kind, .. } => query(packet.family, kind)?,
        Transport::Udp { .. } | Transport::Opaque => Signal::Datagram,
    })
}

#[inline]
fn segment(frame: &Frame<'_>, packet: &Packet) -> Option<Segment> {
    let bytes = frame.bytes().get(usize::from(packet.payload)..)?;
    let (header, options) = tcp::Header::ref_from_prefix(bytes).ok()?;
    let header_length = header.header_length();
    let length = (packet.end as usize).checked_sub(usize::from(packet.payload) + header_length)?;
    let scale = if header.flags & tcp::SYN != 0 {
        options
            .get(..header_length - tcp::LENGTH)
            .and_then(tcp::window_scale)
    } else {
        None
    };
    Some(Segment {
        sequence: header.sequence.get(),
        acknowledgment: header.acknowledgment.get(),
        flags: header.flags,
        window: header.window.get(),
        length: u32::try_from(length).ok()?,
        scale,
    })
}

fn chunks(frame: &Frame<'_>, packet: &Packet) -> Option<Chunks> {
    let end = frame.bytes().len().min(packet.end as usize);
    let bytes = frame.bytes().get(usize::from(packet.payload)..end)?;
    let (header, rest) = sctp::Header::ref_from_prefix(bytes).ok()?;
    let mut all = Chunks {
        tag: header.tag.get(),
        ..Chunks::default()
    };
    for (chunk, value) in sctp::chunks(rest) {
        if chunk.kind < 15 {
            all.kinds |= 1 << chunk.kind;
        }
        // INIT and INIT ACK carry the tag first; ABORT and SHUTDOWN COMPLETE have the T bit.
        match (chunk.kind, value) {
            (1 | 2, [a, b, c, d, ..]) => all.initiate_tag = u32::from_be_bytes([*a, *b, *c, *d]),
            (6 | 14, _) => all.reflected = chunk.flags & 1 == 1,
            _ => {}
        }
    }
    Some(all)
}

/// The way out in one direction, as it was found for the tables of one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    pub link: LinkId,
    pub way: Way,
}

/// Who on that link is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Who is behind the link.
    Link,
    /// A neighbor on the uplink: a gateway, or the destination itself.
    Neighbor(NextHopId),
    /// Another node, through the tunnel or directly.
    Peer(PeerId),
}

/// Distinguishes peers from neighbors in a packed path; no table has as many of either.
const PEER: u16 = 0x8000;
/// Beside a link's number, which has twelve bits: see [`Memo::direct`].
const DIRECT: u32 = 0x8000;

impl Path {
    /// Straight to whoever is behind a link.
    pub const fn to(link: LinkId) -> Self {
        let way = Way::Link;
        Self { link, way }
    }

    /// To another node.
    pub const fn to_peer(peer: PeerId) -> Self {
        Self {
            link: LinkId::UPLINK,
            way: Way::Peer(peer),
        }
    }

    /// To a neighbor on the uplink.
    pub const fn to_neighbor(id: NextHopId) -> Self {
        Self {
            link: LinkId::UPLINK,
            way: Way::Neighbor(id),
        }
    }

    fn pack(self) -> u32 {
        let way = match self.way {
            Way::Link => 0,
            Way::Neighbor(id) => id.0 + 1,
            Way::Peer(id) => PEER | id.0,
        };
        u32::from(self.link.raw()) | u32::from(way) << 16
    }

    #[inline]
    fn unpack(word: u32) -> Option<Self> {
        Some(Self {
            link: LinkId::new((word & 0xffff) as u16)?,
            way: match (word >> 16) as u16 {
                0 => Way::Link,
                peer if peer & PEER != 0 => Way::Peer(PeerId(peer & !PEER)),
                id => Way::Neighbor(NextHopId(id - 1)),
            },
        })
    }
}

/// What is attached to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memo {
    /// The Service through which it came.
    pub service: Option<PortId>,
    /// Where packets of each direction leave.
    pub paths: [Path; 2],
    /// The rule that let it begin.
    pub rule: RuleId,
    /// Its answers go from the backend's node straight to the client. On the way to a peer its packets are not translated but
    /// tell the backend; where they end they are.
    pub direct: bool,
}

impl Memo {
    pub fn pack(&self) -> [u32; 4] {
        let [original, reply] = self.paths;
        let service = self.service.map_or(0, |service| service.0.wrapping_add(1));
        let direct = if self.direct { DIRECT } else { 0 };
        [service, original.pack() | direct, reply.pack(), self.rule.0]
    }

    /// `None` for words that no stage has written.
    #[inline]
    pub fn unpack([service, original, reply, rule]: [u32; 4]) -> Option<Self> {
        Some(Self {
            service: service.checked_sub(1).map(PortId),
            paths: [Path::unpack(original & !DIRECT)?, Path::unpack(reply)?],
            rule: RuleId(rule),
            direct: original & DIRECT != 0,
        })
    }

    /// Where a packet of that direction leaves.
    #[inline]
    pub const fn path(&self, direction: Direction) -> Path {
        let [original, reply] = self.paths;
        match direction {
            Direction::Original => original,
            Direction::Reply => reply,
        }
    }

    /// The link from which a packet of that direction has to come.
    #[inline]
    pub const fn ingress(&self, direction: Direction) -> LinkId {
        self.path(direction.opposite()).link
    }
}
