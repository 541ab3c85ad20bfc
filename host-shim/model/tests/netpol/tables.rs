//! The cases of the upstream NetworkPolicy and ClusterNetworkPolicy suites (features.md §2.4 and §2.5), by number: which of
//! the 81 cells, on two ports and three protocols, are open. Reference and compiled tables both have to say so.

use serde_json::{Value, json};

use crate::ground::{
    PROTOCOLS, differences, guest_allows, host_reaches, model, policy, with_guest, world,
};
use crate::packets::Node;
use crate::reference::{Connection, End, World};

/// One question: `x/a` to `y/b`, port, protocol.
pub(crate) struct Cell<'a> {
    pub(crate) from: &'a str,
    pub(crate) from_ns: &'a str,
    pub(crate) to: &'a str,
    pub(crate) to_ns: &'a str,
    pub(crate) port: u16,
    pub(crate) protocol: &'a str,
}

/// The table of a world is as expected, by reference and by compiled tables.
#[track_caller]
pub(crate) fn check_world(world: &World, expected: impl Fn(&Cell<'_>) -> bool) {
    let mut model = model(world);
    let name = |it: &crate::reference::Pod| {
        format!(
            "{}/{}",
            it.namespace,
            it.manifest["metadata"]["name"].as_str().unwrap()
        )
    };
    let mut node = Node::new(world, &mut model);
    with_guest(&mut model, |guest| {
        for from in &world.pods {
            for to in world.pods.iter().filter(|to| to.ip != from.ip) {
                for (protocol, number) in PROTOCOLS {
                    for port in [80, 81] {
                        let (from_name, to_name) = (name(from), name(to));
                        let cell = Cell {
                            from: &from_name,
                            from_ns: &from.namespace,
                            to: &to_name,
                            to_ns: &to.namespace,
                            port,
                            protocol,
                        };
                        let connection = Connection {
                            from: End::Pod(from),
                            to: End::Pod(to),
                            protocol,
                            port,
                        };
                        let wanted = expected(&cell);
                        let said = format!("{from_name} → {to_name}:{port}/{protocol}");
                        assert_eq!(world.allows(&connection), wanted, "reference: {said}");
                        assert_eq!(
                            guest_allows(guest, world, &connection, number),
                            wanted,
                            "tables: {said}"
                        );
                        let arrives = node.allows(from.ip, to.ip, number, port);
                        assert_eq!(arrives, wanted, "packets: {said}");
                    }
                }
            }
        }
        assert_eq!(differences(world, guest, &[80, 81]), [""; 0]);
        assert!(
            (0..9).all(|pod| host_reaches(guest, pod)),
            "n24: the node reaches its pods"
        );
    });
}

#[track_caller]
pub(crate) fn check(policies: Vec<Value>, expected: impl Fn(&Cell<'_>) -> bool) {
    check_world(
        &World {
            policies,
            ..world()
        },
        expected,
    );
}

#[track_caller]
pub(crate) fn check_cluster(
    policies: Vec<Value>,
    cluster_policies: Vec<Value>,
    expected: impl Fn(&Cell<'_>) -> bool,
) {
    check_world(
        &World {
            policies,
            cluster_policies,
            ..world()
        },
        expected,
    );
}

pub(crate) fn in_x(spec: Value) -> Value {
    policy("x", "p", spec)
}

pub(crate) fn pod(name: &str) -> Value {
    json!({"matchLabels": {"pod": name}})
}

pub(crate) fn ns(name: &str) -> Value {
    json!({"matchLabels": {"ns": name}})
}

fn expression(key: &str, operator: &str, values: &[&str]) -> Value {
    json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})
}

pub(crate) fn deny_ingress() -> Value {
    json!({"podSelector": {}, "policyTypes": ["Ingress"]})
}

/// Ingress to `target` from `from`, on all ports.
pub(crate) fn ingress(target: Value, from: Value) -> Value {
    in_x(json!({"podSelector": target, "ingress": [{"from": from}]}))
}

fn egress(target: Value, to: Value) -> Value {
    in_x(json!({"podSelector": target, "policyTypes": ["Egress"], "egress": [{"to": to}]}))
}

const TCP: &str = "TCP";

#[test]
fn netpol_101_default_deny_ingress() {
    check(vec![in_x(deny_ingress())], |it| it.to_ns != "x");
}

#[test]
fn netpol_102_default_deny_all() {
    let both = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    check(vec![in_x(both)], |it| it.to_ns != "x" && it.from_ns != "x");
}

#[test]
fn netpol_103_pods_of_the_servers_namespace() {
    let p = ingress(pod("a"), json!([{"podSelector": pod("b")}]));
    check(vec![p], |it| it.to != "x/a" || it.from == "x/b");
}

#[test]
fn netpol_104_a_target_behind_deny_all() {
    let open = policy("x", "q", json!({"podSelector": pod("a"), "ingress": [{}]}));
    check(vec![in_x(deny_ingress()), open], |it| {
        it.to_ns != "x" || it.to == "x/a"
    });
}

#[test]
fn netpol_105_all_namespaces() {
    let p = ingress(pod("a"), json!([{"namespaceSelector": {}}]));
    check(
        vec![in_x(deny_ingress()), policy("x", "q", p["spec"].clone())],
        |it| it.to_ns != "x" || it.to == "x/a",
    );
}

#[test]
fn netpol_106_a_different_namespace() {
    let p = ingress(pod("a"), json!([{"namespaceSelector": ns("y")}]));
    check(vec![p], |it| it.to != "x/a" || it.from_ns == "y");
}

#[test]
fn netpol_107_pod_expressions() {
    let p = ingress(
        pod("a"),
        json!([{"podSelector": expression("pod", "In", &["b"])}]),
    );
    check(vec![p], |it| it.to != "x/a" || it.from == "x/b");
}

#[test]
fn netpol_108_namespace_expressions() {
    let p = ingress(
        pod("a"),
        json!([{"namespaceSelector": expression("ns", "In", &["y"])}]),
    );
    check(vec![p], |it| it.to != "x/a" || it.from_ns == "y");
}

#[test]
fn netpol_109_two_peers_are_or() {
    let p = ingress(
        pod("a"),
        json!([{"namespaceSelector": expression("ns", "NotIn", &["x"])}, {"podSelector": pod("b")}]),
    );
    check(vec![p], |it| {
        it.to != "x/a" || it.from_ns != "x" || it.from == "x/b"
    });
}

#[test]
fn netpol_110_one_peer_with_both_is_and() {
    let p = ingress(
        pod("a"),
        json!([{"namespaceSelector": expression("ns", "NotIn", &["x"]), "podSelector": pod("b")}]),
    );
    check(vec![p], |it| {
        it.to != "x/a" || (it.from_ns != "x" && it.from.ends_with('b'))
    });
}

#[test]
fn netpol_111_several_pod_and_namespace_selectors() {
    let peer = json!({"namespaceSelector": expression("ns", "NotIn", &["x"]), "podSelector": expression("pod", "In", &["b", "c"])});
    let p = ingress(pod("a"), json!([peer]));
    check(vec![p], |it| {
        it.to != "x/a" || (it.from_ns != "x" && !it.from.ends_with('a'))
    });
}

#[test]
fn netpol_112_any_pod_selectors() {
    let p = ingress(
        pod("a"),
        json!([{"podSelector": pod("b")}, {"podSelector": pod("c")}]),
    );
    check(vec![p], |it| it.to != "x/a" || it.from_ns == "x");
}

#[test]
fn netpol_113_a_pod_in_a_different_namespace() {
    let p = ingress(
        pod("a"),
        json!([{"namespaceSelector": ns("y"), "podSelector": pod("a")}]),
    );
    check(vec![p], |it| it.to != "x/a" || it.from == "y/a");
}

fn y_to_a_81(protocol: &str, name: &str, port: u16) -> Value {
    policy(
        "x",
        name,
        json!({"podSelector": pod("a"), "ingress": [
        {"from": [{"namespaceSelector": ns("y")}], "ports": [{"port": port, "protocol": protocol}]}]}),
    )
}

#[test]
fn netpol_114_ports() {
    check(vec![y_to_a_81(TCP, "p", 81)], |it| {
        it.to != "x/a" || (it.from_ns == "y" && it.port == 81 && it.protocol == TCP)
    });
}

#[test]
fn netpol_115_stacked_policies() {
    check(
        vec![y_to_a_81(TCP, "p", 81), y_to_a_81(TCP, "q", 80)],
        |it| it.to != "x/a" || (it.from_ns == "y" && it.protocol == TCP),
    );
}

#[test]
fn netpol_116_allow_all() {
    check(
        vec![in_x(json!({"podSelector": {}, "ingress": [{}]}))],
        |_| true,
    );
}

fn named(from: Value, port: &str) -> Value {
    in_x(json!({"podSelector": {}, "ingress": [{"from": from, "ports": [{"port": port}]}]}))
}

#[test]
fn netpol_117_one_named_port() {
    check(vec![named(json!([]), "serve-81-tcp")], |it| {
        it.to_ns != "x" || (it.port == 81 && it.protocol == TCP)
    });
}

#[test]
fn netpol_118_namespace_on_one_named_port() {
    let from = json!([{"namespaceSelector": ns("y")}]);
    check(vec![named(from, "serve-81-tcp")], |it| {
        it.to_ns != "x" || (it.from_ns == "y" && it.port == 81 && it.protocol == TCP)
    });
}

#[test]
fn netpol_119_egress_on_one_named_port_is_resolved_at_the_destination() {
    let p = in_x(
        json!({"podSelector": pod("a"), "policyTypes": ["Egress"], "egress": [{"ports": [{"port": "serve-80-tcp"}]}]}),
    );
    let mut world = World {
        policies: vec![p],
        ..world()
    };
    // y/b means another number by that name.
    world.pods[4].manifest["spec"]["containers"] =
        json!([{"name": "c", "ports": [{"name": "serve-80-tcp", "containerPort": 81}]}]);
    check_world(&world, |it| {
        it.from != "x/a" || (it.protocol == TCP && it.port == if it.to == "y/b" { 81 } else { 80 })
    });
}

#[test]
fn netpol_120_an_updated_policy() {
    crate::replay::follows(
        |world| world.policies = vec![in_x(json!({"podSelector": {}, "ingress": [{}]}))],
        |world| world.policies = vec![in_x(deny_ingress())],
        |_, after, it| !after || !it.starts_with("x/"),
    );
}

#[test]
fn netpol_121_an_updated_namespace() {
    let p = || {
        ingress(
            pod("a"),
            json!([{"namespaceSelector": {"matchLabels": {"ns2": "updated"}}}]),
        )
    };
    crate::replay::follows(
        |world| world.policies = vec![p()],
        |world| world.namespaces[1].1["ns2"] = json!("updated"),
        |from, after, to| to != "x/a" || (after && from.starts_with("y/")),
    );
}

#[test]
fn netpol_122_an_updated_client_pod() {
    let p = || {
        ingress(
            pod("a"),
            json!([{"podSelector": {"matchLabels": {"pod2": "updated"}}}]),
        )
    };
    crate::replay::follows(
        |world| world.policies = vec![p()],
        |world| world.pods[1].manifest["metadata"]["labels"]["pod2"] = json!("updated"),
        |from, after, to| to != "x/a" || (after && from == "x/b"),
    );
}

#[test]
fn netpol_123_pods_of_other_namespaces() {
    check(
        vec![ingress(json!({}), json!([{"podSelector": {}}]))],
        |it| it.to_ns != "x" || it.from_ns == "x",
    );
}

#[test]
fn netpol_124_an_updated_target_pod() {
    let p = || {
        in_x(json!({"podSelector": {"matchLabels": {"target": "yes"}}, "policyTypes": ["Ingress"]}))
    };
    crate::replay::follows(
        |world| world.policies = vec![p()],
        |world| world.pods[0].manifest["metadata"]["labels"]["target"] = json!("yes"),
        |_, after, to| to != "x/a" || !after,
    );
}

#[test]
fn netpol_125_no_egress_by_pod_selector() {
    check(
        vec![in_x(
            json!({"podSelector": pod("a"), "policyTypes": ["Egress"]}),
        )],
        |it| it.from != "x/a",
    );
}

#[test]
fn netpol_126_no_egress_from_a_namespace() {
    check(
        vec![in_x(json!({"podSelector": {}, "policyTypes": ["Egress"]}))],
        |it| it.from_ns != "x",
    );
}

#[test]
fn netpol_127_ingress_and_egress_together() {
    let p = in_x(
        json!({"podSelector": pod("a"), "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"port": 80}]}], "egress": [{"ports": [{"port": 81}]}]}),
    );
    check(vec![p], |it| match (it.from, it.to) {
        ("x/a", _) => it.port == 81 && it.protocol == TCP,
        (_, "x/a") => it.port == 80 && it.protocol == TCP,
        _ => true,
    });
}

#[test]
fn netpol_128_the_clients_side_denies_what_the_server_allows() {
    let allow = policy(
        "y",
        "p",
        json!({"podSelector": pod("a"), "ingress": [{"from": [{"namespaceSelector": ns("x")}]}]}),
    );
    let deny = in_x(json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": []}));
    check(vec![allow, deny], |it| it.from_ns != "x" && it.to != "y/a");
}

#[test]
fn netpol_129_egress_to_a_server_in_a_different_namespace() {
    let p = egress(
        pod("a"),
        json!([{"namespaceSelector": ns("y"), "podSelector": pod("a")}]),
    );
    check(vec![p], |it| it.from != "x/a" || it.to == "y/a");
}

#[test]
fn netpol_130_a_protocol_without_a_port() {
    let p = in_x(json!({"podSelector": pod("a"), "ingress": [{"ports": [{"protocol": "UDP"}]}]}));
    check(vec![p], |it| it.to != "x/a" || it.protocol == "UDP");
}

#[test]
fn netpol_131_ingress_allow_all_takes_precedence() {
    let all = policy("x", "q", json!({"podSelector": {}, "ingress": [{}]}));
    check(
        vec![ingress(pod("a"), json!([{"podSelector": pod("b")}])), all],
        |_| true,
    );
}

#[test]
fn netpol_132_egress_allow_all_takes_precedence() {
    let all = policy(
        "x",
        "q",
        json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}),
    );
    check(
        vec![egress(pod("a"), json!([{"podSelector": pod("b")}])), all],
        |_| true,
    );
}

#[test]
fn netpol_133_a_deleted_policy() {
    crate::replay::follows(
        |world| world.policies = vec![in_x(deny_ingress())],
        |world| world.policies.clear(),
        |_, after, to| after || !to.starts_with("x/"),
    );
}

#[test]
fn netpol_134_a_server_in_a_block() {
    let p = egress(pod("a"), json!([{"ipBlock": {"cidr": "10.0.2.2/32"}}]));
    check(vec![p], |it| it.from != "x/a" || it.to == "y/b");
}

#[test]
fn netpol_135_n04_except() {
    let p = egress(
        pod("a"),
        json!([{"ipBlock": {"cidr": "10.0.2.0/24", "except": ["10.0.2.2/32"]}}]),
    );
    check(vec![p], |it| {
        it.from != "x/a" || (it.to_ns == "y" && it.to != "y/b")
    });
}

#[test]
fn netpol_136_n04_a_block_wins_over_anothers_except() {
    let excepted = egress(
        pod("a"),
        json!([{"ipBlock": {"cidr": "10.0.2.0/24", "except": ["10.0.2.2/32"]}}]),
    );
    let other = policy(
        "x",
        "q",
        json!({"podSelector": pod("a"), "policyTypes": ["Egress"],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.2.2/32"}}]}]}),
    );
    check(vec![excepted, other], |it| {
        it.from != "x/a" || it.to_ns == "y"
    });
}

#[test]
fn netpol_137_directions_are_independent() {
    let p = ingress(pod("a"), json!([{"podSelector": pod("b")}]));
    let q = policy(
        "x",
        "q",
        json!({"podSelector": pod("a"), "policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": pod("c")}]}]}),
    );
    check(vec![p, q], |it| {
        (it.to != "x/a" || it.from == "x/b") && (it.from != "x/a" || it.to == "x/c")
    });
}

