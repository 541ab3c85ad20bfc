//! What the model costs at the sizes that features.md asks for (S-29, N-18). Prints; asserts nothing about time.
//!
//! `cargo bench -p sluice-model` for all, `cargo bench -p sluice-model -- services` for a part.
// row: N-18 (printed, not asserted)
#![expect(
    clippy::unwrap_used,
    reason = "a measurement ends where its ground is not as it expects"
)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use sluice_appliance::Arena;
use sluice_appliance::hash::Hasher;
use sluice_appliance::policy::{Limits, Policy, Query};
use sluice_contract::policy::Direction;
use sluice_contract::{Identity, LinkId, Protocol, Row};
use sluice_model::compile::{Attached, Config, Maglev, Model};
use sluice_model::diff::Step;
use sluice_model::object::{
    AddressFamily, Affinity, Endpoint, EndpointSlice, Kind, Labels, Name, NamedPort, Namespace,
    NetworkPolicy, Object, Operator, Peer, Pod, PodSelector, PolicyPort, Port, Requirement, Rule,
    Selector, Service, ServicePort, TargetPort, TrafficPolicy,
};
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|it| !it.starts_with('-'))
        .collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|it| it == name);
    if is_wanted("node") {
        node();
    }
    if is_wanted("services") {
        services(10_000, 10, Maglev::External);
        services(10_000, 10, Maglev::Always);
    }
    if is_wanted("policies") {
        policies(5_000, 150_000, 110);
    }
    if is_wanted("large") {
        policies(20_000, 500_000, 1_000);
    }
}

/// Resident memory of this process, in MiB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|it| it.starts_with("VmRSS:")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let done = work();
    say(what, begin.elapsed());
    done
}

fn say(what: &str, time: Duration) {
    println!("  {what:<58} {:>10.3} ms", time.as_secs_f64() * 1e3);
}

/// The median of several runs of a change.
fn median(what: &str, mut change: impl FnMut(usize)) {
    let mut times: Vec<Duration> = (0..21)
        .map(|n| {
            let begin = Instant::now();
            change(n);
            begin.elapsed()
        })
        .collect();
    times.sort();
    say(&format!("{what} (median of 21)"), times[10]);
    say(&format!("{what} (slowest)"), times[20]);
}

fn address(base: [u8; 2], n: usize) -> IpAddr {
    let [_, _, _, _, _, a, b, c] = (n as u64).to_be_bytes();
    IpAddr::V4(Ipv4Addr::from(u32::from_be_bytes([
        base[0],
        base[1] + a,
        b,
        c,
    ])))
}

fn labels(pairs: &[(&str, String)]) -> Arc<Labels> {
    let pairs = pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()));
    Arc::new(pairs.collect())
}

fn is(key: &str, value: String) -> Selector {
    let operator = Operator::In(vec![value]);
    Selector::new([Requirement {
        key: key.into(),
        operator,
    }])
}

fn service(n: usize) -> Service {
    Service {
        name: Name::new(&format!("ns-{}", n % 100), &format!("service-{n}")),
        cluster_ips: vec![address([10, 96], n)],
        age: sluice_model::object::Age::default(),
        external_ips: Vec::new(),
        load_balancer: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            target: TargetPort::Number(8080),
            node_port: None,
        }],
        affinity: Affinity::None,
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        forwarding: None,
        health_check_port: None,
        selector: BTreeMap::new(),
        publish_not_ready: false,
    }
}

