//! The rules one by one, and what the loser is told.

use std::net::IpAddr;

use serde_json::{Value, json};
use sluice_contract::service::{AddressRole, FrontendKind, FrontendRow, ServiceKey, ServiceRow};
use sluice_contract::{Key, LinkId, Row};
use sluice_model::compile::{AddressPlan, Attached, Config, Model, ServiceMatch};
use sluice_model::object::{Kind, Name, ObjectKey, Prefix};
use sluice_model::overview;
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn range(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix::new(ip(address), length.parse().unwrap()).unwrap()
}

/// A node `here` (172.16.0.1, pods 10.0.0.0/24) and a node `there` (172.16.0.2, pods 10.0.1.0/24).
struct Ground {
    model: Model,
}

impl Ground {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut AddressPlan)) -> Self {
        let mut config = Config {
            node: "here".into(),
            ..Config::default()
        };
        change(&mut config.addresses);
        let mut ground = Self {
            model: Model::new(&config, []),
        };
        ground.node("here", "172.16.0.1", "10.0.0.0/24");
        ground.node("there", "172.16.0.2", "10.0.1.0/24");
        ground
    }

    fn put(&mut self, kind: Kind, value: Value) {
        let admission = admit_as(kind, value);
        let object = admission.object;
        let object = object.unwrap_or_else(|| panic!("{:#?}", admission.findings));
        self.model.apply(Event::Put(object));
        self.model.compile();
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        let name = match name.split_once('/') {
            Some((namespace, name)) => Name::new(namespace, name),
            None => Name::new("", name),
        };
        self.model.apply(Event::Removed(ObjectKey { kind, name }));
        self.model.compile();
    }

    fn node(&mut self, name: &str, address: &str, cidr: &str) {
        let addresses = json!([{"type": "InternalIP", "address": address}]);
        let value = json!({"metadata": {"name": name}, "spec": {"podCIDRs": [cidr]}, "status": {"addresses": addresses}});
        self.put(Kind::Node, value);
    }

    /// `age` in seconds after midnight; the port is 80 unless `spec` says.
    fn service(&mut self, name: &str, age: Option<u32>, spec: Value) {
        let (namespace, name) = name.split_once('/').unwrap();
        let mut spec = spec;
        if spec.get("ports").is_none() {
            spec["ports"] = json!([{"port": 80}]);
        }
        let ingress = spec.as_object_mut().unwrap().remove("lb");
        let mut metadata = json!({"name": name, "namespace": namespace});
        if let Some(age) = age {
            metadata["creationTimestamp"] = format!("2026-01-01T00:00:{age:02}Z").into();
        }
        self.put(
            Kind::Service,
            json!({
                "metadata": metadata, "spec": spec,
                "status": {"loadBalancer": {"ingress": ingress.unwrap_or(json!([]))}},
            }),
        );
    }

    fn slice(&mut self, service: &str, addresses: &[&str]) {
        let (namespace, name) = service.split_once('/').unwrap();
        let endpoints: Vec<Value> = addresses
            .iter()
            .map(|it| json!({"addresses": [it]}))
            .collect();
        self.put(
            Kind::EndpointSlice,
            json!({
                "metadata": {
                    "name": format!("{name}-x"), "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
                },
                "addressType": "IPv4", "ports": [{"port": 10250}], "endpoints": endpoints,
            }),
        );
    }

    fn pod(&mut self, name: &str, address: &str, host_network: bool) {
        let (namespace, name) = name.split_once('/').unwrap();
        self.put(
            Kind::Pod,
            json!({
                "metadata": {"name": name, "namespace": namespace},
                "spec": {"hostNetwork": host_network, "containers": []},
                "status": {"podIPs": [{"ip": address}]},
            }),
        );
    }

    fn service_rows(&mut self) -> Vec<ServiceRow> {
        let rows = self.model.tables().all();
        let rows = rows.filter_map(|row| match row {
            Row::Service(row) => Some(row),
            _ => None,
        });
        rows.collect()
    }

    fn frontend(&mut self, address: &str, port: u16) -> Option<FrontendRow> {
        let address = ip(address);
        let mut rows = self.service_rows().into_iter();
        rows.find_map(|row| match row {
            ServiceRow::Frontend(row) if row.address == address && row.port == port => Some(row),
            _ => None,
        })
    }

    /// The ClusterIP of the Service that has an address and port.
    fn owner(&mut self, address: &str, port: u16) -> Option<String> {
        let id = self.frontend(address, port)?.service;
        let mut rows = self.service_rows().into_iter();
        rows.find_map(|row| match row {
            ServiceRow::Frontend(row)
                if row.service == id && row.kind == FrontendKind::ClusterIp =>
            {
                Some(row.address.to_string())
            }
            _ => None,
        })
    }

    fn role(&mut self, address: &str) -> Option<AddressRole> {
        let key = Key::Service(ServiceKey::Address(ip(address)));
        match self.model.tables().row(&key) {
            Some(Row::Service(ServiceRow::Address(row))) => Some(row.role),
            _ => None,
        }
    }

    fn backends(&mut self) -> Vec<String> {
        let rows = self.service_rows().into_iter();
        let backends = rows.filter_map(|row| match row {
            ServiceRow::Backend(row) => Some(row.address.to_string()),
            _ => None,
        });
        let mut all: Vec<String> = backends.collect();
        all.sort();
        all.dedup();
        all
    }

    /// What is found of a Service; the node's own words and those of a look at the objects alone are the same.
    fn found(&self, service: &str) -> Vec<String> {
        let object = format!("Service {service}");
        let found = self.model.findings();
        let snapshot = self.model.snapshot();
        let summaries = overview::services(&snapshot);
        let said = |it: &sluice_model::finding::Finding| match it.field.as_str() {
            "" => it.reason.clone(),
            field => format!("{field}: {}", it.reason),
        };
        let mut of_node: Vec<String> = found
            .iter()
            .filter(|it| it.object == object)
            .map(said)
            .collect();
        of_node.sort();
        let summary = summaries.into_iter().find(|it| it.name == service);
        let mut problems = summary.map(|it| it.problems).unwrap_or_default();
        problems.sort();
        assert_eq!(of_node, problems);
        of_node
    }
}

