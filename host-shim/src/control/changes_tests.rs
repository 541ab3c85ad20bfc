//! Whatever happens in a cluster, the real appliance takes every change that is made of it: nothing is refused, whatever order
//! rows come in, and in the end it has what a fresh one would be given.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};
use sluice_appliance::apply::Outcome;
use sluice_appliance::tables::Capacity;
use sluice_appliance::testing::{Bench, pod_row};
use sluice_contract::{Key, LinkId, Row, ToGuest};
use sluice_model::compile::{Attached, Config, Model};
use sluice_model::diff::Step;
use sluice_model::object::{Kind, Name, ObjectKey};
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

use super::desired::{Change, Desired};

/// One thing that happens; numbers choose among few names and addresses, so that things collide.
#[derive(Clone, Debug)]
enum Happening {
    Node {
        name: u8,
        address: u8,
    },
    NoNode {
        name: u8,
    },
    Service {
        name: u8,
        address: u8,
        shape: u8,
    },
    NoService {
        name: u8,
    },
    Slice {
        service: u8,
        ready: Vec<u8>,
        port: u8,
    },
    NoSlice {
        service: u8,
    },
    Pod {
        name: u8,
        address: u8,
        label: u8,
    },
    NoPod {
        name: u8,
    },
    Policy {
        name: u8,
        label: u8,
        port: u8,
    },
    NoPolicy {
        name: u8,
    },
    Attach {
        link: u8,
    },
    Detach {
        link: u8,
    },
    /// What has happened since is told in one change.
    Tell,
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening as H;
    let few = || 0..3u8;
    prop_oneof![
        1 => (few(), 1..5u8).prop_map(|(name, address)| H::Node { name, address }),
        1 => few().prop_map(|name| H::NoNode { name }),
        1 => (few(), few(), any::<u8>()).prop_map(|(name, address, shape)| H::Service { name, address, shape }),
        1 => few().prop_map(|name| H::NoService { name }),
        4 => (few(), prop_oneof![3 => prop::collection::vec(1..7u8, 0..6), 1 => prop::collection::vec(1..40u8, 0..30)], 0..2u8)
            .prop_map(|(service, ready, port)| H::Slice { service, ready, port }),
        1 => few().prop_map(|service| H::NoSlice { service }),
        1 => (few(), 1..5u8, few()).prop_map(|(name, address, label)| H::Pod { name, address, label }),
        1 => few().prop_map(|name| H::NoPod { name }),
        2 => (few(), few(), 1..9u8).prop_map(|(name, label, port)| H::Policy { name, label, port }),
        1 => few().prop_map(|name| H::NoPolicy { name }),
        1 => few().prop_map(|link| H::Attach { link }),
        1 => few().prop_map(|link| H::Detach { link }),
        4 => Just(H::Tell),
    ]
}

struct Cluster {
    model: Model,
    links: BTreeMap<LinkId, Row>,
    gone: Vec<Key>,
    desired: Desired,
    bench: Bench,
}

impl Cluster {
    fn new() -> Self {
        let config = Config {
            node: "n0".into(),
            ..Config::default()
        };
        Self {
            model: Model::new(&config, []),
            links: BTreeMap::new(),
            gone: Vec::new(),
            desired: Desired::default(),
            bench: Bench::empty(Capacity::TINY),
        }
    }

    fn put(&mut self, kind: Kind, value: Value) {
        let admitted = admit_as(kind, value);
        self.model.apply(Event::Put(admitted.object.unwrap()));
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        let namespace = if kind.is_namespaced() { "x" } else { "" };
        let name = Name::new(namespace, name);
        self.model.apply(Event::Removed(ObjectKey { kind, name }));
    }

    fn happen(&mut self, it: Happening) -> Result<(), TestCaseError> {
        use Happening as H;
        match it {
            H::Node { name, address } => self.put(
                Kind::Node,
                json!({"metadata": {"name": format!("n{name}")}, "status": {"addresses": [
                    {"type": "InternalIP", "address": format!("172.16.0.{address}")}]}}),
            ),
            H::NoNode { name } => self.remove(Kind::Node, &format!("n{name}")),
            H::Service { name, address, shape } => self.put(Kind::Service, service(name, address, shape)),
            H::NoService { name } => self.remove(Kind::Service, &format!("s{name}")),
            H::Slice { service, ready, port } => self.put(Kind::EndpointSlice, slice(service, &ready, port)),
            H::NoSlice { service } => self.remove(Kind::EndpointSlice, &format!("s{service}-1")),
            H::Pod { name, address, label } => self.put(
                Kind::Pod,
                json!({"metadata": {"name": format!("p{name}"), "namespace": "x", "labels": {"app": format!("a{label}")}},
                    "status": {"podIP": format!("10.0.0.{address}")}}),
            ),
            H::NoPod { name } => self.remove(Kind::Pod, &format!("p{name}")),
            H::Policy { name, label, port } => self.put(Kind::NetworkPolicy, policy(name, label, port)),
            H::NoPolicy { name } => self.remove(Kind::NetworkPolicy, &format!("r{name}")),
            H::Attach { link } => {
                let row = pod_row(16 + u16::from(link), 50 + u16::from(link));
                let (pod, addresses) = (Name::new("x", &format!("p{link}")), row.addresses.to_vec());
                self.model.attach(row.id, Attached { pod, addresses });
                self.links.insert(row.id, Row::Link(row));
            }
            H::Detach { link } => {
                let link = LinkId::new(16 + u16::from(link)).unwrap();
                self.model.detach(link);
                if self.links.remove(&link).is_some() {
                    self.gone.push(Key::Link(link));
                }
            }
            H::Tell => return self.tell(),
        }
        Ok(())
    }

