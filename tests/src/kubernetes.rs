//! A server that speaks as the Kubernetes API does, where a node can reach it, with faults on
//! demand.

use crate::lab::Lab;
use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use std::fs::File;

#[path = "../../host-shim/model/tests/sources/api/mod.rs"]
#[expect(
    dead_code,
    clippy::unwrap_used,
    reason = "the sources' tests meet all its faults, and end where their ground is not as they expect"
)]
mod api;

pub const NODES: &str = "/api/v1/nodes";
pub const PODS: &str = "/api/v1/pods";
pub const SERVICES: &str = "/api/v1/services";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";

/// The server; it ends with its owner.
pub struct ApiServer(api::Api);

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ApiServer").field(&self.0.address).finish()
    }
}

impl ApiServer {
    /// Starts it where the lab's daemon lives, and has the daemon follow it with the rights of the
    /// role in `deploy/`.
    ///
    /// # Errors
    /// If the lab's files cannot be written.
    pub fn start(lab: &Lab) -> Result<Self> {
        let host = File::open(lab.host.path()).context("the node's namespace")?;
        let server = std::thread::spawn(move || {
            setns(&host, CloneFlags::CLONE_NEWNET)?;
            anyhow::Ok(api::Api::start())
        });
        let api = server.join().map_err(|_| anyhow::anyhow!("no server"))??;
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/clusterrole.yaml");
        let role: Value = serde_yaml_ng::from_str(&std::fs::read_to_string(file)?)?;
        api.enforce(role["rules"].clone());
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": format!("http://{}", api.address)}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "users": [{"name": "it", "user": {}}],
        });
        let file = lab.run_dir().with_extension("kubeconfig");
        std::fs::write(&file, kubeconfig.to_string())?;
        lab.change_config(|config| {
            config["source"] = json!({"kubernetes": {"kubeconfig": file}});
        })?;
        Ok(Self(api))
    }

    /// Puts an object, or another state of it; watches are told.
    pub fn put(&self, path: &str, object: &Value) {
        self.0.put(path, object);
    }

    /// Deletes `namespace/name`.
    pub fn delete(&self, path: &str, name: &str) {
        self.0.delete(path, name);
    }

    /// `namespace/name` as it is now.
    pub fn object(&self, path: &str, name: &str) -> Value {
        self.0.object(path, name)
    }

    /// These objects are all there is of a kind, and all history is forgotten: watches hear `410
    /// Gone`.
    pub fn rewrite(&self, path: &str, objects: &[Value]) {
        self.0.rewrite(path, objects);
    }

    /// From now on nobody is answered, and watches break off; or all is well again.
    pub fn go_away(&self, away: bool) {
        self.0.go_away(away);
    }

    /// This path is forbidden, or again allowed to clients that have the right.
    pub fn forbid(&self, path: &'static str, forbidden: bool) {
        self.0.forbid(path, forbidden);
    }

    /// The next watch whose address contains `what` breaks off in the middle of its first event.
    pub fn break_off(&self, what: &'static str) {
        self.0.fail(what, api::Fault::HalfEvent);
    }

    /// Faults that nobody has met yet.
    pub fn faults_left(&self) -> usize {
        self.0.faults_left()
    }
}
