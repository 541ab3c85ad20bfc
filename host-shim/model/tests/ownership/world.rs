//! Random objects of two namespaces, and what becomes of packets to the addresses of one of them.
//!
//! Bytes choose the objects, so that a property test and a fuzz target make worlds in one way. The rows that follow go to the
//! appliance's own tables, once with the objects of `b` alone and once with those of `a` besides; packets to addresses that
//! `a` does not own have to end alike, to the byte.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde_json::{Value, json};
use sluice_appliance::apply::Outcome;
use sluice_appliance::frame::{Frame, Offload};
use sluice_appliance::tables::Capacity;
use sluice_appliance::testing::node::{HOST, NODE_MAC, ROUTER_MAC, UPLINK, ip, packet, prefix};
use sluice_appliance::testing::{BUFFER, Bench, HEADROOM};
use sluice_appliance::wire::tcp;
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow,
};
use sluice_contract::row::{LinkRow, RouteRow};
use sluice_contract::{Generation, Identity, Key, LinkId, Mac, Row, ToGuest};
use sluice_model::compile::{AddressPlan, Attached, Config, Model};
use sluice_model::diff::Step;
use sluice_model::object::{Kind, Name, Object, Prefix};
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

const HERE: &str = "172.16.0.1";
const THERE: &str = "172.16.0.2";
const TUNNEL_PORT: u16 = 8472;
/// The pods that have a link: of `b`, of `a`, and of neither.
const LINKED: [(u16, &str, &str, &str); 3] = [
    (16, "b", "p1", "10.0.0.5"),
    (17, "a", "evil", "10.0.0.6"),
    (18, "c", "client", "10.0.0.7"),
];
const REMOTE_POD: &str = "10.0.1.5";
/// Of pods that may come, here and there.
const FREE: [&str; 2] = ["10.0.0.77", "10.0.1.77"];
/// What `b` may have from outside; a load balancer's controller gives the second half to `b` alone.
const EXTERNAL: [&str; 2] = ["198.51.100.1", "198.51.100.2"];
const BALANCED: [&str; 2] = ["198.51.100.11", "198.51.100.12"];
const CLUSTER: [&str; 3] = ["10.96.0.10", "10.96.0.11", "10.96.0.12"];
/// Of the range of ClusterIPs, and no Service's.
const UNALLOCATED: &str = "10.96.0.99";
const OUTSIDE: &str = "203.0.113.9";
const NODE_PORTS: [u16; 2] = [30080, 30081];
const PORTS: [u16; 4] = [80, 53, 443, 10250];

/// Bytes as choices; when they are used up, always the first.
pub(crate) struct Choices<'a>(pub(crate) &'a [u8]);

impl Choices<'_> {
    fn below(&mut self, count: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        usize::from(*first) % count.max(1)
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        let index = self.below(all.len());
        all[index]
    }

    fn maybe(&mut self) -> bool {
        self.below(3) == 1
    }

    fn some<T: Copy>(&mut self, all: &[T], most: usize) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| self.of(all)).collect()
    }
}

/// The objects of a namespace.
pub(crate) type Objects = Vec<(Kind, Value)>;

/// Nodes and pods, which neither namespace writes.
fn ground() -> Objects {
    let node = |name: &str, address: &str, cidr: &str| {
        let addresses = json!([{"type": "InternalIP", "address": address}]);
        (
            Kind::Node,
            json!({"metadata": {"name": name}, "spec": {"podCIDRs": [cidr]}, "status": {"addresses": addresses}}),
        )
    };
    let pod = |namespace: &str, name: &str, address: &str, host: bool| {
        (
            Kind::Pod,
            json!({
                "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
                "spec": {"hostNetwork": host, "containers": []},
                "status": {"podIP": address, "podIPs": [{"ip": address}]},
            }),
        )
    };
    let mut all = vec![
        node("here", HERE, "10.0.0.0/24"),
        node("there", THERE, "10.0.1.0/24"),
        pod("b", "p2", REMOTE_POD, false),
        pod("b", "agent", THERE, true),
    ];
    all.extend(LINKED.map(|(_, namespace, name, address)| pod(namespace, name, address, false)));
    all
}

fn service(
    namespace: &str,
    name: &str,
    age: usize,
    spec: Value,
    balanced: &[&str],
) -> (Kind, Value) {
    let ingress: Vec<Value> = balanced.iter().map(|it| json!({"ip": it})).collect();
    (
        Kind::Service,
        json!({
            "metadata": {
                "name": name, "namespace": namespace, "uid": format!("{namespace}-{name}"),
                "creationTimestamp": format!("2026-01-01T00:00:{age:02}Z"),
            },
            "spec": spec,
            "status": {"loadBalancer": {"ingress": ingress}},
        }),
    )
}

