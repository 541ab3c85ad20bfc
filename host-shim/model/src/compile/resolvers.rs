//! Who is believed about the addresses of names: the cluster's DNS, and whom the operator names.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::Config;
use super::default_deny::cluster_dns;
use crate::object::Labels;
use crate::store::Store;

/// As many as the guest has room for.
const MOST: usize = 256;

/// All of them.
pub(super) fn all(store: &Store, config: &Config) -> BTreeSet<IpAddr> {
    let dns = cluster_dns();
    let is_dns = |labels: &Labels| dns.pods.matches(labels);
    let namespace = Arc::from("kube-system");
    let pods = store.pods_in(&namespace);
    let pods = pods.filter(|it| is_dns(&it.labels) && !it.ended);
    let found = pods.flat_map(|it| it.addresses.iter().copied());
    let mut all: BTreeSet<IpAddr> = config.resolvers.iter().copied().collect();
    for address in found.collect::<BTreeSet<IpAddr>>() {
        if all.len() < MOST {
            all.insert(address);
        }
    }
    all
}
