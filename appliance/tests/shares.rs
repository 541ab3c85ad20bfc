//! What the pods of one namespace, and strangers, leave to others: connections and fragments.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use sluice_appliance::group::Group;
use sluice_appliance::testing::node::{self, UPLINK, V4, packet, service};
use sluice_appliance::testing::{Bench, Builder, pod_row};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::ipv4;
use sluice_appliance::{Capacity, Verdict};
use sluice_contract::service::{ConnectionsRow, ServiceRow};
use sluice_contract::{DropReason, LinkId, Row, Tenant};

/// A node with pods 16, 17, …, each of the tenant given.
fn node(capacity: Capacity, tenants: &[u16], connections: ConnectionsRow) -> Bench {
    let mut bench = Bench::empty(capacity);
    let mut rows = node::node_rows();
    for (n, tenant) in (1..).zip(tenants) {
        let mut row = pod_row(15 + n, n);
        row.tenant = Tenant::new(*tenant).unwrap();
        rows.push(Row::Link(row));
    }
    rows.push(service(ServiceRow::Connections(connections)));
    bench.commit(&rows);
    bench
}

fn pod(n: u16) -> String {
    format!("10.0.0.{n}")
}

/// A UDP exchange that makes a connection established: there, back, and there again.
fn establish(bench: &mut Bench, from: u16, to: u16, port: u16) -> Verdict {
    let there = packet(15 + from, &pod(from), &pod(to))
        .udp(port, 53)
        .build();
    let back = packet(15 + to, &pod(to), &pod(from)).udp(53, port).build();
    let first = bench.send(15 + from, &there).verdict;
    if matches!(first, Verdict::Forward(_)) {
        bench.send(15 + to, &back);
        bench.send(15 + from, &there);
    }
    first
}

/// Pods 1 to 4 of one namespace, as many connections as they get.
fn flood(bench: &mut Bench, pods: std::ops::RangeInclusive<u16>) -> u32 {
    let mut opened = 0;
    for from in pods {
        for port in 1_000.. {
            if !matches!(establish(bench, from, 6, port), Verdict::Forward(_)) {
                break;
            }
            opened += 1;
        }
    }
    opened
}

#[test]
fn k04_a_namespace_that_fills_the_table_leaves_room_for_another() {
    let capacity = Capacity {
        connections: 16_384,
        ..Capacity::TINY
    };
    for tenant_share in [75, 100] {
        let shares = ConnectionsRow {
            tenant_share,
            ..ConnectionsRow::default()
        };
        // Four pods of namespace 1, one of namespace 2, and one that answers, of namespace 3.
        let mut bench = node(capacity, &[1, 1, 1, 1, 2, 3], shares);
        let opened = flood(&mut bench, 1..=4);
        assert_eq!(opened, 16_384 * u32::from(tenant_share) / 100);
        // What is used goes on being used; the rest is idle.
        bench.wait(Duration::from_secs(50));
        for port in 1_000..1_100 {
            establish(&mut bench, 1, 6, port);
        }
        for port in 1_000..2_000 {
            let verdict = establish(&mut bench, 5, 6, port);
            assert!(
                matches!(verdict, Verdict::Forward(_)),
                "{port}: {verdict:?}"
            );
        }
        let ct = bench.pipeline.conntrack();
        assert_eq!(ct.talker(LinkId::new(20).unwrap()).connections, 1_000);
        let evicted = ct.counters().evicted_established;
        assert_eq!(evicted, if tenant_share == 100 { 1_000 } else { 0 });
        // Those in use were not the longest idle.
        let committed = ct.counters().committed;
        for port in 1_000..1_100 {
            establish(&mut bench, 1, 6, port);
        }
        let ct = bench.pipeline.conntrack();
        assert_eq!(ct.counters().committed, committed);
        ct.audit().unwrap();
    }
}

#[test]
fn k04_strangers_leave_room_for_pods_and_pods_for_strangers() {
    let capacity = Capacity {
        connections: 8_192,
        ..Capacity::TINY
    };
    let all = ConnectionsRow {
        pod_share: 100,
        tenant_share: 100,
        ..ConnectionsRow::default()
    };
    // Clients outside, by a port of the node that leads to pod 2.
    let svc = {
        let mut svc = node::Svc::new(&[("10.0.0.2", 53)], &[("10.0.0.2", 53)]);
        svc.protocol = sluice_contract::Protocol::Udp;
        svc.external_local = true;
        svc
    };
    let client = |n: u16| {
        let [a, b] = n.to_be_bytes();
        let source = format!("100.64.{a}.{b}");
        let there = packet(UPLINK, &source, V4.load_balancer).udp(9, 80).build();
        let back = packet(17, "10.0.0.2", &source).udp(53, 9).build();
        (there, back)
    };
    let mut bench = node(capacity, &[1, 2, 3, 3, 3, 3], all);
    bench.commit(&svc.rows(&V4));
    for n in 0..10_000 {
        let (there, back) = client(n);
        if !matches!(bench.send(UPLINK, &there).verdict, Verdict::Forward(_)) {
            break;
        }
        bench.send(17, &back);
        bench.send(UPLINK, &there);
    }
    assert_eq!(bench.pipeline.conntrack().used(), 8_192);
    for port in 1_000..1_400 {
        let verdict = establish(&mut bench, 1, 6, port);
        assert!(
            matches!(verdict, Verdict::Forward(_)),
            "{port}: {verdict:?}"
        );
    }
    // The other way round: a namespace has everything, and clients outside get a sixteenth of it.
    let mut bench = node(capacity, &[1, 2, 3, 3, 3, 3], all);
    bench.commit(&svc.rows(&V4));
    assert_eq!(flood(&mut bench, 1..=1), 8_192);
    let mut served = 0;
    for n in 0..1_000 {
        let (there, back) = client(n);
        served += u32::from(matches!(
            bench.send(UPLINK, &there).verdict,
            Verdict::Forward(_)
        ));
        bench.send(17, &back);
        bench.send(UPLINK, &there);
    }
    let held = bench
        .pipeline
        .conntrack()
        .held_by(Group::of(LinkId::UPLINK, Tenant::NONE));
    assert_eq!((served, held), (512, 512));
    bench.pipeline.conntrack().audit().unwrap();
}

