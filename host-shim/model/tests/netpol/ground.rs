//! The cluster of the tests: namespaces x, y, z with pods a, b, c, as the reference and as the compiled tables see it.

use std::net::IpAddr;

use serde_json::{Value, json};
use sluice_appliance::Arena;
use sluice_appliance::hash::Hasher;
use sluice_appliance::policy::{Limits, Policy, Query};
use sluice_contract::policy::{Direction, Established};
use sluice_contract::{Identity, LinkId, Protocol};
use sluice_model::compile::{Attached, Config, Model};
use sluice_model::diff::Step;
use sluice_model::object::{Kind, Name};
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

use crate::reference::{Connection, End, Pod, World};

pub(crate) const PROTOCOLS: [(&str, Protocol); 3] = [
    ("TCP", Protocol::Tcp),
    ("UDP", Protocol::Udp),
    ("SCTP", Protocol::Sctp),
];

/// The nine pods. Each serves 80 and 81 in each protocol, under names such as `serve-81-udp`.
pub(crate) fn world() -> World {
    let outside = ["192.0.2.7", "10.0.1.77", "172.16.0.1"];
    let mut world = World {
        outside: outside.map(|it| it.parse().unwrap()).to_vec(),
        ..World::default()
    };
    for (n, namespace) in ["x", "y", "z"].into_iter().enumerate() {
        let labels = json!({"ns": namespace, "kubernetes.io/metadata.name": namespace});
        world.namespaces.push((namespace.into(), labels));
        for (p, pod) in ["a", "b", "c"].into_iter().enumerate() {
            let ports: Vec<Value> = PROTOCOLS
                .iter()
                .flat_map(|(name, _)| {
                    [80, 81].map(|port| {
                        let label = format!("serve-{port}-{}", name.to_lowercase());
                        json!({"containerPort": port, "protocol": name, "name": label})
                    })
                })
                .collect();
            let ip = format!("10.0.{}.{}", n + 1, p + 1);
            world.pods.push(Pod {
                namespace: namespace.into(),
                ip: ip.parse().unwrap(),
                manifest: json!({
                    "metadata": {"name": pod, "namespace": namespace, "labels": {"pod": pod}},
                    "spec": {"nodeName": "node", "containers": [{"name": "c", "ports": ports}]},
                    "status": {"podIP": ip},
                }),
            });
        }
    }
    world
}

/// A policy of a namespace.
pub(crate) fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

/// A cluster-wide one.
pub(crate) fn cluster_policy(name: &str, spec: Value) -> Value {
    json!({"metadata": {"name": name}, "spec": spec})
}

/// What a source would say about all of the world.
pub(crate) fn events(world: &World) -> Vec<Event> {
    let mut events = Vec::new();
    let mut put = |kind, value: &Value| {
        let admission = admit_as(kind, value.clone());
        let object = admission.object;
        events.push(Event::Put(
            object.unwrap_or_else(|| panic!("{:#?}\n{value:#}", admission.findings)),
        ));
    };
    for (name, labels) in &world.namespaces {
        put(
            Kind::Namespace,
            &json!({"metadata": {"name": name, "labels": labels}}),
        );
    }
    for node in &world.nodes {
        put(Kind::Node, node);
    }
    for pod in &world.pods {
        put(Kind::Pod, &pod.manifest);
    }
    for policy in &world.policies {
        put(Kind::NetworkPolicy, policy);
    }
    for policy in &world.cluster_policies {
        put(Kind::ClusterNetworkPolicy, policy);
    }
    events
}

/// The model of a world all of whose pods are on this node, pod `n` behind link `16 + n`.
pub(crate) fn model(world: &World) -> Model {
    let mut model = empty_model();
    for event in events(world) {
        model.apply(event);
    }
    attach_all(world, &mut model);
    model.compile();
    model
}

pub(crate) fn empty_model() -> Model {
    let config = Config {
        established: Established::Kept,
        ..Config::default()
    };
    Model::new(&config, [])
}

pub(crate) fn attach_all(world: &World, model: &mut Model) {
    for (n, pod) in world.pods.iter().enumerate() {
        let name = Name::new(
            &pod.namespace,
            pod.manifest["metadata"]["name"].as_str().unwrap(),
        );
        let attached = Attached {
            pod: name,
            addresses: vec![pod.ip],
        };
        model.attach(link(n), attached);
    }
}

