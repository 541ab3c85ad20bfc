//! The daemon is killed again and again while packets flow: none is lost, no interface notices, and pods can be added at once.

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use sluice_tests::cluster::{Cluster, Mode};
use sluice_tests::cni::CniLab;
use sluice_tests::command::Running;
use sluice_tests::lab::{Lab, Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::traffic;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const KILLS: usize = 20;

/// Traffic between two namespaces, begun before the first kill and ended after the last.
struct Traffic {
    pings: Child,
    requests: Child,
    stream: Child,
    _server: Running,
}

impl Traffic {
    fn start(from: &Netns, to: &Netns, address: &str) -> Result<Self> {
        let server = traffic::serve(to)?;
        // The first packets find their neighbors before anything is counted.
        traffic::ping(from, address, 3, 56)?;
        let at = traffic::at(address, 7000);
        let piped = |command: &mut std::process::Command| {
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
        };
        // Ended by SIGINT, upon which ping says what it has seen.
        let pings = piped(from.command("ping").args(["-q", "-i", "0.001", address]))?;
        let load = program("sluice-load");
        let time = "600";
        let requests = ["paced", &at, "--rate", "100", "--time", time];
        let requests = piped(from.command(&load).args(requests))?;
        let stream = piped(from.command(&load).args(["rr", &at, "--time", time]))?;
        Ok(Self {
            pings,
            requests,
            stream,
            _server: server,
        })
    }

    /// How many pings were sent and answered. Requests and the one connection must still be at work.
    fn end(mut self) -> Result<String> {
        for (name, child) in [
            ("the requests", &mut self.requests),
            ("the connection", &mut self.stream),
        ] {
            if let Some(status) = child.try_wait()? {
                let mut said = String::new();
                if let Some(pipe) = &mut child.stderr {
                    std::io::Read::read_to_string(pipe, &mut said)?;
                }
                anyhow::bail!("{name} ended with {status}: {said}");
            }
        }
        signal(&self.pings, Signal::SIGINT)?;
        let mut summary = String::new();
        let pipe = self.pings.stdout.as_mut().context("no output")?;
        std::io::Read::read_to_string(pipe, &mut summary)?;
        let line = summary
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .with_context(|| format!("no summary: {summary}"))?;
        let numbers: Vec<u64> = line
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .collect();
        let [sent, answered, ..] = numbers[..] else {
            anyhow::bail!("{line}");
        };
        // The last one may have been on its way when ping was ended.
        ensure!(sent > 1000 && sent - answered <= 1, "{line}");
        Ok(line.to_owned())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        for child in [&mut self.pings, &mut self.requests, &mut self.stream] {
            // One that has ended already is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    Ok(nix::sys::signal::kill(pid, signal)?)
}

/// Every interface of a namespace with how often its carrier has changed.
fn carriers(netns: &Netns) -> Result<String> {
    netns.run(&[
        "sh",
        "-c",
        "for i in /sys/class/net/*; do echo ${i##*/} $(cat $i/ifindex $i/carrier_changes); done",
    ])
}

fn kill_daemon(lab: &mut Lab) -> Result<Duration> {
    let node = lab.node().context("no daemon")?;
    node.signal(Signal::SIGKILL);
    node.wait()?;
    lab.forget_node();
    // For a while there is none.
    thread::sleep(Duration::from_millis(50));
    let started = Instant::now();
    lab.start_node()?;
    Ok(started.elapsed())
}

fn appliance(lab: &Lab) -> Result<i64> {
    let status = lab.status()?;
    status["machine"]["pid"]
        .as_i64()
        .with_context(|| format!("no appliance: {status}"))
}

#[test]
fn p02_a_daemon_killed_twenty_times_costs_no_packet_in_both_wirings() {
    let test = "p02_a_daemon_killed_twenty_times_costs_no_packet_in_both_wirings";
    if !need::met(test, &[Root, Tool("ip"), Tool("ping")]) {
        return;
    }
    for wiring in [Wiring::Veth, Wiring::Tap] {
        one_node(wiring).expect("no packet lost");
    }
}

fn one_node(wiring: Wiring) -> Result<()> {
    let mut lab = CniLab::start(wiring)?;
    let none = serde_json::Value::Null;
    let (client, _) = lab.add("client", &none)?;
    let (server, added) = lab.add("server", &none)?;
    let address = added["ips"][0]["address"].as_str().context("an address")?;
    let address = address.split('/').next().context("an address")?;
    let traffic = Traffic::start(&client, &server, address)?;
    let looks = |lab: &CniLab| -> Result<[String; 3]> {
        Ok([
            carriers(&lab.lab.host)?,
            carriers(&client)?,
            carriers(&server)?,
        ])
    };
    let (before, pid) = (looks(&lab)?, appliance(&lab.lab)?);
    let (mut back, mut adds) = (Vec::new(), Vec::new());
    for round in 0..KILLS {
        back.push(kill_daemon(&mut lab.lab)?.as_millis());
        let name = format!("round{round}");
        let begin = Instant::now();
        let (netns, _) = lab.add(&name, &none)?;
        adds.push(begin.elapsed().as_millis());
        let path = netns.path();
        let removed = lab.del(&name, path.to_str().context("path")?)?;
        ensure!(
            removed.success,
            "DEL after the daemon's return: {removed:?}"
        );
    }
    ensure!(appliance(&lab.lab)? == pid, "the appliance was replaced");
    let (seen, after) = (traffic.end()?, looks(&lab)?);
    ensure!(
        before == after,
        "interfaces changed:\n{before:?}\n{after:?}"
    );
    println!("{wiring:?}: {seen}; daemon back after {back:?} ms, then ADD took {adds:?} ms");
    Ok(())
}

#[test]
fn p02_uplink_and_host_link_outlive_a_daemon_killed_twenty_times() {
    let test = "p02_uplink_and_host_link_outlive_a_daemon_killed_twenty_times";
    if !need::met(test, &[Root, Tool("ip"), Tool("ping")]) {
        return;
    }
    two_nodes().expect("no packet lost");
}

fn two_nodes() -> Result<()> {
    let mut cluster = Cluster::start(2, Mode::Vxlan, false)?;
    let other = cluster.pod(2)?.v4.to_string();
    let own = cluster.pod(1)?.v4.to_string();
    let between = Traffic::start(&cluster.pod(1)?.netns, &cluster.pod(2)?.netns, &other)?;
    // The host itself to its pod.
    let from_host = Traffic::start(&cluster.lab(1)?.host, &cluster.pod(1)?.netns, &own)?;
    let looks = |cluster: &Cluster| -> Result<[String; 2]> {
        Ok([
            carriers(&cluster.lab(1)?.host)?,
            carriers(&cluster.pod(1)?.netns)?,
        ])
    };
    let before = looks(&cluster)?;
    for _ in 0..KILLS {
        let lab = cluster.nodes.first_mut().context("a node")?;
        kill_daemon(lab)?;
    }
    let (between, from_host) = (between.end()?, from_host.end()?);
    let after = looks(&cluster)?;
    ensure!(
        before == after,
        "interfaces changed:\n{before:?}\n{after:?}"
    );
    println!("pod to pod of the other node: {between}; host to pod: {from_host}");
    Ok(())
}

#[test]
fn p02_a_second_daemon_waits_for_nothing_and_one_that_takes_over_costs_no_packet() {
    let test = "p02_a_second_daemon_waits_for_nothing_and_one_that_takes_over_costs_no_packet";
    if !need::met(test, &[Root, Tool("ip"), Tool("ping")]) {
        return;
    }
    take_over().expect("a take-over");
}

fn take_over() -> Result<()> {
    let mut lab = Lab::start(&sluice_tests::lab::Plan::default())?;
    let (client, server) = (&lab.pods[0].netns, &lab.pods[1].netns);
    let traffic = Traffic::start(client, server, &lab.pods[1].v4.to_string())?;
    let before = [carriers(&lab.host)?, carriers(client)?];
    let pid = appliance(&lab)?;
    let refused = lab.another_daemon(&[])?.wait()?;
    let said = lab.log_tail();
    ensure!(!refused.success(), "a second daemon runs: {said}");
    ensure!(said.contains("Another sluice-node"), "{said}");
    let next = lab.another_daemon(&["--take-over"])?;
    let first = lab.node().context("no daemon")?;
    let ended = first.wait()?;
    ensure!(ended.success(), "the first daemon ended with {ended}");
    lab.follow_daemon(next);
    lab.healthy(Duration::from_secs(30))?;
    ensure!(appliance(&lab)? == pid, "the appliance was replaced");
    // A take-over is over before enough was sent to speak of.
    thread::sleep(Duration::from_secs(4));
    println!("{}", traffic.end()?);
    let client = &lab.pods[0].netns;
    let after = [carriers(&lab.host)?, carriers(client)?];
    ensure!(
        before == after,
        "interfaces changed:\n{before:?}\n{after:?}"
    );
    Ok(())
}
