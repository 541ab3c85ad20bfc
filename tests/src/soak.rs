//! Everything at once, for minutes: checked streams, datagrams, connections, pods that come and go, policies that change.
//!
//! What is asserted holds at every moment: no byte arrives wrong, nothing stands still, and memory is flat.

use crate::cni::CniLab;
use crate::lab::{Lab, Plan, Wiring};
use crate::{cpu, traffic};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of one checked stream.
const STREAM: u64 = 64 << 20;
/// A kind of traffic that finishes nothing for so long is stuck.
const STUCK: Duration = Duration::from_secs(30);
/// KiB by which a process may grow between the first quarter and the end.
const GROWTH: u64 = 4096;

/// How much of each was done.
#[derive(Debug, Default)]
struct Done {
    streams: AtomicU64,
    datagrams: AtomicU64,
    connections: AtomicU64,
    pods: AtomicU64,
    policies: AtomicU64,
}

impl Done {
    fn all(&self) -> [(&'static str, u64); 5] {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("checked streams", read(&self.streams)),
            ("datagrams", read(&self.datagrams)),
            ("connections", read(&self.connections)),
            ("pods added and removed", read(&self.pods)),
            ("policy changes", read(&self.policies)),
        ]
    }
}

/// Runs for `time` and says what was done.
///
/// # Errors
/// The first thing that did not hold.
pub fn run(time: Duration, wiring: Wiring) -> Result<String> {
    let plan = Plan {
        pods: 2,
        wiring,
        pod_cidrs: CniLab::SUBNETS.map(Into::into).to_vec(),
        node_addresses: CniLab::NODE.map(Into::into).to_vec(),
        ..Plan::default()
    };
    let lab = Lab::prepare(&plan)?;
    std::fs::create_dir_all(lab.manifests())?;
    lab.change_config(|config| config["source"] = json!({"directory": lab.manifests()}))?;
    let mut cni = CniLab::of(lab)?;
    cni.lab.start_node()?;
    let daemon = cni.lab.node().context("no daemon")?.pid();
    let daemon = u32::try_from(daemon.as_raw())?;
    let _server = cni.lab.serve(1)?;
    let (stop, done) = (AtomicBool::new(false), Done::default());
    let server = traffic::at(&cni.lab.pods[1].v4.to_string(), 7000);
    let server6 = traffic::at(&cni.lab.pods[1].v6.to_string(), 7000);
    let load = |words: &[&str]| traffic::load(&cni.lab.pods[0].netns, words);
    let again = |counter: fn(&Done) -> &AtomicU64, work: &dyn Fn(u64) -> Result<u64>| {
        for round in 0.. {
            if stop.load(Ordering::Acquire) {
                break;
            }
            let count = work(round).inspect_err(|_| stop.store(true, Ordering::Release))?;
            counter(&done).fetch_add(count, Ordering::Relaxed);
        }
        Ok(())
    };
    let bytes = STREAM.to_string();
    thread::scope(|scope| {
        let workers: Vec<thread::ScopedJoinHandle<'_, Result<()>>> = vec![
            scope.spawn(|| {
                again(|done| &done.streams, &|round| {
                    let to = if round % 2 == 0 { &server } else { &server6 };
                    let seen = load(&["checked", to, "--bytes", &bytes])?;
                    ensure!(seen.done == STREAM, "a stream arrived in part: {seen:?}");
                    Ok(1)
                })
            }),
            scope.spawn(|| {
                again(|done| &done.datagrams, &|_| {
                    Ok(load(&["udp", &server, "--time", "1"])?.done)
                })
            }),
            scope.spawn(|| {
                again(|done| &done.connections, &|_| {
                    Ok(load(&["connect", &server, "--time", "1"])?.done)
                })
            }),
            scope.spawn(|| again(|done| &done.pods, &|round| pod(&cni, round))),
            scope.spawn(|| again(|done| &done.policies, &|round| policy(&cni.lab, round))),
        ];
        let watched = watch((&cni.lab, daemon), time, &stop, &done);
        stop.store(true, Ordering::Release);
        for worker in workers {
            worker
                .join()
                .map_err(|_| anyhow::anyhow!("a worker died"))??;
        }
        watched
    })
}

/// Adds a pod, reaches another from it, removes it.
fn pod(cni: &CniLab, round: u64) -> Result<u64> {
    let name = format!("soak{round}");
    let (netns, _) = cni.add(&name, &Value::Null)?;
    traffic::ping(&netns, &cni.lab.pods[1].v4.to_string(), 1, 56)?;
    let path = netns.path();
    let removed = cni.del(&name, path.to_str().context("path")?)?;
    ensure!(removed.success, "a pod is not removed: {removed:?}");
    thread::sleep(Duration::from_millis(50));
    Ok(1)
}

/// A policy that selects pods that come and go, another one each time.
fn policy(lab: &Lab, round: u64) -> Result<u64> {
    let text = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "changing", "namespace": "default"},
        "spec": {
            "podSelector": {"matchLabels": {"round": (round % 7).to_string()}},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": [{"port": 7000 + round % 11}]}],
        },
    });
    let path = lab.manifests().join("changing.yaml");
    // Whole or not at all, as an editor writes it.
    let new = lab.manifests().join(".changing");
    std::fs::write(&new, text.to_string())?;
    std::fs::rename(&new, &path)?;
    thread::sleep(Duration::from_millis(300));
    Ok(1)
}

fn watch(
    (lab, daemon): (&Lab, u32),
    time: Duration,
    stop: &AtomicBool,
    done: &Done,
) -> Result<String> {
    let begin = Instant::now();
    let mut moved = done.all().map(|(_, count)| (count, Instant::now()));
    let mut first = None;
    while begin.elapsed() < time && !stop.load(Ordering::Acquire) {
        thread::sleep(Duration::from_millis(500));
        for ((name, count), (last, since)) in done.all().into_iter().zip(&mut moved) {
            if count != *last {
                (*last, *since) = (count, Instant::now());
            }
            ensure!(since.elapsed() < STUCK, "{name} stand still at {count}");
        }
        if first.is_none() && begin.elapsed() >= time / 4 {
            first = Some(memory(lab, daemon)?);
        }
    }
    let (first, last) = (first.context("no look at memory")?, memory(lab, daemon)?);
    for (name, before, after) in [
        ("the daemon", first.0, last.0),
        ("the appliance's process", first.1, last.1),
    ] {
        ensure!(
            after <= before + GROWTH,
            "{name} has grown from {before} to {after} KiB"
        );
    }
    let counts = done.all().map(|(name, count)| format!("{count} {name}"));
    Ok(format!(
        "{}; KiB of the daemon {} then {}, of the appliance's process {} then {} beside its memory",
        counts.join(", "),
        first.0,
        last.0,
        first.1,
        last.1
    ))
}

/// KiB of the daemon, and of the appliance's process beside the memory of the appliance.
fn memory(lab: &Lab, daemon: u32) -> Result<(u64, u64)> {
    let status = lab.status()?;
    let appliance = status["machine"]["pid"].as_u64();
    let appliance = u32::try_from(appliance.context("no appliance")?)?;
    Ok((cpu::overhead_kib(daemon)?, cpu::overhead_kib(appliance)?))
}
