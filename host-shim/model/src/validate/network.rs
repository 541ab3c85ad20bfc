//! Namespaces, nodes, pods and NetworkPolicies.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Check;
use super::fields::{port_name, shared};
use crate::object::rates::{Rate, Rates};
use crate::object::{
    Block, Name, NamedPort, Namespace, NetworkPolicy, Node, NodeAddress, Peer, Pod, PodSelector,
    PolicyPort, Port, Prefix, Rule,
};

/// The taint of a node that the cluster's autoscaler takes away, as kube-proxy knows it.
const REMOVED_SOON: &str = "ToBeDeletedByClusterAutoscaler";

/// Annotations of nodes by which networks of pods tell each other what they need.
const NODE_ANNOTATIONS: [&str; 2] = ["flannel.alpha.coreos.com/", "sluice.dev/"];

/// The annotation of pods and namespaces that names the pool of their addresses.
const ADDRESS_POOL: &str = "sluice.dev/address-pool";

fn address_pool(metadata: &ObjectMeta) -> Option<Arc<str>> {
    let annotations = metadata.annotations.as_ref()?;
    shared(annotations.get(ADDRESS_POOL).cloned())
}

/// The annotation of pods and namespaces that says with which DSCP packets go on.
const EGRESS_DSCP: &str = "sluice.dev/egress-dscp";
const DSCP_MAX: u8 = 63;

