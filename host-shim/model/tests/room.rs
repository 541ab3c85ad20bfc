//! What one namespace asks for beyond its share is refused to it alone: everybody else's policies and Services are in force,
//! in the tables that the appliance has.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "a test ends where its ground is not as it expects; JSON is built from values"
)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_appliance::Verdict;
use sluice_appliance::apply::Outcome;
use sluice_appliance::policy::Query;
use sluice_appliance::tables::Capacity;
use sluice_appliance::testing::{Bench, Builder};
use sluice_contract::policy::{Action, Direction, PolicyKey, PolicyRow, RulesetId};
use sluice_contract::report::{Reject, RejectReason};
use sluice_contract::row::LinkRow;
use sluice_contract::{DropReason, Key, LinkId, Mac, Protocol, Row, ToGuest};
use sluice_model::compile::{Attached, Config, Model};
use sluice_model::diff::Step;
use sluice_model::finding::Severity;
use sluice_model::object::{Kind, Name, ObjectKey};
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

/// A node with pods, and the appliance's own tables.
struct Node {
    model: Model,
    bench: Bench,
    port: u16,
}

/// The link and the last byte of the address of each pod: `a/p1`, `a/p2`, `b/p1`, `b/p2`, and a pod of kube-system.
const PODS: [(&str, &str); 5] = [
    ("a", "p1"),
    ("a", "p2"),
    ("b", "p1"),
    ("b", "p2"),
    ("kube-system", "dns"),
];
const A1: usize = 0;
const A2: usize = 1;
const B1: usize = 2;
const B2: usize = 3;
const DNS: usize = 4;

fn link(pod: usize) -> LinkId {
    LinkId::new(16 + u16::try_from(pod).unwrap()).unwrap()
}

fn address(pod: usize) -> String {
    format!("10.0.0.{}", pod + 1)
}

impl Node {
    fn new(capacity: Capacity) -> Self {
        let config = Config {
            node: "here".into(),
            ..Config::default()
        };
        let mut model = Model::new(&config, []);
        model.set_room(capacity.room(), 64);
        let mut node = Self {
            model,
            bench: Bench::empty(capacity),
            port: 1024,
        };
        for (n, (namespace, name)) in PODS.into_iter().enumerate() {
            node.put(
                Kind::Pod,
                json!({"metadata": {"name": name, "namespace": namespace, "labels": {"pod": name}},
                    "spec": {"nodeName": "here"}, "status": {"podIP": address(n)}}),
            );
            let attached = Attached {
                pod: Name::new(namespace, name),
                addresses: vec![address(n).parse().unwrap()],
            };
            node.model.attach(link(n), attached);
        }
        node.model.compile();
        let links: Vec<Row> = (0..PODS.len()).map(|n| node.link_row(n)).collect();
        node.bench.commit(&links);
        node.tell();
        node
    }

    fn link_row(&self, n: usize) -> Row {
        Row::Link(LinkRow {
            id: link(n),
            mac: Mac::of_pod(link(n)),
            addresses: [address(n).parse().unwrap()].into_iter().collect(),
            mtu: 1500,
            identity: self.model.identity(link(n)).unwrap(),
            incarnation: 1,
            tenant: sluice_contract::Tenant::NONE,
        })
    }

    fn put(&mut self, kind: Kind, value: Value) {
        let admission = admit_as(kind, value);
        let object = admission.object;
        let object = object.unwrap_or_else(|| panic!("{:#?}", admission.findings));
        self.model.apply(Event::Put(object));
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str) {
        let name = Name::new(namespace, name);
        self.model.apply(Event::Removed(ObjectKey { kind, name }));
    }

