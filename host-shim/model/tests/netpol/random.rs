//! Random policies of every shape the API has, made from a script of bytes: zeros make the simplest ones, so proptest
//! shrinks towards those. Some of these worlds are IPv6.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Map, Value, json};

use crate::ground::{cluster_policy, policy};
use crate::reference::World;

/// Bytes from which decisions are made.
#[derive(Debug)]
pub(crate) struct Script<'a> {
    bytes: &'a [u8],
}

impl<'a> Script<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    fn pick(&mut self, choices: usize) -> usize {
        let (first, rest) = self.bytes.split_first().unwrap_or((&0, &[]));
        self.bytes = rest;
        usize::from(*first) % choices
    }

    fn one(&mut self, of: &[&str]) -> Value {
        let index = self.pick(of.len());
        json!(of[index])
    }

    fn some(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> Value) -> Value {
        let count = self.pick(most + 1);
        (0..count).map(|_| make(self)).collect()
    }

    /// At least one.
    fn several(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> Value) -> Value {
        let count = 1 + self.pick(most);
        (0..count).map(|_| make(self)).collect()
    }

    fn selector(&mut self, key: &'static str, values: &[&str]) -> Value {
        let keys = [key, "extra", "none"];
        match self.pick(5) {
            0 => json!({}),
            1 | 2 => {
                let value = self.one(values);
                json!({"matchLabels": {key: value}})
            }
            3 => {
                let operator = self.one(&["In", "NotIn"]);
                let chosen = self.several(2, |it| it.one(values));
                json!({"matchExpressions": [{"key": self.one(&keys), "operator": operator, "values": chosen}]})
            }
            _ => {
                json!({"matchExpressions": [{"key": self.one(&keys), "operator": self.one(&["Exists", "DoesNotExist"])}]})
            }
        }
    }

    fn pods(&mut self) -> Value {
        self.selector("pod", &["a", "b", "c"])
    }

    fn namespaces(&mut self) -> Value {
        let key = ["ns", "kubernetes.io/metadata.name"][self.pick(2)];
        self.selector(key, &["x", "y", "z"])
    }

    fn block(&mut self) -> Value {
        match self.pick(5) {
            0 => json!({"cidr": "0.0.0.0/0"}),
            1 => {
                json!({"cidr": self.one(&["10.0.0.0/8", "10.0.1.0/24", "10.0.2.1/32", "192.0.2.0/24", "fd00::/8"])})
            }
            2 => {
                json!({"cidr": "10.0.0.0/16", "except": self.several(2, |it| it.one(&["10.0.1.0/24", "10.0.2.1/32", "10.0.1.2/31"]))})
            }
            3 => {
                json!({"cidr": "0.0.0.0/0", "except": self.several(2, |it| it.one(&["10.0.0.0/8", "192.0.2.7/32", "128.0.0.0/1"]))})
            }
            _ => json!({"cidr": "10.0.1.0/24", "except": ["10.0.1.0/25"]}),
        }
    }

    fn peer(&mut self) -> Value {
        match self.pick(4) {
            0 => json!({"podSelector": self.pods()}),
            1 => json!({"namespaceSelector": self.namespaces()}),
            2 => json!({"namespaceSelector": self.namespaces(), "podSelector": self.pods()}),
            _ => json!({"ipBlock": self.block()}),
        }
    }

    fn port(&mut self) -> Value {
        let mut port = Map::new();
        let protocol = self.pick(4);
        if protocol > 0 {
            port.insert(
                "protocol".into(),
                json!(["TCP", "UDP", "SCTP"][protocol - 1]),
            );
        }
        match self.pick(5) {
            0 => {}
            1 | 2 => {
                port.insert("port".into(), json!([80, 81, 8080][self.pick(3)]));
            }
            3 => {
                port.insert("port".into(), json!([79, 80, 81][self.pick(3)]));
                port.insert("endPort".into(), json!([81, 82, 65535][self.pick(3)]));
            }
            _ => {
                port.insert("port".into(), self.name());
            }
        }
        Value::Object(port)
    }

    fn name(&mut self) -> Value {
        self.one(&[
            "serve-80-tcp",
            "serve-81-tcp",
            "serve-81-udp",
            "serve-80-sctp",
            "web",
        ])
    }

    fn rule(&mut self, side: &str) -> Value {
        let mut rule = Map::new();
        if self.pick(4) > 0 {
            rule.insert(side.into(), self.some(3, Self::peer));
        }
        if self.pick(3) > 0 {
            rule.insert("ports".into(), self.some(3, Self::port));
        }
        Value::Object(rule)
    }

    fn network_policy(&mut self, name: usize) -> Value {
        let namespace = ["x", "y", "z"][self.pick(3)];
        let mut spec = Map::new();
        if self.pick(6) > 0 {
            spec.insert("podSelector".into(), self.pods());
        }
        if self.pick(3) > 0 {
            spec.insert("ingress".into(), self.some(2, |it| it.rule("from")));
        }
        if self.pick(2) > 0 {
            spec.insert("egress".into(), self.some(2, |it| it.rule("to")));
        }
        let types = [
            json!(["Ingress"]),
            json!(["Egress"]),
            json!(["Ingress", "Egress"]),
        ];
        let choice = self.pick(5);
        if let Some(types) = types.get(choice) {
            spec.insert("policyTypes".into(), types.clone());
        }
        policy(namespace, &format!("p{name}"), Value::Object(spec))
    }

    fn cluster_peer(&mut self, side: &str, named: bool) -> Value {
        match self.pick(if side == "to" && !named { 5 } else { 3 }) {
            0 => json!({"namespaces": self.namespaces()}),
            1 | 2 => {
                json!({"pods": {"namespaceSelector": self.namespaces(), "podSelector": self.pods()}})
            }
            3 => {
                json!({"networks": self.several(2, |it| it.one(&["0.0.0.0/0", "10.0.0.0/8", "10.0.1.1/32", "192.0.2.0/24"]))})
            }
            _ => json!({"nodes": self.selector("role", &["worker", "control"])}),
        }
    }

    fn cluster_port(&mut self, named: bool) -> Value {
        if named {
            return json!({"destinationNamedPort": self.name()});
        }
        let port = match self.pick(3) {
            0 => json!({}),
            1 => json!({"destinationPort": {"number": ([80, 81][self.pick(2)])}}),
            _ => {
                json!({"destinationPort": {"range": {"start": ([1, 80][self.pick(2)]), "end": ([81, 65535][self.pick(2)])}}})
            }
        };
        let protocol = ["tcp", "udp", "sctp"][self.pick(3)];
        json!({protocol: port})
    }

    fn cluster_rule(&mut self, side: &str) -> Value {
        let named = self.pick(5) == 4;
        let mut rule = Map::new();
        rule.insert("action".into(), self.one(&["Accept", "Deny", "Pass"]));
        rule.insert(
            side.into(),
            self.several(2, |it| it.cluster_peer(side, named)),
        );
        if named || self.pick(2) > 0 {
            rule.insert(
                "protocols".into(),
                self.several(2, |it| it.cluster_port(named)),
            );
        }
        Value::Object(rule)
    }

    fn cluster_policy(&mut self, name: usize) -> Value {
        let subject = match self.pick(2) {
            0 => json!({"namespaces": self.namespaces()}),
            _ => {
                json!({"pods": {"namespaceSelector": self.namespaces(), "podSelector": self.pods()}})
            }
        };
        cluster_policy(
            &format!("c{name}"),
            json!({
                "tier": self.one(&["Admin", "Baseline"]),
                "priority": self.pick(4),
                "subject": subject,
                "ingress": self.some(3, |it| it.cluster_rule("from")),
                "egress": self.some(3, |it| it.cluster_rule("to")),
            }),
        )
    }

    /// Adds policies to a world, and varies the labels and ports of its pods a little.
    pub(crate) fn furnish(&mut self, world: &mut World) {
        for node in 0..2 {
            world.nodes.push(json!({
                "metadata": {"name": format!("n{node}"), "labels": {"role": (["worker", "control"][node])}},
                "status": {"addresses": [{"type": "InternalIP", "address": format!("172.16.0.{}", node + 1)}]},
            }));
        }
        for index in 0..self.pick(5) {
            let policy = self.network_policy(index);
            world.policies.push(policy);
        }
        for index in 0..self.pick(4) {
            let policy = self.cluster_policy(index);
            world.cluster_policies.push(policy);
        }
        for _ in 0..self.pick(4) {
            let pod = self.pick(world.pods.len());
            let manifest = &mut world.pods[pod].manifest;
            match self.pick(3) {
                0 => manifest["metadata"]["labels"]["extra"] = json!("yes"),
                1 => manifest["metadata"]["labels"] = json!({}),
                _ => {
                    manifest["spec"]["containers"] = json!([{"name": "d", "ports": [
                        {"containerPort": 80, "name": "web"},
                        {"containerPort": 8080, "name": "serve-80-tcp"},
                    ]}]);
                }
            }
        }
        if self.pick(4) == 3 {
            world.namespaces[self.pick(3)].1["ns"] = json!("x");
        }
        if self.pick(3) == 2 {
            to_ipv6(world, [80, 50, 20, 0][self.pick(4)]);
        }
    }
}