const VIP: &str = "198.51.100.1";

#[test]
fn z06_a_cluster_ip_is_never_an_external_address_of_another_service() {
    for order in [["aaa/x", "kube-system/dns"], ["kube-system/dns", "aaa/x"]] {
        let mut ground = Ground::new();
        for name in order {
            match name {
                "aaa/x" => ground.service(
                    name,
                    Some(1),
                    json!({"clusterIP": "10.96.0.66", "externalIPs": ["10.96.0.10"], "ports": [{"port": 80}, {"name": "other", "port": 9999}]}),
                ),
                _ => ground.service(name, Some(5), json!({"clusterIP": "10.96.0.10"})),
            }
        }
        assert_eq!(ground.owner("10.96.0.10", 80).unwrap(), "10.96.0.10");
        // Nor are ports that the ClusterIP's Service does not have.
        assert_eq!(ground.frontend("10.96.0.10", 9999), None);
        assert_eq!(ground.role("10.96.0.10"), Some(AddressRole::Cluster));
        let found = ground.found("aaa/x");
        assert_eq!(
            found,
            [
                "spec.externalIPs[0]: external address 10.96.0.10 is not used: it is the ClusterIP of Service kube-system/dns, which comes \
                 first. Choose another address"
            ]
        );
        assert_eq!(ground.found("kube-system/dns"), [""; 0]);
        ground.remove(Kind::Service, "kube-system/dns");
        assert_eq!(ground.owner("10.96.0.10", 80).unwrap(), "10.96.0.66");
        assert_eq!(ground.found("aaa/x"), [""; 0]);
    }
}

