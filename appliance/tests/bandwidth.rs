//! Row B-07: a link's token buckets, by virtual time, through the whole pipeline.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::testing::node::{self, Addresses, BOTH, packet};
use sluice_appliance::testing::{Bench, pod_row};
use sluice_appliance::time::Duration;
use sluice_appliance::{Gso, GsoKind, Offload, Verdict};
use sluice_contract::report::{Field, Reject, RejectReason};
use sluice_contract::row::{BandwidthRow, Rate};
use sluice_contract::{DropReason, Key, LinkId, Row, ToGuest};

const MBIT: u64 = 1_000_000;

fn link(id: u16) -> LinkId {
    LinkId::new(id).unwrap()
}

fn rate(mbit: u64, burst: u32) -> Option<Rate> {
    Some(Rate {
        bits_per_second: mbit * MBIT,
        burst,
    })
}

fn row(id: u16, ingress: Option<Rate>, egress: Option<Rate>) -> Row {
    Row::Bandwidth(BandwidthRow {
        link: link(id),
        ingress,
        egress,
    })
}

/// Frames of 1000 bytes from pod to pod, one every `gap` µs for ten seconds; the bits that came through in a second.
fn bits_per_second(bench: &mut Bench, from: usize, to: usize, a: &Addresses, gap: u64) -> u64 {
    let ingress = 16 + u16::try_from(from).unwrap();
    let headers = packet(ingress, a.pods[from], a.pods[to]).build().len();
    let frame = packet(ingress, a.pods[from], a.pods[to])
        .payload(&vec![0; 1000 - headers])
        .build();
    let mut passed = 0;
    for _ in 0..10_000_000 / gap {
        bench.now = bench.now + Duration::from_micros(gap);
        if let Verdict::Forward(_) = bench.send(ingress, &frame).verdict {
            passed += frame.len() as u64;
        }
    }
    passed * 8 / 10
}

fn assert_about(bits: u64, mbit: u64) {
    let wanted = mbit * MBIT;
    assert!(
        (wanted * 99 / 100..=wanted * 102 / 100).contains(&bits),
        "{bits} bit/s instead of {wanted}"
    );
}

#[test]
fn b07_a_pod_sends_and_is_sent_its_rate_and_no_more() {
    for a in BOTH {
        let mut bench = node::node();
        bench.commit(&[
            row(16, rate(20, 10_000), rate(8, 10_000)),
            row(17, rate(4, 10_000), None),
        ]);
        // 80 Mbit/s are offered each time.
        let gap = 100;
        assert_about(bits_per_second(&mut bench, 0, 2, &a, gap), 8);
        let stats = bench.pipeline.stats();
        let dropped = stats.dropped(DropReason::BandwidthEgress);
        assert!(dropped > 80_000, "{dropped}");
        assert_eq!(stats.dropped(DropReason::BandwidthIngress), 0);
        assert_about(bits_per_second(&mut bench, 2, 0, &a, gap), 20);
        assert_about(bits_per_second(&mut bench, 0, 1, &a, gap), 4);
        assert_about(bits_per_second(&mut bench, 1, 2, &a, gap), 80);
        let stats = bench.pipeline.stats();
        assert!(stats.dropped(DropReason::BandwidthIngress) > 70_000);
    }
}

#[test]
fn b07_a_burst_goes_at_once_and_comes_back_with_time() {
    let a = node::V4;
    let mut bench = node::node();
    bench.commit(&[row(16, None, rate(8, 50_000))]);
    let frame = packet(16, a.pods[0], a.pods[1]).payload(&[0; 958]).build();
    assert_eq!(frame.len(), 1000);
    let at_once = |bench: &mut Bench| {
        (0..200)
            .filter(|_| matches!(bench.send(16, &frame).verdict, Verdict::Forward(_)))
            .count()
    };
    assert_eq!(
        at_once(&mut bench),
        51,
        "the burst, and the frame that leaves a debt"
    );
    // 8 Mbit/s are a thousand bytes in a millisecond.
    bench.now = bench.now + Duration::from_millis(10);
    assert_eq!(at_once(&mut bench), 10);
    bench.now = bench.now + Duration::from_secs(60);
    assert_eq!(at_once(&mut bench), 51, "never more than a burst");
}

