//! ClusterNetworkPolicy as it stands in a manifest: `policy.networking.k8s.io/v1alpha2`, a type that the API crates do not have.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ClusterNetworkPolicy {
    #[serde(rename = "apiVersion", default)]
    _api_version: Option<String>,
    #[serde(rename = "kind", default)]
    _kind: Option<String>,
    pub(super) metadata: ObjectMeta,
    pub(super) spec: Spec,
    #[serde(rename = "status", default)]
    _status: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    pub(super) tier: String,
    pub(super) priority: i32,
    pub(super) subject: Subject,
    #[serde(default)]
    pub(super) ingress: Vec<Rule>,
    #[serde(default)]
    pub(super) egress: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Subject {
    pub(super) namespaces: Option<LabelSelector>,
    pub(super) pods: Option<NamespacedPod>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NamespacedPod {
    #[serde(default)]
    pub(super) namespace_selector: LabelSelector,
    pub(super) pod_selector: LabelSelector,
}

/// Of either direction: a rule has `from` or `to`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rule {
    #[serde(default)]
    pub(super) name: String,
    pub(super) action: String,
    pub(super) from: Option<Vec<Peer>>,
    pub(super) to: Option<Vec<Peer>>,
    pub(super) protocols: Option<Vec<Protocol>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub(super) struct Peer {
    pub(super) namespaces: Option<LabelSelector>,
    pub(super) pods: Option<NamespacedPod>,
    pub(super) nodes: Option<LabelSelector>,
    pub(super) networks: Option<Vec<String>>,
    pub(super) domain_names: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Protocol {
    pub(super) tcp: Option<Ports>,
    pub(super) udp: Option<Ports>,
    pub(super) sctp: Option<Ports>,
    pub(super) destination_named_port: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ports {
    pub(super) destination_port: Option<Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Port {
    pub(super) number: Option<i32>,
    pub(super) range: Option<Range>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Range {
    pub(super) start: i32,
    pub(super) end: i32,
}