pub(crate) fn link(pod: usize) -> LinkId {
    LinkId::new(LinkId::FIRST_POD + pod as u16).unwrap()
}

/// What the guest needs for tests of this size.
pub(crate) const LIMITS: Limits = Limits {
    identities: 64,
    bindings: 32,
    rulesets: 64,
    classes: 512,
    spans: 2048,
    names: 64,
    named: 64,
};
pub(crate) const REGION: usize = 4 << 20;

/// A guest's tables that got steps.
pub(crate) fn commit(policy: &mut Policy<'_>, fresh: bool, steps: &[Step]) {
    policy.begin(fresh).unwrap();
    while !policy.settle(1000) {}
    for step in steps {
        match step {
            Step::Put(sluice_contract::Row::Policy(row)) => policy.put(row).unwrap(),
            Step::Remove(sluice_contract::Key::Policy(key)) => policy.remove(key).unwrap(),
            _ => {}
        }
    }
    policy.commit();
    while !policy.settle(1000) {}
}

/// Runs `work` on a guest's tables that were told everything.
pub(crate) fn with_guest<T>(model: &mut Model, work: impl FnOnce(&mut Policy<'_>) -> T) -> T {
    let mut region = vec![0u8; REGION];
    let mut policy =
        Policy::new(&mut Arena::new(&mut region), &LIMITS, Hasher::new([7; 16])).unwrap();
    let all: Vec<Step> = model.tables().all().map(Step::Put).collect();
    model.tables().forget_changes();
    commit(&mut policy, true, &all);
    work(&mut policy)
}

/// Both directions, as the pipeline asks.
pub(crate) fn guest_allows(
    policy: &Policy<'_>,
    world: &World,
    it: &Connection<'_>,
    protocol: Protocol,
) -> bool {
    let index = |end: End<'_>| match end {
        End::Pod(pod) => world.pods.iter().position(|it| it.ip == pod.ip),
        End::Outside(_) => None,
    };
    let address = |end: End<'_>| match end {
        End::Pod(pod) => pod.ip,
        End::Outside(ip) => ip,
    };
    let ask = |end, peer, direction| {
        index(end).is_none_or(|n| {
            let peer_address: IpAddr = address(peer);
            let query = Query {
                link: link(n),
                direction,
                peer: policy.identity_of(peer_address),
                peer_address,
                protocol: Some(protocol),
                port: it.port,
            };
            policy.judge(&query).accepted
        })
    };
    ask(it.from, it.to, Direction::Egress) && ask(it.to, it.from, Direction::Ingress)
}

/// All ends: the pods, an address outside, a node.
pub(crate) fn ends(world: &World) -> Vec<End<'_>> {
    let outside = world.outside.iter().copied().map(End::Outside);
    world.pods.iter().map(End::Pod).chain(outside).collect()
}

/// Every cell on which reference and tables differ. Pods to themselves are left out: no policy is asked about those.
pub(crate) fn differences(world: &World, policy: &Policy<'_>, ports: &[u16]) -> Vec<String> {
    let mut differences = Vec::new();
    for from in ends(world) {
        for to in ends(world) {
            if matches!((from, to), (End::Pod(a), End::Pod(b)) if a.ip == b.ip) {
                continue;
            }
            for (name, protocol) in PROTOCOLS {
                for port in ports {
                    let connection = Connection {
                        from,
                        to,
                        protocol: name,
                        port: *port,
                    };
                    let expected = world.allows(&connection);
                    if guest_allows(policy, world, &connection, protocol) != expected {
                        differences.push(format!(
                            "{} → {}:{port}/{name}: reference {expected}",
                            say(from),
                            say(to)
                        ));
                    }
                }
            }
        }
    }
    differences
}

pub(crate) fn say(end: End<'_>) -> String {
    match end {
        End::Pod(pod) => format!(
            "{}/{}",
            pod.namespace,
            pod.manifest["metadata"]["name"].as_str().unwrap()
        ),
        End::Outside(ip) => ip.to_string(),
    }
}

/// The node's own word always gets through.
pub(crate) fn host_reaches(policy: &Policy<'_>, pod: usize) -> bool {
    let query = Query {
        link: link(pod),
        direction: Direction::Ingress,
        peer: Identity::HOST,
        peer_address: "172.16.0.9".parse().unwrap(),
        protocol: Some(Protocol::Tcp),
        port: 80,
    };
    policy.judge(&query).accepted
}
