//! The rows of the appliance's tables, as the host sends them. A row is whole: a put replaces the row of the same key.

use crate::limits;
use crate::overlay::{NextHopId, OverlayKey, OverlayRow};
use crate::policy::{PolicyKey, PolicyRow};
use crate::service::{ServiceKey, ServiceRow};
use crate::types::{Identity, LinkId, Mac, Prefix, Tenant};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::num::NonZeroU32;
use heapless::Vec;
use serde::{Deserialize, Serialize};

/// One row of one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Row {
    Node(NodeRow),
    Link(LinkRow),
    Policy(PolicyRow),
    Service(ServiceRow),
    Overlay(OverlayRow),
    Bandwidth(BandwidthRow),
    Marking(MarkingRow),
    /// Behind the next hops, so that the order of keys is one in which rows can be put.
    Route(RouteRow),
    Rates(RatesRow),
}

/// What names a row. Removal is explicit, by key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Key {
    Node,
    Link(LinkId),
    Policy(PolicyKey),
    Service(ServiceKey),
    Overlay(OverlayKey),
    Bandwidth(LinkId),
    Marking(LinkId),
    Route(Prefix),
    Rates(LinkId),
}

impl Row {
    /// The key under which this row is found.
    pub const fn key(&self) -> Key {
        match self {
            Self::Node(_) => Key::Node,
            Self::Link(link) => Key::Link(link.id),
            Self::Policy(policy) => Key::Policy(policy.key()),
            Self::Service(service) => Key::Service(service.key()),
            Self::Route(route) => Key::Route(route.prefix),
            Self::Overlay(row) => Key::Overlay(row.key()),
            Self::Bandwidth(row) => Key::Bandwidth(row.link),
            Self::Marking(row) => Key::Marking(row.link),
            Self::Rates(row) => Key::Rates(row.link),
        }
    }
}

/// What holds for the whole node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// The pods' gateway; answered by the appliance, never routed.
    pub gateway4: Ipv4Addr,
    /// The same for IPv6; link-local.
    pub gateway6: Ipv6Addr,
    /// The MAC behind both.
    pub gateway_mac: Mac,
}

impl Default for NodeRow {
    fn default() -> Self {
        Self {
            gateway4: Ipv4Addr::new(169, 254, 1, 1),
            gateway6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
            gateway_mac: Mac::GATEWAY,
        }
    }
}

/// A link: who is behind it and what it may claim to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRow {
    pub id: LinkId,
    /// The only source MAC accepted from it, and the destination MAC of frames to it. Of the uplink: the node's own MAC
    /// there, to which frames come and from which they go.
    pub mac: Mac,
    /// The only source addresses accepted from it, and the destinations that lead to it.
    pub addresses: Vec<IpAddr, { limits::LINK_ADDRESSES }>,
    /// The largest IP packet it takes, in bytes.
    pub mtu: u16,
    /// What policy sees of it.
    pub identity: Identity,
    /// Which incarnation of the pod this is: grows when an id is used again, so that state of the former pod is never
    /// taken for the new one's.
    pub incarnation: u32,
    /// With whom it shares the room for connections and fragments.
    pub tenant: Tenant,
}

/// How much a pod may send and be sent; each direction by itself, as the pod sees it. It may come before its link and stay
/// after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandwidthRow {
    pub link: LinkId,
    pub ingress: Option<Rate>,
    pub egress: Option<Rate>,
}

/// With which DSCP a pod's packets go on, whatever they came with. It may come before its link and stay after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkingRow {
    pub link: LinkId,
    /// 0 to 63.
    pub dscp: u8,
}

/// How many packets and new connections a pod may send and be sent in a second; each by itself, as the pod sees it. It may come
/// before its link and stay after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RatesRow {
    pub link: LinkId,
    pub ingress_packets: Option<NonZeroU32>,
    pub egress_packets: Option<NonZeroU32>,
    /// Connections that others open to it.
    pub ingress_connections: Option<NonZeroU32>,
    /// Connections that it opens.
    pub egress_connections: Option<NonZeroU32>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    pub bits_per_second: u64,
    /// Bytes that may go at once.
    pub burst: u32,
}

/// Where packets go by the uplink that are for no pod and nothing behind a peer; of several that match the longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteRow {
    pub prefix: Prefix,
    /// The gateway; none: the destination itself is a neighbor, if there is a row of its address.
    pub next_hop: Option<NextHopId>,
}
