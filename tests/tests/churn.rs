//! Pods come and go while the plugin and the node are killed at random: nothing is left, and no two pods ever had one address.

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::Value;
use sluice_tests::cni::{Call, CniLab, call_plugin, start_plugin};
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::collections::HashMap;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PODS: usize = 200;
const WORKERS: usize = 4;

/// Numbers that look random and come again with the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// What all workers share.
struct Churn<'a> {
    config: &'a Value,
    /// Who has which address, as far as ADD has answered and DEL has not.
    owners: Mutex<HashMap<String, String>>,
    doubles: Mutex<Vec<String>>,
    done: AtomicUsize,
    plugins_killed: AtomicUsize,
    nodes_killed: AtomicUsize,
}

impl Churn<'_> {
    fn pod(&self, id: &str, dice: &mut Dice) -> Result<()> {
        let netns = Netns::new(id)?;
        let path = netns.path();
        let path = path.to_str().context("path")?;
        let mut addresses = Vec::new();
        if let Some(result) = self.call("ADD", id, path, dice)? {
            for ip in result["ips"].as_array().context("ips")? {
                addresses.push(ip["address"].as_str().context("an address")?.to_owned());
            }
        }
        for address in &addresses {
            let mut owners = self.owners.lock().expect("no worker panics");
            if let Some(other) = owners.insert(address.clone(), id.to_owned()) {
                let text = format!("{address} is {id}'s and {other}'s");
                self.doubles.lock().expect("no worker panics").push(text);
            }
        }
        // It is the pod's until its DEL begins.
        let mut owners = self.owners.lock().expect("no worker panics");
        for address in &addresses {
            owners.remove(address);
        }
        drop(owners);
        // Sometimes the sandbox is gone before its DEL.
        let netns = (dice.roll(4) > 0).then_some(netns);
        let started = Instant::now();
        while self.call("DEL", id, path, dice)?.is_none() {
            anyhow::ensure!(
                started.elapsed() < Duration::from_secs(120),
                "no DEL of {id} succeeds"
            );
        }
        drop(netns);
        self.done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// One call, perhaps killed in the middle: `None` for one that did not succeed.
    fn call(&self, verb: &str, id: &str, netns: &str, dice: &mut Dice) -> Result<Option<Value>> {
        let mut command = Command::new(program("sluice-cni"));
        let call = Call::new(verb, id, netns);
        if dice.roll(4) == 0 {
            let mut child = start_plugin(&mut command, &call, self.config)?;
            thread::sleep(Duration::from_micros(dice.roll(30_000)));
            // It may have ended by itself.
            let _gone_already = child.kill();
            child.wait()?;
            self.plugins_killed.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        }
        Ok(call_plugin(&mut command, &call, self.config)?.result().ok())
    }
}

#[test]
fn c14_c15_200_pods_under_random_kills_leave_nothing_and_share_no_address() {
    let test = "c14_c15_200_pods_under_random_kills_leave_nothing_and_share_no_address";
    if !need::met(test, &[Root, Kvm, Tool("ip")]) {
        return;
    }
    let seed = 0x5eed;
    let mut lab = CniLab::start(Wiring::Veth).expect("a node");
    let config = lab.config("1.1.0", &Value::Null);
    let churn = Churn {
        config: &config,
        owners: Mutex::default(),
        doubles: Mutex::default(),
        done: AtomicUsize::new(0),
        plugins_killed: AtomicUsize::new(0),
        nodes_killed: AtomicUsize::new(0),
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let churn = &churn;
                scope.spawn(move || -> Result<()> {
                    let mut dice = Dice(seed + worker as u64);
                    // On a fast machine more pods come and go, so that the node has been killed often enough.
                    for n in 0..PODS {
                        if n >= PODS / WORKERS && churn.nodes_killed.load(Ordering::Relaxed) > 2 {
                            break;
                        }
                        churn.pod(&format!("w{worker}n{n}"), &mut dice)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let mut dice = Dice(seed ^ 0xdead);
        while !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(300 + dice.roll(900)));
            let node = lab.lab.node().expect("a node");
            node.signal(Signal::SIGKILL);
            node.wait().expect("its end");
            lab.lab.forget_node();
            churn.nodes_killed.fetch_add(1, Ordering::Relaxed);
            lab.lab.start_node().expect("a node again");
        }
        for worker in workers {
            worker
                .join()
                .expect("no worker panics")
                .expect("every pod comes and goes");
        }
    });
    let plugins_killed = churn.plugins_killed.load(Ordering::Relaxed);
    let (pods, nodes_killed) = (
        churn.done.load(Ordering::Relaxed),
        churn.nodes_killed.load(Ordering::Relaxed),
    );
    println!(
        "seed {seed:#x}: {pods} pods, {plugins_killed} plugins and {nodes_killed} nodes killed"
    );
    assert!(pods >= PODS);
    assert_eq!(*churn.doubles.lock().expect("no worker panics"), [""; 0]);
    // The last node carries out the DELs that were kept while there was none; it is healthy before it is done with them.
    sluice_tests::command::until("nothing left", Duration::from_secs(60), || {
        let left = lab.left()?;
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .expect("every kept DEL is carried out");
    let filters = lab.lab.host.run(&["tc", "qdisc", "show"]).expect("a look");
    assert!(
        !filters.contains("slt") && !filters.contains("slv"),
        "{filters}"
    );
    let routes = lab
        .lab
        .host
        .run(&["ip", "route", "show", "table", "all"])
        .expect("a look");
    assert!(
        !routes.contains("slt") && !routes.contains("slv"),
        "{routes}"
    );
    assert!(
        nodes_killed > 2 && plugins_killed > 20,
        "the churn was not wild enough"
    );
}
