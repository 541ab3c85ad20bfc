//! The underlay's own: neighbors, routes, other nodes, and the outside.

use sluice_appliance::testing::node::{
    self, HOST, NODE_MAC, ROUTER_MAC, Svc, UPLINK, V4, ip, nat, packet, prefix, service,
};
use sluice_appliance::testing::{Bench, Builder};
use sluice_appliance::wire::tcp;
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayKey, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow,
};
use sluice_contract::row::RouteRow;
use sluice_contract::service::{NatRow, ServiceKey, ServiceRow};
use sluice_contract::{DropReason, Key, Mac, Row, ToGuest};

/// Another node at 192.168.0.11 behind the router's wire, with the pods 10.0.9.0/24; and a wire 192.168.0.0/24.
const PEER: &str = "192.168.0.11";
const PEER_MAC: Mac = Mac([2, 0, 0, 0, 1, 0x11]);

fn hop(id: u16, address: &str, mac: Option<Mac>) -> Row {
    Row::Overlay(OverlayRow::NextHop(NextHopRow {
        id: NextHopId(id),
        address: ip(address),
        mac,
    }))
}

fn route(to: &str, next_hop: Option<u16>) -> Row {
    Row::Route(RouteRow {
        prefix: prefix(to),
        next_hop: next_hop.map(NextHopId),
    })
}

fn node(direct: bool) -> Bench {
    let mut bench = node::node();
    let remote = |text| {
        Row::Overlay(OverlayRow::Remote(RemoteRow {
            prefix: prefix(text),
            peer: PeerId(3),
        }))
    };
    let mut rows = vec![
        Row::Overlay(OverlayRow::Tunnel(TunnelRow {
            source4: Some([192, 168, 0, 10].into()),
            mac: NODE_MAC,
            ..TunnelRow::default()
        })),
        hop(5, PEER, Some(PEER_MAC)),
        Row::Overlay(OverlayRow::Peer(PeerRow {
            id: PeerId(3),
            address: ip(PEER),
            mac: PEER_MAC,
            next_hop: NextHopId(5),
            mtu: 1500,
            direct,
        })),
        remote("10.0.9.0/24"),
        remote("192.168.0.11/32"),
        route("192.168.0.0/24", None),
    ];
    rows.extend(Svc::new(&[(V4.pods[1], 8080)], &[]).rows(&V4));
    bench.commit(&rows);
    bench
}

fn from_outside(source: &str, to: &str) -> Builder {
    packet(UPLINK, source, to)
}

/// Whether the appliance takes a change of one message.
fn takes(bench: &mut Bench, message: ToGuest) -> bool {
    bench.change(&[message]).is_whole()
}

fn asked(bench: &Bench) -> Vec<std::net::IpAddr> {
    let (mut all, mut cursor) = (Vec::new(), 0);
    while let Some((address, next)) = bench.pipeline.wanted().after(cursor) {
        all.push(address.into());
        cursor = next;
    }
    all
}

#[test]
fn o17_a_neighbor_on_the_wire_is_asked_for_and_then_used_and_its_silence_is_told() {
    let mut bench = node(false);
    let sent = packet(16, V4.pods[0], "192.168.0.77").udp(5, 53).build();
    assert_eq!(bench.send(16, &sent).dropped(), DropReason::NoNeighbor);
    assert_eq!(bench.send(16, &sent).dropped(), DropReason::NoNeighbor);
    assert_eq!(asked(&bench), [ip("192.168.0.77")], "once");
    let mac = Mac([2, 0, 0, 0, 1, 0x77]);
    bench.commit(&[hop(9, "192.168.0.77", Some(mac))]);
    let left = bench.send(16, &sent);
    let frame = left.forwarded(UPLINK);
    assert_eq!((&frame[..6], &frame[6..12]), (&mac.0[..], &NODE_MAC.0[..]));
    assert_eq!(frame[26..30], [192, 168, 0, 10], "with the node's address");
    // The same connection follows a MAC that changes, and a neighbor that is gone is told of.
    let moved = Mac([2, 0, 0, 0, 1, 0x78]);
    bench.commit(&[hop(9, "192.168.0.77", Some(moved))]);
    assert_eq!(bench.send(16, &sent).forwarded(UPLINK)[..6], moved.0);
    bench.commit(&[hop(9, "192.168.0.77", None)]);
    assert_eq!(bench.send(16, &sent).replied()[34..36], [3, 1]);
    // What is not on the wire goes to the router and asks for nobody.
    let far = packet(16, V4.pods[0], V4.outside).udp(5, 53).build();
    assert_eq!(bench.send(16, &far).forwarded(UPLINK)[..6], ROUTER_MAC.0);
    assert_eq!(asked(&bench).len(), 1);
}

