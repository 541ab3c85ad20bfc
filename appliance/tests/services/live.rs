//! Services that change under live connections, clients that are kept, and sources that clash.

use sluice_appliance::Verdict;
use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{
    self, Addresses, BOTH, HOST, Svc, UPLINK, V4, assert_checksums, ends, ip, known, outcome,
    packet, removal, service,
};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::tcp;
use sluice_contract::service::{
    AddressRole, BackendRow, FrontendKind, ServiceKey, ServiceRow, SetId, SetRow,
};
use sluice_contract::{DropReason, Protocol, Row, ToGuest};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// A UDP Service with so many endpoints on another node.
pub(crate) fn backends_rows(count: u16) -> Vec<Row> {
    let mut svc = Svc::new(&[], &[]);
    svc.protocol = Protocol::Udp;
    let set = |id, count| {
        service(ServiceRow::Set(SetRow {
            id: SetId(id),
            family: V4.family,
            count,
            slots: 0,
        }))
    };
    let mut rows = vec![set(0, count), set(1, 0), set(2, 0)];
    for index in 0..count {
        let [hi, lo] = (index + 1).to_be_bytes();
        rows.push(backend(0, index, IpAddr::from([10, 0, 8 + hi, lo])));
    }
    svc.endpoints = true;
    rows.push(service(ServiceRow::Port(svc.port_row(&V4))));
    rows.push(known(V4.cluster_ip, AddressRole::Cluster));
    rows.push(svc.frontend(V4.cluster_ip, 80, FrontendKind::ClusterIp));
    rows
}

pub(crate) fn backend(set: u32, index: u16, address: IpAddr) -> Row {
    service(ServiceRow::Backend(BackendRow {
        set: SetId(set),
        index,
        address,
        port: 8080,
    }))
}

#[test]
fn s04_a_change_of_endpoints_moves_no_live_flow() {
    let a = V4;
    let pods = [(a.pods[1], 8080), (a.pods[2], 8080), (a.remote, 8080)];
    let mut bench = node::node();
    let mut svc = Svc::new(&pods[..2], &[]);
    bench.commit(&svc.rows(&a));
    let flow = |n: u16, flags| packet(16, a.pods[0], a.cluster_ip).tcp(10_000 + n, 80, flags);
    let first: Vec<_> = (0..1000)
        .map(|n| ends(&bench.send(16, &flow(n, tcp::SYN).build()).bytes).2)
        .collect();
    let check = |bench: &mut Bench| {
        for (n, backend) in (0..1000).zip(&first) {
            let end = bench.send(16, &flow(n, tcp::SYN).build());
            assert_eq!(ends(&end.bytes).2, *backend);
        }
    };
    check(&mut bench);
    svc.cluster = pods.to_vec();
    bench.commit(&svc.rows(&a));
    check(&mut bench);
    // Two of three go from the set for new connections, but still serve.
    svc.serving = Some(pods.to_vec());
    svc.cluster = vec![pods[2]];
    let mut messages: Vec<_> = svc.rows(&a).into_iter().map(ToGuest::Put).collect();
    for index in 1..3 {
        messages.push(removal(ServiceKey::Backend {
            set: SetId(0),
            index,
        }));
    }
    let backend_first = messages.remove(1);
    messages.push(backend_first);
    bench.change(&messages);
    check(&mut bench);
    let new = bench.send(16, &flow(5000, tcp::SYN).build());
    assert_eq!(ends(&new.bytes).2, ip(a.remote));
}

