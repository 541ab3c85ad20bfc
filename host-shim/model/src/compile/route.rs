//! The nodes, as routes and tunnels will need them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::object::{self, Prefix};
use crate::store::Store;

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub name: Arc<str>,
    /// Where it is reached from inside the cluster, the first of each family being the one to use.
    pub addresses: Vec<IpAddr>,
    /// Where it is reached from elsewhere.
    pub external: Vec<IpAddr>,
    /// The addresses of its pods.
    pub pods: Vec<Prefix>,
    /// What it says about itself to other networks' daemons, such as its tunnel's MAC.
    pub annotations: BTreeMap<String, String>,
}

/// All nodes, as one of them sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// This node, if it is described.
    pub own: Option<Member>,
    /// In the order of their names.
    pub others: Vec<Member>,
}

impl From<&object::Node> for Member {
    fn from(node: &object::Node) -> Self {
        let of = |external| {
            let all = node.addresses.iter();
            all.filter(|it| it.external == external)
                .map(|it| it.address)
                .collect()
        };
        Self {
            name: node.name.name.clone(),
            addresses: of(false),
            external: of(true),
            pods: node.pod_cidrs.clone(),
            annotations: node.annotations.clone(),
        }
    }
}

pub(crate) fn members(store: &Store, own: &str) -> Members {
    let others = store.nodes().filter(|it| *it.name.name != *own);
    Members {
        own: store.node(own).map(Member::from),
        others: others.map(Member::from).collect(),
    }
}
