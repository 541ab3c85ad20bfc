//! A node with three pods, the host, an uplink and Services, in both families by one set of words.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    missing_docs,
    reason = "for tests: what does not fit ends the test"
)]

extern crate std;

use super::{Bench, Builder, End, pod_row};
use crate::parse::Parsed;
use crate::wire::{checksum, protocol};
use crate::{Capacity, Family, Frame, Offload, Verdict};
use sluice_contract::overlay::{NextHopId, NextHopRow, OverlayRow};
use sluice_contract::row::{LinkRow, RouteRow};
use sluice_contract::service::{
    AddressRole, AddressRow, BackendRow, FrontendKind, FrontendRow, NatRow, PortId, PortRow,
    PrefixRow, PrefixUse, ServiceRow, SetId, SetRow,
};
use sluice_contract::{DropReason, Identity, LinkId, Mac, Prefix, Protocol, Row, ToGuest};
use std::net::IpAddr;
use std::vec;
use std::vec::Vec;

pub const UPLINK: u16 = 1;
pub const HOST: u16 = 2;
/// MACs on the wire outside: the node's own, and the router's.
pub const NODE_MAC: Mac = Mac([2, 0, 0, 0, 1, 1]);
pub const ROUTER_MAC: Mac = Mac([2, 0, 0, 0, 1, 2]);
const ROUTER: NextHopId = NextHopId(0);

/// The addresses of the fixture, in one family.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    pub family: Family,
    pub pods: [&'static str; 3],
    /// A pod on another node.
    pub remote: &'static str,
    pub node: &'static str,
    pub other_node: &'static str,
    pub outside: &'static str,
    pub cluster_ip: &'static str,
    pub load_balancer: &'static str,
    /// Of the range of ClusterIPs, but nobody's.
    pub unallocated: &'static str,
    pub any: &'static str,
}

pub const V4: Addresses = Addresses {
    family: Family::V4,
    pods: ["10.0.0.1", "10.0.0.2", "10.0.0.3"],
    remote: "10.0.9.9",
    node: "192.168.0.10",
    other_node: "192.168.0.11",
    outside: "203.0.113.5",
    cluster_ip: "172.20.0.1",
    load_balancer: "198.51.100.7",
    unallocated: "172.20.0.99",
    any: "0.0.0.0",
};

pub const V6: Addresses = Addresses {
    family: Family::V6,
    pods: ["fd00::1", "fd00::2", "fd00::3"],
    remote: "fd00::9:9",
    node: "2001:db8:1::10",
    other_node: "2001:db8:1::11",
    outside: "2001:db8:99::5",
    cluster_ip: "fd20::1",
    load_balancer: "2001:db8:7::7",
    unallocated: "fd20::99",
    any: "::",
};

pub const BOTH: [Addresses; 2] = [V4, V6];

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix::new(ip(address), length.parse().unwrap()).unwrap()
}

pub fn service(row: ServiceRow) -> Row {
    Row::Service(row)
}

fn role(address: &str, role: AddressRole) -> Row {
    service(ServiceRow::Address(AddressRow {
        address: ip(address),
        role,
    }))
}

pub fn known(address: &str, to: AddressRole) -> Row {
    role(address, to)
}

pub fn nat() -> NatRow {
    NatRow {
        node4: Some("192.168.0.10".parse().unwrap()),
        node6: Some("2001:db8:1::10".parse().unwrap()),
        ..NatRow::default()
    }
}