    /// Brings the appliance up to date, in one change of which it takes every row. How long the model took.
    fn tell(&mut self) -> Duration {
        let begin = Instant::now();
        self.model.compile();
        let took = begin.elapsed();
        let steps = self.model.tables().take_delta();
        let messages: Vec<ToGuest> = steps
            .into_iter()
            .map(|step| match step {
                Step::Put(row) => ToGuest::Put(row),
                Step::Remove(key) => ToGuest::Remove(key),
            })
            .collect();
        self.change(&messages);
        // Rows may meet there what only goes with the same change: they are offered once more.
        let refused = std::mem::take(&mut self.bench.refused);
        let is_full = |it: &Reject| matches!(it.reason, RejectReason::Full(_));
        assert!(
            refused.is_empty() || refused.iter().any(is_full),
            "{refused:#?}"
        );
        let again = refused.iter().filter_map(|it| it.object);
        let again: Vec<ToGuest> = (again.filter_map(|key| self.model.tables().row(&key)))
            .map(ToGuest::Put)
            .collect();
        self.change(&again);
        let refused = std::mem::take(&mut self.bench.refused);
        assert!(refused.is_empty(), "{refused:#?}");
        took
    }

    fn change(&mut self, messages: &[ToGuest]) {
        let outcome = self.bench.change(messages);
        assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    }

    /// Whether a new connection of one pod to an address and port arrives at another.
    fn reaches(&mut self, from: usize, to: &str, port: u16) -> Option<usize> {
        self.port += 1;
        let packet = Builder::from(link(from).raw(), &address(from), to).tcp(self.port, port, 2);
        match self.bench.send(link(from).raw(), &packet.build()).verdict {
            Verdict::Forward(it) => (0..PODS.len()).find(|n| link(*n) == it),
            _ => None,
        }
    }

    /// Whether policy lets a pod begin a connection to an address elsewhere.
    fn may_begin(&self, from: usize, to: &str) -> bool {
        let policy = self.bench.pipeline.tables().policy();
        let peer_address = to.parse().unwrap();
        let decision = policy.judge(&Query {
            link: link(from),
            direction: Direction::Egress,
            peer: policy.identity_of(peer_address),
            peer_address,
            protocol: Some(Protocol::Tcp),
            port: 80,
        });
        decision.accepted
    }

    fn is_denied(&mut self, from: usize, to: usize) -> bool {
        self.port += 1;
        let to = address(to);
        let packet = Builder::from(link(from).raw(), &address(from), &to).tcp(self.port, 80, 2);
        let verdict = self.bench.send(link(from).raw(), &packet.build()).verdict;
        matches!(
            verdict,
            Verdict::Drop(DropReason::PolicyEgress | DropReason::PolicyIngress)
        )
    }

    /// Objects that findings say are left out.
    fn left_out(&self) -> BTreeMap<String, String> {
        let all = self.model.left_out().into_iter();
        all.map(|it| {
            assert_eq!(it.severity, Severity::Error);
            assert!(it.reason.contains("memory_mib"), "{it}");
            (it.object, it.reason)
        })
        .collect()
    }

    fn service(&mut self, namespace: &str, name: &str, ip: [u8; 4], endpoints: &[String]) {
        let [a, b, c, d] = ip;
        self.put(
            Kind::Service,
            json!({"metadata": {"name": name, "namespace": namespace},
                "spec": {"clusterIP": format!("{a}.{b}.{c}.{d}"), "ports": [{"port": 80}]}}),
        );
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|it| json!({"addresses": [it], "conditions": {"ready": true}}))
            .collect();
        self.put(
            Kind::EndpointSlice,
            json!({"metadata": {"name": format!("{name}-1"), "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": endpoints}),
        );
    }

