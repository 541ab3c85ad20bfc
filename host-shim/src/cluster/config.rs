//! Where the node learns of the cluster, as the operator says it.

use std::net::IpAddr;
use std::num::NonZero;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sluice_contract::Protocol;
use sluice_contract::limits::PREFIXES;
use sluice_contract::overlay::TunnelProtocol;
use sluice_contract::policy::Established as Kept;
use sluice_model::compile::{DefaultDeny, ServiceMatch};
use sluice_model::object::{Forwarding, PolicyPort, Port, Prefix};
use sluice_model::source::kube::Kubernetes;

use crate::uplink::config::{Direct, UplinkConfig, parse_prefix};

/// The source of Pods, Services and policies: exactly one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// A directory of Kubernetes manifests, watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// The Kubernetes API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<KubernetesConfig>,
}

/// How the API server is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// A kubeconfig; unless given, the service account of this pod or the kubeconfig of this user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// Writes into this node's object what flannel and other nodes must know of it (`sluice node`). It takes the right to
    /// patch `nodes/status`.
    pub announce: bool,
    /// The taint of this node that is taken away when it first forwards, and comes back when it does not for ten seconds. Empty:
    /// the Node object is left alone.
    pub taint: String,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            announce: false,
            taint: "sluice.dev/agent-not-ready".into(),
        }
    }
}

impl KubernetesConfig {
    /// The API as a source, or for what else is to be said to it.
    pub(crate) fn api(&self) -> Kubernetes {
        let file = self.kubeconfig.as_ref();
        file.map_or_else(Kubernetes::infer, Kubernetes::kubeconfig)
    }
}

/// Resolvers that an operator may name.
const RESOLVERS: usize = 64;

/// How policy is applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    pub mode: PolicyMode,
    /// The node reaches its own pods whatever policy says: the kubelet's probes.
    pub host_reaches_pods: bool,
    pub established: Established,
    /// Pods that no policy selects are denied everything but this; unless given, they may do everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_deny: Option<DefaultDenyConfig>,
    /// Who is believed about the addresses of domain names, besides the cluster's DNS: addresses of resolvers, or of Services
    /// in front of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resolvers: Vec<IpAddr>,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            mode: PolicyMode::default(),
            host_reaches_pods: true,
            established: Established::default(),
            default_deny: None,
            resolvers: Vec::new(),
        }
    }
}

/// How Services are served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServicesConfig {
    /// How clients outside are led to endpoints on other nodes, where a Service's annotation `sluice.dev/forwarding-mode` does not say.
    pub forwarding: Forwarding,
    /// Ranges in which external and load balancers' addresses of Services may lie. Empty: anywhere but among the cluster's own
    /// addresses. A node's address counts only where it is listed by itself (/32, /128).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub external_addresses: Vec<String>,
    /// Ranges of ClusterIPs. What is sent to an address of them that no Service has is dropped.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cidrs: Vec<String>,
    /// Services (`namespace/name`, or `namespace/*`) that may have addresses of nodes as endpoints although no Pod of their namespace
    /// has them.
    pub node_endpoints: Vec<String>,
}

impl Default for ServicesConfig {
    fn default() -> Self {
        Self {
            forwarding: Forwarding::default(),
            external_addresses: Vec::new(),
            cidrs: Vec::new(),
            node_endpoints: vec!["default/kubernetes".into()],
        }
    }
}

impl ServicesConfig {
    /// Why no client can be answered directly by an endpoint's node, if so.
    pub(crate) fn no_direct_return(uplink: Option<&UplinkConfig>) -> Option<String> {
        let Some(uplink) = uplink else {
            return Some("the node has no uplink".into());
        };
        let protocol = TunnelProtocol::from(uplink.tunnel.protocol);
        if !protocol.tells_backend() {
            let word = protocol.word();
            return Some(format!(
                "a {word} tunnel has no place to name the endpoint; uplink.tunnel.protocol geneve has"
            ));
        }
        if uplink.direct != Direct::Never {
            let reason = "nodes that are reached without a tunnel cannot be told the endpoint; uplink.direct has to be never";
            return Some(reason.into());
        }
        None
    }

