//! What the node says of its way to other nodes. The types are the API's and the CLI's alike.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The origin of a peer that a Node object describes.
pub const ORIGIN_CLUSTER: &str = "cluster";
/// The origin of a peer that the configuration lists.
pub const ORIGIN_CONFIGURATION: &str = "configuration";

/// This node's end of the tunnel, and all other nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkReport {
    /// The name that this node has in the cluster.
    pub node: String,
    /// The network card and its MTU.
    pub interface: String,
    pub mtu: u16,
    /// What is left of it for pods.
    pub pod_mtu: u16,
    /// Its addresses there; the first of each family is the source of what is sent to other nodes.
    pub addresses: Vec<IpAddr>,
    /// This node's pods, as far as they are known.
    pub pods: Vec<String>,
    pub tunnel: TunnelReport,
    /// What this node's object must say for nodes of flannel, and those of ours, to reach it.
    pub annotations: BTreeMap<String, String>,
    /// What is wrong with what the cluster says of this node, if so.
    pub wrong: Option<String>,
    /// The other nodes.
    pub peers: Vec<PeerReport>,
}

/// How packets to other nodes are wrapped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelReport {
    pub protocol: String,
    pub port: u16,
    pub vni: u32,
    /// This node's MAC in the tunnel.
    pub mac: String,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its name in the cluster; its address if the configuration has it.
    pub name: String,
    /// `configuration`, or `cluster`: a Node object.
    pub origin: String,
    /// Where it is reached.
    pub address: Option<IpAddr>,
    /// Its other addresses.
    pub node_addresses: Vec<IpAddr>,
    pub pods: Vec<String>,
    /// The tunnel's protocol, or `direct`; absent if it is not reached.
    pub way: Option<String>,
    /// Its MAC in the tunnel.
    pub mac: Option<String>,
    /// The largest packet of a pod that goes there whole.
    pub mtu: Option<u16>,
    /// Why it is not reached, if so.
    pub problem: Option<String>,
}
