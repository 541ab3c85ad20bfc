//! Maglev, and the addresses and ports at which Services are reached.

use crate::live::backend;
use sluice_appliance::testing::node::{
    self, BOTH, HOST, Svc, UPLINK, V4, V6, assert_checksums, ends, ip, known, nat, outcome, packet,
    prefix, removal, service,
};
use sluice_appliance::testing::{Bench, pod_row};
use sluice_appliance::wire::tcp;
use sluice_contract::service::{
    AddressRole, FrontendKind, NatRow, PortId, ServiceKey, ServiceRow, SetId, SetRow, SlotsRow,
};
use sluice_contract::{DropReason, Mac, Protocol, Row, ToGuest};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// A Maglev table as the paper builds it: each backend fills its turn from a permutation of its own.
fn maglev(names: &[u32], size: usize) -> Vec<u16> {
    let hash = |name: u32, salt: u32| {
        let mut x = u64::from(name) << 32 | u64::from(salt);
        x = (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ (x >> 32)) as usize
    };
    let mut next = vec![0usize; names.len()];
    let mut table = vec![u16::MAX; size];
    let mut filled = 0;
    while filled < size {
        for (at, name) in names.iter().enumerate() {
            let (offset, skip) = (hash(*name, 1) % size, hash(*name, 2) % (size - 1) + 1);
            loop {
                let slot = (offset + next[at] * skip) % size;
                next[at] += 1;
                if table[slot] == u16::MAX {
                    table[slot] = u16::try_from(at).unwrap();
                    filled += 1;
                    break;
                }
            }
            if filled == size {
                break;
            }
        }
    }
    table
}

fn maglev_rows(backends: &[u32], size: u16) -> Vec<Row> {
    let mut svc = Svc::new(&[], &[]);
    svc.protocol = Protocol::Udp;
    svc.endpoints = true;
    let count = u16::try_from(backends.len()).unwrap();
    let set = |id, count, slots| {
        service(ServiceRow::Set(SetRow {
            id: SetId(id),
            family: V4.family,
            count,
            slots,
        }))
    };
    let mut rows = vec![set(0, count, size), set(1, 0, 0), set(2, 0, 0)];
    for (index, name) in (0..).zip(backends) {
        let [_, _, hi, lo] = name.to_be_bytes();
        rows.push(backend(0, index, IpAddr::from([10, 0, 64 + hi, lo])));
    }
    for (chunk, slots) in (0..).zip(maglev(backends, usize::from(size)).chunks(240)) {
        let slots = heapless::Vec::from_slice(slots).unwrap();
        rows.push(service(ServiceRow::Slots(SlotsRow {
            set: SetId(0),
            chunk,
            slots,
        })));
    }
    rows.push(service(ServiceRow::Port(svc.port_row(&V4))));
    rows.push(known(V4.cluster_ip, AddressRole::Cluster));
    rows.push(svc.frontend(V4.cluster_ip, 80, FrontendKind::ClusterIp));
    rows
}

#[test]
fn s27_maglev_two_nodes_agree_and_one_endpoint_less_moves_few() {
    let all: Vec<u32> = (1..=100).collect();
    let fewer: Vec<u32> = all.iter().copied().filter(|name| *name != 50).collect();
    let choices = |backends: &[u32], seed: u8| -> Vec<IpAddr> {
        let mut bench = Bench::seeded(sluice_appliance::Capacity::TINY, [seed; 16]);
        bench.commit(&node::node_rows());
        bench.commit(&maglev_rows(backends, 16_381));
        (0..2000u16)
            .map(|port| {
                let sent = packet(16, V4.pods[0], V4.cluster_ip)
                    .udp(1024 + port, 80)
                    .build();
                ends(&bench.send(16, &sent).bytes).2
            })
            .collect()
    };
    let one = choices(&all, 1);
    assert_eq!(
        one,
        choices(&all, 2),
        "nodes have secrets of their own, and choose alike"
    );
    let other = choices(&fewer, 1);
    let gone = IpAddr::from([10, 0, 64, 50]);
    let moved = one
        .iter()
        .zip(&other)
        .filter(|(a, b)| **a != gone && a != b)
        .count();
    assert!(moved * 100 < 2 * 2000, "{moved} of 2000 moved");
    assert!(!other.contains(&gone));
}

