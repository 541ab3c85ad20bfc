//! Nodes in two subnets with a router between them (CrossSubnet), and pods whose MTU nobody has said.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sluice_tests::capture::Capture;
use sluice_tests::command;
use sluice_tests::lab::{Lab, Pod};
use sluice_tests::membership::{self, object, seen};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::traffic::{load, serve};
use sluice_tests::underlay::Underlay;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
/// The router's address in the first and in the second subnet.
const ROUTER: [&str; 2] = ["192.168.50.1", "192.168.60.1"];
/// The third node's, in the second subnet.
const FAR: &str = "192.168.60.4";

fn words(netns: &Netns, text: &str) -> Result<String> {
    netns.run(&text.split(' ').collect::<Vec<_>>())
}

/// Nodes 1 and 2 on one wire, node 3 on another, a router between them.
struct Bed {
    // The nodes end before the wires.
    nodes: Vec<Lab>,
    wires: [Underlay; 2],
    router: Netns,
}

impl Bed {
    fn new() -> Result<Self> {
        let wires = [Underlay::new(1500)?, Underlay::new(1500)?];
        let router = Netns::new("router")?;
        words(
            &router,
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.default.send_redirects=0",
        )?;
        for (index, (wire, address)) in wires.iter().zip(ROUTER).enumerate() {
            let name = router.name();
            words(
                &wire.netns,
                &format!(
                    "ip link add gate mtu 1500 type veth peer name to{index} mtu 1500 netns {name}"
                ),
            )?;
            words(&wire.netns, "ip link set gate master wire up")?;
            words(&router, &format!("ip addr add {address}/24 dev to{index}"))?;
            words(&router, &format!("ip link set to{index} up"))?;
        }
        let mut nodes = Vec::new();
        for number in 1..=3 {
            let wire = &wires[usize::from(number == 3)];
            let uplink = json!({"direct": "same-subnet"});
            let node = membership::prepare(wire, number, 1450, &uplink)?;
            node.change_config(|config| {
                config.as_object_mut().and_then(|all| all.remove("mtu"));
            })?;
            let host = &node.host;
            let gate = ROUTER[usize::from(number == 3)];
            if number == 3 {
                words(host, "ip addr flush dev eth0 scope global")?;
                words(host, &format!("ip addr add {FAR}/24 dev eth0"))?;
            }
            words(host, &format!("ip route add default via {gate}"))?;
            nodes.push(node);
        }
        for node in &nodes {
            for number in 1..=3 {
                let mut described = object(number);
                if number == 3 {
                    described["status"]["addresses"] =
                        json!([{"type": "InternalIP", "address": FAR}]);
                }
                membership::write(node, &described)?;
            }
        }
        for node in &mut nodes {
            node.start_node()?;
        }
        Ok(Self {
            nodes,
            wires,
            router,
        })
    }

    fn pod(&self, number: usize) -> &Pod {
        &self.nodes[number - 1].pods[0]
    }

    fn way(&self, from: usize, to: &str) -> Result<String> {
        let peer = seen(&self.nodes[from - 1], to)?;
        Ok(peer["way"].as_str().unwrap_or("none").to_owned())
    }

    fn ping(&self, from: usize, to: usize, size: u16) -> Result<()> {
        let to = self.pod(to).v4.to_string();
        let netns = &self.pod(from).netns;
        command::until("the first ping", PATIENCE, || {
            netns.run(&["ping", "-n", "-c", "1", "-W", "1", &to])
        })?;
        let size = size.to_string();
        let whole = [
            "ping", "-n", "-c", "3", "-i", "0.1", "-W", "2", "-M", "do", "-s", &size, &to,
        ];
        netns.run(&whole).map(drop)
    }

    fn words(&self) {
        for node in &self.nodes {
            let (status, drops) = (node.sluice(&["status"]), node.sluice(&["drops"]));
            eprintln!(
                "{}\n{}\n{}",
                node.log_tail(),
                status.unwrap_or_default(),
                drops.unwrap_or_default()
            );
        }
    }
}

