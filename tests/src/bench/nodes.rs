//! The contenders of two nodes on one wire: a pod on each, and a tunnel between them.

use super::one_node::{SERVICES, about, can_isolate};
use super::{Candidate, Extent, Family, Topology, nft, objects, until_link, vxlan, words};
use crate::command::{self, Running};
use crate::lab::{Lab, Plan, Wiring, program};
use crate::need::Need;
use crate::netns::Netns;
use crate::ovs::OpenVswitch;
use crate::underlay::{Flannel, Peer, Underlay, node4};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

const BASE: &str = "kernel vxlan";
/// Of the wire; pods have the tunnel's 50 bytes less.
const MTU: u16 = 1500;
const POD_MTU: u16 = MTU - 50;
/// The port of the kernel's VXLAN in flannel's manner.
const PORT: u16 = 8472;

/// Measures them.
///
/// # Errors
/// As [`super::run`].
pub fn run(extent: Extent) -> Result<()> {
    let kernel = |name| (name, Family::Kernel);
    let mut all = vec![
        Candidate::new(
            kernel(BASE),
            "the kernel's vxlan device and a bridge in flannel's manner; no Services, no policy",
            || Kernel::new(0),
        ),
        Candidate::new(
            kernel("kernel vxlan + nft 1000"),
            "the same with 1 000 Services on both nodes as kube-proxy's nftables mode writes them",
            || Kernel::new(1000),
        ),
    ];
    if !extent.few {
        all.push(Candidate::new(
            kernel("kernel vxlan + nft 10000"),
            "the same with 10 000 Services",
            || Kernel::new(10_000),
        ));
    }
    all.push(Candidate::new(
        ("ovs userspace vxlan + conntrack", Family::OpenVswitch),
        "Open vSwitch's userspace datapath on both nodes, connections tracked; no Services",
        Switched::new,
    ));
    all.push(Candidate::new(
        ("tap forwarder vxlan", Family::Floor),
        "the floor: a process on each node that puts a fixed VXLAN header in front and takes it off",
        Forwarded::new,
    ));
    for (name, isolation, wiring) in [
        ("sluice kvm tap", "kvm", Wiring::Tap),
        ("sluice kvm veth", "kvm", Wiring::Veth),
        ("sluice process tap", "process", Wiring::Tap),
        ("sluice process veth", "process", Wiring::Veth),
    ] {
        if extent.few && wiring == Wiring::Veth {
            continue;
        }
        all.push(Candidate::new(
            (name, Family::Sluice),
            about(isolation),
            move || Sluice::new(isolation, wiring),
        ));
    }
    super::run(
        ("nodes", "Two nodes, pod to pod in a VXLAN tunnel"),
        all,
        BASE,
        extent,
    )
}

const fn peer(number: u8) -> Peer {
    Peer {
        number,
        six: false,
        direct: false,
    }
}

#[derive(Debug)]
struct Kernel {
    nodes: [Flannel; 2],
    _underlay: Underlay,
    services: usize,
}

impl Kernel {
    fn new(services: usize) -> Result<Self> {
        if let Some(missing) = Need::Tool("bridge").missing() {
            bail!(missing);
        }
        let underlay = Underlay::new(MTU)?;
        let nodes = [
            Flannel::new(&underlay, 1, &peer(2))?,
            Flannel::new(&underlay, 2, &peer(1))?,
        ];
        for node in nodes.iter().filter(|_| services > 0) {
            nft::serve(&node.node, services, &nodes[1].v4)?;
        }
        Ok(Self {
            nodes,
            _underlay: underlay,
            services,
        })
    }
}

impl Topology for Kernel {
    fn client(&self) -> &Netns {
        &self.nodes[0].pod
    }
    fn server(&self) -> &Netns {
        &self.nodes[1].pod
    }
    fn address(&self) -> String {
        self.nodes[1].v4.clone()
    }
    fn service(&self) -> Option<String> {
        (self.services > 0).then(|| objects::target(self.services))
    }
}

/// Two nodes with Open vSwitch, each with daemons of its own.
#[derive(Debug)]
struct Switched {
    nodes: [OpenVswitch; 2],
    _underlay: Underlay,
}

/// Before what the nodes' own flows do: what is not tracked is, what is new is committed and then goes on, what fits no connection is
/// dropped.
const TRACKING: [&str; 3] = [
    "priority=40000,ip,ct_state=-trk,actions=ct(table=0)",
    "priority=40000,ip,ct_state=+trk+new,reg0=0,actions=ct(commit),load:1->NXM_NX_REG0[],resubmit(,0)",
    "priority=40000,ip,ct_state=+trk+inv,actions=drop",
];

impl Switched {
    fn new() -> Result<Self> {
        if let Some(missing) = Need::Tool("ovs-vswitchd").missing() {
            bail!(missing);
        }
        let underlay = Underlay::new(MTU)?;
        let tunnel = ("vxlan", PORT);
        let nodes = [
            OpenVswitch::new(&underlay, (1, 2), tunnel, POD_MTU)?,
            OpenVswitch::new(&underlay, (2, 1), tunnel, POD_MTU)?,
        ];
        let bridges = Self::bridges()?;
        ensure!(bridges.len() == 2, "{} of 2 bridges", bridges.len());
        for bridge in bridges {
            for flow in TRACKING {
                command::run(&["ovs-ofctl", "add-flow", &bridge, flow])?;
            }
        }
        Ok(Self {
            nodes,
            _underlay: underlay,
        })
    }

