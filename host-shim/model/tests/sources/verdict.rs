//! The condition that nodes write into the status of NodePolicies.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_model::object::Kind;
use sluice_model::source::kube::Patience;
use sluice_model::store::Store;

use crate::api::{Api, Fault};
use crate::{NODE_POLICIES, brisk, follow_with};

fn guard(generation: u32, ports: &Value, status: &Value) -> Value {
    json!({"kind": "NodePolicy", "apiVersion": "sluice.dev/v1alpha1",
        "metadata": {"name": "guard", "generation": generation},
        "spec": {"nodeSelector": {}, "ingress": [{"ports": ports}]}, "status": status})
}

fn good() -> Value {
    json!([{"port": 80}])
}

fn bad() -> Value {
    json!([{"port": "http"}])
}

/// The status and generation of the condition, once it is there.
fn accepted(api: &Api) -> Option<(String, i64)> {
    let object = api.object(NODE_POLICIES, "/guard");
    let all = object["status"]["conditions"].as_array()?;
    let ours = all.iter().find(|it| it["type"] == "Accepted")?;
    let status = ours["status"].as_str()?.to_owned();
    Some((status, ours["observedGeneration"].as_i64()?))
}

#[track_caller]
fn until(api: &Api, status: &str, generation: i64) {
    let end = Instant::now() + Duration::from_secs(20);
    while accepted(api) != Some((status.to_owned(), generation)) {
        assert!(Instant::now() < end, "{:?}", accepted(api));
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn writes(api: &Api) -> usize {
    let all = api.heard();
    all.iter().filter(|it| it.method == "PATCH").count()
}

#[test]
fn n21_the_status_says_whether_nodes_accept_a_policy_and_why_not() {
    let api = Api::start();
    let others = json!({"conditions": [{"type": "Example", "status": "True"}]});
    api.put(NODE_POLICIES, &guard(1, &good(), &others));
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", Store::is_in_sync);
    until(&api, "True", 1);
    let status = api.object(NODE_POLICIES, "/guard")["status"].clone();
    assert_eq!(status["conditions"][0]["type"], "Example", "others' stay");
    api.put(NODE_POLICIES, &guard(2, &bad(), &status));
    until(&api, "False", 2);
    let status = api.object(NODE_POLICIES, "/guard")["status"].clone();
    let condition = &status["conditions"][1];
    assert_eq!(condition["reason"], "Invalid");
    let message = condition["message"].as_str().unwrap();
    assert!(
        message.contains("spec.ingress[0].ports[0].port"),
        "{message}"
    );
    let since = condition["lastTransitionTime"].as_str().unwrap();
    assert!(since.len() == 20 && since.ends_with('Z'), "{since}");
    // What was in force stays so.
    assert_eq!(follower.store.count(Kind::NodePolicy), 1);
    api.put(NODE_POLICIES, &guard(3, &good(), &status));
    until(&api, "True", 3);
}

#[test]
fn n21_many_nodes_write_a_condition_about_once() {
    let api = Api::start();
    api.put(NODE_POLICIES, &guard(1, &good(), &json!({})));
    // Their writes are spread over a second: far longer than the first one takes to reach the others.
    let slow = || Patience {
        most: Duration::from_secs(1),
        ..brisk()
    };
    let mut followers: Vec<_> = (0..10).map(|_| follow_with(&api, slow())).collect();
    for follower in &mut followers {
        follower.until("what was there", Store::is_in_sync);
    }
    until(&api, "True", 1);
    for follower in &mut followers {
        follower.hear(Duration::from_millis(20));
    }
    let first = writes(&api);
    assert!(first < 10, "{first} writes of 10 nodes");
    // A node that comes later, or a change of something else, costs no write.
    let mut late = follow_with(&api, brisk());
    late.until("what was there", Store::is_in_sync);
    late.hear(Duration::from_millis(100));
    assert_eq!(writes(&api), first);
}

#[test]
fn n21_a_refusal_is_written_over_an_acceptance_and_not_the_other_way_round() {
    for (ports, stands, ends) in [(bad(), "True", "False"), (good(), "False", "False")] {
        let api = Api::start();
        let condition = json!({"type": "Accepted", "status": stands, "observedGeneration": 1});
        api.put(
            NODE_POLICIES,
            &guard(1, &ports, &json!({"conditions": [condition]})),
        );
        let mut follower = follow_with(&api, brisk());
        follower.until("what was there", Store::is_in_sync);
        until(&api, ends, 1);
        follower.hear(Duration::from_millis(100));
        assert_eq!(writes(&api), usize::from(stands != ends));
    }
}

#[test]
fn n21_a_status_that_cannot_be_written_is_left_alone() {
    for code in [403, 404] {
        let api = Api::start();
        api.put(NODE_POLICIES, &guard(1, &good(), &json!({})));
        api.fail("/guard/status", Fault::Status(code, ""));
        let mut follower = follow_with(&api, brisk());
        follower.until("what was there", Store::is_in_sync);
        while writes(&api) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        api.put(NODE_POLICIES, &guard(2, &good(), &json!({})));
        follower.hear(Duration::from_millis(200));
        assert_eq!(writes(&api), 1);
        assert_eq!(
            (follower.store.findings().count(), follower.store.lost()),
            (0, None)
        );
    }
}