fn slice(namespace: &str, name: &str, of: &str, port: u16, addresses: &[&str]) -> (Kind, Value) {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|it| json!({"addresses": [it]}))
        .collect();
    let ports =
        json!([{"port": port, "protocol": "TCP"}, {"name": "u", "port": port, "protocol": "UDP"}]);
    (
        Kind::EndpointSlice,
        json!({
            "metadata": {
                "name": name, "namespace": namespace,
                "labels": {"kubernetes.io/service-name": of, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
            },
            "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
        }),
    )
}

fn ports(port: u16, node_port: Option<u16>) -> Value {
    let mut ports = vec![
        json!({"port": port, "protocol": "TCP"}),
        json!({"name": "u", "port": port, "protocol": "UDP"}),
    ];
    if let Some(node_port) = node_port {
        ports[0]["nodePort"] = node_port.into();
    }
    Value::Array(ports)
}

/// What `b` has, and which addresses and node ports it got by it.
pub(crate) struct Victim {
    pub(crate) objects: Objects,
    addresses: Vec<&'static str>,
    node_port: bool,
}

pub(crate) fn victim(choices: &mut Choices<'_>) -> Victim {
    let mut victim = Victim {
        objects: Vec::new(),
        addresses: Vec::new(),
        node_port: choices.maybe(),
    };
    for (index, name) in ["s0", "s1", "s2"].into_iter().enumerate() {
        if index > 0 && choices.maybe() {
            continue;
        }
        let external = if index < 2 && choices.maybe() {
            &EXTERNAL[index..=index]
        } else {
            &[]
        };
        let balanced = if index < 2 && choices.maybe() {
            &BALANCED[index..=index]
        } else {
            &[]
        };
        let node_port = (index == 0 && victim.node_port).then_some(NODE_PORTS[0]);
        let spec = json!({
            "clusterIP": CLUSTER[index], "externalIPs": external, "ports": ports(80, node_port),
            "externalTrafficPolicy": if choices.maybe() { "Local" } else { "Cluster" },
        });
        victim
            .objects
            .push(service("b", name, index, spec, balanced));
        let endpoints = choices.some(&["10.0.0.5", REMOTE_POD, THERE], 3);
        let named = format!("{name}-x");
        victim
            .objects
            .push(slice("b", &named, name, 8080, &endpoints));
        victim.addresses.push(CLUSTER[index]);
        victim.addresses.extend(external.iter().chain(balanced));
    }
    victim
}

/// Whatever whoever may write all objects of `a` could write. Controllers give ClusterIPs, node ports and load balancers'
/// addresses as they do: only what they would never give is left out.
pub(crate) fn attacker(choices: &mut Choices<'_>) -> Objects {
    let wanted: Vec<&str> = [
        HERE,
        THERE,
        "10.0.0.5",
        REMOTE_POD,
        UNALLOCATED,
        OUTSIDE,
        "239.1.1.1",
    ]
    .into_iter()
    .chain(FREE)
    .chain(EXTERNAL)
    .chain(BALANCED)
    .chain(CLUSTER)
    .chain(["255.255.255.255", "127.0.0.1", "198.51.100.200"])
    .collect();
    let balanced = [
        "198.51.100.201",
        BALANCED[0],
        CLUSTER[0],
        HERE,
        THERE,
        FREE[0],
        FREE[1],
    ];
    let inside = [
        "10.96.0.50",
        "10.96.0.51",
        CLUSTER[0],
        CLUSTER[1],
        HERE,
        FREE[0],
        FREE[1],
    ];
    let mut objects = Vec::new();
    for (index, name) in ["s0", "s1", "aaa", "zzz"].into_iter().enumerate() {
        if index > 0 && choices.maybe() {
            continue;
        }
        let node_port = choices.maybe().then(|| choices.of(&NODE_PORTS));
        let mut spec = json!({
            "clusterIP": choices.of(&inside),
            "externalIPs": choices.some(&wanted, 6),
            "ports": ports(choices.of(&PORTS), node_port),
        });
        if choices.maybe() {
            spec["externalTrafficPolicy"] = "Local".into();
            spec["sessionAffinity"] = "ClientIP".into();
        }
        let balanced = choices.some(&balanced, 2);
        objects.push(service("a", name, 10 + index, spec, &balanced));
        let port = choices.of(&[8080, 10250, TUNNEL_PORT, 4789]);
        let to = [
            "10.0.0.6",
            "10.0.0.5",
            HERE,
            THERE,
            CLUSTER[0],
            "224.0.0.1",
            "169.254.169.254",
        ];
        let endpoints = choices.some(&to, 4);
        let of = choices.of(&[name, "s0", "kubernetes"]);
        objects.push(slice("a", &format!("{name}-x"), of, port, &endpoints));
    }
    if choices.maybe() {
        let spec = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
        let metadata = json!({"name": "deny", "namespace": "a"});
        objects.push((
            Kind::NetworkPolicy,
            json!({"metadata": metadata, "spec": spec}),
        ));
    }
    objects
}

