//! Pods that no policy selects, denied everything: a ClusterNetworkPolicy of the node's own, behind all others of the last tier.

use sluice_contract::Protocol;
use sluice_contract::policy::Action;

use crate::object::{
    ClusterPeer, ClusterPolicy, ClusterPort, ClusterRule, Name, PodSelector, PolicyPort, Port,
    Prefix, Selector, Tier,
};

/// What pods may do that no policy selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultDeny {
    /// They may ask the cluster's DNS: pods with the label `k8s-app: kube-dns` in the namespace `kube-system`.
    pub dns: bool,
    /// Where else they may go.
    pub egress: Vec<(Prefix, PolicyPort)>,
}

/// No object can have this name.
const NAME: &str = "policy.default_deny";
/// Behind all that can be written.
const PRIORITY: u16 = 1001;
const DNS_PORT: u16 = 53;

/// The pods that are the cluster's DNS.
pub(super) fn cluster_dns() -> PodSelector {
    PodSelector {
        namespaces: Some(Selector::labelled(
            "kubernetes.io/metadata.name",
            "kube-system",
        )),
        pods: Selector::labelled("k8s-app", "kube-dns"),
    }
}

/// The policy that says so.
pub(super) fn policy(default: &DefaultDeny) -> ClusterPolicy {
    let dns = default.dns.then(|| ClusterRule {
        name: "DNS".into(),
        action: Action::Accept,
        peers: vec![ClusterPeer::Pods(cluster_dns())],
        ports: [Protocol::Udp, Protocol::Tcp]
            .map(|protocol| number(protocol, DNS_PORT))
            .into(),
    });
    let listed = default.egress.iter().map(|(prefix, port)| ClusterRule {
        name: prefix.to_string(),
        action: Action::Accept,
        peers: vec![ClusterPeer::Network(*prefix)],
        ports: vec![ClusterPort::Number(port.clone())],
    });
    let deny = || ClusterRule {
        name: "everything else".into(),
        action: Action::Deny,
        peers: vec![ClusterPeer::Everybody],
        ports: Vec::new(),
    };
    ClusterPolicy {
        name: Name::new("", NAME),
        tier: Tier::Baseline,
        priority: PRIORITY,
        subject: PodSelector {
            namespaces: Some(Selector::default()),
            pods: Selector::default(),
        },
        ingress: vec![deny()],
        egress: dns.into_iter().chain(listed).chain([deny()]).collect(),
    }
}

fn number(protocol: Protocol, port: u16) -> ClusterPort {
    ClusterPort::Number(PolicyPort {
        protocol,
        port: Port::Range(port, port),
    })
}
