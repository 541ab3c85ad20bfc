//! Which endpoints of a Service port may be used by whom: the rules of kube-proxy's `CategorizeEndpoints`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::object::{Endpoint, Service, ServicePort, TrafficPolicy};

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