#[test]
fn k04_a_link_that_another_namespace_gets_is_counted_there() {
    let mut bench = node(
        Capacity::TINY,
        &[1, 1, 1, 1, 1, 3],
        ConnectionsRow::default(),
    );
    let held = |bench: &Bench, tenant: u16| {
        let tenant = Tenant::new(tenant).unwrap();
        bench
            .pipeline
            .conntrack()
            .held_by(Group::of(LinkId::new(16).unwrap(), tenant))
    };
    establish(&mut bench, 1, 6, 1);
    establish(&mut bench, 2, 6, 1);
    assert_eq!((held(&bench, 1), held(&bench, 2)), (2, 0));
    let mut row = pod_row(16, 1);
    row.tenant = Tenant::new(2).unwrap();
    bench.commit(&[Row::Link(row)]);
    establish(&mut bench, 1, 6, 2);
    assert_eq!((held(&bench, 1), held(&bench, 2)), (1, 2));
}

/// A datagram of 1 600 bytes in two fragments.
fn datagram(link: u16, source: &str, to: &str, id: u16) -> [Vec<u8>; 2] {
    let whole = packet(link, source, to)
        .udp(7_000, 9_000)
        .payload(&[5; 1_592])
        .build();
    let payload = &whole[34..];
    [(0, &payload[..800]), (100, &payload[800..])].map(|(offset, part)| {
        let mut builder: Builder = packet(link, source, to).raw(17).payload(part);
        builder.identification = id;
        builder.fragment = offset | if offset == 0 { ipv4::MF } else { 0 };
        builder.build()
    })
}

/// Sends `count` datagrams of a link, each with a flood of random ones of pod 1 between its fragments; returns how many arrived.
fn delivered(bench: &mut Bench, link: u16, source: &str, count: u16) -> u16 {
    let (mut arrived, mut random) = (0, 1u32);
    for id in 0..count {
        let [first, last] = datagram(link, source, "10.0.0.6", id);
        let first = bench.send(link, &first).verdict;
        for n in 0..1_500 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let flood = datagram(16, "10.0.0.1", "10.0.0.6", (random >> 16) as u16);
            // First ones, and later ones whose first one never comes.
            bench.send(16, &flood[n % 2]);
        }
        let last = bench.send(link, &last).verdict;
        let both = [first, last].map(|verdict| matches!(verdict, Verdict::Forward(_)));
        arrived += u16::from(both == [true; 2]);
    }
    arrived
}

#[test]
fn m11_a_pod_that_floods_with_fragments_leaves_room_for_those_of_others() {
    let mut bench = node(
        Capacity::TINY,
        &[1, 1, 2, 2, 2, 3],
        ConnectionsRow::default(),
    );
    // Datagrams that arrive late are worth nothing, so both fragments count only if both are sent on at once.
    assert_eq!(
        delivered(&mut bench, 18, "10.0.0.3", 40),
        40,
        "of another namespace"
    );
    assert_eq!(
        delivered(&mut bench, UPLINK, "203.0.113.5", 40),
        40,
        "from outside"
    );
    // Later fragments that wait for their first one: the flood keeps no more than it leaves.
    let [first, last] = datagram(18, "10.0.0.3", "10.0.0.6", 999);
    bench.originated.0.clear();
    assert_eq!(bench.send(18, &last).verdict, Verdict::Held);
    bench.send(18, &first).forwarded(21);
    assert_eq!(bench.originated.0.len(), 1);
    assert!(bench.pipeline.stats().dropped(DropReason::FragmentLimit) > 1_000);
}

#[test]
fn m11_fragments_of_pods_behind_one_address_have_identifications_of_their_own() {
    let mut bench = node(
        Capacity::TINY,
        &[1, 2, 3, 3, 3, 3],
        ConnectionsRow::default(),
    );
    let mut seen = Vec::new();
    for (link, source) in [(16, "10.0.0.1"), (17, "10.0.0.2")] {
        let pieces = datagram(link, source, V4.outside, 7);
        let ids = pieces.map(|piece| {
            let end = bench.send(link, &piece);
            let sent = end.forwarded(UPLINK);
            assert_eq!(&sent[26..30], [192, 168, 0, 10]);
            let header = sluice_appliance::wire::checksum::sum(&sent[14..34], 0);
            assert_eq!(sluice_appliance::wire::checksum::finish(header), 0);
            [sent[18], sent[19]]
        });
        assert_eq!(ids[0], ids[1], "the pieces of a datagram belong together");
        seen.push(ids[0]);
    }
    assert_ne!(seen[0], seen[1]);
}
