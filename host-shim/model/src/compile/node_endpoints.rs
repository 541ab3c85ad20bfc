//! Which Services may send to addresses of nodes.
//!
//! Whoever may write an EndpointSlice could name a node's address and any port of it: the kubelet's, a tunnel's. What is
//! sent there by a node port has that node's own address as its source, which firewalls between nodes let pass. But Services
//! whose pods use the host's network have nodes as endpoints by right, and so has the API server's. So a node's address counts
//! as an endpoint where
//!
//! * a Pod of the Service's own namespace with `hostNetwork` has that address: whoever may run such a pod has the node's network
//!   anyway, and a pod's status is the kubelet's to write; or
//! * the configuration names the Service (`services.node_endpoints`), as it does `default/kubernetes` unless told otherwise.
//!
//! Labels and owner references of a slice say nothing: its author writes them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::endpoints::Made;
use super::ownership::Ownership;
use super::service::Ground;
use crate::object::Service;

/// The addresses of nodes among a Service's endpoints that do not count; `None` if there is no node's address at all.
pub(super) fn banned(
    service: &Service,
    made: &[Made],
    ground: Ground<'_>,
    owners: &Ownership,
) -> Option<BTreeSet<IpAddr>> {
    let slices = ground.store.slices_of(&service.name);
    let listed = slices.flat_map(|it| &it.endpoints);
    let all = listed.chain(made.iter().map(|(endpoint, _)| endpoint));
    let of_nodes = all.map(|it| it.address).filter(|it| owners.is_node(*it));
    let mut banned: BTreeSet<IpAddr> = of_nodes.collect();
    if banned.is_empty() {
        return None;
    }
    let mut trusted = ground.config.addresses.node_endpoints.iter();
    if trusted.any(|it| it.matches(&service.name)) {
        banned.clear();
    } else {
        let pods = ground.store.pods_in(&service.name.namespace);
        for pod in pods.filter(|it| it.host_network && !it.ended) {
            for address in &pod.addresses {
                banned.remove(address);
            }
        }
    }
    Some(banned)
}
