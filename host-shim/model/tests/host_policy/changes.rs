//! Policies come, change and go: connections, bytes and the order in which it is said.

use serde_json::json;
use sluice_appliance::Verdict;
use sluice_appliance::testing::node::{Addresses, BOTH, V4};
use sluice_contract::policy::Established;
use sluice_contract::{DropReason, LinkId};
use sluice_model::compile::{Config, HostPolicy, HostPolicyMode};
use sluice_model::store::Event;

use crate::ground::{Ground, What, Who, no_policy, objects, policy};

fn closed() -> Event {
    policy(
        "closed",
        json!({"nodeSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
    )
}

/// Frames of all kinds, some of connections that began before, and what became of each.
fn bytes(ground: &mut Ground) -> Vec<(Verdict, Vec<u8>)> {
    let mut all = Vec::new();
    for a in BOTH {
        for (from, to) in [
            (Who::Web, a.node),
            (Who::Far, a.node),
            (Who::Node, a.pods[0]),
            (Who::Node, a.remote),
            (Who::Node, a.cluster_ip),
            (Who::Web, a.cluster_ip),
            (Who::Outside, a.node),
            (Who::Web, a.outside),
            (Who::Web, a.pods[1]),
        ] {
            for what in [What::Tcp(80), What::Udp(9), What::Ping] {
                let packet = ground.opening(&a, from, to, what);
                for _ in 0..2 {
                    let end = ground.send(from, &packet);
                    all.push((end.verdict, end.bytes));
                }
            }
        }
    }
    all
}

#[test]
fn n21_without_a_policy_every_byte_is_what_it_was() {
    let off = Config {
        host_policy: HostPolicy {
            mode: HostPolicyMode::Off,
            ..HostPolicy::default()
        },
        ..Config::default()
    };
    let expected = bytes(&mut Ground::new(off.clone(), []));
    let count = |kind: fn(&Verdict) -> bool| expected.iter().filter(|(it, _)| kind(it)).count();
    assert!(count(|it| matches!(it, Verdict::Forward(_))) > 80);
    assert_eq!(bytes(&mut Ground::new(Config::default(), [])), expected);
    assert_eq!(bytes(&mut Ground::new(off, [closed()])), expected);
    let mut ground = Ground::new(Config::default(), []);
    let before: Vec<_> = ground.model.tables().all().collect();
    ground.hear([closed()]);
    assert_ne!(ground.model.tables().all().collect::<Vec<_>>(), before);
    ground.hear([no_policy("closed")]);
    assert_eq!(ground.model.tables().all().collect::<Vec<_>>(), before);
    assert_eq!(bytes(&mut ground), expected);
}

/// A connection to the node's port 80, its answer, and another packet of it.
fn connection(ground: &mut Ground, a: &Addresses) -> impl Fn(&mut Ground) -> Verdict + use<> {
    let opening = ground.opening(a, Who::Web, a.node, What::Udp(80));
    assert!(ground.arrives(Who::Web, Who::Node, &opening));
    let mut answer = opening.clone();
    (answer.source, answer.destination) = (opening.destination, opening.source);
    let macs = ground.opening(a, Who::Node, a.pods[0], What::Udp(80));
    (answer.source_mac, answer.destination_mac) = (macs.source_mac, macs.destination_mac);
    let sluice_appliance::testing::Segment::Udp {
        source,
        destination,
    } = opening.transport
    else {
        panic!("{opening:?}")
    };
    let answer = answer.udp(destination, source);
    assert!(ground.arrives(Who::Node, Who::Web, &answer));
    move |ground| {
        let answered = ground.send(Who::Node, &answer).verdict;
        let asked = ground.send(Who::Web, &opening).verdict;
        if asked == Verdict::Forward(LinkId::HOST) {
            assert_eq!(
                answered,
                Verdict::Forward(LinkId::new(Who::Web.link()).unwrap())
            );
        }
        asked
    }
}

#[test]
fn n21_established_connections_end_or_live_as_those_of_pods_do() {
    for a in BOTH {
        for established in [Established::Judged, Established::Kept] {
            let config = Config {
                established,
                ..Config::default()
            };
            let mut ground = Ground::new(config, []);
            let goes_on = connection(&mut ground, &a);
            ground.hear([closed()]);
            let verdict = goes_on(&mut ground);
            let expected = match established {
                Established::Judged => Verdict::Drop(DropReason::PolicyIngress),
                Established::Kept => Verdict::Forward(LinkId::HOST),
            };
            assert_eq!(verdict, expected);
            assert!(!ground.allows(&a, Who::Web, Who::Node, What::Udp(80)));
            ground.hear([no_policy("closed")]);
            assert_eq!(goes_on(&mut ground), Verdict::Forward(LinkId::HOST));
            assert!(ground.allows(&a, Who::Web, Who::Node, What::Udp(80)));
        }
    }
}

#[test]
fn n21_answers_pass_whatever_the_other_direction_says() {
    let none_out = policy(
        "out",
        json!({"nodeSelector": {}, "policyTypes": ["Egress"]}),
    );
    for a in BOTH {
        let mut ground = Ground::new(Config::default(), [none_out.clone()]);
        assert_eq!(
            connection(&mut ground, &a)(&mut ground),
            Verdict::Forward(LinkId::HOST)
        );
        assert!(!ground.allows(&a, Who::Node, Who::Far, What::Udp(80)));
    }
}

#[test]
fn n21_audited_policy_lets_pass_and_tells_the_rule() {
    let audit = Config {
        host_policy: HostPolicy {
            mode: HostPolicyMode::Audit,
            ..HostPolicy::default()
        },
        ..Config::default()
    };
    let mut ground = Ground::new(audit, [closed()]);
    assert!(ground.allows(&V4, Who::Web, Who::Node, What::Tcp(80)));
    assert!(ground.allows(&V4, Who::Web, Who::Node, What::Tcp(22)));
    let (event, cursor) = ground.bench.pipeline.audited().after(0).unwrap();
    assert_eq!((event.link, event.port), (LinkId::HOST, 80));
    let rule = ground.model.rule(event.rule).unwrap().to_string();
    assert_eq!(rule, "default-deny ingress by NodePolicy closed");
    assert!(ground.bench.pipeline.audited().after(cursor).is_none());
    // Policies of pods are enforced beside it.
    let isolated = serde_json::json!({"metadata": {"name": "p", "namespace": "x"}, "spec": {"podSelector": {}, "policyTypes": ["Egress"]}});
    ground.hear([crate::ground::put(
        sluice_model::object::Kind::NetworkPolicy,
        isolated,
    )]);
    assert!(!ground.allows(&V4, Who::Web, Who::Node, What::Tcp(80)));
}

#[test]
fn n21_the_nodes_labels_decide_and_an_object_that_goes_does_not_open_the_node() {
    let workers = || {
        policy(
            "workers",
            json!({"nodeSelector": {"matchLabels": {"role": "worker"}}}),
        )
    };
    let node = |role: &str| {
        crate::ground::put(
            sluice_model::object::Kind::Node,
            json!({"metadata": {"name": crate::ground::HERE, "labels": {"role": role}}}),
        )
    };
    let gone = || {
        Event::Removed(sluice_model::object::ObjectKey {
            kind: sluice_model::object::Kind::Node,
            name: sluice_model::object::Name::new("", crate::ground::HERE),
        })
    };
    for undescribed in [
        sluice_model::compile::Undescribed::AsBefore,
        sluice_model::compile::Undescribed::Unlabelled,
    ] {
        let config = Config {
            undescribed,
            ..Config::default()
        };
        let mut ground = Ground::new(config, [workers()]);
        let is_open = |ground: &mut Ground| ground.allows(&V4, Who::Web, Who::Node, What::Tcp(80));
        assert!(!is_open(&mut ground));
        ground.hear([node("gateway")]);
        assert!(is_open(&mut ground));
        ground.hear([node("worker")]);
        assert!(!is_open(&mut ground));
        ground.hear([gone()]);
        let stays = undescribed == sluice_model::compile::Undescribed::AsBefore;
        assert_eq!(!is_open(&mut ground), stays);
    }
}

#[test]
fn n21_the_order_in_which_it_is_said_does_not_matter() {
    let said = || {
        let mut all = objects();
        all.push(closed());
        all.push(policy("web", json!({"nodeSelector": {"matchLabels": {"role": "worker"}},
            "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}], "ports": [{"port": 80}]}]})));
        all
    };
    let expected: Vec<_> = Ground::new(Config::default(), said())
        .model
        .tables()
        .all()
        .collect();
    let count = said().len();
    for first in 0..count {
        for backwards in [false, true] {
            let mut events = said();
            events.rotate_left(first);
            if backwards {
                events.reverse();
            }
            let mut ground = Ground::new(Config::default(), []);
            for event in events {
                ground.hear([event]);
            }
            assert_eq!(ground.model.tables().all().collect::<Vec<_>>(), expected);
        }
    }
}
