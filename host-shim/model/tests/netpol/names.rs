//! Domain names in ClusterNetworkPolicies: what they compile to, who is believed, and what is said of wrong ones.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use sluice_appliance::policy::Query;
use sluice_contract::name::{Learnt, NameId, NameRow};
use sluice_contract::policy::{Direction, PolicyKey, PolicyRow};
use sluice_contract::{Identity, Key, Protocol, Row};
use sluice_model::compile::{Config, Model};
use sluice_model::explain::Told;
use sluice_model::object::{Kind, Name, ObjectKey};
use sluice_model::store::Event;
use sluice_model::trace::{Question, trace};
use sluice_model::validate::admit_as;

use crate::ground::{cluster_policy, link, model, with_guest, world};

const OUTSIDE: &str = "192.0.2.7";

fn policy(rules: Value) -> Value {
    cluster_policy(
        "names",
        json!({"tier": "Admin", "priority": 1, "egress": rules,
            "subject": {"pods": {"namespaceSelector": {"matchLabels": {"ns": "x"}}, "podSelector": {"matchLabels": {"pod": "a"}}}}}),
    )
}

fn allow_list() -> Value {
    policy(json!([
        {"action": "Deny", "to": [{"networks": ["192.0.2.99/32"]}]},
        {"action": "Accept", "to": [{"domainNames": ["Example.com.", "*.cdn.test"]}], "protocols": [{"tcp": {"destinationPort": {"number": 443}}}]},
        {"action": "Accept", "to": [{"domainNames": ["example.com"]}], "protocols": [{"tcp": {"destinationPort": {"number": 8443}}}]},
        {"action": "Deny", "to": [{"networks": ["0.0.0.0/0"]}]},
    ]))
}

fn rows(model: &mut Model) -> BTreeMap<Key, Row> {
    model.tables().all().map(|row| (row.key(), row)).collect()
}

fn id(text: &str) -> NameId {
    NameRow::parse(text).unwrap().id
}

#[test]
fn n14_a_name_accepts_its_ports_and_the_order_of_rules_holds() {
    let mut world = world();
    world.cluster_policies = vec![allow_list()];
    let mut model = model(&world);
    let names: Vec<NameId> = rows(&mut model)
        .into_values()
        .filter_map(|row| match row {
            Row::Policy(PolicyRow::Name(row)) => Some(row.id),
            _ => None,
        })
        .collect();
    assert_eq!(names.len(), 2, "one row a name, however often it is named");
    with_guest(&mut model, |guest| {
        let judge = |address: &str, port, names: &[&str]| {
            let query = Query {
                link: link(0),
                direction: Direction::Egress,
                peer: Identity::WORLD,
                peer_address: address.parse().unwrap(),
                protocol: Some(Protocol::Tcp),
                port,
            };
            let names: Vec<NameId> = names.iter().map(|it| id(it)).collect();
            guest.judge_named(&query, &names).accepted
        };
        for (port, names, accepted) in [
            (443, &[][..], false),
            (443, &["example.com"], true),
            (8443, &["example.com"], true),
            (80, &["example.com"], false),
            (443, &["*.cdn.test"], true),
            (8443, &["*.cdn.test"], false),
            (8443, &["*.cdn.test", "example.com"], true),
            (443, &["other.test"], false),
        ] {
            assert_eq!(judge(OUTSIDE, port, names), accepted, "{port} {names:?}");
        }
        // What was denied before the name was asked stays denied.
        assert!(!judge("192.0.2.99", 443, &["example.com"]));
        // Which names of the pod's rules a question is.
        let of = |link, name: &str| guest.names_of(link, name.as_bytes()).to_vec();
        assert_eq!(of(link(0), "example.com"), [id("example.com")]);
        assert_eq!(of(link(0), "a.b.cdn.test"), [id("*.cdn.test")]);
        for other in ["www.example.com", "cdn.test", "xcdn.test", "com", ""] {
            assert_eq!(of(link(0), other), [], "{other}");
        }
        assert_eq!(of(link(1), "example.com"), [], "no rule of this pod");
    });
}

