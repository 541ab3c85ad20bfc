//! Services, EndpointSlices and nodes in, rows out.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "a test ends where its ground is not as it expects; JSON is built from values"
)]

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use sluice_contract::service::{FrontendKind, FrontendRow, PortRow, ServiceKey, ServiceRow, SetId};
use sluice_contract::{Key, LinkId, Protocol, Row};
use sluice_model::compile::{Attached, Config, Maglev, Model};
use sluice_model::object::{Forwarding, Kind, Name, ObjectKey};
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

struct Ground {
    model: Model,
}

impl Ground {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config {
            node: "here".into(),
            ..Config::default()
        };
        change(&mut config);
        let mut ground = Self {
            model: Model::new(&config, []),
        };
        ground.node("here", "zone-a", "172.16.0.1");
        ground
    }

    fn put(&mut self, kind: Kind, value: Value) {
        let admission = admit_as(kind, value);
        let object = admission
            .object
            .unwrap_or_else(|| panic!("{:#?}", admission.findings));
        self.model.apply(Event::Put(object));
        self.model.compile();
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        let name = Name::new(if kind.is_namespaced() { "x" } else { "" }, name);
        self.model.apply(Event::Removed(ObjectKey { kind, name }));
        self.model.compile();
    }

    fn node(&mut self, name: &str, zone: &str, address: &str) {
        self.put(
            Kind::Node,
            json!({
                "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
                "status": {"addresses": [{"type": "InternalIP", "address": address}]},
            }),
        );
    }

    fn service(&mut self, spec: Value) {
        self.named_service("s", spec);
    }

    fn named_service(&mut self, name: &str, spec: Value) {
        let mut spec = spec;
        if spec.get("ports").is_none() {
            spec["ports"] = json!([{"port": 80}]);
        }
        let ingress = spec
            .as_object_mut()
            .unwrap()
            .remove("lb")
            .unwrap_or(json!([]));
        self.put(
            Kind::Service,
            json!({
                "metadata": {"name": name, "namespace": "x"},
                "spec": spec,
                "status": {"loadBalancer": {"ingress": ingress}},
            }),
        );
    }

    fn slice(&mut self, name: &str, endpoints: Value) {
        self.full_slice(name, "IPv4", json!([{"port": 8080}]), endpoints);
    }

    fn full_slice(&mut self, name: &str, family: &str, ports: Value, endpoints: Value) {
        self.put(Kind::EndpointSlice, json!({
            "metadata": {"name": name, "namespace": "x", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": family,
            "ports": ports,
            "endpoints": endpoints,
        }));
    }

    fn rows(&mut self) -> Vec<ServiceRow> {
        let rows = self.model.tables().all();
        rows.filter_map(|row| match row {
            Row::Service(row) => Some(row),
            _ => None,
        })
        .collect()
    }

    fn frontends(&mut self) -> Vec<FrontendRow> {
        let rows = self.rows().into_iter();
        rows.filter_map(|row| match row {
            ServiceRow::Frontend(row) => Some(row),
            _ => None,
        })
        .collect()
    }

    /// The port behind a frontend.
    fn port(&mut self, address: &str, port: u16) -> PortRow {
        let address: IpAddr = address.parse().unwrap();
        let frontend = self
            .frontends()
            .into_iter()
            .find(|it| it.address == address && it.port == port);
        let id = frontend
            .unwrap_or_else(|| panic!("no {address}:{port}"))
            .service;
        let rows = self.rows().into_iter();
        rows.filter_map(|row| match row {
            ServiceRow::Port(row) if row.id == id => Some(row),
            _ => None,
        })
        .next()
        .unwrap()
    }

    fn backends(&mut self, set: Option<SetId>) -> Vec<String> {
        let Some(set) = set else { return Vec::new() };
        let rows = self.rows();
        let count = rows.iter().find_map(|row| match row {
            ServiceRow::Set(row) if row.id == set => Some(row.count),
            _ => None,
        });
        let found: BTreeMap<u16, String> = rows
            .iter()
            .filter_map(|row| match row {
                ServiceRow::Backend(row) if row.set == set => {
                    Some((row.index, format!("{}:{}", row.address, row.port)))
                }
                _ => None,
            })
            .collect();
        assert_eq!(
            found.keys().copied().collect::<Vec<_>>(),
            (0..count.unwrap()).collect::<Vec<_>>()
        );
        found.into_values().collect()
    }

    /// cluster, local, serving.
    fn sets(&mut self) -> [Vec<String>; 3] {
        let port = self.port("10.96.0.1", 80);
        [port.cluster, port.local, port.serving].map(|set| self.backends(set))
    }
}

