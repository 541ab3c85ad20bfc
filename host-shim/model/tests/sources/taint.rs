//! The node's taint: put and taken away beside those of others, whatever the server does.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_model::taint::NodeTaint;

use crate::api::{Api, Fault};
use crate::kubernetes;

const NODES: &str = "/api/v1/nodes";
const KEY: &str = "sluice.dev/agent-not-ready";

fn node(taints: &Value) -> Value {
    json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "here"}, "spec": {"taints": taints}})
}

fn taints(api: &Api) -> Vec<String> {
    let node = api.object(NODES, "/here");
    let all = node["spec"]["taints"].as_array().cloned();
    let text = |it: &Value| {
        format!(
            "{}:{}",
            it["key"].as_str().unwrap(),
            it["effect"].as_str().unwrap()
        )
    };
    all.unwrap_or_default().iter().map(text).collect()
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn p13_the_taint_goes_and_comes_beside_those_of_others() {
    let api = Api::start();
    let registered = json!([
        {"key": "example.org/disk", "effect": "NoExecute"},
        {"key": KEY, "effect": "NoSchedule", "value": "true"},
    ]);
    api.put(NODES, &node(&registered));
    let taint = NodeTaint::start(kubernetes(&api), "here", KEY).unwrap();
    taint.want(false);
    until("without", || taints(&api) == ["example.org/disk:NoExecute"]);
    taint.want(true);
    let both = [
        "example.org/disk:NoExecute",
        "sluice.dev/agent-not-ready:NoSchedule",
    ];
    until("with", || taints(&api) == both);
    until("told", || taint.state().tainted == Some(true));
    // What is as wanted is left alone.
    let asked = api.requests().len();
    taint.want(true);
    until("a look", || api.requests().len() > asked);
    assert_eq!(taints(&api), both);
}

#[test]
fn p13_a_change_of_somebody_else_in_between_is_not_lost() {
    let api = Api::start();
    api.put(NODES, &node(&json!([{"key": KEY, "effect": "NoSchedule"}])));
    // The first look is answered, the change is not: by then the object is another.
    let taint = NodeTaint::start(kubernetes(&api), "here", KEY).unwrap();
    for fault in [
        Fault::Drop,
        Fault::Status(409, ""),
        Fault::Status(403, ""),
        Fault::Status(500, ""),
    ] {
        api.fail("nodes/here", fault);
    }
    taint.want(false);
    let other = json!([{"key": KEY, "effect": "NoSchedule"}, {"key": "example.org/new", "effect": "NoSchedule"}]);
    api.put(NODES, &node(&other));
    until("only the other", || {
        taints(&api) == ["example.org/new:NoSchedule"]
    });
    assert_eq!(api.faults_left(), 0);
    until("no problem", || taint.state().problem.is_none());
}

#[test]
fn p13_a_node_that_is_not_there_is_said_and_waited_for() {
    let api = Api::start();
    let taint = NodeTaint::start(kubernetes(&api), "here", KEY).unwrap();
    taint.want(true);
    until("the problem", || {
        let problem = taint.state().problem;
        problem.is_some_and(|it| it.contains("404"))
    });
    api.put(NODES, &node(&json!([])));
    until("the taint", || {
        taints(&api) == ["sluice.dev/agent-not-ready:NoSchedule"]
    });
}
