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
    /// What probes say of it.
    pub probe: ProbeReport,
}

/// What probes say of the way to a peer: packets that travel as those of pods do, small ones and as large as pods' may be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    pub state: ProbeState,
    /// How long ago the last answer came.
    pub last_answer_ms: Option<u64>,
    /// How long a small packet took there and back, last.
    pub rtt_us: Option<u64>,
    pub small: SizeReport,
    pub full: SizeReport,
    /// The largest packet that came through.
    pub largest: Option<u16>,
    /// What is not as it should be.
    pub finding: Option<String>,
}

/// Whether a peer answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeState {
    Reachable,
    /// It has answered and does so no more, or is a node of ours and never has.
    Unreachable,
    /// It has never answered, and need not: it may be none of ours.
    #[default]
    NoAnswerYet,
    /// There is no address to ask, or probes are off.
    NotProbed,
}

impl ProbeState {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Reachable => "yes",
            Self::Unreachable => "NO",
            Self::NoAnswerYet => "no answer yet",
            Self::NotProbed => "not probed",
        }
    }
}

/// Of the last packets of one size: how many were sent, and how many had no answer in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeReport {
    pub size: u16,
    pub sent: usize,
    pub lost: usize,
}

impl ProbeReport {
    /// One of a peer that nothing is sent to.
    pub fn not_probed() -> Self {
        Self {
            state: ProbeState::NotProbed,
            ..Self::default()
        }
    }

    /// What is not as it should be, if something is not.
    pub(super) fn judged(&self) -> Option<String> {
        let (small, full) = (&self.small, &self.full);
        match (self.state, self.last_answer_ms, self.largest) {
            (ProbeState::Unreachable, Some(age), _) => Some(format!(
                "does not answer any more, for {} s now",
                age.div_ceil(1000)
            )),
            (ProbeState::Unreachable, None, _) => {
                Some("has never answered: does its node run, and does the underlay let the tunnel through?".into())
            }
            (ProbeState::Reachable, _, Some(largest)) if largest < full.size => Some(format!(
                "packets of {} bytes do not arrive, of {largest} do: the underlay's MTU is smaller than configured; \
                 pods are told so",
                full.size
            )),
            (ProbeState::Reachable, ..) if small.lost >= LOSSY => {
                Some(format!("{} of {} probes were lost", small.lost, small.sent))
            }
            _ => None,
        }
    }
}

/// So many lost probes of the last are worth a word.
const LOSSY: usize = 3;
