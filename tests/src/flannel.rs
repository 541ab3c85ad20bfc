//! A node of flannel's without flannel: a bridge with a pod, and the kernel's vxlan devices made from Node annotations alone, as
//! flanneld makes them: one device per family, a route, a neighbor and a forwarding entry for each other node, no learning.

use crate::netns::Netns;
use crate::underlay::{Underlay, node4, node6, pods_of};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

const PREFIX: &str = "flannel.alpha.coreos.com/";

/// The two families: device, annotations, and whether it is IPv6.
const FAMILIES: [Family; 2] = [
    Family {
        device: "flannel.1",
        data: "backend-data",
        public: "public-ip",
        six: false,
    },
    Family {
        device: "flannel-v6.1",
        data: "backend-v6-data",
        public: "public-ipv6",
        six: true,
    },
];

#[derive(Clone, Copy, Debug)]
struct Family {
    device: &'static str,
    data: &'static str,
    public: &'static str,
    six: bool,
}

/// The node.
#[derive(Debug)]
pub struct Node {
    pub netns: Netns,
    pub pod: Netns,
    pub v4: String,
    pub v6: String,
    number: u8,
    /// Its addresses on the wire.
    addresses: [String; 2],
}

fn words(netns: &Netns, text: &str) -> Result<String> {
    netns.run(&text.split(' ').collect::<Vec<_>>())
}

impl Node {
    /// Node `number` with one pod whose packets have `mtu`, which knows of no other.
    ///
    /// # Errors
    /// If a command fails.
    pub fn new(underlay: &Underlay, number: u8, mtu: u16) -> Result<Self> {
        let node = Self {
            netns: Netns::new("flannel")?,
            pod: Netns::new("flannel-pod")?,
            v4: format!("10.244.{number}.2"),
            v6: format!("fd00:244:0:{number:x}::2"),
            number,
            addresses: [node4(number), node6(number)],
        };
        underlay.attach(&node.netns, number)?;
        node.wire_pod(mtu)?;
        node.make_devices()?;
        Ok(node)
    }

    fn wire_pod(&self, mtu: u16) -> Result<()> {
        let number = self.number;
        let node = |text: &str| words(&self.netns, text);
        let pod = |text: &str| words(&self.pod, text);
        node("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
        node("ip link add cni0 type bridge")?;
        node(&format!(
            "ip link add pod0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
            self.pod.name()
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

    /// Makes the tunnels' devices; the kernel chooses their MACs.
    fn make_devices(&self) -> Result<()> {
        for family in FAMILIES {
            let device = family.device;
            let own = &self.addresses[usize::from(family.six)];
            let node = |text: &str| words(&self.netns, text);
            node(&format!(
                "ip link add {device} type vxlan id 1 local {own} dev eth0 dstport 8472 nolearning"
            ))?;
            let number = self.number;
            if family.six {
                node(&format!(
                    "ip addr add fd00:244:0:{number:x}::/128 dev {device} nodad"
                ))?;
            } else {
                node(&format!("ip addr add 10.244.{number}.0/32 dev {device}"))?;
            }
            node(&format!("ip link set {device} up"))?;
        }
        Ok(())
    }

    /// This node as flanneld would annotate it: what the devices' MACs are now.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn object(&self) -> Result<Value> {
        let mut annotations = json!({
            "flannel.alpha.coreos.com/backend-type": "vxlan",
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        });
        for family in FAMILIES {
            let shown = words(&self.netns, &format!("ip -j link show {}", family.device))?;
            let shown: Value = serde_json::from_str(&shown)?;
            let mac = shown[0]["address"].as_str().context("a MAC")?;
            let data = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
            annotations[format!("{PREFIX}{}", family.data)] = data.into();
            let own = &self.addresses[usize::from(family.six)];
            annotations[format!("{PREFIX}{}", family.public)] = own.as_str().into();
        }
        let address = |address| json!({"type": "InternalIP", "address": address});
        let addresses: Vec<Value> = self.addresses.iter().map(address).collect();
        Ok(json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name(), "annotations": annotations},
            "spec": {"podCIDRs": pods_of(self.number)},
            "status": {"addresses": addresses},
        }))
    }

    /// Its name as an object.
    pub fn name(&self) -> String {
        format!("flannel-{}", self.number)
    }

    /// Sets up the way to another node, from what its object says and nothing else.
    ///
    /// # Errors
    /// If the object does not say what flannel needs, or a command fails.
    pub fn learn(&self, node: &Value) -> Result<()> {
        let said = |name: &str| -> Result<&str> {
            let value = node["metadata"]["annotations"][format!("{PREFIX}{name}")].as_str();
            value.with_context(|| format!("no {name}: {node:#}"))
        };
        ensure!(
            said("backend-type")? == "vxlan" && said("kube-subnet-manager")? == "true",
            "{node:#}"
        );
        let ranges: Vec<&str> = node["spec"]["podCIDRs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        for family in FAMILIES {
            let data: Value = serde_json::from_str(said(family.data)?)?;
            ensure!(data["VNI"] == 1, "{data}");
            let mac = data["VtepMAC"].as_str().context("a VtepMAC")?;
            let (public, device) = (said(family.public)?, family.device);
            let range = ranges
                .iter()
                .find(|range| range.contains(':') == family.six);
            let range = range.context("a range of the family")?;
            let gateway = range.split('/').next().unwrap_or_default();
            let run = |text: &str| words(&self.netns, text);
            run(&format!(
                "ip neigh replace {gateway} lladdr {mac} dev {device} nud permanent"
            ))?;
            run(&format!(
                "bridge fdb replace {mac} dev {device} dst {public}"
            ))?;
            run(&format!(
                "ip route replace {range} via {gateway} dev {device} onlink"
            ))?;
        }
        Ok(())
    }

    /// The tunnels' devices are made anew, as after a reboot: other MACs. `address`: over another IPv4 address.
    ///
    /// # Errors
    /// If a command fails.
    pub fn reboot(&mut self, address: Option<&str>) -> Result<()> {
        for family in FAMILIES {
            words(&self.netns, &format!("ip link del {}", family.device))?;
        }
        if let Some(new) = address {
            let old = std::mem::replace(&mut self.addresses[0], new.to_owned());
            words(&self.netns, &format!("ip addr del {old}/24 dev eth0"))?;
            words(&self.netns, &format!("ip addr add {new}/24 dev eth0"))?;
        }
        self.make_devices()
    }
}
