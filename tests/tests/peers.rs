//! Nodes that know each other from Node objects, which come, change and go while traffic flows.

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sluice_tests::command::{self, Running};
use sluice_tests::lab::Lab;
use sluice_tests::membership::{self, object, seen};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::traffic::{load, serve};
use sluice_tests::underlay::{Underlay, node4};
use std::process::Stdio;
use std::time::Duration;

/// Far more than the second that is the goal.
const PATIENCE: Duration = Duration::from_secs(30);

fn reaches(from: &Netns, to: &str) -> Result<()> {
    from.run(&["ping", "-n", "-c", "1", "-W", "1", to])
        .map(drop)
}

fn until_reached(from: &Lab, to: &Lab) -> Result<()> {
    let (from, to) = (&from.pods[0], &to.pods[0]);
    for to in [to.v4.to_string(), to.v6.to_string()] {
        command::until("the first ping", PATIENCE, || reaches(&from.netns, &to))?;
    }
    Ok(())
}

fn until_not_reached(from: &Lab, to: &Lab) -> Result<()> {
    let (from, to) = (&from.pods[0], to.pods[0].v4.to_string());
    command::until("no answer", PATIENCE, || {
        ensure!(reaches(&from.netns, &to).is_err(), "it still answers");
        Ok(())
    })
}

/// Pings without end; [`lost`] ends it.
fn pinging(from: &Lab, to: &Lab) -> Result<(Running, std::path::PathBuf)> {
    let (from, to) = (&from.pods[0], to.pods[0].v4.to_string());
    let path = std::env::temp_dir().join(format!("{}.ping", from.netns.name()));
    let log = std::fs::File::create(&path)?;
    let mut ping = from.netns.command("ping");
    ping.args(["-n", "-i", "0.02", &to])
        .stdout(Stdio::from(log));
    Ok((Running::start("ping", &mut ping)?, path))
}

/// How many pings were sent and how many lost on the way.
fn lost((mut ping, path): (Running, std::path::PathBuf)) -> Result<(u32, u32)> {
    ping.signal(Signal::SIGINT);
    ping.wait()?;
    let text = std::fs::read_to_string(&path)?;
    std::fs::remove_file(&path)?;
    let counts = text
        .lines()
        .find(|line| line.contains("packets transmitted"));
    let mut words = counts
        .with_context(|| format!("no summary:\n{text}"))?
        .split([' ', ',']);
    let mut number = |word: &str| -> Result<u32> {
        let found = words.find_map(|it| it.parse().ok());
        found.with_context(|| format!("{word} in {text}"))
    };
    let (sent, received) = (number("sent")?, number("received")?);
    Ok((sent, sent - received))
}

fn nodes_come_change_and_go() -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let node = |number| membership::prepare(&underlay, number, 1450, &json!({}));
    let (mut a, mut b, mut c) = (node(1)?, node(2)?, node(3)?);
    membership::write(&a, &object(2))?;
    membership::write(&b, &object(1))?;
    for other in [1, 2] {
        membership::write(&c, &object(other))?;
    }
    for lab in [&mut a, &mut b, &mut c] {
        lab.start_node()?;
    }
    let result = (|| {
        until_reached(&a, &b)?;
        let steady = pinging(&a, &b)?;
        let _there = serve(&b.pods[0].netns)?;
        let bulk = std::thread::scope(|scope| -> Result<()> {
            let to = format!("{}:7000", b.pods[0].v4);
            let from = &a.pods[0].netns;
            let bulk = scope.spawn(move || load(from, &["checked", &to, "--bytes", "200000000"]));
            third_node(&a, &c)?;
            let seen = bulk.join().ok().context("the transfer panicked")??;
            ensure!(seen.done >= 200_000_000, "{} bytes arrived", seen.done);
            Ok(())
        });
        bulk?;
        let (sent, lost) = lost(steady)?;
        println!("{sent} pings beside it, {lost} lost");
        ensure!(sent > 100 && lost == 0, "{lost} of {sent} pings were lost");
        Ok(())
    })();
    if result.is_err() {
        for lab in [&a, &b, &c] {
            eprintln!(
                "{}\n{}",
                lab.log_tail(),
                lab.sluice(&["status"]).unwrap_or_default()
            );
        }
    }
    result
}