/// Which external addresses the configuration lists.
pub(crate) fn config(choices: &mut Choices<'_>) -> Config {
    let range = |text: &str| {
        let (address, length) = text.split_once('/').unwrap();
        Prefix::new(ip(address), length.parse().unwrap()).unwrap()
    };
    let external: &[&str] = choices.of(&[&[][..], &["198.51.100.0/24"], &["0.0.0.0/0"]]);
    Config {
        node: "here".into(),
        addresses: AddressPlan {
            external: external.iter().map(|it| range(it)).collect(),
            services: vec![range("10.96.0.0/16")],
            ..AddressPlan::default()
        },
        ..Config::default()
    }
}

fn read((kind, value): &(Kind, Value)) -> Option<Object> {
    admit_as(*kind, value.clone()).object
}

/// A model that got objects in that order.
pub(crate) fn model<'a>(
    config: &Config,
    objects: impl Iterator<Item = &'a (Kind, Value)>,
) -> Model {
    let mut model = Model::new(config, []);
    for (link, namespace, name, address) in LINKED {
        let (pod, addresses) = (Name::new(namespace, name), vec![ip(address)]);
        model.attach(LinkId::new(link).unwrap(), Attached { pod, addresses });
    }
    let ground = ground();
    let ground = ground.iter().filter_map(read);
    for object in ground.chain(objects.filter_map(read)) {
        model.apply(Event::Put(object));
    }
    model.apply(Event::InSync);
    model.compile();
    model
}

/// Puts objects, one change each, and takes them away again.
pub(crate) fn come_and_go(model: &mut Model, objects: &Objects) -> BTreeMap<Key, Row> {
    for object in objects.iter().filter_map(read) {
        model.apply(Event::Put(object));
        model.compile();
    }
    let with = rows(model);
    for object in objects.iter().rev().filter_map(read) {
        model.apply(Event::Removed(object.key()));
        model.compile();
    }
    with
}

pub(crate) fn rows(model: &mut Model) -> BTreeMap<Key, Row> {
    let all = model.tables().all();
    all.map(|row| (row.key(), row)).collect()
}

/// The rows of the node itself.
fn node_rows(model: &Model) -> Vec<Row> {
    let link = |id: u16, mac, addresses: &[&str], identity| {
        Row::Link(LinkRow {
            id: LinkId::new(id).unwrap(),
            mac,
            addresses: addresses.iter().map(|it| ip(it)).collect(),
            mtu: 1500,
            identity,
            incarnation: 1,
            tenant: sluice_contract::Tenant::NONE,
        })
    };
    let hop = |id, address, mac| {
        let (id, address, mac) = (NextHopId(id), ip(address), Some(mac));
        Row::Overlay(OverlayRow::NextHop(NextHopRow { id, address, mac }))
    };
    let remote = |text| {
        let (prefix, peer) = (prefix(text), PeerId(3));
        Row::Overlay(OverlayRow::Remote(RemoteRow { prefix, peer }))
    };
    let host = Mac([2, 0, 0, 0, 0, 2]);
    let mut rows = vec![
        link(HOST, host, &[HERE], Identity::HOST),
        link(UPLINK, NODE_MAC, &[], Identity::WORLD),
        Row::Overlay(OverlayRow::Tunnel(TunnelRow {
            port: TUNNEL_PORT,
            source4: Some([172, 16, 0, 1].into()),
            mac: NODE_MAC,
            ..TunnelRow::default()
        })),
        hop(0, "192.0.2.254", ROUTER_MAC),
        hop(1, THERE, Mac([2, 0, 0, 0, 1, 0x12])),
        Row::Overlay(OverlayRow::Peer(PeerRow {
            id: PeerId(3),
            address: ip(THERE),
            mac: Mac([2, 0, 0, 0, 1, 0x12]),
            next_hop: NextHopId(1),
            mtu: 1500,
            direct: true,
        })),
        remote("10.0.1.0/24"),
        remote("172.16.0.2/32"),
        Row::Route(RouteRow {
            prefix: prefix("0.0.0.0/0"),
            next_hop: Some(NextHopId(0)),
        }),
    ];
    rows.extend(LINKED.map(|(id, _, _, address)| {
        let number = LinkId::new(id).unwrap();
        let identity = model.identity(number).unwrap();
        link(id, Mac::of_pod(number), &[address], identity)
    }));
    rows
}

