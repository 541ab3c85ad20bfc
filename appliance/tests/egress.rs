//! What pods may not send out of the cluster, and how what they send is marked.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::ecn;
use sluice_appliance::frame::{Frame, Offload};
use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{
    self, Addresses, BOTH, UPLINK, V4, assert_checksums, ends, ip, packet,
};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::tcp;
use sluice_contract::policy::{
    Action, BindingRow, Established, Layer, LayerId, PolicyRow, RuleId, RulesetId, RulesetRow,
    SettingsRow, SpanEntry, SpanId, SpanRow, Target, port_key,
};
use sluice_contract::report::{CounterId, Field, RejectReason};
use sluice_contract::row::MarkingRow;
use sluice_contract::{DropReason, Key, LinkId, Protocol, Row, ToGuest};
use std::collections::BTreeMap;

/// Before the frame, for what a tunnel adds.
const HEADROOM: usize = 128;

/// For pod 16: 203.0.113.0/24 is forbidden altogether, of 198.18.0.0/15 only TCP 25.
fn deny_list(audit: bool) -> Vec<Row> {
    let span = |id, entries: &[SpanEntry]| {
        Row::Policy(PolicyRow::Span(SpanRow {
            id: SpanId(id),
            entries: heapless::Vec::from_slice(entries).unwrap(),
        }))
    };
    let entry = |start, target| SpanEntry { start, target };
    let deny = |rule| Target::Rule {
        action: Action::Deny,
        order: 1,
        rule: RuleId(rule),
    };
    let v4 = |a, b, c| u32::from_be_bytes([a, b, c, 0]);
    let smtp = port_key(Some(Protocol::Tcp), 25);
    let layer = Layer {
        id: LayerId(1),
        classes: false,
        pods: SpanId::NOTHING,
        others: SpanId::NOTHING,
        v4: SpanId(1),
        v6: SpanId::NOTHING,
        miss: Action::Accept,
        miss_rule: RuleId(90),
    };
    vec![
        Row::Policy(PolicyRow::Settings(SettingsRow {
            unbound: Action::Accept,
            host_reaches_pods: true,
            established: Established::Judged,
            audit,
            audit_node: false,
            unlisted_pods: false,
        })),
        span(
            2,
            &[
                entry(0, Target::Nothing),
                entry(smtp, deny(21)),
                entry(smtp + 1, Target::Nothing),
            ],
        ),
        span(3, &[entry(0, deny(20))]),
        span(
            1,
            &[
                entry(0, Target::Nothing),
                entry(v4(198, 18, 0), Target::Ports(SpanId(2))),
                entry(v4(198, 20, 0), Target::Nothing),
                entry(v4(203, 0, 113), Target::Ports(SpanId(3))),
                entry(v4(203, 0, 114), Target::Nothing),
            ],
        ),
        Row::Policy(PolicyRow::Ruleset(RulesetRow {
            id: RulesetId(5),
            layers: heapless::Vec::from_slice(&[layer]).unwrap(),
        })),
        Row::Policy(PolicyRow::Binding(BindingRow {
            link: LinkId::new(16).unwrap(),
            ingress: RulesetId::NONE,
            egress: RulesetId(5),
        })),
    ]
}

const DENIED: [(&str, u16); 3] = [
    ("203.0.113.5", 443),
    ("203.0.113.9", 25),
    ("198.18.4.4", 25),
];

fn sent(to: &str, port: u16) -> Vec<u8> {
    packet(16, V4.pods[0], to).tcp(4000, port, tcp::SYN).build()
}

#[test]
fn e05_the_egress_deny_list_is_asked_before_the_source_is_rewritten() {
    let mut bench = node::node();
    bench.commit(&deny_list(false));
    for (to, port) in DENIED {
        let end = bench.send(16, &sent(to, port));
        assert_eq!(end.dropped(), DropReason::PolicyEgress, "{to}:{port}");
    }
    // Nothing was translated for what was denied.
    assert_eq!(bench.pipeline.conntrack().used(), 0);
    for (to, port) in [("198.18.4.4", 443), ("203.0.114.5", 25)] {
        let end = bench.send(16, &sent(to, port));
        assert_eq!(ends(end.forwarded(UPLINK)).0, ip(V4.node), "{to}:{port}");
    }
    // The list is the pod's own.
    let other = packet(17, V4.pods[1], "203.0.113.5").tcp(4000, 443, tcp::SYN);
    bench.send(17, &other.build()).forwarded(UPLINK);
}

