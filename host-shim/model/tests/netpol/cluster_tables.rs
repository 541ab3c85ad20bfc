//! The cases of ClusterNetworkPolicy: tiers, priorities, peers that a NetworkPolicy does not have.

use serde_json::{Value, json};

use crate::ground::{cluster_policy, differences, model, policy, with_guest, world};
use crate::reference::World;
use crate::tables::{check_cluster, check_world, deny_ingress, in_x, ingress, ns, pod};

/// A cluster-wide policy about all pods of `x`.
fn cnp(name: &str, tier: &str, priority: u16, rest: &Value) -> Value {
    let mut spec = json!({"tier": tier, "priority": priority, "subject": {"namespaces": ns("x")}});
    for (key, value) in rest.as_object().unwrap() {
        spec[key] = value.clone();
    }
    cluster_policy(name, spec)
}

#[test]
fn netpol_148_n11_tiers_directions_protocols() {
    for tier in ["Admin", "Baseline"] {
        for (name, protocol) in [("tcp", "TCP"), ("udp", "UDP"), ("sctp", "SCTP")] {
            let rules = |side: &str| {
                json!([
                    {"action": "Accept", side: [{"pods": {"podSelector": pod("b"), "namespaceSelector": ns("y")}}], "protocols": [{name: {"destinationPort": {"number": 80}}}]},
                    {"action": "Deny", side: [{"namespaces": {}}], "protocols": [{name: {}}]},
                ])
            };
            let incoming = cnp("c", tier, 5, &json!({"ingress": rules("from")}));
            check_cluster(vec![], vec![incoming], |it| {
                it.to_ns != "x" || it.protocol != protocol || (it.from == "y/b" && it.port == 80)
            });
            let outgoing = cnp("c", tier, 5, &json!({"egress": rules("to")}));
            check_cluster(vec![], vec![outgoing], |it| {
                it.from_ns != "x" || it.protocol != protocol || (it.to == "y/b" && it.port == 80)
            });
        }
    }
}

#[test]
fn netpol_148_n13_blocks_nodes_and_named_ports() {
    let blocks = cnp(
        "c",
        "Admin",
        5,
        &json!({"egress": [
        {"action": "Accept", "to": [{"networks": ["10.0.2.2/32"]}]},
        {"action": "Deny", "to": [{"networks": ["10.0.2.0/24", "10.0.3.0/24"]}]}]}),
    );
    check_cluster(vec![], vec![blocks], |it| {
        it.from_ns != "x" || it.to_ns == "x" || it.to == "y/b"
    });
    let named = cnp(
        "c",
        "Baseline",
        5,
        &json!({"ingress": [
        {"action": "Deny", "from": [{"namespaces": {}}], "protocols": [{"destinationNamedPort": "serve-80-udp"}]}]}),
    );
    check_cluster(vec![], vec![named], |it| {
        it.to_ns != "x" || it.port != 80 || it.protocol != "UDP"
    });
    // n13: nodes are peers by their addresses, and follow their labels.
    let nodes = cnp(
        "c",
        "Admin",
        5,
        &json!({"egress": [{"action": "Deny", "to": [{"nodes": {"matchLabels": {"a": "b"}}}]}]}),
    );
    let node = |label: &str| {
        json!({"metadata": {"name": "n", "labels": {"a": label}},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.0.2.2"}]}})
    };
    let of = |label| World {
        cluster_policies: vec![nodes.clone()],
        nodes: vec![node(label)],
        ..world()
    };
    check_world(&of("b"), |it| it.from_ns != "x" || it.to != "y/b");
    check_world(&of("c"), |_| true);
}

#[test]
fn netpol_148_lower_priorities_come_first_and_rules_in_their_order() {
    let rule =
        |action: &str| json!({"ingress": [{"action": action, "from": [{"namespaces": {}}]}]});
    for (first, second) in [("Accept", "Deny"), ("Deny", "Accept"), ("Pass", "Deny")] {
        let policies = vec![
            cnp("b", "Admin", 0, &rule(first)),
            cnp("a", "Admin", 1000, &rule(second)),
        ];
        check_cluster(vec![], policies, |it| it.to_ns != "x" || first != "Deny");
    }
}

#[test]
fn netpol_148_149_admin_then_network_policy_then_baseline() {
    let rule = |action: &str, from: &str| json!({"ingress": [{"action": action, "from": [{"namespaces": ns(from)}]}]});
    let np = in_x(
        json!({"podSelector": pod("a"), "ingress": [{"from": [{"namespaceSelector": ns("y")}]}]}),
    );
    let policies = vec![
        cnp("a", "Admin", 1, &rule("Pass", "y")),
        cnp("b", "Admin", 2, &rule("Deny", "y")),
        cnp("c", "Admin", 3, &rule("Accept", "z")),
        cnp("d", "Baseline", 1, &rule("Deny", "y")),
    ];
    check_cluster(vec![np], policies, |it| match (it.to_ns, it.from_ns) {
        // Accepted for good in the first tier.
        ("x", "z") => true,
        // Passed: the NetworkPolicy has the last word for x/a, the baseline for the others.
        ("x", "y") => it.to == "x/a",
        ("x", "x") => it.to != "x/a",
        _ => true,
    });
}

#[test]
fn netpol_149_an_accepted_egress_does_not_open_the_destination() {
    let out = cnp(
        "a",
        "Admin",
        1,
        &json!({"egress": [{"action": "Accept", "to": [{"namespaces": {}}]}]}),
    );
    let closed = policy("y", "p", deny_ingress());
    check_cluster(vec![closed], vec![out], |it| it.to_ns != "y");
}

#[test]
fn netpol_149_n10_pods_on_the_nodes_network_are_neither_subjects_nor_peers() {
    let p = ingress(json!({}), json!([{"namespaceSelector": {}}]));
    let world = World {
        policies: vec![p],
        ..world()
    };
    let mut on_node = world.pods[4].clone();
    on_node.manifest["metadata"]["name"] = json!("n");
    on_node.manifest["spec"]["hostNetwork"] = json!(true);
    on_node.manifest["status"]["podIP"] = json!("172.16.0.1");
    let mut model = model(&world);
    let admission =
        sluice_model::validate::admit_as(sluice_model::object::Kind::Pod, on_node.manifest);
    model.apply(sluice_model::store::Event::Put(admission.object.unwrap()));
    model.compile();
    with_guest(&mut model, |guest| {
        assert_eq!(differences(&world, guest, &[80]), [""; 0]);
    });
}
