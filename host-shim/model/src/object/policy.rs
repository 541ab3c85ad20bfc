//! NetworkPolicy (networking.k8s.io/v1), ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2) and NodePolicy
//! (sluice.dev/v1alpha1), defaults filled in.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sluice_contract::Protocol;
use sluice_contract::name::NameRow;
use sluice_contract::policy::{Action, Direction};

use super::{Name, Selector};

/// A range of addresses: the bits below `length` are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// The range around `address`; `None` if the family has fewer bits.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let masked = match address {
            IpAddr::V4(v4) if length <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                IpAddr::V4((v4.to_bits() & mask).into())
            }
            IpAddr::V6(v6) if length <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                IpAddr::V6((v6.to_bits() & mask).into())
            }
            _ => return None,
        };
        Some(Self {
            address: masked,
            length,
        })
    }

    /// The range of one address.
    pub fn host(address: IpAddr) -> Self {
        Self {
            address,
            length: if address.is_ipv4() { 32 } else { 128 },
        }
    }

    pub fn address(&self) -> IpAddr {
        self.address
    }

    pub fn length(&self) -> u8 {
        self.length
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.length).is_some_and(|other| other == *self)
    }

    /// The last address of it.
    pub fn last(&self) -> IpAddr {
        let length = u32::from(self.length);
        match self.address {
            IpAddr::V4(v4) => {
                let rest = u32::MAX.checked_shr(length).unwrap_or(0);
                IpAddr::V4((v4.to_bits() | rest).into())
            }
            IpAddr::V6(v6) => {
                let rest = u128::MAX.checked_shr(length).unwrap_or(0);
                IpAddr::V6((v6.to_bits() | rest).into())
            }
        }
    }

    /// Whether all of `other` is in it.
    pub fn covers(&self, other: &Self) -> bool {
        self.length <= other.length && self.contains(other.address)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A NetworkPolicy. A direction that it does not isolate is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    pub name: Name,
    /// Which pods of its namespace it is about.
    pub pods: Selector,
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
}

/// A NodePolicy: a NetworkPolicy whose subject is the node itself. A direction that it does not isolate is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePolicy {
    pub name: Name,
    /// Which nodes it is about.
    pub nodes: Selector,
    /// Its peers that are pods say of which namespaces.
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
}

impl NodePolicy {
    /// What it says about a direction.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// What is allowed: these peers (none listed: everybody) on these ports (none listed: everything).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Rule {
    pub peers: Vec<Peer>,
    pub ports: Vec<PolicyPort>,
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    Pods(PodSelector),
    Block(Block),
}

/// Pods by their labels and their namespace's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodSelector {
    /// `None`: the policy's own namespace.
    pub namespaces: Option<Selector>,
    pub pods: Selector,
}

/// Addresses in `cidr` that are in no `except`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    pub cidr: Prefix,
    pub except: Vec<Prefix>,
}

/// A protocol and, if not all, its destination ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyPort {
    pub protocol: Protocol,
    pub port: Port,
}

/// Destination ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    Any,
    Range(u16, u16),
    /// Whatever number the destination pod gives to this name.
    Named(String),
}

/// Which tier a ClusterNetworkPolicy is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    Admin,
    Baseline,
}

/// A ClusterNetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterPolicy {
    pub name: Name,
    pub tier: Tier,
    pub priority: u16,
    /// Which pods it is about.
    pub subject: PodSelector,
    pub ingress: Vec<ClusterRule>,
    pub egress: Vec<ClusterRule>,
}

/// One rule. Rules that this version does not understand in full were made safe when they were read: see [`ClusterPeer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRule {
    pub name: String,
    pub action: Action,
    /// At least one, except for a rule that must not match: an `Accept` with a peer of an unknown kind.
    pub peers: Vec<ClusterPeer>,
    /// None listed: everything.
    pub ports: Vec<ClusterPort>,
}

/// Who is at the other end. A `Deny` or `Pass` with a peer of an unknown kind has become a `Deny` of `Everybody`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClusterPeer {
    Pods(PodSelector),
    /// The addresses of nodes with these labels.
    Nodes(Selector),
    Network(Prefix),
    /// The addresses that a name, or names below it, have. Only in an `Accept` of outgoing traffic.
    Name(Arc<NameRow>),
    Everybody,
}

/// Protocol and port, or a named port whatever its protocol.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClusterPort {
    Number(PolicyPort),
    Named(String),
}
