//! A Service's address never takes a packet away from the pod, the other node or the tunnel that it belongs to.

use sluice_appliance::testing::node::{
    self, NODE_MAC, Svc, UPLINK, V4, ip, known, nat, packet, prefix, removal, service,
};
use sluice_appliance::testing::{Bench, pod_row};
use sluice_appliance::wire::tcp;
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow,
};
use sluice_contract::policy::{
    Action, BindingRow, ClassRow, Established, IdentityRow, Layer, LayerId, PolicyRow, RuleId,
    RulesetId, RulesetRow, SettingsRow, SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::service::{
    AddressRole, FrontendKind, NatRow, PrefixRow, PrefixUse, ServiceKey, ServiceRow,
};
use sluice_contract::{DropReason, Identity, LinkId, Mac, Protocol, Row, ToGuest};
use std::sync::atomic::{AtomicU16, Ordering};

const PEER_MAC: Mac = Mac([2, 0, 0, 0, 1, 0x11]);
/// Where the tunnel of these tests arrives: none of the well-known ports.
const TUNNEL: u16 = 7777;
/// A pod of the peer.
const REMOTE: &str = "10.0.9.9";

/// A node whose peer 192.168.0.11 is reached without a tunnel and has the pods 10.0.9.0/24.
fn with_peer() -> Bench {
    let mut bench = node::node();
    let remote = |text| {
        let (prefix, peer) = (prefix(text), PeerId(3));
        Row::Overlay(OverlayRow::Remote(RemoteRow { prefix, peer }))
    };
    bench.commit(&[
        Row::Overlay(OverlayRow::Tunnel(TunnelRow {
            port: TUNNEL,
            source4: Some([192, 168, 0, 10].into()),
            mac: NODE_MAC,
            ..TunnelRow::default()
        })),
        Row::Overlay(OverlayRow::NextHop(NextHopRow {
            id: NextHopId(5),
            address: ip(V4.other_node),
            mac: Some(PEER_MAC),
        })),
        Row::Overlay(OverlayRow::Peer(PeerRow {
            id: PeerId(3),
            address: ip(V4.other_node),
            mac: PEER_MAC,
            next_hop: NextHopId(5),
            mtu: 1500,
            direct: true,
        })),
        remote("10.0.9.0/24"),
        remote("192.168.0.11/32"),
    ]);
    bench
}

/// A source port that no connection of the tests has yet.
fn unused() -> u16 {
    static LAST: AtomicU16 = AtomicU16::new(1024);
    LAST.fetch_add(1, Ordering::Relaxed)
}

fn syn(to: &str, port: u16) -> Vec<u8> {
    let packet = packet(16, V4.pods[0], to);
    packet.tcp(unused(), port, tcp::SYN).build()
}

/// The destination of a frame that left by the uplink.
fn sent_to(bench: &mut Bench, frame: &[u8]) -> (std::net::IpAddr, u16) {
    let end = bench.send(16, frame);
    let (_, _, to, port) = node::ends(end.forwarded(UPLINK));
    (to, port)
}

#[test]
fn s10_an_external_address_does_not_shadow_a_pod_of_another_node() {
    let mut bench = with_peer();
    let mut rows = Svc::new(&[(V4.pods[1], 8080)], &[]).inner_rows(&V4);
    let svc = Svc::new(&[], &[]);
    rows.push(known(REMOTE, AddressRole::External));
    rows.push(svc.frontend(REMOTE, 80, FrontendKind::ExternalIp));
    bench.commit(&rows);
    for port in [80, 81] {
        assert_eq!(sent_to(&mut bench, &syn(REMOTE, port)), (ip(REMOTE), port));
    }
    // Nor as the backend of another Service.
    let backed = Svc {
        id: 1,
        ..Svc::new(&[(REMOTE, 8080)], &[])
    };
    bench.commit(&backed.rows(&V4));
    let to = syn(V4.cluster_ip, 80);
    assert_eq!(sent_to(&mut bench, &to), (ip(REMOTE), 8080));
}

#[test]
fn s10_an_external_address_does_not_keep_a_pod_from_its_link() {
    const NEW: &str = "10.0.0.4";
    let rows = |bench: &mut Bench| {
        let mut rows = Svc::new(&[(V4.pods[1], 8080)], &[]).inner_rows(&V4);
        rows.push(known(NEW, AddressRole::External));
        rows.push(Svc::new(&[], &[]).frontend(NEW, 80, FrontendKind::ExternalIp));
        bench.commit(&rows);
    };
    let link = Row::Link(pod_row(19, 4));
    for service_first in [true, false] {
        let mut bench = node::node();
        if service_first {
            rows(&mut bench);
            assert_eq!(outside(&mut bench, NEW, 80), Some(17), "the Service's");
        }
        bench.commit(std::slice::from_ref(&link));
        if !service_first {
            rows(&mut bench);
        }
        for port in [80, 81] {
            assert_eq!(outside(&mut bench, NEW, port), Some(19), "the pod's");
        }
        // The pod goes; what was the Service's is its again.
        let gone = ToGuest::Remove(sluice_contract::Key::Link(LinkId::new(19).unwrap()));
        assert!(bench.change(&[gone]).is_whole());
        assert_eq!(outside(&mut bench, NEW, 80), Some(17));
        // And the other way around.
        bench.commit(std::slice::from_ref(&link));
        let frontend = ServiceKey::Frontend {
            address: ip(NEW),
            protocol: Protocol::Tcp,
            port: 80,
        };
        let gone = [frontend, ServiceKey::Address(ip(NEW))].map(removal);
        assert!(bench.change(&gone).is_whole());
        assert_eq!(outside(&mut bench, NEW, 80), Some(19));
    }
}

/// The link by which a packet from pod 1 to that port leaves.
fn outside(bench: &mut Bench, to: &str, port: u16) -> Option<u16> {
    node::outcome(&bench.send(16, &syn(to, port))).ok()
}

#[test]
fn s10_a_service_at_another_nodes_address_has_its_ports_and_no_others() {
    let mut bench = with_peer();
    let svc = Svc::new(&[(V4.pods[1], 8080)], &[]);
    let mut rows = svc.inner_rows(&V4);
    rows.push(svc.frontend(V4.other_node, 80, FrontendKind::ExternalIp));
    bench.commit(&rows);
    assert_eq!(outside(&mut bench, V4.other_node, 80), Some(17));
    let to = syn(V4.other_node, 81);
    assert_eq!(sent_to(&mut bench, &to), (ip(V4.other_node), 81));
}

#[test]
fn s07_a_range_of_services_drops_what_nobody_has_and_nothing_of_another_nodes_pods() {
    let mut bench = with_peer();
    bench.commit(&[service(ServiceRow::Prefix(PrefixRow {
        prefix: prefix("10.0.8.0/21"),
        purpose: PrefixUse::Services,
    }))]);
    let to = |address| packet(16, V4.pods[0], address).udp(unused(), 53).build();
    let end = bench.send(16, &to("10.0.8.9"));
    assert_eq!(end.dropped(), DropReason::SvcUnallocated);
    bench.send(16, &to(REMOTE)).forwarded(UPLINK);
}

/// Policy of link 16: what it sends to pods of identity 300 is denied, whatever other policies say.
fn denying(unlisted_pods: bool) -> Vec<Row> {
    let deny = SpanEntry {
        start: 0,
        target: Target::Rule {
            action: Action::Deny,
            order: 0,
            rule: RuleId(16),
        },
    };
    let layer = Layer {
        id: LayerId(4),
        classes: true,
        pods: SpanId::NOTHING,
        others: SpanId::NOTHING,
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Pass,
        miss_rule: RuleId::NONE,
    };
    let rows = [
        PolicyRow::Settings(SettingsRow {
            unbound: Action::Accept,
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
            audit_node: false,
            unlisted_pods,
        }),
        PolicyRow::Span(SpanRow {
            id: SpanId(1),
            entries: [deny].into_iter().collect(),
        }),
        PolicyRow::Class(ClassRow {
            layer: LayerId(4),
            identity: Identity(300),
            ports: SpanId(1),
        }),
        PolicyRow::Ruleset(RulesetRow {
            id: RulesetId(4),
            layers: [layer].into_iter().collect(),
        }),
        PolicyRow::Binding(BindingRow {
            link: LinkId::new(16).expect("a link of a pod"),
            ingress: RulesetId::NONE,
            egress: RulesetId(4),
        }),
        PolicyRow::Identity(IdentityRow {
            address: ip("10.0.9.8"),
            identity: Identity(301),
        }),
    ];
    rows.into_iter().map(Row::Policy).collect()
}

#[test]
fn a_pod_that_is_not_listed_is_denied_where_a_denial_might_be_about_it_and_nobody_else_is() {
    let mut bench = with_peer();
    let to = |address| packet(16, V4.pods[0], address).udp(unused(), 53).build();
    bench.commit(&denying(false));
    bench.send(16, &to(REMOTE)).forwarded(UPLINK);
    bench.commit(&denying(true));
    let end = bench.send(16, &to(REMOTE));
    assert_eq!(end.dropped(), DropReason::PolicyEgress);
    // A pod that is listed, another node, and who is outside.
    for address in ["10.0.9.8", V4.other_node, V4.outside] {
        bench.send(16, &to(address)).forwarded(UPLINK);
    }
}

#[test]
fn w08_no_service_leads_a_pod_to_a_tunnel() {
    let mut bench = with_peer();
    let udp = |to: &str, port| packet(16, V4.pods[0], to).udp(unused(), port).build();
    for node in [V4.node, V4.other_node] {
        let end = bench.send(16, &udp(node, TUNNEL));
        assert_eq!(end.dropped(), DropReason::EncapFromPod);
    }
    let leading = |to: &'static str, port| Svc {
        protocol: Protocol::Udp,
        ..Svc::new(&[(to, port)], &[])
    };
    for (to, port) in [
        (V4.other_node, TUNNEL),
        (V4.other_node, 4789),
        (V4.node, TUNNEL),
    ] {
        bench.commit(&leading(to, port).rows(&V4));
        // Its ClusterIP, its node port, its load balancer's address; and from outside as well.
        for (address, port) in [
            (V4.cluster_ip, 80),
            (V4.node, 30080),
            (V4.load_balancer, 80),
        ] {
            let end = bench.send(16, &udp(address, port));
            assert_eq!(end.dropped(), DropReason::EncapFromPod, "{to} by {address}");
        }
        let sent = packet(UPLINK, V4.outside, V4.node).udp(unused(), 30080);
        let end = bench.send(UPLINK, &sent.build());
        assert_eq!(end.dropped(), DropReason::EncapFromPod, "{to} from outside");
    }
    // A pod may listen there, and another port of the node be an endpoint.
    for (to, port) in [(V4.pods[1], TUNNEL), (V4.other_node, 53)] {
        bench.commit(&leading(to, port).rows(&V4));
        assert!(node::outcome(&bench.send(16, &udp(V4.cluster_ip, 80))).is_ok());
    }
    let open = NatRow {
        deny_encap: false,
        ..nat()
    };
    let mut rows = leading(V4.other_node, TUNNEL).rows(&V4);
    rows.push(service(ServiceRow::Nat(open)));
    bench.commit(&rows);
    let end = bench.send(16, &udp(V4.cluster_ip, 80));
    end.forwarded(UPLINK);
}
