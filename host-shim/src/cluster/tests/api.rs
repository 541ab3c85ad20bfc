//! The Kubernetes API as a source, with the rights of the role in `deploy/`.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use sluice_contract::policy::RulesetId;

use super::{Cluster, Ground};

#[path = "../../../model/tests/sources/api/mod.rs"]
#[expect(dead_code, reason = "the sources' tests meet all its faults")]
mod server;

const NODES: &str = "/api/v1/nodes";
const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";

fn role() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/clusterrole.yaml");
    let text = std::fs::read_to_string(file).unwrap();
    let (mut documents, _) = sluice_model::document::read(&text);
    documents.remove(0).value["rules"].clone()
}

fn policy() -> Value {
    json!({"kind": "NetworkPolicy", "apiVersion": "networking.k8s.io/v1",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}})
}

/// A server with one pod that a policy isolates, which enforces the role.
fn server() -> server::Api {
    let api = server::Api::start();
    api.enforce(role());
    api.put(
        NODES,
        &json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "here"}}),
    );
    let pod = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"containers": [{"name": "c", "image": "i"}]}, "status": {"podIP": "10.0.0.1"}});
    api.put("/api/v1/pods", &pod);
    api.put(POLICIES, &policy());
    api
}

fn follow(name: &str, api: &server::Api) -> Ground {
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": format!("http://{}", api.address)}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "users": [{"name": "it", "user": {}}],
    });
    let directory = super::directory(name);
    std::fs::create_dir_all(&directory).unwrap();
    let file = directory.join("kubeconfig");
    std::fs::write(&file, kubeconfig.to_string()).unwrap();
    let source = json!({"kubernetes": {"kubeconfig": file, "announce": true}});
    Ground::following(name, &source)
}

fn is_isolated(ground: &Ground) -> bool {
    ground
        .binding(16)
        .is_some_and(|[ingress, _]| ingress != RulesetId::NONE)
}

#[test]
fn p07_a_pod_has_no_network_while_the_server_starts_and_its_policy_with_the_first_row() {
    let api = server();
    api.starting(true);
    let mut ground = follow("starting", &api);
    ground.attach("shop/web", 16, 1);
    ground.serve();
    ground.until("the reason", |it| {
        let lost = it.cluster.report().lost;
        lost.is_some_and(|it| it.contains("403"))
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(ground.guest.lock().unwrap().rows.is_empty());
    assert_eq!(Cluster::problems(&ground.cluster.report()).len(), 2);
    api.starting(false);
    ground.until("the pod's link", |it| it.binding(16).is_some());
    assert!(is_isolated(&ground));
    assert_eq!(Cluster::problems(&ground.cluster.report()), [""; 0]);

    // A server that hangs and starts anew takes nothing away.
    api.hang(true);
    std::thread::sleep(Duration::from_millis(300));
    api.go_away(true);
    api.hang(false);
    ground.until("the reason", |it| it.cluster.report().lost.is_some());
    api.starting(true);
    api.go_away(false);
    std::thread::sleep(Duration::from_secs(1));
    assert!(is_isolated(&ground));
    api.delete(POLICIES, "shop/web");
    api.starting(false);
    ground.until("what was missed", |it| {
        it.binding(16) == Some([RulesetId::NONE; 2]) && it.cluster.report().lost.is_none()
    });
}

#[test]
fn o03_annotations_that_are_not_written_are_a_problem_in_the_status() {
    let api = server();
    api.forbid("/api/v1/nodes/here/status", true);
    let ground = follow("annotations", &api);
    let announcer = ground.cluster.announcer().unwrap();
    announcer.say([("a".to_owned(), Some("b".to_owned()))].into());
    let problems = |it: &Ground| Cluster::problems(&it.cluster.report());
    ground.until("the problem", |it| {
        problems(it).iter().any(|it| {
            it.contains("annotations of the Node object are not written") && it.contains("403")
        })
    });
    api.forbid("/api/v1/nodes/here/status", false);
    ground.until("no problem", |it| problems(it).is_empty());
    let node = api.object(NODES, "/here");
    assert_eq!(node["metadata"]["annotations"]["a"], "b");
}
