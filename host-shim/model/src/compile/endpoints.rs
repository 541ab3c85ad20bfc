//! Which endpoints of a Service port may be used by whom: the rules of kube-proxy's `CategorizeEndpoints`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::service::Ground;
use crate::object::{AddressFamily, Endpoint, Service, ServicePort, TargetPort, TrafficPolicy};
use crate::store::Store;

/// Where endpoints are looked at from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Here<'a> {
    pub(crate) node: &'a str,
    /// The node's label `topology.kubernetes.io/zone`.
    pub(crate) zone: Option<&'a str>,
}

/// An endpoint's address and port.
pub(crate) type Target = (IpAddr, u16);

/// The endpoints of one port in one family, in order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Categories {
    /// For traffic that may go anywhere.
    pub(crate) cluster: Vec<Target>,
    /// For traffic that has to stay here.
    pub(crate) local: Vec<Target>,
    /// Those that still serve, chosen or not.
    pub(crate) serving: Vec<Target>,
    /// Somebody could serve, here or elsewhere.
    pub(crate) any: bool,
    /// What the health check of the node port counts.
    pub(crate) local_ready: usize,
    /// Nodes with ready endpoints, where clients outside are to stay with a node's own.
    pub(crate) ready_on: BTreeSet<Arc<str>>,
}

/// Endpoints by address and port. One that is in two slices counts as the better of both.
#[derive(Debug, Default)]
pub(crate) struct Endpoints<'a>(BTreeMap<Target, &'a Endpoint>);

impl<'a> Endpoints<'a> {
    pub(crate) fn add(&mut self, endpoint: &'a Endpoint, port: u16) {
        let rank = |it: &Endpoint| (it.ready, it.serving, !it.terminating);
        let there = self.0.entry((endpoint.address, port)).or_insert(endpoint);
        if rank(endpoint) > rank(there) {
            *there = endpoint;
        }
    }

    pub(crate) fn categorize(
        &self,
        service: &Service,
        port: &ServicePort,
        here: Here<'_>,
    ) -> Categories {
        let external = port.node_port.is_some()
            || !service.external_ips.is_empty()
            || !service.load_balancer.is_empty();
        let uses_cluster = service.internal_policy == TrafficPolicy::Cluster || external;
        let uses_local = service.internal_policy == TrafficPolicy::Local
            || (external && service.external_policy == TrafficPolicy::Local);
        let falls_back = |it: &Endpoint| it.serving && it.terminating;
        let is_local = |it: &Endpoint| it.node.as_deref() == Some(here.node);
        let mut found = Categories {
            serving: self.select(|it| it.serving || it.ready),
            any: self.0.values().any(|it| it.ready || falls_back(it)),
            local_ready: self
                .0
                .values()
                .filter(|it| it.ready && is_local(it))
                .count(),
            ..Categories::default()
        };
        if external && service.external_policy == TrafficPolicy::Local {
            let ready = self.0.values().filter(|it| it.ready);
            found.ready_on = ready.filter_map(|it| it.node.clone()).collect();
        }
        if uses_cluster {
            let topology = self.topology(here);
            found.cluster = self.select(|it| it.ready && topology.admits(it, here));
            if found.cluster.is_empty() {
                found.cluster = self.select(falls_back);
            }
        }
        if uses_local {
            found.local = self.select(|it| it.ready && is_local(it));
            if found.local.is_empty() {
                found.local = self.select(|it| falls_back(it) && is_local(it));
            }
        }
        found
    }

    fn select(&self, wanted: impl Fn(&Endpoint) -> bool) -> Vec<Target> {
        let chosen = self.0.iter().filter(|(_, it)| wanted(it));
        chosen.map(|(target, _)| *target).collect()
    }

    /// Hints count only if every ready endpoint has them and one of them is meant for here.
    fn topology(&self, here: Here<'_>) -> Topology {
        let ready = || self.0.values().filter(|it| it.ready);
        let by_node = ready().all(|it| !it.node_hints.is_empty())
            && ready().any(|it| it.node_hints.iter().any(|hint| **hint == *here.node));
        if by_node {
            return Topology::Node;
        }
        let zone = here.zone.unwrap_or_default();
        let by_zone = here.zone.is_some()
            && ready().all(|it| !it.zone_hints.is_empty())
            && ready().any(|it| it.zone_hints.iter().any(|hint| **hint == *zone));
        if by_zone {
            Topology::Zone
        } else {
            Topology::Anywhere
        }
    }
}

