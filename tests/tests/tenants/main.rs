//! A hostile namespace, and a stranger on the underlay, do at once what an ordinary user may do to hurt others. A second
//! namespace on the same node keeps its requests, gets its new pod and has its policy change in force.
//!
//! Times are printed. What is asserted is that requests are answered, and that what has to come into force does so
//! within bounds that are far above the goals.

mod bed;
mod objects;

use anyhow::{Context as _, Result, ensure};
use bed::Bed;
use serde_json::Value;
use sluice_tests::command::{self, Running};
use sluice_tests::load::Outcome;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use std::time::{Duration, Instant};

/// Of all requests, at most so many may fail.
const LOST: f64 = 0.01;
/// Far above the second that is the goal.
const BOUND: Duration = Duration::from_secs(10);

/// Checks the share of answered requests and prints it.
fn kept(what: &str, seen: &Outcome) -> Result<()> {
    let total = seen.done + seen.lost;
    println!(
        "{what}: {} of {total} requests answered, p50 {:.1} ms, p99 {:.1} ms, slowest {:.1} ms",
        seen.done,
        seen.latency.p50 / 1e3,
        seen.latency.p99 / 1e3,
        seen.latency.max / 1e3,
    );
    let lost = seen.lost as f64 / total.max(1) as f64;
    ensure!(
        lost <= LOST,
        "{what}: {} of {total} requests failed",
        seen.lost
    );
    Ok(())
}

/// What the other namespace does meanwhile: requests through its Service and to the outside, a new pod, a policy change.
fn others_go_on(bed: &Bed, when: &str) -> Result<()> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| bed.requests(objects::SERVICE, 80, 100));
        let outside = scope.spawn(|| bed.requests(&bed::outside(), 7000, 50));
        std::thread::sleep(Duration::from_secs(1));
        let add = bed.add(when)?;
        println!("{when}: ADD of a pod took {} ms", add.as_millis());
        ensure!(add < BOUND, "{when}: ADD took {add:?}");
        let denied = bed.policy_takes_force()?;
        println!(
            "{when}: a policy was in force {} ms after it was written",
            denied.as_millis()
        );
        ensure!(denied < BOUND, "{when}: the policy took {denied:?}");
        let joined = |it: std::thread::ScopedJoinHandle<'_, Result<Outcome>>| {
            it.join().ok().context("the client panicked")?
        };
        kept(&format!("{when}: Service in the node"), &joined(inside)?)?;
        kept(&format!("{when}: outside, by SNAT"), &joined(outside)?)
    })
}

/// The floods, each bounded in rate and time; they end with the values.
fn attack(bed: &Bed) -> Result<Vec<Running>> {
    bed.write("hostile.yaml", &objects::hostile())?;
    bed.floods()
}

fn losers_are_named(bed: &Bed) -> Result<()> {
    command::until("a finding on the hostile Service", BOUND, || {
        let status = bed.lab().status()?;
        let findings = status["cluster"]["findings"].as_array();
        let mut findings = findings.into_iter().flatten().filter_map(Value::as_str);
        let finding = findings
            .find(|it| it.contains("aaa/takeover") && it.contains("shop/server"))
            .context("no finding names both Services")?;
        println!("finding: {finding}");
        Ok(())
    })
}

fn hostile_namespace() -> Result<()> {
    let bed = Bed::start()?;
    let result = (|| {
        others_go_on(&bed, "before")?;
        let began = Instant::now();
        let floods = attack(&bed)?;
        others_go_on(&bed, "under attack")?;
        bed.remote_pod_is_reached_at_full_size()?;
        bed.health_is_answered()?;
        println!("the attack lasted {} s", began.elapsed().as_secs());
        drop(floods);
        losers_are_named(&bed)?;
        others_go_on(&bed, "after")
    })();
    if result.is_err() {
        eprintln!("{}", bed.words());
    }
    result
}

#[test]
fn s10_z06_b09_a_hostile_namespace_does_not_hurt_another() {
    need!(
        "s10_z06_b09_a_hostile_namespace_does_not_hurt_another",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash"),
        Tool("ping"),
        Tool("bridge")
    );
    hostile_namespace().expect("the other namespace goes on");
}