/// Endpoints 10.0.0.1, .2, … in a shorthand: node, then `r`eady, `s`erving, `t`erminating.
fn endpoints(list: &[(&str, &str)]) -> Value {
    (1..)
        .zip(list)
        .map(|(n, (node, flags))| {
            let has = |flag| flags.contains(flag);
            json!({"addresses": [format!("10.0.0.{n}")], "nodeName": node,
                "conditions": {"ready": has('r'), "serving": has('s'), "terminating": has('t')}})
        })
        .collect()
}

fn at(numbers: &[u8]) -> Vec<String> {
    numbers.iter().map(|n| format!("10.0.0.{n}:8080")).collect()
}

/// A Service, endpoints, and which of them are in the sets `cluster` and `local`; whether there are any.
type Case<'a> = (&'a Value, &'a List, &'a [u8], &'a [u8], bool);

/// Endpoints or hints in a shorthand.
type List = [(&'static str, &'static str)];

const LB: &str = "192.0.2.1";

#[test]
fn s15_oracle_83_to_88_which_endpoints_are_used() {
    let local_lb =
        json!({"clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local", "lb": [{"ip": LB}]});
    let cluster = json!({"clusterIP": "10.96.0.1"});
    let internal_local = json!({"clusterIP": "10.96.0.1", "internalTrafficPolicy": "Local"});
    // Policy, endpoints, then cluster, local, any.
    let cases: [Case<'_>; 12] = [
        (
            &cluster,
            &[("here", "rs"), ("there", "rs")],
            &[1, 2],
            &[],
            true,
        ),
        (
            &cluster,
            &[("here", "st"), ("there", "rs")],
            &[2],
            &[],
            true,
        ),
        (
            &cluster,
            &[("here", "st"), ("there", "st")],
            &[1, 2],
            &[],
            true,
        ),
        (&cluster, &[("here", "t"), ("there", "")], &[], &[], false),
        (&cluster, &[("here", "t"), ("there", "s")], &[], &[], false),
        // 84: local ready, local terminating, remote ready.
        (
            &local_lb,
            &[("here", "rs"), ("here", "st"), ("there", "rs")],
            &[1, 3],
            &[1],
            true,
        ),
        // 85: only local terminating, remote ready.
        (
            &local_lb,
            &[("here", "st"), ("there", "rs")],
            &[2],
            &[1],
            true,
        ),
        // 86: only remote terminating.
        (&local_lb, &[("there", "st")], &[1], &[], true),
        // 87: nobody.
        (&local_lb, &[("here", "t"), ("there", "")], &[], &[], false),
        // 83: internal Local.
        (
            &internal_local,
            &[("here", "rs"), ("there", "rs")],
            &[],
            &[1],
            true,
        ),
        (&internal_local, &[("there", "rs")], &[], &[], true),
        (&internal_local, &[], &[], &[], false),
    ];
    for (service, list, cluster, local, any) in cases {
        let mut ground = Ground::new();
        ground.service(service.clone());
        ground.slice("s-1", endpoints(list));
        let [found_cluster, found_local, _] = ground.sets();
        let port = ground.port("10.96.0.1", 80);
        assert_eq!(
            (found_cluster, found_local, port.endpoints),
            (at(cluster), at(local), any),
            "{service} {list:?}"
        );
    }
}

#[test]
fn s16_ready_counts_although_the_pod_terminates() {
    let mut ground = Ground::new();
    ground.service(json!({"clusterIP": "10.96.0.1"}));
    ground.slice("s-1", endpoints(&[("here", "rst"), ("there", "st")]));
    assert_eq!(ground.sets()[0], at(&[1]));
}

