//! Every reason to drop a packet is somebody's, and every packet has one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use proptest::prelude::*;
use sluice_appliance::testing::node::{self, BOTH, Svc, packet};
use sluice_appliance::verdict::Verdict;
use sluice_appliance::{Address, Flow};
use sluice_contract::DropReason;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

fn sources(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn t01_every_drop_reason_is_given_by_some_stage() {
    let mut text = String::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut text,
    );
    let unused: Vec<_> = DropReason::ALL
        .iter()
        .filter(|reason| !text.contains(&format!("DropReason::{reason:?}")))
        .collect();
    assert!(unused.is_empty(), "nobody gives {unused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn t01_counters_sum_up_whatever_comes(
        frames in proptest::collection::vec((0..5usize, proptest::collection::vec(any::<u8>(), 0..120), 0..6usize, any::<u8>(), 0..400usize), 1..80),
        v6: bool,
    ) {
        let a = BOTH[usize::from(v6)];
        let mut bench = node::node();
        bench.commit(&Svc::new(&[(a.pods[1], 80)], &[]).rows(&a));
        let count = frames.len() as u64;
        let mut seen = BTreeMap::<DropReason, u64>::new();
        for (from, noise, to, proto, cut) in frames {
            // An honest pod, one that is not, the host, the outside, and a link that nobody configured.
            let (link, source) =
                [(16, a.pods[0]), (16, a.pods[2]), (2, a.node), (1, a.outside), (999, a.remote)][from];
            let to = [a.pods[1], a.cluster_ip, a.node, a.outside, a.unallocated, a.pods[0]][to];
            let frame = packet(link, source, to).raw(proto).payload(&noise).build();
            let end = bench.send(link, &frame[..frame.len().min(cut)]);
            if let Verdict::Drop(reason) = end.verdict {
                *seen.entry(reason).or_default() += 1;
            }
        }
        let stats = bench.pipeline.stats();
        let by_reason: u64 = DropReason::ALL.iter().map(|reason| stats.dropped(*reason)).sum();
        prop_assert_eq!(stats.received(), count);
        for reason in DropReason::ALL.iter().copied() {
            prop_assert_eq!(stats.dropped(reason), seen.get(&reason).copied().unwrap_or(0), "{:?}", reason);
        }
        prop_assert_eq!(count, stats.forwarded() + stats.replied() + stats.held() + by_reason);
    }
}

#[test]
fn z11_tuples_chosen_against_one_secret_spread_under_another() {
    use sluice_appliance::hash::Hasher;
    const BUCKETS: u64 = 1024;
    let (known, secret) = (Hasher::new([1; 16]), Hasher::new([2; 16]));
    let flow = |n: u32| {
        let [_, a, b, c] = n.to_be_bytes();
        Flow::new(
            Address::v4([10, a, b, c]),
            Address::v4([10, 0, 0, 1]),
            17,
            1000,
            53,
        )
    };
    // An attacker who knows the first key finds a thousand flows of one bucket.
    let chosen: Vec<Flow> = (0..2_000_000)
        .map(flow)
        .filter(|flow| flow.hash(&known).get() % BUCKETS == 7)
        .take(1024)
        .collect();
    assert_eq!(chosen.len(), 1024);
    let mut buckets = BTreeMap::new();
    for flow in &chosen {
        *buckets
            .entry(flow.hash(&secret).get() % BUCKETS)
            .or_insert(0) += 1;
    }
    // Under the other key the fullest bucket holds what chance gives it.
    assert!(
        buckets.values().max() <= Some(&9),
        "{:?}",
        buckets.values().max()
    );
}
