//! The traffic between the two pods of a contender, and what it cost.

use super::{Topology, pod};
use crate::load::Outcome;
use crate::{cpu, traffic};
use anyhow::Result;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    pub(super) more_is_better: bool,
    /// Sent to the Service's address where the contender has one; to the pod's address otherwise.
    pub(super) service: bool,
}

const fn metric(
    name: &'static str,
    unit: &'static str,
    more_is_better: bool,
    service: bool,
) -> Metric {
    Metric {
        name,
        unit,
        more_is_better,
        service,
    }
}

/// What is measured, in the order of the table.
pub(super) const METRICS: [Metric; 9] = [
    metric("tcp bulk", "Gb/s", true, true),
    metric("tcp bulk cpu", "s/GB", false, true),
    metric("connections", "/s", true, true),
    metric("udp 64 B", "kpps", true, false),
    metric("udp 64 B cpu", "s/Mpkt", false, false),
    metric("udp 64 B lost", "%", false, false),
    metric("tcp rr p50", "us", false, false),
    metric("tcp rr p99", "us", false, false),
    metric("tcp rr cpu", "us/trip", false, false),
];

/// Measures everything once, in the order of [`METRICS`].
///
/// # Errors
/// If a measurement cannot run.
pub(super) fn all(topology: &dyn Topology, seconds: f64) -> Result<Vec<f64>> {
    let (pod, time) = (pod(topology), seconds.to_string());
    let service = topology.service().unwrap_or_else(|| pod.clone());
    let load = |kind: &str, to: &str, more: &[&str]| {
        let mut words = vec![kind, to, "--time", &time];
        words.extend(more);
        with_cpu(|| traffic::load(topology.client(), &words))
    };
    let (bulk, bulk_cpu) = load("bulk", &service, &["--congestion", "cubic"])?;
    let (connect, _) = load("connect", &service, &[])?;
    let (udp, udp_cpu) = load("udp", &pod, &[])?;
    let (rr, rr_cpu) = load("rr", &pod, &[])?;
    let done = |o: &Outcome| o.done.max(1) as f64;
    Ok(vec![
        bulk.rate() * 8.0 / 1e9,
        bulk_cpu / (done(&bulk) / 1e9),
        connect.rate(),
        udp.rate() / 1e3,
        udp_cpu / (done(&udp) / 1e6),
        100.0 * udp.lost as f64 / (udp.done + udp.lost).max(1) as f64,
        rr.latency.p50,
        rr.latency.p99,
        rr_cpu * 1e6 / done(&rr),
    ])
}

/// With the processor time of the whole machine meanwhile, in seconds.
fn with_cpu<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let before = cpu::machine()?;
    let value = work()?;
    Ok((value, cpu::machine()? - before))
}