/// Whether a node's packets to a peer go without a tunnel, once they do.
fn until_way(bed: &Bed, from: usize, to: &str, way: &str) -> Result<()> {
    command::until("the other way", PATIENCE, || {
        let now = bed.way(from, to)?;
        ensure!(now == way, "{to} is reached by {now}");
        Ok(())
    })
}

fn mixed_ways(bed: &Bed) -> Result<()> {
    let near = Capture::start(&bed.wires[0].netns, "wire", "")?;
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)] {
        bed.ping(from, to, 1450 - 28)?;
    }
    ensure!(
        (bed.way(1, "node-2")?, bed.way(1, "node-3")?) == ("direct".into(), "vxlan".into()),
        "the ways"
    );
    let seen = |filter: &str| {
        near.fields(filter, &["frame.number"])
            .map(|lines| lines.len())
    };
    let (one, two, three) = (bed.pod(1).v4, bed.pod(2).v4, bed.pod(3).v4);
    ensure!(
        seen(&format!(
            "!vxlan && ip.src == {one} && ip.dst == {two} && icmp"
        ))? >= 3,
        "not bare in one subnet"
    );
    ensure!(
        seen(&format!("vxlan && ip.src == {one} && ip.dst == {two}"))? == 0,
        "wrapped in one subnet"
    );
    ensure!(
        seen(&format!("vxlan && ip.src == {one} && ip.dst == {three}"))? >= 3,
        "not wrapped behind the router"
    );
    ensure!(
        seen(&format!("!vxlan && ip.src == {one} && ip.dst == {three}"))? == 0,
        "bare behind the router"
    );
    let _serving = serve(&bed.pod(1).netns)?;
    for from in [2, 3] {
        let to = format!("{one}:7000");
        load(
            &bed.pod(from).netns,
            &["checked", &to, "--bytes", "20000000"],
        )?;
    }
    Ok(())
}

/// Node 2 moves behind the router, as node 1 sees it, and back: a stream and pings go on.
fn moves(bed: &Bed) -> Result<()> {
    let (pod, to) = (&bed.pod(1).netns, bed.pod(2).v4.to_string());
    let _serving = serve(&bed.pod(2).netns)?;
    let host = &bed.nodes[0].host;
    let pinged = std::thread::scope(|scope| -> Result<String> {
        let pings = scope.spawn(|| pod.run(&["ping", "-n", "-i", "0.01", "-c", "600", &to]));
        let stream = format!("{to}:7000");
        let stream = scope.spawn(move || load(pod, &["checked", &stream, "--bytes", "200000000"]));
        for _ in 0..3 {
            words(
                host,
                &format!("ip route add 192.168.50.3/32 via {}", ROUTER[0]),
            )?;
            until_way(bed, 1, "node-2", "vxlan")?;
            words(host, "ip route del 192.168.50.3/32")?;
            until_way(bed, 1, "node-2", "direct")?;
        }
        stream.join().ok().context("the stream panicked")??;
        pings.join().ok().context("the pings panicked")?
    })?;
    let last = pinged.lines().rev().nth(1).unwrap_or_default().to_owned();
    println!("moved six times: {last}");
    ensure!(last.contains(" 0% packet loss"), "{last}");
    Ok(())
}

/// A pod that is linked now.
fn add_pod(node: &Lab, last: u8) -> Result<(Netns, u64)> {
    let netns = Netns::new("late")?;
    let (path, address) = (netns.path(), format!("10.244.1.{last}"));
    let path = path.to_str().context("a path")?;
    let name = format!("late-{last}");
    node.sluice(&["link", "add", &name, "--netns", path, "--address", &address])?;
    let shown = netns.run(&["ip", "-j", "link", "show", "eth0"])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    Ok((netns, shown[0]["mtu"].as_u64().context("an MTU")?))
}