#[test]
fn s31_ping_of_a_cluster_ip_is_answered_if_configured() {
    for a in BOTH {
        let mut bench = node::node();
        bench.commit(&Svc::new(&[(a.pods[1], 8080)], &[]).rows(&a));
        let ping = packet(16, a.pods[0], a.cluster_ip)
            .echo(7, 1)
            .payload(b"hello")
            .build();
        let end = bench.send(16, &ping);
        assert_checksums(end.replied());
        let from_outside = packet(UPLINK, a.outside, a.load_balancer)
            .echo(7, 1)
            .build();
        let end = bench.send(UPLINK, &from_outside);
        assert_checksums(end.replied());
        assert_eq!(
            &end.bytes[..12],
            [node::ROUTER_MAC.0, node::NODE_MAC.0].concat()
        );
        bench.commit(&[service(ServiceRow::Nat(NatRow {
            answer_ping: false,
            ..nat()
        }))]);
        assert_eq!(
            bench.send(16, &ping).dropped(),
            DropReason::SvcUndefinedPort
        );
    }
}

#[test]
fn s32_tcp_and_udp_of_one_port_are_independent() {
    let a = V4;
    let mut bench = node::node();
    let mut udp = Svc::new(&[(a.pods[2], 80)], &[]);
    udp.protocol = Protocol::Udp;
    udp.id = 1;
    let mut rows = Svc::new(&[(a.pods[1], 80)], &[]).rows(&a);
    rows.extend(udp.rows(&a));
    bench.commit(&rows);
    let by_tcp = packet(16, a.pods[0], a.cluster_ip)
        .tcp(1, 80, tcp::SYN)
        .build();
    let by_udp = packet(16, a.pods[0], a.cluster_ip).udp(1, 80).build();
    bench.send(16, &by_tcp).forwarded(17);
    bench.send(16, &by_udp).forwarded(18);
    let frontend = |address: &str, port| {
        removal(ServiceKey::Frontend {
            address: ip(address),
            protocol: Protocol::Udp,
            port,
        })
    };
    bench.change(&[frontend(a.cluster_ip, 80)]);
    bench.send(16, &by_tcp).forwarded(17);
    let another = packet(16, a.pods[0], a.cluster_ip).udp(2, 80).build();
    bench.send(16, &another).replied();
}

#[test]
fn s33_each_endpoint_has_its_own_port_and_s34_each_family_its_own_endpoints() {
    let mut bench = node::node();
    for (id, a) in [(0, V4), (1, V6)] {
        let mut svc = Svc::new(&[(a.pods[1], 1111), (a.pods[2], 2222)], &[]);
        svc.id = id;
        bench.commit(&svc.rows(&a));
        let mut seen = BTreeSet::new();
        for n in 0..50 {
            let sent = packet(16, a.pods[0], a.cluster_ip)
                .tcp(3000 + n, 80, tcp::SYN)
                .build();
            let (_, _, backend, port) = ends(&bench.send(16, &sent).bytes);
            seen.insert((backend, port));
        }
        let both = [(ip(a.pods[1]), 1111), (ip(a.pods[2]), 2222)];
        assert_eq!(seen, BTreeSet::from(both));
    }
}

#[test]
fn s35_a_change_takes_effect_as_a_whole() {
    let a = V4;
    let mut bench = node::node();
    bench.commit(&Svc::new(&[(a.pods[1], 80)], &[]).rows(&a));
    let mut port = 1000;
    let mut ask = |bench: &mut Bench| {
        port += 1;
        let sent = packet(16, a.pods[0], a.cluster_ip).udp(port, 80);
        let sent = {
            let _ = sent;
            packet(16, a.pods[0], a.cluster_ip).tcp(port, 80, tcp::SYN)
        };
        outcome(&bench.send(16, &sent.build()))
    };
    let generation = sluice_contract::Generation(99);
    let mut messages = vec![ToGuest::Begin {
        generation,
        fresh: true,
    }];
    let mut rows = node::node_rows();
    rows.extend(Svc::new(&[(a.pods[2], 80)], &[]).rows(&a));
    messages.extend(rows.into_iter().map(ToGuest::Put));
    for message in &messages {
        while bench.pipeline.is_applying() {
            bench.pipeline.work(16);
            assert_eq!(ask(&mut bench), Ok(17));
        }
        bench.pipeline.configure(message);
        assert_eq!(ask(&mut bench), Ok(17));
    }
    bench.pipeline.configure(&ToGuest::Commit { generation });
    for _ in 0..20 {
        assert_eq!(ask(&mut bench), Ok(18));
        bench.pipeline.work(16);
    }
}

