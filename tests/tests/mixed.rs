//! One cluster of two kinds of nodes: flannel's (a bridge and the kernel's vxlan devices) and ours, each knowing the other by
//! Node annotations alone.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sluice_tests::capture::Capture;
use sluice_tests::command;
use sluice_tests::flannel;
use sluice_tests::lab::Lab;
use sluice_tests::membership::{self, seen};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::traffic::{load, serve};
use sluice_tests::underlay::{Underlay, node4, node6};
use std::time::Duration;

const OURS: u8 = 1;
const THEIRS: u8 = 9;
/// Of pods whose packets travel over IPv6 at most.
const MTU: u16 = 1430;
const PATIENCE: Duration = Duration::from_secs(30);

fn reaches(from: &Netns, to: &str) -> Result<()> {
    from.run(&["ping", "-n", "-c", "1", "-W", "1", to])
        .map(drop)
}

/// Both ways, both families, the smallest and the largest packets; then checked bytes.
fn traffic(ours: &Lab, theirs: &flannel::Node, bytes: u64) -> Result<()> {
    let pod = &ours.pods[0];
    for (to, back, header) in [
        (&theirs.v4, pod.v4.to_string(), 28),
        (&theirs.v6, pod.v6.to_string(), 48),
    ] {
        command::until("the first ping", PATIENCE, || reaches(&pod.netns, to))?;
        let size = (MTU - header).to_string();
        let words = [
            "ping", "-n", "-c", "3", "-i", "0.1", "-W", "2", "-M", "do", "-s",
        ];
        pod.netns.run(&[&words[..], &[&size, to]].concat())?;
        theirs.pod.run(&[&words[..], &[&size, &back]].concat())?;
    }
    let (_there, _here) = (serve(&theirs.pod)?, serve(&pod.netns)?);
    for (from, to) in [
        (&pod.netns, format!("{}:7000", theirs.v4)),
        (&pod.netns, format!("[{}]:7000", theirs.v6)),
        (&theirs.pod, format!("{}:7000", pod.v4)),
        (&theirs.pod, format!("[{}]:7000", pod.v6)),
    ] {
        let done = load(from, &["checked", &to, "--bytes", &bytes.to_string()])?;
        ensure!(done.done >= bytes, "{} of {bytes} bytes to {to}", done.done);
    }
    Ok(())
}

/// In both families and both ways.
fn until_silent(ours: &Lab, theirs: &flannel::Node) -> Result<()> {
    let pod = &ours.pods[0];
    for (from, to) in [
        (&pod.netns, theirs.v4.clone()),
        (&pod.netns, theirs.v6.clone()),
        (&theirs.pod, pod.v4.to_string()),
        (&theirs.pod, pod.v6.to_string()),
    ] {
        command::until("silence", PATIENCE, || {
            ensure!(reaches(from, &to).is_err(), "{to} still answers");
            Ok(())
        })?;
    }
    Ok(())
}

/// What `sluice node` says of a node of ours, once it knows its object.
fn manifest(ours: &Lab) -> Result<Value> {
    let text = ours.sluice(&["node", "-o", "json"])?;
    serde_json::from_str(&text).context("the manifest is not JSON")
}

fn annotation<'a>(node: &'a Value, name: &str) -> &'a str {
    let value = &node["metadata"]["annotations"][format!("flannel.alpha.coreos.com/{name}")];
    value.as_str().unwrap_or_default()
}

fn mixed() -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let mut ours = membership::prepare(&underlay, OURS, MTU, &json!({}))?;
    let mut theirs = flannel::Node::new(&underlay, THEIRS, MTU)?;
    ours.start_node()?;
    let result = steps(&underlay, &ours, &mut theirs);
    if result.is_err() {
        let (status, drops) = (ours.sluice(&["status"]), ours.sluice(&["drops"]));
        eprintln!(
            "{}\n{}\n{}",
            ours.log_tail(),
            status.unwrap_or_default(),
            drops.unwrap_or_default()
        );
    }
    result
}

