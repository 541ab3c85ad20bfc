//! Services, packet by packet: kube-proxy's table of sources and destinations, and everything around it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use sluice_appliance::Verdict;
use sluice_appliance::testing::node::{
    self, Addresses, BOTH, HOST, Svc, UPLINK, V4, V6, assert_checksums, ends, ip, known, nat,
    outcome, packet, prefix, removal, service,
};
use sluice_appliance::testing::{Bench, pod_row};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::tcp;
use sluice_contract::service::{
    AddressRole, BackendRow, FrontendKind, NatRow, PortId, ServiceKey, ServiceRow, SetId, SetRow,
    SlotsRow,
};
use sluice_contract::{DropReason, LinkId, Mac, Protocol, Row, ToGuest};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Client {
    Pod,
    Node,
    Outside,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum To {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Policy {
    Cluster,
    ExternalLocal,
    InternalLocal,
}

const ALL: bool = true;
const LOCAL: bool = false;
const MASQ: bool = true;
const KEEP: bool = false;

/// Which endpoints, and whether the source is rewritten; written from the table of kube-proxy's own tests, not from the code.
fn expected(
    from: Client,
    to: To,
    policy: Policy,
    detector: bool,
    masquerade_all: bool,
) -> (bool, bool) {
    use Client::{Node, Outside, Pod};
    use Policy::{Cluster, ExternalLocal, InternalLocal};
    use To::{ClusterIp, LoadBalancer, NodePort};
    let normal = match (from, to, policy) {
        (Pod, ClusterIp, Cluster | ExternalLocal) => (ALL, KEEP),
        (Pod, ClusterIp, InternalLocal) => (LOCAL, KEEP),
        (Pod, NodePort | LoadBalancer, Cluster | InternalLocal) => (ALL, MASQ),
        (Pod, NodePort | LoadBalancer, ExternalLocal) => (ALL, KEEP),
        (Node, ClusterIp, Cluster | ExternalLocal) => (ALL, MASQ),
        (Node, ClusterIp, InternalLocal) => (LOCAL, MASQ),
        (Node, NodePort | LoadBalancer, _) => (ALL, MASQ),
        (Outside, ClusterIp, Cluster | ExternalLocal) => (ALL, MASQ),
        (Outside, ClusterIp, InternalLocal) => (LOCAL, MASQ),
        (Outside, NodePort | LoadBalancer, Cluster | InternalLocal) => (ALL, MASQ),
        (Outside, NodePort | LoadBalancer, ExternalLocal) => (LOCAL, KEEP),
    };
    match (from, to, policy) {
        (Pod, ClusterIp, _) => (normal.0, masquerade_all),
        (_, ClusterIp, _) => (normal.0, masquerade_all || detector),
        (Pod, _, ExternalLocal) if !detector => (LOCAL, KEEP),
        _ => normal,
    }
}

/// Many connections of one kind: who answered, and whether the source was rewritten.
fn many(
    bench: &mut Bench,
    ports: &mut u16,
    a: &Addresses,
    from: Client,
    to: To,
) -> (BTreeSet<(IpAddr, u16)>, bool) {
    let (link, source) = match from {
        Client::Pod => (16, a.pods[0]),
        Client::Node => (HOST, a.node),
        Client::Outside => (UPLINK, a.outside),
    };
    let (destination, port) = match to {
        To::ClusterIp => (a.cluster_ip, 80),
        To::NodePort => (a.node, 30080),
        To::LoadBalancer => (a.load_balancer, 80),
    };
    let mut backends = BTreeSet::new();
    let mut rewritten = BTreeSet::new();
    for _ in 0..40 {
        // A port for each connection: two with one would be told apart by another source port (row S-26).
        *ports += 1;
        let n = *ports;
        let sent = packet(link, source, destination)
            .tcp(20_000 + n, port, tcp::SYN)
            .build();
        let end = bench.send(link, &sent);
        outcome(&end).unwrap_or_else(|reason| panic!("{from:?} {to:?}: {reason:?}"));
        assert_checksums(&end.bytes);
        let (source_seen, source_port, backend, backend_port) = ends(&end.bytes);
        backends.insert((backend, backend_port));
        let same = source_seen == ip(source) && source_port == 20_000 + n;
        if !same {
            assert_eq!(source_seen, ip(a.node));
            assert!(source_port >= 49152);
        }
        rewritten.insert(!same);
        // And back: the answer comes from where it was asked.
        let (back_link, macs) = match end.verdict {
            Verdict::Forward(LinkId::UPLINK) => (UPLINK, None),
            Verdict::Forward(link) => (link.raw(), Some(())),
            other => panic!("{other:?}"),
        };
        let _ = macs;
        let answer = packet(back_link, &backend.to_string(), &source_seen.to_string())
            .tcp(backend_port, source_port, tcp::SYN | tcp::ACK)
            .numbers(7000, 1001)
            .build();
        let answered = bench.send(back_link, &answer);
        assert_eq!(outcome(&answered), Ok(link), "{from:?} {to:?}");
        assert_checksums(&answered.bytes);
        assert_eq!(
            ends(&answered.bytes),
            (ip(destination), port, ip(source), 20_000 + n),
            "{from:?} {to:?}"
        );
    }
    assert_eq!(
        rewritten.len(),
        1,
        "{from:?} {to:?}: some were rewritten and some were not"
    );
    (backends, rewritten.contains(&true))
}

#[test]
fn s11_s12_s13_s14_kube_proxys_table_of_27_rows_in_4_configurations() {
    let mut cases = 0;
    for a in BOTH {
        let local = (a.pods[1], 8080);
        let remote = (a.remote, 9090);
        for (detector, masquerade_all) in
            [(true, false), (false, false), (true, true), (false, true)]
        {
            for policy in [
                Policy::Cluster,
                Policy::ExternalLocal,
                Policy::InternalLocal,
            ] {
                let (mut bench, mut ports) = (node::node(), 0);
                let nat = NatRow {
                    detect_local: detector,
                    masquerade_all,
                    ..nat()
                };
                let mut svc = Svc::new(&[local, remote], &[local]);
                svc.external_local = policy == Policy::ExternalLocal;
                svc.internal_local = policy == Policy::InternalLocal;
                let mut rows = vec![service(ServiceRow::Nat(nat))];
                rows.extend(svc.rows(&a));
                bench.commit(&rows);
                for from in [Client::Pod, Client::Node, Client::Outside] {
                    for to in [To::ClusterIp, To::NodePort, To::LoadBalancer] {
                        let (everywhere, masquerade) =
                            expected(from, to, policy, detector, masquerade_all);
                        let mut who = BTreeSet::from([(ip(local.0), local.1)]);
                        if everywhere == ALL {
                            who.insert((ip(remote.0), remote.1));
                        }
                        let what =
                            format!("{from:?} {to:?} {policy:?} {detector} {masquerade_all}");
                        assert_eq!(
                            many(&mut bench, &mut ports, &a, from, to),
                            (who, masquerade),
                            "{what}"
                        );
                        cases += 1;
                    }
                }
            }
        }
    }
    assert_eq!(cases, 27 * 4 * 2);
}

/// What becomes of a SYN to the ClusterIP from a pod, and to the load balancer from outside.
fn two_ways(a: &Addresses, svc: &Svc) -> [Result<IpAddr, DropReason>; 2] {
    let mut bench = node::node();
    bench.commit(&svc.rows(a));
    [
        (16, a.pods[0], a.cluster_ip),
        (UPLINK, a.outside, a.load_balancer),
    ]
    .map(|(link, source, destination)| {
        let sent = packet(link, source, destination)
            .tcp(20_000, 80, tcp::SYN)
            .build();
        let end = bench.send(link, &sent);
        match end.verdict {
            Verdict::Forward(_) => Ok(ends(&end.bytes).2),
            Verdict::Reply => {
                // A reset is a refusal.
                assert_checksums(&end.bytes);
                Err(DropReason::SvcNoEndpoint)
            }
            Verdict::Drop(reason) => Err(reason),
            Verdict::Held => panic!("held"),
        }
    })
}

#[test]
fn s06_s15_terminating_endpoints_fall_back_as_kube_proxys_tests_say() {
    for a in BOTH {
        let (local, remote) = ((a.pods[1], 8080), (a.remote, 9090));
        let with = |cluster: &[_], locals: &[_], endpoints| {
            let mut svc = Svc::new(cluster, locals);
            svc.external_local = true;
            svc.endpoints = endpoints;
            two_ways(&a, &svc)
        };
        // 84: local ready, local terminating, remote ready. (The host puts the ready ones into the sets.)
        let [inside, outside] = with(&[local, remote], &[local], true);
        assert!(inside == Ok(ip(local.0)) || inside == Ok(ip(remote.0)));
        assert_eq!(outside, Ok(ip(local.0)));
        // 85: only a local one that terminates, and a remote one that is ready.
        assert_eq!(
            with(&[remote], &[local], true),
            [Ok(ip(remote.0)), Ok(ip(local.0))]
        );
        // 86: only a remote one that terminates.
        let none = Err(DropReason::SvcNoLocalEndpoint);
        assert_eq!(with(&[remote], &[], true), [Ok(ip(remote.0)), none]);
        // 87: nobody anywhere.
        let refused = Err(DropReason::SvcNoEndpoint);
        assert_eq!(with(&[], &[], false), [refused, refused]);
        // 83: internal policy Local.
        let mut svc = Svc::new(&[remote], &[]);
        svc.internal_local = true;
        assert_eq!(two_ways(&a, &svc)[0], none);
        svc.endpoints = false;
        svc.cluster.clear();
        assert_eq!(two_ways(&a, &svc)[0], refused);
    }
}

#[test]
fn s05_without_endpoints_tcp_is_reset_and_udp_and_sctp_are_unreachable() {
    for a in BOTH {
        let mut bench = node::node();
        let mut rows = Vec::new();
        for (id, protocol) in [(0, Protocol::Tcp), (1, Protocol::Udp), (2, Protocol::Sctp)] {
            let mut svc = Svc::new(&[], &[]);
            svc.id = id;
            svc.protocol = protocol;
            rows.extend(svc.rows(&a));
        }
        bench.commit(&rows);
        let syn = packet(16, a.pods[0], a.cluster_ip)
            .tcp(4000, 80, tcp::SYN)
            .numbers(55, 0);
        let end = bench.send(16, &syn.build());
        let reset = end.replied();
        assert_checksums(reset);
        assert_eq!(ends(reset), (ip(a.cluster_ip), 80, ip(a.pods[0]), 4000));
        let sliced = etherparse::SlicedPacket::from_ethernet(reset).unwrap();
        let Some(etherparse::TransportSlice::Tcp(header)) = sliced.transport else {
            panic!()
        };
        assert!(header.rst() && header.ack());
        assert_eq!(header.acknowledgment_number(), 56);
        let network = if a.family == sluice_appliance::Family::V4 {
            20
        } else {
            40
        };
        let code: [u8; 2] = if network == 20 { [3, 3] } else { [1, 4] };
        let init = [1, 0, 0, 20, 0, 0, 0, 9, 0, 0, 16, 0, 0, 1, 0, 1, 0, 0, 0, 1];
        for sent in [
            packet(16, a.pods[0], a.cluster_ip).udp(4000, 80).build(),
            packet(16, a.pods[0], a.cluster_ip)
                .sctp(4000, 80)
                .payload(&init)
                .build(),
        ] {
            let end = bench.send(16, &sent);
            let reply = end.replied();
            assert_checksums(reply);
            assert_eq!(&reply[14 + network..][..2], &code);
            assert_eq!(&reply[14 + network + 8..], &sent[14..]);
        }
        // Refused packets begin nothing.
        assert_eq!(bench.pipeline.conntrack().used(), 0);
        // And not more often than the link may ask.
        let refused = (0..1000).filter(|_| bench.send(16, &syn.build()).verdict == Verdict::Reply);
        assert!(refused.count() <= 51);
        assert!(bench.pipeline.stats().dropped(DropReason::SvcNoEndpoint) > 900);
    }
}

#[test]
fn s07_undefined_ports_are_refused_and_unallocated_addresses_are_silent() {
    for a in BOTH {
        let mut bench = node::node();
        bench.commit(&Svc::new(&[(a.pods[1], 8080)], &[]).rows(&a));
        let syn = packet(16, a.pods[0], a.cluster_ip).tcp(4000, 81, tcp::SYN);
        bench.send(16, &syn.build()).replied();
        let syn = packet(16, a.pods[0], a.unallocated).tcp(4000, 80, tcp::SYN);
        assert_eq!(
            bench.send(16, &syn.build()).dropped(),
            DropReason::SvcUnallocated
        );
        let end = bench.send(
            UPLINK,
            &packet(UPLINK, a.outside, a.unallocated).udp(1, 2).build(),
        );
        assert_eq!(end.dropped(), DropReason::SvcUnallocated);
        assert_eq!(
            bench.pipeline.stats().link(LinkId::UPLINK).sent,
            0,
            "nothing leaks"
        );
    }
}

#[test]
fn s01_v06_all_protocols_reach_an_endpoint_and_come_back() {
    for a in BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let mut bench = node::node();
            let mut svc = Svc::new(&[(a.pods[1], 8080)], &[]);
            svc.protocol = protocol;
            bench.commit(&svc.rows(&a));
            let init = [1, 0, 0, 20, 0, 0, 0, 9, 0, 0, 16, 0, 0, 1, 0, 1, 0, 0, 0, 1];
            let there = packet(16, a.pods[0], a.cluster_ip);
            let there = match protocol {
                Protocol::Tcp => there.tcp(4000, 80, tcp::SYN),
                Protocol::Udp => there.udp(4000, 80).payload(b"question"),
                Protocol::Sctp => there.sctp(4000, 80).payload(&init),
            };
            let end = bench.send(16, &there.build());
            assert_checksums(end.forwarded(17));
            assert_eq!(ends(&end.bytes), (ip(a.pods[0]), 4000, ip(a.pods[1]), 8080));
            let back = packet(17, a.pods[1], a.pods[0]);
            let ack = [2, 0, 0, 20, 0, 0, 0, 5, 0, 0, 16, 0, 0, 1, 0, 1, 0, 0, 0, 1];
            let back = match protocol {
                Protocol::Tcp => back.tcp(8080, 4000, tcp::SYN | tcp::ACK).numbers(9, 1001),
                Protocol::Udp => back.udp(8080, 4000).payload(b"answer"),
                Protocol::Sctp => back.sctp_tagged(8080, 4000, 9).payload(&ack),
            };
            let end = bench.send(17, &back.build());
            assert_checksums(end.forwarded(16));
            assert_eq!(
                ends(&end.bytes),
                (ip(a.cluster_ip), 80, ip(a.pods[0]), 4000)
            );
            if protocol == Protocol::Sctp {
                let sliced = etherparse::SlicedPacket::from_ethernet(&end.bytes).unwrap();
                assert!(sliced.ip_payload().is_some());
            }
        }
    }
}

