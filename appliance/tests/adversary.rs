//! What a crowd, a race or an attacker can do to the pipeline as a whole.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use sluice_appliance::testing::node::{
    self, BOTH, NODE_MAC, ROUTER_MAC, Svc, UPLINK, V4, ends, nat, packet, service,
};
use sluice_appliance::testing::{Bench, Builder, HEADROOM, Originated};
use sluice_appliance::wire::tcp;
use sluice_appliance::{Address, Capacity, Flow, Frame, Instant, Offload, Pipeline, Verdict};
use sluice_contract::service::{ConnectionsRow, NatRow, ServiceRow};
use sluice_contract::{DropReason, LinkId, Protocol};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Barrier, Mutex};

/// Frames that a queue hands over at once.
const BATCH: usize = 32;
/// Flows of the race; each is two tries. The row speaks of 10⁷, which `SLUICE_RACES=5000000` does in about a minute.
const RACES: u32 = 300_000;

/// A node with room, whose Service takes UDP from outside to its two endpoints as it comes.
fn crowded(seed: [u8; 16]) -> Bench {
    let mut bench = Bench::seeded(Capacity::default(), seed);
    let mut rows = node::node_rows();
    rows.push(service(ServiceRow::Connections(ConnectionsRow {
        pod_share: 100,
        ..ConnectionsRow::default()
    })));
    let endpoints = [(V4.pods[1], 8080), (V4.pods[2], 8080)];
    let mut svc = Svc::new(&endpoints, &endpoints);
    svc.protocol = Protocol::Udp;
    svc.external_local = true;
    rows.extend(svc.rows(&V4));
    bench.commit(&rows);
    bench
}

/// A UDP packet of the n-th client outside.
fn from_client(n: u32) -> Vec<u8> {
    let [_, a, b, c] = n.to_be_bytes();
    let mut builder = Builder::from(16, "100.0.0.1", V4.load_balancer).udp(1024 + u16::from(c), 80);
    builder.source = Address::v4([100, a, b, c]);
    builder.macs(ROUTER_MAC, NODE_MAC).build()
}

/// What became of each packet: the link, and the endpoint.
type Fates = Vec<(Verdict, [u8; 6])>;

/// Sends one batch through a pipeline that another queue uses as well.
fn hand_over(pipeline: &Mutex<Pipeline<'_>>, packets: &[Vec<u8>], now: Instant, fates: &mut Fates) {
    let mut buffers: Vec<Vec<u8>> = packets
        .iter()
        .map(|bytes| [&[0; HEADROOM], bytes.as_slice()].concat())
        .collect();
    let mut frames: Vec<Frame<'_>> = buffers
        .iter_mut()
        .map(|buffer| {
            let end = buffer.len();
            let offload = Offload::default();
            Frame::new(buffer, HEADROOM, end, 0, LinkId::UPLINK, offload).unwrap()
        })
        .collect();
    let mut verdicts = vec![Verdict::Held; frames.len()];
    let mut out = Originated::default();
    let mut pipeline = pipeline.lock().unwrap();
    pipeline.process_batch(&mut frames, &mut verdicts, now, &mut out);
    drop(pipeline);
    for (frame, verdict) in frames.iter().zip(verdicts) {
        // Destination address and port.
        let bytes = frame.bytes();
        let mut endpoint = [0; 6];
        endpoint[..4].copy_from_slice(&bytes[30..34]);
        endpoint[4..].copy_from_slice(&bytes[36..38]);
        fates.push((verdict, endpoint));
    }
}

#[test]
fn k06_two_queues_of_one_pipeline_send_one_flow_to_one_endpoint_and_lose_nothing() {
    let races = std::env::var("SLUICE_RACES").ok();
    let races = races.and_then(|n| n.parse().ok()).unwrap_or(RACES);
    let Bench { pipeline, now, .. } = crowded([7; 16]);
    let pipeline = Mutex::new(pipeline);
    let start = Barrier::new(2);
    let queue = || {
        start.wait();
        let mut fates = Vec::new();
        for first in (0..races).step_by(BATCH) {
            let packets: Vec<_> = (first..races.min(first + BATCH as u32))
                .map(from_client)
                .collect();
            hand_over(&pipeline, &packets, now, &mut fates);
        }
        fates
    };
    let (one, two) = std::thread::scope(|scope| {
        let queues = [scope.spawn(queue), scope.spawn(queue)];
        let [one, two] = queues.map(|queue| queue.join().unwrap());
        (one, two)
    });
    assert_eq!(one.len(), races as usize);
    let apart = one.iter().zip(&two).position(|(one, two)| one != two);
    assert_eq!(apart, None, "two packets of one flow went apart");
    let is_forwarded = |fate: &(Verdict, _)| matches!(fate.0, Verdict::Forward(_));
    assert!(one.iter().all(is_forwarded));
    let endpoints: BTreeSet<[u8; 6]> = one.iter().map(|fate| fate.1).collect();
    assert_eq!(endpoints.len(), 2, "both endpoints have their share");
    let pipeline = pipeline.into_inner().unwrap();
    assert!(pipeline.stats().is_balanced());
    assert_eq!(pipeline.stats().forwarded(), 2 * u64::from(races));
}

