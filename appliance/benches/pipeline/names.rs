//! What rules by domain name cost: other packets, ordinary answers, and the worst ones that anybody can write.

use super::{BATCH, HEADROOM, Packet, Random, Rig, pod_flows, report, shuffled};
use sluice_appliance::testing::node::{self, V4};
use sluice_appliance::wire::tcp;
use sluice_appliance::{Frame, Gso, GsoKind, Offload, Verdict};
use sluice_contract::name::NameRow;
use sluice_contract::policy::{
    Action, BindingRow, Established, Layer, LayerId, NamedRow, PolicyRow, RuleId, RulesetId,
    RulesetRow, SettingsRow, SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::report::CounterId;
use sluice_contract::{Family, LinkId, Row};
use std::time::Instant as Clock;

/// Rounds in which both pipelines take turns.
const ROUNDS: usize = 24;
/// The pod that asks, and the one that is asked.
const ASKER: u16 = 16;
const RESOLVER: u16 = 17;

/// Every pod may send anything to anybody; with names, also to where they lead.
fn rules(names: &[String]) -> Vec<Row> {
    let layer = LayerId(4);
    let accept = Target::Rule {
        action: Action::Accept,
        order: 0,
        rule: RuleId(20),
    };
    let everything = SpanEntry {
        start: 0,
        target: accept,
    };
    let mut rows = vec![
        PolicyRow::Settings(SettingsRow {
            unbound: Action::Accept,
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
            audit_node: false,
            unlisted_pods: false,
        }),
        PolicyRow::Span(SpanRow {
            id: SpanId(1),
            entries: [everything].into_iter().collect(),
        }),
    ];
    for text in names {
        let name = NameRow::parse(text).unwrap();
        let named = NamedRow {
            layer,
            name: name.id,
            ports: SpanId(1),
        };
        rows.extend([PolicyRow::Name(name), PolicyRow::Named(named)]);
    }
    rows.push(PolicyRow::Resolver(V4.pods[1].parse().unwrap()));
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
    rows.push(PolicyRow::Ruleset(RulesetRow {
        id: RulesetId(4),
        layers: [tier].into_iter().collect(),
    }));
    rows.extend((ASKER..ASKER + 250).map(|link| {
        PolicyRow::Binding(BindingRow {
            link: LinkId::new(link).unwrap(),
            ingress: RulesetId::NONE,
            egress: RulesetId(4),
        })
    }));
    rows.into_iter().map(Row::Policy).collect()
}

/// A question for addresses of a name.
fn question(id: u16, name: &str) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    let mut bytes = vec![high, low, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// Its answer: records that each point at the name, of addresses from `first` on.
fn answer(question: &[u8], first: u32, count: u16) -> Vec<u8> {
    let mut bytes = question.to_vec();
    bytes[2..4].copy_from_slice(&[0x81, 0x80]);
    bytes[6..8].copy_from_slice(&count.to_be_bytes());
    for n in 0..u32::from(count) {
        bytes.extend([0xc0, 12, 0, 1, 0, 1]);
        bytes.extend((60 + n).to_be_bytes());
        bytes.extend([0, 4]);
        // 100.64.0.0 and what follows.
        bytes.extend((0x6440_0000 + first + n).to_be_bytes());
    }
    bytes
}

fn learnt(rig: &Rig) -> u64 {
    let stats = rig.pipeline.stats();
    let mut cursor = 0;
    while let Some((counter, next)) = stats.next_from(cursor) {
        if counter.id == CounterId::NamesLearnt {
            return counter.value;
        }
        cursor = next;
    }
    0
}

/// Questions and answers over UDP, 64 of each; what the answers took.
fn resolve(rig: &mut Rig, records: u16, spread: u32, round: u32) -> Vec<f64> {
    let [pod, resolver] = [V4.pods[0], V4.pods[1]];
    let count = u16::try_from(BATCH).unwrap();
    let pairs: Vec<_> = (0..count)
        .map(|n| {
            let asked = question(n, "www.example.com");
            let first = (round * u32::from(count) + u32::from(n)) * u32::from(records) % spread;
            let told = answer(&asked, first, records);
            let ask = node::packet(ASKER, pod, resolver).udp(5000, 53);
            let tell = node::packet(RESOLVER, resolver, pod).udp(53, 5000);
            let packet = |link, bytes| Packet { link, bytes };
            (
                packet(ASKER, ask.payload(&asked).build()),
                packet(RESOLVER, tell.payload(&told).build()),
            )
        })
        .collect();
    rig.send(pairs.iter().map(|(ask, _)| ask));
    rig.send(pairs.iter().map(|(_, tell)| tell))
}

/// One frame by itself; how long it took.
fn one(rig: &mut Rig, link: u16, bytes: &[u8], offload: Offload) -> f64 {
    let end = HEADROOM + bytes.len();
    let mut buffer = vec![0; end];
    buffer[HEADROOM..].copy_from_slice(bytes);
    let link = LinkId::new(link).unwrap();
    let frame = Frame::new(&mut buffer, HEADROOM, end, 0, link, offload).unwrap();
    let mut verdicts = [Verdict::Held];
    let start = Clock::now();
    let (now, out) = (rig.now, &mut rig.out);
    rig.pipeline
        .process_batch(&mut [frame], &mut verdicts, now, out);
    let spent = start.elapsed().as_nanos() as f64;
    assert!(matches!(verdicts, [Verdict::Forward(_)]), "{verdicts:?}");
    spent
}

/// Answers in one frame of a stream, about a name as long as names are, of as many records as two passes may look at.
fn crafted(rig: &mut Rig, name: &str) -> Vec<f64> {
    let [pod, resolver] = [V4.pods[0], V4.pods[1]];
    let up = |flags| node::packet(ASKER, pod, resolver).tcp(6000, 53, flags);
    let down = |flags| node::packet(RESOLVER, resolver, pod).tcp(53, 6000, flags);
    let plain = Offload::default();
    let (mut sent, mut told) = (101u32, 501u32);
    one(rig, ASKER, &up(tcp::SYN).numbers(100, 0).build(), plain);
    let opened = down(tcp::SYN | tcp::ACK).numbers(500, 101).build();
    one(rig, RESOLVER, &opened, plain);
    let framed = |message: &[u8]| [&(message.len() as u16).to_be_bytes()[..], message].concat();
    let mut times = Vec::new();
    for round in 0..200u32 {
        let asked = question(7, name);
        let ask = framed(&asked);
        let segment = up(tcp::ACK).numbers(sent, told).payload(&ask).build();
        one(rig, ASKER, &segment, plain);
        sent += ask.len() as u32;
        // None of these is known: each makes another one go.
        let tell = framed(&answer(&asked, round * 511, 511));
        let segment = down(tcp::ACK).numbers(told, sent).payload(&tell).build();
        let gso = Gso {
            kind: GsoKind::Tcp4,
            size: 1448,
            header: 54,
            ecn: false,
        };
        let partial = sluice_appliance::Partial {
            start: 34,
            offset: 16,
        };
        let offload = Offload {
            gso: Some(gso),
            partial: Some(partial),
            ..plain
        };
        times.push(one(rig, RESOLVER, &segment, offload));
        told += tell.len() as u32;
    }
    times
}

pub(super) fn by_names(random: &mut Random) {
    let long = "a.".repeat(121) + "cdn.test";
    // Eight of its ends, which is as many as count.
    let wide: Vec<String> = (0..8)
        .map(|n| format!("*.{}cdn.test", "a.".repeat(n)))
        .collect();
    let few = ["*.example.com".to_owned(), "*.cdn.test".to_owned()];
    let mut rigs = [Rig::new(), Rig::new()];
    rigs[0].commit(rules(&[]));
    rigs[1].commit(rules(&few));
    let words = ["no names", "names in rules"];

    // Pods talk to each other on any other port than that of resolvers.
    let mut flows = pod_flows(10_000, Family::V4);
    for flow in &mut flows {
        // The destination port, and no checksum, of UDP over IPv4.
        flow.bytes[36..38].copy_from_slice(&5353u16.to_be_bytes());
        flow.bytes[40..42].fill(0);
    }
    let mut hits = [Vec::new(), Vec::new()];
    let mut answers = [Vec::new(), Vec::new()];
    for rig in &mut rigs {
        rig.send(&flows);
    }
    for round in 0..ROUNDS {
        let packets = shuffled(&flows, 1 << 16, random);
        for (rig, (hits, answers)) in rigs.iter_mut().zip(hits.iter_mut().zip(&mut answers)) {
            hits.extend(rig.send(packets.iter().copied()));
            for turn in 0..8 {
                let round = u32::try_from(round * 8 + turn).unwrap();
                answers.extend(resolve(rig, 4, 64, round));
            }
        }
    }
    for (times, word) in hits.into_iter().zip(words) {
        report(&format!("hit, pod to pod, 10^4 flows, {word}"), times);
    }
    for (times, word) in answers.into_iter().zip(words) {
        report(&format!("answer over UDP, 4 records, {word}"), times);
    }
    assert_eq!(learnt(&rigs[0]), 0);
    assert_eq!(learnt(&rigs[1]), (ROUNDS * 8 * BATCH * 4) as u64);
    let fresh = (0..64).flat_map(|round| resolve(&mut rigs[1], 4, 1 << 20, round));
    report("the same, each record another address", fresh.collect());

    let [plain, rig] = &mut rigs;
    report(
        "frame of 8 KiB, 511 records, no names",
        crafted(plain, &long),
    );
    report("the same, of a name in rules", crafted(rig, &long));
    rig.commit(rules(&wide));
    rig.forget();
    report("the same, of eight names in rules", crafted(rig, &long));
}
