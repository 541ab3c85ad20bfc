//! Whether a connection is allowed, read off the manifests as the Kubernetes documentation has it; slow and obvious.
//!
//! Written from the pages "Network Policies" and the API references of NetworkPolicy v1 and ClusterNetworkPolicy v1alpha2.
//! It shares no code with the compiler: it works on the JSON of the objects.

use std::net::IpAddr;

use serde_json::{Map, Value};

/// A pod, with the addresses it has.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) manifest: Value,
    pub(crate) ip: IpAddr,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End<'a> {
    Pod(&'a Pod),
    /// Something outside the cluster, or a node.
    Outside(IpAddr),
}

/// Everything that matters.
#[derive(Clone, Debug, Default)]
pub(crate) struct World {
    /// Names and labels.
    pub(crate) namespaces: Vec<(String, Value)>,
    pub(crate) nodes: Vec<Value>,
    pub(crate) pods: Vec<Pod>,
    pub(crate) policies: Vec<Value>,
    pub(crate) cluster_policies: Vec<Value>,
    /// Addresses that are asked about beside the pods'.
    pub(crate) outside: Vec<IpAddr>,
}

/// The connection that is asked about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection<'a> {
    pub(crate) from: End<'a>,
    pub(crate) to: End<'a>,
    pub(crate) protocol: &'a str,
    pub(crate) port: u16,
}

const INGRESS: [&str; 3] = ["Ingress", "ingress", "from"];
const EGRESS: [&str; 3] = ["Egress", "egress", "to"];

impl World {
    /// "For a connection from a source pod to a destination pod to be allowed, both the egress policy on the source pod
    /// and the ingress policy on the destination pod need to allow the connection."
    pub(crate) fn allows(&self, it: &Connection<'_>) -> bool {
        let egress = |pod| self.direction(pod, it.to, it, EGRESS);
        let ingress = |pod| self.direction(pod, it.from, it, INGRESS);
        pod(it.from).is_none_or(egress) && pod(it.to).is_none_or(ingress)
    }

    fn direction(
        &self,
        subject: &Pod,
        peer: End<'_>,
        it: &Connection<'_>,
        side: [&str; 3],
    ) -> bool {
        if let Some(decided) = self.tier("Admin", subject, peer, it, side) {
            return decided;
        }
        let isolating: Vec<&Value> = self
            .policies
            .iter()
            .filter(|policy| text(&policy["metadata"]["namespace"]) == subject.namespace)
            .filter(|policy| selects(&policy["spec"]["podSelector"], labels(&subject.manifest)))
            .filter(|policy| has_type(&policy["spec"], side))
            .collect();
        if !isolating.is_empty() {
            // "The effects of those lists combine additively."
            return isolating.iter().any(|policy| {
                list(&policy["spec"][side[1]]).iter().any(|rule| {
                    let peers = list(&rule[side[2]]);
                    let ports = list(&rule["ports"]);
                    let own = &subject.namespace;
                    (peers.is_empty() || peers.iter().any(|peer_| self.is_peer(peer_, own, peer)))
                        && (ports.is_empty() || ports.iter().any(|port| is_port(port, it)))
                })
            });
        }
        self.tier("Baseline", subject, peer, it, side)
            .unwrap_or(true)
    }

    /// A tier's last word; `None`: it has none, or passes.
    fn tier(
        &self,
        tier: &str,
        subject: &Pod,
        peer: End<'_>,
        it: &Connection<'_>,
        side: [&str; 3],
    ) -> Option<bool> {
        let of_tier = self
            .cluster_policies
            .iter()
            .filter(|policy| policy["spec"]["tier"] == tier);
        let mut policies: Vec<&Value> = of_tier
            .filter(|policy| self.is_cluster_peer(&policy["spec"]["subject"], End::Pod(subject)))
            .collect();
        policies.sort_by_key(|policy| {
            (
                policy["spec"]["priority"].as_i64(),
                text(&policy["metadata"]["name"]),
            )
        });
        for rule in policies
            .iter()
            .flat_map(|policy| list(&policy["spec"][side[1]]))
        {
            let peers = list(&rule[side[2]]);
            let ports = list(&rule["protocols"]);
            if peers.iter().any(|peer_| self.is_cluster_peer(peer_, peer))
                && (ports.is_empty() || ports.iter().any(|port| is_cluster_port(port, it)))
            {
                return match text(&rule["action"]) {
                    "Accept" => Some(true),
                    "Deny" => Some(false),
                    _ => None,
                };
            }
        }
        None
    }

    fn is_peer(&self, peer: &Value, own_namespace: &str, end: End<'_>) -> bool {
        let block = &peer["ipBlock"];
        if !block.is_null() {
            let except = list(&block["except"]);
            return is_in(address(end), text(&block["cidr"]))
                && !except.iter().any(|cidr| is_in(address(end), text(cidr)));
        }
        let Some(pod) = pod(end) else { return false };
        let namespace = match &peer["namespaceSelector"] {
            Value::Null => pod.namespace == own_namespace,
            selector => selects(selector, self.namespace(&pod.namespace)),
        };
        namespace && selects(&peer["podSelector"], labels(&pod.manifest))
    }