fn steps(underlay: &Underlay, ours: &Lab, theirs: &mut flannel::Node) -> Result<()> {
    // Our node is annotated with what it says of itself, which is all that flannel is told.
    let own = manifest(ours)?;
    membership::write(ours, &own)?;
    theirs.learn(&own)?;
    let object = theirs.object()?;
    membership::write(ours, &object)?;
    let capture = Capture::start(&underlay.netns, "wire", "udp port 8472")?;
    traffic(ours, theirs, 50_000_000)?;
    // As flannel does it: each family of pods over its own family of nodes.
    for (from, to) in [(OURS, THEIRS), (THEIRS, OURS)] {
        let four = format!(
            "ip.src == {} && ip.dst == {} && vxlan.vni == 1",
            node4(from),
            node4(to)
        );
        let six = format!(
            "ipv6.src == {} && ipv6.dst == {} && vxlan.vni == 1",
            node6(from),
            node6(to)
        );
        for (filter, inner) in [(four, "icmp"), (six, "icmpv6.type == 128")] {
            let filter = format!("{filter} && {inner}");
            let lines = capture.until_fields(&filter, &["udp.dstport"], 1)?;
            ensure!(
                lines.iter().all(|line| line == "8472"),
                "{filter}: {lines:?}"
            );
        }
    }
    let peers: Vec<Value> = serde_json::from_str(&ours.sluice(&["peers", "-o", "json"])?)?;
    let macs: Vec<&str> = peers
        .iter()
        .filter_map(|peer| peer["mac"].as_str())
        .collect();
    ensure!(peers.len() == 2 && macs.len() == 2, "{peers:?}");
    for (mac, data) in macs.iter().zip(["backend-data", "backend-v6-data"]) {
        ensure!(
            annotation(&object, data).contains(mac),
            "{mac} is not in {data}"
        );
    }

    // Their devices are made anew: what our node sends goes to MACs that nobody has, until the annotations say the new ones.
    theirs.reboot(None)?;
    theirs.learn(&own)?;
    until_silent(ours, theirs)?;
    membership::write(ours, &theirs.object()?)?;
    traffic(ours, theirs, 5_000_000)?;

    // Another address as well, which the annotation says alone: the object's own addresses are those of before.
    theirs.reboot(Some("192.168.50.99"))?;
    theirs.learn(&own)?;
    let moved = theirs.object()?;
    ensure!(
        annotation(&moved, "public-ip") == "192.168.50.99",
        "{moved:#}"
    );
    let mut only_annotated = moved.clone();
    only_annotated["status"] = object["status"].clone();
    membership::write(ours, &only_annotated)?;
    traffic(ours, theirs, 5_000_000)?;
    ensure!(
        seen(ours, &theirs.name())?["address"] == "192.168.50.99",
        "the address that is annotated"
    );

    // A VNI that is not ours is refused with a word, and nothing is sent into it.
    let mut odd = moved.clone();
    let data = annotation(&moved, "backend-data").replace("\"VNI\":1", "\"VNI\":2");
    odd["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-data"] = data.into();
    membership::write(ours, &odd)?;
    until_silent(ours, theirs)?;
    let problem = seen(ours, &theirs.name())?;
    ensure!(
        problem["problem"]
            .as_str()
            .is_some_and(|it| it.contains("VNI is 2")),
        "{problem}"
    );
    membership::write(ours, &moved)?;
    traffic(ours, theirs, 5_000_000)?;

    sluice_tests::policy::remove(ours, &format!("{}.json", theirs.name()))?;
    until_silent(ours, theirs)?;
    ensure!(seen(ours, &theirs.name()).is_err(), "it is still spoken of");
    ensure!(ours.status()?["healthy"] == true, "{:#}", ours.status()?);
    Ok(())
}

#[test]
fn o03_a_flannel_node_and_ours_are_one_cluster_by_node_annotations() {
    need!(
        "o03_a_flannel_node_and_ours_are_one_cluster_by_node_annotations",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bridge"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    mixed().expect("every step");
}
