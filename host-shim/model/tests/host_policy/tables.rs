//! Truth tables: who reaches the node, and whom the node reaches, by policy, port and family.

use serde_json::json;
use sluice_appliance::testing::node::BOTH;
use sluice_model::compile::{Config, HostPolicy, HostPolicyMode};

use crate::ground::{Ground, NODE_PORT, What, Who, policy};
use What::{Ping, Tcp, Udp};

/// Ports of the node, or of whom it asks, that rules and failsafe treat differently.
const WHAT: [What; 14] = [
    Tcp(22),
    Tcp(80),
    Tcp(5432),
    Tcp(6443),
    Tcp(9099),
    Tcp(9100),
    Tcp(9200),
    Tcp(9201),
    Tcp(10250),
    Tcp(53),
    Udp(53),
    Udp(22),
    Udp(9100),
    Ping,
];
const SENDERS: [Who; 3] = [Who::Web, Who::Db, Who::Far];

/// Every sender and port, by packets and by `sluice policy trace`, as `open` says.
#[track_caller]
fn holds(
    ground: &mut Ground,
    to_node: impl Fn(Who, What) -> bool,
    from_node: impl Fn(Who, What) -> bool,
) {
    for a in BOTH {
        for what in WHAT {
            for who in SENDERS {
                let cell = format!("{who:?} {what:?} {:?}", a.family);
                let arrives = ground.allows(&a, who, Who::Node, what);
                assert_eq!(arrives, to_node(who, what), "to the node: {cell}");
                assert_eq!(
                    ground.traced(&a, who, Who::Node, what),
                    arrives,
                    "traced to the node: {cell}"
                );
                let arrives = ground.allows(&a, Who::Node, who, what);
                assert_eq!(arrives, from_node(who, what), "from the node: {cell}");
                assert_eq!(
                    ground.traced(&a, Who::Node, who, what),
                    arrives,
                    "traced from the node: {cell}"
                );
            }
        }
    }
}

fn is_open_in(what: What) -> bool {
    matches!(what, Tcp(22 | 6443 | 10250))
}

fn is_open_out(what: What) -> bool {
    matches!(what, Tcp(6443 | 53) | Udp(53))
}

fn is_own(who: Who) -> bool {
    who != Who::Far
}

#[test]
fn n21_without_a_policy_everything_passes() {
    let elsewhere = policy(
        "others",
        json!({"nodeSelector": {"matchLabels": {"role": "gateway"}}, "policyTypes": ["Ingress", "Egress"]}),
    );
    for more in [vec![], vec![elsewhere]] {
        holds(
            &mut Ground::new(Config::default(), more),
            |_, _| true,
            |_, _| true,
        );
    }
}

#[test]
fn n21_a_policy_without_rules_leaves_what_is_failsafe_and_the_nodes_own_pods() {
    let all = policy(
        "all",
        json!({"nodeSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
    );
    let mut ground = Ground::new(Config::default(), [all]);
    holds(
        &mut ground,
        |_, what| is_open_in(what),
        |who, what| is_own(who) || is_open_out(what),
    );
    let ingress = policy("in", json!({"nodeSelector": {}}));
    let mut ground = Ground::new(Config::default(), [ingress]);
    holds(&mut ground, |_, what| is_open_in(what), |_, _| true);
    let egress = policy(
        "out",
        json!({"nodeSelector": {}, "policyTypes": ["Egress"]}),
    );
    let mut ground = Ground::new(Config::default(), [egress]);
    holds(
        &mut ground,
        |_, _| true,
        |who, what| is_own(who) || is_open_out(what),
    );
}

#[test]
fn n21_rules_name_peers_by_labels_and_addresses_and_ports_by_range_and_name() {
    let far: Vec<_> = BOTH
        .iter()
        .map(|a| {
            let whole = if a.remote.contains(':') { 128 } else { 32 };
            json!({"ipBlock": {"cidr": format!("{}/{whole}", a.remote)}})
        })
        .collect();
    let rules = policy(
        "rules",
        json!({"nodeSelector": {"matchExpressions": [{"key": "role", "operator": "In", "values": ["worker"]}]},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"namespaceSelector": {"matchLabels": {"team": "x"}}, "podSelector": {"matchLabels": {"app": "web"}}}],
                    "ports": [{"port": 9100, "endPort": 9200}]},
                {"from": far, "ports": [{"port": 80}, {"port": 9100, "protocol": "UDP"}]}],
            "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"team": "z"}}}], "ports": [{"port": "sql"}]}]}),
    );
    let mut ground = Ground::new(Config::default(), [rules]);
    holds(
        &mut ground,
        |who, what| {
            is_open_in(what)
                || match who {
                    Who::Web => matches!(what, Tcp(9100..=9200)),
                    Who::Far => matches!(what, Tcp(80) | Udp(9100)),
                    _ => false,
                }
        },
        |who, what| is_own(who) || is_open_out(what) || what == Tcp(5432),
    );
}