    /// How this process's switches are spoken to: each has its sockets in a directory that is named after its namespace.
    fn bridges() -> Result<Vec<String>> {
        let ours = format!("sluice-{}-", std::process::id());
        let entries = std::fs::read_dir(std::env::temp_dir())?;
        let directories = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let sockets = directories
            .filter(|it| {
                let name = it.file_name().and_then(|name| name.to_str());
                name.is_some_and(|name| name.starts_with(&ours) && name.ends_with("-ovs"))
            })
            .map(|it| it.join("br-int.mgmt"))
            .filter(|it| it.exists());
        Ok(sockets.map(|it| format!("unix:{}", it.display())).collect())
    }
}

impl Topology for Switched {
    fn client(&self) -> &Netns {
        &self.nodes[0].pod
    }
    fn server(&self) -> &Netns {
        &self.nodes[1].pod
    }
    fn address(&self) -> String {
        self.nodes[1].v4.clone()
    }
}

/// Two nodes whose pods are taps of one process each.
#[derive(Debug)]
struct Forwarded {
    // End before the namespaces.
    _processes: Vec<Running>,
    pods: [Netns; 2],
    _nodes: [Netns; 2],
    _underlay: Underlay,
}

impl Forwarded {
    fn new() -> Result<Self> {
        let underlay = Underlay::new(MTU)?;
        let nodes = [Netns::new("forwarder-1")?, Netns::new("forwarder-2")?];
        let pods = [
            Netns::new("forwarder-pod-1")?,
            Netns::new("forwarder-pod-2")?,
        ];
        let mut ends = Vec::new();
        for (number, node) in (1..).zip(&nodes) {
            underlay.attach(node, number)?;
            let mac = words(node, "cat /sys/class/net/eth0/address")?;
            ends.push(format!("{},{}", mac.trim(), node4(number)));
        }
        let mut processes = Vec::new();
        for (index, (node, pod)) in nodes.iter().zip(&pods).enumerate() {
            let mut command = std::process::Command::new(program("sluice-lab"));
            command.arg("forward-vxlan").args([pod.path(), node.path()]);
            command.args([&ends[index], &ends[1 - index]]);
            let mut process = Running::start("the VXLAN forwarder", &mut command)?;
            until_link(pod, "eth0", &mut process)?;
            processes.push(process);
            glue(node)?;
            let mtu = POD_MTU;
            words(
                pod,
                &format!("ip addr add {}/24 dev eth0", Self::pod(index + 1)),
            )?;
            words(pod, &format!("ip link set eth0 mtu {mtu} up"))?;
        }
        Ok(Self {
            _processes: processes,
            pods,
            _nodes: nodes,
            _underlay: underlay,
        })
    }

    fn pod(number: usize) -> String {
        format!("10.245.0.{number}")
    }
}

/// Everything that comes in at the card goes to the tap, and the other way around.
fn glue(node: &Netns) -> Result<()> {
    let up = vxlan::UPLINK;
    words(node, &format!("ip link set {up} up"))?;
    for (from, to) in [("eth0", up), (up, "eth0")] {
        words(node, &format!("tc qdisc add dev {from} clsact"))?;
        // u32, as Sluice's own redirects: not every kernel has matchall.
        let everything = "ingress protocol all u32 match u32 0 0";
        let redirect = format!("action mirred egress redirect dev {to}");
        words(
            node,
            &format!("tc filter add dev {from} {everything} {redirect}"),
        )?;
    }
    Ok(())
}

impl Topology for Forwarded {
    fn client(&self) -> &Netns {
        &self.pods[0]
    }
    fn server(&self) -> &Netns {
        &self.pods[1]
    }
    fn address(&self) -> String {
        Self::pod(2)
    }
}

#[derive(Debug)]
struct Sluice {
    // The nodes end before the wire.
    nodes: [Lab; 2],
    _underlay: Underlay,
}

impl Sluice {
    fn new(isolation: &str, wiring: Wiring) -> Result<Self> {
        can_isolate(isolation)?;
        let underlay = Underlay::new(MTU)?;
        let node = |number, other| -> Result<Lab> {
            let plan = Plan {
                isolation: isolation.to_owned(),
                wiring,
                pods: 1,
                number,
                mtu: POD_MTU,
                ..Plan::default()
            };
            let lab = underlay.node(&plan, &json!({}), &[peer(other)])?;
            lab.change_config(|config| config["node_name"] = format!("node-{number}").into())?;
            Ok(lab)
        };
        let mut nodes = [node(1, 2)?, node(2, 1)?];
        let server = nodes[1].pods.first().context("a pod")?.v4.to_string();
        for lab in &mut nodes {
            objects::give(lab, SERVICES, &server)?;
            lab.start_node()?;
        }
        Ok(Self {
            nodes,
            _underlay: underlay,
        })
    }
}

impl Topology for Sluice {
    fn client(&self) -> &Netns {
        &self.nodes[0].pods[0].netns
    }
    fn server(&self) -> &Netns {
        &self.nodes[1].pods[0].netns
    }
    fn address(&self) -> String {
        self.nodes[1].pods[0].v4.to_string()
    }
    fn service(&self) -> Option<String> {
        Some(objects::target(SERVICES))
    }
}