#[test]
fn s10_a_load_balancers_address_comes_before_an_external_one_and_the_older_before_the_newer() {
    let mut ground = Ground::new();
    let external = |own: &str| json!({"clusterIP": own, "externalIPs": [VIP]});
    ground.service("a/x", Some(9), external("10.96.0.1"));
    ground.service("b/x", Some(4), external("10.96.0.2"));
    assert_eq!(ground.owner(VIP, 80).unwrap(), "10.96.0.2", "the older one");
    assert!(ground.found("a/x")[0].contains("external address of Service b/x"));
    let balanced = json!({"clusterIP": "10.96.0.3", "lb": [{"ip": VIP}]});
    ground.service("c/x", Some(20), balanced);
    assert_eq!(
        ground.owner(VIP, 80).unwrap(),
        "10.96.0.3",
        "the balancer's"
    );
    for loser in ["a/x", "b/x"] {
        assert!(ground.found(loser)[0].contains("load balancer's address of Service c/x"));
    }
    ground.remove(Kind::Service, "c/x");
    ground.remove(Kind::Service, "b/x");
    assert_eq!(ground.owner(VIP, 80).unwrap(), "10.96.0.1");
    // Of manifests nobody knows the age: the name counts, and one with an age comes first.
    ground.service("a/x", None, external("10.96.0.1"));
    ground.service("b/x", None, external("10.96.0.2"));
    assert_eq!(ground.owner(VIP, 80).unwrap(), "10.96.0.1");
    ground.service("b/x", Some(50), external("10.96.0.2"));
    assert_eq!(ground.owner(VIP, 80).unwrap(), "10.96.0.2");
}

#[test]
fn s10_services_of_one_namespace_share_an_address_port_by_port_and_no_others_do() {
    let mut ground = Ground::new();
    let at = |own: &str, port: u16| json!({"clusterIP": own, "externalIPs": [VIP], "ports": [{"port": port}]});
    ground.service("b/web", Some(1), at("10.96.0.1", 80));
    ground.service("b/mail", Some(2), at("10.96.0.2", 25));
    ground.service("b/late", Some(3), at("10.96.0.3", 25));
    ground.service("a/thief", Some(4), at("10.96.0.4", 443));
    assert_eq!(ground.owner(VIP, 80).unwrap(), "10.96.0.1");
    assert_eq!(ground.owner(VIP, 25).unwrap(), "10.96.0.2");
    assert_eq!(ground.frontend(VIP, 443), None);
    assert_eq!(
        ground.found("b/late"),
        [
            "spec.ports: Port 25/TCP of 198.51.100.1 is not used: Service b/mail, which comes first, has it. Choose another port"
        ]
    );
    assert!(ground.found("a/thief")[0].contains("Service b/web"));
    let served: Vec<String> = ground
        .model
        .served()
        .iter()
        .map(|it| it.service.to_string())
        .collect();
    assert_eq!(
        served,
        ["b/late", "b/mail", "b/web"],
        "no more is announced"
    );
}

