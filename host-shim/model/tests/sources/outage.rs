//! A server that is away, hangs, or asks to be left alone.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_model::object::Kind;
use sluice_model::source::kube::Patience;
use sluice_model::store::{Event, Store};

use crate::api::{Api, Fault};
use crate::{Cluster, Follower, NODE_POLICIES, PODS, brisk, follow_with, pod, policy};

/// As long as it takes at most until a server that was away for some seconds is followed again.
const RETURN: Duration = Duration::from_secs(2);

/// A server with some objects, followed as a node does.
fn followed(patience: Patience) -> (Cluster, Follower) {
    let cluster = Cluster::Api(Api::start());
    cluster.put(Kind::Pod, pod("a", "web"));
    let mut follower = follow_with(api(&cluster), patience);
    follower.until("what was there", Store::is_in_sync);
    (cluster, follower)
}

fn api(cluster: &Cluster) -> &Api {
    let Cluster::Api(api) = cluster else {
        panic!("not an API")
    };
    api
}

/// One object of each kind.
pub(crate) fn one_of_each() -> [(Kind, Value); 8] {
    let named = |name: &str| json!({"metadata": {"name": name}});
    let service = json!({"metadata": {"name": "s", "namespace": "x"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}});
    let slice = json!({"metadata": {"name": "s-1", "namespace": "x", "labels": {"kubernetes.io/service-name": "s"}},
        "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.0.1"]}]});
    let subject = json!({"namespaces": {}});
    [
        (Kind::Namespace, named("new")),
        (Kind::Node, named("new")),
        (Kind::Pod, pod("new", "web")),
        (Kind::Service, service),
        (Kind::EndpointSlice, slice),
        (Kind::NetworkPolicy, policy("new", 80)),
        (
            Kind::ClusterNetworkPolicy,
            json!({"metadata": {"name": "new"}, "spec": {"tier": "Admin", "priority": 1, "subject": subject}}),
        ),
        (
            Kind::NodePolicy,
            json!({"metadata": {"name": "new"}, "spec": {"nodeSelector": {}}}),
        ),
    ]
}

/// Everything that came to be meanwhile is known in time.
#[track_caller]
fn catches_up(follower: &mut Follower) {
    let start = Instant::now();
    follower.until("everything", |it| {
        let counts = Kind::ALL.map(|kind| it.count(kind));
        it.lost().is_none() && counts == [1, 1, 2, 1, 1, 1, 1, 1]
    });
    println!("after {:?}", start.elapsed());
    assert!(start.elapsed() < RETURN, "after {:?}", start.elapsed());
}

#[test]
fn p07_after_eight_seconds_without_a_server_every_kind_is_followed_within_two() {
    let (cluster, mut follower) = followed(Patience::default());
    api(&cluster).go_away(true);
    follower.until("that it is away", |it| it.lost().is_some());
    std::thread::sleep(Duration::from_secs(8));
    for (kind, object) in one_of_each() {
        cluster.put(kind, object);
    }
    let knocks = api(&cluster).knocks();
    assert!((4..=32).contains(&knocks), "{knocks} attempts in 8 s");
    api(&cluster).go_away(false);
    catches_up(&mut follower);
}

#[test]
fn p07_after_a_server_has_hung_for_eight_seconds_every_kind_is_followed_within_two() {
    let (cluster, mut follower) = followed(Patience {
        answer: Duration::from_secs(4),
        ..Patience::default()
    });
    // The watches break, and new ones have no answer.
    api(&cluster).go_away(true);
    follower.until("that it is away", |it| it.lost().is_some());
    api(&cluster).hang(true);
    api(&cluster).go_away(false);
    std::thread::sleep(Duration::from_secs(8));
    for (kind, object) in one_of_each() {
        cluster.put(kind, object);
    }
    api(&cluster).hang(false);
    catches_up(&mut follower);
}

#[test]
fn a_pause_that_the_server_asks_for_is_kept_whatever_others_find() {
    for code in [429, 503] {
        let cluster = Cluster::Api(Api::start());
        cluster.put(Kind::Pod, pod("a", "web"));
        let api = api(&cluster);
        api.fail("/pods?", Fault::Status(code, "Retry-After: 1\r\n"));
        let mut follower = follow_with(api, brisk());
        follower.until("what was there", Store::is_in_sync);
        let heard = api.heard();
        let mut pods = heard.iter().filter(|it| it.target.starts_with(PODS));
        let (first, second) = (pods.next().unwrap().at, pods.next().unwrap().at);
        assert!(second - first >= Duration::from_secs(1), "{code}");
        // The other kinds were read meanwhile.
        let others = heard.iter().filter(|it| it.at < second).count();
        assert!(others > 7, "{code}: {others}");
    }
}

#[test]
fn one_kind_that_fails_for_good_is_said_once_and_holds_up_no_other() {
    let (cluster, mut follower) = followed(brisk());
    let api = api(&cluster);
    for _ in 0..10_000 {
        api.fail(NODE_POLICIES, Fault::Status(503, ""));
    }
    api.rewrite(NODE_POLICIES, &[]);
    follower.until("that it is lost", |it| it.lost().is_some());
    follower.seen.clear();
    follower.hear(10 * brisk().most);
    let lost = |it: &Event| matches!(it, Event::Lost { .. });
    assert!(!follower.seen.iter().any(lost), "the same reason again");
    cluster.put(Kind::Pod, pod("b", "web"));
    follower.until("the pod", |it| it.count(Kind::Pod) == 2);
    assert!(follower.store.lost().unwrap().contains("nodepolicies"));
}
