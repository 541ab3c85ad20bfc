//! A cluster: nodes of ours on one wire, each with a card, a host link and a pod, the objects that all of them follow, and
//! somebody outside.
//!
//! The outside is on the wire itself and is the nodes' default gateway too, behind which a far address lies. It knows no way
//! to pods: whatever it answers was sent with a node's address.

use crate::cluster_objects::{CLUSTER_LB, LOCAL_LB, Objects, PODS, SERVICES};
use crate::lab::{Lab, Plan, Pod};
use crate::netns::Netns;
use crate::underlay::{Peer, Underlay, node4, node6};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// The number of the one outside.
const OUTSIDE: u8 = 200;
/// Addresses behind the outside.
pub const FAR4: &str = "203.0.113.9";
pub const FAR6: &str = "2001:db8:99::9";
/// The port of each node that leads to its first pod's port 7000.
pub const HOST_PORT: u16 = 8080;

/// How nodes reach each other's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Vxlan,
    VxlanGbp,
    Geneve,
    /// Geneve without Ethernet inside.
    GeneveIp,
    Ipip,
    /// As they are: all nodes are on one wire (host-gw).
    Direct,
}

impl Mode {
    pub const ALL: [Self; 6] = [
        Self::Vxlan,
        Self::VxlanGbp,
        Self::Geneve,
        Self::GeneveIp,
        Self::Ipip,
        Self::Direct,
    ];

    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::VxlanGbp => "vxlan-gbp",
            Self::Geneve => "geneve",
            Self::GeneveIp => "geneve-ip",
            Self::Ipip => "ipip",
            Self::Direct => "direct",
        }
    }

    /// The port of its packets; meaningless where they have none.
    pub const fn port(self) -> u16 {
        match self {
            Self::Geneve | Self::GeneveIp => 6081,
            _ => 8472,
        }
    }

    /// Bytes that packets between nodes grow by.
    const fn overhead(self, six: bool) -> u16 {
        let more = if six { 20 } else { 0 };
        match self {
            Self::Vxlan | Self::VxlanGbp => 50 + more,
            Self::Geneve => 58 + more,
            Self::GeneveIp => 44 + more,
            Self::Ipip => 20 + more,
            Self::Direct => 0,
        }
    }

    fn tunnel(self) -> Value {
        let protocol = match self {
            Self::Direct => "vxlan",
            other => other.word(),
        };
        json!({"protocol": protocol, "port": self.port()})
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    // The nodes end before the wire.
    pub nodes: Vec<Lab>,
    pub objects: Objects,
    pub outside: Netns,
    pub underlay: Underlay,
    pub mode: Mode,
    /// The wire speaks IPv6.
    pub six: bool,
    /// MTU of the pods.
    pub mtu: u16,
}

/// Addresses that are routed to nodes from outside.
fn balanced() -> impl Iterator<Item = String> {
    let all = CLUSTER_LB.into_iter().chain(LOCAL_LB);
    all.map(|address| format!("{address}/{}", if address.contains(':') { 128 } else { 32 }))
}

impl Cluster {
    /// Nodes 1 to `count`, each with one pod, healthy.
    ///
    /// # Errors
    /// If one does not come up.
    pub fn start(count: u8, mode: Mode, six: bool) -> Result<Self> {
        Self::start_with(count, mode, six, |_| {})
    }

    /// The same, with something else in each node's configuration.
    ///
    /// # Errors
    /// If one does not come up.
    pub fn start_with(
        count: u8,
        mode: Mode,
        six: bool,
        change: impl Fn(&mut Value),
    ) -> Result<Self> {
        let underlay = Underlay::new(1500)?;
        let outside = Netns::new("outside")?;
        underlay.attach(&outside, OUTSIDE)?;
        for far in [FAR4, FAR6] {
            let far = format!("{far}/{}", if far.contains(':') { 128 } else { 32 });
            outside.run(&["ip", "addr", "add", &far, "dev", "lo"])?;
        }
        // Its own ports are none of those that nodes translate to: a capture tells them apart.
        let ports = "net.ipv4.ip_local_port_range=32768 49151";
        outside.run(&["sysctl", "-qw", ports])?;
        let objects = Objects::write(&format!("{}-objects", outside.name()), count)?;
        let mut cluster = Self {
            nodes: Vec::new(),
            objects,
            outside,
            underlay,
            mode,
            six,
            mtu: 1500 - mode.overhead(six),
        };
        for number in 1..=count {
            let node = cluster.node(number, count)?;
            node.change_config(&change)?;
            cluster.nodes.push(node);
        }
        for node in &mut cluster.nodes {
            node.start_node_only()?;
        }
        for node in &mut cluster.nodes {
            node.healthy(std::time::Duration::from_secs(60))?;
        }
        Ok(cluster)
    }

