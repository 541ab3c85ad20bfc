//! Both sources tell the same stories: a directory of manifests and the Kubernetes API. And what only the API can do wrong.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its ground is not as it expects"
)]

mod absence;
mod annotations;
mod api;
mod credentials;
mod outage;
mod rights;
mod taint;
mod unfollowed;
mod verdict;

use std::fs;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_model::compile::{Config, Model};
use sluice_model::object::{Kind, Name};
use sluice_model::source::dir::Directory;
use sluice_model::source::kube::{Kubernetes, Patience};
use sluice_model::source::{Running, Source};
use sluice_model::store::{Event, Store};

use crate::api::{Api, Fault};

/// A place in which objects can be put, and that a source watches.
enum Cluster {
    Directory(tempfile::TempDir),
    Api(Api),
}

impl Cluster {
    fn both() -> [Self; 2] {
        [
            Self::Directory(tempfile::tempdir().unwrap()),
            Self::Api(Api::start()),
        ]
    }

    fn put(&self, kind: Kind, mut object: Value) {
        object["kind"] = json!(kind.name());
        object["apiVersion"] = json!(kind.api_version());
        match self {
            Self::Directory(directory) => {
                let file = directory.path().join(file(kind, &object));
                let temporary = directory.path().join(".tmp");
                fs::write(&temporary, object.to_string()).unwrap();
                fs::rename(temporary, file).unwrap();
            }
            Self::Api(api) => api.put(path(kind), &object),
        }
    }

    fn delete(&self, kind: Kind, object: &Value) {
        match self {
            Self::Directory(directory) => {
                fs::remove_file(directory.path().join(file(kind, object))).unwrap();
            }
            Self::Api(api) => {
                let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
                api.delete(
                    path(kind),
                    &format!(
                        "{namespace}/{}",
                        object["metadata"]["name"].as_str().unwrap()
                    ),
                );
            }
        }
    }

    fn follow(&self) -> Follower {
        match self {
            Self::Directory(directory) => Follower::of(Directory::new(directory.path())),
            Self::Api(api) => Follower::of(kubernetes(api)),
        }
    }
}

fn kubernetes(api: &Api) -> Kubernetes {
    let uri = format!("http://{}", api.address).parse().unwrap();
    Kubernetes::new(kube::Config::new(uri)).with_patience(brisk())
}

/// The waits of a node, but shorter.
fn brisk() -> Patience {
    Patience {
        first: Duration::from_millis(5),
        most: Duration::from_millis(40),
        missing: Duration::from_millis(30),
        lasting: Duration::from_millis(100),
        answer: Duration::from_secs(5),
        ..Patience::default()
    }
}

fn follow_with(api: &Api, patience: Patience) -> Follower {
    Follower::of(kubernetes(api).with_patience(patience))
}

fn path(kind: Kind) -> &'static str {
    match kind {
        Kind::Namespace => "/api/v1/namespaces",
        Kind::Node => "/api/v1/nodes",
        Kind::Pod => PODS,
        Kind::Service => "/api/v1/services",
        Kind::EndpointSlice => "/apis/discovery.k8s.io/v1/endpointslices",
        Kind::NetworkPolicy => POLICIES,
        Kind::ClusterNetworkPolicy => CLUSTER_POLICIES,
        Kind::NodePolicy => NODE_POLICIES,
    }
}

const PODS: &str = "/api/v1/pods";
const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";
const CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";
const NODE_POLICIES: &str = "/apis/sluice.dev/v1alpha1/nodepolicies";

fn file(kind: Kind, object: &Value) -> String {
    let text = |field: &str| {
        object["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    format!("{kind}-{}-{}.json", text("namespace"), text("name"))
}

struct Follower {
    store: Store,
    /// How often each kind was listed, and the like.
    seen: Vec<Event>,
    events: Receiver<Event>,
    _running: Running,
}

impl Follower {
    fn of(source: impl Source) -> Self {
        let (sender, events) = channel();
        let running = source.start(sender);
        Self {
            store: Store::default(),
            seen: Vec::new(),
            events,
            _running: running.unwrap(),
        }
    }

    /// Applies all events of some time; how many there were.
    fn hear(&mut self, time: Duration) -> usize {
        let end = Instant::now() + time;
        let mut count = 0;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if let Ok(event) = self.events.recv_timeout(left) {
                self.seen.push(event.clone());
                self.store.apply(event);
                count += 1;
            }
        }
        count
    }

    /// Applies events until `done` holds; far longer than it ever takes means that it does not come.
    #[track_caller]
    fn until(&mut self, what: &str, done: impl Fn(&Store) -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !done(&self.store) {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(event) = self.events.recv_timeout(left) else {
                panic!(
                    "did not come: {what}; {:?}",
                    self.store.findings().collect::<Vec<_>>()
                );
            };
            self.seen.push(event.clone());
            self.store.apply(event);
        }
    }

    fn lists(&self, of: Kind) -> usize {
        self.seen
            .iter()
            .filter(|it| matches!(it, Event::Listed { kind, .. } if *kind == of))
            .count()
    }
}

fn pod(name: &str, app: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "x", "labels": {"app": app}},
        "spec": {"containers": [{"name": "c", "image": "i"}]}, "status": {"podIP": "10.0.0.1"}})
}