    fn policy(&mut self, namespace: &str, name: &str, spec: Value) {
        self.put(
            Kind::NetworkPolicy,
            json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec}),
        );
    }

    /// A policy for a pod that lets it go to so many single addresses, none beside another.
    fn networks(&mut self, namespace: &str, name: &str, pod: &str, first: u32, count: u32) {
        let peers: Vec<Value> = (first..first + count)
            .map(|n| {
                let address = std::net::Ipv4Addr::from(0x1400_0000 + 2 * n);
                json!({"ipBlock": {"cidr": format!("{address}/32")}})
            })
            .chain([json!({"podSelector": {}})])
            .collect();
        self.policy(
            namespace,
            name,
            json!({"podSelector": {"matchLabels": {"pod": pod}}, "policyTypes": ["Egress"], "egress": [{"to": peers}]}),
        );
    }

    /// A change of b's policy and a new Service of b are in force.
    fn b_goes_on(&mut self) {
        self.service("b", "web", [10, 96, 0, 2], &[address(B2)]);
        self.policy(
            "b",
            "deny",
            json!({"podSelector": {"matchLabels": {"pod": "p1"}}, "policyTypes": ["Ingress"]}),
        );
        let took = self.tell();
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert!(self.is_denied(B2, B1), "b's policy is not in force");
        assert_eq!(
            self.reaches(B1, "10.96.0.2", 80),
            Some(B2),
            "b's Service is not in force"
        );
        self.remove(Kind::NetworkPolicy, "b", "deny");
        self.tell();
        assert!(!self.is_denied(B2, B1), "b's policy is still in force");
    }
}

#[test]
fn a_namespace_of_a_hundred_thousand_networks_denies_its_own_pods() {
    let mut node = Node::new(Capacity::default());
    node.b_goes_on();
    for n in 0..4 {
        node.networks("a", &format!("many-{n}"), "p1", n * 25_000, 25_000);
    }
    node.tell();
    let out = node.left_out();
    assert_eq!(out.len(), 1, "{out:#?}");
    let (object, reason) = out.first_key_value().unwrap();
    assert!(object.starts_with("NetworkPolicy a/many-"), "{object}");
    assert!(
        reason.contains("denied all egress") && reason.contains("100000"),
        "{reason}"
    );
    assert!(node.is_denied(A1, A2) && node.is_denied(A1, B1));
    // The direction that the policies do not govern, and a's other pods, are as they were.
    assert!(!node.is_denied(B1, A1) && !node.is_denied(A2, B1));
    node.b_goes_on();
    for n in 0..4 {
        node.remove(Kind::NetworkPolicy, "a", &format!("many-{n}"));
    }
    node.tell();
    assert!(node.left_out().is_empty() && !node.is_denied(A1, B1));
    let denied = Key::Policy(PolicyKey::Ruleset(RulesetId::NO_ROOM));
    assert_eq!(node.model.tables().row(&denied), None);
}

#[test]
fn a_namespace_of_very_many_pods_is_unknown_beyond_its_share_and_no_other_is() {
    let mut node = Node::new(Capacity::default());
    let pod = |namespace: &str, name: &str, address: &str| {
        json!({"metadata": {"name": name, "namespace": namespace, "labels": {"pod": name}},
            "spec": {"nodeName": "there"}, "status": {"podIP": address}})
    };
    let many: Vec<(String, String)> = (0..20_000_u16)
        .map(|n| {
            let [high, low] = n.to_be_bytes();
            (format!("many-{n:05}"), format!("10.100.{high}.{low}"))
        })
        .collect();
    for (name, address) in &many {
        node.put(Kind::Pod, pod("a", name, address));
    }
    // The last of all in every order.
    node.put(Kind::Pod, pod("b", "z", "10.200.0.1"));
    node.policy(
        "b",
        "to-z",
        json!({"podSelector": {"matchLabels": {"pod": "p1"}}, "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": {"matchLabels": {"pod": "z"}}}]}]}),
    );
    node.tell();
    assert!(node.may_begin(B1, "10.200.0.1"), "b's pod is unknown");
    assert!(!node.may_begin(B1, "10.200.0.2"));
    let of = |node: &Node, address: &str| {
        let policy = node.bench.pipeline.tables().policy();
        policy.identity_of(address.parse().unwrap())
    };
    let known = many.iter().filter(|it| of(&node, &it.1).is_pod()).count();
    // A sixteenth of 16 000 is kept free; a has two pods here, which come first; the others have four, and z.
    assert_eq!(known, 15_000 - PODS.len() - 1);
    assert!(!of(&node, &many[19_999].1).is_pod() && of(&node, &many[0].1).is_pod());
    let policy = node.bench.pipeline.tables().policy();
    assert!(policy.leaves_pods_out());
    let out = node.left_out();
    let reason = out.get("Namespace a").unwrap();
    assert!(
        reason.contains("5006 of its pods, such as a/many-14994") && reason.contains("15000"),
        "{reason}"
    );
    assert_eq!(out.len(), 1, "{out:#?}");
    node.remove(Kind::NetworkPolicy, "b", "to-z");
    node.b_goes_on();
    for (name, _) in &many[10_000..] {
        node.remove(Kind::Pod, "a", name);
    }
    node.tell();
    assert!(node.left_out().is_empty() && of(&node, &many[9_999].1).is_pod());
    let policy = node.bench.pipeline.tables().policy();
    assert!(!policy.leaves_pods_out());
}

