//! Several nodes: a bridge in a namespace of its own joins their network cards. Some nodes are ours, some are the kernel's
//! VXLAN in flannel's manner, which nobody here wrote.

use crate::command::Running;
use crate::lab::{Lab, Plan};
use crate::netns::Netns;
use anyhow::Result;
use serde_json::{Value, json};

/// The wire between nodes: 192.168.50.0/24 and fd50::/64.
#[derive(Debug)]
pub struct Underlay {
    pub netns: Netns,
    mtu: u16,
}

/// The underlay address of node `number`.
pub fn node4(number: u8) -> String {
    format!("192.168.50.{}", number + 1)
}

/// The same in IPv6.
pub fn node6(number: u8) -> String {
    format!("fd50::{}", number + 1)
}

/// The MAC of node `number` inside the tunnel.
pub fn vtep(number: u8) -> String {
    format!("02:00:00:00:aa:{:02x}", number + 1)
}

/// The ranges of node `number`'s pods.
pub fn pods_of(number: u8) -> [String; 2] {
    [
        format!("10.244.{number}.0/24"),
        format!("fd00:244:0:{number:x}::/64"),
    ]
}

impl Underlay {
    /// A bridge without anybody.
    ///
    /// # Errors
    /// If namespace or bridge cannot be made.
    pub fn new(mtu: u16) -> Result<Self> {
        let netns = Netns::new("wire")?;
        netns.run(&["ip", "link", "add", "wire", "type", "bridge"])?;
        netns.run(&["ip", "link", "set", "wire", "mtu", &mtu.to_string(), "up"])?;
        Ok(Self { netns, mtu })
    }

    /// Gives the namespace of node `number` a card `eth0` on the wire.
    ///
    /// # Errors
    /// If a command fails.
    pub fn attach(&self, node: &Netns, number: u8) -> Result<()> {
        let (port, mtu) = (format!("port{number}"), self.mtu.to_string());
        let wire = &self.netns;
        let (name, peer) = (port.as_str(), node.name());
        wire.run(&[
            "ip", "link", "add", name, "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu",
            &mtu, "netns", peer,
        ])?;
        wire.run(&["ip", "link", "set", name, "master", "wire", "up"])?;
        node.run(&[
            "ip",
            "addr",
            "add",
            &format!("{}/24", node4(number)),
            "dev",
            "eth0",
        ])?;
        // Nobody has these addresses already; neighbors are asked for at once.
        node.run(&["sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0"])?;
        let six = format!("{}/64", node6(number));
        node.run(&["ip", "addr", "add", &six, "dev", "eth0", "nodad"])?;
        node.run(&["ip", "link", "set", "eth0", "up"])?;
        Ok(())
    }

    /// A node of ours, ready to be started: `tunnel` is its format, `peers` the others' numbers.
    ///
    /// # Errors
    /// If a namespace cannot be made.
    pub fn node(&self, plan: &Plan, tunnel: &Value, peers: &[Peer]) -> Result<Lab> {
        let lab = Lab::prepare(plan)?;
        self.attach(&lab.host, plan.number)?;
        let mut tunnel = tunnel.clone();
        tunnel["mac"] = vtep(plan.number).into();
        lab.configure_uplink(&json!({
            "interface": "eth0",
            "tunnel": tunnel,
            "pods": pods_of(plan.number),
            "peers": peers.iter().map(Peer::config).collect::<Vec<_>>(),
        }))?;
        Ok(lab)
    }
}

/// Another node, as a node of ours is told of it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub number: u8,
    /// Over IPv6.
    pub six: bool,
    pub direct: bool,
}

impl Peer {
    fn config(&self) -> Value {
        let address = if self.six {
            node6(self.number)
        } else {
            node4(self.number)
        };
        json!({
            "address": address,
            "mac": vtep(self.number),
            "pods": pods_of(self.number),
            "direct": self.direct,
        })
    }
}