/// Links, routes, addresses and ranges; no Service yet.
pub fn node_rows() -> Vec<Row> {
    let mut rows: Vec<Row> = (1..=3u16).map(|n| Row::Link(pod_row(15 + n, n))).collect();
    let link = |id: u16, mac| LinkRow {
        id: LinkId::new(id).unwrap(),
        mac,
        addresses: heapless::Vec::new(),
        mtu: 1500,
        identity: Identity::WORLD,
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    };
    let mut host = link(HOST, Mac([2, 0, 0, 0, 0, 2]));
    host.identity = Identity::HOST;
    for addresses in BOTH {
        host.addresses.push(ip(addresses.node)).unwrap();
    }
    rows.push(Row::Link(host));
    rows.push(Row::Link(link(UPLINK, NODE_MAC)));
    for addresses in BOTH {
        rows.push(role(addresses.node, AddressRole::Node));
        rows.push(role(addresses.other_node, AddressRole::Peer));
    }
    for (text, purpose) in [
        ("10.0.0.0/16", PrefixUse::Pods),
        ("fd00::/16", PrefixUse::Pods),
        ("172.20.0.0/16", PrefixUse::Services),
        ("fd20::/112", PrefixUse::Services),
    ] {
        let row = PrefixRow {
            prefix: prefix(text),
            purpose,
        };
        rows.push(service(ServiceRow::Prefix(row)));
    }
    rows.push(Row::Overlay(OverlayRow::NextHop(NextHopRow {
        id: ROUTER,
        address: ip("192.0.2.254"),
        mac: Some(ROUTER_MAC),
    })));
    for text in ["0.0.0.0/0", "::/0"] {
        rows.push(Row::Route(RouteRow {
            prefix: prefix(text),
            next_hop: Some(ROUTER),
        }));
    }
    rows.push(service(ServiceRow::Nat(nat())));
    rows
}

pub fn node() -> Bench {
    let mut bench = Bench::empty(Capacity::TINY);
    bench.commit(&node_rows());
    bench
}