#[test]
fn n21_two_policies_allow_what_either_does() {
    let rule = |name: &str, team: &str, port: u16| {
        policy(
            name,
            json!({"nodeSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": team}}}], "ports": [{"port": port}]}]}),
        )
    };
    let mut ground = Ground::new(
        Config::default(),
        [rule("a", "x", 80), rule("b", "y", 9100)],
    );
    holds(
        &mut ground,
        |who, what| {
            is_open_in(what) || matches!((who, what), (Who::Web, Tcp(80)) | (Who::Db, Tcp(9100)))
        },
        |_, _| true,
    );
}

#[test]
fn n21_service_frontends_are_judged_by_the_nodes_port_behind_them() {
    let only = |ports: serde_json::Value| {
        policy(
            "only",
            json!({"nodeSelector": {}, "ingress": [{"ports": ports}]}),
        )
    };
    for a in BOTH {
        for (ports, open) in [
            (json!([{"port": 8080}]), true),
            // The ports of the frontends themselves are nothing to the node.
            (json!([{"port": 80}, {"port": NODE_PORT}]), false),
        ] {
            let mut ground = Ground::new(Config::default(), [only(ports)]);
            for (from, to, port) in [
                (Who::Web, a.cluster_ip, 80),
                (Who::Db, a.node, NODE_PORT),
                (Who::Outside, a.node, NODE_PORT),
                (Who::Outside, a.load_balancer, 80),
            ] {
                let packet = ground.opening(&a, from, to, Tcp(port));
                assert_eq!(
                    ground.arrives(from, Who::Node, &packet),
                    open,
                    "{from:?} {to}:{port}"
                );
            }
        }
    }
}

#[test]
fn n21_failsafe_ports_are_the_operators_and_none_if_that_is_said() {
    let all = || {
        policy(
            "all",
            json!({"nodeSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        )
    };
    let none = HostPolicy {
        failsafe_ingress: [].into(),
        failsafe_egress: [].into(),
        ..HostPolicy::default()
    };
    let config = |host_policy: HostPolicy| Config {
        host_policy,
        ..Config::default()
    };
    holds(
        &mut Ground::new(config(none), [all()]),
        |_, _| false,
        |who, _| is_own(who),
    );
    let off = HostPolicy {
        mode: HostPolicyMode::Off,
        ..HostPolicy::default()
    };
    holds(
        &mut Ground::new(config(off), [all()]),
        |_, _| true,
        |_, _| true,
    );
}

#[test]
fn n21_probes_reach_own_pods_unless_the_operator_says_otherwise() {
    let all = || {
        policy(
            "all",
            json!({"nodeSelector": {}, "policyTypes": ["Egress"]}),
        )
    };
    let strict = Config {
        host_reaches_pods: false,
        ..Config::default()
    };
    let mut ground = Ground::new(strict, [all()]);
    holds(&mut ground, |_, _| true, |_, what| is_open_out(what));
}
