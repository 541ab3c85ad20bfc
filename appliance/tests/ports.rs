//! Ports that hide pods behind the node's address: how they are shared, and what a packet may cost that asks for one.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{
    self, Addresses, BOTH, UPLINK, V4, ends, nat, packet, service,
};
use sluice_appliance::time::Duration;
use sluice_appliance::{Capacity, Verdict};
use sluice_contract::row::RatesRow;
use sluice_contract::service::{ConnectionsRow, NatRow, ServiceRow};
use sluice_contract::{DropReason, LinkId, Row};
use std::num::NonZeroU32;

const FIRST: u16 = 61_440;
const PORTS: usize = 4_096;

/// A node with 4 096 ports, whose pods may have as many connections as they like.
fn node() -> Bench {
    let mut bench = Bench::empty(Capacity::default());
    let mut rows = node::node_rows();
    rows.push(service(ServiceRow::Nat(NatRow {
        first_port: FIRST,
        ..nat()
    })));
    rows.push(service(ServiceRow::Connections(ConnectionsRow {
        pod_share: 100,
        ..ConnectionsRow::default()
    })));
    bench.commit(&rows);
    bench
}

/// Tries made so far: commits that ended in a connection, and those that found the port taken.
fn tries(bench: &Bench) -> u64 {
    let counters = bench.pipeline.conntrack().counters();
    counters.committed + counters.reply_taken
}

/// Opens flows from the n-th pod to one resolver outside until `count` or the first refusal; returns how many there were, and
/// the most tries that one packet took.
fn open(bench: &mut Bench, a: &Addresses, pod: usize, to: &str, count: usize) -> (usize, u64) {
    let mut most = 0;
    for n in 0..count {
        let before = tries(bench);
        let flow = packet(16 + pod as u16, a.pods[pod], to).udp(1_024 + n as u16, 53);
        let end = bench.send(16 + pod as u16, &flow.build());
        most = most.max(tries(bench) - before);
        if end.verdict != Verdict::Forward(sluice_contract::LinkId::UPLINK) {
            return (n, most);
        }
        assert!(ends(&end.bytes).1 >= FIRST);
    }
    (count, most)
}

#[test]
fn e03_no_packet_tries_more_than_16_ports_and_a_pod_leaves_half_to_the_next() {
    for a in BOTH {
        let mut bench = node();
        // Each pod gets half of what those before it left.
        for (pod, share) in [PORTS / 2, PORTS / 4, PORTS / 8].into_iter().enumerate() {
            let (opened, most) = open(&mut bench, &a, pod, a.outside, PORTS);
            assert!(most <= 16, "{most} tries for one packet of pod {pod}");
            assert!(
                (share - share / 100..=share).contains(&opened),
                "pod {pod} got {opened} ports, and its share is {share}"
            );
        }
        // Another destination is another matter.
        let other = if a.pods == V4.pods {
            "198.18.0.1"
        } else {
            "2001:db8:99::9"
        };
        let (opened, most) = open(&mut bench, &a, 0, other, PORTS);
        assert!(most <= 16, "{most}");
        assert!(opened >= PORTS / 2 - PORTS / 100, "{opened}");
    }
}

#[test]
fn e03_a_refused_flow_tries_no_port_and_is_told_so() {
    let a = V4;
    let mut bench = node();
    let (opened, _) = open(&mut bench, &a, 0, a.outside, PORTS);
    let before = tries(&bench);
    for n in 0..1_000u16 {
        let flow = packet(16, a.pods[0], a.outside).udp(10_000 + n, 53).build();
        bench.send(16, &flow);
    }
    assert_eq!(tries(&bench), before);
    // Told as long as its link's limit of errors permits.
    bench.wait(Duration::from_secs(1));
    let told = bench.send(16, &packet(16, a.pods[0], a.outside).udp(9, 53).build());
    assert_eq!(&told.replied()[34..36], &[3, 13]);
    // Ports come back with the end of their connections.
    for _ in 0..3 {
        bench.wait(Duration::from_secs(59));
    }
    let (again, most) = open(&mut bench, &a, 0, a.outside, PORTS);
    assert_eq!(again, opened);
    assert!(most <= 16, "{most}");
    bench.pipeline.conntrack().audit().unwrap();
}

#[test]
fn b09_e03_a_flow_without_a_port_counts_as_no_connection_of_the_pods_rate() {
    let a = V4;
    let mut bench = node();
    open(&mut bench, &a, 0, a.outside, PORTS);
    let id = LinkId::new(16).unwrap();
    bench.commit(&[Row::Rates(RatesRow {
        link: id,
        ingress_packets: None,
        egress_packets: None,
        ingress_connections: None,
        egress_connections: NonZeroU32::new(10),
    })]);
    for n in 0..100u16 {
        let flow = packet(16, a.pods[0], a.outside).udp(10_000 + n, 53).build();
        let end = bench.send(16, &flow);
        assert!(!matches!(end.verdict, Verdict::Forward(_)), "{n}");
    }
    let (opened, _) = open(&mut bench, &a, 0, "198.18.0.1", 100);
    assert_eq!(opened, 10);
}

#[test]
fn e03_clients_outside_get_every_port_with_few_tries_each() {
    let a = V4;
    let mut bench = node();
    bench.commit(&node::Svc::new(&[(a.pods[1], 8080)], &[]).rows(&a));
    let mut most = 0;
    for n in 0..PORTS as u16 {
        let before = tries(&bench);
        let sent = packet(UPLINK, a.outside, a.load_balancer).tcp(1 + n, 80, 2);
        let end = bench.send(UPLINK, &sent.build());
        most = most.max(tries(&bench) - before);
        assert!(matches!(end.verdict, Verdict::Forward(_)), "{n}: {end:?}");
    }
    assert!(most <= 16, "{most} tries for one packet");
    let before = tries(&bench);
    let sent = packet(UPLINK, a.outside, a.load_balancer).tcp(9_999, 80, 2);
    bench.send(UPLINK, &sent.build());
    assert_eq!(tries(&bench), before);
    bench.pipeline.conntrack().audit().unwrap();
}

#[test]
fn k04_the_share_of_connections_is_asked_before_a_port_is_looked_for() {
    let a = V4;
    let mut bench = Bench::empty(Capacity::TINY);
    let mut rows = node::node_rows();
    rows.push(service(ServiceRow::Connections(ConnectionsRow {
        pod_share: 1,
        ..ConnectionsRow::default()
    })));
    bench.commit(&rows);
    let opened = (0..100).take_while(|n| {
        let flow = packet(16, a.pods[0], a.outside).udp(1_024 + n, 53);
        matches!(bench.send(16, &flow.build()).verdict, Verdict::Forward(_))
    });
    assert_eq!(opened.count(), 40, "1 % of 4 096");
    let before = *bench.pipeline.conntrack().counters();
    let end = bench.send(16, &packet(16, a.pods[0], a.outside).udp(9, 53).build());
    assert_eq!(end.dropped(), DropReason::CtQuota);
    let after = *bench.pipeline.conntrack().counters();
    assert_eq!(after.reply_taken, before.reply_taken);
    assert_eq!(after.refused_quota, before.refused_quota + 1);
}
