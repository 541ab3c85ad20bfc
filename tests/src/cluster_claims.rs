//! What Sluice claims of several nodes, each shown on a running cluster: the demo prints them, the tests assert them.

use crate::capture::Capture;
use crate::cluster::{Cluster, FAR4, FAR6, HOST_PORT};
use crate::command;
use crate::traffic::{PORT, at, ping, serve, sources, stream};
use anyhow::{Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// Bytes of a transfer that is checked.
const BULK: u64 = 10_000_000;
/// Requests of a ping, in tshark's words.
const ECHO: &str = "icmp.type == 8 || icmpv6.type == 128";
/// Far more than a few rounds of probes take.
const PROBED: Duration = Duration::from_secs(30);
/// First packets of connections.
const SYN: &str = "tcp.flags.syn == 1 && tcp.flags.ack == 0";

/// A claim, shown on a cluster.
pub type Claim = fn(&Cluster) -> Result<String>;

/// All of them, by what they say.
pub const ALL: [(&str, Claim); 6] = [
    ("pods of all nodes talk", pods_talk_across_nodes),
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
    (
        "nodes probe each other at full size",
        nodes_probe_each_other,
    ),
];

/// Pods of all nodes exchange full-size packets that may not be fragmented, and those of two streams, in both families.
///
/// # Errors
/// If anything is lost.
pub fn pods_talk_across_nodes(cluster: &Cluster) -> Result<String> {
    let mut ways = 0;
    for from in 1..=cluster.nodes.len() {
        for to in (1..=cluster.nodes.len()).filter(|to| *to != from) {
            let (from, to) = (cluster.pod(from)?, cluster.pod(to)?);
            for (address, header) in to.addresses().iter().zip([28, 48]) {
                ping(&from.netns, address, 3, cluster.mtu - header)?;
                ways += 1;
            }
        }
    }
    let (a, b) = (cluster.pod(1)?, cluster.pod(2)?);
    let _there = serve(&b.netns)?;
    let [v4, v6] = b.addresses();
    let four = stream(&a.netns, &at(&v4, PORT), BULK)?;
    let six = stream(&a.netns, &at(&v6, PORT), BULK)?;
    Ok(format!(
        "full-size pings {ways} ways, {four} IPv4, {six} IPv6"
    ))
}

/// Every node has an answer of every other to packets as large as pods', and has lost none of the last.
///
/// # Errors
/// If one has not within half a minute.
pub fn nodes_probe_each_other(cluster: &Cluster) -> Result<String> {
    let mut slowest = 0;
    for lab in &cluster.nodes {
        slowest = slowest.max(command::until("answers of all nodes", PROBED, || {
            let peers: Vec<Value> = serde_json::from_str(&lab.sluice(&["peers", "-o", "json"])?)?;
            ensure!(peers.len() + 1 >= cluster.nodes.len(), "{peers:?}");
            let mut slowest = 0;
            for probe in peers.iter().map(|peer| &peer["probe"]) {
                let sizes = (probe["largest"].as_u64(), probe["full"]["size"].as_u64());
                let is_full = sizes == (Some(cluster.mtu.into()), Some(cluster.mtu.into()));
                let is_good = probe["state"] == "reachable" && probe["finding"].is_null();
                ensure!(is_full && is_good, "{probe:#}");
                slowest = slowest.max(probe["rtt_us"].as_u64().unwrap_or(u64::MAX));
            }
            Ok(slowest)
        })?);
    }
    Ok(format!(
        "{} bytes arrive on every way, there and back in {:.1} ms at most",
        cluster.mtu,
        slowest as f64 / 1e3
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
    for target in [cluster.pod(1)?, cluster.pod(2)?] {
        let _serving = serve(&target.netns)?;
        for (address, own) in target.addresses().iter().zip(&own) {
            let pings = || ping(&here.host, address, 5, 56);
            let seen = sources((&target.netns, "eth0"), ECHO, pings)?;
            ensure!(
                seen == [own.clone()].into(),
                "{address} saw {seen:?}, not {own}"
            );
            stream(&here.host, &at(address, PORT), BULK)?;
            ways += 1;
        }
    }
    let from = cluster.pod(1)?;
    let _serving = serve(&there.host)?;
    for (address, source) in Cluster::own(2).iter().zip(from.addresses()) {
        let pings = || ping(&from.netns, address, 5, 56);
        let seen = sources((&there.host, "sluice0"), ECHO, pings)?;
        ensure!(
            seen == [source.clone()].into(),
            "node 2 saw {seen:?}, not {source}"
        );
        stream(&from.netns, &at(address, PORT), BULK)?;
        ways += 1;
    }
    let _here = serve(&here.host)?;
    for address in &own {
        stream(&from.netns, &at(address, PORT), BULK)?;
    }
    Ok(format!("{ways} ways, each with the sender's own address"))
}

/// Pods reach the outside, on the wire and far behind a router, as their node.
///
/// # Errors
/// If they do not, or the outside sees another source.
pub fn pods_reach_the_outside_as_their_node(cluster: &Cluster) -> Result<String> {
    let from = cluster.pod(1)?;
    let _there = serve(&cluster.outside)?;
    let near = Cluster::near();
    let targets = [near[0].as_str(), FAR4, near[1].as_str(), FAR6];
    for target in targets {
        let own = &Cluster::own(1)[usize::from(target.contains(':'))];
        let field = if target.contains(':') {
            "ipv6.dst"
        } else {
            "ip.dst"
        };
        let shown = format!("({ECHO}) && {field} == {target}");
        let pings = || ping(&from.netns, target, 5, 56);
        let seen = sources((&cluster.outside, "eth0"), &shown, pings)?;
        ensure!(
            seen == [own.clone()].into(),
            "{target} saw {seen:?}, not {own}"
        );
        stream(&from.netns, &at(target, PORT), BULK)?;
    }
    Ok(format!("{} targets saw the node's address", targets.len()))
}

/// The outside reaches a pod by a port of its node, and the pod sees who it is.
///
/// # Errors
/// If it does not.
pub fn the_outside_reaches_host_ports(cluster: &Cluster) -> Result<String> {
    let target = cluster.pod(2)?;
    let _serving = serve(&target.netns)?;
    let mut rates = Vec::new();
    for (own, near) in Cluster::own(2).iter().zip(Cluster::near()) {
        let seen = sources((&target.netns, "eth0"), SYN, || {
            rates.push(stream(&cluster.outside, &at(own, HOST_PORT), BULK)?);
            Ok(())
        })?;
        ensure!(seen == [near].into(), "the pod saw {seen:?}");
    }
    Ok(rates.join(", "))
}

/// What is the host's own does not come near the appliance.
///
/// # Errors
/// If a single frame of it does.
pub fn the_hosts_own_traffic_stays_the_hosts(cluster: &Cluster) -> Result<String> {
    let (lab, from) = (cluster.lab(1)?, cluster.pod(1)?);
    let near = Cluster::near();
    let taps = ["sluplink", "sluice0"].map(|tap| Capture::start(&lab.host, tap, ""));
    let _serving = serve(&lab.host)?;
    for own in Cluster::own(1) {
        ping(&cluster.outside, &own, 5, 1400)?;
        stream(&cluster.outside, &at(&own, PORT), BULK)?;
    }
    let _there = serve(&cluster.outside)?;
    for near in &near {
        ping(&lab.host, near, 5, 1400)?;
        stream(&lab.host, &at(near, PORT), BULK)?;
    }
    // What does belong on these taps is seen on them, and everything before it then as well.
    ping(&from.netns, &near[0], 1, 56)?;
    ping(&lab.host, &from.v4.to_string(), 1, 56)?;
    let [near4, near6] = near;
    let outside = format!("(ip.addr == {near4} || ipv6.addr == {near6})");
    // Pings of pods, and connections of an earlier claim that are still closing.
    let of_pods = "(icmp.ident >= 49152 || tcp.port in {30000..32767, 49152..65535})";
    for (tap, belongs) in taps.into_iter().zip([of_pods, "icmp.type == 8"]) {
        let tap = tap?;
        tap.until_fields(belongs, &["frame.number"], 1)?;
        let shown = format!("{outside} && !({of_pods})");
        let seen = tap.fields(&shown, &["frame.number", "_ws.col.Info"])?;
        ensure!(seen.is_empty(), "passed the appliance: {seen:?}");
    }
    Ok("pings and 40 MB both ways, no frame of it".into())
}