fn slice(n: usize, endpoints: usize, first_is_ready: bool) -> EndpointSlice {
    let service = service(n).name;
    let endpoints = (0..endpoints).map(|it| Endpoint {
        address: address([10, 0], n * endpoints + it),
        ready: it > 0 || first_is_ready,
        serving: it > 0 || first_is_ready,
        terminating: false,
        node: Some(format!("node-{}", (n * endpoints + it) % 500).into()),
        zone: None,
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
    });
    EndpointSlice {
        name: Name::new(&service.namespace, &format!("{}-1", service.name)),
        service: Some(service.name.clone()),
        family: AddressFamily::V4,
        ports: vec![sluice_model::object::SlicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: endpoints.collect(),
    }
}

fn services(count: usize, each: usize, maglev: Maglev) {
    println!(
        "{count} services × {} endpoints, Maglev {maglev:?}",
        count * each
    );
    let config = Config {
        node: "node-1".into(),
        maglev,
        ..Config::default()
    };
    let mut model = Model::new(&config, []);
    let before = resident();
    for n in 0..count {
        model.apply(Event::Put(Object::Service(service(n))));
        model.apply(Event::Put(Object::EndpointSlice(slice(n, each, true))));
    }
    timed("compile", || model.compile());
    let steps = timed("delta", || model.tables().take_delta().len());
    println!(
        "  rows {steps}, memory of store and tables {:.1} MiB",
        resident() - before
    );
    median("one endpoint not ready, compile and delta", |n| {
        model.apply(Event::Put(Object::EndpointSlice(slice(n, each, false))));
        model.compile();
        assert!(!model.tables().take_delta().is_empty());
    });
}

fn pod(n: usize, namespaces: usize, label_sets: usize) -> Pod {
    let app = n % label_sets;
    let ports: Arc<[NamedPort]> = Arc::from([NamedPort {
        name: "http".into(),
        protocol: Protocol::Tcp,
        port: 8080,
    }]);
    Pod {
        name: Name::new(&format!("ns-{}", app % namespaces), &format!("pod-{n}")),
        labels: labels(&[
            ("app", format!("app-{app}")),
            ("tier", format!("tier-{}", app % 3)),
            ("pod-template-hash", format!("{app:x}")),
        ]),
        node: Some(format!("node-{}", n % 1000).into()),
        addresses: vec![address([10, 0], n)],
        ports,
        host_network: false,
        ended: false,
        ready: true,
        terminating: false,
        address_pool: None,
        egress_dscp: None,
        rates: Default::default(),
    }
}

/// A policy for one application: in from another one on a port, from a team's namespaces, from a block.
fn network_policy(n: usize, namespaces: usize, label_sets: usize, port: u16) -> NetworkPolicy {
    let app = n % label_sets;
    let namespace = app % namespaces;
    let friend = (app + namespaces) % label_sets;
    let own = |app: usize| PodSelector {
        namespaces: None,
        pods: is("app", format!("app-{app}")),
    };
    let team = PodSelector {
        namespaces: Some(is("team", format!("team-{}", n % 20))),
        pods: is("tier", "tier-1".into()),
    };
    let ports = |port| {
        vec![PolicyPort {
            protocol: Protocol::Tcp,
            port: Port::Range(port, port),
        }]
    };
    NetworkPolicy {
        name: Name::new(&format!("ns-{namespace}"), &format!("policy-{n}")),
        pods: is("app", format!("app-{app}")),
        ingress: Some(vec![
            Rule {
                peers: vec![Peer::Pods(own(friend))],
                ports: ports(port),
            },
            Rule {
                peers: vec![Peer::Pods(team)],
                ports: ports(9090),
            },
        ]),
        egress: None,
    }
}

fn policies(policies: usize, pods: usize, local: usize) {
    let (namespaces, label_sets) = (500, 5_000);
    println!("{policies} policies, {pods} pods in {label_sets} groups, {local} of them here");
    let mut model = Model::new(&Config::default(), []);
    let before = resident();
    for n in 0..namespaces {
        let name = format!("ns-{n}");
        let labels = labels(&[
            ("kubernetes.io/metadata.name", name.clone()),
            ("team", format!("team-{}", n % 20)),
        ]);
        model.apply(Event::Put(Object::Namespace(Namespace {
            name: Name::new("", &name),
            labels,
            address_pool: None,
            egress_dscp: None,
        })));
    }
    timed("store", || {
        for n in 0..pods {
            model.apply(Event::Put(Object::Pod(pod(n, namespaces, label_sets))));
        }
        for n in 0..policies {
            model.apply(Event::Put(Object::NetworkPolicy(network_policy(
                n, namespaces, label_sets, 8080,
            ))));
        }
    });
    println!("  memory of the store {:.1} MiB", resident() - before);
    for n in 0..local {
        let pod = pod(n, namespaces, label_sets);
        let attached = Attached {
            pod: pod.name,
            addresses: pod.addresses,
        };
        model.attach(LinkId::new(LinkId::FIRST_POD + n as u16).unwrap(), attached);
    }
    timed("compile everything", || model.compile());
    let rows = timed("all rows", || model.tables().take_delta().len());
    let counts = model.tables().counts();
    println!("  rows {rows}: {counts:?}");
    println!(
        "  memory of store, compiler and tables {:.1} MiB",
        resident() - before
    );
    median("one policy of a local pod changes", |n| {
        let policy = network_policy(n, namespaces, label_sets, 8000 + n as u16);
        model.apply(Event::Put(Object::NetworkPolicy(policy)));
        model.compile();
        assert!(!model.tables().take_delta().is_empty());
    });
    median("a remote pod gets a new label", |n| {
        let mut it = pod(local + n, namespaces, label_sets);
        it.labels = labels(&[
            ("app", format!("app-{}", n % local)),
            ("version", format!("v{n}")),
        ]);
        model.apply(Event::Put(Object::Pod(it)));
        model.compile();
        assert!(!model.tables().take_delta().is_empty());
    });
    median("a namespace moves to another team", |n| {
        let name = format!("ns-{n}");
        let labels = labels(&[
            ("kubernetes.io/metadata.name", name.clone()),
            ("team", format!("team-{}", (n + 1) % 20)),
        ]);
        model.apply(Event::Put(Object::Namespace(Namespace {
            name: Name::new("", &name),
            labels,
            address_pool: None,
            egress_dscp: None,
        })));
        model.compile();
        assert!(!model.tables().take_delta().is_empty());
    });
    guest(&mut model, pods, local);
}

fn guest(model: &mut Model, pods: usize, local: usize) {
    let counts = model.tables().counts();
    let limits = Limits {
        identities: counts.identities,
        bindings: counts.bindings,
        rulesets: counts.rulesets,
        classes: counts.classes,
        spans: counts.spans,
        names: counts.names,
        named: counts.named,
    };
    let mut region = vec![0u8; limits.bytes()];
    let mut policy =
        Policy::new(&mut Arena::new(&mut region), &limits, Hasher::new([7; 16])).unwrap();
    let rows: Vec<Step> = model.tables().all().map(Step::Put).collect();
    policy.begin(false).unwrap();
    let begin = Instant::now();
    for step in &rows {
        if let Step::Put(Row::Policy(row)) = step {
            policy.put(row).unwrap();
        }
    }
    let each = begin.elapsed().as_nanos() / rows.len() as u128;
    policy.commit();
    let mut slowest = Duration::ZERO;
    loop {
        let begin = Instant::now();
        let done = policy.settle(2_000);
        slowest = slowest.max(begin.elapsed());
        if done {
            break;
        }
    }
    println!(
        "  guest: tables of {:.1} MiB, {each} ns a row put",
        limits.bytes() as f64 / 1_048_576.0
    );
    say("guest: slowest settling slice of 2000 slots", slowest);
    // Questions from anywhere to anywhere, in an order that no cache can guess.
    let questions: Vec<Query> = (0..200_000usize)
        .map(|n| {
            let mixed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Query {
                link: LinkId::new(LinkId::FIRST_POD + ((mixed >> 40) % local) as u16).unwrap(),
                direction: Direction::Ingress,
                peer: Identity::WORLD,
                peer_address: address([10, 0], (mixed >> 20) % pods),
                protocol: Some(Protocol::Tcp),
                port: if n % 2 == 0 { 8080 } else { 9090 },
            }
        })
        .collect();
    let begin = Instant::now();
    let mut accepted = 0;
    for query in &questions {
        let peer = policy.identity_of(query.peer_address);
        accepted += usize::from(black_box(policy.judge(&Query { peer, ..*query })).accepted);
    }
    let both = begin.elapsed().as_nanos() as f64 / questions.len() as f64;
    let known: Vec<Query> = questions
        .iter()
        .map(|it| Query {
            peer: policy.identity_of(it.peer_address),
            ..*it
        })
        .collect();
    let begin = Instant::now();
    for query in &known {
        black_box(policy.judge(query));
    }
    let judged = begin.elapsed().as_nanos() as f64 / known.len() as f64;
    println!(
        "  guest: {judged:.0} ns a verdict, {both:.0} ns with the peer's identity; {accepted} of {} accepted",
        questions.len()
    );
}

/// A node of a cluster of 5 000 pods, objects as they come from the API server.
fn node() {
    println!("5 000 pods, as JSON from the API server");
    let before = resident();
    let mut model = Model::new(&Config::default(), []);
    let begin = Instant::now();
    for n in 0..5_000 {
        let value = json!({
            "metadata": {"name": format!("pod-{n}"), "namespace": format!("ns-{}", n % 50), "uid": format!("{n:032x}"),
                "labels": {"app": format!("app-{}", n % 250), "pod-template-hash": "5d4f8c7b9"},
                "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {"f:conditions": {}, "f:podIP": {}}}}]},
            "spec": {"nodeName": format!("node-{}", n % 100), "containers": [{"name": "c", "image": "registry.example/app:1",
                "ports": [{"name": "http", "containerPort": 8080}], "env": [{"name": "A", "value": "b"}],
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}]},
            "status": {"phase": "Running", "podIP": address([10, 0], n).to_string(),
                "conditions": [{"type": "Ready", "status": "True"}]},
        });
        model.apply(Event::Put(admit_as(Kind::Pod, value).object.unwrap()));
    }
    say("validated and stored", begin.elapsed());
    timed("compile", || model.compile());
    println!(
        "  rows {}, memory {:.1} MiB, whole process {:.1} MiB",
        model.tables().take_delta().len(),
        resident() - before,
        resident()
    );
}