fn only(protocol: &str) -> Value {
    in_x(json!({"podSelector": {}, "ingress": [{"ports": [{"protocol": protocol, "port": 81}]}]}))
}

#[test]
fn netpol_138_sctp_does_not_open_tcp() {
    check(vec![only("SCTP")], |it| {
        it.to_ns != "x" || (it.protocol == "SCTP" && it.port == 81)
    });
}

#[test]
fn netpol_139_a_policy_about_sctp_isolates() {
    let p = in_x(
        json!({"podSelector": pod("a"), "ingress": [{"ports": [{"protocol": "SCTP", "port": 7}]}]}),
    );
    check(vec![p], |it| it.to != "x/a");
}

#[test]
fn netpol_140_udp_does_not_open_tcp() {
    check(vec![only("UDP")], |it| {
        it.to_ns != "x" || (it.protocol == "UDP" && it.port == 81)
    });
}

#[test]
fn netpol_141_the_default_label_of_namespaces() {
    let selector = json!({"matchLabels": {"kubernetes.io/metadata.name": "y"}});
    check(
        vec![ingress(pod("a"), json!([{"namespaceSelector": selector}]))],
        |it| it.to != "x/a" || it.from_ns == "y",
    );
}

#[test]
fn netpol_142_the_default_label_in_expressions() {
    let selector = expression("kubernetes.io/metadata.name", "NotIn", &["z"]);
    check(
        vec![egress(pod("a"), json!([{"namespaceSelector": selector}]))],
        |it| it.from != "x/a" || it.to_ns != "z",
    );
}

