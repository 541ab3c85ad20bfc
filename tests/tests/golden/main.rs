//! Golden frames: for one and the same packet of a pod, the frame that a node of ours puts on the wire and the frame that the
//! kernel's vxlan device or Open vSwitch puts there, byte for byte. Both come from the same run: the peer takes our node's
//! place, with its addresses. Whatever differs is named here with the reason, or the test fails.

mod packets;
mod rules;

use anyhow::{Context as _, Result, ensure};
use packets::Sample;
use rules::{Other, differences};
use serde_json::{Value, json};
use sluice_tests::capture::Capture;
use sluice_tests::command;
use sluice_tests::lab::Plan;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::ovs::{OpenVswitch, SCHEMA};
use sluice_tests::underlay::{Flannel, Peer, Underlay};
use std::path::Path;
use std::time::Duration;

/// The number of the node that sends, ours and then the other; and of the one that is sent to.
const HERE: u8 = 1;
const THERE: u8 = 9;
/// A first pod's identity where no cluster gives it another.
const IDENTITY: u32 = 272;

const fn peer(number: u8, six: bool) -> Peer {
    Peer {
        number,
        six,
        direct: false,
    }
}

/// The frames of all samples, as a pod sends them and the wire has them.
fn frames(underlay: &Underlay, pod: &Netns, samples: &[Sample]) -> Result<Vec<Vec<u8>>> {
    let capture = Capture::whole(&underlay.netns, &format!("port{HERE}"), "udp")?;
    let mut all = Vec::new();
    for sample in samples {
        let what = format!("the frame of {}", sample.name);
        all.push(command::until(&what, Duration::from_secs(15), || {
            // The first ones may be lost to neighbors that are not known yet.
            sample.send(pod)?;
            std::thread::sleep(Duration::from_millis(20));
            let frames = capture.frames()?;
            let found = frames.into_iter().find(|frame| sample.is_in(frame));
            found.context("not on the wire")
        })?);
    }
    Ok(all)
}

/// Frames of a node of ours, which is gone afterwards.
fn of_ours(underlay: &Underlay, tunnel: &Value, six: bool, mtu: u16) -> Result<Vec<Vec<u8>>> {
    let plan = Plan {
        pods: 1,
        number: HERE,
        mtu,
        ..Plan::default()
    };
    let mut lab = underlay.node(&plan, tunnel, &[peer(THERE, six)])?;
    lab.host.run(&["ethtool", "-K", "eth0", "tx", "off"])?;
    lab.start_node()?;
    let frames = frames(underlay, &lab.pods[0].netns, &packets::samples(mtu)?);
    if frames.is_err() {
        eprintln!("{}\n{:#}", lab.log_tail(), lab.status()?);
    }
    // Its place on the wire is another's now.
    underlay
        .netns
        .run(&["ip", "link", "del", &format!("port{HERE}")])?;
    frames
}

/// The wire, and a machine on it that is the peer of both: it only has to have an address.
fn wire() -> Result<(Underlay, Netns)> {
    let underlay = Underlay::new(1500)?;
    let there = Netns::new("there")?;
    underlay.attach(&there, THERE)?;
    Ok((underlay, there))
}

/// Compares frames of all samples; says what differed.
fn compared(ours: &[Vec<u8>], theirs: &[Vec<u8>], mtu: u16, other: Other) -> Result<()> {
    let samples = packets::samples(mtu)?;
    ensure!(samples.len() == ours.len() && ours.len() == theirs.len());
    for ((sample, ours), theirs) in samples.iter().zip(ours).zip(theirs) {
        let differing = differences(ours, theirs, other, sample).with_context(|| {
            format!("{}:\nours   {ours:02x?}\ntheirs {theirs:02x?}", sample.name)
        })?;
        println!(
            "{other:?}: {}: {} bytes, the same but for {}",
            sample.name,
            ours.len(),
            differing.join(", ")
        );
    }
    Ok(())
}

fn with_the_kernel(six: bool) -> Result<()> {
    let mtu = if six { 1430 } else { 1450 };
    let (underlay, _there) = wire()?;
    let ours = of_ours(&underlay, &json!({}), six, mtu)?;
    let theirs = Flannel::new(&underlay, HERE, &peer(THERE, six))?;
    theirs.node.run(&["ethtool", "-K", "eth0", "tx", "off"])?;
    let theirs = frames(&underlay, &theirs.pod, &packets::samples(mtu)?)?;
    compared(&ours, &theirs, mtu, Other::Kernel)
}

#[test]
fn o01_o02_o08_frames_are_those_of_the_kernels_vxlan_byte_for_byte() {
    need!(
        "o01_o02_o08_frames_are_those_of_the_kernels_vxlan_byte_for_byte",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bridge"),
        Tool("ethtool"),
        Tool("tcpdump")
    );
    for six in [false, true] {
        with_the_kernel(six).expect("the same frames");
    }
}

fn with_open_vswitch(kind: &str, port: u16, mtu: u16) -> Result<()> {
    let (underlay, _there) = wire()?;
    let tunnel = json!({"protocol": kind, "port": port});
    let ours = of_ours(&underlay, &tunnel, false, mtu)?;
    let switch = OpenVswitch::new(&underlay, (HERE, THERE), (kind, port), mtu)?;
    if kind == "geneve" {
        switch.tell_by_option(THERE, (0xff53, 0x01), IDENTITY)?;
    }
    let theirs = frames(&underlay, &switch.pod, &packets::samples(mtu)?);
    let theirs = theirs.with_context(|| switch.logs())?;
    compared(&ours, &theirs, mtu, Other::OpenVswitch)
}

#[test]
fn o01_o11_o14_frames_are_those_of_open_vswitch_byte_for_byte() {
    let test = "o01_o11_o14_frames_are_those_of_open_vswitch_byte_for_byte";
    let tools = [
        "ip",
        "ethtool",
        "tcpdump",
        "ovs-vswitchd",
        "ovsdb-server",
        "ovs-ofctl",
    ];
    if !need::met(test, &[Root, Kvm]) || !tools.iter().all(|tool| need::met(test, &[Tool(tool)])) {
        return;
    }
    if !Path::new(SCHEMA).exists() {
        return need::skip(test, "needs openvswitch-common");
    }
    for (kind, port, mtu) in [("vxlan", 4789, 1450), ("geneve", 6081, 1442)] {
        with_open_vswitch(kind, port, mtu).expect(kind);
    }
}