#[test]
fn s18_a_client_keeps_its_endpoint_until_it_has_been_idle() {
    for a in BOTH {
        let mut bench = node::node();
        let mut svc = Svc::new(&[(a.pods[1], 80), (a.pods[2], 80), (a.remote, 80)], &[]);
        svc.protocol = Protocol::Udp;
        svc.affinity = 100;
        bench.commit(&svc.rows(&a));
        let ask = |bench: &mut Bench, port| {
            let end = bench.send(
                16,
                &packet(16, a.pods[0], a.cluster_ip).udp(port, 80).build(),
            );
            ends(&end.bytes).2
        };
        let first = ask(&mut bench, 1);
        for port in 2..200 {
            bench.wait(Duration::from_secs(1));
            assert_eq!(ask(&mut bench, port), first);
        }
        // Another client is another matter.
        let others: BTreeSet<_> = (1..100)
            .map(|port| {
                let sent = packet(UPLINK, &format!("{}{port}", prefix_of(&a)), a.load_balancer);
                ends(&bench.send(UPLINK, &sent.udp(port, 80).build()).bytes).2
            })
            .collect();
        assert_eq!(others.len(), 3);
        // After the timeout the next connections are spread anew.
        let mut seen = BTreeSet::new();
        for round in 0..40 {
            bench.wait(Duration::from_secs(101));
            seen.insert(ask(&mut bench, 300 + round));
        }
        assert_eq!(seen.len(), 3);
        // Without affinity they are spread at once, and with it again they stay.
        svc.affinity = 0;
        bench.commit(&svc.rows(&a));
        let spread: BTreeSet<_> = (1000..1100).map(|port| ask(&mut bench, port)).collect();
        assert_eq!(spread.len(), 3);
        svc.affinity = 100;
        bench.commit(&svc.rows(&a));
        let kept: BTreeSet<_> = (2000..2100).map(|port| ask(&mut bench, port)).collect();
        assert_eq!(kept.len(), 1);
        // Its endpoint goes: another one is chosen, and kept.
        let gone = kept.into_iter().next().unwrap();
        svc.cluster.retain(|(address, _)| ip(address) != gone);
        svc.serving = Some(svc.cluster.clone());
        let mut messages: Vec<_> = svc.rows(&a).into_iter().map(ToGuest::Put).collect();
        for set in [0, 2] {
            let key = ServiceKey::Backend {
                set: SetId(set),
                index: 2,
            };
            messages.insert(0, removal(key));
        }
        let outcome = bench.change(&drop_members_first(&messages));
        assert!(outcome.is_whole(), "{outcome:?}");
        let kept: BTreeSet<_> = (3000..3100).map(|port| ask(&mut bench, port)).collect();
        assert_eq!(kept.len(), 1);
        assert!(!kept.contains(&gone));
    }
}

/// Backends of a set change places: all go before any comes.
fn drop_members_first(messages: &[ToGuest]) -> Vec<ToGuest> {
    let mut removals = Vec::new();
    let mut rest = Vec::new();
    for message in messages {
        match message {
            ToGuest::Remove(_) => removals.push(message.clone()),
            ToGuest::Put(Row::Service(ServiceRow::Backend(row))) => {
                removals.push(removal(ServiceKey::Backend {
                    set: row.set,
                    index: row.index,
                }));
                rest.push(message.clone());
            }
            _ => rest.push(message.clone()),
        }
    }
    removals.extend(rest);
    removals
}

const fn prefix_of(a: &Addresses) -> &'static str {
    match a.family {
        sluice_appliance::Family::V4 => "203.0.113.",
        sluice_appliance::Family::V6 => "2001:db8:99::",
    }
}

#[test]
fn s21_source_ranges_hold_for_the_load_balancers_address_only() {
    for a in BOTH {
        let mut bench = node::node();
        let mut svc = Svc::new(&[(a.pods[1], 8080)], &[]);
        svc.sources = match a.family {
            sluice_appliance::Family::V4 => vec!["203.0.113.0/24", "10.0.0.3/32"],
            sluice_appliance::Family::V6 => vec!["2001:db8:99::/48", "fd00::3/128"],
        };
        bench.commit(&svc.rows(&a));
        let mut ask = |link, source: &str, destination, port| {
            let sent = packet(link, source, destination)
                .tcp(4000, port, tcp::SYN)
                .build();
            outcome(&bench.send(link, &sent)).map(|_| ())
        };
        let denied = Err(DropReason::SvcSourceRange);
        let stranger = match a.family {
            sluice_appliance::Family::V4 => "203.0.114.5",
            sluice_appliance::Family::V6 => "2001:db8:98::5",
        };
        assert_eq!(ask(UPLINK, a.outside, a.load_balancer, 80), Ok(()));
        assert_eq!(ask(UPLINK, stranger, a.load_balancer, 80), denied);
        assert_eq!(ask(UPLINK, stranger, a.node, 30080), Ok(()));
        assert_eq!(ask(16, a.pods[0], a.load_balancer, 80), denied);
        assert_eq!(ask(18, a.pods[2], a.load_balancer, 80), Ok(()));
        assert_eq!(ask(16, a.pods[0], a.cluster_ip, 80), Ok(()));
        assert_eq!(
            ask(HOST, a.node, a.load_balancer, 80),
            Ok(()),
            "the node always may"
        );
    }
}

