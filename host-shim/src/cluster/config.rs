//! Where the node learns of the cluster, as the operator says it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sluice_contract::policy::Established as Kept;

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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// A kubeconfig; unless given, the service account of this pod or the kubeconfig of this user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
}

/// How policy is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    /// The node reaches its own pods whatever policy says: the kubelet's probes.
    pub host_reaches_pods: bool,
    pub established: Established,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            host_reaches_pods: true,
            established: Established::default(),
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
