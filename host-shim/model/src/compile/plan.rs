//! What an operator says of addresses: which ones are the cluster's own, and which ones Services may have from outside.

use std::net::IpAddr;
use std::sync::Arc;

use crate::object::{Name, Prefix};

/// Which addresses belong to whom, as far as the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressPlan {
    /// Where external and load balancers' addresses of Services may lie. Empty: anywhere outside the cluster.
    pub external: Vec<Prefix>,
    /// Ranges of pods, besides those of Node objects.
    pub pods: Vec<Prefix>,
    /// Ranges of ClusterIPs.
    pub services: Vec<Prefix>,
    /// Ranges of pods and ClusterIPs together.
    pub cluster: Vec<Prefix>,
    /// Addresses of this node, besides those that are configured elsewhere.
    pub local: Vec<IpAddr>,
    /// Services that may have nodes' addresses as endpoints.
    pub node_endpoints: Vec<ServiceMatch>,
}

impl Default for AddressPlan {
    fn default() -> Self {
        Self {
            external: Vec::new(),
            pods: Vec::new(),
            services: Vec::new(),
            cluster: Vec::new(),
            local: Vec::new(),
            // The API server writes its own endpoints, and they are nodes as a rule.
            node_endpoints: vec![ServiceMatch::One(Name::new("default", "kubernetes"))],
        }
    }
}

/// One Service, or all of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceMatch {
    One(Name),
    Namespace(Arc<str>),
}

impl ServiceMatch {
    /// `namespace/name`, or `namespace/*`.
    pub fn parse(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        if namespace.is_empty() || name.is_empty() || name.contains('/') {
            return None;
        }
        Some(match name {
            "*" => Self::Namespace(namespace.into()),
            _ => Self::One(Name::new(namespace, name)),
        })
    }

    pub(super) fn matches(&self, service: &Name) -> bool {
        match self {
            Self::One(name) => name == service,
            Self::Namespace(namespace) => *namespace == service.namespace,
        }
    }
}