impl Check<'_> {
    /// A number that cannot be is told, and the object used without it.
    fn egress_dscp(&mut self, metadata: &ObjectMeta) -> Option<u8> {
        let text = metadata.annotations.as_ref()?.get(EGRESS_DSCP)?;
        let dscp = text.parse().ok().filter(|dscp| *dscp <= DSCP_MAX);
        if dscp.is_none() {
            let field = format!("metadata.annotations[{EGRESS_DSCP}]");
            self.warn(
                field,
                format!("{text:?} is no number from 0 to {DSCP_MAX}: packets go on as they come"),
            );
        }
        dscp
    }

    /// Limits to packets and connections. One that cannot be is told, and the node's default counts.
    fn rates(&mut self, metadata: &ObjectMeta) -> Rates {
        let mut rate = |what: &str| {
            let key = format!("sluice.dev/{what}-per-second");
            let text = metadata.annotations.as_ref()?.get(&key)?;
            if text == "unlimited" {
                return Some(Rate::Unlimited);
            }
            let rate = text.parse().ok().map(Rate::PerSecond);
            if rate.is_none() {
                let problem = format!(
                    "{text:?} is neither a number from 1 to {} nor \"unlimited\": the node's default counts",
                    u32::MAX
                );
                self.warn(format!("metadata.annotations[{key}]"), problem);
            }
            rate
        };
        Rates {
            ingress_packets: rate("ingress-packets"),
            egress_packets: rate("egress-packets"),
            ingress_connections: rate("ingress-connections"),
            egress_connections: rate("egress-connections"),
        }
    }

    pub(super) fn namespace(&mut self, name: &Name, metadata: &ObjectMeta) -> Namespace {
        let labels = self.labels(metadata);
        Namespace {
            name: name.clone(),
            labels: labels
                .with("kubernetes.io/metadata.name", &name.name)
                .into(),
            address_pool: address_pool(metadata),
            egress_dscp: self.egress_dscp(metadata),
        }
    }

    pub(super) fn node(&mut self, name: &Name, node: core::Node) -> Node {
        let labels = self.labels(&node.metadata).into();
        let spec = node.spec.unwrap_or_default();
        let taints = spec.taints.unwrap_or_default();
        let leaving = node.metadata.deletion_timestamp.is_some()
            || taints.iter().any(|it| it.key == REMOVED_SOON);
        let mut cidrs = spec.pod_cidrs.unwrap_or_default();
        if cidrs.is_empty() {
            cidrs.extend(spec.pod_cidr);
        }
        let mut pod_cidrs = Vec::new();
        for (index, cidr) in cidrs.iter().enumerate() {
            pod_cidrs.extend(self.prefix(&format!("spec.podCIDRs[{index}]"), cidr));
        }
        let mut addresses = Vec::new();
        let listed = node.status.and_then(|it| it.addresses).unwrap_or_default();
        for (index, it) in listed.into_iter().enumerate() {
            let external = match it.type_.as_str() {
                "InternalIP" => false,
                "ExternalIP" => true,
                _ => continue,
            };
            let field = format!("status.addresses[{index}].address");
            let address = self.address(&field, &it.address);
            addresses.extend(address.map(|address| NodeAddress { address, external }));
        }
        let annotations = node.metadata.annotations.unwrap_or_default();
        let ours = |key: &str| {
            NODE_ANNOTATIONS
                .iter()
                .any(|prefix| key.starts_with(prefix))
        };
        Node {
            name: name.clone(),
            labels,
            addresses,
            pod_cidrs,
            annotations: annotations
                .into_iter()
                .filter(|(key, _)| ours(key))
                .collect(),
            leaving,
        }
    }

    pub(super) fn pod(&mut self, name: &Name, pod: core::Pod) -> Pod {
        let labels = self.labels(&pod.metadata).into();
        let address_pool = address_pool(&pod.metadata);
        let egress_dscp = self.egress_dscp(&pod.metadata);
        let rates = self.rates(&pod.metadata);
        let terminating = pod.metadata.deletion_timestamp.is_some();
        let spec = pod.spec.unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        let condition = status
            .conditions
            .iter()
            .flatten()
            .find(|it| it.type_ == "Ready");
        Pod {
            name: name.clone(),
            labels,
            ports: self.named_ports(&spec).into(),
            node: shared(spec.node_name),
            host_network: spec.host_network == Some(true),
            ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            // A manifest has no status; its pod runs as soon as it has an address.
            ready: condition.is_none_or(|it| it.status == "True"),
            terminating,
            address_pool,
            egress_dscp,
            rates,
            addresses: self.pod_addresses(status),
        }
    }

    fn pod_addresses(&mut self, status: core::PodStatus) -> Vec<IpAddr> {
        let listed: Vec<_> = status
            .pod_ips
            .into_iter()
            .flatten()
            .map(|it| it.ip)
            .chain(status.pod_ip)
            .collect();
        let mut addresses = Vec::new();
        for (index, text) in listed.iter().enumerate() {
            let address = self.address(&format!("status.podIPs[{index}]"), text);
            addresses.extend(address.filter(|it| !addresses.contains(it)));
        }
        addresses
    }

    /// Sidecars (init containers that are restarted) have ports as well.
    fn named_ports(&mut self, spec: &core::PodSpec) -> Vec<NamedPort> {
        let sidecars = spec.init_containers.iter().flatten();
        let sidecars = sidecars.filter(|it| it.restart_policy.as_deref() == Some("Always"));
        let mut seen = BTreeSet::new();
        let mut ports = Vec::new();
        for (index, container) in spec.containers.iter().chain(sidecars).enumerate() {
            for (number, it) in container.ports.iter().flatten().enumerate() {
                let field = format!("spec.containers[{index}].ports[{number}]");
                let port = self.port(&format!("{field}.containerPort"), it.container_port);
                let protocol = self.protocol(&format!("{field}.protocol"), it.protocol.as_deref());
                let (Some(port), Some(protocol), Some(name)) = (port, protocol, &it.name) else {
                    continue;
                };
                if let Err(reason) = port_name(name) {
                    self.error(format!("{field}.name"), reason);
                }
                // The API server lets a name stand once in a container; across containers the first one counts.
                if seen.insert((name.clone(), protocol)) {
                    ports.push(NamedPort {
                        name: name.clone(),
                        protocol,
                        port,
                    });
                }
            }
        }
        ports.sort();
        ports
    }

    pub(super) fn network_policy(
        &mut self,
        name: &Name,
        policy: networking::NetworkPolicy,
    ) -> NetworkPolicy {
        let spec = policy.spec.unwrap_or_default();
        let _ = self.labels(&policy.metadata); // Checked; nobody selects policies.
        let pods = self.selector("spec.podSelector", spec.pod_selector.unwrap_or_default());
        let (ingress, egress) =
            self.directions(spec.policy_types.as_deref(), spec.ingress, spec.egress);
        NetworkPolicy {
            name: name.clone(),
            pods,
            ingress,
            egress,
        }
    }

    /// The rules of both directions; `None`: the policy says nothing of it.
    pub(super) fn directions(
        &mut self,
        types: Option<&[String]>,
        ingress_rules: Option<Vec<networking::NetworkPolicyIngressRule>>,
        egress_rules: Option<Vec<networking::NetworkPolicyEgressRule>>,
    ) -> (Option<Vec<Rule>>, Option<Vec<Rule>>) {
        let mut ingress = Vec::new();
        for (index, it) in ingress_rules.into_iter().flatten().enumerate() {
            let field = format!("spec.ingress[{index}]");
            ingress.push(self.rule(&field, "from", it.from, it.ports));
        }
        let mut egress = Vec::new();
        for (index, it) in egress_rules.into_iter().flatten().enumerate() {
            let field = format!("spec.egress[{index}]");
            egress.push(self.rule(&field, "to", it.to, it.ports));
        }
        let (isolates_ingress, isolates_egress) = match types {
            // Where it is not said: ingress always, egress if there are rules for it.
            None | Some([]) => (true, !egress.is_empty()),
            Some(types) => self.policy_types(types),
        };
        for (isolates, rules, field) in [
            (isolates_ingress, &ingress, "spec.ingress"),
            (isolates_egress, &egress, "spec.egress"),
        ] {
            if !isolates && !rules.is_empty() {
                self.warn(
                    field,
                    "Has no effect: spec.policyTypes does not name this direction",
                );
            }
        }
        (
            isolates_ingress.then_some(ingress),
            isolates_egress.then_some(egress),
        )
    }

    fn policy_types(&mut self, types: &[String]) -> (bool, bool) {
        for (index, it) in types.iter().enumerate() {
            if !matches!(it.as_str(), "Ingress" | "Egress") {
                let reason = format!("{it:?} is not one of Ingress, Egress");
                self.error(format!("spec.policyTypes[{index}]"), reason);
            }
        }
        let names = |wanted: &str| types.iter().any(|it| it == wanted);
        (names("Ingress"), names("Egress"))
    }

    fn rule(
        &mut self,
        field: &str,
        side: &str,
        peers: Option<Vec<networking::NetworkPolicyPeer>>,
        ports: Option<Vec<networking::NetworkPolicyPort>>,
    ) -> Rule {
        let mut rule = Rule::default();
        for (index, it) in peers.into_iter().flatten().enumerate() {
            rule.peers
                .extend(self.peer(&format!("{field}.{side}[{index}]"), it));
        }
        for (index, it) in ports.into_iter().flatten().enumerate() {
            rule.ports
                .extend(self.policy_port(&format!("{field}.ports[{index}]"), it));
        }
        rule
    }

    fn peer(&mut self, field: &str, peer: networking::NetworkPolicyPeer) -> Option<Peer> {
        match (peer.ip_block, peer.namespace_selector, peer.pod_selector) {
            (Some(block), None, None) => {
                let field = format!("{field}.ipBlock");
                let cidr = self.prefix(&format!("{field}.cidr"), &block.cidr);
                let except = self.excepts(&field, cidr, &block.except.unwrap_or_default());
                cidr.map(|cidr| Peer::Block(Block { cidr, except }))
            }
            (Some(_), _, _) => {
                self.error(field, "ipBlock stands alone, without selectors beside it");
                None
            }
            (None, None, None) => {
                self.error(field, "Needs podSelector, namespaceSelector or ipBlock");
                None
            }
            (None, namespaces, pods) => Some(Peer::Pods(PodSelector {
                namespaces: namespaces
                    .map(|it| self.selector(&format!("{field}.namespaceSelector"), it)),
                pods: pods
                    .map(|it| self.selector(&format!("{field}.podSelector"), it))
                    .unwrap_or_default(),
            })),
        }
    }

    fn excepts(&mut self, field: &str, cidr: Option<Prefix>, listed: &[String]) -> Vec<Prefix> {
        let mut excepts = Vec::new();
        for (index, text) in listed.iter().enumerate() {
            let field = format!("{field}.except[{index}]");
            let Some(except) = self.prefix(&field, text) else {
                continue;
            };
            match cidr {
                Some(cidr) if !cidr.covers(&except) || cidr == except => {
                    self.error(field, format!("{except} is not a part of {cidr}"));
                }
                _ => excepts.push(except),
            }
        }
        excepts.sort();
        excepts.dedup();
        excepts
    }

    fn policy_port(
        &mut self,
        field: &str,
        port: networking::NetworkPolicyPort,
    ) -> Option<PolicyPort> {
        let protocol = self.protocol(&format!("{field}.protocol"), port.protocol.as_deref());
        let first = match port.port {
            None => {
                if port.end_port.is_some() {
                    self.error(format!("{field}.endPort"), "Needs a port to begin with");
                }
                Port::Any
            }
            Some(IntOrString::String(name)) => {
                if let Err(reason) = port_name(&name) {
                    self.error(format!("{field}.port"), reason);
                }
                if port.end_port.is_some() {
                    self.error(format!("{field}.endPort"), "Cannot follow a named port");
                }
                Port::Named(name)
            }
            Some(IntOrString::Int(number)) => {
                let first = self.port(&format!("{field}.port"), number)?;
                let last = match port.end_port {
                    Some(end) => self.port(&format!("{field}.endPort"), end)?,
                    None => first,
                };
                if last < first {
                    let reason = format!("{last} is below the port it begins with, {first}");
                    self.error(format!("{field}.endPort"), reason);
                }
                Port::Range(first, last)
            }
        };
        protocol.map(|protocol| PolicyPort {
            protocol,
            port: first,
        })
    }
}
