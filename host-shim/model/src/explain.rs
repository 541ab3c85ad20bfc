//! Which rules hold for a pod or a node, and for a connection which of them match and why the others do not. For people; what decides
//! is the guest's own code, see [`crate::trace`].

use std::fmt::Write;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sluice_contract::name::{Learnt, NameId};
use sluice_contract::policy::{Action, Direction};

use crate::compile::rules::{Applied, PeerMatch, PortMatch, Rule};
use crate::compile::{Group, TierName};
use crate::object::NamedPort;
use crate::store::Store;

/// What policies say about a pod or a node in one direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restrictions {
    /// `ingress` or `egress`.
    pub direction: String,
    /// Some NetworkPolicy selects the pod, or NodePolicy the node: what no rule accepts is denied.
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
    /// Some of its peers are domains.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub names_domains: bool,
    /// About the connection that was asked for: `None`, it matches; else why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mismatch: Option<String>,
    /// If it matches by what the pod was told of a name: what that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learnt: Option<String>,
}

/// What is known of the names that a pod was told.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// Nothing, and why.
    Unknown(&'static str),
    /// All of it, over or not.
    Known(Vec<Learnt>),
}

impl Told {
    /// For who has no node to ask.
    pub const ELSEWHERE: Self =
        Self::Unknown("the pod's node knows which addresses it was told they have");
    /// For a far end that names never lead to.
    pub const IN_CLUSTER: Self =
        Self::Unknown("domain names never open pods and nodes of the cluster");

    /// The names that an address has.
    pub(crate) fn names_of(&self, address: Option<IpAddr>) -> Vec<NameId> {
        let all = self.of(address).filter(|it| it.holds());
        all.map(|it| it.name).collect()
    }

    fn of(&self, address: Option<IpAddr>) -> impl Iterator<Item = &Learnt> {
        let all: &[Learnt] = match self {
            Self::Unknown(_) => &[],
            Self::Known(all) => all,
        };
        let address = address.map(|it| it.to_canonical());
        all.iter().filter(move |it| Some(it.address) == address)
    }
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
    /// What the pod whose rules these are was told of names.
    pub(crate) told: &'a Told,
}

pub(crate) fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// All rules that hold in one direction; with a far end, whether they match it.
pub(crate) fn restrictions(
    store: &Store,
    applied: Option<Applied>,
    direction: Direction,
    far: Option<Far<'_>>,
) -> Restrictions {
    let mut found = Restrictions {
        direction: direction_name(direction).into(),
        isolated: false,
        rules: Vec::new(),
    };
    let Some(applied) = applied else {
        return found;
    };
    for tier in applied.tiers(store) {
        found.isolated |= tier.miss == Action::Deny;
        for rule in tier.rules {
            let mismatch = far.and_then(|far| mismatch(&rule, far, store));
            let learnt = far.filter(|_| mismatch.is_none());
            let learnt = learnt.and_then(|far| told_of(&rule, far, true));
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
                names_domains: rule.peers.iter().any(|it| matches!(it, PeerMatch::Name(_))),
                mismatch,
                learnt,
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
                mismatch_by_name(rule, far)
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

fn mismatch_by_name(rule: &Rule, far: Far<'_>) -> String {
    let far_end = far.address.map_or("it".into(), |it| it.to_string());
    match (far.told, told_of(rule, far, false)) {
        (Told::Unknown(why), _) => format!("it names domains: {why}"),
        (_, Some(over)) => format!("it names domains: {over}, and not any more"),
        (_, None) => format!("the pod was not told that any of its domains has {far_end}"),
    }
}

/// What the pod was told of the far end's address by which a rule matches, or of which that is over.
fn told_of(rule: &Rule, far: Far<'_>, holds: bool) -> Option<String> {
    let mut all = far.told.of(far.address).filter(|it| it.holds() == holds);
    all.find_map(|learnt| {
        let mut peers = rule.peers.iter();
        let peer =
            peers.find(|it| matches!(it, PeerMatch::Name(name) if name.id == learnt.name))?;
        let (name, address) = (describe_peer(peer), learnt.address);
        Some(match learnt.left {
            left @ 1.. => format!("{name} has {address}, for {left} s more"),
            left => format!("{name} had {address} until {} s ago", left.unsigned_abs()),
        })
    })
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
        PeerMatch::Name(name) => {
            let mut told = far.told.of(far.address);
            told.any(|it| it.holds() && it.name == name.id)
        }
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
        PeerMatch::Name(name) => name.to_string(),
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
