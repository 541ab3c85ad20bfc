//! The other nodes, as routes and tunnels will need them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::object::Prefix;
use crate::store::Store;

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: Arc<str>,
    /// Where it is reached, the first of each family being the one to use.
    pub addresses: Vec<IpAddr>,
    /// The addresses of its pods.
    pub pods: Vec<Prefix>,
    /// What it says about itself to other networks' daemons, such as its tunnel's MAC.
    pub annotations: BTreeMap<String, String>,
}

/// All other nodes that can be reached and have pods.
pub(crate) fn peers(store: &Store, own: &str) -> Vec<Peer> {
    let others = store.nodes().filter(|it| *it.name.name != *own);
    others
        .map(|it| {
            let mut addresses = it.addresses.clone();
            addresses.sort_by_key(|it| it.external);
            Peer {
                name: it.name.name.clone(),
                addresses: addresses.into_iter().map(|it| it.address).collect(),
                pods: it.pod_cidrs.clone(),
                annotations: it.annotations.clone(),
            }
        })
        .filter(|it| !it.addresses.is_empty() && !it.pods.is_empty())
        .collect()
}