#[test]
fn b01_b02_host_ports_by_address_and_protocol() {
    let a = V4;
    let mut bench = node::node();
    let mut rows = Vec::new();
    for (id, pod, protocol, address) in [
        (0, a.pods[0], Protocol::Tcp, a.any),
        (1, a.pods[1], Protocol::Udp, a.any),
        (2, a.pods[2], Protocol::Tcp, "192.168.0.77"),
    ] {
        let mut svc = Svc::new(&[(pod, 8080)], &[(pod, 8080)]);
        svc.id = id;
        svc.protocol = protocol;
        rows.extend(svc.inner_rows(&a));
        if address != a.any {
            rows.push(known(address, AddressRole::Node));
        }
        rows.push(svc.frontend(address, 54321, FrontendKind::HostPort));
    }
    bench.commit(&rows);
    for (link, source) in [(UPLINK, a.outside), (HOST, a.node)] {
        let tcp_to = |to| packet(link, source, to).tcp(999, 54321, tcp::SYN).build();
        bench.send(link, &tcp_to(a.node)).forwarded(16);
        bench.send(link, &tcp_to("192.168.0.77")).forwarded(18);
        let end = bench.send(link, &packet(link, source, a.node).udp(999, 54321).build());
        assert_eq!(
            ends(end.forwarded(17)).0,
            ip(source),
            "the client's address is kept"
        );
    }
}

#[test]
fn b05_a_host_port_follows_its_pod() {
    let a = V4;
    let mut bench = node::node();
    let mut svc = Svc::new(&[(a.pods[1], 53)], &[(a.pods[1], 53)]);
    svc.protocol = Protocol::Udp;
    let mut rows = svc.inner_rows(&a);
    rows.push(svc.frontend(a.any, 5353, FrontendKind::HostPort));
    bench.commit(&rows);
    let ask = packet(UPLINK, a.outside, a.node).udp(777, 5353).build();
    bench.send(UPLINK, &ask).forwarded(17);
    svc.cluster = vec![(a.pods[2], 53)];
    svc.local = svc.cluster.clone();
    bench.commit(&svc.inner_rows(&a));
    bench.send(UPLINK, &ask).forwarded(18);
    // The pod is replaced by another one at the same address: its flows are not the new one's.
    let mut reborn = pod_row(18, 3);
    reborn.incarnation = 2;
    bench.commit(&[Row::Link(reborn)]);
    bench.send(UPLINK, &ask).forwarded(18);
    assert_eq!(bench.pipeline.conntrack().counters().removed, 2);
}

#[test]
fn s08_node_ports_answer_on_the_nodes_addresses_that_are_meant_to() {
    let a = V4;
    let mut bench = node::node();
    let mut rows = Svc::new(&[(a.pods[1], 8080)], &[]).rows(&a);
    rows.push(known("192.168.1.1", AddressRole::Node));
    rows.push(known("192.168.2.1", AddressRole::NodeWithoutPorts));
    bench.commit(&rows);
    let to = |to| {
        packet(UPLINK, a.outside, to)
            .tcp(5, 30080, tcp::SYN)
            .build()
    };
    bench.send(UPLINK, &to(a.node)).forwarded(17);
    bench.send(UPLINK, &to("192.168.1.1")).forwarded(17);
    bench.send(UPLINK, &to("192.168.2.1")).forwarded(HOST);
    // A source port that is some node port is nobody's business (OVN's case 93).
    let sent = packet(16, a.pods[0], a.outside)
        .tcp(30080, 443, tcp::SYN)
        .build();
    bench.send(16, &sent).forwarded(UPLINK);
}

#[test]
fn s10_external_addresses_belong_to_services_and_not_to_routes() {
    for a in BOTH {
        let mut bench = node::node();
        let svc = Svc::new(&[(a.pods[1], 8080)], &[]);
        bench.commit(&svc.rows(&a));
        // Known, but that port is nobody's: it does not wander off to the uplink and back.
        for (link, source) in [(16, a.pods[0]), (UPLINK, a.outside)] {
            let sent = packet(link, source, a.load_balancer)
                .tcp(5, 81, tcp::SYN)
                .build();
            bench.send(link, &sent).replied();
        }
        // An address that the node already routes is not taken by a Service, whose row costs no other one.
        let to_pod = |port| {
            let sent = packet(16, a.pods[0], a.pods[2]);
            sent.tcp(7, port, tcp::SYN).build()
        };
        bench.commit(&[
            known(a.pods[2], AddressRole::External),
            svc.frontend(a.pods[2], 80, FrontendKind::ExternalIp),
        ]);
        for port in [80, 81] {
            bench.send(16, &to_pod(port)).forwarded(18);
        }
    }
}