    /// As the daemon does it: what the model says has changed, and the links.
    fn tell(&mut self) -> Result<(), TestCaseError> {
        self.model.compile();
        let (mut put, mut remove) = (Vec::new(), std::mem::take(&mut self.gone));
        for step in self.model.tables().take_delta() {
            match step {
                Step::Put(row) => put.push(row),
                Step::Remove(key) => remove.push(key),
            }
        }
        remove.retain(|key| !self.links.keys().any(|link| *key == Key::Link(*link)));
        put.extend(self.links.values().cloned());
        self.desired.change(put, remove);
        let changes = self.desired.take_changes();
        let outcome = take(&mut self.bench, &changes);
        prop_assert!(outcome.is_whole(), "{outcome:?} to {changes:#?}");
        Ok(())
    }
}

fn take(bench: &mut Bench, changes: &[Change]) -> Outcome {
    let messages: Vec<ToGuest> = (changes.iter())
        .map(|change| match change {
            Change::Put(row) => ToGuest::Put((**row).clone()),
            Change::Remove(key) => ToGuest::Remove(*key),
        })
        .collect();
    bench.change(&messages)
}

fn service(name: u8, address: u8, shape: u8) -> Value {
    let has = |bit: u8| shape & (1 << bit) != 0;
    let mut spec = json!({"clusterIP": format!("10.96.0.{address}"), "ports": [{"port": 80, "targetPort": 8080}]});
    if has(0) {
        spec["type"] = json!("NodePort");
        spec["ports"][0]["nodePort"] = json!(30000 + u16::from(address));
    }
    if has(1) {
        spec["externalIPs"] = json!([format!("192.0.2.{}", address % 2)]);
    }
    if has(2) {
        spec["internalTrafficPolicy"] = json!("Local");
    }
    if has(3) {
        spec["sessionAffinity"] = json!("ClientIP");
    }
    if has(4) {
        spec["ports"][0]["protocol"] = json!("UDP");
    }
    json!({"metadata": {"name": format!("s{name}"), "namespace": "x"}, "spec": spec})
}

/// Endpoints in the order given, which repeats some.
fn slice(service: u8, ready: &[u8], port: u8) -> Value {
    let endpoints: Vec<Value> = (ready.iter())
        .map(|n| json!({"addresses": [format!("10.0.0.{n}")], "nodeName": format!("n{}", n % 2), "conditions": {"ready": true}}))
        .collect();
    json!({
        "metadata": {"name": format!("s{service}-1"), "namespace": "x",
            "labels": {"kubernetes.io/service-name": format!("s{service}")}},
        "addressType": "IPv4",
        "ports": [{"port": 8080 + u16::from(port)}],
        "endpoints": endpoints,
    })
}

fn policy(name: u8, label: u8, port: u8) -> Value {
    json!({
        "metadata": {"name": format!("r{name}"), "namespace": "x"},
        "spec": {
            "podSelector": {"matchLabels": {"app": format!("a{label}")}},
            "ingress": [{
                "from": [{"podSelector": {"matchLabels": {"app": format!("a{}", port % 3)}}}, {"ipBlock": {"cidr": "192.0.2.0/24"}}],
                "ports": [{"port": u16::from(port), "endPort": u16::from(port) + 2}],
            }],
        },
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn s29_every_change_of_a_cluster_is_taken(happenings in prop::collection::vec(happening(), 1..60)) {
        let mut cluster = Cluster::new();
        for it in happenings {
            cluster.happen(it)?;
        }
        cluster.tell()?;
        // A guest that comes back with nothing takes all of it at once.
        let all = cluster.desired.take_all();
        let outcome = take(&mut Bench::empty(Capacity::TINY), &all);
        prop_assert!(outcome.is_whole(), "{outcome:?} to {all:#?}");
    }
}

/// Endpoints in the order of their addresses take each other's places when one comes or goes before them.
#[test]
fn s29_an_endpoint_that_comes_and_goes_moves_the_others() {
    let mut cluster = Cluster::new();
    cluster
        .happen(Happening::Service {
            name: 0,
            address: 0,
            shape: 0,
        })
        .unwrap();
    for ready in [
        &[1, 2, 3, 4][..],
        &[2, 3, 4],
        &[1, 2, 3, 4],
        &[4, 3, 2, 1],
        &[3],
        &[],
    ] {
        let ready = ready.to_vec();
        cluster
            .happen(Happening::Slice {
                service: 0,
                ready,
                port: 0,
            })
            .unwrap();
        cluster.tell().unwrap();
    }
}