#[test]
fn next_hops_in_use_stay_and_no_two_have_one_address() {
    let mut bench = node(false);
    let gone = |id| Key::Overlay(OverlayKey::NextHop(NextHopId(id)));
    bench.commit(&[
        hop(8, "192.168.0.1", Some(ROUTER_MAC)),
        route("9.0.0.0/8", Some(8)),
    ]);
    let remove = |bench: &mut Bench, key| takes(bench, ToGuest::Remove(key));
    assert!(!remove(&mut bench, gone(8)), "a route uses it");
    assert!(!remove(&mut bench, gone(5)), "a peer uses it");
    assert!(remove(&mut bench, Key::Route(prefix("9.0.0.0/8"))));
    assert!(remove(&mut bench, gone(8)));
    let put = |bench: &mut Bench, row| takes(bench, ToGuest::Put(row));
    assert!(
        !put(&mut bench, hop(7, PEER, None)),
        "its address is another's"
    );
    assert!(
        !put(&mut bench, route("9.0.0.0/8", Some(8))),
        "no such next hop"
    );
}

#[test]
fn e01_w05_what_lies_behind_another_node_keeps_its_source_and_the_outside_sees_the_nodes() {
    let mut bench = node(false);
    // A range that nobody called one of pods, behind the peer.
    let range = Key::Service(ServiceKey::Prefix(prefix("10.0.0.0/16")));
    assert!(takes(&mut bench, ToGuest::Remove(range)));
    let remote = packet(16, V4.pods[0], V4.remote).udp(5, 6).build();
    let left = bench.send(16, &remote);
    let frame = left.forwarded(UPLINK);
    assert_eq!(frame[36..38], 8472u16.to_be_bytes());
    assert_eq!(frame[76..80], [10, 0, 0, 1]);
    let outside = packet(16, V4.pods[0], V4.outside).udp(5, 6).build();
    assert_eq!(
        bench.send(16, &outside).forwarded(UPLINK)[26..30],
        [192, 168, 0, 10]
    );
}

#[test]
fn s08_w06_another_node_that_came_bare_is_answered_bare_whatever_the_tunnel() {
    let mut bench = node(false);
    let syn = from_outside(PEER, V4.node).tcp(5, 30080, tcp::SYN).build();
    let arrived = bench.send(UPLINK, &syn);
    let (_, masqueraded, ..) = node::ends(arrived.forwarded(17));
    let answer = packet(17, V4.pods[1], V4.node);
    // The Service masquerades: the pod answers the node.
    let left = bench.send(
        17,
        &answer
            .tcp(8080, masqueraded, tcp::SYN | tcp::ACK)
            .numbers(9, 1001)
            .build(),
    );
    let frame = left.forwarded(UPLINK);
    assert_eq!(frame[..6], PEER_MAC.0);
    assert_eq!(frame[12..14], [8, 0]);
    assert_eq!(frame[23], 6, "TCP, in no tunnel");
    assert_eq!(frame[26..34], [192, 168, 0, 10, 192, 168, 0, 11]);
}

#[test]
fn w06_pods_reach_other_nodes_themselves_and_are_reached_by_them_without_translation() {
    for direct in [false, true] {
        let mut bench = node(direct);
        let ping = packet(16, V4.pods[0], PEER).udp(7, 22).build();
        let left = bench.send(16, &ping);
        let frame = left.forwarded(UPLINK);
        let inner = if direct { 0 } else { 50 };
        assert_eq!(
            frame[inner + 26..inner + 30],
            [10, 0, 0, 1],
            "its own address"
        );
        // And the way in: a pod of the other node to this node itself, whose kernel answers by the host link.
        if direct {
            let bare = from_outside(V4.remote, V4.node).udp(7, 22).build();
            bench.send(UPLINK, &bare).forwarded(HOST);
            let host = packet(HOST, V4.node, V4.remote).udp(22, 7).build();
            let left = bench.send(HOST, &host);
            assert_eq!(
                left.forwarded(UPLINK)[26..34],
                [192, 168, 0, 10, 10, 0, 9, 9]
            );
        }
    }
}

#[test]
fn e08_what_strangers_want_of_the_node_is_the_nodes_business_and_leaves_no_trace() {
    let mut bench = node(false);
    let ssh = from_outside(V4.outside, V4.node)
        .tcp(5, 22, tcp::SYN)
        .build();
    bench.send(UPLINK, &ssh).forwarded(HOST);
    assert_eq!(bench.pipeline.conntrack().used(), 0);
}

#[test]
fn e01_ports_that_stand_for_pods_are_those_configured() {
    let mut bench = node(false);
    let range = NatRow {
        first_port: 0xf000,
        last_port: 0xffff,
        ..nat()
    };
    bench.commit(&[service(ServiceRow::Nat(range))]);
    for port in 1000..1200 {
        let sent = packet(16, V4.pods[0], V4.outside).udp(port, 53).build();
        let left = bench.send(16, &sent);
        assert_eq!(left.forwarded(UPLINK)[34] & 0xf0, 0xf0);
    }
}
