//! The objects of the cluster as the model keeps them: validated, and only what the network needs of them.
//!
//! A value of these types has passed [`crate::validate`]; nothing behind it checks again.

mod labels;
mod policy;
pub mod rates;
mod service;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sluice_contract::Protocol;

pub use labels::{Labels, Operator, Requirement, Selector};
pub use policy::{
    Block, ClusterPeer, ClusterPolicy, ClusterPort, ClusterRule, NetworkPolicy, NodePolicy, Peer,
    PodSelector, PolicyPort, Port, Prefix, Rule, Tier,
};
pub use service::{
    AddressFamily, Affinity, Age, Endpoint, EndpointSlice, FORWARDING, Forwarding,
    LoadBalancerAddress, Service, ServicePort, SlicePort, TargetPort, TrafficPolicy,
};

/// The kinds that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    Namespace,
    Node,
    Pod,
    Service,
    EndpointSlice,
    NetworkPolicy,
    ClusterNetworkPolicy,
    NodePolicy,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Namespace,
        Self::Node,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::NetworkPolicy,
        Self::ClusterNetworkPolicy,
        Self::NodePolicy,
    ];

    /// As in a manifest's `kind`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::NodePolicy => "NodePolicy",
        }
    }

    /// As in a manifest's `apiVersion`.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::Pod | Self::Service => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
            Self::NodePolicy => "sluice.dev/v1alpha1",
        }
    }

    /// The last part of the API's path.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::Pod => "pods",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::NetworkPolicy => "networkpolicies",
            Self::ClusterNetworkPolicy => "clusternetworkpolicies",
            Self::NodePolicy => "nodepolicies",
        }
    }

    /// Whether objects of this kind lie in a namespace.
    pub const fn is_namespaced(self) -> bool {
        !matches!(
            self,
            Self::Namespace | Self::Node | Self::ClusterNetworkPolicy | Self::NodePolicy
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name within a kind. The namespace of cluster-wide objects is empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Name {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// An object, by kind and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub kind: Kind,
    pub name: Name,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Namespace(Namespace),
    Node(Node),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    NetworkPolicy(NetworkPolicy),
    ClusterPolicy(ClusterPolicy),
    NodePolicy(NodePolicy),
}

impl Object {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
            Self::ClusterPolicy(_) => Kind::ClusterNetworkPolicy,
            Self::NodePolicy(_) => Kind::NodePolicy,
        }
    }

    pub fn name(&self) -> &Name {
        match self {
            Self::Namespace(it) => &it.name,
            Self::Node(it) => &it.name,
            Self::Pod(it) => &it.name,
            Self::Service(it) => &it.name,
            Self::EndpointSlice(it) => &it.name,
            Self::NetworkPolicy(it) => &it.name,
            Self::ClusterPolicy(it) => &it.name,
            Self::NodePolicy(it) => &it.name,
        }
    }

    pub fn key(&self) -> ObjectKey {
        ObjectKey {
            kind: self.kind(),
            name: self.name().clone(),
        }
    }
}

/// A namespace; its own name is among its labels, as the API server sees to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub name: Name,
    pub labels: Arc<Labels>,
    /// Where its pods' addresses come from, if not from where all do.
    pub address_pool: Option<Arc<str>>,
    /// With which DSCP the packets of its pods go on.
    pub egress_dscp: Option<u8>,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: Name,
    pub labels: Arc<Labels>,
    /// In the order of the object; host names are left out.
    pub addresses: Vec<NodeAddress>,
    /// Where its pods' addresses come from.
    pub pod_cidrs: Vec<Prefix>,
    /// Only those that networks of pods use to tell their peers something.
    pub annotations: BTreeMap<String, String>,
    /// It is about to be removed: nothing new is to be sent there.
    pub leaving: bool,
}

/// One address of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeAddress {
    pub address: IpAddr,
    /// Reached from outside the cluster.
    pub external: bool,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub name: Name,
    pub labels: Arc<Labels>,
    /// The node it was given to.
    pub node: Option<Arc<str>>,
    pub addresses: Vec<IpAddr>,
    /// Ports with names, in order, each once.
    pub ports: Arc<[NamedPort]>,
    /// It uses the node's network: no link, no identity of its own.
    pub host_network: bool,
    /// Its containers have ended for good; its addresses may belong to another pod.
    pub ended: bool,
    /// It has passed its readiness probe; only asked where nobody makes EndpointSlices.
    pub ready: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// Where its addresses come from, if not from where its namespace's do.
    pub address_pool: Option<Arc<str>>,
    /// With which DSCP its packets go on; `None`: its namespace's say.
    pub egress_dscp: Option<u8>,
    pub rates: rates::Rates,
}

/// A port of a container that has a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NamedPort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}
