//! Questions about manifests, and what is answered.
#![expect(
    clippy::unwrap_used,
    reason = "a test ends where its ground is not as it expects"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use sluice_contract::Protocol;
use sluice_model::compile::{Config, DefaultDeny, Model};
use sluice_model::explain::Told;
use sluice_model::object::{Kind, Name, Object, PolicyPort, Port, Prefix};
use sluice_model::source::dir;
use sluice_model::store::{Event, Store};
use sluice_model::trace::{Answer, End, Question, Wrong, show, trace};

const MANIFESTS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
---
apiVersion: v1
kind: Pod
metadata: {name: free, namespace: other, labels: {app: free}}
status: {podIP: 10.0.0.3}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: http}]
  - from: [{ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.128/25]}}]
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: guard}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  egress:
  - action: Deny
    to: [{networks: [198.51.100.0/24]}]
";

fn store() -> Store {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("all.yaml"), MANIFESTS).unwrap();
    let report = dir::validate(directory.path()).unwrap();
    assert_eq!(report.findings, []);
    report.store
}

fn ask(from: &str, to: &str) -> Answer {
    let question = Question::parse(from, to).unwrap();
    trace(
        &store(),
        &Config::default(),
        &BTreeMap::new(),
        &question,
        |_| Told::ELSEWHERE,
    )
    .unwrap()
}

#[test]
fn n19_the_rule_that_decides_is_named() {
    let answer = ask("shop/client", "shop/web:8080/TCP");
    assert!(answer.accepted);
    assert_eq!(
        answer.sides[1].rule.as_deref(),
        Some("NetworkPolicy shop/web ingress[0]")
    );
    assert_eq!(
        answer.sides[0].because,
        "no rule matches, and the pod is not isolated"
    );
    let outside = ask("192.0.2.7", "shop/web:22");
    assert!(outside.accepted);
    assert_eq!(
        outside.sides[0].rule.as_deref(),
        Some("NetworkPolicy shop/web ingress[1]")
    );
    let denied = ask("other/free", "198.51.100.7:443");
    assert!(!denied.accepted);
    assert_eq!(
        denied.sides[0].rule.as_deref(),
        Some("ClusterNetworkPolicy guard egress[0]")
    );
}

#[test]
fn n19_why_nothing_matches_is_said_for_each_rule() {
    let answer = ask("other/free", "shop/web:8080");
    assert!(!answer.accepted);
    let side = &answer.sides[1];
    assert_eq!(
        side.because,
        "no rule matches; default-deny ingress by NetworkPolicy shop/web"
    );
    let why: Vec<_> = side
        .considered
        .iter()
        .map(|it| it.mismatch.as_deref())
        .collect();
    assert_eq!(
        why,
        [Some("the peer's labels, namespace and address match none of its peers"); 2]
    );
    let wrong_port = ask("shop/client", "shop/web:81/udp");
    assert_eq!(
        wrong_port.sides[1].considered[0].mismatch.as_deref(),
        Some("the port is none of its ports")
    );
    let excepted = ask("192.0.2.200", "shop/web:8080");
    assert!(!excepted.accepted);
    let text = excepted.to_string();
    assert!(
        text.starts_with("denied\n  ingress of shop/web denies: no rule matches"),
        "{text}"
    );
}

#[test]
fn an_answer_is_json_as_well() {
    let json = serde_json::to_value(ask("shop/client", "shop/web:8080")).unwrap();
    assert_eq!(json["accepted"], true);
    assert_eq!(
        json["sides"][1]["considered"][0]["rule"],
        "NetworkPolicy shop/web ingress[0]"
    );
    assert_eq!(json["sides"][1]["considered"][0]["ports"][0], "http/TCP");
}

#[test]
fn what_holds_for_a_pod_is_shown() {
    let [ingress, egress] = show(
        &store(),
        &Config::default(),
        &BTreeMap::new(),
        &End::Pod(Name::new("shop", "web")),
    )
    .unwrap();
    assert!(ingress.isolated && !egress.isolated);
    assert_eq!(ingress.rules[0].peers, ["pods app=client in shop"]);
    assert_eq!(
        ingress.rules[1].peers,
        ["192.0.2.0/24 except 192.0.2.128/25"]
    );
    assert_eq!(egress.rules[0].action, "deny");
}

#[test]
fn questions_that_make_no_sense_are_refused() {
    for (from, to) in [
        ("a", "b"),
        ("a", "b:http"),
        ("a", "b:80/foo"),
        ("a/b/c", "d:80"),
        ("a", "/b:80"),
        ("a", "b:70000"),
    ] {
        assert!(
            matches!(Question::parse(from, to), Err(Wrong::Question(_))),
            "{from} {to}"
        );
    }
    let question = Question::parse("nobody", "shop/web:80").unwrap();
    let wrong = trace(
        &store(),
        &Config::default(),
        &BTreeMap::new(),
        &question,
        |_| Told::ELSEWHERE,
    );
    assert_eq!(wrong, Err(Wrong::NoPod(Name::new("default", "nobody"))));
    let six = Question::parse("fd00::1", "[fd00::2]:80").unwrap_or_else(|it| panic!("{it}"));
    assert_eq!(six.to.to_string(), "fd00::2");
}