#[test]
fn n14_names_go_with_their_rules() {
    let mut world = world();
    world.cluster_policies = vec![allow_list()];
    let mut with = model(&world);
    let put = |model: &mut Model, policy: Value| {
        let admission = admit_as(Kind::ClusterNetworkPolicy, policy);
        model.apply(Event::Put(admission.object.unwrap()));
        model.compile();
    };
    let named = |model: &mut Model| -> Vec<Key> {
        let rows = rows(model).into_keys();
        rows.filter(|it| {
            matches!(
                it,
                Key::Policy(PolicyKey::Name(_) | PolicyKey::Named(..) | PolicyKey::Resolver(_))
            )
        })
        .collect()
    };
    with.tables().take_delta();
    assert_eq!(named(&mut with).len(), 4);
    put(
        &mut with,
        policy(json!([{"action": "Accept", "to": [{"domainNames": ["example.com"]}]}])),
    );
    assert_eq!(named(&mut with).len(), 2);
    let gone: Vec<Key> = with
        .tables()
        .take_delta()
        .iter()
        .map(|it| it.key())
        .collect();
    assert!(gone.contains(&Key::Policy(PolicyKey::Name(id("*.cdn.test")))));
    with.apply(Event::Removed(ObjectKey {
        kind: Kind::ClusterNetworkPolicy,
        name: Name::new("", "names"),
    }));
    with.compile();
    assert_eq!(named(&mut with), []);
}

#[test]
fn n14_the_clusters_dns_and_whom_the_operator_names_are_believed() {
    let dns = |name: &str, labels: Value, address: &str| {
        let pod = json!({"metadata": {"name": name, "namespace": "kube-system", "labels": labels},
            "spec": {"nodeName": "other", "containers": [{"name": "c"}]}, "status": {"podIP": address}});
        Event::Put(admit_as(Kind::Pod, pod).object.unwrap())
    };
    let config = Config {
        resolvers: vec!["10.96.0.10".parse().unwrap()],
        ..Config::default()
    };
    let mut world = world();
    world.cluster_policies = vec![allow_list()];
    let mut model = Model::new(&config, []);
    for event in crate::ground::events(&world) {
        model.apply(event);
    }
    crate::ground::attach_all(&world, &mut model);
    model.apply(dns("a", json!({"k8s-app": "kube-dns"}), "10.0.9.1"));
    model.apply(dns("b", json!({"k8s-app": "kube-dns"}), "10.0.9.2"));
    model.apply(dns("c", json!({"k8s-app": "other"}), "10.0.9.3"));
    model.compile();
    let believed = |model: &mut Model| -> Vec<IpAddr> {
        let all = rows(model).into_keys();
        all.filter_map(|it| match it {
            Key::Policy(PolicyKey::Resolver(address)) => Some(address),
            _ => None,
        })
        .collect()
    };
    let addresses = |all: &[&str]| {
        all.iter()
            .map(|it| it.parse().unwrap())
            .collect::<Vec<IpAddr>>()
    };
    assert_eq!(
        believed(&mut model),
        addresses(&["10.0.9.1", "10.0.9.2", "10.96.0.10"])
    );
    model.tables().take_delta();
    model.apply(Event::Removed(ObjectKey {
        kind: Kind::Pod,
        name: Name::new("kube-system", "a"),
    }));
    model.compile();
    assert_eq!(believed(&mut model), addresses(&["10.0.9.2", "10.96.0.10"]));
    let gone = Key::Policy(PolicyKey::Resolver("10.0.9.1".parse().unwrap()));
    assert!(
        model
            .tables()
            .take_delta()
            .iter()
            .any(|it| it.key() == gone)
    );
}

