//! The benchmarks of one node and of two: the same traffic over Sluice, over the kernel's paths, over Open vSwitch and over the least
//! that a userspace process can do, interleaved in one run.
//!
//! All contenders stand at once, idle ones cost next to nothing, and how much they cost is printed; each round measures all of
//! them, every other round in reverse order. What is printed are medians with their spread and the ratio of medians to one
//! contender; nothing passes or fails. A contender that cannot be built or measured here is named with the reason.
//!
//! * [`one_node`], [`nodes`]: the contenders. [`forwarder`], [`vxlan`]: the least a process can do, as programs of their own.
//! * `nft`, `objects`: the same Services for the kernel and for Sluice.
//! * `measure`: the traffic; `congestion`: under which control.
//! * `report`, `svg`: the table, the JSON file and the chart.

mod congestion;
pub mod forwarder;
mod measure;
mod nft;
pub mod nodes;
mod objects;
pub mod one_node;
mod report;
mod svg;
pub mod vxlan;

use crate::command::{self, Running};
use crate::netns::Netns;
use crate::{cpu, signals, traffic};
use anyhow::{Context as _, Result};
use report::Report;
use std::time::{Duration, Instant};

/// The port of the traffic server behind the Service.
const POD_PORT: u16 = traffic::PORT;
/// The port of the one at the pod's own address. A client's port may have been used for the Service a moment ago: with one port for
/// both, the answers of the two connections could not be distinguished.
const DIRECT_PORT: u16 = POD_PORT + 1;
/// How often a contender may fail before it is not measured again.
const FAILURES: usize = 2;

/// What a contender is, for the colours of the chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Kernel,
    OpenVswitch,
    /// The least that a process between two taps can do.
    Floor,
    Sluice,
}

/// A standing contender: two pods and what is between them.
pub trait Topology: std::fmt::Debug {
    /// The namespace of the pod that sends.
    fn client(&self) -> &Netns;
    /// The namespace of the pod that answers.
    fn server(&self) -> &Netns;
    /// The answering pod's address.
    fn address(&self) -> String;
    /// Address and port of a Service that leads to the answering pod.
    fn service(&self) -> Option<String> {
        None
    }
}

/// A contender that is not built yet.
pub struct Candidate {
    name: &'static str,
    family: Family,
    /// One line for the reader.
    about: &'static str,
    build: Box<dyn FnOnce() -> Result<Box<dyn Topology>>>,
}

impl std::fmt::Debug for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Candidate {
    fn new<T: Topology + 'static>(
        (name, family): (&'static str, Family),
        about: &'static str,
        build: impl FnOnce() -> Result<T> + 'static,
    ) -> Self {
        Self {
            name,
            family,
            about,
            build: Box::new(move || Ok(Box::new(build()?))),
        }
    }
}

/// How long to measure, and how much.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub rounds: usize,
    /// Of each measurement.
    pub seconds: f64,
    /// Fewer contenders.
    pub few: bool,
}

/// A contender that is measured.
struct Contender {
    name: &'static str,
    topology: Box<dyn Topology>,
    failures: usize,
    // They end before the namespaces.
    servers: Vec<Running>,
}

impl Drop for Contender {
    fn drop(&mut self) {
        self.servers.clear();
    }
}

/// Builds what can be built of these contenders, measures them and writes the report.
///
/// # Errors
/// If a signal interrupts it, nothing can be built, or the report cannot be written.
pub fn run(
    (what, title): (&str, &str),
    candidates: Vec<Candidate>,
    base: &str,
    extent: Extent,
) -> Result<()> {
    let mut report = Report::new(what, title, extent)?;
    let before = used()?;
    let mut contenders = Vec::new();
    for candidate in candidates {
        eprintln!("building {}", candidate.name);
        let (name, family, about) = (candidate.name, candidate.family, candidate.about);
        let built = (candidate.build)().and_then(|topology| stand(name, topology));
        signals::go_on()?;
        match built {
            Ok(contender) => {
                let service = contender.topology.service();
                report.add(name, family, about, service);
                contenders.push(contender);
            }
            Err(error) => report.leave_out(name, &format!("{error:#}")),
        }
    }
    anyhow::ensure!(!contenders.is_empty(), "no contender can be built here");
    report.idle = [before, used()?];
    for round in 0..extent.rounds {
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            measure_one(&mut report, (index, &mut contenders[index]), round, extent)?;
        }
    }
    // Before the report: standard output may be closed by then, which ends the process at once.
    drop(contenders);
    report.finish(base)
}

fn measure_one(
    report: &mut Report,
    (index, contender): (usize, &mut Contender),
    round: usize,
    extent: Extent,
) -> Result<()> {
    if contender.failures >= FAILURES {
        return Ok(());
    }
    eprintln!("round {}/{}: {}", round + 1, extent.rounds, contender.name);
    let seen = measure::all(contender.topology.as_ref(), extent.seconds);
    signals::go_on()?;
    match seen {
        Ok(values) => report.sample(index, &values),
        Err(error) => {
            contender.failures += 1;
            report.failure(contender.name, round, &format!("{error:#}"));
        }
    }
    Ok(())
}

/// Starts the traffic server and waits until client and server reach each other.
fn stand(name: &'static str, topology: Box<dyn Topology>) -> Result<Contender> {
    for netns in [topology.client(), topology.server()] {
        congestion::cubic(netns)?;
        // So that connections that were closed within the last minute take no ports from new ones.
        netns.run(&[
            "sysctl",
            "-qw",
            "net.ipv4.ip_local_port_range=10240 65535",
            "net.ipv4.tcp_tw_reuse=1",
        ])?;
    }
    let servers = [POD_PORT, DIRECT_PORT]
        .map(|port| traffic::serve_at(topology.server(), port))
        .into_iter()
        .collect::<Result<_>>()?;
    let contender = Contender {
        name,
        failures: 0,
        servers,
        topology,
    };
    let topology = contender.topology.as_ref();
    for target in [Some(pod(topology)), topology.service()]
        .into_iter()
        .flatten()
    {
        let what = format!("an answer of {target}");
        command::until(&what, Duration::from_secs(15), || {
            traffic::load(topology.client(), &["rr", &target, "--time", "0.01"])
        })?;
    }
    Ok(contender)
}

/// Address and port of the traffic server.
fn pod(topology: &dyn Topology) -> String {
    traffic::at(&topology.address(), DIRECT_PORT)
}

/// Cores that the whole machine uses while nothing is measured.
fn used() -> Result<f64> {
    std::thread::sleep(Duration::from_millis(500));
    let (before, start) = (cpu::machine()?, Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    Ok((cpu::machine()? - before) / start.elapsed().as_secs_f64())
}

/// Runs plain words inside a namespace.
fn words(netns: &Netns, text: &str) -> Result<String> {
    netns.run(&text.split(' ').collect::<Vec<_>>())
}

/// Waits until a process has made an interface in a namespace.
fn until_link(netns: &Netns, link: &str, process: &mut Running) -> Result<()> {
    command::until(
        &format!("the interface {link}"),
        Duration::from_secs(5),
        || {
            if !process.is_running() {
                return Ok(Err(anyhow::anyhow!("its process has ended")));
            }
            netns.run(&["ip", "link", "show", link]).map(|_| Ok(()))
        },
    )?
    .with_context(|| format!("no interface {link}"))
}