#[test]
fn rows_that_refer_to_nothing_are_refused_by_name() {
    use sluice_contract::Key;
    use sluice_contract::report::{Field, RejectReason};
    let a = V4;
    let svc = Svc::new(&[(a.pods[1], 8080)], &[]);
    let rows = svc.rows(&a);
    let set = |count, slots| {
        service(ServiceRow::Set(SetRow {
            id: SetId(9),
            family: a.family,
            count,
            slots,
        }))
    };
    let slots = |chunk, values: &[u16]| {
        let slots = heapless::Vec::from_slice(values).unwrap();
        service(ServiceRow::Slots(SlotsRow {
            set: SetId(9),
            chunk,
            slots,
        }))
    };
    let mut six = svc.port_row(&a);
    six.family = sluice_appliance::Family::V6;
    let put = ToGuest::Put;
    let cases: Vec<(Vec<ToGuest>, Field, RejectReason)> = vec![
        (
            vec![put(backend(77, 0, ip(a.pods[0])))],
            Field::Set,
            RejectReason::Missing,
        ),
        (
            vec![put(backend(0, 1, ip(a.pods[1])))],
            Field::Address,
            RejectReason::Incomplete(1),
        ),
        (
            vec![put(backend(0, 1, ip(V6.pods[1])))],
            Field::Family,
            RejectReason::Invalid,
        ),
        (
            vec![put(backend(0, 1, ip("127.0.0.1")))],
            Field::Address,
            RejectReason::Invalid,
        ),
        (
            vec![put(set(2, 0)), put(backend(9, 0, ip(a.pods[0])))],
            Field::Count,
            RejectReason::Incomplete(1),
        ),
        (
            vec![
                put(set(2, 0)),
                put(backend(9, 0, ip(a.pods[0]))),
                put(backend(9, 2, ip(a.pods[1]))),
            ],
            Field::Count,
            RejectReason::Incomplete(1),
        ),
        (
            vec![put(set(1, 2)), put(slots(0, &[0, 1]))],
            Field::Slots,
            RejectReason::Invalid,
        ),
        (
            vec![put(set(1, 2)), put(slots(0, &[0]))],
            Field::Slots,
            RejectReason::Invalid,
        ),
        (
            vec![put(set(1, 2)), put(slots(1, &[0]))],
            Field::Index,
            RejectReason::Invalid,
        ),
        (
            vec![put(set(0, 2))],
            Field::Count,
            RejectReason::Incomplete(1),
        ),
        (
            vec![put(service(ServiceRow::Port(six)))],
            Field::Set,
            RejectReason::Invalid,
        ),
        (
            vec![removal(ServiceKey::Port(PortId(0)))],
            Field::Id,
            RejectReason::InUse(3),
        ),
        (
            vec![removal(ServiceKey::Set(SetId(0)))],
            Field::Id,
            RejectReason::InUse(2),
        ),
        (
            vec![removal(ServiceKey::Backend {
                set: SetId(0),
                index: 0,
            })],
            Field::Count,
            RejectReason::Incomplete(1),
        ),
        (
            vec![put(svc.frontend("172.20.0.9", 80, FrontendKind::ClusterIp))],
            Field::Address,
            RejectReason::Missing,
        ),
        (
            vec![put(svc.frontend("::", 80, FrontendKind::NodePort))],
            Field::Family,
            RejectReason::Invalid,
        ),
        (
            vec![put(svc.frontend(a.any, 0, FrontendKind::NodePort))],
            Field::Port,
            RejectReason::Invalid,
        ),
        (
            vec![removal(ServiceKey::Prefix(prefix("1.0.0.0/8")))],
            Field::Prefix,
            RejectReason::Missing,
        ),
        (
            vec![put(service(ServiceRow::Nat(NatRow {
                first_port: 9,
                last_port: 8,
                ..nat()
            })))],
            Field::Port,
            RejectReason::Invalid,
        ),
        (
            vec![put(service(ServiceRow::Connections(
                sluice_contract::service::ConnectionsRow {
                    icmp: 0,
                    ..Default::default()
                },
            )))],
            Field::Timeout,
            RejectReason::Invalid,
        ),
    ];
    for (messages, field, reason) in cases {
        let mut bench = node::node();
        bench.commit(&rows);
        bench.change(&messages);
        let first = bench.refused.first();
        let reject = first.unwrap_or_else(|| panic!("{messages:?}: taken"));
        assert_eq!(
            (reject.field, reject.reason),
            (field, reason),
            "{messages:?}"
        );
        assert!(matches!(reject.object, Some(Key::Service(_))));
        // The Service is as it was, unless it was its own row: then it serves nothing.
        let own = [ServiceKey::Set(SetId(0)), ServiceKey::Port(PortId(0))];
        let is_out = own
            .map(|key| Some(Key::Service(key)))
            .contains(&reject.object)
            && !matches!(reason, RejectReason::InUse(_));
        let sent = packet(16, a.pods[0], a.cluster_ip)
            .tcp(1, 80, tcp::SYN)
            .build();
        let end = bench.send(16, &sent);
        let forwarded = matches!(end.verdict, sluice_appliance::Verdict::Forward(_));
        assert_ne!(forwarded, is_out, "{messages:?}: {:?}", end.verdict);
    }
    let _ = Mac::GATEWAY;
}
