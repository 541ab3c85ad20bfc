//! One node of ours on a wire with the kernel's VXLAN as the other.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sluice_tests::capture::Capture;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::traffic::{PORT, at, ping, serve, stream};
use sluice_tests::underlay::{Flannel, Peer, Underlay};

fn plan(number: u8, mtu: u16) -> Plan {
    Plan {
        pods: 1,
        number,
        mtu,
        ..Plan::default()
    }
}

const fn peer(number: u8, six: bool) -> Peer {
    Peer {
        number,
        six,
        direct: false,
    }
}

/// `segmentation`: who cuts large frames.
fn with_the_kernel(six: bool, segmentation: &str) -> Result<()> {
    let mtu = if six { 1430 } else { 1450 };
    let underlay = Underlay::new(1500)?;
    let mut ours = underlay.node(&plan(1, mtu), &json!({}), &[peer(9, six)])?;
    ours.change_config(|config| config["uplink"]["segmentation"] = segmentation.into())?;
    let theirs = Flannel::new(&underlay, 9, &peer(1, six))?;
    ours.start_node()?;
    let capture = Capture::start(&underlay.netns, "wire", "")?;
    let pod = &ours.pods[0];
    let result = (|| {
        for (to, back, header) in [
            (&theirs.v4, pod.v4.to_string(), 28),
            (&theirs.v6, pod.v6.to_string(), 48),
        ] {
            ping(&pod.netns, to, 5, 56)?;
            ping(&theirs.pod, &back, 5, 56)?;
            ping(&pod.netns, to, 5, mtu - header)?;
            ping(&theirs.pod, &back, 5, mtu - header)?;
        }
        let _there = theirs.serve()?;
        let _here = serve(&pod.netns)?;
        for (to, back) in [
            (&theirs.v4, pod.v4.to_string()),
            (&theirs.v6, pod.v6.to_string()),
        ] {
            let seen = stream(&pod.netns, &at(to, PORT), 100_000_000)?;
            println!("to {to}: {seen}");
            let seen = stream(&theirs.pod, &at(&back, PORT), 100_000_000)?;
            println!("to {back}: {seen}");
        }
        let seen = capture.read("udp port 8472")?;
        ensure!(
            seen.contains("OTV") || seen.contains("VXLAN"),
            "{seen:.600}"
        );
        // Over IPv6 what the last card is to complete is not complete on this wire; the kernel has taken it all the same.
        ensure!(
            six || !seen.contains("bad udp cksum"),
            "a bad checksum on the wire"
        );
        let status = ours.status()?;
        let cut = status["uplink"]["cut"].as_u64().context("no count")?;
        ensure!(
            (cut > 1000) == (segmentation == "daemon"),
            "{cut} frames cut by the daemon"
        );
        Ok(())
    })();
    if result.is_err() {
        eprintln!("{}\n{}", ours.log_tail(), drops(&ours));
    }
    result
}

fn drops(lab: &Lab) -> String {
    lab.status()
        .map_or_else(|e| e.to_string(), |status| format!("{status:#}"))
}

#[test]
fn o02_the_kernels_vxlan_with_flannels_parameters_is_the_other_node() {
    need!(
        "o02_the_kernels_vxlan_with_flannels_parameters_is_the_other_node",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bridge"),
        Tool("tcpdump")
    );
    with_the_kernel(false, "auto").expect("traffic over IPv4");
}

#[test]
fn v02_the_same_over_an_ipv6_underlay() {
    need!(
        "v02_the_same_over_an_ipv6_underlay",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bridge"),
        Tool("tcpdump")
    );
    with_the_kernel(true, "auto").expect("traffic over IPv6");
}

#[test]
fn m12_large_frames_are_cut_where_the_tap_cannot() {
    need!(
        "m12_large_frames_are_cut_where_the_tap_cannot",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bridge"),
        Tool("tcpdump")
    );
    for six in [false, true] {
        with_the_kernel(six, "daemon").expect("traffic in segments");
    }
}
