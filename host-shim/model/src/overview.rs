//! What there is, for people: the policies and how many pods they are about, the Services and how many endpoints they have.

use std::collections::HashMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::compile::{Attached, Config, Group, Snapshot, Survey, is_direct};
use crate::finding::{Finding, Severity};
use crate::object::{
    FORWARDING, Forwarding, Kind, Labels, Name, Pod, PodSelector, Service, ServicePort, Tier,
};
use crate::store::Store;

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySummary {
    pub kind: Kind,
    /// `namespace/name`, or the name alone.
    pub name: String,
    /// Of a ClusterNetworkPolicy: `admin` or `baseline`, and its priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u16>,
    /// Its rules by direction; `None`: it says nothing about that direction.
    pub ingress_rules: Option<usize>,
    pub egress_rules: Option<usize>,
    /// Pods that it is about, in the cluster and on this node.
    pub pods: usize,
    pub pods_here: usize,
    /// Of a NodePolicy: the nodes that it is about, and whether this one is among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_here: Option<bool>,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSummary {
    pub name: String,
    pub cluster_ips: Vec<IpAddr>,
    /// Of load balancers and external ones, those that are used.
    pub external_ips: Vec<IpAddr>,
    /// Addresses, ports and endpoints that it asks for and does not get, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// How clients outside are led to endpoints on other nodes: `snat` or `dsr`.
    #[serde(default)]
    pub forwarding: Forwarding,
    pub ports: Vec<PortSummary>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSummary {
    pub name: String,
    /// Like `80/TCP`.
    pub port: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_port: Option<u16>,
    /// What new connections are spread over from here, both families.
    pub endpoints: Vec<String>,
    /// Endpoints on this node that are ready.
    pub local_ready: usize,
}

/// All policies: of pods first, cluster-wide ones before others, in the order in which they are asked. `node`: this one, if there
/// is one, and `here` its pods.
pub fn policies<'a>(
    store: &Store,
    node: Option<&str>,
    here: impl Iterator<Item = &'a Name>,
) -> Vec<PolicySummary> {
    let here: Vec<&Name> = here.collect();
    let groups = Groups::of(store, &here);
    let mut cluster: Vec<_> = store.cluster_policies().collect();
    cluster.sort_by_key(|it| (it.tier, it.priority, &it.name));
    let rules = |count: usize| (count > 0).then_some(count);
    let of_cluster = cluster.into_iter().map(|it| {
        let (pods, pods_here) = groups.count(store, |group, namespace| {
            selects(&it.subject, group, namespace)
        });
        PolicySummary {
            kind: Kind::ClusterNetworkPolicy,
            name: it.name.to_string(),
            tier: Some(match it.tier {
                Tier::Admin => "admin".into(),
                Tier::Baseline => "baseline".into(),
            }),
            priority: Some(it.priority),
            ingress_rules: rules(it.ingress.len()),
            egress_rules: rules(it.egress.len()),
            pods,
            pods_here,
            nodes: None,
            node_here: None,
        }
    });
    let of_namespaces = store.network_policies().map(|it| {
        let (pods, pods_here) = groups.count(store, |group, _| {
            group.namespace == it.name.namespace && it.pods.matches(&group.labels)
        });
        PolicySummary {
            kind: Kind::NetworkPolicy,
            name: it.name.to_string(),
            tier: None,
            priority: None,
            ingress_rules: it.ingress.as_ref().map(Vec::len),
            egress_rules: it.egress.as_ref().map(Vec::len),
            pods,
            pods_here,
            nodes: None,
            node_here: None,
        }
    });
    let of_nodes = store.node_policies().map(|it| {
        let chosen = store.nodes().filter(|node| it.nodes.matches(&node.labels));
        PolicySummary {
            kind: Kind::NodePolicy,
            name: it.name.to_string(),
            tier: None,
            priority: None,
            ingress_rules: it.ingress.as_ref().map(Vec::len),
            egress_rules: it.egress.as_ref().map(Vec::len),
            pods: 0,
            pods_here: 0,
            nodes: Some(chosen.count()),
            node_here: node.map(|name| it.nodes.matches(&store.node_labels(name))),
        }
    });
    of_cluster.chain(of_namespaces).chain(of_nodes).collect()
}

fn selects(subject: &PodSelector, group: &Group, namespace: &Labels) -> bool {
    let inside = subject.namespaces.as_ref();
    inside.is_none_or(|it| it.matches(namespace)) && subject.pods.matches(&group.labels)
}