#[test]
fn s03_new_connections_are_spread_evenly() {
    for (endpoints, critical) in [(2u16, 10.83), (3, 13.82), (7, 22.46), (100, 148.2)] {
        let mut bench = node::node();
        let rows = backends_rows(endpoints);
        bench.commit(&rows);
        let mut counts = BTreeMap::new();
        let total = 10_000u32;
        for n in 0..total {
            let port = 1024 + u16::try_from(n % 60_000).unwrap();
            let pod = 1 + n % 3;
            let source = format!("10.0.0.{pod}");
            let link = 15 + u16::try_from(pod).unwrap();
            let end = bench.send(
                link,
                &packet(link, &source, V4.cluster_ip).udp(port, 80).build(),
            );
            outcome(&end).unwrap();
            *counts.entry(ends(&end.bytes).2).or_insert(0u32) += 1;
            if n % 500 == 0 {
                // The table is small; what was counted may go.
                bench.wait(Duration::from_secs(130));
            }
        }
        let mean = f64::from(total) / f64::from(endpoints);
        let chi: f64 = counts
            .values()
            .map(|c| (f64::from(*c) - mean).powi(2) / mean)
            .sum();
        assert_eq!(counts.len(), usize::from(endpoints));
        assert!(chi < critical, "{endpoints} endpoints: {chi}");
    }
}