fn policy(name: &str, port: i32) -> Value {
    json!({"metadata": {"name": name, "namespace": "x"},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": port}]}]}})
}

fn app(store: &Store, name: &str) -> Option<String> {
    Some(
        store
            .pod(&Name::new("x", name))?
            .labels
            .get("app")?
            .to_owned(),
    )
}

fn has_port(store: &Store, wanted: u16) -> bool {
    let mut ports = store
        .network_policies()
        .flat_map(|it| it.ingress.iter().flatten())
        .flat_map(|it| &it.ports);
    ports
        .any(|it| matches!(it.port, sluice_model::object::Port::Range(first, _) if first == wanted))
}

#[test]
fn objects_come_change_and_go() {
    for cluster in Cluster::both() {
        cluster.put(Kind::Pod, pod("a", "web"));
        for name in ["b", "c", "d", "e"] {
            cluster.put(Kind::Pod, pod(name, "web"));
        }
        cluster.put(
            Kind::Namespace,
            json!({"metadata": {"name": "x", "labels": {"team": "red"}}}),
        );
        let mut follower = cluster.follow();
        follower.until("what was there", Store::is_in_sync);
        assert_eq!(follower.store.count(Kind::Pod), 5);
        assert_eq!(
            follower.store.namespace_labels("x").get("team"),
            Some("red")
        );
        cluster.put(Kind::Pod, pod("a", "db"));
        follower.until("the change", |it| app(it, "a").as_deref() == Some("db"));
        cluster.put(Kind::NetworkPolicy, policy("p", 80));
        follower.until("the policy", |it| has_port(it, 80));
        cluster.delete(Kind::Pod, &pod("b", ""));
        follower.until("the removal", |it| it.count(Kind::Pod) == 4);
        assert_eq!(app(&follower.store, "b"), None);
    }
}

#[test]
fn an_invalid_object_leaves_its_predecessor_in_force() {
    for cluster in Cluster::both() {
        cluster.put(Kind::NetworkPolicy, policy("p", 80));
        let mut follower = cluster.follow();
        follower.until("what was there", |it| it.is_in_sync() && has_port(it, 80));
        cluster.put(Kind::NetworkPolicy, policy("p", 70_000));
        cluster.put(Kind::NetworkPolicy, policy("q", 81));
        follower.until("the other policy", |it| {
            has_port(it, 81) && it.findings().count() == 1
        });
        assert!(has_port(&follower.store, 80));
        let finding = follower.store.findings().next().unwrap();
        assert_eq!(
            (finding.object.as_str(), finding.field.as_str()),
            ("NetworkPolicy x/p", "spec.ingress[0].ports[0].port")
        );
        cluster.put(Kind::NetworkPolicy, policy("p", 82));
        follower.until("the repair", |it| {
            has_port(it, 82) && it.findings().count() == 0
        });
        cluster.put(Kind::NetworkPolicy, policy("p", 70_000));
        follower.until("the next finding", |it| it.findings().count() == 1);
        cluster.delete(Kind::NetworkPolicy, &policy("p", 0));
        follower.until("that it is gone", |it| {
            !has_port(it, 82) && it.findings().count() == 0
        });
    }
}

#[test]
fn both_sources_compile_to_the_same_rows() {
    let rows = Cluster::both().map(|cluster| {
        let mut follower = cluster.follow();
        cluster.put(Kind::Pod, pod("a", "web"));
        cluster.put(Kind::NetworkPolicy, policy("p", 80));
        cluster.put(Kind::Namespace, json!({"metadata": {"name": "x"}}));
        cluster.put(Kind::Service, json!({"metadata": {"name": "s", "namespace": "x"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}}));
        cluster.put(Kind::EndpointSlice, json!({"metadata": {"name": "s-1", "namespace": "x", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.0.1"]}]}));
        cluster.put(Kind::NodePolicy, json!({"metadata": {"name": "guard"}, "spec": {"nodeSelector": {},
            "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}]}]}}));
        follower.until("everything", |it| Kind::ALL.into_iter().map(|kind| it.count(kind)).sum::<usize>() == 6);
        let mut model = Model::new(&Config::default(), []);
        for event in follower.seen.drain(..) {
            model.apply(event);
        }
        model.compile();
        model.tables().all().collect::<Vec<_>>()
    });
    assert!(rows[0].len() > 5);
    assert_eq!(rows[0], rows[1]);
}

fn api() -> (Api, Follower) {
    let cluster = Cluster::Api(Api::start());
    for name in ["a", "b", "c"] {
        cluster.put(Kind::Pod, pod(name, "web"));
    }
    let mut follower = cluster.follow();
    follower.until("what was there", Store::is_in_sync);
    let Cluster::Api(api) = cluster else {
        panic!("not an API")
    };
    (api, follower)
}

#[test]
fn a_watch_that_breaks_in_the_middle_of_an_event_is_resumed_and_loses_nothing() {
    let cluster = Cluster::Api(Api::start());
    let Cluster::Api(api) = &cluster else {
        panic!("not an API")
    };
    cluster.put(Kind::Pod, pod("a", "web"));
    api.fail("/pods?watch", Fault::HalfEvent);
    let mut follower = cluster.follow();
    follower.until("what was there", Store::is_in_sync);
    cluster.put(Kind::Pod, pod("a", "db"));
    cluster.put(Kind::Pod, pod("b", "web"));
    follower.until("both changes", |it| {
        app(it, "a").as_deref() == Some("db") && app(it, "b").is_some()
    });
    assert_eq!(
        (follower.lists(Kind::Pod), api.faults_left()),
        (1, 0),
        "resumed, not listed again"
    );
}

#[test]
fn a_forgotten_place_in_history_means_a_new_list_and_what_is_not_in_it_is_gone() {
    for fault in [Fault::Expired, Fault::Status(410, "")] {
        let (api, mut follower) = api();
        api.rewrite(PODS, &[pod("a", "db"), pod("d", "web")]);
        api.fail("/pods?watch", fault);
        follower.until("the new list", |it| app(it, "d").is_some());
        assert_eq!(follower.store.count(Kind::Pod), 2);
        assert_eq!(app(&follower.store, "a").as_deref(), Some("db"));
        assert!(follower.lists(Kind::Pod) >= 2);
    }
}

#[test]
fn failures_are_waited_out_and_what_is_known_stays() {
    let faults = [
        Fault::Drop,
        Fault::Status(500, ""),
        Fault::Status(503, ""),
        Fault::Status(429, "Retry-After: 0\r\n"),
        Fault::Status(403, ""),
        Fault::Garbage,
        Fault::Slow,
    ];
    let cluster = Cluster::Api(Api::start());
    let Cluster::Api(api) = &cluster else {
        panic!("not an API")
    };
    for name in ["a", "b", "c", "d"] {
        cluster.put(Kind::Pod, pod(name, "web"));
    }
    for fault in &faults {
        api.fail("/pods?limit", fault.clone());
        api.fail("/pods?watch", fault.clone());
    }
    let mut follower = cluster.follow();
    follower.until("that something is wrong", |it| it.lost().is_some());
    follower.until("that all is well", |it| {
        it.is_in_sync() && it.lost().is_none()
    });
    assert_eq!(follower.store.count(Kind::Pod), 4);
    cluster.put(Kind::Pod, pod("e", "web"));
    follower.until("a change after all that", |it| app(it, "e").is_some());
    cluster.put(Kind::Pod, pod("f", "web"));
    follower.until("and another", |it| app(it, "f").is_some());
    assert!(
        follower
            .seen
            .iter()
            .all(|it| !matches!(it, Event::Removed(_)))
    );
}

#[test]
fn p07_what_is_known_stays_while_the_server_is_away_and_what_was_missed_follows() {
    let (api, mut follower) = api();
    api.put(POLICIES, &policy("p", 80));
    follower.until("the policy", |it| has_port(it, 80));
    api.go_away(true);
    follower.until("that it is away", |it| it.lost().is_some());
    api.put(POLICIES, &policy("p", 81));
    api.delete(PODS, "x/a");
    assert!(has_port(&follower.store, 80) && app(&follower.store, "a").is_some());
    api.go_away(false);
    follower.until("what was missed", |it| {
        it.lost().is_none() && has_port(it, 81) && app(it, "a").is_none()
    });
    assert_eq!(follower.lists(Kind::NetworkPolicy), 1, "resumed");
}

#[test]
fn bookmarks_move_the_place_at_which_a_watch_resumes() {
    let (api, mut follower) = api();
    api.put(PODS, &pod("d", "web"));
    api.put(POLICIES, &policy("p", 80));
    follower.until("the changes", |it| {
        app(it, "d").is_some() && has_port(it, 80)
    });
    api.bookmark(PODS);
    // All that the watch of pods was told of them is forgotten, only the bookmark is young enough.
    api.forget_and_cut(PODS);
    api.put(PODS, &pod("e", "web"));
    follower.until("the change after", |it| app(it, "e").is_some());
    assert_eq!(follower.lists(Kind::Pod), 1);
}

#[test]
fn only_what_is_wanted_is_asked_for() {
    let (api, _follower) = api();
    let requests = api.requests();
    let of = |path: &str| {
        requests
            .iter()
            .find(|it| it.starts_with(path))
            .unwrap()
            .clone()
    };
    assert!(of(PODS).contains("fieldSelector=status.phase%21%3DSucceeded"));
    assert!(of("/api/v1/services").contains("labelSelector=%21service.kubernetes.io%2Fheadless"));
    assert!(of(PODS).contains("limit=500"));
}

#[test]
fn a_source_that_is_dropped_ends_at_once() {
    for cluster in Cluster::both() {
        let mut follower = cluster.follow();
        follower.until("what was there", Store::is_in_sync);
        drop(follower);
    }
}
