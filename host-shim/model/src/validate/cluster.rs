//! ClusterNetworkPolicies. A rule that is not understood in full fails closed, as the API asks of those who are older than an
//! object: an `Accept` then matches nothing, a `Deny` or `Pass` denies everything at its place.

use sluice_contract::Protocol;
use sluice_contract::name::NameRow;
use sluice_contract::policy::Action;

use super::fields::port_name;
use super::{Check, wire};
use crate::object::{
    ClusterPeer, ClusterPolicy, ClusterPort, ClusterRule, Name, PodSelector, PolicyPort, Port, Tier,
};

/// Rules in one direction, peers of a rule, protocols of a rule.
const ITEMS: usize = 25;
const PRIORITY: i32 = 1000;

/// Whether a field lies where later versions of the API are expected to add: in a peer or in a protocol.
pub(super) fn is_open(field: &str) -> bool {
    let rule = field
        .strip_prefix("spec.ingress[")
        .or_else(|| field.strip_prefix("spec.egress["));
    let Some((_, rest)) = rule.and_then(|rule| rule.split_once("].")) else {
        return false;
    };
    ["from[", "to[", "protocols["]
        .iter()
        .any(|part| rest.starts_with(part))
        && rest.matches('.').count() == 1
}

/// A part of a rule that is either understood, not understood, or wrong (and reported).
enum Part<T> {
    Known(T),
    Unknown,
    Wrong,
}