#[test]
fn z06_external_addresses_are_none_of_the_clusters_own() {
    let mut ground = Ground::with(|plan| {
        plan.pods.push(range("10.9.0.0/16"));
        plan.services.push(range("10.96.0.0/16"));
        plan.cluster.push(range("10.128.0.0/9"));
        plan.local.push(ip("172.16.9.9"));
    });
    ground.pod("b/p", "192.168.7.7", false);
    ground.pod("b/agent", "172.16.0.2", true);
    let own = Attached {
        pod: Name::new("b", "linked"),
        addresses: vec![ip("192.168.8.8")],
    };
    ground.model.attach(LinkId::new(16).unwrap(), own);
    let cases = [
        ("172.16.0.1", "an address of node here"),
        ("172.16.0.2", "an address of node there"),
        ("172.16.9.9", "an address of node here"),
        ("10.0.0.77", "in 10.0.0.0/24, a range of pods"),
        ("10.0.1.77", "in 10.0.1.0/24, a range of pods"),
        ("10.9.0.1", "in 10.9.0.0/16, a range of pods"),
        ("10.96.0.99", "in 10.96.0.0/16, a range of ClusterIPs"),
        (
            "10.200.0.1",
            "in 10.128.0.0/9, a range of pods and Services",
        ),
        ("192.168.7.7", "Pod b/p has it"),
        ("192.168.8.8", "Pod b/linked has it"),
    ];
    let all: Vec<&str> = cases.iter().map(|(address, _)| *address).collect();
    for (kind, spec) in [
        (
            "externalIPs",
            json!({"clusterIP": "10.96.0.1", "externalIPs": all}),
        ),
        (
            "lb",
            json!({"clusterIP": "10.96.0.1", "lb": all.iter().map(|it| json!({"ip": it})).collect::<Vec<_>>()}),
        ),
    ] {
        ground.service("a/x", Some(1), spec);
        for (address, _) in cases {
            assert_eq!(ground.frontend(address, 80), None, "{kind} {address}");
            assert_ne!(
                ground.role(address),
                Some(AddressRole::External),
                "{kind} {address}"
            );
        }
        assert!(ground.model.served().is_empty());
        // Each by itself says why; of many some are named and the rest is counted.
        assert_eq!(ground.found("a/x").len(), 9);
        assert!(
            ground
                .found("a/x")
                .iter()
                .any(|it| it == "2 more addresses, ports or endpoints are not used")
        );
    }
    for (address, why) in cases {
        ground.service(
            "a/x",
            Some(1),
            json!({"clusterIP": "10.96.0.1", "externalIPs": [address]}),
        );
        let found = ground.found("a/x");
        assert!(found.len() == 1 && found[0].contains(why), "{found:?}");
    }
    // A pod goes, a node goes: what was theirs is free.
    for (address, kind, name) in [
        ("192.168.7.7", Kind::Pod, "b/p"),
        ("172.16.0.2", Kind::Node, "there"),
    ] {
        ground.service(
            "a/x",
            Some(1),
            json!({"clusterIP": "10.96.0.1", "externalIPs": [address]}),
        );
        assert_eq!(ground.frontend(address, 80), None);
        ground.remove(kind, name);
        assert!(ground.frontend(address, 80).is_some(), "{address}");
    }
    // And comes: then it is its own again, at once.
    ground.service(
        "a/x",
        Some(1),
        json!({"clusterIP": "10.96.0.1", "externalIPs": ["192.168.7.8", "10.5.0.1"]}),
    );
    assert!(
        ground.frontend("192.168.7.8", 80).is_some() && ground.frontend("10.5.0.1", 80).is_some()
    );
    ground.pod("b/p", "192.168.7.8", false);
    ground.node("new", "172.16.0.3", "10.5.0.0/24");
    assert!(
        ground.frontend("192.168.7.8", 80).is_none() && ground.frontend("10.5.0.1", 80).is_none()
    );
}

#[test]
fn s10_only_listed_addresses_count_where_the_configuration_lists_some() {
    let mut ground = Ground::with(|plan| {
        let listed = [
            "198.51.100.0/24",
            "172.16.0.0/16",
            "172.16.0.2/32",
            "10.0.0.0/8",
            "10.128.1.0/24",
        ];
        plan.external.extend(listed.map(range));
        plan.services.push(range("10.96.0.0/16"));
        plan.cluster.push(range("10.128.0.0/9"));
    });
    let mut taken = |address: &str| {
        let spec = json!({"clusterIP": "10.96.0.1", "externalIPs": [address]});
        ground.service("a/x", Some(1), spec);
        ground.frontend(address, 80).is_some()
    };
    assert!(taken(VIP));
    assert!(!taken("203.0.113.1"), "not listed");
    // A node's only where it is listed by itself; pods' and the Service range never.
    assert!(!taken("172.16.0.1"));
    assert!(taken("172.16.0.2"));
    assert!(!taken("10.0.0.7") && !taken("10.96.0.99"));
    // Of a route to pods and Services only what is listed within it.
    assert!(!taken("10.128.2.1"));
    assert!(taken("10.128.1.1"));
    // A node's address is shared by all, port by port, and stays the node's.
    let spec = |own: &str, port: u16| json!({"clusterIP": own, "externalIPs": ["172.16.0.2"], "ports": [{"port": port}]});
    ground.service("a/x", Some(1), spec("10.96.0.1", 80));
    ground.service("b/y", Some(2), spec("10.96.0.2", 81));
    assert!(
        ground.frontend("172.16.0.2", 80).is_some() && ground.frontend("172.16.0.2", 81).is_some()
    );
    assert_eq!(ground.role("172.16.0.2"), Some(AddressRole::Peer));
}

