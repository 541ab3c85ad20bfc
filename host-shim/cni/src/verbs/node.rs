//! What the verbs need of the node: links made and removed, and how the node is.

use crate::capability::{Bandwidth, PortMapping};
use crate::config::Wiring;
use crate::env::PodName;
use crate::error::{CniError, Code};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What a pod's link is to be. Kept with the attachment, so that it can be removed and checked without its caller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    pub netns: String,
    pub ifname: String,
    pub addresses: Vec<IpAddr>,
    /// `None`: the node chooses.
    pub mac: Option<[u8; 6]>,
    pub mtu: u16,
    pub wiring: Wiring,
    #[serde(default)]
    pub sysctl: BTreeMap<String, String>,
    #[serde(default)]
    pub pod: Option<PodName>,
    #[serde(default)]
    pub ports: Vec<PortMapping>,
    #[serde(default)]
    pub bandwidth: Bandwidth,
    #[serde(default)]
    pub aliases: Vec<String>,
    #[serde(default)]
    pub ip_masq: bool,
    /// The host's end of an interface that a plugin before us made: glued to the appliance instead of a new pair.
    #[serde(default)]
    pub adopt: Option<String>,
}

/// An interface that the node made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// In the pod, or on the node.
    pub in_pod: bool,
}

/// What holds for attachments that say nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// The node's pod CIDRs.
    pub subnets: Vec<String>,
    /// Subnets by name, for pods and namespaces that ask for a pool.
    pub pools: BTreeMap<String, Vec<String>>,
    pub mtu: u16,
    pub wiring: Wiring,
    pub gateway4: IpAddr,
    pub gateway6: IpAddr,
}

/// Whether pods can be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Ready,
    /// No pod can be added, and why.
    Unavailable(String),
    /// The same, and the pods that are there may be cut off.
    Degraded(String),
}

/// Why the node did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    #[error("the appliance is not there: {0}")]
    Down(String),
    #[error("the appliance did not answer in time: {0}")]
    Late(String),
    #[error("the interface exists: {0}")]
    Exists(String),
    #[error("the network namespace cannot be used: {0}")]
    Netns(String),
    #[error("no link is left: {0}")]
    Full(String),
    #[error("the configuration cannot be carried out: {0}")]
    Config(String),
    #[error("{0}")]
    Failed(String),
}

impl From<NodeError> for CniError {
    fn from(error: NodeError) -> Self {
        let code = match error {
            NodeError::Down(_) | NodeError::Late(_) | NodeError::Full(_) => Code::Later,
            NodeError::Exists(_) => Code::Exists,
            NodeError::Netns(_) => Code::Netns,
            NodeError::Config(_) => Code::Config,
            NodeError::Failed(_) => Code::Wiring,
        };
        Self::new(code, error.to_string())
    }
}

/// The node behind the verbs. Every call is bounded: what waits for the appliance gives up after 5 s (row C-20).
pub trait Node: Send + Sync {
    fn defaults(&self) -> Defaults;

    /// Makes the link `name`, which no other link has, and returns when the appliance has acknowledged it and its policy.
    ///
    /// # Errors
    /// The step that failed. Nothing is left then.
    fn attach(&self, name: &str, link: &Link) -> Result<Vec<Made>, NodeError>;

    /// Removes whatever there is of the link. Never waits for the appliance; what is not there is no error.
    ///
    /// # Errors
    /// If something is left.
    fn detach(&self, name: &str, link: &Link) -> Result<(), NodeError>;

    /// Names whatever is not as [`Node::attach`] made it.
    ///
    /// # Errors
    /// If that cannot be found out.
    fn missing(&self, name: &str, link: &Link) -> Result<Vec<String>, NodeError>;

    /// Whether the pod's namespace is there with its interface.
    fn is_alive(&self, link: &Link) -> bool;

    fn health(&self) -> Health;

    /// The address pool that the pod or its namespace asks for. Waits until it is known.
    ///
    /// # Errors
    /// If it is not known in time: the pod must not get an address of another pool.
    fn pool_of(&self, pod: &PodName) -> Result<Option<String>, NodeError>;
}
