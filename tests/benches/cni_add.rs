//! How long an ADD takes: ours with the appliance's acknowledgement, beside the reference `bridge` + `host-local` of Debian in
//! the same run, one after the other and 64 at once. Prints a table; goals are ratios, not absolute times.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab, REFERENCE, call_plugin};
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

const SEQUENTIAL: usize = 200;
const PARALLEL: usize = 64;

/// A plugin under measurement.
struct Contender<'a> {
    name: &'static str,
    lab: &'a CniLab,
    config: Value,
    /// The reference runs in the node's namespace, where its bridge is.
    is_reference: bool,
}

impl Contender<'_> {
    fn command(&self) -> Command {
        if self.is_reference {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={}", self.lab.lab.host.path().display()));
            command.arg(Path::new(REFERENCE).join("bridge"));
            command
        } else {
            Command::new(program("sluice-cni"))
        }
    }

    fn call(&self, verb: &str, id: &str, netns: &Netns) -> Result<Duration> {
        let path = netns.path();
        let call = Call::new(verb, id, path.to_str().context("path")?);
        let said = call_plugin(&mut self.command(), &call, &self.config)?;
        said.result()
            .with_context(|| format!("{} {verb}", self.name))?;
        Ok(said.took)
    }

    /// Adds all, at once or one after the other, and removes them; the times of the ADDs.
    fn measure(&self, pods: &[Netns], at_once: bool) -> Result<Vec<Duration>> {
        let add = |(n, netns): (usize, &Netns)| self.call("ADD", &format!("p{n}"), netns);
        let mut times: Vec<Duration> = if at_once {
            thread::scope(|scope| {
                let add = &add;
                let threads: Vec<_> = pods
                    .iter()
                    .enumerate()
                    .map(|pod| scope.spawn(move || add(pod)))
                    .collect();
                let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                    thread
                        .join()
                        .unwrap_or_else(|_| anyhow::bail!("a caller panicked"))
                };
                threads.into_iter().map(join).collect::<Result<_>>()
            })?
        } else {
            pods.iter().enumerate().map(add).collect::<Result<_>>()?
        };
        for (n, netns) in pods.iter().enumerate() {
            self.call("DEL", &format!("p{n}"), netns)?;
        }
        times.sort();
        Ok(times)
    }
}

fn main() -> Result<()> {
    if !need::met("cni_add", &[Root, Kvm, Tool("ip"), Tool("nsenter")]) {
        return Ok(());
    }
    if !Path::new(REFERENCE).join("bridge").exists() {
        need::skip("cni_add", "needs containernetworking-plugins");
        return Ok(());
    }
    println!(
        "{:<28} {:>22} {:>26}",
        "ADD", "one by one p50 / p99", "64 at once p50 / p99"
    );
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
    let contenders = [
        Contender {
            name: "bridge + host-local",
            config: reference,
            lab: &reference_lab,
            is_reference: true,
        },
        Contender {
            name: "sluice, veth",
            config: own(&veth),
            lab: &veth,
            is_reference: false,
        },
        Contender {
            name: "sluice, tap",
            config: own(&tap),
            lab: &tap,
            is_reference: false,
        },
    ];
    let pods: Vec<Netns> = (0..SEQUENTIAL)
        .map(|n| Netns::new(&format!("bench{n}")))
        .collect::<Result<_>>()?;
    for contender in &contenders {
        // The first makes the bridge, and reads the programs from disk.
        contender.measure(pods.get(..5).context("pods")?, false)?;
    }
    for contender in &contenders {
        let alone = contender.measure(&pods, false)?;
        let together = contender.measure(pods.get(..PARALLEL).context("pods")?, true)?;
        println!(
            "{:<28} {:>22} {:>26}",
            contender.name,
            both(&alone),
            both(&together)
        );
    }
    Ok(())
}

fn both(times: &[Duration]) -> String {
    let at = |percent: usize| {
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(index).map_or(0.0, Duration::as_secs_f64) * 1000.0
    };
    format!("{:.1} / {:.1} ms", at(50), at(99))
}
