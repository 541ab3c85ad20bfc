//! What Sluice claims of several nodes, each shown on a running cluster: the demo prints them, the tests assert them.

use crate::capture::Capture;
use crate::cluster::{Cluster, FAR4, FAR6, HOST_PORT, Mode, at, load, serve};
use crate::command;
use crate::lab::{Lab, Pod};
use crate::netns::Netns;
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(15);
/// Bytes of a transfer that is checked.
const BULK: &str = "10000000";

/// A claim, shown on a cluster.
pub type Claim = fn(&Cluster) -> Result<String>;

/// All of them, by what they say.
pub const ALL: [(&str, Claim); 5] = [
    ("pods of two nodes talk", pods_talk_across_nodes),
    ("nodes and pods talk untranslated", nodes_and_pods_talk),
    (
        "pods reach the outside as their node",
        pods_reach_the_outside_as_their_node,
    ),
    (
        "the outside reaches host ports",
        the_outside_reaches_host_ports,
    ),
    (
        "the host's own traffic stays the host's",
        the_hosts_own_traffic_stays_the_hosts,
    ),
];

fn pod(lab: &Lab) -> Result<&Pod> {
    lab.pods.first().context("the node has no pod")
}

/// Waits for the first answer, for neighbors have to be found, and then lets none be missing.
fn ping(from: &Netns, to: &str, size: u16) -> Result<()> {
    let size = size.to_string();
    command::until(&format!("a first answer of {to}"), PATIENCE, || {
        from.run(&["ping", "-c", "1", "-W", "1", to])
    })?;
    from.run(&[
        "ping", "-c", "5", "-i", "0.05", "-W", "2", "-M", "do", "-s", &size, to,
    ])
    .map(drop)
}

/// Transfers that arrive whole.
fn checked(from: &Netns, to: &str) -> Result<String> {
    let seen = load(from, &["checked", &at(to, 7000), "--bytes", BULK])?;
    Ok(format!("{:.2} Gb/s", seen.rate() * 8.0 / 1e9))
}

/// The sources of what arrives in a namespace while `action` runs.
fn sources(
    (at, interface): (&Netns, &str),
    action: impl FnOnce() -> Result<()>,
) -> Result<Vec<String>> {
    let capture = Capture::start(at, interface, "icmp or icmp6")?;
    action()?;
    shown(&capture, "icmp.type == 8 || icmpv6.type == 128")
}

/// The sources of what was captured and matches, once there is something.
fn shown(capture: &Capture, filter: &str) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    command::until("the capture", Duration::from_secs(5), || {
        lines = capture.fields(filter, &["ip.src", "ipv6.src"])?;
        ensure!(!lines.is_empty(), "nothing yet");
        Ok(())
    })?;
    let mut all: Vec<String> = lines.iter().map(|line| line.trim().to_owned()).collect();
    all.sort();
    all.dedup();
    Ok(all)
}

/// Pods of two nodes exchange full-size packets that may not be fragmented, and streams, in both families; on the wire it is
/// the tunnel that was asked for, by tshark's judgment.
///
/// # Errors
/// If anything is lost or looks otherwise.
pub fn pods_talk_across_nodes(cluster: &Cluster) -> Result<String> {
    let (a, b) = (pod(cluster.lab(1)?)?, pod(cluster.lab(2)?)?);
    let capture = Capture::start(&cluster.underlay.netns, "wire", "")?;
    ping(&a.netns, &b.v4.to_string(), cluster.mtu - 28)?;
    ping(&a.netns, &b.v6.to_string(), cluster.mtu - 48)?;
    let _there = serve(&b.netns)?;
    let four = checked(&a.netns, &b.v4.to_string())?;
    let six = checked(&a.netns, &b.v6.to_string())?;
    let (shown, network) = match cluster.mode {
        Mode::Vxlan => ("vxlan.vni == 1 && icmp", "vxlan"),
        Mode::VxlanGbp => (
            "vxlan.vni == 1 && vxlan.gbp && icmp",
            "vxlan with identities",
        ),
        Mode::Geneve => ("geneve.vni == 1 && geneve.option.class && icmp", "geneve"),
        Mode::Direct => ("icmp && !udp", "no tunnel"),
    };
    let mut seen = Vec::new();
    command::until("the capture", Duration::from_secs(5), || {
        seen = capture.fields(shown, &["frame.len"])?;
        ensure!(
            seen.len() >= 10,
            "tshark sees {} frames of `{shown}`",
            seen.len()
        );
        Ok(())
    })?;
    let largest = seen
        .iter()
        .filter_map(|line| line.trim().parse::<u32>().ok())
        .max();
    ensure!(
        largest == Some(1514),
        "the largest frame has {largest:?} bytes, not 1514"
    );
    let wrong = capture.fields(
        "_ws.malformed || ip.checksum.status == 0",
        &["frame.number"],
    )?;
    ensure!(wrong.is_empty(), "tshark finds frames {wrong:?} malformed");
    Ok(format!(
        "full-size pings, {four} IPv4, {six} IPv6; on the wire tshark sees {network}"
    ))
}