#[test]
fn a_namespace_that_fills_the_maps_of_addresses_gives_back_what_it_borrowed() {
    let mut node = Node::new(Capacity::default());
    // Each pod's policies take a good third of all that there is.
    node.networks("a", "one", "p1", 0, 8_000);
    node.networks("a", "two", "p2", 10_000, 8_000);
    node.tell();
    assert!(node.left_out().is_empty(), "{:#?}", node.left_out());
    assert!(!node.is_denied(A1, A2) && !node.is_denied(A2, A1) && node.is_denied(A1, B1));
    // What b needs is less than its share.
    node.networks("b", "some", "p2", 30_000, 8_000);
    node.tell();
    let out: Vec<String> = node.left_out().into_keys().collect();
    assert_eq!(out, ["NetworkPolicy a/two"]);
    assert!(!node.is_denied(A1, A2) && !node.is_denied(B2, B1));
    assert!(node.is_denied(A2, A1) && node.is_denied(B2, A1));
    node.b_goes_on();
    node.remove(Kind::NetworkPolicy, "b", "some");
    node.tell();
    assert!(node.left_out().is_empty() && !node.is_denied(A2, A1));
}

#[test]
fn a_namespace_of_too_many_services_loses_its_own() {
    let mut node = Node::new(Capacity::default());
    node.service("kube-system", "dns", [10, 96, 0, 1], &[address(DNS)]);
    for n in 0..8_200_u16 {
        let [high, low] = n.to_be_bytes();
        node.service(
            "a",
            &format!("s{n:05}"),
            [10, 97, high, low],
            &[address(A2)],
        );
    }
    let took = node.tell();
    println!("8 200 Services compiled in {took:?}");
    let out = node.left_out();
    assert!(
        !out.is_empty() && out.keys().all(|it| it.starts_with("Service a/s0")),
        "{out:#?}"
    );
    assert!(!out.contains_key("Service a/s00000"));
    let last = &out["Service a/s08199"];
    assert!(last.contains("namespace a has"), "{last}");
    assert_eq!(node.reaches(A1, "10.97.0.0", 80), Some(A2));
    assert_eq!(node.reaches(A1, "10.97.32.7", 80), None);
    assert_eq!(node.reaches(B1, "10.96.0.1", 80), Some(DNS));
    node.b_goes_on();
}

#[test]
fn services_that_do_not_fit_are_left_out_and_policy_never() {
    let mut node = Node::new(Capacity::default());
    node.service("kube-system", "dns", [10, 96, 0, 1], &[address(DNS)]);
    for n in 0..2_000_u16 {
        let [high, low] = n.to_be_bytes();
        let endpoints: Vec<String> = (0..10)
            .map(|it| format!("10.{}.{high}.{low}", 100 + it))
            .collect();
        node.service(
            &format!("t{}", n % 20),
            &format!("s{n:04}"),
            [10, 97, high, low],
            &endpoints,
        );
    }
    node.tell();
    let out = node.left_out();
    // 20 001 endpoints, of which 15 360 fit.
    assert!((464..=500).contains(&out.len()), "{}", out.len());
    let one = out.values().next().unwrap();
    assert!(
        one.contains("10 endpoints") && one.contains("15360"),
        "{one}"
    );
    assert_eq!(node.reaches(B1, "10.96.0.1", 80), Some(DNS));
    node.b_goes_on();
}