#[test]
fn s23_serving_endpoints_are_all_that_keep_their_connections() {
    let mut ground = Ground::new();
    ground.service(json!({"clusterIP": "10.96.0.1"}));
    ground.slice(
        "s-1",
        endpoints(&[
            ("here", "rs"),
            ("there", "st"),
            ("there", "t"),
            ("there", ""),
        ]),
    );
    assert_eq!(ground.sets()[2], at(&[1, 2]));
}

#[test]
fn s17_hints_count_only_if_all_have_them_and_one_is_for_here() {
    let hinted = |hints: &[(&str, &str)]| -> Value {
        (1..)
            .zip(hints)
            .map(|(n, (zone, node))| {
                let list = |name: &str| if name.is_empty() { json!([]) } else { json!([{"name": name}]) };
                json!({"addresses": [format!("10.0.0.{n}")], "hints": {"forZones": list(zone), "forNodes": list(node)}})
            })
            .collect()
    };
    let cases: [(&List, &[u8]); 6] = [
        (&[("zone-a", ""), ("zone-b", "")], &[1]),
        (&[("zone-a", ""), ("", "")], &[1, 2]),
        (&[("zone-c", ""), ("zone-b", "")], &[1, 2]),
        (&[("zone-a", "here"), ("zone-a", "there")], &[1]),
        (&[("zone-a", "there"), ("zone-b", "there")], &[1]),
        (&[("zone-a", "here"), ("zone-a", "")], &[1, 2]),
    ];
    for (hints, expected) in cases {
        let mut ground = Ground::new();
        ground.service(json!({"clusterIP": "10.96.0.1"}));
        ground.slice("s-1", hinted(hints));
        assert_eq!(ground.sets()[0], at(expected), "{hints:?}");
    }
    // The node moves to another zone, or has none.
    let mut ground = Ground::new();
    ground.service(json!({"clusterIP": "10.96.0.1"}));
    ground.slice("s-1", hinted(&[("zone-a", ""), ("zone-b", "")]));
    ground.node("here", "zone-b", "172.16.0.1");
    assert_eq!(ground.sets()[0], at(&[2]));
    ground.remove(Kind::Node, "here");
    assert_eq!(ground.sets()[0], at(&[1, 2]));
}

#[test]
fn s30_nothing_is_served_for_headless_and_others_services_and_labels_toggle() {
    let mut ground = Ground::new();
    ground.slice("s-1", endpoints(&[("here", "rs")]));
    ground.service(json!({"clusterIP": "None"}));
    assert_eq!(ground.frontends(), []);
    ground.service(json!({"type": "ExternalName", "externalName": "a.b"}));
    assert_eq!(ground.frontends(), []);
    let labelled = |labels: Value| json!({"metadata": {"name": "s", "namespace": "x", "labels": labels}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}});
    ground.put(
        Kind::Service,
        labelled(json!({"service.kubernetes.io/service-proxy-name": "other"})),
    );
    assert_eq!(ground.frontends(), []);
    ground.put(Kind::Service, labelled(json!({})));
    assert_eq!(ground.sets()[0], at(&[1]));
    ground.put(
        Kind::Service,
        labelled(json!({"service.kubernetes.io/headless": ""})),
    );
    let of_node = |row: &ServiceRow| matches!(row, ServiceRow::Nat(_) | ServiceRow::Address(_));
    let rows = ground.rows();
    assert!(
        rows.iter().all(of_node),
        "only what is the node's is left: {rows:?}"
    );
}

#[test]
fn s33_s34_slices_with_other_ports_and_families_add_up() {
    let mut ground = Ground::new();
    ground.service(json!({"clusterIPs": ["10.96.0.1", "fd00:96::1"], "ports": [{"name": "web", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}));
    let web = |port: u16| json!([{"name": "web", "port": port}, {"name": "dns", "port": 5353, "protocol": "UDP"}]);
    ground.full_slice(
        "s-1",
        "IPv4",
        web(8080),
        json!([{"addresses": ["10.0.0.1"]}]),
    );
    ground.full_slice(
        "s-2",
        "IPv4",
        web(9090),
        json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}]),
    );
    ground.full_slice(
        "s-6",
        "IPv6",
        web(8080),
        json!([{"addresses": ["fd00::1"]}]),
    );
    assert_eq!(
        ground.sets()[0],
        ["10.0.0.1:8080", "10.0.0.1:9090", "10.0.0.2:9090"]
    );
    let six = ground.port("fd00:96::1", 80);
    assert_eq!(ground.backends(six.cluster), ["fd00::1:8080"]);
    let dns = ground.port("10.96.0.1", 53);
    assert_eq!(
        ground.backends(dns.cluster),
        ["10.0.0.1:5353", "10.0.0.2:5353"]
    );
    assert!(
        ground
            .frontends()
            .iter()
            .any(|it| it.protocol == Protocol::Udp && it.port == 53)
    );
}

