//! What the operator says of the uplink.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sluice_contract::Prefix;
use sluice_contract::overlay::TunnelProtocol;

use super::ports::PortRange;
use super::spare;
use super::taken::Taken;
use crate::config::parse_mac;

/// The way to other nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UplinkConfig {
    /// The network card.
    pub interface: String,
    /// The outer addresses; the card's own, the first of each family, unless given.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    #[serde(default)]
    pub tunnel: TunnelConfig,
    /// This node's pods, which peers without a tunnel send to as they are; those of its Node object unless given.
    #[serde(default)]
    pub pods: Vec<String>,
    /// Other nodes that no Node object describes. One of them keeps its addresses and ranges whatever objects say.
    #[serde(default)]
    pub peers: Vec<PeerConfig>,
    /// Which nodes of the cluster are sent to without a tunnel.
    #[serde(default)]
    pub direct: Direct,
    /// By which of their addresses nodes of the cluster are reached.
    #[serde(default)]
    pub underlay: Underlay,
    /// Who cuts large frames in tunnels.
    #[serde(default)]
    pub segmentation: SegmentationBy,
    /// Ports of the node's addresses that are Services'.
    #[serde(default = "node_ports")]
    pub node_ports: PortRange,
    /// Ports of the node's addresses that stand for pods towards the outside; unless given, those that the host can spare. The
    /// host's own programs are kept off them (`net.ipv4.ip_local_reserved_ports`).
    #[serde(default)]
    pub snat_ports: Option<PortRange>,
    /// Addresses of Services that others route to this node: of load balancers, external addresses.
    #[serde(default)]
    pub service_addresses: Vec<String>,
    /// How the ways to other nodes are probed.
    #[serde(default)]
    pub probes: ProbeConfig,
}

/// How the ways to other nodes are probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProbeConfig {
    /// Milliseconds between two rounds to a peer; 0: there are none. Longer where the budget asks for it.
    pub interval_ms: u32,
    /// Packets in a second to all peers together.
    pub per_second: u32,
}

impl Default for ProbeConfig {
    /// A node among 500 asks each of them every five seconds, one among 5 000 every minute.
    fn default() -> Self {
        Self {
            interval_ms: 5000,
            per_second: 200,
        }
    }
}

/// Kubernetes' own default.
fn node_ports() -> PortRange {
    PortRange::ALL_NODE_PORTS
}

/// Who cuts a large frame in a tunnel into packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SegmentationBy {
    /// The host's kernel or the network card, where the kernel has taps for it (Linux ≥ 6.17); else the
    /// appliance's process.
    #[default]
    Auto,
    /// The appliance's process, always: for a card whose driver does it wrong.
    Daemon,
}

/// Which nodes of the cluster are sent to without a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direct {
    /// None.
    #[default]
    Never,
    /// Those that the host reaches without a router (Calico's CrossSubnet, flannel's DirectRouting).
    SameSubnet,
    /// All (host-gw): routers in between must know every node's pods.
    Always,
}

/// By which of their addresses nodes of the cluster are reached. All nodes must answer alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Underlay {
    /// By IPv4 where both nodes have such an address, else by IPv6.
    #[default]
    Auto,
    Ipv4,
    Ipv6,
}

/// The format of the tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    #[default]
    Vxlan,
    VxlanGbp,
    Geneve,
    GeneveIp,
    Ipip,
}

impl From<Protocol> for TunnelProtocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Vxlan => Self::Vxlan,
            Protocol::VxlanGbp => Self::VxlanGbp,
            Protocol::Geneve => Self::Geneve,
            Protocol::GeneveIp => Self::GeneveIp,
            Protocol::Ipip => Self::IpIp,
        }
    }
}

