//! As whom the server is asked: the name in its logs, and credentials that change.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_model::object::Kind;
use sluice_model::source::kube::Kubernetes;
use sluice_model::store::Store;
use sluice_model::taint::NodeTaint;

use crate::api::Api;
use crate::{Cluster, Follower, PODS, brisk, kubernetes, pod};

const NODES: &str = "/api/v1/nodes";
const KEY: &str = "sluice.dev/agent-not-ready";

/// A server with a pod and a node.
fn server() -> Api {
    let cluster = Cluster::Api(Api::start());
    cluster.put(Kind::Pod, pod("a", "web"));
    cluster.put(Kind::Node, json!({"metadata": {"name": "here"}}));
    let Cluster::Api(api) = cluster else {
        panic!("not an API")
    };
    api
}

fn write_kubeconfig(file: &Path, api: &Api, user: &Value) {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": format!("http://{}", api.address)}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "users": [{"name": "it", "user": user}],
    });
    fs::write(file, config.to_string()).unwrap();
}

/// All watches end, and with the next one the server wants to know who asks.
fn cut(api: &Api, follower: &mut Follower) {
    api.go_away(true);
    follower.until("that it is away", |it| it.lost().is_some());
    api.go_away(false);
}

#[test]
fn a_token_in_a_kubeconfig_is_read_again_after_a_401() {
    let (api, directory) = (server(), tempfile::tempdir().unwrap());
    let file = directory.path().join("kubeconfig");
    api.accept_only("old");
    write_kubeconfig(&file, &api, &json!({"token": "old"}));
    let source = Kubernetes::kubeconfig(&file).with_patience(brisk());
    let mut follower = Follower::of(source);
    follower.until("what was there", Store::is_in_sync);
    let source = Kubernetes::kubeconfig(&file).with_patience(brisk());
    let taint = NodeTaint::start(source, "here", KEY).unwrap();
    taint.want(true);
    let until = |what: &str, holds: &dyn Fn() -> bool| {
        let end = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < end, "{what}: not in time");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    until("the taint", &|| taint.state().tainted == Some(true));

    // For a while the file has what is no longer accepted.
    api.accept_only("new");
    cut(&api, &mut follower);
    follower.until("that it is refused", |it| {
        it.lost().is_some_and(|it| it.contains("401"))
    });
    taint.want(false);
    let is_refused = || taint.state().problem.is_some_and(|it| it.contains("401"));
    until("that the taint is refused", &is_refused);
    assert_eq!(taint.observer().problem(), taint.state().problem);
    write_kubeconfig(&file, &api, &json!({"token": "new"}));
    api.put(PODS, &pod("b", "web"));
    follower.until("the pod", |it| {
        it.lost().is_none() && it.count(Kind::Pod) == 2
    });
    until("no taint", &|| taint.state().tainted == Some(false));
    assert_eq!(taint.observer().problem(), None);
}

#[test]
fn a_token_file_is_read_again_after_a_401_and_not_a_minute_later() {
    let (api, directory) = (server(), tempfile::tempdir().unwrap());
    let file = directory.path().join("kubeconfig");
    let token = directory.path().join("token");
    api.accept_only("old");
    fs::write(&token, "old").unwrap();
    write_kubeconfig(&file, &api, &json!({"tokenFile": token}));
    let source = Kubernetes::kubeconfig(&file).with_patience(brisk());
    let mut follower = Follower::of(source);
    follower.until("what was there", Store::is_in_sync);
    api.accept_only("new");
    fs::write(&token, "new").unwrap();
    let start = Instant::now();
    cut(&api, &mut follower);
    api.put(PODS, &pod("b", "web"));
    follower.until("the pod", |it| it.count(Kind::Pod) == 2);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn requests_name_sluice_as_their_agent_and_as_the_manager_of_what_they_write() {
    let api = server();
    let (source, announcer) = kubernetes(&api).announcing("here");
    let mut follower = Follower::of(source);
    let taint = NodeTaint::start(kubernetes(&api), "here", KEY).unwrap();
    announcer.say([("a".to_owned(), Some("b".to_owned()))].into());
    taint.want(true);
    follower.until("the annotation and the taint", |_| {
        let node = api.object(NODES, "/here");
        node["metadata"]["annotations"]["a"] == "b" && node["spec"]["taints"][0]["key"] == KEY
    });
    let heard = api.heard();
    assert!(heard.iter().all(|it| it.agent.starts_with("sluice/")));
    let mut writes = heard.iter().filter(|it| it.method == "PATCH");
    assert!(writes.clone().count() >= 2);
    assert!(writes.all(|it| it.target.ends_with("?fieldManager=sluice")));
}