#[derive(Clone, Copy)]
enum Topology {
    Anywhere,
    Zone,
    Node,
}

impl Topology {
    fn admits(self, endpoint: &Endpoint, here: Here<'_>) -> bool {
        match self {
            Self::Anywhere => true,
            Self::Zone => endpoint
                .zone_hints
                .iter()
                .any(|it| Some(&**it) == here.zone),
            Self::Node => endpoint.node_hints.iter().any(|it| **it == *here.node),
        }
    }
}

/// A pod as an endpoint, and the number that each of the Service's ports has there.
pub(crate) type Made = (Endpoint, Vec<(String, u16)>);

/// What EndpointSlices do not say of a Service's endpoints.
#[derive(Debug, Default)]
pub(crate) struct ServiceEndpoints {
    /// Pods that are its endpoints where nobody makes slices.
    pub(crate) made: Vec<Made>,
    /// Addresses of nodes that do not count.
    pub(crate) banned: BTreeSet<IpAddr>,
}

/// The endpoints of one port, from EndpointSlices or, where nobody makes those, from pods.
pub(crate) fn collect<'a>(
    service: &Service,
    port: &ServicePort,
    family: AddressFamily,
    store: &'a Store,
    given: &'a ServiceEndpoints,
    endpoints: &mut Endpoints<'a>,
) {
    let is_banned = |it: &Endpoint| given.banned.contains(&it.address);
    for slice in store
        .slices_of(&service.name)
        .filter(|it| it.family == family)
    {
        let of_port = slice.ports.iter();
        let of_port = of_port.filter(|it| it.name == port.name && it.protocol == port.protocol);
        for number in of_port.map(|it| it.port) {
            for endpoint in slice.endpoints.iter().filter(|it| !is_banned(it)) {
                endpoints.add(endpoint, number);
            }
        }
    }
    for (endpoint, ports) in &given.made {
        let number = ports
            .iter()
            .find(|(name, _)| *name == port.name)
            .map(|(_, number)| *number);
        if endpoint.address.is_ipv6() == (family == AddressFamily::V6)
            && !is_banned(endpoint)
            && let Some(number) = number
        {
            endpoints.add(endpoint, number);
        }
    }
}

/// The pods that a Service selects, with the number of each of its ports there.
pub(crate) fn endpoints_of_selector(service: &Service, ground: Ground<'_>) -> Vec<Made> {
    let store = ground.store;
    if !ground.config.endpoints_from_selectors
        || service.selector.is_empty()
        || store.slices_of(&service.name).next().is_some()
    {
        return Vec::new();
    }
    let selected = store.pods_in(&service.name.namespace).filter(|pod| {
        let mut pairs = service.selector.iter();
        !pod.ended && pairs.all(|(key, value)| pod.labels.get(key) == Some(value))
    });
    let mut made = Vec::new();
    for pod in selected {
        let attached = ground.attached.get(&pod.name);
        let addresses = attached.map_or(&pod.addresses, |it| &it.addresses);
        let ports: Vec<(String, u16)> = service
            .ports
            .iter()
            .filter_map(|port| {
                let number = match &port.target {
                    TargetPort::Number(number) => Some(*number),
                    TargetPort::Name(name) => pod
                        .ports
                        .iter()
                        .find(|it| it.name == *name && it.protocol == port.protocol)
                        .map(|it| it.port),
                };
                number.map(|number| (port.name.clone(), number))
            })
            .collect();
        let here = attached.map(|_| ground.config.node.clone());
        for address in addresses {
            let endpoint = Endpoint {
                address: *address,
                ready: (pod.ready && !pod.terminating) || service.publish_not_ready,
                serving: pod.ready || service.publish_not_ready,
                terminating: pod.terminating,
                node: here.clone().or_else(|| pod.node.clone()),
                zone: None,
                zone_hints: Vec::new(),
                node_hints: Vec::new(),
            };
            made.push((endpoint, ports.clone()));
        }
    }
    made
}