#[test]
fn s22_b04_v05_a_pod_reaches_itself_through_its_service_and_its_host_port() {
    for a in BOTH {
        for (destination, port) in [(a.cluster_ip, 80), (a.node, 30080), (a.node, 8099)] {
            let mut bench = node::node();
            let svc = Svc::new(&[(a.pods[0], 8080)], &[(a.pods[0], 8080)]);
            let mut rows = svc.rows(&a);
            rows.push(svc.frontend(a.any, 8099, FrontendKind::HostPort));
            bench.commit(&rows);
            let syn = packet(16, a.pods[0], destination).tcp(4000, port, tcp::SYN);
            let end = bench.send(16, &syn.build());
            assert_checksums(end.forwarded(16));
            let (source, source_port, backend, backend_port) = ends(&end.bytes);
            assert_eq!(
                (source, backend, backend_port),
                (ip(a.node), ip(a.pods[0]), 8080)
            );
            let back = packet(16, a.pods[0], a.node)
                .tcp(8080, source_port, tcp::SYN | tcp::ACK)
                .numbers(9, 1001);
            let end = bench.send(16, &back.build());
            assert_checksums(end.forwarded(16));
            assert_eq!(
                ends(&end.bytes),
                (ip(destination), port, ip(a.pods[0]), 4000)
            );
        }
    }
}

#[test]
fn s23_udp_flows_leave_an_endpoint_that_is_gone_and_no_other() {
    for a in BOTH {
        let mut bench = node::node();
        let mut svc = Svc::new(&[(a.pods[1], 53), (a.pods[2], 53)], &[]);
        svc.protocol = Protocol::Udp;
        bench.commit(&svc.rows(&a));
        let ask = |bench: &mut Bench, n: u16| {
            let end = bench.send(
                16,
                &packet(16, a.pods[0], a.cluster_ip)
                    .udp(5000 + n, 80)
                    .build(),
            );
            match end.verdict {
                Verdict::Forward(_) => Some(ends(&end.bytes).2),
                _ => None,
            }
        };
        let before: Vec<_> = (0..100).map(|n| ask(&mut bench, n).unwrap()).collect();
        // The second one goes.
        svc.cluster.truncate(1);
        let mut messages: Vec<_> = svc.rows(&a).into_iter().map(ToGuest::Put).collect();
        for set in [0, 2] {
            messages.push(removal(ServiceKey::Backend {
                set: SetId(set),
                index: 1,
            }));
        }
        bench.change(&messages);
        let late = packet(18, a.pods[2], a.pods[0]).udp(53, 5000).build();
        let stale = before.iter().position(|b| *b == ip(a.pods[2])).unwrap();
        let late_port = 5000 + u16::try_from(stale).unwrap();
        let late = {
            let _ = late;
            packet(18, a.pods[2], a.pods[0]).udp(53, late_port).build()
        };
        assert_eq!(bench.send(18, &late).dropped(), DropReason::SvcBackendGone);
        for (n, was) in (0..100).zip(&before) {
            let now = ask(&mut bench, n).unwrap();
            assert_eq!(now, ip(a.pods[1]));
            let _ = was;
        }
        // Scaled to nothing, and up again.
        svc.cluster.clear();
        svc.endpoints = false;
        let mut messages: Vec<_> = svc.rows(&a).into_iter().map(ToGuest::Put).collect();
        for set in [0, 2] {
            messages.push(removal(ServiceKey::Backend {
                set: SetId(set),
                index: 0,
            }));
        }
        bench.change(&messages);
        assert_eq!(ask(&mut bench, 0), None);
        svc.cluster = vec![(a.pods[2], 53)];
        svc.endpoints = true;
        bench.commit(&svc.rows(&a));
        assert_eq!(ask(&mut bench, 0), Some(ip(a.pods[2])));
    }
}