/// How a packet ended: the verdict, and the bytes that leave.
type Ended = (String, Vec<u8>);

thread_local! {
    /// One for each of two worlds: a fixture's memory is never given back.
    static NODES: RefCell<[Option<(Bench, u64)>; 2]> = const { RefCell::new([None, None]) };
}

/// What becomes of packets on a node with the tables of that model, all of which it has to take.
pub(crate) fn endings(which: usize, model: &mut Model, packets: &[(u16, Vec<u8>)]) -> Vec<Ended> {
    NODES.with_borrow_mut(|nodes| {
        let capacity = Capacity::TINY;
        let (bench, generation) = nodes[which].get_or_insert_with(|| (Bench::empty(capacity), 0));
        *generation += 1;
        let now = Generation(*generation);
        let begin = ToGuest::Begin {
            generation: now,
            fresh: true,
        };
        let steps = model
            .tables()
            .take_delta()
            .into_iter()
            .map(|step| match step {
                Step::Put(row) => ToGuest::Put(row),
                Step::Remove(key) => ToGuest::Remove(key),
            });
        let messages = [begin].into_iter().chain(steps);
        let messages = messages.chain(node_rows(model).into_iter().map(ToGuest::Put));
        let mut last = Outcome::Noted;
        for message in messages.chain([ToGuest::Commit { generation: now }]) {
            while !bench.pipeline.work(64) {}
            last = bench.pipeline.configure(&message);
            let refused = matches!(last, Outcome::Refused(..));
            assert!(!refused, "the appliance refuses {message:?}: {last:?}");
        }
        assert!(last.is_whole(), "{last:?}");
        while !bench.pipeline.work(64) {}
        packets
            .iter()
            .map(|(link, bytes)| ending(bench, *link, bytes))
            .collect()
    })
}

fn ending(bench: &mut Bench, link: u16, bytes: &[u8]) -> Ended {
    let mut buffer = vec![0u8; BUFFER];
    let end = HEADROOM + bytes.len();
    buffer[HEADROOM..end].copy_from_slice(bytes);
    let link = LinkId::new(link).unwrap();
    let offload = Offload::default();
    let mut frame = Frame::new(&mut buffer, HEADROOM, end, 0, link, offload).unwrap();
    let (verdict, _) = bench.pipeline.trace(&mut frame, bench.now);
    (format!("{verdict:?}"), frame.bytes().to_vec())
}

/// Packets to what is the cluster's or `b`'s, from a pod of neither, from the node and from outside.
pub(crate) fn packets(victim: &Victim) -> Vec<(u16, Vec<u8>)> {
    let cluster = [HERE, THERE, "10.0.0.5", REMOTE_POD, UNALLOCATED];
    let all = cluster.into_iter().chain(FREE);
    let all = all.chain(victim.addresses.iter().copied());
    let mut packets = Vec::new();
    for to in all {
        let is_node = to == HERE || to == THERE;
        let mut asked = PORTS.to_vec();
        asked.extend([8080, 9]);
        asked.extend((is_node && victim.node_port).then_some(NODE_PORTS[0]));
        for port in asked {
            for (link, from) in [(18, "10.0.0.7"), (HOST, HERE), (UPLINK, "203.0.113.50")] {
                let packet = packet(link, from, to);
                packets.push((link, packet.clone().tcp(4000, port, tcp::SYN).build()));
                packets.push((link, packet.udp(4000, port).build()));
            }
        }
    }
    packets
}

/// The claim: with the objects of `a`, and while they come and go, everything of `b` and of the cluster is as without.
///
/// # Panics
/// If it does not hold.
pub(crate) fn holds(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let config = config(&mut choices);
    let victim = victim(&mut choices);
    let attacker = attacker(&mut choices);
    let packets = packets(&victim);
    let mut alone = model(&config, victim.objects.iter());
    let before = rows(&mut alone);
    let without = endings(0, &mut alone, &packets);
    let mut both = model(&config, attacker.iter().chain(&victim.objects));
    let together = rows(&mut both);
    let with = endings(1, &mut both, &packets);
    for ((sent, without), with) in packets.iter().zip(&without).zip(&with) {
        assert_eq!(
            without, with,
            "link {}, {:02x?}\n{attacker:#?}",
            sent.0, sent.1
        );
    }
    // What follows depends neither on the order nor on what was there before.
    let later = come_and_go(&mut alone, &attacker);
    assert_eq!(later, together, "the order matters: {attacker:#?}");
    assert_eq!(
        rows(&mut alone),
        before,
        "something is left of {attacker:#?}"
    );
}