#[test]
fn a_nodes_own_policy_that_does_not_fit_leaves_the_ports_that_no_policy_closes() {
    let mut node = Node::new(Capacity::TINY);
    let peers: Vec<Value> = (0..4_000_u32)
        .map(|n| json!({"ipBlock": {"cidr": format!("20.{}.{}.0/25", n / 250, n % 250)}}))
        .collect();
    node.put(
        Kind::NodePolicy,
        json!({"metadata": {"name": "many"}, "spec": {"nodeSelector": {}, "ingress": [{"from": peers}]}}),
    );
    node.tell();
    let out = node.left_out();
    let reason = out.get("NodePolicy many").unwrap();
    assert!(reason.contains("host_policy.failsafe"), "{reason}");
    let tables = node.model.tables();
    let binding = tables.row(&Key::Policy(PolicyKey::Binding(LinkId::HOST)));
    let Some(Row::Policy(PolicyRow::Binding(binding))) = binding else {
        panic!("{binding:?}");
    };
    let ruleset = PolicyKey::Ruleset(binding.ingress);
    let Some(Row::Policy(PolicyRow::Ruleset(row))) = tables.row(&Key::Policy(ruleset)) else {
        panic!("{ruleset:?}");
    };
    // The failsafe ports, then nothing else.
    assert!(!row.layers.is_empty());
    assert_eq!(row.layers.last().map(|it| it.miss), Some(Action::Deny));
    node.b_goes_on();
}

/// Policies and Services of three namespaces, together far more than the smallest appliance holds.
fn too_much(node: &mut Node) {
    for (n, namespace) in ["a", "b", "kube-system"].into_iter().enumerate() {
        let n = u32::try_from(n).unwrap();
        for pod in ["p1", "p2", "dns"] {
            let first = 10_000 * n;
            node.networks(namespace, &format!("for-{pod}"), pod, first, 300 * (n + 1));
        }
        for service in 0..60_u8 {
            let endpoints: Vec<String> = (0..service).map(|it| format!("10.1.{n}.{it}")).collect();
            let name = format!("s{service:02}");
            let ip = [10, 98, u8::try_from(n).unwrap(), service];
            node.service(namespace, &name, ip, &endpoints);
        }
    }
}

fn everything(node: &mut Node) -> BTreeMap<Key, Row> {
    let rows = node.model.tables().all();
    rows.map(|row| (row.key(), row)).collect()
}

#[test]
fn what_is_left_out_does_not_depend_on_what_came_first() {
    let mut one = Node::new(Capacity::TINY);
    too_much(&mut one);
    one.tell();
    let expected = one.left_out();
    assert!(
        expected.keys().any(|it| it.starts_with("Service")),
        "{expected:#?}"
    );
    assert!(
        expected.keys().any(|it| it.starts_with("NetworkPolicy")),
        "{expected:#?}"
    );
    // The same, after other things that are gone again, and told in pieces.
    let mut other = Node::new(Capacity::TINY);
    for (n, namespace) in ["kube-system", "b", "a"].into_iter().enumerate() {
        let first = 50_000 + 1_000 * u32::try_from(n).unwrap();
        other.networks(namespace, "passing", "p1", first, 900);
        other.model.compile();
        let ip = [10, 99, 0, u8::try_from(n).unwrap()];
        other.service(
            namespace,
            "passing",
            ip,
            &(0..200)
                .map(|it| format!("10.2.0.{it}"))
                .collect::<Vec<_>>(),
        );
        other.model.compile();
    }
    too_much(&mut other);
    other.model.compile();
    for namespace in ["a", "b", "kube-system"] {
        other.remove(Kind::NetworkPolicy, namespace, "passing");
        other.model.compile();
        other.remove(Kind::Service, namespace, "passing");
        other.remove(Kind::EndpointSlice, namespace, "passing-1");
        other.model.compile();
    }
    assert_eq!(other.left_out(), expected);
    assert!(everything(&mut other) == everything(&mut one));
}