    /// Node `number` of `count`, not started yet.
    ///
    /// # Errors
    /// If a namespace or a link cannot be made.
    pub fn node(&self, number: u8, count: u8) -> Result<Lab> {
        let (own4, own6) = (node4(number), node6(number));
        let plan = Plan {
            pods: 1,
            number,
            mtu: self.mtu,
            node_addresses: vec![own4.clone(), own6.clone()],
            ..Plan::default()
        };
        let peers: Vec<Peer> = (1..=count)
            .filter(|other| *other != number)
            .map(|number| Peer {
                number,
                six: self.six,
                direct: self.mode == Mode::Direct,
            })
            .collect();
        let lab = self.underlay.node(&plan, &self.mode.tunnel(), &peers)?;
        lab.change_config(|config| {
            for (peer, described) in peers.iter().zip(
                config["uplink"]["peers"]
                    .as_array_mut()
                    .into_iter()
                    .flatten(),
            ) {
                let other = if self.six {
                    node4(peer.number)
                } else {
                    node6(peer.number)
                };
                described["node_addresses"] = json!([other]);
            }
            let routes = [PODS, SERVICES].concat();
            config["host_link"] = json!({"addresses": [own4, own6], "routes": routes});
            config["node_name"] = format!("node-{number}").into();
            if self.mode != Mode::VxlanGbp {
                // The numbers that pods get from their labels do not fit into sixteen bits; those of a node that follows
                // nothing do, and are told.
                config["source"] = json!({"directory": self.objects.directory()});
            }
            config["services"] = json!({"cidrs": SERVICES});
            config["uplink"]["service_addresses"] = balanced().collect();
            config["pods"][0]["pod"] = format!("default/pod-{number}").into();
            config["pods"][0]["host_ports"] =
                json!([{"hostPort": HOST_PORT, "containerPort": 7000, "protocol": "tcp"}]);
        })?;
        // Whoever changes its address says so; and the way out.
        lab.host.run(&[
            "sysctl",
            "-qw",
            "net.ipv4.conf.eth0.arp_notify=1",
            "net.ipv6.conf.eth0.ndisc_notify=1",
        ])?;
        self.route_out(&lab)?;
        Ok(lab)
    }

    /// Gives a node its default routes.
    ///
    /// # Errors
    /// If a command fails.
    pub fn route_out(&self, lab: &Lab) -> Result<()> {
        lab.host
            .run(&["ip", "route", "replace", "default", "via", &node4(OUTSIDE)])?;
        lab.host.run(&[
            "ip",
            "-6",
            "route",
            "replace",
            "default",
            "via",
            &node6(OUTSIDE),
        ])?;
        Ok(())
    }

    /// The node of that number, counted from 1.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn lab(&self, number: usize) -> Result<&Lab> {
        self.nodes
            .get(number.wrapping_sub(1))
            .with_context(|| format!("there is no node {number}"))
    }

    /// The pod of the node of that number.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn pod(&self, number: usize) -> Result<&Pod> {
        self.lab(number)?
            .pods
            .first()
            .context("the node has no pod")
    }

    /// The addresses of the outside on the wire.
    pub fn near() -> [String; 2] {
        [node4(OUTSIDE), node6(OUTSIDE)]
    }

    /// A node's own addresses.
    pub fn own(number: u8) -> [String; 2] {
        [node4(number), node6(number)]
    }

    /// What all of them say, for a failure.
    pub fn words(&self) -> String {
        let of = |lab: &Lab| {
            let status = lab.sluice(&["status"]).unwrap_or_default();
            let drops = lab.sluice(&["drops"]).unwrap_or_default();
            format!("{}\n{status}\n{drops}", lab.log_tail())
        };
        self.nodes
            .iter()
            .map(of)
            .collect::<Vec<_>>()
            .join("\n----\n")
    }
}