impl Check<'_> {
    pub(super) fn cluster_policy(
        &mut self,
        name: &Name,
        policy: wire::ClusterNetworkPolicy,
    ) -> ClusterPolicy {
        let _ = self.labels(&policy.metadata); // Checked; nobody selects policies.
        let spec = policy.spec;
        let tier = match spec.tier.as_str() {
            "Admin" => Tier::Admin,
            "Baseline" => Tier::Baseline,
            other => {
                self.error(
                    "spec.tier",
                    format!("{other:?} is not one of Admin, Baseline"),
                );
                Tier::Baseline
            }
        };
        if !(0..=PRIORITY).contains(&spec.priority) {
            self.error("spec.priority", format!("Has to be from 0 to {PRIORITY}"));
        }
        let subject = match (spec.subject.namespaces, spec.subject.pods) {
            (Some(namespaces), None) => self.all_pods("spec.subject.namespaces", namespaces),
            (None, Some(pods)) => self.some_pods("spec.subject.pods", pods),
            _ => {
                self.error("spec.subject", "Has to have one of namespaces, pods");
                PodSelector {
                    namespaces: None,
                    pods: Default::default(),
                }
            }
        };
        ClusterPolicy {
            name: name.clone(),
            tier,
            priority: u16::try_from(spec.priority).unwrap_or_default(),
            subject,
            ingress: self.cluster_rules("spec.ingress", "from", spec.ingress),
            egress: self.cluster_rules("spec.egress", "to", spec.egress),
        }
    }

    fn all_pods(
        &mut self,
        field: &str,
        namespaces: k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector,
    ) -> PodSelector {
        PodSelector {
            namespaces: Some(self.selector(field, namespaces)),
            pods: Default::default(),
        }
    }

    fn some_pods(&mut self, field: &str, pods: wire::NamespacedPod) -> PodSelector {
        let namespaces = self.selector(
            &format!("{field}.namespaceSelector"),
            pods.namespace_selector,
        );
        PodSelector {
            namespaces: Some(namespaces),
            pods: self.selector(&format!("{field}.podSelector"), pods.pod_selector),
        }
    }

    fn cluster_rules(
        &mut self,
        field: &str,
        side: &str,
        rules: Vec<wire::Rule>,
    ) -> Vec<ClusterRule> {
        self.at_most(field, rules.len());
        let mut read = Vec::new();
        for (index, rule) in rules.into_iter().enumerate() {
            read.extend(self.cluster_rule(&format!("{field}[{index}]"), side, rule));
        }
        read
    }

    fn cluster_rule(&mut self, field: &str, side: &str, rule: wire::Rule) -> Option<ClusterRule> {
        let action = match rule.action.as_str() {
            "Accept" => Action::Accept,
            "Deny" => Action::Deny,
            "Pass" => Action::Pass,
            other => {
                let reason = format!("{other:?} is not one of Accept, Deny, Pass");
                self.error(format!("{field}.action"), reason);
                return None;
            }
        };
        if rule.name.chars().count() > 100 {
            self.error(format!("{field}.name"), "Longer than 100 characters");
        }
        let (peers, other) = if side == "from" {
            (rule.from, rule.to)
        } else {
            (rule.to, rule.from)
        };
        if other.is_some() {
            self.error(field, format!("Rules in this direction have {side:?} only"));
        }
        let peers = peers.unwrap_or_default();
        if peers.is_empty() {
            self.error(format!("{field}.{side}"), "Needs at least one peer");
        }
        self.at_most(&format!("{field}.{side}"), peers.len());
        let protocols = rule.protocols.unwrap_or_default();
        self.at_most(&format!("{field}.protocols"), protocols.len());

        let mut understood = true;
        let mut read = ClusterRule {
            name: rule.name,
            action,
            peers: Vec::new(),
            ports: Vec::new(),
        };
        let names_ports = protocols
            .iter()
            .any(|it| it.destination_named_port.is_some());
        for (index, peer) in peers.into_iter().enumerate() {
            let field = format!("{field}.{side}[{index}]");
            let outside =
                peer.nodes.is_some() || peer.networks.is_some() || peer.domain_names.is_some();
            if names_ports && outside {
                self.error(&*field, "Nodes, networks and domains have no named ports");
            }
            match self.cluster_peer(&field, side, action, peer) {
                Part::Known(peers) => read.peers.extend(peers),
                Part::Unknown => understood = false,
                Part::Wrong => {}
            }
        }
        for (index, it) in protocols.into_iter().enumerate() {
            match self.cluster_port(&format!("{field}.protocols[{index}]"), it) {
                Part::Known(port) => read.ports.push(port),
                Part::Unknown => understood = false,
                Part::Wrong => {}
            }
        }
        if !understood {
            self.warn(
                field,
                "Something in it is not understood, so the rule fails closed",
            );
            fail_closed(&mut read);
        }
        Some(read)
    }

    fn cluster_peer(
        &mut self,
        field: &str,
        side: &str,
        action: Action,
        peer: wire::Peer,
    ) -> Part<Vec<ClusterPeer>> {
        let fields = [
            peer.namespaces.is_some(),
            peer.pods.is_some(),
            peer.nodes.is_some(),
            peer.networks.is_some(),
            peer.domain_names.is_some(),
        ];
        if fields.iter().filter(|set| **set).count() > 1 {
            self.error(field, "Has to have exactly one field");
            return Part::Wrong;
        }
        if let Some(namespaces) = peer.namespaces {
            let pods = self.all_pods(&format!("{field}.namespaces"), namespaces);
            return Part::Known(vec![ClusterPeer::Pods(pods)]);
        }
        if let Some(pods) = peer.pods {
            let pods = self.some_pods(&format!("{field}.pods"), pods);
            return Part::Known(vec![ClusterPeer::Pods(pods)]);
        }
        if side == "from" && fields.contains(&true) {
            // The API has these for egress only.
            return Part::Unknown;
        }
        if let Some(nodes) = peer.nodes {
            let nodes = self.selector(&format!("{field}.nodes"), nodes);
            return Part::Known(vec![ClusterPeer::Nodes(nodes)]);
        }
        if let Some(networks) = peer.networks {
            self.at_most(&format!("{field}.networks"), networks.len());
            let mut read = Vec::new();
            for (index, text) in networks.iter().enumerate() {
                let prefix = self.prefix(&format!("{field}.networks[{index}]"), text);
                read.extend(prefix.map(ClusterPeer::Network));
            }
            return Part::Known(read);
        }
        if let Some(names) = peer.domain_names.filter(|_| action == Action::Accept) {
            return Part::Known(self.domain_names(&format!("{field}.domainNames"), &names));
        }
        Part::Unknown
    }

    fn domain_names(&mut self, field: &str, names: &[String]) -> Vec<ClusterPeer> {
        self.at_most(field, names.len());
        if names.is_empty() {
            self.error(field, "Needs at least one name");
        }
        let mut read = Vec::new();
        for (index, text) in names.iter().enumerate() {
            match NameRow::parse(text) {
                Some(name) => read.push(ClusterPeer::Name(name.into())),
                None => self.error(
                    format!("{field}[{index}]"),
                    format!("{text:?} is no name such as example.com or *.example.com"),
                ),
            }
        }
        read
    }

    fn cluster_port(&mut self, field: &str, it: wire::Protocol) -> Part<ClusterPort> {
        let set = [it.tcp.is_some(), it.udp.is_some(), it.sctp.is_some()];
        let count = set.iter().filter(|set| **set).count()
            + usize::from(it.destination_named_port.is_some());
        if count > 1 {
            self.error(field, "Has to have exactly one field");
            return Part::Wrong;
        }
        if let Some(name) = it.destination_named_port {
            if let Err(reason) = port_name(&name) {
                self.error(format!("{field}.destinationNamedPort"), reason);
            }
            return Part::Known(ClusterPort::Named(name));
        }
        let of = |ports: Option<wire::Ports>, protocol, name| ports.map(|it| (it, protocol, name));
        let Some((ports, protocol, name)) = of(it.tcp, Protocol::Tcp, "tcp")
            .or(of(it.udp, Protocol::Udp, "udp"))
            .or(of(it.sctp, Protocol::Sctp, "sctp"))
        else {
            return Part::Unknown;
        };
        let field = format!("{field}.{name}.destinationPort");
        let port = match ports.destination_port {
            None => Some(Port::Any),
            Some(port) => self.port_or_range(&field, port),
        };
        port.map_or(Part::Wrong, |port| {
            Part::Known(ClusterPort::Number(PolicyPort { protocol, port }))
        })
    }

    fn port_or_range(&mut self, field: &str, port: wire::Port) -> Option<Port> {
        match (port.number, port.range) {
            (Some(number), None) => {
                let port = self.port(&format!("{field}.number"), number)?;
                Some(Port::Range(port, port))
            }
            (None, Some(range)) => {
                let first = self.port(&format!("{field}.range.start"), range.start)?;
                let last = self.port(&format!("{field}.range.end"), range.end)?;
                if first >= last {
                    self.error(
                        format!("{field}.range"),
                        "The start has to be below the end",
                    );
                }
                Some(Port::Range(first, last))
            }
            _ => {
                self.error(field, "Has to have one of number, range");
                None
            }
        }
    }

    fn at_most(&mut self, field: &str, count: usize) {
        if count > ITEMS {
            self.error(field, format!("{count} items; at most {ITEMS} are allowed"));
        }
    }
}

fn fail_closed(rule: &mut ClusterRule) {
    rule.ports.clear();
    rule.peers.clear();
    if rule.action != Action::Accept {
        rule.action = Action::Deny;
        rule.peers.push(ClusterPeer::Everybody);
    }
}