#[test]
fn b07_a_frame_for_many_segments_counts_by_the_bytes_of_all_and_passes_a_small_bucket() {
    let a = node::V4;
    let mut bench = node::node();
    bench.commit(&[row(16, None, rate(8, 1_500))]);
    let head = packet(16, a.pods[0], a.pods[1])
        .tcp(1000, 80, sluice_appliance::wire::tcp::SYN)
        .build();
    let offload = |tail: usize| Offload {
        partial: None,
        verified: true,
        gso: Some(Gso {
            kind: GsoKind::Tcp4,
            size: 1_000,
            header: u16::try_from(head.len()).unwrap(),
            ecn: false,
        }),
        tunnel: (tail == 0).then(|| unreachable!()),
    };
    // Sixty segments of 54 + 1000 bytes.
    let tail = 60_000;
    let sent = bench.send_with(16, &head, tail, offload(tail));
    assert!(matches!(sent.verdict, Verdict::Forward(_)), "{sent:?}");
    let on_the_wire = 60 * (head.len() as u64 + 1_000);
    let debt = Duration::from_micros(on_the_wire - 1_500);
    let small = packet(16, a.pods[0], a.pods[2]).build();
    bench.now = bench.now + Duration::from_micros(debt.micros() - 1);
    assert_eq!(
        bench.send(16, &small).dropped(),
        DropReason::BandwidthEgress
    );
    bench.now = bench.now + Duration::from_micros(1);
    bench.send(16, &small).forwarded(18);
}

#[test]
fn b07_what_is_dropped_begins_no_connection() {
    let a = node::V4;
    let mut bench = node::node();
    bench.commit(&[row(17, rate(1, 1), None)]);
    let frame = |port| packet(16, a.pods[0], a.pods[1]).udp(port, 53).build();
    bench.send(16, &frame(1)).forwarded(17);
    let before = bench.pipeline.conntrack().used();
    assert_eq!(
        bench.send(16, &frame(2)).dropped(),
        DropReason::BandwidthIngress
    );
    assert_eq!(bench.pipeline.conntrack().used(), before);
}

#[test]
fn b07_limits_come_change_and_go_as_rows_and_the_next_pod_of_a_link_owes_nothing() {
    let a = node::V4;
    let mut bench = node::node();
    let frame = packet(16, a.pods[0], a.pods[1]).payload(&[0; 958]).build();
    let limited = |bench: &mut Bench| {
        let verdicts = [
            bench.send(16, &frame).verdict,
            bench.send(16, &frame).verdict,
        ];
        verdicts[1] == Verdict::Drop(DropReason::BandwidthEgress)
    };
    assert!(!limited(&mut bench));
    // A second's worth of debt with every frame.
    bench.commit(&[row(16, None, rate(1, 1))]);
    assert!(limited(&mut bench));
    let mut again = pod_row(16, 1);
    again.incarnation = 2;
    bench.commit(&[Row::Link(again)]);
    assert!(
        matches!(bench.send(16, &frame).verdict, Verdict::Forward(_)),
        "what the former pod owes"
    );
    assert!(limited(&mut bench), "the row outlives a put of the link");
    let without = bench.change(&[ToGuest::Remove(Key::Link(link(16)))]);
    assert!(without.is_whole(), "{without:?}");
    assert_eq!(bench.send(16, &frame).dropped(), DropReason::UnknownLink);
    let mut third = pod_row(16, 1);
    third.incarnation = 3;
    bench.commit(&[Row::Link(third)]);
    assert!(limited(&mut bench), "and a link that was away");
    let removed = bench.change(&[ToGuest::Remove(Key::Bandwidth(link(16)))]);
    assert!(removed.is_whole(), "{removed:?}");
    assert!(!limited(&mut bench));
}

#[test]
fn b08_rows_that_cannot_be_are_refused_by_field() {
    let mut bench = node::node();
    let nothing = Some(Rate {
        bits_per_second: 0,
        burst: 1,
    });
    let cases = [
        (row(16, nothing, None), Field::Rate, RejectReason::Invalid),
        (
            row(16, None, rate(1, 0)),
            Field::Rate,
            RejectReason::Invalid,
        ),
        (row(16, None, None), Field::Whole, RejectReason::Invalid),
        (row(2, rate(1, 1), None), Field::Link, RejectReason::Invalid),
    ];
    for (row, field, reason) in cases {
        let key = row.key();
        bench.change(&[ToGuest::Put(row)]);
        let object = Some(key);
        let reject = Reject {
            object,
            field,
            reason,
        };
        assert_eq!(bench.refused, [reject]);
    }
    bench.change(&[ToGuest::Remove(Key::Bandwidth(link(16)))]);
    assert_eq!(bench.refused.len(), 1);
}
