//! The rows of the way to other nodes: how packets are wrapped, which nodes there are, behind which of them an address
//! lies, and the MAC addresses of the next hops on the uplink.
//!
//! ```text
//! destination → RemoteRow (longest prefix) → PeerRow → NextHopRow
//!            └→ RouteRow: to nobody's peer → NextHopRow
//! outer source address → PeerRow: who it is from, and which RemoteRows it may speak for
//! ```
//!
//! A next hop is put before the peers that use it, a peer before the ranges behind it; removal goes the other way round.

use crate::types::{Mac, Prefix};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use serde::{Deserialize, Serialize};

/// Another node, or one of its two underlay addresses.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct PeerId(pub u16);

/// A neighbor on the uplink.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct NextHopId(pub u16);

/// One row of the way to other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OverlayRow {
    Tunnel(TunnelRow),
    NextHop(NextHopRow),
    Peer(PeerRow),
    Remote(RemoteRow),
}

/// What names a row of the way to other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum OverlayKey {
    Tunnel,
    NextHop(NextHopId),
    Peer(PeerId),
    Remote(Prefix),
}

impl OverlayRow {
    /// The key under which this row is found.
    pub const fn key(&self) -> OverlayKey {
        match self {
            Self::Tunnel(_) => OverlayKey::Tunnel,
            Self::NextHop(row) => OverlayKey::NextHop(row.id),
            Self::Peer(row) => OverlayKey::Peer(row.id),
            Self::Remote(row) => OverlayKey::Remote(row.prefix),
        }
    }
}

/// How packets to other nodes are wrapped. Without this row nothing is, and nothing that is wrapped is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelRow {
    pub protocol: TunnelProtocol,
    /// The UDP port of the receiver. Unused by IPIP.
    pub port: u16,
    /// The network within the tunnel, 24 bits. Unused by IPIP.
    pub vni: u32,
    /// This node's MAC inside the tunnel (flannel's VtepMAC): inner frames are addressed to it.
    pub mac: Mac,
    /// The outer source addresses: this node's own. A peer of a family without one is not reachable.
    pub source4: Option<Ipv4Addr>,
    pub source6: Option<Ipv6Addr>,
    /// UDP over IPv6 without a checksum is sent and taken (RFC 6935). Off, as in Linux.
    pub zero_checksum6: bool,
    /// The outer packet gets the inner one's DSCP (uniform model); else 0 (pipe model).
    pub copy_dscp: bool,
    /// The MSS in SYNs through the tunnel is lowered to what the path takes.
    pub clamp_mss: bool,
}

impl Default for TunnelRow {
    /// Flannel's VXLAN.
    fn default() -> Self {
        Self {
            protocol: TunnelProtocol::Vxlan,
            port: 8472,
            vni: 1,
            mac: Mac::GATEWAY,
            source4: None,
            source6: None,
            zero_checksum6: false,
            copy_dscp: false,
            clamp_mss: true,
        }
    }
}

/// The format of the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TunnelProtocol {
    /// RFC 7348.
    Vxlan,
    /// VXLAN with the group policy extension (draft-smith-vxlan-group-policy), which carries identities below 65536.
    VxlanGbp,
    /// RFC 8926 with Ethernet inside; the identity travels in an option.
    Geneve,
    /// The same with IP inside.
    GeneveIp,
    /// RFC 2003, RFC 2473, RFC 4213: IP in IP. No identity travels.
    IpIp,
}

impl TunnelProtocol {
    /// The name that people use.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::VxlanGbp => "vxlan-gbp",
            Self::Geneve => "geneve",
            Self::GeneveIp => "geneve-ip",
            Self::IpIp => "ipip",
        }
    }

    /// Whether it can say which backend of a Service a packet is for (row S-28).
    pub const fn tells_backend(self) -> bool {
        matches!(self, Self::Geneve | Self::GeneveIp)
    }

    /// Bytes that a packet grows by on an IPv4 or IPv6 underlay: outer IP, UDP, the tunnel's header with the option that
    /// carries the identity, inner Ethernet.
    pub const fn overhead(self, six: bool) -> u16 {
        let network = if six { 40 } else { 20 };
        let (udp, ethernet, geneve) = (8, 14, 8 + 8);
        network
            + match self {
                Self::Vxlan | Self::VxlanGbp => udp + 8 + ethernet,
                Self::Geneve => udp + geneve + ethernet,
                Self::GeneveIp => udp + geneve,
                Self::IpIp => 0,
            }
    }
}

/// The Geneve option that carries the sender's identity: an experimental class (RFC 8926 §7), not critical.
pub const GENEVE_CLASS: u16 = 0xff53;
/// See [`GENEVE_CLASS`].
pub const GENEVE_IDENTITY: u8 = 0x01;

/// The Geneve option of a packet that is addressed to a Service's frontend: which backend it is for. Its address, its port and
/// two bytes of zero. Critical: who does not know it can do nothing right with the packet.
pub const GENEVE_BACKEND: u8 = 0x82;

/// The MAC address of a neighbor on the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextHopRow {
    pub id: NextHopId,
    /// Its own address; no two rows have the same.
    pub address: IpAddr,
    /// None: it does not answer, and senders are told so.
    pub mac: Option<Mac>,
}

/// Another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRow {
    pub id: PeerId,
    /// Its underlay address: the destination of what is sent to it, the source of what comes from it.
    pub address: IpAddr,
    /// Its MAC inside the tunnel.
    pub mac: Mac,
    pub next_hop: NextHopId,
    /// The largest packet that the underlay takes on the way there, outer headers and all.
    pub mtu: u16,
    /// No tunnel: packets go to the next hop as they are (CrossSubnet, host-gw).
    pub direct: bool,
}

/// A range of addresses behind a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRow {
    pub prefix: Prefix,
    pub peer: PeerId,
}
