//! The node itself as the subject of policy (row N-21): NodePolicies that select it, behind the ports that nobody may close.

use std::sync::Arc;

use sluice_contract::policy::{Action, BindingRow, Direction, RulesetId};
use sluice_contract::{LinkId, Protocol};

use super::policy::Engine;
use super::rules::{Applied, PeerMatch, PortMatch, Rule, RuleName, TierName, TierRules};
use super::{Config, Undescribed};
use crate::diff::Tables;
use crate::object::{Kind, Labels, Name, PolicyPort, Port};
use crate::store::{Changes, Store};

/// Whether NodePolicies hold for this node, and what they cannot deny.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPolicy {
    pub mode: HostPolicyMode,
    /// Ports of the node that everybody may ask, and ports that the node may ask anywhere, whatever policies say.
    pub failsafe_ingress: Arc<[PolicyPort]>,
    pub failsafe_egress: Arc<[PolicyPort]>,
}

/// What becomes of what NodePolicies deny.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPolicyMode {
    /// They are not asked.
    Off,
    /// It passes, and is told.
    Audit,
    Enforce,
}

/// SSH, the API server, the kubelet.
pub const FAILSAFE_INGRESS: [(Protocol, u16); 3] = [
    (Protocol::Tcp, 22),
    (Protocol::Tcp, 6443),
    (Protocol::Tcp, 10250),
];
/// The API server and DNS.
pub const FAILSAFE_EGRESS: [(Protocol, u16); 3] = [
    (Protocol::Tcp, 6443),
    (Protocol::Udp, 53),
    (Protocol::Tcp, 53),
];

/// No object can have this name.
const FAILSAFE: &str = "host_policy.failsafe";

impl Default for HostPolicy {
    fn default() -> Self {
        let ports = |all: [(Protocol, u16); 3]| {
            let port = |(protocol, number)| PolicyPort {
                protocol,
                port: Port::Range(number, number),
            };
            all.into_iter().map(port).collect()
        };
        Self {
            mode: HostPolicyMode::Enforce,
            failsafe_ingress: ports(FAILSAFE_INGRESS),
            failsafe_egress: ports(FAILSAFE_EGRESS),
        }
    }
}

impl HostPolicy {
    /// The policies that hold for a node with these labels; `None`: nothing is restricted.
    pub(crate) fn applied(
        &self,
        store: &Store,
        labels: &Labels,
        direction: Direction,
    ) -> Option<Applied> {
        if self.mode == HostPolicyMode::Off {
            return None;
        }
        let all = store.node_policies();
        let policies: Vec<Name> = all
            .filter(|it| it.nodes.matches(labels) && it.rules(direction).is_some())
            .map(|it| it.name.clone())
            .collect();
        (!policies.is_empty()).then(|| Applied {
            direction,
            cluster: Vec::new(),
            network: Vec::new(),
            node: policies,
            failsafe: match direction {
                Direction::Ingress => self.failsafe_ingress.clone(),
                Direction::Egress => self.failsafe_egress.clone(),
            },
            ports: None,
        })
    }
}

impl Applied {
    /// What they say, where the subject is a node.
    pub(super) fn node_tiers(&self, first: &Name, store: &Store) -> Vec<TierRules> {
        let failsafe = self.failsafe.iter().enumerate().map(|(index, port)| Rule {
            action: Action::Accept,
            name: self.name(Kind::NodePolicy, &Name::new("", FAILSAFE), index),
            peers: vec![PeerMatch::Everybody],
            ports: vec![PortMatch::of(port)],
        });
        let policies = self
            .node
            .iter()
            .filter_map(|it| store.node_policies.get(it));
        let rules = policies.flat_map(|policy| {
            let rules = policy.rules(self.direction).unwrap_or_default();
            self.accepted(Kind::NodePolicy, &policy.name, rules)
        });
        vec![
            TierRules {
                name: TierName::Failsafe,
                rules: failsafe.collect(),
                miss: Action::Pass,
                miss_rule: None,
            },
            TierRules {
                name: TierName::NodePolicy,
                rules: rules.collect(),
                miss: Action::Deny,
                miss_rule: Some(RuleName {
                    kind: Kind::NodePolicy,
                    policy: first.clone(),
                    direction: self.direction,
                    index: None,
                }),
            },
        ]
    }
}

/// The node, between two changes.
#[derive(Debug)]
pub(super) struct Subject {
    name: Arc<str>,
    policy: HostPolicy,
    undescribed: Undescribed,
    labels: Arc<Labels>,
    bound: [RulesetId; 2],
}

impl Subject {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            name: config.node.clone(),
            policy: config.host_policy.clone(),
            undescribed: config.undescribed,
            labels: Arc::default(),
            bound: [RulesetId::NONE; 2],
        }
    }

    /// Decides anew which labels the node has; whether that, or a policy, may make a difference.
    fn look(&mut self, store: &Store, changes: &Changes) -> bool {
        if changes.nodes.contains(&self.name) {
            match (store.node(&self.name), self.undescribed) {
                (Some(node), _) => self.labels = node.labels.clone(),
                // An object that goes does not open the node: it is what it was.
                (None, Undescribed::AsBefore) => {}
                (None, Undescribed::Unlabelled) => self.labels = Arc::default(),
            }
            return true;
        }
        !changes.node_policies.is_empty()
    }
}

impl Engine {
    /// Decides which rulesets hold for the node.
    pub(super) fn bind_node(&mut self, store: &Store, changes: &Changes, tables: &mut Tables) {
        if !self.node.look(store, changes) {
            return;
        }
        let (policy, labels) = (&self.node.policy, &self.node.labels);
        let applied = [Direction::Ingress, Direction::Egress]
            .map(|direction| policy.applied(store, labels, direction));
        let now = applied.map(|it| self.acquire(it, store, tables));
        let [ingress, egress] = now;
        let is_bound = now != [RulesetId::NONE; 2];
        let row = is_bound.then_some(BindingRow {
            link: LinkId::HOST,
            ingress,
            egress,
        });
        tables.set_binding(LinkId::HOST, row);
        for ruleset in std::mem::replace(&mut self.node.bound, now) {
            self.release(ruleset, store, tables);
        }
    }
}
