//! The guest's end of the control channel: changes that hold or leave no trace, sessions that survive loss and replay.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use proptest::prelude::*;
use sluice_appliance::session::{Facts, Order, Session};
use sluice_appliance::testing::{self, Bench, Builder, pod_row};
use sluice_contract::message::{Envelope, Level};
use sluice_contract::report::{CounterId, Field, Reject, RejectReason};
use sluice_contract::row::LinkRow;
use sluice_contract::{DropReason, Generation, Key, LinkId, Mac, Row, ToGuest, ToHost, VERSION};

struct Host {
    bench: Bench,
    session: Session,
    id: u64,
    sequence: u32,
    sent: Vec<Envelope<ToGuest>>,
}

impl Host {
    fn new() -> Self {
        let mut host = Self {
            bench: Bench::empty(sluice_appliance::Capacity::TINY),
            session: Session::new(Facts {
                image: [3; 20],
                ram_mib: 64,
            }),
            id: 77,
            sequence: 0,
            sent: Vec::new(),
        };
        let hello = host.say(ToGuest::Hello { version: VERSION });
        assert!(matches!(hello[..], [ToHost::Hello(_)]));
        host
    }

    fn say(&mut self, message: ToGuest) -> Vec<ToHost> {
        let envelope = Envelope {
            session: self.id,
            sequence: self.sequence,
            message,
        };
        self.sequence += 1;
        self.sent.push(envelope.clone());
        self.give(&envelope)
    }

    fn give(&mut self, envelope: &Envelope<ToGuest>) -> Vec<ToHost> {
        while !self.session.is_ready(&self.bench.pipeline) {
            self.bench.pipeline.work(64);
        }
        let order = self.session.receive(envelope, &mut self.bench.pipeline, 5);
        assert_eq!(order, Order::Continue);
        std::iter::from_fn(|| self.session.poll(&mut self.bench.pipeline))
            .map(|envelope| envelope.message)
            .collect()
    }

    fn change(&mut self, generation: u64, fresh: bool, rows: Vec<Row>) -> Vec<ToHost> {
        let generation = Generation(generation);
        let mut answers = self.say(ToGuest::Begin { generation, fresh });
        for row in rows {
            answers.extend(self.say(ToGuest::Put(row)));
        }
        answers.extend(self.say(ToGuest::Commit { generation }));
        answers
    }

    fn ping(&mut self) -> bool {
        let frame = Builder::from(16, "10.0.0.1", "10.0.0.2").build();
        self.bench.send(16, &frame).verdict
            == sluice_appliance::Verdict::Forward(LinkId::new(17).unwrap())
    }
}

fn two() -> Vec<Row> {
    vec![Row::Link(pod_row(16, 1)), Row::Link(pod_row(17, 2))]
}

const fn ack(generation: u64) -> ToHost {
    left(generation, 0)
}

/// In force without so many rows.
const fn left(generation: u64, refused: u32) -> ToHost {
    ToHost::Ack {
        generation: Generation(generation),
        refused,
    }
}

fn refused(generation: u64, rows: &[Reject]) -> ToHost {
    ToHost::Refused {
        generation: Generation(generation),
        rows: heapless::Vec::from_slice(rows).unwrap(),
    }
}

#[test]
fn z05_no_frame_passes_before_the_first_commit() {
    let mut host = Host::new();
    host.say(ToGuest::Begin {
        generation: Generation(1),
        fresh: true,
    });
    for row in two() {
        assert_eq!(host.say(ToGuest::Put(row)), []);
    }
    assert!(!host.ping());
    assert_eq!(
        host.bench.pipeline.stats().dropped(DropReason::UnknownLink),
        1
    );
    assert_eq!(
        host.say(ToGuest::Commit {
            generation: Generation(1)
        }),
        [ack(1)]
    );
    assert!(host.ping());
}

#[test]
fn another_version_is_refused_with_both_numbers_and_then_silence() {
    let mut host = Host::new();
    host.id = 78;
    host.sequence = 0;
    let answers = host.say(ToGuest::Hello {
        version: VERSION + 1,
    });
    assert!(matches!(&answers[..], [ToHost::Hello(hello)] if hello.version == VERSION));
    assert_eq!(host.change(1, true, two()), []);
    assert_eq!(host.say(ToGuest::Ping { token: 1 }), []);
    assert!(!host.ping());
}

#[test]
fn z10_replayed_messages_are_ignored_and_counted() {
    let mut host = Host::new();
    assert_eq!(host.change(1, true, two()), [ack(1)]);
    host.change(2, false, vec![Row::Link(pod_row(18, 3))]);
    for envelope in host.sent.clone() {
        assert_eq!(host.give(&envelope), []);
    }
    let replayed = host.sent.len() as u64;
    assert_eq!(host.bench.pipeline.stats().machine.control_stale, replayed);
    assert_eq!(host.bench.pipeline.tables().generation(), Generation(2));
    // The hello of a former session neither.
    let old = host.sent[0].clone();
    host.id = 79;
    host.sequence = 0;
    assert!(matches!(
        host.say(ToGuest::Hello { version: VERSION })[..],
        [ToHost::Hello(_)]
    ));
    assert_eq!(host.give(&old), []);
    assert_eq!(
        host.say(ToGuest::Ping { token: 4 }),
        [ToHost::Pong { token: 4 }]
    );
    assert!(host.ping());
}

