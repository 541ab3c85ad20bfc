//! What the policies that select a pod say, as ordered rules in tiers. Numbers for rules, and their names back.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sluice_contract::Protocol;
use sluice_contract::name::NameRow;
use sluice_contract::policy::{Action, Direction, PORT_KEYS, RuleId, port_key};

use super::hash;
use super::identity::Group;
use super::selector::Wanted;
use crate::object::{
    Block, ClusterPeer, ClusterPolicy, ClusterPort, Kind, Name, NamedPort, NetworkPolicy, Peer,
    PolicyPort, Port, Prefix, Tier,
};
use crate::store::Store;

/// All keys of a port map.
pub(crate) const EVERYTHING: (u32, u32) = (0, PORT_KEYS - 1);

/// One rule of one policy.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rule {
    pub(crate) action: Action,
    pub(crate) name: RuleName,
    pub(crate) peers: Vec<PeerMatch>,
    /// Empty: everything.
    pub(crate) ports: Vec<PortMatch>,
}

/// Who may be at the other end.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PeerMatch {
    Everybody,
    Pods(Wanted),
    Block(Block),
    /// What the pod was told this name, or names below it, have for addresses.
    Name(Arc<NameRow>),
}

/// Which destination ports.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PortMatch {
    Keys(u32, u32),
    /// A name, to be looked up at the destination.
    Named(String, Option<Protocol>),
}

/// Rules that are asked one after the other, and what holds if none matches.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TierRules {
    pub(crate) name: TierName,
    pub(crate) rules: Vec<Rule>,
    pub(crate) miss: Action,
    pub(crate) miss_rule: Option<RuleName>,
}

/// Which tier a rule is of, in the order in which they are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TierName {
    Admin,
    NetworkPolicy,
    Baseline,
    /// Of the node: ports that no policy closes.
    Failsafe,
    NodePolicy,
}

/// A rule, as people find it again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleName {
    pub kind: Kind,
    pub policy: Name,
    pub direction: Direction,
    /// Its place in the policy; `None`: the policy isolates the pod and no rule of any policy lets this in.
    pub index: Option<u16>,
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        match self.index {
            Some(index) => write!(f, "{} {} {direction}[{index}]", self.kind, self.policy),
            None => write!(
                f,
                "default-deny {direction} by {} {}",
                self.kind, self.policy
            ),
        }
    }
}

impl Serialize for RuleName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Numbers of rules.
#[derive(Debug, Default)]
pub struct RuleNames {
    names: HashMap<RuleId, (RuleName, u32)>,
    numbers: HashMap<RuleName, RuleId>,
}

impl RuleNames {
    /// What a number means.
    pub fn get(&self, rule: RuleId) -> Option<&RuleName> {
        self.names.get(&rule).map(|(name, _)| name)
    }

    pub(crate) fn acquire(&mut self, name: &RuleName) -> RuleId {
        if let Some(rule) = self.numbers.get(name) {
            if let Some((_, users)) = self.names.get_mut(rule) {
                *users += 1;
            }
            return *rule;
        }
        let mut rule = RuleId(u32::try_from(hash::of(name) >> 32).unwrap_or(RuleId::FIRST));
        while rule.0 < RuleId::FIRST || self.names.contains_key(&rule) {
            rule = RuleId(rule.0.wrapping_add(1));
        }
        self.names.insert(rule, (name.clone(), 1));
        self.numbers.insert(name.clone(), rule);
        rule
    }

    pub(crate) fn release(&mut self, rule: RuleId) {
        if let Some((_, users)) = self.names.get_mut(&rule) {
            *users -= 1;
            if *users == 0
                && let Some((name, _)) = self.names.remove(&rule)
            {
                self.numbers.remove(&name);
            }
        }
    }
}

/// Which policies hold for a pod, or for the node, in one direction. Pods with equal ones share their rules.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Applied {
    pub(crate) direction: Direction,
    /// In the order in which they are asked.
    pub(crate) cluster: Vec<Name>,
    pub(crate) network: Vec<Name>,
    /// NodePolicies: the subject is the node, and no others are asked; and which ports they cannot close.
    pub(crate) node: Vec<Name>,
    pub(crate) failsafe: Arc<[PolicyPort]>,
    /// Where a rule for incoming traffic names ports, they are the pod's own.
    pub(crate) ports: Option<Arc<[NamedPort]>>,
}

