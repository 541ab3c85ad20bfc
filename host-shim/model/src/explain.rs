//! Which rules hold for a pod, and for a connection which of them match and why the others do not. For people; what decides
//! is the guest's own code, see [`crate::trace`].

use std::fmt::Write;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sluice_contract::policy::{Action, Direction};

use crate::compile::rules::{Applied, PeerMatch, PortMatch, Rule};
use crate::compile::{Group, TierName};
use crate::object::NamedPort;
use crate::store::Store;

/// What policies say about a pod in one direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restrictions {
    /// `ingress` or `egress`.
    pub direction: String,
    /// Some NetworkPolicy selects the pod: what no rule accepts is denied.
    pub isolated: bool,
    /// In the order in which they are asked.
    pub rules: Vec<Restriction>,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restriction {
    pub rule: String,
    pub tier: TierName,
    /// `accept`, `deny` or `pass`.
    pub action: String,
    pub peers: Vec<String>,
    /// Empty: everything.
    pub ports: Vec<String>,
    /// About the connection that was asked for: `None`, it matches; else why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mismatch: Option<String>,
}

/// The far end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Far<'a> {
    /// `None`: not a pod.
    pub(crate) group: Option<&'a Group>,
    pub(crate) address: Option<IpAddr>,
    /// Named ports of the destination, whichever end that is.
    pub(crate) ports: &'a [NamedPort],
    /// See [`sluice_contract::policy::port_key`].
    pub(crate) key: u32,
}

pub(crate) fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// All rules for the pods of a group in one direction; with a far end, whether they match it.
pub(crate) fn restrictions(
    store: &Store,
    group: &Group,
    direction: Direction,
    far: Option<Far<'_>>,
) -> Restrictions {
    let mut found = Restrictions {
        direction: direction_name(direction).into(),
        isolated: false,
        rules: Vec::new(),
    };
    let Some(applied) = Applied::find(store, group, direction) else {
        return found;
    };
    for tier in applied.tiers(store) {
        found.isolated |= tier.miss == Action::Deny;
        for rule in tier.rules {
            let mismatch = far.and_then(|far| mismatch(&rule, far, store));
            found.rules.push(Restriction {
                tier: tier.name,
                action: match rule.action {
                    Action::Accept => "accept".into(),
                    Action::Deny => "deny".into(),
                    Action::Pass => "pass".into(),
                },
                peers: rule.peers.iter().map(describe_peer).collect(),
                ports: rule.ports.iter().map(describe_port).collect(),
                rule: rule.name.to_string(),
                mismatch,
            });
        }
    }
    found
}

fn mismatch(rule: &Rule, far: Far<'_>, store: &Store) -> Option<String> {
    if !rule.peers.iter().any(|peer| is_peer(peer, far, store)) {
        return Some(match (far.group, rule.peers.is_empty()) {
            (_, true) => "the rule has no peer that is understood".into(),
            _ if rule.peers.iter().any(|it| matches!(it, PeerMatch::Name(_))) => {
                "it names domains: the pod's node knows which addresses it was told they have"
                    .into()
            }
            (Some(_), _) => {
                "the peer's labels, namespace and address match none of its peers".into()
            }
            (None, _) => "the peer is no pod, and its address is in none of its blocks".into(),
        });
    }
    let is_in = |port: &PortMatch| {
        let mut keys = port.keys(far.ports).into_iter();
        keys.any(|(first, last)| (first..=last).contains(&far.key))
    };
    if rule.ports.is_empty() || rule.ports.iter().any(is_in) {
        return None;
    }
    Some("the port is none of its ports".into())
}

fn is_peer(peer: &PeerMatch, far: Far<'_>, store: &Store) -> bool {
    match peer {
        PeerMatch::Everybody => true,
        PeerMatch::Pods(wanted) => far
            .group
            .is_some_and(|it| wanted.matches(it, &store.namespace_labels(&it.namespace))),
        PeerMatch::Block(block) => far.address.is_some_and(|address| {
            block.cidr.contains(address) && !block.except.iter().any(|it| it.contains(address))
        }),
        PeerMatch::Name(_) => false,
    }
}

fn describe_peer(peer: &PeerMatch) -> String {
    match peer {
        PeerMatch::Everybody => "everybody".into(),
        PeerMatch::Pods(wanted) => wanted.to_string(),
        PeerMatch::Block(block) => {
            let mut text = block.cidr.to_string();
            for except in &block.except {
                // Writing to a string does not fail.
                let _ = write!(text, " except {except}");
            }
            text
        }
        PeerMatch::Name(name) if name.wildcard => format!("*.{}", name.text),
        PeerMatch::Name(name) => name.text.to_string(),
    }
}

fn describe_port(port: &PortMatch) -> String {
    match port {
        PortMatch::Named(name, None) => name.clone(),
        PortMatch::Named(name, Some(protocol)) => format!("{name}/{}", protocol_name(*protocol)),
        PortMatch::Keys(first, last) => {
            let protocol = ["TCP", "UDP", "SCTP", "other"][(first >> 16) as usize & 3];
            let (first, last) = (first & 0xffff, last & 0xffff);
            match (first, last) {
                (0, 0xffff) => protocol.into(),
                _ if first == last => format!("{first}/{protocol}"),
                _ => format!("{first}-{last}/{protocol}"),
            }
        }
    }
}

fn protocol_name(protocol: sluice_contract::Protocol) -> &'static str {
    match protocol {
        sluice_contract::Protocol::Tcp => "TCP",
        sluice_contract::Protocol::Udp => "UDP",
        sluice_contract::Protocol::Sctp => "SCTP",
    }
}
