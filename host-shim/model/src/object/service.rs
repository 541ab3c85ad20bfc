//! Services and EndpointSlices, defaults filled in.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sluice_contract::Protocol;

use super::{Name, Prefix};

/// A Service that has something to serve: not headless, not an ExternalName, not another proxy's. Those that have not
/// are kept with no addresses and no ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: Name,
    pub age: Age,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    pub load_balancer: Vec<LoadBalancerAddress>,
    /// Who may use the load balancer's addresses; empty: everybody.
    pub source_ranges: Vec<Prefix>,
    pub ports: Vec<ServicePort>,
    pub affinity: Affinity,
    pub external_policy: TrafficPolicy,
    pub internal_policy: TrafficPolicy,
    /// The annotation [`FORWARDING`], if it says something that is known.
    pub forwarding: Option<Forwarding>,
    pub health_check_port: Option<u16>,
    /// Pods with these labels are its endpoints, where nobody makes EndpointSlices. Empty: none.
    pub selector: BTreeMap<String, String>,
    pub publish_not_ready: bool,
}

/// How old an object is, the oldest first. Objects of an API server have both; of manifests in a directory nothing is known,
/// and they come last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Age {
    /// Seconds since 1970.
    pub created: Option<i64>,
    pub uid: Option<Arc<str>>,
}

impl Ord for Age {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |it: &Self| (it.created.is_none(), it.created, it.uid.is_none());
        (key(self).cmp(&key(other))).then_with(|| self.uid.cmp(&other.uid))
    }
}

impl PartialOrd for Age {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// An address that a load balancer sends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadBalancerAddress {
    pub address: IpAddr,
    /// `ipMode: Proxy`: the load balancer wants to see the traffic itself, so it is not short-circuited.
    pub proxied: bool,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty for the only port of a Service.
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    pub target: TargetPort,
    pub node_port: Option<u16>,
}

/// Where the endpoints listen; only asked where nobody makes EndpointSlices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    Name(String),
}

/// Whether clients stay with their endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    None,
    ClientIp(Duration),
}

/// Which endpoints may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TrafficPolicy {
    Cluster,
    Local,
}

/// The annotation of Services that says how clients outside are led to endpoints on other nodes.
pub const FORWARDING: &str = "sluice.dev/forwarding-mode";

/// How clients outside are led to endpoints on other nodes, where `externalTrafficPolicy` is `Cluster`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Forwarding {
    /// With the address of the node that was asked, which gets the answers.
    #[default]
    Snat,
    /// With their own: the endpoint's node answers them itself (direct server return).
    Dsr,
}

impl Forwarding {
    /// The name that people use.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Snat => "snat",
            Self::Dsr => "dsr",
        }
    }
}

/// Some endpoints of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    pub name: Name,
    /// Of the same namespace. `None`: nobody's.
    pub service: Option<Arc<str>>,
    pub family: AddressFamily,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
}

/// What the addresses of a slice are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressFamily {
    V4,
    V6,
}

/// A port of all endpoints of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    /// Clients in which zones and on which nodes should prefer it.
    pub zone_hints: Vec<Arc<str>>,
    pub node_hints: Vec<Arc<str>>,
}