/// Moves a world from IPv4 to IPv6: addresses keep their bits, at bit `shift` of fd00::.
fn to_ipv6(world: &mut World, shift: u32) {
    let translate = |text: &str| -> Option<String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, length.parse::<u32>().ok()?),
            None => (text, 32),
        };
        let bits = u128::from(address.parse::<Ipv4Addr>().ok()?.to_bits());
        let six = Ipv6Addr::from_bits(0xfd00 << 112 | bits << shift);
        Some(match (text.contains('/'), length) {
            (false, _) => six.to_string(),
            (true, 0) => "::/0".into(),
            (true, length) => format!("{six}/{}", 96 - shift + length),
        })
    };
    for value in world
        .policies
        .iter_mut()
        .chain(&mut world.cluster_policies)
        .chain(&mut world.nodes)
    {
        each_text(value, &translate);
    }
    for pod in &mut world.pods {
        pod.ip = translate(&pod.ip.to_string()).unwrap().parse().unwrap();
        pod.manifest["status"]["podIP"] = json!(pod.ip.to_string());
    }
    for address in &mut world.outside {
        *address = translate(&address.to_string()).unwrap().parse().unwrap();
    }
}

fn each_text(value: &mut Value, translate: &impl Fn(&str) -> Option<String>) {
    match value {
        Value::String(text) => {
            if let Some(other) = translate(text) {
                *text = other;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|it| each_text(it, translate)),
        Value::Object(fields) => fields.values_mut().for_each(|it| each_text(it, translate)),
        _ => {}
    }
}