/// Queues with tables of their own would agree as well: the choice is the flow's and the secret's, not chance.
#[test]
fn k06_two_pipelines_with_one_secret_choose_alike_and_with_two_do_not() {
    let fates = |seed| {
        let bench = crowded(seed);
        let now = bench.now;
        let pipeline = Mutex::new(bench.pipeline);
        let mut fates = Vec::new();
        for n in 0..2_000 {
            hand_over(&pipeline, &[from_client(n)], now, &mut fates);
        }
        fates
    };
    let one = fates([7; 16]);
    assert!(one == fates([7; 16]));
    assert!(one != fates([8; 16]));
}

/// Every client outside gets the node's address towards one endpoint, so each needs a port of its own.
#[test]
fn s26_sixty_thousand_flows_to_one_endpoint_before_the_first_is_refused() {
    for a in BOTH {
        let mut bench = Bench::empty(Capacity::default());
        let mut rows = node::node_rows();
        rows.push(service(ServiceRow::Nat(NatRow {
            first_port: 1_024,
            ..nat()
        })));
        rows.extend(Svc::new(&[(a.pods[1], 8080)], &[]).rows(&a));
        bench.commit(&rows);
        let mut sources = BTreeSet::new();
        let mut succeeded = 0;
        for port in 1..=u16::MAX {
            let sent = packet(UPLINK, a.outside, a.load_balancer).tcp(port, 80, tcp::SYN);
            let end = bench.send(UPLINK, &sent.build());
            if !matches!(end.verdict, Verdict::Forward(_)) {
                break;
            }
            succeeded += 1;
            let (source, source_port, to, _) = ends(&end.bytes);
            assert_eq!((source, to), (node::ip(a.node), node::ip(a.pods[1])));
            assert!(sources.insert(source_port), "{source_port} twice");
        }
        assert!(succeeded >= 60_000, "only {succeeded} flows");
        let stats = bench.pipeline.stats();
        println!("{succeeded} flows to one endpoint in {:?}", a.family);
        assert_eq!(stats.dropped(DropReason::NatExhausted), 0);
    }
}

/// Flows of clients outside that one bucket of the table would have to hold, under the secret of `known`.
fn chosen(known: &Bench, count: usize) -> Vec<u32> {
    let ct = known.pipeline.conntrack();
    let flow = |n: u32| {
        let [_, a, b, c] = n.to_be_bytes();
        let client = Address::v4([100, a, b, c]);
        let to: IpAddr = node::ip(V4.load_balancer);
        Flow::new(client, to.into(), 17, 1024 + u16::from(c), 80)
    };
    // Buckets are found by the upper half of the hash, whatever their number: the same sixteen bits are the same bucket.
    let bucket = |n: &u32| ct.hash(&flow(*n)).get() >> 48;
    let wanted = bucket(&1);
    (0..1 << 24)
        .filter(|n| bucket(n) == wanted)
        .take(count)
        .collect()
}

#[test]
fn z11_tuples_chosen_against_one_secret_cost_nothing_under_another() {
    let (known, mut victim) = (crowded([1; 16]), crowded([2; 16]));
    let flows = chosen(&known, 200);
    assert_eq!(flows.len(), 200);
    for round in 0..2 {
        for n in &flows {
            let end = victim.send(UPLINK, &from_client(*n));
            assert!(
                matches!(end.verdict, Verdict::Forward(_)),
                "{round}: {end:?}"
            );
        }
    }
    let counters = victim.pipeline.conntrack().counters();
    assert_eq!((counters.committed, counters.crowded), (200, 0));
    // Even who knows the secret gets no search longer than two buckets: what the first cannot hold lies in its second.
    let mut lost = known;
    for _ in 0..2 {
        for n in &flows {
            let end = lost.send(UPLINK, &from_client(*n));
            assert!(matches!(end.verdict, Verdict::Forward(_)), "{end:?}");
        }
    }
    let counters = lost.pipeline.conntrack().counters();
    assert_eq!(counters.committed, 200);
    lost.pipeline.conntrack().audit().unwrap();
}