    /// # Errors
    /// The field that cannot be, and why.
    pub(crate) fn check(
        &self,
        uplink: Option<&UplinkConfig>,
    ) -> Result<(), (&'static str, String)> {
        let external = ("services.external_addresses", &self.external_addresses);
        for (field, ranges) in [external, ("services.cidrs", &self.cidrs)] {
            if let Some(wrong) = ranges.iter().find(|it| parse_prefix(it).is_none()) {
                let reason = format!("{wrong:?} is no range of addresses, such as 192.0.2.0/24");
                return Err((field, reason));
            }
        }
        if self.cidrs.len() > PREFIXES {
            let reason = format!("names more than {PREFIXES} ranges");
            return Err(("services.cidrs", reason));
        }
        let is_all = |it: &&String| parse_prefix(it).is_some_and(|range| range.length() == 0);
        if let Some(all) = self.cidrs.iter().find(is_all) {
            let reason = format!("{all:?} is every address there is, not a range of ClusterIPs");
            return Err(("services.cidrs", reason));
        }
        let is_wrong = |it: &&String| ServiceMatch::parse(it).is_none();
        if let Some(wrong) = self.node_endpoints.iter().find(is_wrong) {
            let reason = format!("{wrong:?} is no Service, such as monitoring/exporter or ops/*");
            return Err(("services.node_endpoints", reason));
        }
        match Self::no_direct_return(uplink) {
            Some(reason) if self.forwarding == Forwarding::Dsr => Err((
                "services.forwarding",
                format!("dsr cannot be had: {reason}"),
            )),
            _ => Ok(()),
        }
    }
}

/// What becomes of what policy denies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyMode {
    /// It is dropped.
    #[default]
    Enforce,
    /// It passes, and is logged and counted.
    Audit,
}

/// What pods may do that no policy selects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DefaultDenyConfig {
    /// They may ask the cluster's DNS: pods with `k8s-app: kube-dns` in `kube-system`.
    pub dns: bool,
    /// Where else they may go: the API server's own addresses, say.
    pub egress: Vec<EgressException>,
}

impl Default for DefaultDenyConfig {
    fn default() -> Self {
        Self {
            dns: true,
            egress: Vec::new(),
        }
    }
}

/// A place that pods reach by default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressException {
    /// Of addresses as they are behind Services.
    pub cidr: String,
    pub port: NonZero<u16>,
    #[serde(default)]
    pub protocol: PortProtocol,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PortProtocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl From<PortProtocol> for Protocol {
    fn from(protocol: PortProtocol) -> Self {
        match protocol {
            PortProtocol::Tcp => Self::Tcp,
            PortProtocol::Udp => Self::Udp,
            PortProtocol::Sctp => Self::Sctp,
        }
    }
}

impl From<&DefaultDenyConfig> for DefaultDeny {
    fn from(config: &DefaultDenyConfig) -> Self {
        let egress = config.egress.iter().filter_map(|it| {
            let range = parse_prefix(&it.cidr)?;
            let prefix = Prefix::new(range.address(), range.length())?;
            let protocol = it.protocol.into();
            let port = Port::Range(it.port.get(), it.port.get());
            Some((prefix, PolicyPort { protocol, port }))
        });
        Self {
            dns: config.dns,
            egress: egress.collect(),
        }
    }
}

/// What becomes of connections that a change of policy would not let begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Established {
    /// They are judged again with their next packet, and end if they are denied now.
    #[default]
    Judged,
    /// They live on.
    Kept,
}

impl From<Established> for Kept {
    fn from(established: Established) -> Self {
        match established {
            Established::Judged => Self::Judged,
            Established::Kept => Self::Kept,
        }
    }
}

impl PolicyConfig {
    /// What is wrong with it.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if self.resolvers.len() > RESOLVERS {
            let reason = format!("names more than {RESOLVERS} resolvers");
            return Err(("policy.resolvers", reason));
        }
        let listed = self.default_deny.iter().flat_map(|it| &it.egress);
        match listed
            .map(|it| &it.cidr)
            .find(|it| parse_prefix(it).is_none())
        {
            Some(wrong) => Err((
                "policy.default_deny.egress",
                format!("{wrong:?} is no range of addresses, such as 172.16.0.1/32"),
            )),
            None => Ok(()),
        }
    }
}

impl SourceConfig {
    /// What is wrong with it.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        match (&self.directory, &self.kubernetes) {
            (Some(_), None) | (None, Some(_)) => Ok(()),
            (None, None) => Err(("source", "names neither a directory nor kubernetes".into())),
            (Some(_), Some(_)) => Err((
                "source",
                "names a directory and kubernetes: one of them".into(),
            )),
        }
    }
}