#[test]
fn netpol_143_144_udp_and_sctp_groups() {
    for protocol in ["UDP", "SCTP"] {
        check(vec![y_to_a_81(protocol, "p", 81)], |it| {
            it.to != "x/a" || (it.from_ns == "y" && it.port == 81 && it.protocol == protocol)
        });
        let p = ingress(
            pod("a"),
            json!([{"namespaceSelector": ns("y"), "podSelector": pod("a")}]),
        );
        check(vec![p], |it| it.to != "x/a" || it.from == "y/a");
    }
}

#[test]
fn netpol_145_n03_ranges_have_exact_ends() {
    let p =
        in_x(json!({"podSelector": {}, "ingress": [{"ports": [{"port": 8000, "endPort": 8010}]}]}));
    let world = World {
        policies: vec![p],
        ..world()
    };
    let mut model = model(&world);
    with_guest(&mut model, |guest| {
        let open = (0..=u16::MAX).filter(|port| {
            let it = Connection {
                from: End::Pod(&world.pods[3]),
                to: End::Pod(&world.pods[0]),
                protocol: TCP,
                port: *port,
            };
            guest_allows(guest, &world, &it, sluice_contract::Protocol::Tcp)
        });
        assert_eq!(open.collect::<Vec<_>>(), (8000..=8010).collect::<Vec<_>>());
    });
}

#[test]
fn netpol_147_conflicts_and_ports_nobody_has() {
    let wrong = in_x(
        json!({"podSelector": {}, "ingress": [{"ports": [{"port": "serve-81-tcp", "protocol": "UDP"}, {"port": "nothing"}]}]}),
    );
    check(vec![wrong], |it| it.to_ns != "x");
    let all = policy("x", "q", json!({"podSelector": {}, "ingress": [{}]}));
    check(vec![in_x(deny_ingress()), all], |_| true);
}