#[test]
fn a_gap_asks_for_everything_again_and_loses_nothing_in_force() {
    let mut host = Host::new();
    host.change(1, true, two());
    host.say(ToGuest::Begin {
        generation: Generation(2),
        fresh: false,
    });
    let expected = host.sequence;
    host.sequence += 1;
    let lost = host.say(ToGuest::Put(Row::Link(pod_row(18, 3))));
    assert_eq!(lost, [ToHost::Resync { expected }]);
    assert_eq!(host.say(ToGuest::Put(Row::Link(pod_row(19, 4)))), []);
    let commit = host.say(ToGuest::Commit {
        generation: Generation(2),
    });
    assert!(matches!(commit[..], [ToHost::Resync { .. }]));
    assert!(host.ping());
    assert_eq!(host.bench.pipeline.tables().generation(), Generation(1));
    assert_eq!(host.change(3, true, two()), [ack(3)]);
    assert!(
        host.bench
            .pipeline
            .tables()
            .link(LinkId::new(18).unwrap())
            .is_none()
    );
}

#[test]
fn fresh_keeps_exactly_the_rows_put_again() {
    let mut host = Host::new();
    host.change(1, true, two());
    assert_eq!(
        host.change(2, true, vec![Row::Link(pod_row(16, 1))]),
        [ack(2)]
    );
    assert!(!host.ping());
    assert_eq!(host.bench.pipeline.stats().dropped(DropReason::NoRoute), 1);
    assert_eq!(
        host.change(3, false, vec![Row::Link(pod_row(17, 2))]),
        [ack(3)]
    );
    assert!(host.ping());
}

#[test]
fn a_bad_row_is_refused_by_name_and_field_and_the_others_are_in_force() {
    let bad = |change: &dyn Fn(&mut LinkRow)| {
        let mut row = pod_row(18, 3);
        change(&mut row);
        row
    };
    let own = |text: &str| {
        let address = text.parse().unwrap();
        move |row: &mut LinkRow| row.addresses.push(address).unwrap()
    };
    let cases: Vec<(LinkRow, Field, RejectReason)> = vec![
        (
            bad(&|r| r.id = LinkId::new(5).unwrap()),
            Field::Id,
            RejectReason::Invalid,
        ),
        (
            bad(&|r| r.mac = Mac::BROADCAST),
            Field::Mac,
            RejectReason::Invalid,
        ),
        (
            bad(&|r| r.mac = Mac::GATEWAY),
            Field::Mac,
            RejectReason::Invalid,
        ),
        (
            bad(&|r| r.mac = Mac([0; 6])),
            Field::Mac,
            RejectReason::Invalid,
        ),
        (bad(&|r| r.mtu = 1279), Field::Mtu, RejectReason::Invalid),
        (bad(&own("10.0.0.1")), Field::Addresses, RejectReason::Taken),
        (bad(&own("fd00::2")), Field::Addresses, RejectReason::Taken),
        (
            bad(&own("127.0.0.1")),
            Field::Addresses,
            RejectReason::Invalid,
        ),
        (
            bad(&own("224.0.0.1")),
            Field::Addresses,
            RejectReason::Invalid,
        ),
        (
            bad(&own("169.254.1.1")),
            Field::Addresses,
            RejectReason::Invalid,
        ),
        (
            bad(&own("fe80::7")),
            Field::Addresses,
            RejectReason::Invalid,
        ),
        (bad(&own("::")), Field::Addresses, RejectReason::Invalid),
    ];
    let mut host = Host::new();
    host.change(1, true, two());
    for (at, (row, field, reason)) in cases.into_iter().enumerate() {
        let generation = 2 + at as u64;
        let object = Some(Key::Link(row.id));
        let good = Row::Link(pod_row(19, 4));
        let answers = host.change(generation, false, vec![good, Row::Link(row)]);
        let reject = Reject {
            object,
            field,
            reason,
        };
        assert_eq!(
            answers,
            [refused(generation, &[reject]), left(generation, 1)]
        );
        let tables = host.bench.pipeline.tables();
        assert_eq!(tables.generation(), Generation(generation));
        assert!(tables.link(LinkId::new(18).unwrap()).is_none());
        assert!(tables.link(LinkId::new(19).unwrap()).is_some());
        assert!(host.ping());
    }
}

