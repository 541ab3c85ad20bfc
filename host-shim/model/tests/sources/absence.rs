//! Kinds that the server does not have, or that the node may not read: when that means that there
//! are no such objects.

use std::time::Duration;

use serde_json::{Value, json};
use sluice_model::object::Kind;
use sluice_model::source::kube::Patience;
use sluice_model::store::{Event, Store};

use crate::api::{Api, Fault};
use crate::{
    CLUSTER_POLICIES, Cluster, Follower, NODE_POLICIES, POLICIES, brisk, follow_with, pod, policy,
};

fn guard() -> Value {
    json!({"kind": "NodePolicy", "apiVersion": "sluice.dev/v1alpha1",
        "metadata": {"name": "guard"}, "spec": {"nodeSelector": {}}})
}

fn has_guard(store: &Store) -> bool {
    store.count(Kind::NodePolicy) == 1
}

fn is_forbidden(store: &Store, plural: &str) -> bool {
    store
        .findings()
        .any(|it| it.reason.contains("forbids") && it.reason.contains(plural))
}

/// A server with one pod and one NodePolicy.
fn guarded() -> Api {
    let cluster = Cluster::Api(Api::start());
    cluster.put(Kind::Pod, pod("a", "web"));
    cluster.put(Kind::NodePolicy, guard());
    let Cluster::Api(api) = cluster else {
        panic!("not an API")
    };
    api
}

/// One that believes a 403 only after a minute.
fn patient(api: &Api) -> Follower {
    let patience = Patience {
        lasting: Duration::from_secs(60),
        ..brisk()
    };
    follow_with(api, patience)
}

#[test]
fn n21_a_server_that_starts_with_403_for_every_client_is_not_believed() {
    let api = guarded();
    api.starting(true);
    let mut follower = patient(&api);
    follower.until("that it is lost", |it| it.lost().is_some());
    let asked = |api: &Api| {
        let all = api.requests();
        all.iter()
            .filter(|it| it.starts_with(NODE_POLICIES))
            .count()
    };
    while asked(&api) < 4 {
        std::thread::sleep(Duration::from_millis(1));
    }
    follower.hear(Duration::from_millis(50));
    assert_eq!(follower.lists(Kind::NodePolicy), 0);
    api.starting(false);
    follower.until("what was there", Store::is_in_sync);
    assert!(has_guard(&follower.store), "in sync, and no policy yet");
    assert!(!is_forbidden(&follower.store, "nodepolicies"));
}

#[test]
fn n21_the_node_is_not_in_sync_while_only_node_policies_are_forbidden() {
    let api = guarded();
    api.forbid(NODE_POLICIES, true);
    let mut follower = patient(&api);
    follower.until("the pods", |it| {
        it.count(Kind::Pod) == 1 && it.lost().is_some_and(|it| it.contains("nodepolicies"))
    });
    assert!(!follower.store.is_in_sync());
    api.forbid(NODE_POLICIES, false);
    follower.until("what was there", Store::is_in_sync);
    assert!(has_guard(&follower.store));
}

#[test]
fn n21_a_node_that_may_not_read_node_policies_goes_on_and_says_so() {
    let api = guarded();
    api.forbid(NODE_POLICIES, true);
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", |it| {
        it.is_in_sync() && is_forbidden(it, "nodepolicies")
    });
    assert_eq!(follower.store.lost(), None);
    // The right is given: it is read, and nothing is wrong.
    api.forbid(NODE_POLICIES, false);
    follower.until("the policy", |it| {
        has_guard(it) && !is_forbidden(it, "nodepolicies")
    });
    // What was read once stays however long the right is taken away for, though the list is of no
    // use.
    api.forbid(NODE_POLICIES, true);
    api.rewrite(NODE_POLICIES, &[guard()]);
    follower.until("that it is lost", |it| it.lost().is_some());
    follower.hear(4 * brisk().lasting);
    assert!(has_guard(&follower.store) && follower.store.lost().is_some());
    api.forbid(NODE_POLICIES, false);
    follower.until("that it is not", |it| it.lost().is_none());
    assert!(has_guard(&follower.store));
}

#[test]
fn n11_without_the_definition_and_without_the_right_cluster_policies_are_none() {
    // Authorization comes before routing, so the answer is 403 and not 404.
    let api = guarded();
    api.lacks(CLUSTER_POLICIES);
    api.forbid(CLUSTER_POLICIES, true);
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", |it| {
        it.is_in_sync() && is_forbidden(it, "clusternetworkpolicies")
    });
    assert_eq!(follower.store.lost(), None);
    // With the right it is known that the kind is not there, and nothing is wrong.
    api.forbid(CLUSTER_POLICIES, false);
    follower.until("no finding", |it| it.findings().count() == 0);
    assert_eq!(follower.store.lost(), None);
}

#[test]
fn a_kind_that_the_server_does_not_have_is_empty_until_it_has_it() {
    let api = guarded();
    api.lacks(CLUSTER_POLICIES);
    api.lacks(NODE_POLICIES);
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", Store::is_in_sync);
    assert_eq!(follower.store.lost(), None);
    // It is asked for again and again, and that is all: there is no event.
    let heard = follower.hear(10 * brisk().missing);
    assert_eq!(heard, 0);
    api.appears(NODE_POLICIES);
    follower.until("the policy", has_guard);
    assert!(Patience::default().missing <= Duration::from_secs(10));
}

#[test]
fn a_404_must_last_before_objects_that_were_read_are_gone() {
    let api = guarded();
    let mut follower = patient(&api);
    follower.until("what was there", |it| it.is_in_sync() && has_guard(it));
    for _ in 0..3 {
        api.fail(NODE_POLICIES, Fault::Status(404, ""));
    }
    api.rewrite(NODE_POLICIES, &[guard()]);
    follower.until("that it is lost", |it| it.lost().is_some());
    follower.until("that it is not", |it| it.lost().is_none());
    assert_eq!(api.faults_left(), 0);
    let emptied = |it: &Event| matches!(it, Event::Listed { kind: Kind::NodePolicy, objects, .. } if objects.is_empty());
    assert!(!follower.seen.iter().any(emptied));
    // A definition that is deleted takes its objects with it.
    drop(follower);
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", |it| it.is_in_sync() && has_guard(it));
    api.lacks(NODE_POLICIES);
    api.rewrite(NODE_POLICIES, &[guard()]);
    follower.until("that they are gone", |it| !has_guard(it));
    follower.until("that nothing is lost", |it| it.lost().is_none());
}

#[test]
fn neither_404_nor_403_empties_a_kind_that_every_server_has() {
    let api = guarded();
    api.put(POLICIES, &policy("p", 80));
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", Store::is_in_sync);
    for forbidden in [false, true] {
        if forbidden {
            api.forbid(POLICIES, true);
        } else {
            api.lacks(POLICIES);
        }
        api.rewrite(POLICIES, &[policy("p", 80)]);
        follower.until("that it is lost", |it| {
            it.lost().is_some_and(|it| it.contains("networkpolicies"))
        });
        follower.hear(4 * brisk().lasting);
        assert_eq!(follower.store.count(Kind::NetworkPolicy), 1);
        let right = follower
            .store
            .lost()
            .unwrap()
            .contains("needs list and watch");
        assert_eq!(right, forbidden);
        api.forbid(POLICIES, false);
        api.appears(POLICIES);
        follower.until("that it is not", |it| it.lost().is_none());
    }
}