#[test]
fn s10_two_services_with_one_node_port() {
    let mut ground = Ground::new();
    let spec = |own: &str| json!({"clusterIP": own, "ports": [{"port": 80, "nodePort": 30080}]});
    ground.service("a/x", Some(9), spec("10.96.0.1"));
    ground.service("b/x", Some(4), spec("10.96.0.2"));
    assert_eq!(ground.owner("0.0.0.0", 30080).unwrap(), "10.96.0.2");
    assert_eq!(
        ground.found("a/x"),
        [
            "spec.ports: Node port 30080/TCP is not used: Service b/x, which comes first, has it. Choose another port"
        ]
    );
}

#[test]
fn z06_a_node_is_an_endpoint_only_by_a_pod_of_that_namespace_or_by_the_configuration() {
    let mut ground = Ground::new();
    for name in ["a/x", "default/kubernetes", "monitoring/exporter"] {
        let own = json!({"clusterIP": "10.96.0.1"});
        ground.service(name, Some(1), own);
        ground.slice(name, &["172.16.0.2", "10.0.1.5"]);
        let all: &[&str] = match name {
            "default/kubernetes" => &["10.0.1.5", "172.16.0.2"],
            _ => &["10.0.1.5"],
        };
        assert_eq!(ground.backends(), all, "{name}");
        if name != "default/kubernetes" {
            let found = ground.found(name);
            assert!(
                found.len() == 1 && found[0].starts_with("Endpoint 172.16.0.2 is not used"),
                "{found:?}"
            );
        }
        ground.remove(Kind::Service, name);
    }
    // A pod in the host's network has that address: in another namespace it is of no use, in this one it is.
    ground.service(
        "monitoring/exporter",
        Some(1),
        json!({"clusterIP": "10.96.0.1"}),
    );
    ground.pod("kube-system/proxy", "172.16.0.2", true);
    assert_eq!(ground.backends(), ["10.0.1.5"]);
    ground.pod("monitoring/exporter-1", "172.16.0.2", true);
    assert_eq!(ground.backends(), ["10.0.1.5", "172.16.0.2"]);
    assert_eq!(ground.found("monitoring/exporter"), [""; 0]);
    ground.remove(Kind::Pod, "monitoring/exporter-1");
    assert_eq!(ground.backends(), ["10.0.1.5"]);
    // The address becomes nobody's, and a node's again.
    ground.remove(Kind::Node, "there");
    assert_eq!(ground.backends(), ["10.0.1.5", "172.16.0.2"]);
    ground.node("there", "172.16.0.2", "10.0.1.0/24");
    assert_eq!(ground.backends(), ["10.0.1.5"]);
    for (listed, counts) in [
        ("monitoring/*", true),
        ("monitoring/exporter", true),
        ("monitoring/other", false),
    ] {
        let mut ground =
            Ground::with(|plan| plan.node_endpoints = vec![ServiceMatch::parse(listed).unwrap()]);
        ground.service(
            "monitoring/exporter",
            Some(1),
            json!({"clusterIP": "10.96.0.1"}),
        );
        ground.slice("monitoring/exporter", &["172.16.0.2"]);
        assert_eq!(!ground.backends().is_empty(), counts, "{listed}");
    }
}

#[test]
fn s10_addresses_that_nobody_can_have_are_left_out_of_what_the_api_says() {
    let mut ground = Ground::new();
    let bad = [
        "239.1.1.1",
        "255.255.255.255",
        "240.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "0.0.0.0",
    ];
    let mut all = bad.to_vec();
    all.push(VIP);
    let service = json!({
        "metadata": {"name": "x", "namespace": "a"},
        "spec": {"clusterIP": "10.96.0.1", "externalIPs": all, "ports": [{"port": 80}]},
    });
    let admission = admit_as(Kind::Service, service.clone());
    assert_eq!(admission.findings.len(), bad.len());
    ground.put(Kind::Service, service);
    assert!(ground.frontend(VIP, 80).is_some() && ground.frontend("10.96.0.1", 80).is_some());
    for address in bad {
        assert_eq!(ground.role(address), None);
    }
    ground.slice("a/x", &["127.0.0.1", "224.0.0.1", "10.0.0.9"]);
    assert_eq!(ground.backends(), ["10.0.0.9"]);
}