#[test]
fn s08_s10_s21_frontends_of_every_kind() {
    let mut ground = Ground::new();
    ground.service(json!({
        "type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalIPs": ["198.51.100.1"],
        "lb": [{"ip": LB}, {"ip": "192.0.2.2", "ipMode": "Proxy"}],
        "loadBalancerSourceRanges": ["203.0.113.0/24", "198.18.0.0/15"],
        "ports": [{"port": 80, "nodePort": 30080}],
    }));
    let mut kinds: Vec<_> = ground
        .frontends()
        .iter()
        .map(|it| (it.address.to_string(), it.port, it.kind))
        .collect();
    kinds.sort_by_key(|it| it.0.clone());
    assert_eq!(
        kinds,
        [
            ("0.0.0.0".into(), 30080, FrontendKind::NodePort),
            ("10.96.0.1".into(), 80, FrontendKind::ClusterIp),
            ("192.0.2.1".into(), 80, FrontendKind::LoadBalancer),
            ("198.51.100.1".into(), 80, FrontendKind::ExternalIp),
        ]
    );
    assert_eq!(
        ground.port("10.96.0.1", 80).source_lengths.as_slice(),
        [15, 24]
    );
    let sources = ground
        .rows()
        .into_iter()
        .filter(|it| matches!(it, ServiceRow::Source(_)))
        .count();
    assert_eq!(sources, 2);
}

#[test]
fn an_address_that_two_services_claim_goes_to_the_older_and_back() {
    let mut ground = Ground::new();
    let service = |name: &str, created: &str| {
        json!({
            "metadata": {"name": name, "namespace": "x", "creationTimestamp": created},
            "spec": {"clusterIP": "10.96.0.1", "externalIPs": ["172.16.0.1"], "ports": [{"port": 80}]},
        })
    };
    ground.put(Kind::Service, service("s", "2026-01-02T00:00:00Z"));
    let of_s = ground.port("10.96.0.1", 80).id;
    ground.put(Kind::Service, service("t", "2026-01-01T00:00:00Z"));
    let of_t = ground.port("10.96.0.1", 80).id;
    assert_ne!(of_s, of_t);
    ground.remove(Kind::Service, "t");
    assert_eq!(ground.port("10.96.0.1", 80).id, of_s);
    // The node's own address stays the node's.
    let role = ground.rows().into_iter().find_map(|it| match it {
        ServiceRow::Address(row) if row.address.to_string() == "172.16.0.1" => Some(row.role),
        _ => None,
    });
    assert_eq!(role, Some(sluice_contract::service::AddressRole::Node));
}

#[test]
fn s27_tables_are_whole_and_the_same_on_every_node() {
    let tables = |node: &str| {
        let mut ground = Ground::with(|config| {
            config.node = node.into();
            config.maglev = Maglev::Always;
        });
        ground.service(json!({"clusterIP": "10.96.0.1"}));
        ground.slice(
            "s-1",
            endpoints(&[("here", "rs"), ("there", "rs"), ("there", "rs")]),
        );
        let id = ground.port("10.96.0.1", 80).cluster.unwrap();
        let mut slots: Vec<u16> = Vec::new();
        for row in ground.rows() {
            match row {
                ServiceRow::Slots(row) if row.set == id => slots.extend(row.slots),
                ServiceRow::Set(row) if row.id == id => assert_eq!(row.slots, 509),
                _ => {}
            }
        }
        slots
    };
    let here = tables("here");
    assert_eq!(here.len(), 509);
    assert_eq!(here, tables("there"));
}

