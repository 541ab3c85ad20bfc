//! Nodes joined by a wire: two of ours in every format and family, and one of ours with the kernel's VXLAN as the other.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sluice_tests::capture::Capture;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::underlay::{Flannel, Peer, Underlay, load, serve};
use std::time::Duration;

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

/// Pings until the neighbors are known, then counts.
fn ping(from: &Netns, to: &str, size: u16) -> Result<()> {
    let size = size.to_string();
    let words = [
        "ping", "-c", "5", "-i", "0.05", "-W", "2", "-M", "do", "-s", &size, to,
    ];
    sluice_tests::command::until("the first ping", Duration::from_secs(10), || {
        from.run(&["ping", "-c", "1", "-W", "1", to])
    })?;
    from.run(&words).map(drop)
}

fn tcp(from: &Netns, to: &str, bytes: &str) -> Result<String> {
    let seen = load(from, &["checked", to, "--bytes", bytes])?;
    Ok(format!("{:.2} Gb/s", seen.rate() * 8.0 / 1e9))
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
            ping(&pod.netns, to, 56)?;
            ping(&theirs.pod, &back, 56)?;
            ping(&pod.netns, to, mtu - header)?;
            ping(&theirs.pod, &back, mtu - header)?;
        }
        let _there = theirs.serve()?;
        let _here = serve(&pod.netns)?;
        for (to, back) in [
            (format!("{}:7000", theirs.v4), format!("{}:7000", pod.v4)),
            (
                format!("[{}]:7000", theirs.v6),
                format!("[{}]:7000", pod.v6),
            ),
        ] {
            println!("to {to}: {}", tcp(&pod.netns, &to, "100000000")?);
            println!("to {back}: {}", tcp(&theirs.pod, &back, "100000000")?);
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

fn two_of_ours(tunnel: &Value, six: bool, mtu: u16) -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let mut a = underlay.node(&plan(1, mtu), tunnel, &[peer(2, six)])?;
    let mut b = underlay.node(&plan(2, mtu), tunnel, &[peer(1, six)])?;
    a.start_node()?;
    b.start_node()?;
    let (from, to) = (&a.pods[0], &b.pods[0]);
    let result = (|| {
        ping(&from.netns, &to.v4.to_string(), mtu - 28)?;
        ping(&from.netns, &to.v6.to_string(), mtu - 48)?;
        let _there = serve(&to.netns)?;
        for to in [format!("{}:7000", to.v4), format!("[{}]:7000", to.v6)] {
            let seen = tcp(&from.netns, &to, "50000000")?;
            println!(
                "{tunnel} over {}: {seen} to {to}",
                if six { "IPv6" } else { "IPv4" }
            );
        }
        Ok(())
    })();
    if result.is_err() {
        eprintln!("{}\n{}\n{}", a.log_tail(), drops(&a), drops(&b));
    }
    result
}

#[test]
fn o01_o11_two_nodes_talk_over_vxlan_and_geneve_in_both_families() {
    need!(
        "o01_o11_two_nodes_talk_over_vxlan_and_geneve_in_both_families",
        Root,
        Kvm,
        Tool("ip")
    );
    for (protocol, over) in [("vxlan", 50u16), ("vxlan-gbp", 50), ("geneve", 58)] {
        for six in [false, true] {
            let mtu = 1500 - over - if six { 20 } else { 0 };
            let tunnel =
                json!({"protocol": protocol, "port": if over == 58 { 6081 } else { 8472 }});
            two_of_ours(&tunnel, six, mtu).expect(protocol);
        }
    }
}
