//! NodePolicies (`sluice.dev/v1alpha1`): what the node itself may be asked, and may ask. Peers and ports are NetworkPolicy's, but
//! nothing goes by the policy's own namespace, for it lies in none, nor by names of the node's ports, for it has none.

use k8s_openapi::api::networking::v1::{
    NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize;
use serde_json::Value;

use super::Check;
use crate::object::{Name, NodePolicy};

/// As it stands in a manifest.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    #[serde(rename = "apiVersion", default)]
    _api_version: Option<String>,
    #[serde(rename = "kind", default)]
    _kind: Option<String>,
    metadata: ObjectMeta,
    spec: Spec,
    #[serde(rename = "status", default)]
    _status: Value,
}

/// The selector has to be there: a misspelt one would select every node.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    node_selector: LabelSelector,
    policy_types: Option<Vec<String>>,
    ingress: Option<Vec<NetworkPolicyIngressRule>>,
    egress: Option<Vec<NetworkPolicyEgressRule>>,
}

impl Check<'_> {
    pub(super) fn node_policy(&mut self, name: &Name, policy: Manifest) -> NodePolicy {
        let spec = policy.spec;
        let _ = self.labels(&policy.metadata); // Checked; nobody selects policies.
        let nodes = self.selector("spec.nodeSelector", spec.node_selector);
        for (index, rule) in spec.ingress.iter().flatten().enumerate() {
            let field = format!("spec.ingress[{index}]");
            self.without_namespace(&format!("{field}.from"), rule.from.as_deref());
            for (number, it) in rule.ports.iter().flatten().enumerate() {
                if let Some(IntOrString::String(_)) = &it.port {
                    let field = format!("{field}.ports[{number}].port");
                    self.error(field, "A node has no named ports");
                }
            }
        }
        for (index, rule) in spec.egress.iter().flatten().enumerate() {
            self.without_namespace(&format!("spec.egress[{index}].to"), rule.to.as_deref());
        }
        let (ingress, egress) =
            self.directions(spec.policy_types.as_deref(), spec.ingress, spec.egress);
        NodePolicy {
            name: name.clone(),
            nodes,
            ingress,
            egress,
        }
    }

    fn without_namespace(&mut self, field: &str, peers: Option<&[NetworkPolicyPeer]>) {
        for (index, it) in peers.into_iter().flatten().enumerate() {
            if it.pod_selector.is_some() && it.namespace_selector.is_none() {
                let reason = "podSelector needs namespaceSelector beside it ({}: every namespace), for the policy lies in none";
                self.error(format!("{field}[{index}]"), reason);
            }
        }
    }
}