/// How packets are wrapped. The defaults are flannel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TunnelConfig {
    pub protocol: Protocol,
    pub port: u16,
    pub vni: u32,
    /// This node's MAC inside the tunnel (flannel's VtepMAC). Unless given: what its Node object's annotations say, else one
    /// that follows from the node's name, by which other nodes know it; without a source the card's own.
    pub mac: Option<String>,
    pub zero_checksum6: bool,
    pub copy_dscp: bool,
    pub clamp_mss: bool,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            protocol: Protocol::Vxlan,
            port: 8472,
            vni: 1,
            mac: None,
            zero_checksum6: false,
            copy_dscp: false,
            clamp_mss: true,
        }
    }
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its underlay address.
    pub address: IpAddr,
    /// Its MAC inside the tunnel.
    pub mac: String,
    /// The ranges behind it.
    pub pods: Vec<String>,
    /// Other addresses of the node itself, such as that of the other family.
    #[serde(default)]
    pub node_addresses: Vec<IpAddr>,
    /// No tunnel: packets go as they are.
    #[serde(default)]
    pub direct: bool,
}

impl PeerConfig {
    /// All addresses of the node itself.
    pub fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.address).chain(self.node_addresses.iter().copied())
    }
}

/// A range like `10.244.1.0/24`.
pub fn parse_prefix(text: &str) -> Option<Prefix> {
    let (address, length) = text.split_once('/')?;
    Prefix::new(address.parse().ok()?, length.parse().ok()?)
}

impl UplinkConfig {
    /// Ports that stand for pods.
    pub fn snat_ports(&self) -> PortRange {
        self.snat_ports.unwrap_or(PortRange::LAST_SIXTEENTH)
    }

    /// Chooses these ports by what the host can spare, unless the operator has. Only for a node with a host link: a program of the
    /// host may have a connection at one of them already, whose packets come back to it that way.
    pub(crate) fn choose_snat_ports(&mut self) {
        let node_ports = self.node_ports;
        self.snat_ports
            .get_or_insert_with(|| spare::spare(node_ports));
    }

    /// What is wrong with it: the field and why.
    ///
    /// # Errors
    /// The first thing found.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let macs = self
            .tunnel
            .mac
            .iter()
            .chain(self.peers.iter().map(|p| &p.mac));
        for mac in macs {
            if parse_mac(mac).is_none_or(|mac| mac.is_group()) {
                return Err(("uplink", format!("{mac} is no MAC address of a node")));
            }
        }
        let ranges = self.peers.iter().flat_map(|p| &p.pods).chain(&self.pods);
        for range in ranges.chain(&self.service_addresses) {
            if parse_prefix(range).is_none() {
                return Err(("uplink", format!("{range} is no range of addresses")));
            }
        }
        self.check_peers()?;
        if self.tunnel.vni >> 24 != 0 {
            return Err((
                "uplink.tunnel.vni",
                format!("{} is above 16777215", self.tunnel.vni),
            ));
        }
        if self.node_ports.overlaps(self.snat_ports()) {
            return Err((
                "uplink.snat_ports",
                format!("{} are node ports too", self.snat_ports()),
            ));
        }
        let ProbeConfig {
            interval_ms,
            per_second,
        } = self.probes;
        if (1..100).contains(&interval_ms) {
            return Err((
                "uplink.probes.interval_ms",
                format!("{interval_ms} is less than 100, and not 0, which is none"),
            ));
        }
        if !(10..=10_000).contains(&per_second) {
            return Err((
                "uplink.probes.per_second",
                format!("{per_second} is not within 10 to 10000"),
            ));
        }
        if self.tunnel.port == 0 {
            return Err(("uplink.tunnel.port", "0 is no port".into()));
        }
        Ok(())
    }

    /// No two peers may have the same address or ranges that overlap, and none may have what is this node's.
    fn check_peers(&self) -> Result<(), (&'static str, String)> {
        let mut taken = Taken::default();
        let prefixes = |texts: &[String]| texts.iter().filter_map(|t| parse_prefix(t)).collect();
        let own: Vec<Prefix> = prefixes(&self.pods);
        taken
            .take("this node", &self.addresses, &own)
            .map_err(|why| ("uplink.pods", why))?;
        for peer in &self.peers {
            let addresses: Vec<IpAddr> = peer.own_addresses().collect();
            let ranges: Vec<Prefix> = prefixes(&peer.pods);
            let name = peer.address.to_string();
            taken
                .take(&name, &addresses, &ranges)
                .map_err(|why| ("uplink.peers", format!("{name}: {why}")))?;
        }
        Ok(())
    }
}