/// A pod that asks for DNS, the API server and everything else, and one that a policy selects.
const DEFAULTS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
status: {podIP: 10.0.0.10}
---
apiVersion: v1
kind: Pod
metadata: {name: fake, namespace: shop, labels: {k8s-app: kube-dns}}
status: {podIP: 10.0.0.11}
";

#[test]
fn n17_pods_that_no_policy_selects_are_denied_all_but_the_exceptions() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("all.yaml"), MANIFESTS).unwrap();
    fs::write(directory.path().join("defaults.yaml"), DEFAULTS).unwrap();
    let api = Prefix::new("172.16.0.1".parse().unwrap(), 32).unwrap();
    let port = PolicyPort {
        protocol: Protocol::Tcp,
        port: Port::Range(6443, 6443),
    };
    let default_deny = DefaultDeny {
        dns: true,
        egress: vec![(api, port)],
    };
    let strict = Config {
        default_deny: Some(default_deny),
        ..Config::default()
    };
    for (config, is_strict) in [(strict, true), (Config::default(), false)] {
        let mut model = Model::new(&config, []);
        let report = dir::validate(directory.path()).unwrap();
        // As an API's list comes: what is not in it is gone, but not the node's own.
        for pod in report.store.pods() {
            model.apply(Event::Put(Object::Pod(pod.clone())));
        }
        for policy in report.store.network_policies() {
            model.apply(Event::Put(Object::NetworkPolicy(policy.clone())));
        }
        model.apply(Event::Listed {
            kind: Kind::ClusterNetworkPolicy,
            objects: Vec::new(),
            refused: BTreeSet::new(),
        });
        model.apply(Event::InSync);
        model.compile();
        let ask = |from: &str, to: &str| {
            let question = Question::parse(from, to).unwrap();
            trace(model.store(), &config, &BTreeMap::new(), &question, |_| {
                Told::ELSEWHERE
            })
            .unwrap()
        };
        // Open only where nothing is denied by default.
        for (from, to) in [
            ("other/free", "shop/client:80"),
            ("other/free", "192.0.2.1:443"),
            ("other/free", "172.16.0.1:22"),
            ("other/free", "shop/fake:53/UDP"),
            ("192.0.2.1", "shop/client:80"),
        ] {
            let answer = ask(from, to);
            assert_eq!(answer.accepted, !is_strict, "{from} to {to}");
            let rules: Vec<_> = answer
                .sides
                .iter()
                .filter_map(|it| it.rule.as_deref())
                .collect();
            let names_it = rules
                .iter()
                .any(|rule| rule.contains("policy.default_deny"));
            assert_eq!(names_it, is_strict, "{rules:?}");
        }
        // The exceptions.
        for to in [
            "kube-system/dns:53/UDP",
            "kube-system/dns:53/TCP",
            "172.16.0.1:6443",
        ] {
            let egress = &ask("other/free", to).sides[0];
            assert!(egress.accepted, "{to}: {egress:?}");
        }
        // A policy that selects the pod says what holds for it, in the direction it is about.
        assert!(ask("192.0.2.7", "shop/web:22").accepted);
        assert!(!ask("198.51.100.1", "shop/web:22").accepted);
    }
}

/// Rules that say something about requests: no version of the API that is read here knows them.
const SEVENTH_LAYER: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: requests}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: shop}}}
  egress:
  - action: ACTION
    to: [{networks: [192.0.2.0/24]}]
    protocols: [{http: {method: GET}}]
  - action: OTHERWISE
    to: [{networks: [192.0.2.0/24]}]
";

#[test]
fn n15_what_is_said_about_requests_is_reported_and_fails_closed() {
    // An Accept that is not understood lets nothing in, a Deny keeps everything out.
    for (action, otherwise) in [("Accept", "Deny"), ("Deny", "Accept")] {
        let directory = tempfile::tempdir().unwrap();
        let text = SEVENTH_LAYER
            .replace("ACTION", action)
            .replace("OTHERWISE", otherwise);
        fs::write(directory.path().join("pods.yaml"), MANIFESTS).unwrap();
        fs::write(directory.path().join("requests.yaml"), text).unwrap();
        let report = dir::validate(directory.path()).unwrap();
        let said: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
        assert!(
            said.iter()
                .any(|it| it.contains("requests.yaml") && it.contains("egress[0].protocols[0]")),
            "{said:?}"
        );
        let question = Question::parse("shop/client", "192.0.2.1:80").unwrap();
        let answer = trace(
            &report.store,
            &Config::default(),
            &BTreeMap::new(),
            &question,
            |_| Told::ELSEWHERE,
        )
        .unwrap();
        assert!(!answer.accepted, "{action}: {answer:?}");
    }
}
