//! Host ports of containerd's pods, used by whoever can reach the node: somebody outside, the node itself, another pod.

use crate::cri::PortMapping;
use crate::runtime::{Pod, skipped, start};
use anyhow::Result;
use sluice_tests::cni::CniLab;
use sluice_tests::command;
use sluice_tests::lab::{Wiring, program};
use sluice_tests::netns::Netns;
use sluice_tests::traffic::at;
use sluice_tests::underlay::{Underlay, node4, node6};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
const OUTSIDE: u8 = 200;

/// The port's protocol as the CRI numbers them, and the traffic that uses it.
const PROTOCOLS: [(i32, &str); 2] = [(0, "connect"), (1, "udp")];

fn mapping(protocol: i32, host_ip: &str) -> PortMapping {
    PortMapping {
        protocol,
        container_port: 7000,
        host_port: 8080,
        host_ip: host_ip.into(),
    }
}

/// Who uses the port.
enum Client<'a> {
    Namespace(&'static str, &'a Netns),
    Pod(&'a Pod),
}

impl Client<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Namespace(name, _) => name,
            Self::Pod(_) => "the other pod",
        }
    }

    /// One connection after the other, or a window of datagrams, all answered, for a moment.
    fn uses(&self, traffic: &str, target: &str) -> Result<String> {
        let program = program("sluice-load");
        let program = program.to_string_lossy();
        let words = ["timeout", "3", &program, traffic, target, "--time", "0.2"];
        match self {
            Self::Namespace(_, netns) => netns.run(&words),
            Self::Pod(pod) => pod.run(&words),
        }
    }
}

#[test]
fn b01_b04_b06_host_ports_of_containerd_are_used_from_outside_the_node_and_the_other_pod() {
    let test =
        "b01_b04_b06_host_ports_of_containerd_are_used_from_outside_the_node_and_the_other_pod";
    if skipped(test) {
        return;
    }
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let underlay = Underlay::new(1500).expect("a wire");
        let outside = Netns::new("outside").expect("a namespace");
        underlay.attach(&outside, OUTSIDE).expect("a card");
        let lab = CniLab::start_on(&underlay, wiring).expect("a node");
        let mut containerd = start(&lab).expect("containerd");
        let ports = PROTOCOLS.map(|(number, _)| mapping(number, "")).to_vec();
        let web = containerd.pod("web", ports).expect("a pod");
        let other = containerd.pod("other", Vec::new()).expect("a pod");
        let _serving = web.serve().expect("a server");
        let clients = [
            Client::Namespace("somebody outside", &outside),
            Client::Namespace("the node itself", &lab.lab.host),
            Client::Pod(&other),
            // Its own port, by the node.
            Client::Pod(&web),
        ];
        let targets = [node4(1), node6(1)].map(|own| at(&own, 8080));
        for client in &clients {
            for (traffic, target) in ways(&targets) {
                command::until("an answered port", PATIENCE, || {
                    client.uses(traffic, target)
                })
                .unwrap_or_else(|error| {
                    panic!("{} to {target} ({traffic}): {error:#}", client.name())
                });
            }
        }
        containerd.remove(&web.id).expect("removed");
        for client in &clients[..3] {
            for (traffic, target) in ways(&targets) {
                let answered = client.uses(traffic, target);
                let name = client.name();
                assert!(
                    answered.is_err(),
                    "{name} still reaches {target} ({traffic})"
                );
            }
        }
        containerd.remove(&other.id).expect("removed");
        assert_eq!(lab.left().expect("a look"), [""; 0]);
    }
}

/// The rules by which the node's own packets find their way.
fn rules(node: &Netns) -> Result<String> {
    Ok(node.run(&["ip", "rule"])? + &node.run(&["ip", "-6", "rule"])?)
}

#[test]
fn b01_p11_the_nodes_rules_for_host_ports_outlive_no_pod_and_no_daemon() {
    let test = "b01_p11_the_nodes_rules_for_host_ports_outlive_no_pod_and_no_daemon";
    if skipped(test) {
        return;
    }
    let underlay = Underlay::new(1500).expect("a wire");
    let mut lab = CniLab::start_on(&underlay, Wiring::Veth).expect("a node");
    let before = rules(&lab.lab.host).expect("rules");
    let mut containerd = start(&lab).expect("containerd");
    // Only at one of the node's addresses.
    let web = containerd.pod("web", vec![mapping(0, &node4(1))]);
    let web = web.expect("a pod");
    let with_port = rules(&lab.lab.host).expect("rules");
    assert!(with_port.contains("dport 8080"), "{with_port}");
    assert!(!with_port.contains(&node6(1)), "{with_port}");
    let _serving = web.serve().expect("a server");
    let used = |lab: &CniLab| {
        let host = Client::Namespace("the node itself", &lab.lab.host);
        let target = at(&node4(1), 8080);
        command::until("an answered port", PATIENCE, || {
            host.uses("connect", &target)
        })
    };
    used(&lab).expect("the node reaches the pod");
    let node = lab.lab.node().expect("a node");
    node.signal(nix::sys::signal::Signal::SIGKILL);
    node.wait().expect("its end");
    lab.lab.forget_node();
    lab.lab.start_node().expect("a node again");
    assert_eq!(rules(&lab.lab.host).expect("rules"), with_port);
    used(&lab).expect("the node reaches the pod again");
    containerd.remove(&web.id).expect("removed");
    assert_eq!(rules(&lab.lab.host).expect("rules"), before);
    // A pod that is still there when the daemon is stopped.
    let again = containerd.pod("web", vec![mapping(1, "")]).expect("a pod");
    assert_ne!(rules(&lab.lab.host).expect("rules"), before);
    lab.lab.node().expect("a node").stop(PATIENCE);
    assert_eq!(rules(&lab.lab.host).expect("rules"), before);
    lab.lab.forget_node();
    lab.lab.start_node().expect("a node again");
    containerd.remove(&again.id).expect("removed");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

/// Each kind of traffic to each target.
fn ways(targets: &[String]) -> impl Iterator<Item = (&'static str, &str)> {
    PROTOCOLS
        .iter()
        .flat_map(|(_, traffic)| targets.iter().map(|target| (*traffic, target.as_str())))
}
