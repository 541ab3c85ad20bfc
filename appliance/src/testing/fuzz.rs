//! What the fuzz targets run: whole pipelines fed with any bytes.

extern crate std;

use super::{Bench, Builder, node};
use crate::frame::Offload;
use crate::time::Duration;
use sluice_contract::name::NameRow;
use sluice_contract::policy::{
    Action, BindingRow, Layer, LayerId, NamedRow, PolicyRow, RuleId, RulesetId, RulesetRow,
    SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::{LinkId, Row};

/// Fuzz entry: the bytes are frames, each with a leading length and link, through a pipeline with a few pods.
/// Holds: no panic, and the counters sum up.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_frames(bytes: &[u8]) {
    KEPT.with_borrow_mut(|bench| fuzz_frames_through(bench.get_or_insert_with(fuzz_bench), bytes));
}

std::thread_local! {
    /// One pipeline for all inputs of a thread: a fixture's memory is never given back.
    static KEPT: core::cell::RefCell<Option<Bench>> = const { core::cell::RefCell::new(None) };
}

/// Fuzz entry: the bytes are a DNS message, read by itself, and sent as the answer to a question that a pod has asked.
/// Holds: no panic, no more than the budget of addresses, and only names that rules can name.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_names(bytes: &[u8]) {
    use crate::names::message::{self, RECORDS};
    let Some(question) = message::question(bytes) else {
        return;
    };
    let text = question.name.text();
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    assert!(!text.is_empty() && text.iter().all(is_plain));
    assert!(!text.iter().any(u8::is_ascii_uppercase));
    let mut count = 0;
    message::addresses(bytes, &question, &mut { RECORDS }, |_, _| count += 1);
    assert!(count <= RECORDS);
    KEPT.with_borrow_mut(|bench| answer_through(bench.get_or_insert_with(fuzz_bench), bytes));
}

/// A pod asks what the message answers, and gets it.
fn answer_through(bench: &mut Bench, bytes: &[u8]) {
    let mut asked = bytes.to_vec();
    if let Some(flags) = asked.get_mut(2) {
        *flags &= 0x7f;
    }
    let room = bytes.len().min(1400);
    let (pod, resolver) = (node::V4.pods[0], node::V4.pods[1]);
    let ask = Builder::from(16, pod, resolver).udp(5000, 53);
    bench.send(16, &ask.payload(&asked[..room]).build());
    let answer = Builder::from(17, resolver, pod).udp(53, 5000);
    bench.send(17, &answer.payload(&bytes[..room]).build());
    bench.now = bench.now + Duration::from_millis(10);
}

/// Rules of the first pod that name domains, and whom it may believe.
fn name_rows() -> std::vec::Vec<Row> {
    let layer = LayerId(4);
    let everything = SpanEntry {
        start: 0,
        target: Target::Rule {
            action: Action::Accept,
            order: 0,
            rule: RuleId(16),
        },
    };
    let span = SpanRow {
        id: SpanId(1),
        entries: [everything].into_iter().collect(),
    };
    let tier = Layer {
        id: layer,
        classes: false,
        pods: SpanId(1),
        others: SpanId(1),
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Pass,
        miss_rule: RuleId::NONE,
    };
    let ruleset = RulesetRow {
        id: RulesetId(4),
        layers: [tier].into_iter().collect(),
    };
    let binding = BindingRow {
        link: LinkId::new(16).expect("a link"),
        ingress: RulesetId::NONE,
        egress: RulesetId(4),
    };
    let names = ["example.com", "*.example.com", "*.cdn.test"];
    let names = names.map(|it| NameRow::parse(it).expect("a name"));
    let mut rows = std::vec![PolicyRow::Span(span)];
    for name in names {
        let named = NamedRow {
            layer,
            name: name.id,
            ports: SpanId(1),
        };
        rows.extend([PolicyRow::Name(name), PolicyRow::Named(named)]);
    }
    rows.push(PolicyRow::Resolver(node::ip(node::V4.pods[1])));
    rows.push(PolicyRow::Ruleset(ruleset));
    rows.push(PolicyRow::Binding(binding));
    rows.into_iter().map(Row::Policy).collect()
}

/// Pods, the host, an uplink and a Service in each family.
fn fuzz_bench() -> Bench {
    let mut bench = node::node();
    for (id, addresses) in [(0, node::V4), (1, node::V6)] {
        let mut svc = node::Svc::new(&[(addresses.pods[1], 53)], &[]);
        svc.id = id;
        bench.commit(&svc.rows(&addresses));
    }
    bench.commit(&name_rows());
    bench
}

/// The same through a pipeline that is already there.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_frames_through(bench: &mut Bench, mut bytes: &[u8]) {
    while let [length, link, offload, rest @ ..] = bytes {
        let length = (usize::from(*length) * 2).min(rest.len());
        let (frame, rest) = rest.split_at(length);
        bytes = rest;
        let link = match link % 6 {
            0 => 1,
            1 => 2,
            n => 14 + u16::from(n),
        };
        let offload = self::offload(*offload);
        bench.send_with(link, frame, 0, offload);
        bench.now = bench.now + Duration::from_millis(u64::from(*frame.first().unwrap_or(&0)));
    }
}

/// Offload words out of one byte.
fn offload(byte: u8) -> Offload {
    use crate::frame::{Gso, GsoKind, Partial};
    let partial = (byte & 1 != 0).then_some(Partial {
        start: 34 + u16::from(byte >> 6) * 20,
        offset: if byte & 2 == 0 { 6 } else { 16 },
    });
    let gso = (byte & 4 != 0).then_some(Gso {
        kind: if byte & 8 == 0 {
            GsoKind::Tcp4
        } else {
            GsoKind::Udp
        },
        size: u16::from(byte) * 6,
        header: 54,
        ecn: false,
    });
    Offload {
        partial,
        verified: byte & 16 != 0,
        gso,
        tunnel: None,
    }
}

/// Fuzz entry: the bytes are a control stream. Holds: no panic, and tables that were committed stay whole.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_control(bytes: &[u8]) {
    KEPT.with_borrow_mut(|bench| {
        fuzz_control_of(bench.get_or_insert_with(fuzz_bench), bytes);
    });
}

fn fuzz_control_of(bench: &mut Bench, bytes: &[u8]) {
    use crate::session::{Facts, Session};
    use sluice_contract::frame::{Decoder, decode};
    let mut session = Session::new(Facts::default());
    let mut decoder = Decoder::default();
    let mut input = bytes;
    while let Some(payload) = decoder.next(&mut input) {
        let Some(envelope) = decode(payload) else {
            continue;
        };
        while !bench.pipeline.work(64) {}
        session.receive(&envelope, &mut bench.pipeline, 0);
        while session.poll(&bench.pipeline).is_some() {}
    }
    // Whatever was said, the dataplane still takes packets.
    bench.send(16, &Builder::from(16, "10.0.0.1", "10.0.0.2").build());
}
