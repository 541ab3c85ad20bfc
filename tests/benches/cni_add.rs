//! How long an ADD takes: ours with the appliance's acknowledgement, beside the reference `bridge` + `host-local` of Debian,
//! interleaved in one run, one after the other and 64 at once; and how long the plugin takes to start. Prints a table.

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab, REFERENCE, call_plugin};
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

/// ADDs one after the other, in so many parts: between two parts of one plugin come the others.
const SEQUENTIAL: usize = 200;
const PARTS: usize = 4;
const PARALLEL: usize = 64;

/// A plugin under measurement, called in its node's namespace.
struct Contender<'a> {
    name: &'static str,
    lab: &'a CniLab,
    config: Value,
    program: PathBuf,
    alone: Vec<Duration>,
    together: Vec<Duration>,
}

impl<'a> Contender<'a> {
    fn new(name: &'static str, lab: &'a CniLab, config: Value, program: PathBuf) -> Self {
        Self {
            name,
            lab,
            config,
            program,
            alone: Vec::new(),
            together: Vec::new(),
        }
    }

    fn call(&self, verb: &str, id: &str, netns: &Netns) -> Result<Duration> {
        let path = netns.path();
        let call = Call::new(verb, id, path.to_str().context("path")?);
        let said = call_plugin(&mut Command::new(&self.program), &call, &self.config)?;
        said.result()
            .with_context(|| format!("{} {verb}", self.name))?;
        Ok(said.took)
    }

    /// One call for each pod from `threads` threads, each in the node's namespace before the clock starts.
    fn calls(&self, verb: &str, pods: &[Netns], threads: usize) -> Result<Vec<Duration>> {
        let host = File::open(self.lab.lab.host.path())?;
        let ready = Barrier::new(threads);
        let work = |first: usize| {
            setns(&host, CloneFlags::CLONE_NEWNET)?;
            ready.wait();
            let mine = pods.iter().enumerate().skip(first).step_by(threads);
            mine.map(|(n, netns)| self.call(verb, &format!("p{n}"), netns))
                .collect::<Result<Vec<_>>>()
        };
        let times = thread::scope(|scope| {
            let work = &work;
            let all: Vec<_> = (0..threads)
                .map(|first| scope.spawn(move || work(first)))
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread
                    .join()
                    .unwrap_or_else(|_| anyhow::bail!("a caller panicked"))
            };
            all.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        Ok(times.concat())
    }

    /// Adds all from so many threads and removes them; the times of the ADDs.
    fn measure(&self, pods: &[Netns], threads: usize) -> Result<Vec<Duration>> {
        let times = self.calls("ADD", pods, threads)?;
        self.calls("DEL", pods, 1)?;
        Ok(times)
    }
}

/// From fork to exit of a call that asks nothing of anybody.
fn start_times(program: &Path) -> Result<Vec<Duration>> {
    let version = |_| {
        let config = json!({"cniVersion": "1.0.0"});
        let said = call_plugin(
            &mut Command::new(program),
            &Call::new("VERSION", "", ""),
            &config,
        )?;
        said.result()?;
        Ok(said.took)
    };
    (0..SEQUENTIAL).map(version).collect()
}

fn main() -> Result<()> {
    if !need::met("cni_add", &[Root, Kvm, Tool("ip")]) {
        return Ok(());
    }
    if !Path::new(REFERENCE).join("bridge").exists() {
        need::skip("cni_add", "needs containernetworking-plugins");
        return Ok(());
    }
    let reference_lab = CniLab::start(Wiring::Veth)?;
    let (veth, tap) = (CniLab::start(Wiring::Veth)?, CniLab::start(Wiring::Tap)?);
    let reference = json!({
        "cniVersion": "1.0.0", "name": "reference", "type": "bridge", "bridge": "cni0",
        "isGateway": true, "ipMasq": false,
        "ipam": {
            "type": "host-local", "dataDir": reference_lab.path("reference"),
            "ranges": [[{"subnet": "10.89.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    });
    let own = |lab: &CniLab| {
        let ipam =
            json!({"type": "sluice", "dataDir": lab.path("networks"), "subnet": "10.88.0.0/16"});
        lab.config("1.0.0", &json!({"ipam": ipam}))
    };
    let (plugin, bridge) = (program("sluice-cni"), Path::new(REFERENCE).join("bridge"));
    let mut contenders = [
        Contender::new(
            "bridge + host-local",
            &reference_lab,
            reference,
            bridge.clone(),
        ),
        Contender::new("sluice, veth", &veth, own(&veth), plugin.clone()),
        Contender::new("sluice, tap", &tap, own(&tap), plugin.clone()),
    ];
    let pods: Vec<Netns> = (0..PARALLEL)
        .map(|n| Netns::new(&format!("bench{n}")))
        .collect::<Result<_>>()?;
    for contender in &contenders {
        // The first makes the bridge, and reads the programs from disk.
        contender.measure(pods.get(..5).context("pods")?, 1)?;
    }
    let part = pods.get(..SEQUENTIAL / PARTS).context("pods")?;
    for _ in 0..PARTS {
        for contender in &mut contenders {
            let (alone, together) = (
                contender.measure(part, 1)?,
                contender.measure(&pods, PARALLEL)?,
            );
            contender.alone.extend(alone);
            contender.together.extend(together);
        }
    }
    println!(
        "{:<28} {:>22} {:>26}",
        "ADD (p50 / p99)",
        format!("{SEQUENTIAL} one by one"),
        format!("{PARTS} times {PARALLEL} at once")
    );
    for Contender {
        name,
        alone,
        together,
        ..
    } in &contenders
    {
        println!("{name:<28} {:>22} {:>26}", both(alone), both(together));
    }
    for (name, program) in [("sluice-cni", &plugin), ("bridge", &bridge)] {
        println!(
            "{:<28} {:>22}",
            format!("start of {name}"),
            both(&start_times(program)?)
        );
    }
    Ok(())
}

fn both(times: &[Duration]) -> String {
    let mut times = times.to_vec();
    times.sort();
    let at = |percent: usize| {
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(index).map_or(0.0, Duration::as_secs_f64) * 1000.0
    };
    format!("{:.1} / {:.1} ms", at(50), at(99))
}