#[test]
fn messages_out_of_order_are_refused() {
    let mut host = Host::new();
    let refused = |answers: Vec<ToHost>| {
        matches!(
            answers[..],
            [ToHost::Reject {
                reject: Reject {
                    reason: RejectReason::OutOfOrder,
                    ..
                },
                ..
            }]
        )
    };
    assert!(refused(host.say(ToGuest::Put(Row::Link(pod_row(16, 1))))));
    host.say(ToGuest::Begin {
        generation: Generation(1),
        fresh: true,
    });
    assert!(refused(host.say(ToGuest::Commit {
        generation: Generation(2)
    })));
    host.say(ToGuest::Begin {
        generation: Generation(3),
        fresh: true,
    });
    assert!(matches!(
        host.say(ToGuest::Begin {
            generation: Generation(0),
            fresh: true
        })[..],
        [ToHost::Reject { .. }]
    ));
}

#[test]
fn an_address_moves_between_links_when_its_old_link_goes_first() {
    let mut host = Host::new();
    host.change(1, true, two());
    let mut moved = pod_row(18, 2);
    moved.incarnation = 2;
    let messages = [
        ToGuest::Remove(Key::Link(LinkId::new(17).unwrap())),
        ToGuest::Put(Row::Link(moved)),
    ];
    assert!(host.bench.change(&messages).is_whole());
    let frame = Builder::from(16, "10.0.0.1", "10.0.0.2").build();
    host.bench.send(16, &frame).forwarded(18);
}

#[test]
fn statistics_come_in_pages_and_sum_up() {
    let mut host = Host::new();
    let rows = (1..=200).map(|n| Row::Link(pod_row(15 + n, n))).collect();
    host.change(1, true, rows);
    for n in 1..=200u16 {
        let source = format!("10.0.0.{n}");
        let frame = Builder::from(15 + n, &source, "10.0.0.1").build();
        host.bench.send(15 + n, &frame);
    }
    host.bench.send(999, &[0; 20]);
    let answers = host.say(ToGuest::ReadStats { token: 9 });
    assert!(answers.len() > 5);
    let mut received = 0;
    let mut total = 0;
    for (at, answer) in answers.iter().enumerate() {
        let ToHost::Stats {
            token: 9,
            counters,
            last,
        } = answer
        else {
            panic!("{answer:?}")
        };
        assert_eq!(*last, at + 1 == answers.len());
        for counter in counters {
            match counter.id {
                CounterId::Received => total = counter.value,
                CounterId::LinkReceived(_) => received += counter.value,
                CounterId::Dropped(reason) => assert_eq!(reason, DropReason::UnknownLink),
                _ => {}
            }
        }
    }
    assert_eq!((total, received), (201, 201));
}

#[test]
fn log_lines_are_cut_at_a_character() {
    let mut host = Host::new();
    host.session.log(Level::Warn, &"ü".repeat(200));
    let answers = host.say(ToGuest::Ping { token: 0 });
    let [ToHost::Pong { .. }, ToHost::Log { text, .. }] = &answers[..] else {
        panic!("{answers:?}")
    };
    assert_eq!(text.len(), 160);
}

#[test]
fn a_change_of_ten_thousand_rows_is_applied_in_slices() {
    let mut host = Host::new();
    host.change(1, true, two());
    host.say(ToGuest::Begin {
        generation: Generation(2),
        fresh: true,
    });
    let mut slices = 0;
    while host.bench.pipeline.is_applying() {
        host.bench.pipeline.work(64);
        assert!(host.ping(), "packets pass between the slices");
        slices += 1;
    }
    assert!(slices > 64, "{slices}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn z10_any_loss_and_repetition_ends_in_the_state_that_was_sent_or_a_resync(
        deliveries in proptest::collection::vec(0..3u8, 0..40),
    ) {
        let mut host = Host::new();
        host.change(1, true, two());
        // A second change, of which messages get lost or come twice.
        let generation = Generation(2);
        let mut messages = vec![ToGuest::Begin { generation, fresh: false }];
        messages.extend((3..30).map(|n| ToGuest::Put(Row::Link(pod_row(15 + n, n)))));
        messages.push(ToGuest::Commit { generation });
        let mut answers = Vec::new();
        for (at, message) in messages.into_iter().enumerate() {
            let envelope = Envelope { session: host.id, sequence: host.sequence, message };
            host.sequence += 1;
            for _ in 0..*deliveries.get(at).unwrap_or(&1) {
                answers.extend(host.give(&envelope));
            }
        }
        answers.extend(host.say(ToGuest::Ping { token: 1 }));
        let resync = answers.iter().any(|a| matches!(a, ToHost::Resync { .. }));
        let acked = answers.contains(&ack(2));
        prop_assert!(resync != acked);
        prop_assert_eq!(host.bench.pipeline.tables().generation(), Generation(if acked { 2 } else { 1 }));
        prop_assert!(host.ping());
    }

    #[test]
    fn z10_noise_on_the_channel_changes_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        testing::fuzz_control(&bytes);
    }
}
