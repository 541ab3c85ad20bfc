//! The role in `deploy/`: a node needs all of it, and nothing else.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use sluice_model::document;
use sluice_model::object::Kind;
use sluice_model::source::kube::{Kubernetes, Patience};
use sluice_model::taint::NodeTaint;

use crate::api::{Api, Right};
use crate::outage::one_of_each;
use crate::{Cluster, Follower, brisk, kubernetes};

const NODES: &str = "/api/v1/nodes";
const POLICY: (&str, &str) = ("/apis/sluice.dev/v1alpha1/nodepolicies", "/new");
const KEY: &str = "sluice.dev/agent-not-ready";

fn role() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/clusterrole.yaml");
    let (mut documents, error) = document::read(&fs::read_to_string(file).unwrap());
    assert!(error.is_none() && documents.len() == 1);
    let role = documents.remove(0).value;
    assert_eq!(role["kind"], "ClusterRole");
    role["rules"].clone()
}

#[test]
fn a_node_follows_and_writes_everything_with_the_rights_of_its_role_and_needs_them_all() {
    let cluster = Cluster::Api(Api::start());
    for (kind, mut object) in one_of_each() {
        object["metadata"]["generation"] = json!(1);
        cluster.put(kind, object);
    }
    let Cluster::Api(api) = cluster else {
        panic!("not an API")
    };
    api.enforce(role());
    // It does what servers do: first it forbids everything, and later it hangs.
    api.starting(true);
    let patience = Patience {
        lasting: Duration::from_secs(60),
        ..brisk()
    };
    let source = || -> Kubernetes { kubernetes(&api).with_patience(patience) };
    let (following, announcer) = source().announcing("new");
    announcer.say([("a".to_owned(), Some("b".to_owned()))].into());
    let taint = NodeTaint::start(source(), "new", KEY).unwrap();
    taint.want(true);
    let mut follower = Follower::of(following);
    follower.until("that it is lost", |it| it.lost().is_some());
    follower.hear(Duration::from_millis(100));
    assert!(!follower.store.is_in_sync());
    api.starting(false);
    follower.until("everything", |it| {
        it.is_in_sync() && Kind::ALL.iter().all(|kind| it.count(*kind) == 1)
    });
    let is_written = || {
        let node = api.object(NODES, "/new");
        let policy = api.object(POLICY.0, POLICY.1);
        node["metadata"]["annotations"]["a"] == "b"
            && node["spec"]["taints"][0]["key"] == KEY
            && policy["status"]["conditions"][0]["status"] == "True"
    };
    while !is_written() {
        follower.hear(Duration::from_millis(5));
    }
    api.hang(true);
    api.put(
        NODES,
        &json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "other"}}),
    );
    follower.hear(Duration::from_millis(100));
    assert_eq!(follower.store.count(Kind::Node), 1);
    api.hang(false);
    follower.until("the other node", |it| it.count(Kind::Node) == 2);
    assert_eq!(follower.store.findings().count(), 0);

    let (used, denied) = api.rights();
    let granted: std::collections::BTreeSet<_> = Right::all(&role()).into_iter().collect();
    assert_eq!(used, granted);
    // Kinds that are only looked for where that is allowed.
    let older = |it: &Right| it.verb == "list" && it.resource.ends_with("adminnetworkpolicies");
    assert!(denied.iter().all(older), "{denied:?}");
}