/// A node of the kernel's: a bridge with a pod, and a vxlan device with flannel's parameters.
#[derive(Debug)]
pub struct Flannel {
    pub node: Netns,
    pub pod: Netns,
    pub v4: String,
    pub v6: String,
}

impl Flannel {
    /// Node `number` with one pod, which reaches the pods of `peer` (a node of ours) through the tunnel.
    ///
    /// # Errors
    /// If a command fails.
    pub fn new(underlay: &Underlay, number: u8, peer: &Peer) -> Result<Self> {
        let (node, pod) = (Netns::new("flannel")?, Netns::new("flannel-pod")?);
        underlay.attach(&node, number)?;
        let mtu = (underlay.mtu - if peer.six { 70 } else { 50 }).to_string();
        let this = Self {
            node,
            pod,
            v4: format!("10.244.{number}.2"),
            v6: format!("fd00:244:0:{number:x}::2"),
        };
        this.wire_pod(number, &mtu)?;
        this.tunnel(number, &mtu, peer)?;
        Ok(this)
    }

    fn wire_pod(&self, number: u8, mtu: &str) -> Result<()> {
        let node = |words: &str| self.node.run(&words.split(' ').collect::<Vec<_>>());
        let pod = |words: &str| self.pod.run(&words.split(' ').collect::<Vec<_>>());
        node("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
        node("ip link add cni0 type bridge")?;
        let name = self.pod.name();
        node(&format!(
            "ip link add pod0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {name}"
        ))?;
        node("ip link set pod0 master cni0 up")?;
        node(&format!("ip link set cni0 mtu {mtu} up"))?;
        node(&format!("ip addr add 10.244.{number}.1/24 dev cni0"))?;
        node(&format!(
            "ip addr add fd00:244:0:{number:x}::1/64 dev cni0 nodad"
        ))?;
        pod(&format!("ip addr add {}/24 dev eth0", self.v4))?;
        pod(&format!("ip addr add {}/64 dev eth0 nodad", self.v6))?;
        pod("ip link set eth0 up")?;
        pod(&format!("ip route add default via 10.244.{number}.1"))?;
        pod(&format!(
            "ip -6 route add default via fd00:244:0:{number:x}::1"
        ))?;
        Ok(())
    }

    fn tunnel(&self, number: u8, mtu: &str, peer: &Peer) -> Result<()> {
        let node = |words: &str| self.node.run(&words.split(' ').collect::<Vec<_>>());
        let (own, other) = if peer.six {
            (node6(number), node6(peer.number))
        } else {
            (node4(number), node4(peer.number))
        };
        let (mac, theirs, n) = (vtep(number), vtep(peer.number), peer.number);
        node(&format!(
            "ip link add flannel.1 address {mac} mtu {mtu} type vxlan id 1 local {own} dev eth0 dstport 8472 nolearning"
        ))?;
        node(&format!("ip addr add 10.244.{number}.0/32 dev flannel.1"))?;
        node(&format!(
            "ip addr add fd00:244:0:{number:x}::/128 dev flannel.1 nodad"
        ))?;
        node("ip link set flannel.1 up")?;
        let gateways = [format!("10.244.{n}.0"), format!("fd00:244:0:{n:x}::")];
        for (gateway, range) in gateways.iter().zip(pods_of(n)) {
            node(&format!(
                "ip neigh add {gateway} lladdr {theirs} dev flannel.1 nud permanent"
            ))?;
            node(&format!(
                "ip route add {range} via {gateway} dev flannel.1 onlink"
            ))?;
        }
        node(&format!(
            "bridge fdb append {theirs} dev flannel.1 dst {other}"
        ))?;
        Ok(())
    }

    /// Starts the traffic server in the pod.
    ///
    /// # Errors
    /// If it does not listen within a few seconds.
    pub fn serve(&self) -> Result<Running> {
        crate::traffic::serve(&self.pod)
    }
}