/// Pods that no policy can tell apart are counted once.
struct Groups(HashMap<Group, (usize, usize)>);

impl Groups {
    fn of(store: &Store, here: &[&Name]) -> Self {
        let mut groups: HashMap<Group, (usize, usize)> = HashMap::new();
        let is_seen = |it: &&Pod| !it.host_network && !it.ended;
        for pod in store.pods().filter(is_seen) {
            groups.entry(Group::of(pod)).or_default().0 += 1;
        }
        for name in here {
            let group = match store.pod(name) {
                Some(pod) => Group::of(pod),
                None => Group::undescribed(name),
            };
            let (all, local) = groups.entry(group).or_default();
            *local += 1;
            *all = (*all).max(*local);
        }
        Self(groups)
    }

    fn count(&self, store: &Store, wanted: impl Fn(&Group, &Labels) -> bool) -> (usize, usize) {
        let chosen = self
            .0
            .iter()
            .filter(|(group, _)| wanted(group, &store.namespace_labels(&group.namespace)));
        chosen.fold((0, 0), |(all, local), (_, (a, l))| (all + a, local + l))
    }
}

/// All Services that have an address.
pub fn services(now: &Snapshot) -> Vec<ServiceSummary> {
    let links: Vec<&Attached> = now.links.values().collect();
    summaries(&now.store, &now.config, &links)
}

/// The same of a store without a node.
pub fn services_of(store: &Store, config: &Config) -> Vec<ServiceSummary> {
    summaries(store, config, &[])
}

fn summaries(store: &Store, config: &Config, links: &[&Attached]) -> Vec<ServiceSummary> {
    let survey = Survey::new(store, config, links);
    let served = store.services().filter(|it| !it.cluster_ips.is_empty());
    served.map(|it| summary(it, config, &survey)).collect()
}

/// What Services of a store without a node ask for and do not get.
pub fn refused(store: &Store, config: &Config) -> Vec<(Name, Vec<Finding>)> {
    let survey = Survey::new(store, config, &[]);
    let found = store
        .services()
        .map(|it| (it.name.clone(), survey.complaints(it)));
    found.filter(|(_, found)| !found.is_empty()).collect()
}

fn summary(service: &Service, config: &Config, survey: &Survey<'_>) -> ServiceSummary {
    let port = |port: &ServicePort| {
        let chosen = survey.endpoints(service, port);
        let targets = chosen.iter().flat_map(|it| {
            let targets = if it.cluster.is_empty() {
                &it.local
            } else {
                &it.cluster
            };
            targets
                .iter()
                .map(|(address, port)| std::net::SocketAddr::new(*address, *port).to_string())
        });
        PortSummary {
            name: port.name.clone(),
            port: format!("{}/{:?}", port.port, port.protocol).to_uppercase(),
            node_port: port.node_port,
            endpoints: targets.collect(),
            local_ready: chosen
                .iter()
                .map(|it| it.local_ready)
                .max()
                .unwrap_or_default(),
        }
    };
    let balanced = service.load_balancer.iter().map(|it| it.address);
    ServiceSummary {
        name: service.name.to_string(),
        cluster_ips: service.cluster_ips.clone(),
        external_ips: service
            .external_ips
            .iter()
            .copied()
            .chain(balanced)
            .filter(|address| survey.is_used(service, *address))
            .collect(),
        problems: survey
            .complaints(service)
            .into_iter()
            .map(|it| match it.field.as_str() {
                "" => it.reason,
                field => format!("{field}: {}", it.reason),
            })
            .collect(),
        forwarding: match is_direct(service, config) {
            Ok(true) => Forwarding::Dsr,
            _ => Forwarding::Snat,
        },
        ports: service.ports.iter().map(port).collect(),
    }
}

/// Services that ask for what this node cannot do.
pub fn disappointed(store: &Store, config: &Config) -> impl Iterator<Item = Finding> {
    let served = store.services().filter(|it| !it.cluster_ips.is_empty());
    served.filter_map(|service| {
        let reason = is_direct(service, config).err()?;
        Some(Finding {
            file: None,
            line: 0,
            severity: Severity::Warning,
            object: format!("Service {}", service.name),
            field: format!("metadata.annotations[{FORWARDING}]"),
            reason: format!("Clients outside get the node's address, not dsr: {reason}"),
        })
    })
}
