//! The rows of Services and of address translation: what the host compiled from Services, EndpointSlices and its own
//! configuration, in the form in which the guest looks things up.
//!
//! ```text
//! (address, protocol, port) → FrontendRow → PortRow → SetRow ─ index ─→ BackendRow
//!                                 │ restricted            └ SlotsRow (Maglev: slot → index)
//!                                 └→ SourceRow
//! ```
//!
//! The host decides which endpoints are in which set (readiness, terminating fallback, topology, local or not: kube-proxy's
//! `CategorizeEndpoints`); the guest decides which set, whether the source is masqueraded, and which backend.
//!
//! Rows refer to others by id; what is referred to is put before and removed after. A set is complete when all its
//! backends, from index 0 to its count, and all its slots are there; a commit with an incomplete set is refused, naming it.

use crate::limits;
use crate::types::{Family, Prefix, Protocol};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use heapless::Vec;
use serde::{Deserialize, Serialize};

/// One port of one Service in one family.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct PortId(pub u32);

/// A set of backends of one family.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct SetId(pub u32);

/// One row of Services.
#[expect(
    clippy::large_enum_variant,
    reason = "no_std without allocation; one row exists at a time, on the stack"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceRow {
    Nat(NatRow),
    Connections(ConnectionsRow),
    Prefix(PrefixRow),
    Address(AddressRow),
    Set(SetRow),
    Backend(BackendRow),
    Slots(SlotsRow),
    Port(PortRow),
    Source(SourceRow),
    Frontend(FrontendRow),
}

/// What names a row of Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ServiceKey {
    Nat,
    Connections,
    Prefix(Prefix),
    Address(IpAddr),
    Set(SetId),
    Backend {
        set: SetId,
        index: u16,
    },
    Slots {
        set: SetId,
        chunk: u16,
    },
    Port(PortId),
    Source {
        port: PortId,
        prefix: Prefix,
    },
    Frontend {
        address: IpAddr,
        protocol: Protocol,
        port: u16,
    },
}

impl ServiceRow {
    /// The key under which this row is found.
    pub const fn key(&self) -> ServiceKey {
        match self {
            Self::Nat(_) => ServiceKey::Nat,
            Self::Connections(_) => ServiceKey::Connections,
            Self::Prefix(row) => ServiceKey::Prefix(row.prefix),
            Self::Address(row) => ServiceKey::Address(row.address),
            Self::Set(row) => ServiceKey::Set(row.id),
            Self::Backend(row) => ServiceKey::Backend {
                set: row.set,
                index: row.index,
            },
            Self::Slots(row) => ServiceKey::Slots {
                set: row.set,
                chunk: row.chunk,
            },
            Self::Port(row) => ServiceKey::Port(row.id),
            Self::Source(row) => ServiceKey::Source {
                port: row.port,
                prefix: row.prefix,
            },
            Self::Frontend(row) => ServiceKey::Frontend {
                address: row.address,
                protocol: row.protocol,
                port: row.port,
            },
        }
    }
}

/// How the node translates. Without this row nothing is masqueraded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatRow {
    /// The source of what is masqueraded: addresses of this node. Without one, what would have to be masqueraded is dropped.
    pub node4: Option<Ipv4Addr>,
    pub node6: Option<Ipv6Addr>,
    /// Ports that translations may use, first and last. They should be told apart from the node's own by one mask.
    pub first_port: u16,
    pub last_port: u16,
    /// Traffic from pods to other than pods, nodes and [`PrefixUse::Keep`] leaves with the node's address (row E-01).
    pub masquerade_egress: bool,
    /// Also traffic from pods to a ClusterIP gets the node's address (kube-proxy's `--masquerade-all`).
    pub masquerade_all: bool,
    /// Pods and the node are told apart from the outside world. Off only to behave like a kube-proxy without a detector.
    pub detect_local: bool,
    /// An echo request to the address of a Service is answered (row S-31).
    pub answer_ping: bool,
    /// A TCP connection whose backend is gone is reset at its next packet (row S-24); else it is left to time out.
    pub reset_gone: bool,
    /// Pods may not send VXLAN, Geneve or IPIP to nodes (row W-08).
    pub deny_encap: bool,
    /// Spreads Maglev's flows; the same on all nodes, so that all choose the same backend (row S-27).
    pub maglev_seed: [u8; 16],
}

impl Default for NatRow {
    fn default() -> Self {
        Self {
            node4: None,
            node6: None,
            first_port: 49152,
            last_port: 65535,
            masquerade_egress: true,
            masquerade_all: false,
            detect_local: true,
            answer_ping: true,
            reset_gone: true,
            deny_encap: true,
            maglev_seed: *b"sluice maglev v1",
        }
    }
}

