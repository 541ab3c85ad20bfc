//! Nodes that nobody here wrote, as the other end of the tunnel: the kernel's VXLAN at length, and Open vSwitch's userspace
//! datapath as VXLAN and Geneve peer.

use anyhow::{Result, ensure};
use serde_json::json;
use sluice_tests::capture::Capture;
use sluice_tests::lab::Plan;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::ovs::{OpenVswitch, SCHEMA};
use sluice_tests::traffic::{PORT, at, ping, serve, stream};
use sluice_tests::underlay::{Flannel, Peer, Underlay};
use std::path::Path;

const OURS: u8 = 1;
const THEIRS: u8 = 9;

fn plan(mtu: u16) -> Plan {
    Plan {
        pods: 1,
        number: OURS,
        mtu,
        ..Plan::default()
    }
}

const fn peer(number: u8) -> Peer {
    Peer {
        number,
        six: false,
        direct: false,
    }
}

fn a_gigabyte_each_way(segmentation: &str) -> Result<()> {
    let (underlay, mtu) = (Underlay::new(1500)?, 1450);
    let mut ours = underlay.node(&plan(mtu), &json!({}), &[peer(THEIRS)])?;
    ours.change_config(|config| config["uplink"]["segmentation"] = segmentation.into())?;
    let theirs = Flannel::new(&underlay, THEIRS, &peer(OURS))?;
    ours.start_node()?;
    let pod = &ours.pods[0];
    ping(&pod.netns, &theirs.v4, 5, mtu - 28)?;
    let (_there, _here) = (theirs.serve()?, serve(&pod.netns)?);
    for (from, to) in [
        (&pod.netns, theirs.v4.clone()),
        (&theirs.pod, pod.v4.to_string()),
    ] {
        let seen = stream(from, &at(&to, PORT), 1_000_000_000)?;
        println!("segmentation {segmentation}: a gigabyte to {to}: {seen}");
    }
    Ok(())
}

#[test]
fn o02_a_gigabyte_to_the_kernels_vxlan_and_back_arrives_whole_with_and_without_large_frames() {
    need!(
        "o02_a_gigabyte_to_the_kernels_vxlan_and_back_arrives_whole_with_and_without_large_frames",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bridge")
    );
    for segmentation in ["auto", "daemon"] {
        a_gigabyte_each_way(segmentation).expect(segmentation);
    }
}

fn with_open_vswitch(kind: &str, port: u16, mtu: u16) -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let tunnel = json!({"protocol": kind, "port": port});
    let mut ours = underlay.node(&plan(mtu), &tunnel, &[peer(THEIRS)])?;
    // Its userspace datapath takes frames as they are on a wire: whole checksums, one segment each.
    ours.host.run(&["ethtool", "-K", "eth0", "tx", "off"])?;
    let theirs = OpenVswitch::new(&underlay, (THEIRS, OURS), (kind, port), mtu)?;
    ours.start_node()?;
    let capture = Capture::start(&underlay.netns, "wire", "udp")?;
    let pod = &ours.pods[0];
    let result = (|| {
        for (to, back, header) in [
            (&theirs.v4, pod.v4.to_string(), 28),
            (&theirs.v6, pod.v6.to_string(), 48),
        ] {
            ping(&pod.netns, to, 3, mtu - header)?;
            ping(&theirs.pod, &back, 3, mtu - header)?;
        }
        let (_there, _here) = (serve(&theirs.pod)?, serve(&pod.netns)?);
        for (to, back) in [
            (&theirs.v4, pod.v4.to_string()),
            (&theirs.v6, pod.v6.to_string()),
        ] {
            stream(&pod.netns, &at(to, PORT), 10_000_000)?;
            stream(&theirs.pod, &at(&back, PORT), 10_000_000)?;
        }
        as_the_dissector_sees_it(&capture, kind)
    })();
    if result.is_err() {
        eprintln!(
            "{}\n{}\n{:#}",
            theirs.logs(),
            ours.log_tail(),
            ours.status()?
        );
    }
    result
}

/// The outer headers of both ends mean the same to somebody else.
fn as_the_dissector_sees_it(capture: &Capture, kind: &str) -> Result<()> {
    let fields: &[&str] = match kind {
        "vxlan" => &["vxlan.flags", "vxlan.vni", "ip.ttl", "ip.flags.df"],
        _ => &["geneve.version", "geneve.vni", "ip.ttl", "ip.flags.df"],
    };
    let mut seen = Vec::new();
    for number in [OURS, THEIRS] {
        let from = sluice_tests::underlay::node4(number);
        let filter = format!("ip.src == {from} && {kind} && icmp && !icmp.type == 3");
        let lines = capture.until_fields(&filter, fields, 1)?;
        // Each field holds the outer and then the inner value.
        let outer = |field: &str| field.split(',').next().unwrap_or_default().to_owned();
        let mut kinds: Vec<Vec<String>> = lines
            .iter()
            .map(|line| line.split(' ').map(outer).collect())
            .collect();
        kinds.sort();
        kinds.dedup();
        ensure!(kinds.len() == 1, "one kind of outer header: {kinds:?}");
        seen.extend(kinds);
        let malformed = format!("ip.src == {from} && {kind} && _ws.malformed");
        let malformed = capture.fields(&malformed, &["frame.number"])?;
        ensure!(
            malformed.is_empty(),
            "malformed frames of {from}: {malformed:?}"
        );
    }
    ensure!(
        seen[0] == seen[1],
        "ours {:?}, theirs {:?}",
        seen[0],
        seen[1]
    );
    Ok(())
}

fn skipped(test: &str) -> bool {
    let tools = [
        "ip",
        "ethtool",
        "tcpdump",
        "tshark",
        "ovs-vswitchd",
        "ovsdb-server",
        "ovs-ofctl",
    ];
    let met =
        need::met(test, &[Root, Kvm]) && tools.iter().all(|tool| need::met(test, &[Tool(tool)]));
    if met && !Path::new(SCHEMA).exists() {
        need::skip(test, "needs openvswitch-common");
        return true;
    }
    !met
}

#[test]
fn o01_open_vswitch_is_a_vxlan_peer() {
    if !skipped("o01_open_vswitch_is_a_vxlan_peer") {
        with_open_vswitch("vxlan", 4789, 1450).expect("traffic");
    }
}

#[test]
fn o11_open_vswitch_is_a_geneve_peer() {
    if !skipped("o11_open_vswitch_is_a_geneve_peer") {
        with_open_vswitch("geneve", 6081, 1442).expect("traffic");
    }
}