#[test]
fn n14_wrong_names_are_reported_with_their_field_and_denials_by_name_fail_closed() {
    let admit = |rules: Value| admit_as(Kind::ClusterNetworkPolicy, policy(rules));
    for wrong in ["*", "com", "a..b", "**.a.b", "a.*.b", "-a.b", "a b.c", ""] {
        let it =
            admit(json!([{"action": "Accept", "to": [{"domainNames": ["good.test", wrong]}]}]));
        assert_eq!(it.object, None, "{wrong:?}");
        assert_eq!(it.findings[0].field, "spec.egress[0].to[0].domainNames[1]");
        assert!(it.findings[0].reason.contains(&format!("{wrong:?}")));
    }
    let many: Vec<String> = (0..26).map(|n| format!("n{n}.test")).collect();
    for bad in [
        json!([{"action": "Accept", "to": [{"domainNames": many}]}]),
        json!([{"action": "Accept", "to": [{"domainNames": []}]}]),
        json!([{"action": "Accept", "to": [{"domainNames": ["a.test"], "networks": ["10.0.0.0/8"]}]}]),
        json!([{"action": "Accept", "to": [{"domainNames": ["a.test"]}], "protocols": [{"destinationNamedPort": "web"}]}]),
    ] {
        assert_eq!(admit(bad.clone()).object, None, "{bad}");
    }
    // Only what is accepted can be named: such a rule is not understood, and denies everything at its place.
    for action in ["Deny", "Pass"] {
        let mut world = world();
        world.cluster_policies = vec![policy(
            json!([{"action": action, "to": [{"domainNames": ["a.test"]}]}]),
        )];
        let model = model(&world);
        let question = Question::parse("x/a", &format!("{OUTSIDE}:443")).unwrap();
        let answer = trace(
            model.store(),
            model.config(),
            model.links(),
            &question,
            |_| Told::ELSEWHERE,
        )
        .unwrap();
        assert!(!answer.accepted, "{action}");
    }
}

#[test]
fn n14_a_trace_names_the_rule_and_says_what_it_cannot_know() {
    let mut world = world();
    world.cluster_policies = vec![allow_list()];
    let model = model(&world);
    let question = Question::parse("x/a", &format!("{OUTSIDE}:443")).unwrap();
    let answer = trace(
        model.store(),
        model.config(),
        model.links(),
        &question,
        |_| Told::ELSEWHERE,
    )
    .unwrap();
    let rule = &answer.sides[0].considered[1];
    assert_eq!(rule.peers, ["example.com", "*.cdn.test"]);
    assert!(
        rule.mismatch.as_ref().unwrap().contains("domains"),
        "{rule:?}"
    );
}

#[test]
fn n14_a_trace_says_by_which_name_it_passes_or_that_none_is_known_any_more() {
    let mut world = world();
    world.cluster_policies = vec![allow_list()];
    let model = model(&world);
    let side = |to: &str, told: Told| {
        let question = Question::parse("x/a", to).unwrap();
        let links = model.links();
        let answer = trace(model.store(), model.config(), links, &question, |link| {
            assert_eq!(links[&link].pod, Name::new("x", "a"));
            told.clone()
        });
        answer.unwrap().sides.remove(0)
    };
    let learnt = |name: &str, address: &str, left| Learnt {
        link: link(0),
        name: id(name),
        address: address.parse().unwrap(),
        left,
    };
    let known = || {
        Told::Known(vec![
            learnt("*.cdn.test", OUTSIDE, 34),
            learnt("example.com", "192.0.2.8", -40),
            learnt("elsewhere.test", "192.0.2.9", 40),
            learnt("*.cdn.test", "192.0.2.99", 50),
        ])
    };
    let passes = side("192.0.2.7:443", known());
    assert!(passes.accepted);
    let learnt = "*.cdn.test has 192.0.2.7, for 34 s more";
    assert!(passes.because.ends_with(learnt), "{}", passes.because);
    assert_eq!(passes.considered[1].learnt.as_deref(), Some(learnt));
    for (to, why) in [
        ("192.0.2.7:80", "the port is none of its ports"),
        (
            "192.0.2.8:443",
            "it names domains: example.com had 192.0.2.8 until 40 s ago, and not any more",
        ),
        (
            "192.0.2.9:443",
            "the pod was not told that any of its domains has 192.0.2.9",
        ),
    ] {
        let denied = side(to, known());
        assert!(!denied.accepted, "{to}");
        assert_eq!(denied.considered[1].mismatch.as_deref(), Some(why));
        assert_eq!(denied.considered[1].learnt, None);
    }
    // What is denied before the name is asked stays so.
    let denied = side("192.0.2.99:443", known());
    assert!(!denied.accepted && !denied.because.contains("cdn"));
    let silent = side("192.0.2.7:443", Told::Unknown("nobody says"));
    assert!(!silent.accepted);
    let why = silent.considered[1].mismatch.as_deref();
    assert_eq!(why, Some("it names domains: nobody says"));
}