    fn is_cluster_peer(&self, peer: &Value, end: End<'_>) -> bool {
        if let Some(networks) = peer["networks"].as_array() {
            return networks.iter().any(|cidr| is_in(address(end), text(cidr)));
        }
        if !peer["nodes"].is_null() {
            return self.nodes.iter().any(|node| {
                let addresses = list(&node["status"]["addresses"]);
                selects(&peer["nodes"], labels(node))
                    && addresses
                        .iter()
                        .any(|it| text(&it["address"]).parse() == Ok(address(end)))
            });
        }
        let Some(pod) = pod(end) else { return false };
        let namespace = self.namespace(&pod.namespace);
        match (&peer["namespaces"], &peer["pods"]) {
            (Value::Null, Value::Null) => false,
            (Value::Null, pods) => {
                selects(&pods["namespaceSelector"], namespace)
                    && selects(&pods["podSelector"], labels(&pod.manifest))
            }
            (namespaces, _) => selects(namespaces, namespace),
        }
    }

    fn namespace(&self, name: &str) -> &Value {
        let found = self.namespaces.iter().find(|(it, _)| it == name);
        found.map_or(&Value::Null, |(_, labels)| labels)
    }
}

/// "If no policyTypes are specified on a NetworkPolicy then by default Ingress will always be set and Egress will be set if the
/// NetworkPolicy has any egress rules."
fn has_type(spec: &Value, side: [&str; 3]) -> bool {
    match list(&spec["policyTypes"]) {
        [] => side == INGRESS || !list(&spec["egress"]).is_empty(),
        types => types.iter().any(|it| it == side[0]),
    }
}

fn is_port(port: &Value, it: &Connection<'_>) -> bool {
    let protocol = port["protocol"].as_str().unwrap_or("TCP");
    protocol == it.protocol
        && match &port["port"] {
            Value::Null => true,
            Value::String(name) => {
                named(it.to, name, Some(protocol)).contains(&(protocol, it.port))
            }
            first => {
                let last = port["endPort"].as_u64().or(first.as_u64());
                first.as_u64() <= Some(it.port.into()) && Some(it.port.into()) <= last
            }
        }
}

fn is_cluster_port(protocol: &Value, it: &Connection<'_>) -> bool {
    if let Some(name) = protocol["destinationNamedPort"].as_str() {
        return named(it.to, name, None).contains(&(it.protocol, it.port));
    }
    let Some(ports) = protocol.get(it.protocol.to_lowercase()) else {
        return false;
    };
    match &ports["destinationPort"] {
        Value::Null => true,
        port if port["number"].is_null() => {
            let bounds =
                [&port["range"]["start"], &port["range"]["end"]].map(|it| it.as_u64().unwrap());
            (bounds[0]..=bounds[1]).contains(&it.port.into())
        }
        port => port["number"].as_u64() == Some(it.port.into()),
    }
}

/// What a name stands for at a destination.
fn named<'a>(end: End<'a>, name: &str, protocol: Option<&str>) -> Vec<(&'a str, u16)> {
    let containers = pod(end)
        .map(|pod| list(&pod.manifest["spec"]["containers"]))
        .unwrap_or_default();
    let ports = containers
        .iter()
        .flat_map(|it| list(&it["ports"]))
        .filter(|it| it["name"] == name);
    ports
        .map(|it| {
            (
                it["protocol"].as_str().unwrap_or("TCP"),
                it["containerPort"].as_u64().unwrap() as u16,
            )
        })
        .filter(|(it, _)| protocol.is_none_or(|protocol| protocol == *it))
        .collect()
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let empty = Map::new();
    let pairs = selector["matchLabels"].as_object().unwrap_or(&empty);
    pairs
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
        && list(&selector["matchExpressions"]).iter().all(|it| {
            let value = labels.get(text(&it["key"]));
            let among = value.is_some_and(|value| list(&it["values"]).contains(value));
            match text(&it["operator"]) {
                "In" => among,
                "NotIn" => !among,
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

fn is_in(address: IpAddr, cidr: &str) -> bool {
    let (network, length) = cidr.split_once('/').unwrap();
    let bits = |it: IpAddr| match it {
        IpAddr::V4(it) => (32, u128::from(it.to_bits()) << 96),
        IpAddr::V6(it) => (128, it.to_bits()),
    };
    let ((width, a), (family, b)) = (bits(address), bits(network.parse().unwrap()));
    let length: u32 = length.parse().unwrap();
    width == family && (length == 0 || (a ^ b) >> (128 - length) == 0)
}

fn pod(end: End<'_>) -> Option<&Pod> {
    match end {
        End::Pod(pod) => Some(pod),
        End::Outside(_) => None,
    }
}

fn address(end: End<'_>) -> IpAddr {
    match end {
        End::Pod(pod) => pod.ip,
        End::Outside(address) => address,
    }
}

fn labels(object: &Value) -> &Value {
    &object["metadata"]["labels"]
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