/// The wires and cards take less, then more again.
fn set_mtu(bed: &Bed, mtu: u16) -> Result<()> {
    for wire in &bed.wires {
        let ports = words(&wire.netns, "ip -o link show master wire")?;
        for port in ports.lines().filter_map(|line| line.split(": ").nth(1)) {
            let port = port.split('@').next().unwrap_or_default();
            words(&wire.netns, &format!("ip link set {port} mtu {mtu}"))?;
        }
        words(&wire.netns, &format!("ip link set wire mtu {mtu}"))?;
    }
    for index in 0..2 {
        words(&bed.router, &format!("ip link set to{index} mtu {mtu}"))?;
    }
    for node in &bed.nodes {
        words(&node.host, &format!("ip link set eth0 mtu {mtu}"))?;
    }
    for node in &bed.nodes {
        command::until("another MTU for pods", PATIENCE, || {
            let status = node.status()?;
            ensure!(status["pod_mtu"] == mtu - 50, "{}", status["pod_mtu"]);
            Ok(())
        })?;
    }
    Ok(())
}

fn follows_the_uplink(bed: &Bed) -> Result<()> {
    let node = &bed.nodes[0];
    ensure!(
        node.status()?["pod_mtu"] == 1450,
        "{}",
        node.status()?["pod_mtu"]
    );
    ensure!(
        node.status()?["links"][0]["mtu"] == 1450,
        "{}",
        node.status()?["links"]
    );
    ensure!(
        node.sluice(&["status"])?.contains("pod mtu"),
        "not in the status"
    );
    let _serving = serve(&bed.pod(3).netns)?;
    let to = format!("{}:7000", bed.pod(3).v4);
    std::thread::scope(|scope| -> Result<()> {
        // A connection from before, of a pod whose packets are too large by now.
        let from = &bed.pod(1).netns;
        let stream = scope.spawn(|| load(from, &["checked", &to, "--bytes", "400000000"]));
        set_mtu(bed, 1400)?;
        let done = stream.join().ok().context("the stream panicked")??;
        ensure!(done.done >= 400_000_000, "{} bytes arrived", done.done);
        Ok(())
    })?;
    // What does not fit any more is answered, what fits arrives.
    let output = bed.pod(1).netns.output(&[
        "ping",
        "-n",
        "-c",
        "2",
        "-W",
        "1",
        "-M",
        "do",
        "-s",
        "1400",
        &bed.pod(3).v4.to_string(),
    ])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("1350"), "no word on the MTU: {said}");
    bed.ping(1, 3, 1350 - 28)?;
    let (smaller, mtu) = add_pod(node, 50)?;
    ensure!(mtu == 1350, "{mtu}");
    set_mtu(bed, 1500)?;
    let (_larger, mtu) = add_pod(node, 51)?;
    ensure!(mtu == 1450, "{mtu}");
    let kept = smaller.run(&["ip", "-o", "link", "show", "eth0"])?;
    ensure!(kept.contains("mtu 1350"), "{kept}");
    Ok(())
}

fn shown(claims: &[fn(&Bed) -> Result<()>]) -> Result<()> {
    let bed = Bed::new()?;
    for claim in claims {
        let held = claim(&bed);
        if held.is_err() {
            bed.words();
        }
        held?;
    }
    Ok(())
}

#[test]
fn o10_one_subnet_is_direct_the_other_is_tunnelled_and_a_peer_that_moves_loses_nothing() {
    need!(
        "o10_one_subnet_is_direct_the_other_is_tunnelled_and_a_peer_that_moves_loses_nothing",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    shown(&[mixed_ways, moves]).expect("every claim holds");
}

#[test]
fn m01_m04_pods_get_what_the_uplink_leaves_and_new_ones_follow_it() {
    need!(
        "m01_m04_pods_get_what_the_uplink_leaves_and_new_ones_follow_it",
        Root,
        Kvm,
        Tool("ip")
    );
    shown(&[follows_the_uplink]).expect("every claim holds");
}