#[test]
fn without_slices_the_selected_pods_are_the_endpoints() {
    let mut ground = Ground::with(|config| config.endpoints_from_selectors = true);
    ground.service(json!({"clusterIP": "10.96.0.1", "selector": {"app": "web"}, "internalTrafficPolicy": "Local",
        "externalIPs": ["198.51.100.1"], "ports": [{"port": 80, "targetPort": "http"}]}));
    let pod = |name: &str, app: &str, port: u16, ip: Option<&str>| {
        json!({
            "metadata": {"name": name, "namespace": "x", "labels": {"app": app}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"podIP": ip},
        })
    };
    ground.put(Kind::Pod, pod("a", "web", 8080, None));
    ground.put(Kind::Pod, pod("b", "web", 9090, Some("10.0.0.2")));
    ground.put(Kind::Pod, pod("c", "other", 8080, Some("10.0.0.3")));
    assert_eq!(ground.sets()[0], ["10.0.0.2:9090"]);
    let attached = Attached {
        pod: Name::new("x", "a"),
        addresses: vec!["10.0.0.1".parse().unwrap()],
    };
    ground.model.attach(LinkId::new(16).unwrap(), attached);
    ground.model.compile();
    let [cluster, local, _] = ground.sets();
    assert_eq!(
        (cluster, local),
        (
            vec!["10.0.0.1:8080".into(), "10.0.0.2:9090".into()],
            vec!["10.0.0.1:8080".to_owned()]
        )
    );
    ground.remove(Kind::Pod, "b");
    ground.model.detach(LinkId::new(16).unwrap());
    ground.model.compile();
    assert!(!ground.port("10.96.0.1", 80).endpoints);
}

#[test]
fn s19_the_health_check_counts_ready_endpoints_of_this_node() {
    let mut ground = Ground::new();
    ground.service(json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000}));
    ground.slice(
        "s-1",
        endpoints(&[("here", "rs"), ("here", "st"), ("there", "rs")]),
    );
    assert_eq!(
        ground.model.health_checks(),
        [(31000, Name::new("x", "s"), 1)]
    );
}

#[test]
fn a_delta_of_one_endpoint_is_small_and_in_order() {
    let mut ground = Ground::new();
    ground.service(json!({"clusterIP": "10.96.0.1"}));
    ground.slice("s-1", endpoints(&[("here", "rs"), ("there", "rs")]));
    let first = ground.model.tables().take_delta();
    let position =
        |wanted: fn(&Key) -> bool| first.iter().position(|it| wanted(&it.key())).unwrap();
    let set = position(|it| matches!(it, Key::Service(ServiceKey::Set(_))));
    let backend = position(|it| matches!(it, Key::Service(ServiceKey::Backend { .. })));
    let port = position(|it| matches!(it, Key::Service(ServiceKey::Port(_))));
    let frontend = position(|it| matches!(it, Key::Service(ServiceKey::Frontend { .. })));
    assert!(set < backend && backend < port && port < frontend);
    ground.slice("s-1", endpoints(&[("here", "rs"), ("there", "")]));
    let second = ground.model.tables().take_delta();
    assert_eq!(
        second.len(),
        2,
        "the set's count, and one backend less: {second:#?}"
    );
    ground.remove(Kind::Service, "s");
    ground.remove(Kind::EndpointSlice, "s-1");
    let last = ground.model.tables().take_delta();
    let frontend = last
        .iter()
        .position(|it| matches!(it.key(), Key::Service(ServiceKey::Frontend { .. })));
    let set = last
        .iter()
        .position(|it| matches!(it.key(), Key::Service(ServiceKey::Set(_))));
    assert!(frontend < set);
}