/// A Service with everything that can be said about it.
#[derive(Clone, Debug)]
pub struct Svc {
    pub id: u32,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: u16,
    pub cluster: Vec<(&'static str, u16)>,
    pub local: Vec<(&'static str, u16)>,
    pub serving: Option<Vec<(&'static str, u16)>>,
    /// There are endpoints somewhere, whatever the sets hold.
    pub endpoints: bool,
    pub internal_local: bool,
    pub external_local: bool,
    pub direct_return: bool,
    pub affinity: u32,
    pub sources: Vec<&'static str>,
}

impl Svc {
    pub fn new(cluster: &[(&'static str, u16)], local: &[(&'static str, u16)]) -> Self {
        Self {
            id: 0,
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 30080,
            cluster: cluster.to_vec(),
            local: local.to_vec(),
            serving: None,
            endpoints: !cluster.is_empty(),
            internal_local: false,
            external_local: false,
            direct_return: false,
            affinity: 0,
            sources: Vec::new(),
        }
    }

    fn set(&self, which: u32, family: Family, backends: &[(&'static str, u16)]) -> Vec<Row> {
        let id = SetId(self.id * 3 + which);
        let count = u16::try_from(backends.len()).unwrap();
        let mut rows = vec![service(ServiceRow::Set(SetRow {
            id,
            family,
            count,
            slots: 0,
        }))];
        for (index, (address, port)) in backends.iter().enumerate() {
            rows.push(service(ServiceRow::Backend(BackendRow {
                set: id,
                index: u16::try_from(index).unwrap(),
                address: ip(address),
                port: *port,
            })));
        }
        rows
    }

    pub fn port_row(&self, addresses: &Addresses) -> PortRow {
        let set = |which| Some(SetId(self.id * 3 + which));
        let mut lengths: Vec<u8> = self.sources.iter().map(|s| prefix(s).length()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        PortRow {
            id: PortId(self.id),
            family: addresses.family,
            cluster: set(0),
            local: set(1),
            serving: set(2),
            endpoints: self.endpoints,
            internal_local: self.internal_local,
            external_local: self.external_local,
            direct_return: self.direct_return,
            affinity: self.affinity,
            source_lengths: heapless::Vec::from_slice(&lengths).unwrap(),
        }
    }

    /// All rows but the frontends.
    pub fn inner_rows(&self, addresses: &Addresses) -> Vec<Row> {
        let mut rows = self.set(0, addresses.family, &self.cluster);
        rows.extend(self.set(1, addresses.family, &self.local));
        let serving = self.serving.clone().unwrap_or_else(|| {
            let mut all = self.cluster.clone();
            all.extend(self.local.iter().filter(|l| !self.cluster.contains(l)));
            all
        });
        rows.extend(self.set(2, addresses.family, &serving));
        rows.push(service(ServiceRow::Port(self.port_row(addresses))));
        for source in &self.sources {
            rows.push(service(ServiceRow::Source(
                sluice_contract::service::SourceRow {
                    port: PortId(self.id),
                    prefix: prefix(source),
                },
            )));
        }
        rows
    }

    /// With a ClusterIP, a node port and a load balancer's address.
    pub fn rows(&self, addresses: &Addresses) -> Vec<Row> {
        let mut rows = self.inner_rows(addresses);
        rows.push(role(addresses.cluster_ip, AddressRole::Cluster));
        rows.push(role(addresses.load_balancer, AddressRole::External));
        for (at, port, kind) in [
            (addresses.cluster_ip, self.port, FrontendKind::ClusterIp),
            (addresses.any, self.node_port, FrontendKind::NodePort),
            (
                addresses.load_balancer,
                self.port,
                FrontendKind::LoadBalancer,
            ),
        ] {
            rows.push(self.frontend(at, port, kind));
        }
        rows
    }

    pub fn frontend(&self, address: &str, port: u16, kind: FrontendKind) -> Row {
        service(ServiceRow::Frontend(FrontendRow {
            address: ip(address),
            protocol: self.protocol,
            port,
            service: PortId(self.id),
            kind,
        }))
    }
}

/// A packet from a link of the fixture, with the right MACs.
pub fn packet(link: u16, source: &str, destination: &str) -> Builder {
    let builder = Builder::from(link, source, destination);
    match link {
        UPLINK => builder.macs(ROUTER_MAC, NODE_MAC),
        HOST => builder.macs(Mac([2, 0, 0, 0, 0, 2]), Mac::GATEWAY),
        _ => builder,
    }
}

/// Source and destination, each with its port, of a TCP, UDP or SCTP packet.
pub fn ends(frame: &[u8]) -> (IpAddr, u16, IpAddr, u16) {
    let mut copy = frame.to_vec();
    let end = copy.len();
    let frame = Frame::new(&mut copy, 0, end, 0, LinkId::HOST, Offload::default()).unwrap();
    let Ok(Parsed::Ip(packet)) = crate::parse::parse(&frame) else {
        panic!("no IP packet: {:02x?}", frame.bytes())
    };
    let (from, to) = packet.transport.ports().unwrap();
    (packet.source.into(), from, packet.destination.into(), to)
}

/// The link a frame left by, or why it did not.
pub fn outcome(end: &End) -> Result<u16, DropReason> {
    match end.verdict {
        Verdict::Forward(link) => Ok(link.raw()),
        Verdict::Drop(reason) => Err(reason),
        other => panic!("{other:?}"),
    }
}

pub fn removal(key: sluice_contract::service::ServiceKey) -> ToGuest {
    ToGuest::Remove(sluice_contract::Key::Service(key))
}

/// Checks every Internet checksum of a frame that is no fragment, from the bytes alone.
pub fn assert_checksums(frame: &[u8]) {
    let (source, destination, number, payload) = match frame[14] >> 4 {
        4 => {
            let header = usize::from(frame[14] & 15) * 4;
            let sum = checksum::finish(checksum::sum(&frame[14..14 + header], 0));
            assert_eq!(sum, 0, "IPv4 header of {frame:02x?}");
            let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            let four = |at: usize| crate::Address::v4(frame[at..at + 4].try_into().unwrap());
            (
                four(26),
                four(30),
                frame[23],
                &frame[14 + header..14 + total],
            )
        }
        _ => {
            let length = usize::from(u16::from_be_bytes([frame[18], frame[19]]));
            let six = |at: usize| crate::Address(frame[at..at + 16].try_into().unwrap());
            (six(22), six(38), frame[20], &frame[54..54 + length])
        }
    };
    let pseudo = match number {
        protocol::ICMP => 0,
        protocol::SCTP => return,
        _ => checksum::pseudo(source, destination, number, payload.len()),
    };
    let sum = checksum::finish(checksum::sum(payload, pseudo));
    assert_eq!(sum, 0, "transport checksum of {frame:02x?}");
}