/// How connections are kept. Timeouts in seconds; 0 is refused. Without this row the defaults hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionsRow {
    pub tcp_opening: u32,
    pub tcp_established: u32,
    pub tcp_half_closed: u32,
    pub tcp_closing: u32,
    pub tcp_time_wait: u32,
    pub tcp_closed: u32,
    pub udp: u32,
    pub udp_stream: u32,
    pub icmp: u32,
    pub sctp_opening: u32,
    pub sctp_established: u32,
    pub sctp_closing: u32,
    pub other: u32,
    /// Percent of the table that connections opened by one pod may fill.
    pub pod_share: u8,
    /// The same for all pods of one tenant.
    pub tenant_share: u8,
    /// For so many seconds after this row came into force, connections may be picked up without their handshake (row K-09).
    pub adopt_midflow: u32,
}

impl Default for ConnectionsRow {
    /// RFC 5382 REQ-5 (TCP), RFC 4787 REQ-5 (UDP), RFC 5508 REQ-2 (ICMP); half-closed as kube-proxy's CLOSE_WAIT.
    fn default() -> Self {
        Self {
            tcp_opening: 240,
            tcp_established: 7440,
            tcp_half_closed: 3600,
            tcp_closing: 240,
            tcp_time_wait: 240,
            tcp_closed: 240,
            udp: 120,
            udp_stream: 300,
            icmp: 60,
            sctp_opening: 240,
            sctp_established: 7440,
            sctp_closing: 240,
            other: 600,
            pod_share: 25,
            tenant_share: 75,
            adopt_midflow: 0,
        }
    }
}

impl ConnectionsRow {
    /// All timeouts.
    pub const fn seconds(&self) -> [u32; 13] {
        [
            self.tcp_opening,
            self.tcp_established,
            self.tcp_half_closed,
            self.tcp_closing,
            self.tcp_time_wait,
            self.tcp_closed,
            self.udp,
            self.udp_stream,
            self.icmp,
            self.sctp_opening,
            self.sctp_established,
            self.sctp_closing,
            self.other,
        ]
    }
}

/// A range of addresses with a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixRow {
    pub prefix: Prefix,
    pub purpose: PrefixUse,
}

/// What a range is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PrefixUse {
    /// Pods of the cluster, on any node: never masqueraded towards them.
    Pods,
    /// The cluster allocates ClusterIPs from here: what is not allocated is dropped (row S-07).
    Services,
    /// Outside the cluster, but reached with the pod's own address (row E-02).
    Keep,
}

/// An address with a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressRow {
    pub address: IpAddr,
    pub role: AddressRole,
}

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum AddressRole {
    /// Of this node; node ports are served on it.
    Node,
    /// Of this node; node ports are not served on it (`nodePortAddresses`).
    NodeWithoutPorts,
    /// Of another node.
    Peer,
    /// A ClusterIP: ports without a frontend are refused.
    Cluster,
    /// An external or load balancer address that only its frontends give a meaning.
    External,
}

/// A set of backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetRow {
    pub id: SetId,
    pub family: Family,
    /// Backends in it.
    pub count: u16,
    /// Slots of its Maglev table; 0: a backend is chosen by the flow's hash, each as likely as the other.
    pub slots: u16,
}

/// A backend of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendRow {
    pub set: SetId,
    pub index: u16,
    pub address: IpAddr,
    pub port: u16,
}

/// A piece of a set's Maglev table: slots from `chunk` × [`limits::SLOT_CHUNK`] on. All but the last piece are full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotsRow {
    pub set: SetId,
    pub chunk: u16,
    /// Indexes of backends.
    pub slots: Vec<u16, { limits::SLOT_CHUNK }>,
}

/// One port of one Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRow {
    pub id: PortId,
    pub family: Family,
    /// Where traffic goes that may go anywhere; none: there is nobody.
    pub cluster: Option<SetId>,
    /// Where traffic goes that has to stay on this node.
    pub local: Option<SetId>,
    /// Endpoints that are still serving, chosen for new connections or not: connections to others are stale (row S-23).
    pub serving: Option<SetId>,
    /// Some node has an endpoint. If not, connections are refused; else what finds no endpoint in its set is dropped.
    pub endpoints: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Clients outside are answered by the backend's node itself, and keep their address (row S-28). Needs a tunnel that
    /// [tells the backend](crate::overlay::TunnelProtocol::tells_backend); where there is none the source is rewritten.
    pub direct_return: bool,
    /// `sessionAffinity: ClientIP` with this timeout in seconds; 0: none.
    pub affinity: u32,
    /// Lengths of the prefixes among its [`SourceRow`]s; none: every source may use its load balancer addresses.
    pub source_lengths: Vec<u8, { limits::SOURCE_LENGTHS }>,
}

/// A range of sources that may use a Service's load balancer addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRow {
    pub port: PortId,
    pub prefix: Prefix,
}

/// An address and port at which a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendRow {
    /// The unspecified address: any address of this node with the role [`AddressRole::Node`].
    pub address: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    pub service: PortId,
    pub kind: FrontendKind,
}

/// How a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FrontendKind {
    ClusterIp,
    NodePort,
    ExternalIp,
    LoadBalancer,
    /// A pod's own port on the node: no policy of the Service applies, nothing is masqueraded but what comes back to itself.
    HostPort,
}