/// A UDP Service with so many endpoints on another node.
fn backends_rows(count: u16) -> Vec<Row> {
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

fn backend(set: u32, index: u16, address: IpAddr) -> Row {
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
        assert!(
            matches!(outcome, sluice_appliance::apply::Outcome::Committed(_)),
            "{outcome:?}"
        );
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
        // An address that the node already routes is not to be taken by a Service.
        let taken = known(a.pods[2], AddressRole::External);
        let outcome = bench.change(&[ToGuest::Put(taken)]);
        assert!(matches!(
            outcome,
            sluice_appliance::apply::Outcome::Refused(..)
        ));
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
            RejectReason::Taken,
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
        let outcome = bench.change(&messages);
        let sluice_appliance::apply::Outcome::Refused(_, reject) = outcome else {
            panic!("{messages:?}: {outcome:?}")
        };
        assert_eq!(
            (reject.field, reject.reason),
            (field, reason),
            "{messages:?}"
        );
        assert!(matches!(reject.object, Some(Key::Service(_))));
        // The Service is as it was.
        let sent = packet(16, a.pods[0], a.cluster_ip)
            .tcp(1, 80, tcp::SYN)
            .build();
        bench.send(16, &sent).forwarded(17);
    }
    let _ = Mac::GATEWAY;
}