#[test]
fn n16_what_an_audited_rule_denies_passes_and_is_told_once_a_second() {
    let mut bench = node::node();
    bench.commit(&deny_list(true));
    let told = |bench: &Bench, mut cursor| {
        let mut all = Vec::new();
        while let Some((event, next)) = bench.pipeline.audited().after(cursor) {
            all.push((event.peer, event.port, event.rule.0));
            cursor = next;
        }
        (all, cursor)
    };
    for (to, port) in DENIED {
        bench.send(16, &sent(to, port)).forwarded(UPLINK);
        // The connection is known now: nobody is asked about its next packet.
        bench.send(16, &sent(to, port)).forwarded(UPLINK);
    }
    let rules = [20, 20, 21];
    let expected: Vec<_> = DENIED
        .iter()
        .zip(rules)
        .map(|((to, port), rule)| (ip(to), *port, rule))
        .collect();
    let (events, cursor) = told(&bench, 0);
    assert_eq!(events, expected);
    let would_deny = |bench: &Bench| {
        let counters = counters(bench);
        counters.get(&CounterId::WouldDeny).copied()
    };
    assert_eq!(would_deny(&bench), Some(3));
    // Another connection of the same kind within the second is counted and not told again.
    let again = packet(16, V4.pods[0], DENIED[0].0).tcp(4001, 443, tcp::SYN);
    bench.send(16, &again.build()).forwarded(UPLINK);
    assert_eq!(
        (would_deny(&bench), told(&bench, cursor).0),
        (Some(4), vec![])
    );
    // What a trace asks is no connection.
    bench.now = bench.now + Duration::from_secs(2);
    let asked = packet(16, V4.pods[0], DENIED[0].0)
        .tcp(4002, 443, tcp::SYN)
        .build();
    let mut buffer = vec![0; 256];
    let end = HEADROOM + asked.len();
    buffer[HEADROOM..end].copy_from_slice(&asked);
    let (link, offload) = (LinkId::new(16).unwrap(), Offload::default());
    let mut frame = Frame::new(&mut buffer, HEADROOM, end, 0, link, offload).unwrap();
    bench.pipeline.trace(&mut frame, bench.now);
    assert_eq!(
        (would_deny(&bench), told(&bench, cursor).0),
        (Some(4), vec![])
    );
    // Enforced again, the same connection is judged anew and ends.
    bench.commit(&deny_list(false));
    let end = bench.send(16, &sent(DENIED[0].0, 443));
    assert_eq!(end.dropped(), DropReason::PolicyEgress);
}

fn counters(bench: &Bench) -> BTreeMap<CounterId, u64> {
    let mut all = BTreeMap::new();
    let mut cursor = 0;
    while let Some((counter, next)) = bench.pipeline.stats().next_from(cursor) {
        all.insert(counter.id, counter.value);
        cursor = next;
    }
    all
}

fn marking(dscp: u8) -> Row {
    Row::Marking(MarkingRow {
        link: LinkId::new(16).unwrap(),
        dscp,
    })
}

/// The traffic class of a frame that leaves.
fn class(frame: &[u8], a: &Addresses) -> u8 {
    ecn::class_of(&frame[14..], a.family).unwrap()
}

#[test]
fn e05_b11_a_pods_packets_get_the_dscp_it_is_given_and_keep_their_congestion_mark() {
    for a in BOTH {
        let mut bench = node::node();
        let sent = |port, class| {
            let mut frame = packet(16, a.pods[0], a.outside)
                .tcp(port, 443, tcp::SYN)
                .build();
            ecn::set_class(&mut frame[14..], a.family, class).unwrap();
            frame
        };
        let plain = bench
            .send(16, &sent(1, 0b1010_1001))
            .forwarded(UPLINK)
            .to_vec();
        assert_eq!(class(&plain, &a), 0b1010_1001);
        bench.commit(&[marking(46)]);
        // Of a connection that is known, of a new one, and to a pod of this node.
        for (port, mark) in [(1, 0b01), (2, 0b10), (3, 0b11)] {
            let frame = bench
                .send(16, &sent(port, 0b1010_1000 | mark))
                .forwarded(UPLINK)
                .to_vec();
            assert_eq!(class(&frame, &a), 46 << 2 | mark);
            assert_checksums(&frame);
        }
        let local = packet(16, a.pods[0], a.pods[1])
            .tcp(9, 80, tcp::SYN)
            .build();
        let frame = bench.send(16, &local).forwarded(17).to_vec();
        assert_eq!(class(&frame, &a), 46 << 2);
        assert_checksums(&frame);
        // What others send to it stays as it is, and so does what other pods send.
        let answer = packet(17, a.pods[1], a.pods[0])
            .tcp(80, 9, tcp::SYN | tcp::ACK)
            .build();
        assert_eq!(class(bench.send(17, &answer).forwarded(16), &a), 0);
        // The pod's description comes anew: the mark is a row of its own.
        bench.commit(&node::node_rows());
        assert_eq!(
            class(bench.send(16, &sent(4, 0)).forwarded(UPLINK), &a),
            46 << 2
        );
        let gone = ToGuest::Remove(Key::Marking(LinkId::new(16).unwrap()));
        assert!(bench.change(&[gone]).is_whole());
        assert_eq!(class(bench.send(16, &sent(5, 0)).forwarded(UPLINK), &a), 0);
    }
}

#[test]
fn e05_marks_that_cannot_be_are_refused_by_field() {
    let mut bench = node::node();
    let uplink = Row::Marking(MarkingRow {
        link: LinkId::UPLINK,
        dscp: 1,
    });
    let none = ToGuest::Remove(Key::Marking(LinkId::new(16).unwrap()));
    for (message, field, reason) in [
        (
            ToGuest::Put(marking(64)),
            Field::Dscp,
            RejectReason::Invalid,
        ),
        (ToGuest::Put(uplink), Field::Link, RejectReason::Invalid),
        (none, Field::Whole, RejectReason::Missing),
    ] {
        bench.change(&[message]);
        let [reject] = bench.refused[..] else {
            panic!("{:?}", bench.refused)
        };
        assert_eq!((reject.field, reject.reason), (field, reason));
    }
}
