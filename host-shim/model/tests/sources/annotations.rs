//! Annotations of this node's object: written once, and kept true whatever others do.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_model::object::Kind;
use sluice_model::source::announce::Announcer;
use sluice_model::store::Store;

use crate::api::{Api, Fault};
use crate::{Cluster, Follower, kubernetes, path};

const NODES: &str = "/api/v1/nodes";
const MAC: &str = "sluice.dev/tunnel-mac";
const VALUE: &str = "02:00:00:00:00:01";

fn node(name: &str, annotations: &Value) -> Value {
    json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": name, "annotations": annotations}})
}

fn written(api: &Api) -> bool {
    api.object(NODES, "/n1")["metadata"]["annotations"][MAC] == VALUE
}

fn writes(api: &Api) -> usize {
    let all = api.requests();
    all.iter().filter(|it| it.contains("/status")).count()
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A node whose object is to have one annotation.
fn announcing(api: &Api) -> (Follower, Announcer) {
    let (source, announcer) = kubernetes(api).announcing("n1");
    announcer.say([(MAC.to_owned(), Some(VALUE.to_owned()))].into());
    (Follower::of(source), announcer)
}

#[test]
fn o03_annotations_that_another_client_removes_are_written_again() {
    let api = Api::start();
    api.put(NODES, &node("n1", &json!({"example.com/rack": "7"})));
    let (_follower, announcer) = announcing(&api);
    until("the annotation", || written(&api));
    for other in [json!({}), json!({MAC: "other"})] {
        api.put(NODES, &node("n1", &other));
        until("the annotation again", || written(&api));
    }
    assert_eq!(announcer.problem(), None);
}

#[test]
fn o03_a_node_object_that_is_made_anew_has_the_annotations_again() {
    let api = Api::start();
    api.put(NODES, &node("n1", &json!({})));
    let (_follower, announcer) = announcing(&api);
    until("the annotation", || written(&api));
    api.delete(NODES, "/n1");
    until("that there is no object", || {
        let problem = announcer.problem();
        problem.is_some_and(|it| it.contains("no Node object n1"))
    });
    api.put(NODES, &node("n1", &json!({})));
    until("the annotation again", || written(&api));
    // Whether it was deleted and made again is in no event if the watch was away meanwhile, only in
    // a list.
    api.rewrite(NODES, &[node("n1", &json!({}))]);
    until("the annotation after a list", || written(&api));
    until("no problem", || announcer.problem().is_none());
}

#[test]
fn o03_annotations_that_cannot_be_written_are_a_problem() {
    let api = Api::start();
    api.put(NODES, &node("n1", &json!({})));
    let (mut follower, announcer) = {
        api.forbid("/api/v1/nodes/n1/status", true);
        announcing(&api)
    };
    until("the problem", || {
        announcer.problem().is_some_and(|it| it.contains("403"))
    });
    // The rest goes on.
    follower.until("what was there", Store::is_in_sync);
    api.forbid("/api/v1/nodes/n1/status", false);
    until("the annotation", || written(&api));
    until("no problem", || announcer.problem().is_none());
}

#[test]
fn o03_another_client_that_writes_other_values_is_not_raced() {
    let api = Api::start();
    api.put(NODES, &node("n1", &json!({})));
    let (_follower, _announcer) = announcing(&api);
    until("the annotation", || written(&api));
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(400) {
        if written(&api) {
            api.put(NODES, &node("n1", &json!({MAC: "other"})));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // From half to all of 40 ms each, after the first few.
    assert!(writes(&api) < 30, "{} writes", writes(&api));
    until("the annotation at the end", || written(&api));
}

#[test]
fn o03_what_a_node_says_of_itself_is_written_once_and_kept_true_through_failures() {
    let api = Api::start();
    let cluster = Cluster::Api(api);
    let (flannels, others) = ("flannel.alpha.coreos.com/backend-type", "example.com/rack");
    cluster.put(
        Kind::Node,
        json!({"metadata": {"name": "n1", "annotations": {flannels: "udp", others: "7"}}}),
    );
    cluster.put(Kind::Node, json!({"metadata": {"name": "n2"}}));
    let Cluster::Api(api) = cluster else {
        panic!("not the API")
    };
    let (source, announcer) = kubernetes(&api).announcing("n1");
    let mut follower = Follower::of(source);
    follower.until("the nodes", |store| store.count(Kind::Node) == 2);
    // Before anything is wanted nothing is written.
    assert!(!api.requests().iter().any(|it| it.contains("/status")));
    let value_of = |store: &Store, name: &str| store.node("n1")?.annotations.get(name).cloned();
    let mac = "sluice.dev/tunnel-mac";
    api.fail("/nodes/n1/status", Fault::Status(503, ""));
    api.fail("/nodes/n1/status", Fault::Drop);
    let wanted = |value: Option<&str>| {
        [
            (flannels.to_owned(), value.map(str::to_owned)),
            (mac.to_owned(), Some("02:00:00:00:00:01".to_owned())),
        ]
    };
    announcer.say(wanted(Some("vxlan")).into());
    announcer.say(wanted(Some("vxlan")).into());
    follower.until("the annotations", |store| {
        value_of(store, flannels).as_deref() == Some("vxlan") && value_of(store, mac).is_some()
    });
    assert_eq!((api.faults_left(), writes(&api)), (0, 3));
    announcer.say(wanted(None).into());
    follower.until("one less", |store| value_of(store, flannels).is_none());
    assert!(value_of(&follower.store, mac).is_some());
    let list = api.object("/api/v1/nodes", "/n1");
    assert_eq!(
        list["metadata"]["annotations"][others], "7",
        "others' are left alone"
    );
    assert_eq!(writes(&api), 4);
    // The announcer may go; the source goes on.
    drop(announcer);
    api.put(
        path(Kind::Node),
        &json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n3"}}),
    );
    follower.until("another node", |store| store.count(Kind::Node) == 3);
}
