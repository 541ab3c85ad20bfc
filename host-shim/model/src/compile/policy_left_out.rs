//! Policies that do not fit, in words.

use sluice_contract::policy::Direction;

use super::policy::Entry;
use super::policy_shares::TABLES;
use super::rules::Applied;
use super::shares::Lack;
use crate::object::{ClusterPeer, Kind, Name, Peer};
use crate::store::Store;

/// What they hold.
const HELD: [&str; TABLES] = [
    "pieces of maps of ports and addresses",
    "sets of policies",
    "kinds of peers",
    "names in rules",
    "names",
];

/// The policy that needs the most, and what becomes of its pods.
pub(super) fn explain(entry: &Entry, lack: &Lack, store: &Store) -> (String, String) {
    let applied = &entry.applied;
    let direction = match applied.direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    };
    let object = heaviest(applied, store);
    let object = object.map_or_else(String::new, |(kind, name)| format!("{kind} {name}"));
    let held = HELD.get(lack.table).copied().unwrap_or_default();
    let Lack {
        needs, share, room, ..
    } = lack;
    let owner = match applied.network.first() {
        Some(first) => format!("namespace {} has", first.namespace),
        None => "the cluster's policies have".to_owned(),
    };
    let denied = if applied.node.is_empty() {
        format!("Its pods on this node are denied all {direction}")
    } else {
        format!("This node is denied all {direction} but the ports of host_policy.failsafe")
    };
    let why = match entry.ruleset.too_large {
        Some(ranges) => format!(
            "its rules name {ranges} ranges of addresses, with those of other policies of the same pods, and there is \
             room for {room} {held}"
        ),
        None => format!(
            "it needs {needs} {held}, with other policies of the same pods, and {owner} {share} of the {room} that \
             the appliance has room for"
        ),
    };
    (object, format!("{denied}: {why}"))
}

/// The one of the policies that names the most peers.
fn heaviest(applied: &Applied, store: &Store) -> Option<(Kind, Name)> {
    let of_rules = |rules: &[crate::object::Rule]| -> usize {
        let peers = rules.iter().flat_map(|it| &it.peers);
        let weight = |it: &Peer| match it {
            Peer::Block(block) => 1 + block.except.len(),
            Peer::Pods(_) => 1,
        };
        peers.map(weight).sum()
    };
    let network = applied.network.iter().map(|name| {
        let policy = store.network_policies.get(name);
        let rules = policy.and_then(|it| match applied.direction {
            Direction::Ingress => it.ingress.as_deref(),
            Direction::Egress => it.egress.as_deref(),
        });
        (
            of_rules(rules.unwrap_or_default()),
            Kind::NetworkPolicy,
            name,
        )
    });
    let node = applied.node.iter().map(|name| {
        let rules = store.node_policies.get(name);
        let rules = rules.and_then(|it| it.rules(applied.direction));
        (of_rules(rules.unwrap_or_default()), Kind::NodePolicy, name)
    });
    let cluster = applied.cluster.iter().map(|name| {
        let rules = store
            .cluster_policies
            .get(name)
            .map(|it| match applied.direction {
                Direction::Ingress => &it.ingress,
                Direction::Egress => &it.egress,
            });
        let weight = |it: &ClusterPeer| match it {
            ClusterPeer::Nodes(_) => store.nodes().count(),
            _ => 1,
        };
        let peers = rules.into_iter().flatten().flat_map(|it| &it.peers);
        (peers.map(weight).sum(), Kind::ClusterNetworkPolicy, name)
    });
    let all = network.chain(node).chain(cluster);
    let heaviest = all.max_by(|a, b| (a.0, b.1, b.2).cmp(&(b.0, a.1, a.2)))?;
    Some((heaviest.1, heaviest.2.clone()))
}
