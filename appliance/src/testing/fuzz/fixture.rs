//! The nodes that the fuzz targets send frames through: pods, Services, policy by name, and one kind of tunnel each.
//!
//! Every input gets a node of its own, so a finding depends on nothing but its input.

extern crate std;

use crate::testing::node::{self, Addresses, HOST, NODE_MAC, ROUTER_MAC, Svc, UPLINK};
use crate::testing::{BenchIn, Builder};
use crate::{Capacity, Family};
use core::cell::RefCell;
use sluice_contract::name::NameRow;
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol, TunnelRow,
};
use sluice_contract::policy::{
    Action, BindingRow, Layer, LayerId, NamedRow, PolicyRow, RuleId, RulesetId, RulesetRow,
    SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::{LinkId, Mac, Protocol, Row};
use std::vec::Vec;

/// The node's own MAC inside the tunnel.
pub(super) const TUNNEL_MAC: Mac = Mac([2, 0, 0, 0, 3, 1]);
/// The links of the fixture.
pub(super) const LINKS: [u16; 6] = [UPLINK, HOST, 16, 17, 18, 19];
/// The node's memory suffices for what an input can do, and is quickly zeroed.
const CAPACITY: Capacity = Capacity {
    connections: 256,
    fragments: 16,
    ..Capacity::TINY
};

/// What reaches other nodes: a tunnel and the family of its outer packets, or none.
pub(super) type Tunnel = Option<(TunnelProtocol, Family)>;

/// All tunnels there are.
pub(super) const TUNNELS: [Tunnel; 8] = [
    Some((TunnelProtocol::Geneve, Family::V4)),
    Some((TunnelProtocol::Vxlan, Family::V4)),
    Some((TunnelProtocol::IpIp, Family::V4)),
    Some((TunnelProtocol::Geneve, Family::V6)),
    Some((TunnelProtocol::VxlanGbp, Family::V6)),
    Some((TunnelProtocol::GeneveIp, Family::V4)),
    Some((TunnelProtocol::IpIp, Family::V6)),
    None,
];

std::thread_local! {
    static MEMORY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// The rows of each node, built once.
    static ROWS: Vec<Vec<Row>> = TUNNELS.map(rows).into();
}

/// Calls `run` with a new node that has tunnel `number`.
pub(super) fn on_node(number: usize, run: impl FnOnce(&mut BenchIn<'_>)) {
    MEMORY.with_borrow_mut(|memory| {
        memory.clear();
        memory.resize(CAPACITY.bytes(), 0);
        let mut bench = BenchIn::in_memory(memory, CAPACITY, [7; 16]);
        ROWS.with(|rows| bench.commit(&rows[number % TUNNELS.len()]));
        run(&mut bench);
    });
}

/// A frame of another node, as it comes in by the uplink.
pub(super) fn from_wire(source: &str, destination: &str) -> Builder {
    Builder::from(UPLINK, source, destination).macs(ROUTER_MAC, NODE_MAC)
}

/// Services with and without direct return, in each family.
fn services() -> Vec<Row> {
    let mut rows = Vec::new();
    for (id, at) in [(0, node::V4), (1, node::V6)] {
        let mut plain = Svc::new(&[(at.pods[1], 53), (at.remote, 8080)], &[]);
        plain.id = id;
        rows.extend(plain.rows(&at));
        let mut direct = Svc::new(&[(at.remote, 53), (at.pods[0], 53)], &[(at.pods[0], 53)]);
        direct.id = 2 + id;
        direct.direct_return = true;
        direct.protocol = Protocol::Udp;
        direct.node_port = 30053;
        rows.extend(direct.rows(&at));
    }
    rows
}

/// What is behind the other node, and how it is reached.
fn overlay((protocol, family): (TunnelProtocol, Family)) -> Vec<Row> {
    let other: &Addresses = match family {
        Family::V4 => &node::V4,
        Family::V6 => &node::V6,
    };
    let tunnel = TunnelRow {
        protocol,
        mac: TUNNEL_MAC,
        source4: Some([192, 168, 0, 10].into()),
        source6: Some([0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10].into()),
        zero_checksum6: protocol != TunnelProtocol::Geneve,
        copy_dscp: true,
        ..TunnelRow::default()
    };
    let hop = NextHopRow {
        id: NextHopId(1),
        address: node::ip(other.other_node),
        mac: Some(Mac([2, 0, 0, 0, 1, 3])),
    };
    let peer = PeerRow {
        id: PeerId(1),
        address: node::ip(other.other_node),
        mac: Mac([2, 0, 0, 0, 3, 2]),
        next_hop: NextHopId(1),
        mtu: 1500,
        direct: false,
    };
    let mut rows = std::vec![
        OverlayRow::Tunnel(tunnel),
        OverlayRow::NextHop(hop),
        OverlayRow::Peer(peer),
    ];
    rows.extend(["10.0.9.0/24", "fd00::9:0/112"].map(|range| {
        OverlayRow::Remote(RemoteRow {
            prefix: node::prefix(range),
            peer: PeerId(1),
        })
    }));
    rows.into_iter().map(Row::Overlay).collect()
}

/// Rules of the first pod that name domains, and the resolver whose answers count.
fn names() -> Vec<Row> {
    let layer = LayerId(4);
    let everything = SpanEntry {
        start: 0,
        target: Target::Rule {
            action: Action::Accept,
            order: 0,
            rule: RuleId(16),
        },
    };
    let span = SpanRow {
        id: SpanId(1),
        entries: [everything].into_iter().collect(),
    };
    let tier = Layer {
        id: layer,
        classes: false,
        pods: SpanId(1),
        others: SpanId(1),
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Pass,
        miss_rule: RuleId::NONE,
    };
    let ruleset = RulesetRow {
        id: RulesetId(4),
        layers: [tier].into_iter().collect(),
    };
    let binding = BindingRow {
        link: LinkId::new(16).expect("a link"),
        ingress: RulesetId::NONE,
        egress: RulesetId(4),
    };
    let names = ["example.com", "*.example.com", "*.cdn.test"];
    let mut rows = std::vec![PolicyRow::Span(span)];
    for name in names.map(|name| NameRow::parse(name).expect("a name")) {
        let named = NamedRow {
            layer,
            name: name.id,
            ports: SpanId(1),
        };
        rows.extend([PolicyRow::Name(name), PolicyRow::Named(named)]);
    }
    rows.push(PolicyRow::Resolver(node::ip(node::V4.pods[1])));
    rows.push(PolicyRow::Ruleset(ruleset));
    rows.push(PolicyRow::Binding(binding));
    rows.into_iter().map(Row::Policy).collect()
}

fn rows(tunnel: Tunnel) -> Vec<Row> {
    let mut rows = node::node_rows();
    rows.extend(services());
    rows.extend(names());
    rows.extend(tunnel.map(overlay).unwrap_or_default());
    rows
}
