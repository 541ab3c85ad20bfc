//! What befalls an underlay, and how long pods are without each other: the times are printed, that it ends is the claim.

use crate::cluster::Cluster;
use crate::command;
use crate::netns::Netns;
use crate::traffic::{load, serve};
use crate::underlay::node6;
use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};

/// The kernel's neighbor discovery alone takes half a minute to doubt a neighbor.
const PATIENCE: Duration = Duration::from_secs(90);

/// Something that befalls a cluster.
pub type Trouble = fn(&mut Cluster) -> Result<String>;

/// All of it, by what it is.
pub const ALL: [(&str, Trouble); 4] = [
    ("a peer's MAC changes", a_peers_mac_changes),
    ("the uplink flaps", the_uplink_flaps),
    ("a peer is replaced", a_peer_is_replaced),
    ("the underlay loses packets", the_underlay_loses_packets),
];

/// From pod 1 to pod 2: how long until pings of both families are answered again.
fn recovered(cluster: &Cluster) -> Result<String> {
    let began = Instant::now();
    let of = |number| -> Result<_> {
        let lab = cluster.lab(number)?;
        lab.pods.first().context("the node has no pod")
    };
    let (from, to) = (of(1)?, of(2)?);
    for address in [to.v4.to_string(), to.v6.to_string()] {
        answered(&from.netns, &address)?;
    }
    Ok(format!(
        "pods talk after {:.1} s",
        began.elapsed().as_secs_f64()
    ))
}

fn answered(from: &Netns, to: &str) -> Result<()> {
    command::until(&format!("an answer of {to}"), PATIENCE, || {
        from.run(&["ping", "-c", "1", "-W", "1", to]).map(drop)
    })
}

/// Node 2's card gets another MAC.
///
/// # Errors
/// If pods do not find each other again.
pub fn a_peers_mac_changes(cluster: &mut Cluster) -> Result<String> {
    recovered(cluster)?;
    let host = &cluster.lab(2)?.host;
    host.run(&["ip", "link", "set", "eth0", "address", "02:00:00:00:bb:77"])?;
    let seen = recovered(cluster)?;
    // By now every table has followed.
    std::thread::sleep(Duration::from_secs(2));
    recovered(cluster)?;
    Ok(seen)
}

/// Node 1's card goes down and comes up again, with the addresses and routes it had.
///
/// # Errors
/// If pods do not find each other again.
pub fn the_uplink_flaps(cluster: &mut Cluster) -> Result<String> {
    let lab = cluster.lab(1)?;
    lab.host.run(&["ip", "link", "set", "eth0", "down"])?;
    std::thread::sleep(Duration::from_millis(500));
    lab.host.run(&["ip", "link", "set", "eth0", "up"])?;
    // The kernel takes IPv6 addresses away with the link.
    let six = format!("{}/64", node6(1));
    lab.host
        .run(&["ip", "addr", "replace", &six, "dev", "eth0", "nodad"])?;
    cluster.route_out(lab)?;
    recovered(cluster)
}

/// Node 2 is gone, and another machine has its address.
///
/// # Errors
/// If pods do not find each other again.
pub fn a_peer_is_replaced(cluster: &mut Cluster) -> Result<String> {
    let count = u8::try_from(cluster.nodes.len()).context("too many nodes")?;
    // A namespace that is gone takes its end of the wire along only after a while.
    cluster
        .underlay
        .netns
        .run(&["ip", "link", "del", "port2"])?;
    drop(cluster.nodes.remove(1));
    let mut another = cluster.node(2, count)?;
    another.start_node()?;
    cluster.nodes.insert(1, another);
    recovered(cluster)
}

/// Transfers until one of them lost a frame. A round has about 300 large frames and loses none with a chance of 8 %.
const ROUNDS: u32 = 20;

/// One frame in about a hundred is lost on the wire, and streams arrive whole.
///
/// # Errors
/// If they do not.
pub fn the_underlay_loses_packets(cluster: &mut Cluster) -> Result<String> {
    let wire = &cluster.underlay.netns;
    let tc = |words: &str| wire.run(&words.split(' ').collect::<Vec<_>>());
    // There may be no netem: what has a certain low byte in the inner IPv4 identification goes to a port that leads nowhere.
    tc("ip link add hole type veth peer name nowhere")?;
    tc("tc qdisc add dev port1 clsact")?;
    tc(
        "tc filter add dev port1 ingress protocol ip u32 match u8 7 0x7f at 55 action mirred egress redirect dev hole",
    )?;
    let (from, to) = (cluster.lab(1)?, cluster.lab(2)?);
    let (from, to) = (&from.pods[0], &to.pods[0]);
    let _serving = serve(&to.netns)?;
    let target = format!("{}:7000", to.v4);
    for round in 1..=ROUNDS {
        let seen = load(&from.netns, &["checked", &target, "--bytes", "20000000"])?;
        let lost = redirected(&tc("tc -s filter show dev port1 ingress")?);
        if lost > 0 {
            tc("tc qdisc del dev port1 clsact")?;
            return Ok(format!(
                "20 MB whole at {:.2} Gb/s, {lost} frames lost on the way (round {round})",
                seen.rate() * 8.0 / 1e9
            ));
        }
    }
    anyhow::bail!("nothing was lost in {ROUNDS} rounds")
}

/// The packets that a tc action has had, by its statistics.
fn redirected(statistics: &str) -> u64 {
    statistics
        .split("Sent ")
        .skip(1)
        .filter_map(|text| text.split(' ').nth(2)?.parse().ok())
        .max()
        .unwrap_or(0)
}