/// The node itself reaches its own pods and others', is reached by them, and nobody's address is translated.
///
/// # Errors
/// If anything is lost or a source is not the sender's own.
pub fn nodes_and_pods_talk(cluster: &Cluster) -> Result<String> {
    let (here, there) = (cluster.lab(1)?, cluster.lab(2)?);
    let own = Cluster::own(1);
    let mut ways = 0;
    for lab in [here, there] {
        let target = pod(lab)?;
        let _serving = serve(&target.netns)?;
        for (address, own) in [target.v4.to_string(), target.v6.to_string()]
            .iter()
            .zip(&own)
        {
            let seen = sources((&target.netns, "eth0"), || ping(&here.host, address, 56))?;
            ensure!(seen == [own.clone()], "{address} saw {seen:?}, not {own}");
            checked(&here.host, address)?;
            ways += 1;
        }
    }
    let from = pod(here)?;
    let _serving = serve(&there.host)?;
    let (v4, v6) = (from.v4.to_string(), from.v6.to_string());
    for (address, source) in Cluster::own(2).iter().zip([v4, v6]) {
        let seen = sources((&there.host, "sluice0"), || ping(&from.netns, address, 56))?;
        ensure!(
            seen == [source.clone()],
            "node 2 saw {seen:?}, not {source}"
        );
        checked(&from.netns, address)?;
        ways += 1;
    }
    let _here = serve(&here.host)?;
    for address in &own {
        checked(&from.netns, address)?;
    }
    Ok(format!("{ways} ways, each with the sender's own address"))
}

/// Pods reach the outside, on the wire and far behind a router, as their node.
///
/// # Errors
/// If they do not, or the outside sees another source.
pub fn pods_reach_the_outside_as_their_node(cluster: &Cluster) -> Result<String> {
    let from = pod(cluster.lab(1)?)?;
    let _there = serve(&cluster.outside)?;
    let near = Cluster::near();
    let targets = [near[0].as_str(), FAR4, near[1].as_str(), FAR6];
    for target in targets {
        let own = &Cluster::own(1)[usize::from(target.contains(':'))];
        let seen = sources((&cluster.outside, "eth0"), || ping(&from.netns, target, 56))?;
        let seen: Vec<&String> = seen
            .iter()
            .filter(|source| *source == own || source.contains("244"))
            .collect();
        ensure!(seen == [own], "{target} saw {seen:?}, not {own}");
        checked(&from.netns, target)?;
    }
    Ok(format!("{} targets saw the node's address", targets.len()))
}

/// The outside reaches a pod by a port of its node, and the pod sees who it is.
///
/// # Errors
/// If it does not.
pub fn the_outside_reaches_host_ports(cluster: &Cluster) -> Result<String> {
    let target = pod(cluster.lab(2)?)?;
    let _serving = serve(&target.netns)?;
    let mut rates = Vec::new();
    for (own, near) in Cluster::own(2).iter().zip(Cluster::near()) {
        let capture = Capture::start(&target.netns, "eth0", "tcp port 7000")?;
        let seen = load(
            &cluster.outside,
            &["checked", &at(own, HOST_PORT), "--bytes", BULK],
        )?;
        rates.push(format!("{:.2} Gb/s", seen.rate() * 8.0 / 1e9));
        let sources = shown(&capture, "tcp.flags.syn == 1 && tcp.flags.ack == 0")?;
        ensure!(sources == [near], "the pod saw {sources:?}");
    }
    Ok(rates.join(", "))
}

/// What is the host's own does not come near the appliance.
///
/// # Errors
/// If a single frame of it does.
pub fn the_hosts_own_traffic_stays_the_hosts(cluster: &Cluster) -> Result<String> {
    let lab = cluster.lab(1)?;
    let frames = || -> Result<u64> {
        let status = lab.status()?;
        let of = |way: &str| status[way]["to_appliance"]["frames"].as_u64();
        Ok(of("uplink").context("no uplink")? + of("host_link").context("no host link")?)
    };
    let _serving = serve(&lab.host)?;
    // Those of an earlier claim may still be closing connections.
    std::thread::sleep(Duration::from_millis(500));
    let before = frames()?;
    for own in Cluster::own(1) {
        ping(&cluster.outside, &own, 1400)?;
        checked(&cluster.outside, &own)?;
    }
    let _there = serve(&cluster.outside)?;
    for near in Cluster::near() {
        ping(&lab.host, &near, 1400)?;
        checked(&lab.host, &near)?;
    }
    let more = frames()? - before;
    ensure!(more == 0, "{more} frames of it passed the appliance");
    Ok("pings and 40 MB both ways, no frame of it".into())
}