#[test]
fn s24_a_tcp_client_of_a_deleted_endpoint_is_reset_and_not_before() {
    for a in BOTH {
        let mut bench = node::node();
        let svc = Svc::new(&[(a.pods[1], 8080)], &[]);
        bench.commit(&svc.rows(&a));
        let client = |flags| packet(16, a.pods[0], a.cluster_ip).tcp(4000, 80, flags);
        let server = |flags| packet(17, a.pods[1], a.pods[0]).tcp(8080, 4000, flags);
        bench
            .send(16, &client(tcp::SYN).numbers(10, 0).build())
            .forwarded(17);
        bench
            .send(17, &server(tcp::SYN | tcp::ACK).numbers(90, 11).build())
            .forwarded(16);
        bench
            .send(16, &client(tcp::ACK).numbers(11, 91).build())
            .forwarded(17);
        // It terminates: no new connections, but it serves.
        let mut svc = svc;
        svc.serving = Some(svc.cluster.clone());
        svc.cluster.clear();
        let mut messages: Vec<_> = svc.rows(&a).into_iter().map(ToGuest::Put).collect();
        messages.push(removal(ServiceKey::Backend {
            set: SetId(0),
            index: 0,
        }));
        bench.change(&messages);
        bench
            .send(16, &client(tcp::ACK).numbers(11, 91).payload(b"x").build())
            .forwarded(17);
        // It is gone.
        svc.serving = Some(Vec::new());
        svc.endpoints = false;
        let mut messages: Vec<_> = svc.rows(&a).into_iter().map(ToGuest::Put).collect();
        messages.push(removal(ServiceKey::Backend {
            set: SetId(2),
            index: 0,
        }));
        bench.change(&messages);
        let end = bench.send(16, &client(tcp::ACK).numbers(12, 91).payload(b"y").build());
        let reset = end.replied();
        assert_eq!(ends(reset), (ip(a.cluster_ip), 80, ip(a.pods[0]), 4000));
        let sliced = etherparse::SlicedPacket::from_ethernet(reset).unwrap();
        let Some(etherparse::TransportSlice::Tcp(header)) = sliced.transport else {
            panic!()
        };
        assert!(header.rst());
        assert_eq!(header.sequence_number(), 91);
    }
}

#[test]
fn s25_an_invalid_segment_of_a_translated_flow_is_dropped() {
    for a in BOTH {
        let mut bench = node::node();
        bench.commit(&Svc::new(&[(a.pods[1], 8080)], &[]).rows(&a));
        let client = |flags| packet(16, a.pods[0], a.cluster_ip).tcp(4000, 80, flags);
        let server = |flags| packet(17, a.pods[1], a.pods[0]).tcp(8080, 4000, flags);
        bench
            .send(16, &client(tcp::SYN).numbers(10, 0).build())
            .forwarded(17);
        bench
            .send(17, &server(tcp::SYN | tcp::ACK).numbers(90, 11).build())
            .forwarded(16);
        bench
            .send(16, &client(tcp::ACK).numbers(11, 91).build())
            .forwarded(17);
        let wild = server(tcp::ACK).numbers(90 + 0x4000_0000, 11).build();
        assert_eq!(bench.send(17, &wild).dropped(), DropReason::CtInvalid);
        let blind = server(tcp::RST).numbers(90 + 0x4000_0000, 0).build();
        assert_eq!(bench.send(17, &blind).dropped(), DropReason::CtInvalid);
        bench
            .send(16, &client(tcp::ACK).numbers(11, 91).payload(b"on").build())
            .forwarded(17);
        // The middle of a connection that nobody knows goes nowhere, translated or not.
        let stray = packet(16, a.pods[0], a.cluster_ip)
            .tcp(4001, 80, tcp::ACK)
            .build();
        assert_eq!(bench.send(16, &stray).dropped(), DropReason::CtNotOpening);
        let stray = packet(16, a.pods[0], a.pods[1])
            .tcp(4001, 80, tcp::ACK)
            .build();
        assert_eq!(bench.send(16, &stray).dropped(), DropReason::CtNotOpening);
    }
}

#[test]
fn s26_one_source_port_to_two_services_with_one_endpoint() {
    for a in BOTH {
        let mut bench = node::node();
        let mut rows = Vec::new();
        for (id, port) in [(0, 80), (1, 81)] {
            let mut svc = Svc::new(&[(a.pods[1], 8080)], &[]);
            svc.id = id;
            svc.port = port;
            svc.node_port = 30000 + port;
            rows.extend(svc.rows(&a));
        }
        bench.commit(&rows);
        let mut seen = BTreeSet::new();
        for (destination, port) in [(a.cluster_ip, 80), (a.cluster_ip, 81), (a.pods[1], 8080)] {
            let sent = packet(16, a.pods[0], destination).tcp(4000, port, tcp::SYN);
            let end = bench.send(16, &sent.build());
            let (source, source_port, backend, _) = ends(end.forwarded(17));
            assert_eq!((source, backend), (ip(a.pods[0]), ip(a.pods[1])));
            assert!(seen.insert(source_port));
            let back = packet(17, a.pods[1], a.pods[0])
                .tcp(8080, source_port, tcp::SYN | tcp::ACK)
                .numbers(5, 1001);
            let end = bench.send(17, &back.build());
            assert_eq!(
                ends(end.forwarded(16)),
                (ip(destination), port, ip(a.pods[0]), 4000)
            );
        }
    }
}
