//! The benchmark of one node: the same traffic over Sluice (both wirings) and over a kernel bridge, interleaved.
//!
//! All contenders stand at once, idle ones cost next to nothing; each round measures all of them, every other round in
//! reverse order. What is printed are medians with their spread and the ratio of medians; nothing passes or fails.

use crate::bridge::Bridge;
use crate::command::{self, Running};
use crate::lab::{Lab, Plan, Wiring, program};
use crate::load::Outcome;
use crate::netns::Netns;
use crate::{cpu, need};
use anyhow::{Context as _, Result};
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

/// What is measured, in the order of the table.
const METRICS: [(&str, &str); 10] = [
    ("tcp bulk", "Gb/s"),
    ("tcp bulk cpu", "s/GB"),
    ("tcp bulk bbr", "Gb/s"),
    ("udp 64 B", "kpps"),
    ("udp 64 B cpu", "s/Mpkt"),
    ("udp 64 B lost", "%"),
    ("tcp rr p50", "us"),
    ("tcp rr p99", "us"),
    ("tcp rr cpu", "us/trip"),
    ("connections", "/s"),
];

/// One way from client to server.
struct Path {
    name: &'static str,
    client: Netns,
    address: String,
    _server: Running,
    _keeper: Keeper,
}

/// What holds the rest of a topology up while its path is measured.
#[expect(dead_code, reason = "held for their ends")]
enum Keeper {
    Bridge(Bridge, Netns),
    Lab(Box<Lab>, Netns),
}

/// Runs `rounds` rounds of `seconds` a measurement and prints the table.
///
/// # Errors
/// If a topology cannot be built or a measurement cannot run.
pub fn run(rounds: usize, seconds: f64) -> Result<()> {
    let kvm = need::Need::Kvm.missing();
    let isolation = if kvm.is_none() { "kvm" } else { "tcg" };
    println!(
        "isolation: {isolation}{}",
        kvm.map(|r| format!(" ({r})")).unwrap_or_default()
    );
    let paths = [
        bridge()?,
        sluice("sluice veth", Wiring::Veth)?,
        sluice("sluice tap", Wiring::Tap)?,
    ];
    let mut samples: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..paths.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for path in order {
            eprintln!("round {}/{rounds}: {}", round + 1, paths[path].name);
            for (metric, value) in measure(&paths[path], seconds)?.into_iter().enumerate() {
                samples.entry((metric, path)).or_default().push(value);
            }
        }
    }
    print(&paths, &samples);
    Ok(())
}

fn bridge() -> Result<Path> {
    let mut bridge = Bridge::new(2)?;
    let (server, address) = bridge.pods.pop().context("two pods")?;
    let (client, _) = bridge.pods.pop().context("two pods")?;
    path("bridge", client, server, address.to_string(), |server| {
        Keeper::Bridge(bridge, server)
    })
}

fn sluice(name: &'static str, wiring: Wiring) -> Result<Path> {
    let mut lab = Lab::start(&Plan {
        wiring,
        ..Plan::default()
    })?;
    let server = lab.pods.pop().context("two pods")?;
    let client = lab.pods.pop().context("two pods")?;
    let address = server.v4.to_string();
    path(name, client.netns, server.netns, address, |s| {
        Keeper::Lab(Box::new(lab), s)
    })
}

fn path(
    name: &'static str,
    client: Netns,
    server: Netns,
    address: String,
    keeper: impl FnOnce(Netns) -> Keeper,
) -> Result<Path> {
    let mut load = server.command(program("sluice-load"));
    let _server = Running::start(
        "sluice-load",
        load.args(["serve", "[::]:7000"]).stdout(Stdio::null()),
    )?;
    command::until("the server", Duration::from_secs(5), || {
        let listening = server.run(&["ss", "-ltnH"])?;
        anyhow::ensure!(listening.contains(":7000"), "not yet");
        Ok(())
    })?;
    Ok(Path {
        name,
        client,
        address,
        _server,
        _keeper: keeper(server),
    })
}

fn measure(path: &Path, seconds: f64) -> Result<Vec<f64>> {
    // Named, because the machine's default may pace.
    let cubic = ["--congestion", "cubic"];
    let (bulk, bulk_cpu) = with_cpu(|| load(path, "bulk", seconds, &cubic))?;
    let (paced, _) = with_cpu(|| load(path, "bulk", seconds, &["--congestion", "bbr"]))?;
    let (udp, udp_cpu) = with_cpu(|| load(path, "udp", seconds, &[]))?;
    let (rr, rr_cpu) = with_cpu(|| load(path, "rr", seconds, &[]))?;
    let (connect, _) = with_cpu(|| load(path, "connect", seconds, &[]))?;
    let done = |o: &Outcome| o.done.max(1) as f64;
    Ok(vec![
        bulk.rate() * 8.0 / 1e9,
        bulk_cpu / (done(&bulk) / 1e9),
        paced.rate() * 8.0 / 1e9,
        udp.rate() / 1e3,
        udp_cpu / (done(&udp) / 1e6),
        100.0 * udp.lost as f64 / (udp.done + udp.lost).max(1) as f64,
        rr.latency.p50,
        rr.latency.p99,
        rr_cpu * 1e6 / done(&rr),
        connect.rate(),
    ])
}

fn with_cpu<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let before = cpu::machine()?;
    let value = work()?;
    Ok((value, cpu::machine()? - before))
}

fn load(path: &Path, kind: &str, seconds: f64, more: &[&str]) -> Result<Outcome> {
    let program = program("sluice-load");
    let server = format!("{}:7000", path.address);
    let time = seconds.to_string();
    let mut words = vec![
        program.to_str().context("path")?,
        kind,
        &server,
        "--time",
        &time,
    ];
    words.extend(more);
    Ok(serde_json::from_str(&path.client.run(&words)?)?)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(paths: &[Path], samples: &BTreeMap<(usize, usize), Vec<f64>>) {
    println!("median (lowest..highest), ratio to the bridge");
    for (metric, (name, unit)) in METRICS.iter().enumerate() {
        let base = samples.get(&(metric, 0)).map_or(f64::NAN, |v| median(v));
        print!("{name:<14}{unit:>8}");
        for (index, path) in paths.iter().enumerate() {
            let values = samples
                .get(&(metric, index))
                .map(Vec::as_slice)
                .unwrap_or_default();
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let middle = median(values);
            print!("  | {} {middle:.2} ({low:.2}..{high:.2})", path.name);
            if index > 0 {
                print!(" {:.2}x", middle / base);
            }
        }
        println!();
    }
}