impl Applied {
    /// The policies that select the pods of a group; `None`: nothing is restricted.
    pub(crate) fn find(store: &Store, group: &Group, direction: Direction) -> Option<Self> {
        let labels = store.namespace_labels(&group.namespace);
        let mut cluster: Vec<&ClusterPolicy> = store
            .cluster_policies()
            .filter(|it| !cluster_rules(it, direction).is_empty())
            .filter(|it| Wanted::new(&it.subject, &group.namespace).matches(group, &labels))
            .collect();
        cluster.sort_by_key(|it| (it.tier, it.priority, &it.name));
        let network: Vec<&NetworkPolicy> = store
            .network_policies_in(&group.namespace)
            .filter(|it| network_rules(it, direction).is_some() && it.pods.matches(&group.labels))
            .collect();
        if cluster.is_empty() && network.is_empty() {
            return None;
        }
        let names_ports = direction == Direction::Ingress
            && (cluster.iter().any(|it| names_ports(it, direction))
                || network.iter().any(|it| network_names_ports(it, direction)));
        Some(Self {
            direction,
            cluster: cluster.into_iter().map(|it| it.name.clone()).collect(),
            network: network.into_iter().map(|it| it.name.clone()).collect(),
            node: Vec::new(),
            failsafe: Arc::default(),
            ports: names_ports.then(|| group.ports.clone()),
        })
    }

    /// What they say.
    pub(crate) fn tiers(&self, store: &Store) -> Vec<TierRules> {
        let mut tiers = match self.node.first() {
            Some(first) => self.node_tiers(first, store),
            None => self.pod_tiers(store),
        };
        tiers.retain(|it| !it.rules.is_empty() || it.miss != Action::Pass);
        tiers
    }

    fn pod_tiers(&self, store: &Store) -> Vec<TierRules> {
        let mut tiers = Vec::new();
        let cluster = |tier| {
            let policies = self
                .cluster
                .iter()
                .filter_map(|it| store.cluster_policies.get(it));
            let rules = policies
                .filter(move |it| it.tier == tier)
                .flat_map(|it| self.cluster_tier(it, store));
            TierRules {
                name: match tier {
                    Tier::Admin => TierName::Admin,
                    Tier::Baseline => TierName::Baseline,
                },
                rules: rules.collect(),
                miss: Action::Pass,
                miss_rule: None,
            }
        };
        tiers.push(cluster(Tier::Admin));
        if let Some(first) = self.network.first() {
            let policies = self
                .network
                .iter()
                .filter_map(|it| store.network_policies.get(it));
            tiers.push(TierRules {
                name: TierName::NetworkPolicy,
                rules: policies.flat_map(|it| self.network_tier(it)).collect(),
                miss: Action::Deny,
                miss_rule: Some(RuleName {
                    kind: Kind::NetworkPolicy,
                    policy: first.clone(),
                    direction: self.direction,
                    index: None,
                }),
            });
            // Behind it nobody is asked.
        } else {
            tiers.push(cluster(Tier::Baseline));
        }
        tiers
    }

    fn network_tier(&self, policy: &NetworkPolicy) -> Vec<Rule> {
        let rules = network_rules(policy, self.direction).unwrap_or_default();
        self.accepted(Kind::NetworkPolicy, &policy.name, rules)
    }

    /// Rules of which each says what is accepted.
    pub(super) fn accepted(
        &self,
        kind: Kind,
        policy: &Name,
        rules: &[crate::object::Rule],
    ) -> Vec<Rule> {
        rules
            .iter()
            .enumerate()
            .map(|(index, rule)| {
                let peers = rule.peers.iter().map(|peer| match peer {
                    Peer::Pods(pods) => PeerMatch::Pods(Wanted::new(pods, &policy.namespace)),
                    Peer::Block(block) => PeerMatch::Block(block.clone()),
                });
                let mut peers: Vec<_> = peers.collect();
                if peers.is_empty() {
                    peers.push(PeerMatch::Everybody);
                }
                Rule {
                    action: Action::Accept,
                    name: self.name(kind, policy, index),
                    peers,
                    ports: rule.ports.iter().map(PortMatch::of).collect(),
                }
            })
            .collect()
    }

