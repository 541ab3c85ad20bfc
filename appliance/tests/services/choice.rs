//! Which endpoint, and with which source: the table of kube-proxy, and what is told where there is none.

use crate::live::backends_rows;
use sluice_appliance::Verdict;
use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{
    self, Addresses, BOTH, HOST, Svc, UPLINK, V4, assert_checksums, ends, ip, nat, outcome, packet,
    service,
};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::tcp;
use sluice_contract::service::{NatRow, ServiceRow};
use sluice_contract::{DropReason, LinkId, Protocol};
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