#[test]
fn s28_services_say_how_clients_outside_are_led_on_and_nodes_what_holds_otherwise() {
    let direct = |ground: &mut Ground, annotation: Option<&str>, policy: &str| {
        let annotations: BTreeMap<_, _> = annotation
            .map(|it| ("sluice.dev/forwarding-mode", it))
            .into_iter()
            .collect();
        ground.put(
            Kind::Service,
            json!({
                "metadata": {"name": "s", "namespace": "x", "annotations": annotations},
                "spec": {
                    "clusterIP": "10.96.0.1", "externalTrafficPolicy": policy,
                    "ports": [{"port": 80, "nodePort": 30080}],
                },
            }),
        );
        ground.port("10.96.0.1", 80).direct_return
    };
    let mut usual = Ground::new();
    assert!(!direct(&mut usual, None, "Cluster"));
    assert!(direct(&mut usual, Some("dsr"), "Cluster"));
    assert!(!direct(&mut usual, Some("dsr"), "Local"));
    assert!(!direct(&mut usual, Some("DSR"), "Cluster"), "not a word");
    let mut other = Ground::with(|config| config.forwarding = Forwarding::Dsr);
    assert!(direct(&mut other, None, "Cluster"));
    assert!(!direct(&mut other, Some("snat"), "Cluster"));
    let mut unable = Ground::with(|config| config.no_direct_return = Some("no place".into()));
    assert!(!direct(&mut unable, Some("dsr"), "Cluster"));
}

#[test]
fn s20_a_node_that_is_taken_away_says_so() {
    let mut ground = Ground::new();
    let own = ground.model.config().node.to_string();
    let mut leaves = |metadata: Value, taints: Value| {
        let mut metadata = metadata;
        metadata["name"] = json!(own);
        ground.put(
            Kind::Node,
            json!({"metadata": metadata, "spec": {"taints": taints}}),
        );
        ground.model.is_leaving()
    };
    let taint = |key: &str| json!([{"key": key, "effect": "NoSchedule"}]);
    assert!(!leaves(json!({}), json!([])));
    assert!(!leaves(
        json!({}),
        taint("node.kubernetes.io/unschedulable")
    ));
    assert!(leaves(json!({}), taint("ToBeDeletedByClusterAutoscaler")));
    assert!(!leaves(json!({}), json!([])));
    let deleted = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
    assert!(leaves(deleted, json!([])));
}

#[test]
fn o03_where_flannel_reaches_another_node_is_that_nodes_address_too() {
    let mut ground = Ground::new();
    let put = |ground: &mut Ground, name: &str, annotations: Value| {
        let status = json!({"addresses": [{"type": "InternalIP", "address": "172.16.0.2"}]});
        let metadata = json!({"name": name, "annotations": annotations});
        ground.put(Kind::Node, json!({"metadata": metadata, "status": status}));
    };
    let role = |ground: &mut Ground, address: &str| {
        let key = Key::Service(ServiceKey::Address(address.parse().unwrap()));
        match ground.model.tables().row(&key) {
            Some(Row::Service(ServiceRow::Address(row))) => Some(row.role),
            _ => None,
        }
    };
    let peer = Some(sluice_contract::service::AddressRole::Peer);
    put(
        &mut ground,
        "there",
        json!({
            "flannel.alpha.coreos.com/backend-type": "vxlan",
            "flannel.alpha.coreos.com/public-ip": "192.0.2.2",
            "flannel.alpha.coreos.com/public-ipv6": "2001:db8::2",
        }),
    );
    for address in ["172.16.0.2", "192.0.2.2", "2001:db8::2"] {
        assert_eq!(role(&mut ground, address), peer, "{address}");
    }
    // It says another one now, and nonsense.
    put(
        &mut ground,
        "there",
        json!({
            "flannel.alpha.coreos.com/public-ip": "192.0.2.3",
            "flannel.alpha.coreos.com/public-ipv6": "nowhere",
        }),
    );
    assert_eq!(role(&mut ground, "192.0.2.3"), peer);
    for address in ["192.0.2.2", "2001:db8::2"] {
        assert_eq!(role(&mut ground, address), None, "{address}");
    }
    ground.remove(Kind::Node, "there");
    for address in ["172.16.0.2", "192.0.2.3"] {
        assert_eq!(role(&mut ground, address), None, "{address}");
    }
    // What this node's own annotations say it does not take for its own.
    put(
        &mut ground,
        "here",
        json!({"flannel.alpha.coreos.com/public-ip": "192.0.2.1"}),
    );
    assert_eq!(role(&mut ground, "192.0.2.1"), None);
}