    fn cluster_tier(&self, policy: &ClusterPolicy, store: &Store) -> Vec<Rule> {
        let rules = cluster_rules(policy, self.direction).iter().enumerate();
        rules
            .map(|(index, rule)| Rule {
                action: rule.action,
                name: self.name(Kind::ClusterNetworkPolicy, &policy.name, index),
                peers: rule
                    .peers
                    .iter()
                    .flat_map(|it| cluster_peers(it, store))
                    .collect(),
                ports: rule.ports.iter().map(Self::cluster_port).collect(),
            })
            .collect()
    }

    pub(super) fn name(&self, kind: Kind, policy: &Name, index: usize) -> RuleName {
        RuleName {
            kind,
            policy: policy.clone(),
            direction: self.direction,
            index: u16::try_from(index).ok(),
        }
    }

    fn cluster_port(port: &ClusterPort) -> PortMatch {
        match port {
            ClusterPort::Number(port) => PortMatch::of(port),
            ClusterPort::Named(name) => PortMatch::Named(name.clone(), None),
        }
    }
}

impl PortMatch {
    pub(super) fn of(port: &PolicyPort) -> Self {
        let key = |number| port_key(Some(port.protocol), number);
        match &port.port {
            Port::Any => Self::Keys(key(0), key(u16::MAX)),
            Port::Range(first, last) => Self::Keys(key(*first), key(*last)),
            Port::Named(name) => Self::Named(name.clone(), Some(port.protocol)),
        }
    }

    /// The keys that are meant where the destination has these named ports.
    pub(crate) fn keys(&self, ports: &[NamedPort]) -> Vec<(u32, u32)> {
        match self {
            Self::Keys(first, last) => vec![(*first, *last)],
            Self::Named(name, protocol) => ports
                .iter()
                .filter(|it| it.name == *name && protocol.is_none_or(|want| want == it.protocol))
                .map(|it| port_key(Some(it.protocol), it.port))
                .map(|key| (key, key))
                .collect(),
        }
    }
}

fn network_rules(policy: &NetworkPolicy, direction: Direction) -> Option<&[crate::object::Rule]> {
    match direction {
        Direction::Ingress => policy.ingress.as_deref(),
        Direction::Egress => policy.egress.as_deref(),
    }
}

fn cluster_rules(policy: &ClusterPolicy, direction: Direction) -> &[crate::object::ClusterRule] {
    match direction {
        Direction::Ingress => &policy.ingress,
        Direction::Egress => &policy.egress,
    }
}

fn names_ports(policy: &ClusterPolicy, direction: Direction) -> bool {
    let mut ports = cluster_rules(policy, direction)
        .iter()
        .flat_map(|it| &it.ports);
    ports.any(|it| matches!(it, ClusterPort::Named(_)))
}

fn network_names_ports(policy: &NetworkPolicy, direction: Direction) -> bool {
    let rules = network_rules(policy, direction).into_iter().flatten();
    let mut ports = rules.flat_map(|it| &it.ports);
    ports.any(|it| matches!(it.port, Port::Named(_)))
}

fn cluster_peers(peer: &ClusterPeer, store: &Store) -> Vec<PeerMatch> {
    let block = |cidr| {
        PeerMatch::Block(Block {
            cidr,
            except: Vec::new(),
        })
    };
    match peer {
        ClusterPeer::Everybody => vec![PeerMatch::Everybody],
        ClusterPeer::Pods(pods) => vec![PeerMatch::Pods(Wanted::new(pods, &Arc::from("")))],
        ClusterPeer::Network(cidr) => vec![block(*cidr)],
        ClusterPeer::Name(name) => vec![PeerMatch::Name(name.clone())],
        ClusterPeer::Nodes(selector) => store
            .nodes()
            .filter(|it| selector.matches(&it.labels))
            .flat_map(|it| it.addresses.iter().map(|it| it.address))
            .map(|address: IpAddr| block(Prefix::host(address)))
            .collect(),
    }
}

/// Whether a policy's rules depend on which nodes there are.
pub(crate) fn names_nodes(policy: &ClusterPolicy) -> bool {
    let mut peers = policy
        .ingress
        .iter()
        .chain(&policy.egress)
        .flat_map(|it| &it.peers);
    peers.any(|it| matches!(it, ClusterPeer::Nodes(_)))
}
