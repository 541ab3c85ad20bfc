//! Why a Service may not use an address, in words for its author.

use std::fmt;
use std::sync::Arc;

use crate::object::{Name, Prefix};

/// As what a Service claims an address; the first kind comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ClaimKind {
    ClusterIp,
    LoadBalancer,
    External,
}

impl fmt::Display for ClaimKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIp => "ClusterIP",
            Self::LoadBalancer => "load balancer's address",
            Self::External => "external address",
        })
    }
}

/// Why a Service may not use an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Of this node, in words.
    Node(Arc<str>),
    Pod(Name),
    PodRange(Prefix),
    ServiceRange(Prefix),
    ClusterRange(Prefix),
    NotListed,
    /// Another Service comes first.
    Service(ClaimKind, Name),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(
                f,
                "it is an address of {node}. Choose another one, or list it in services.external_addresses as a single address (/32, /128)"
            ),
            Self::Pod(pod) => write!(f, "Pod {pod} has it. Choose an address outside the cluster"),
            Self::PodRange(range) => write!(
                f,
                "it lies in {range}, a range of pods. Choose an address outside the cluster"
            ),
            Self::ServiceRange(range) => write!(
                f,
                "it lies in {range}, a range of ClusterIPs. Choose an address outside the cluster"
            ),
            Self::ClusterRange(range) => write!(
                f,
                "it lies in {range}, a range of pods and Services (host_link.routes). Choose an address outside the cluster"
            ),
            Self::NotListed => f.write_str(
                "it lies in none of the ranges of services.external_addresses. Choose one that does, or add its range there",
            ),
            Self::Service(kind, service) => write!(
                f,
                "it is the {kind} of Service {service}, which comes first. Choose another address"
            ),
        }
    }
}
