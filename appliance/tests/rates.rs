//! Row B-09: packets and new connections in a second, by virtual time, through the whole pipeline.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use core::num::NonZeroU32;

use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{self, BOTH, V4, packet};
use sluice_appliance::time::Duration;
use sluice_appliance::{Capacity, Verdict};
use sluice_contract::report::{Field, RejectReason};
use sluice_contract::row::RatesRow;
use sluice_contract::{DropReason, Key, LinkId, Row, ToGuest};

fn link(id: u16) -> LinkId {
    LinkId::new(id).unwrap()
}

/// A node with room for as many connections as are opened here.
fn node() -> Bench {
    let mut bench = Bench::empty(Capacity::default());
    bench.commit(&node::node_rows());
    bench
}

fn no_rates(id: u16) -> RatesRow {
    RatesRow {
        link: link(id),
        ingress_packets: None,
        egress_packets: None,
        ingress_connections: None,
        egress_connections: None,
    }
}

/// Packets of ten seconds, one a millisecond, each of its own flow or all of one; how many came through.
fn passed(bench: &mut Bench, a: &node::Addresses, one_flow: bool) -> u32 {
    (0..10_000u16)
        .map(|n| {
            bench.now = bench.now + Duration::from_millis(1);
            let port = if one_flow { 9 } else { 1_000 + n };
            let sent = packet(16, a.pods[0], a.pods[1]).udp(port, 53).build();
            u32::from(matches!(bench.send(16, &sent).verdict, Verdict::Forward(_)))
        })
        .sum()
}

#[test]
fn b09_packets_and_new_connections_are_limited_each_way_with_reasons_of_their_own() {
    let rate = NonZeroU32::new(100);
    for a in BOTH {
        for (row, one_flow, reason, burst) in [
            (
                RatesRow {
                    egress_packets: rate,
                    ..no_rates(16)
                },
                true,
                DropReason::PacketRateEgress,
                64,
            ),
            (
                RatesRow {
                    ingress_packets: rate,
                    ..no_rates(17)
                },
                true,
                DropReason::PacketRateIngress,
                64,
            ),
            (
                RatesRow {
                    egress_connections: rate,
                    ..no_rates(16)
                },
                false,
                DropReason::ConnectionRateEgress,
                100,
            ),
            (
                RatesRow {
                    ingress_connections: rate,
                    ..no_rates(17)
                },
                false,
                DropReason::ConnectionRateIngress,
                100,
            ),
        ] {
            let mut bench = node();
            bench.commit(&[Row::Rates(row)]);
            let passed = passed(&mut bench, &a, one_flow);
            assert!(passed.abs_diff(1_000 + burst) <= 2, "{reason:?}: {passed}");
            assert_eq!(
                bench.pipeline.stats().dropped(reason),
                u64::from(10_000 - passed)
            );
        }
    }
}

#[test]
fn b09_a_limit_of_connections_costs_established_ones_nothing() {
    let mut bench = node();
    bench.commit(&[Row::Rates(RatesRow {
        egress_connections: NonZeroU32::new(1),
        ..no_rates(16)
    })]);
    assert_eq!(passed(&mut bench, &V4, true), 10_000);
    // Without the row there is no limit, and the other pod never had one.
    bench.change(&[ToGuest::Remove(Key::Rates(link(16)))]);
    assert_eq!(passed(&mut bench, &V4, false), 10_000);
}

#[test]
fn b09_a_row_comes_before_its_link_or_after_it_and_nonsense_is_refused() {
    let mut bench = node();
    let mut row = no_rates(16);
    let refused = |bench: &mut Bench, row: RatesRow| {
        bench.change(&[ToGuest::Put(Row::Rates(row))]);
        let [reject] = bench.refused[..] else {
            panic!("{:?}", bench.refused);
        };
        (reject.field, reject.reason)
    };
    assert_eq!(
        refused(&mut bench, row),
        (Field::Whole, RejectReason::Invalid)
    );
    row.egress_connections = NonZeroU32::new(1);
    let of_uplink = RatesRow {
        link: LinkId::UPLINK,
        ..row
    };
    assert_eq!(
        refused(&mut bench, of_uplink),
        (Field::Link, RejectReason::Invalid)
    );
    // The limit stays when the link's row is put again, and beside a limit to its bandwidth.
    bench.commit(&[Row::Rates(row)]);
    bench.commit(&[Row::Link(sluice_appliance::testing::pod_row(16, 1))]);
    let opened = passed(&mut bench, &V4, false);
    assert!((10..=12).contains(&opened), "{opened}");
}