/// The third node comes, moves to another address, has faulty neighbors, gets other ranges, and goes; `a` hears of it by its object alone.
fn third_node(a: &Lab, c: &Lab) -> Result<()> {
    until_not_reached(a, c)?;
    membership::write(a, &object(3))?;
    until_reached(a, c)?;
    let peer = seen(a, "node-3")?;
    ensure!(
        peer["origin"] == "cluster" && peer["way"] == "vxlan",
        "{peer}"
    );

    // It has another address now: its object says so to us, and it sees its card.
    let (old, new) = (node4(3), "192.168.50.77");
    for (verb, address) in [("del", old.as_str()), ("add", new)] {
        let address = format!("{address}/24");
        c.host.run(&["ip", "addr", verb, &address, "dev", "eth0"])?;
    }
    let mut moved = object(3);
    moved["status"]["addresses"][0]["address"] = new.into();
    membership::write(c, &moved)?;
    until_not_reached(a, c)?;
    membership::write(a, &moved)?;
    until_reached(a, c)?;
    let peer = seen(a, "node-3")?;
    ensure!(peer["address"] == new, "{peer}");

    unusable(a)?;
    until_reached(a, c)?;

    // Other ranges: what was its is nobody's.
    let mut other = moved.clone();
    other["spec"]["podCIDRs"] = json!(["10.244.33.0/24"]);
    membership::write(a, &other)?;
    until_not_reached(a, c)?;
    membership::write(a, &moved)?;
    until_reached(a, c)?;

    membership::remove(a, 3)?;
    until_not_reached(a, c)?;
    command::until("nothing said of it", PATIENCE, || {
        ensure!(seen(a, "node-3").is_err(), "it is still spoken of");
        Ok(())
    })
}

/// Objects that cannot be used are named, and neither the node's health nor the others' traffic suffers.
fn unusable(a: &Lab) -> Result<()> {
    let odd = |name: &str, address: &str, pods: Value| {
        let mut node = object(9);
        node["metadata"]["name"] = name.into();
        node["spec"]["podCIDRs"] = pods;
        node["status"]["addresses"] = json!([{"type": "InternalIP", "address": address}]);
        node
    };
    let mut nowhere = odd("a-nowhere", "192.168.50.90", json!(["10.244.90.0/24"]));
    nowhere["status"] = json!({});
    let objects = [
        (
            odd("a-greedy", "192.168.50.91", json!(["10.244.3.0/25"])),
            "overlaps 10.244.3.0/24",
        ),
        (
            odd("a-double", "192.168.50.2", json!(["10.244.92.0/24"])),
            "this node",
        ),
        (
            odd("a-podless", "192.168.50.93", json!([])),
            "no range of pods",
        ),
        (nowhere, "no InternalIP"),
    ];
    for (node, _) in &objects {
        membership::write(a, node)?;
    }
    for (node, why) in &objects {
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        command::until("a word on the object", PATIENCE, || {
            let said = seen(a, name)?;
            ensure!(
                said["problem"].as_str().is_some_and(|it| it.contains(why)),
                "{said}"
            );
            Ok(())
        })?;
        ensure!(
            a.sluice(&["status"])?.contains(&format!("! node {name}: ")),
            "{name} in the status"
        );
    }
    ensure!(a.status()?["healthy"] == true, "{:#}", a.status()?);
    for (node, _) in &objects {
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        sluice_tests::policy::remove(a, &format!("{name}.json"))?;
    }
    Ok(())
}

#[test]
fn o16_t11_peers_follow_node_objects_and_nobody_elses_traffic_feels_it() {
    need!(
        "o16_t11_peers_follow_node_objects_and_nobody_elses_traffic_feels_it",
        Root,
        Kvm,
        Tool("ip")
    );
    nodes_come_change_and_go().expect("every step");
}
