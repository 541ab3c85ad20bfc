//! What is wrong with a manifest is said with its place, and nothing wrong gets into the store.
#![expect(
    clippy::unwrap_used,
    reason = "a test ends where its ground is not as it expects"
)]

use std::fs;
use std::path::Path;

use sluice_model::document::{self, Document};
use sluice_model::object::{Age, ClusterPeer, Kind, Object};
use sluice_model::source::dir;
use sluice_model::validate::{Admission, Origin, admit};

fn one(text: &str) -> Admission {
    let (documents, error) = document::read(text);
    assert_eq!(error, None, "{text}");
    let document = documents.into_iter().next().unwrap();
    admit(&document, Origin::File(Path::new("a.yaml")))
}

fn policy(spec: &str) -> String {
    let spec = spec.replace('\n', "\n  ");
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: x}}\nspec:\n  {spec}\n"
    )
}

fn cluster_policy(spec: &str) -> String {
    let spec = spec.replace('\n', "\n  ");
    format!(
        "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: p}}\nspec:\n  tier: Admin\n  priority: 1\n  subject: {{namespaces: {{}}}}\n  {spec}\n"
    )
}

fn node_policy(spec: &str) -> String {
    let spec = spec.replace('\n', "\n  ");
    format!(
        "apiVersion: sluice.dev/v1alpha1\nkind: NodePolicy\nmetadata: {{name: p}}\nspec:\n  {spec}\n"
    )
}

fn service(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {spec}\n")
}

/// The object is refused, and exactly this is said (line, field, words of the reason).
#[track_caller]
fn refused(text: &str, line: u32, field: &str, words: &str) {
    let admission = one(text);
    let said: Vec<String> = admission.findings.iter().map(ToString::to_string).collect();
    assert_eq!(admission.object, None, "{said:?}");
    let found = admission
        .findings
        .iter()
        .any(|it| it.line == line && it.field == field && it.reason.contains(words));
    assert!(found, "wanted {line}: {field}: {words}\n{said:#?}");
}

#[test]
fn p14_a_bad_policy_is_refused_with_line_field_and_reason() {
    let cases = [
        (
            "podSelector: {}\ningres: []",
            6,
            "spec.ingres",
            "no such field",
        ),
        (
            "podSelector: {matchLabels: {a: 'b c'}}",
            5,
            "spec.podSelector.matchLabels[a]",
            "Letters",
        ),
        (
            "podSelector: {matchLabels: {a: 1}}",
            5,
            "spec.podSelector.matchLabels.a",
            "string",
        ),
        (
            "podSelector:\n  matchExpressions:\n  - {key: a, operator: Within, values: [b]}",
            7,
            "spec.podSelector.matchExpressions[0].operator",
            "Within",
        ),
        (
            "podSelector:\n  matchExpressions:\n  - {key: a, operator: In}",
            7,
            "spec.podSelector.matchExpressions[0].values",
            "at least one",
        ),
        (
            "podSelector: {}\npolicyTypes: [Ingress, Outgress]",
            6,
            "spec.policyTypes[1]",
            "Outgress",
        ),
        (
            "podSelector: {}\ningress:\n- ports:\n  - port: 0",
            8,
            "spec.ingress[0].ports[0].port",
            "no port",
        ),
        (
            "podSelector: {}\ningress:\n- ports:\n  - port: 80\n    endPort: 79",
            9,
            "spec.ingress[0].ports[0].endPort",
            "below",
        ),
        (
            "podSelector: {}\ningress:\n- ports:\n  - port: web\n    endPort: 79",
            9,
            "spec.ingress[0].ports[0].endPort",
            "named",
        ),
        (
            "podSelector: {}\ningress:\n- ports:\n  - endPort: 79",
            8,
            "spec.ingress[0].ports[0].endPort",
            "Needs a port",
        ),
        (
            "podSelector: {}\ningress:\n- ports:\n  - protocol: ICMP",
            8,
            "spec.ingress[0].ports[0].protocol",
            "ICMP",
        ),
        (
            "podSelector: {}\negress:\n- to:\n  - ipBlock: {cidr: 10.0.0.0/33}",
            8,
            "spec.egress[0].to[0].ipBlock.cidr",
            "no CIDR",
        ),
        (
            "podSelector: {}\negress:\n- to:\n  - ipBlock:\n      cidr: 10.0.0.0/8\n      except: [11.0.0.0/9]",
            10,
            "spec.egress[0].to[0].ipBlock.except[0]",
            "not a part",
        ),
        (
            "podSelector: {}\negress:\n- to:\n  - ipBlock: {cidr: 10.0.0.0/8}\n    podSelector: {}",
            8,
            "spec.egress[0].to[0]",
            "alone",
        ),
        (
            "podSelector: {}\ningress:\n- from:\n  - {}",
            8,
            "spec.ingress[0].from[0]",
            "Needs",
        ),
    ];
    for (spec, line, field, words) in cases {
        refused(&policy(spec), line, field, words);
    }
}

#[test]
fn p14_a_bad_cluster_policy_is_refused() {
    let rule = |rest: &str| format!("ingress:\n- {rest}");
    let cases = [
        (rule("{action: Allow, from: [{namespaces: {}}]}"), "spec.ingress[0].action", "Allow"),
        (rule("{action: Deny}"), "spec.ingress[0].from", "at least one"),
        (rule("{action: Deny, to: [{namespaces: {}}]}"), "spec.ingress[0]", "from"),
        (rule("{action: Deny, from: [{namespaces: {}, pods: {podSelector: {}}}]}"),
            "spec.ingress[0].from[0]", "exactly one"),
        (rule("{action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {range: {start: 9, end: 9}}}}]}"),
            "spec.ingress[0].protocols[0].tcp.destinationPort.range", "below"),
        (rule(&format!("{{action: Deny, from: [{}]}}", ["{namespaces: {}}"; 26].join(","))),
            "spec.ingress[0].from", "at most 25"),
        ("egress:\n- {action: Deny, to: [{networks: [10.0.0.0/8]}], protocols: [{destinationNamedPort: web}]}".into(),
            "spec.egress[0].to[0]", "named ports"),
        ("egress:\n- {action: Accept, to: [{domainNames: [example.com, '*..com']}]}".into(),
            "spec.egress[0].to[0].domainNames[1]", "is no name"),
        ("egress:\n- {action: Accept, to: [{domainNames: [a..b]}]}".into(),
            "spec.egress[0].to[0].domainNames[0]", "is no name"),
    ];
    for (spec, field, words) in cases {
        let line = 9;
        let admission = one(&cluster_policy(&spec));
        let hit = admission
            .findings
            .iter()
            .find(|it| it.field == field && it.reason.contains(words));
        assert!(
            hit.is_some_and(|it| it.line == line),
            "{spec}: {:#?}",
            admission.findings
        );
        assert_eq!(admission.object, None);
    }
    refused(
        &cluster_policy("priority: 1001").replace("priority: 1\n  ", ""),
        7,
        "spec.priority",
        "1000",
    );
}

#[test]
fn n12_a_peer_of_a_later_api_makes_its_rule_fail_closed() {
    let of = |action: &str, side: &str, peer: &str| {
        let direction = if side == "from" { "ingress" } else { "egress" };
        let text = cluster_policy(&format!(
            "{direction}:\n- {{action: {action}, {side}: [{{namespaces: {{}}}}, {peer}]}}"
        ));
        let admission = one(&text);
        let Some(Object::ClusterPolicy(it)) = admission.object else {
            panic!("{:#?}", admission.findings)
        };
        assert!(!admission.findings.is_empty());
        let rule = it.ingress.into_iter().chain(it.egress).next().unwrap();
        (rule.action, rule.peers)
    };
    use sluice_contract::policy::Action::{Accept, Deny};
    for (side, peer) in [
        ("from", "{galaxies: {}}"),
        ("to", "{galaxies: {}}"),
        ("from", "{}"),
        ("from", "{networks: [10.0.0.0/8]}"),
    ] {
        assert_eq!(of("Accept", side, peer), (Accept, vec![]));
        assert_eq!(of("Deny", side, peer), (Deny, vec![ClusterPeer::Everybody]));
        assert_eq!(of("Pass", side, peer), (Deny, vec![ClusterPeer::Everybody]));
    }
    // Only what is accepted can be named.
    for action in ["Deny", "Pass"] {
        let named = of(action, "to", "{domainNames: ['*.example.com']}");
        assert_eq!(named, (Deny, vec![ClusterPeer::Everybody]));
    }
}

#[test]
fn policy_types_default_to_ingress_and_to_egress_if_there_are_rules_for_it() {
    let of = |spec: &str| match one(&policy(spec)).object {
        Some(Object::NetworkPolicy(it)) => (it.ingress.is_some(), it.egress.is_some()),
        other => panic!("{other:?}"),
    };
    assert_eq!(of("podSelector: {}"), (true, false));
    assert_eq!(of("podSelector: {}\negress: [{}]"), (true, true));
    assert_eq!(of("podSelector: {}\npolicyTypes: [Egress]"), (false, true));
    assert_eq!(of("policyTypes: [Ingress, Egress]"), (true, true));
}

#[test]
fn s30_services_of_others_have_nothing_to_serve() {
    let ports = |text: &str| match one(text).object {
        Some(Object::Service(it)) => it.ports.len() + it.cluster_ips.len(),
        other => panic!("{other:?}"),
    };
    let base = service("{clusterIP: 10.96.0.1, ports: [{port: 80}]}");
    assert_eq!(ports(&base), 2);
    assert_eq!(ports(&service("{clusterIP: None, ports: [{port: 80}]}")), 0);
    assert_eq!(
        ports(&service("{type: ExternalName, externalName: a.b}")),
        0
    );
    for label in ["service-proxy-name", "headless"] {
        let labelled = base.replace(
            "name: s",
            &format!("name: s, labels: {{service.kubernetes.io/{label}: x}}"),
        );
        assert_eq!(ports(&labelled), 0, "{label}");
    }
}

#[test]
fn a_bad_service_is_refused() {
    refused(
        &service("{ports: [{port: 70000}]}"),
        4,
        "spec.ports[0].port",
        "70000",
    );
    refused(
        &service("{ports: [{port: 80}, {port: 81}]}"),
        4,
        "spec.ports[1].name",
        "Another",
    );
    refused(
        &service("{clusterIP: ten}"),
        4,
        "spec.clusterIPs[0]",
        "no IP",
    );
    refused(
        &service("{sessionAffinity: Always}"),
        4,
        "spec.sessionAffinity",
        "Always",
    );
    refused(
        "kind: Pod\napiVersion: v1\nmetadata: {}\n",
        3,
        "metadata.name",
        "Missing",
    );
    refused(
        "kind: Pod\napiVersion: v2\nmetadata: {name: a}\n",
        2,
        "apiVersion",
        "v1",
    );
    refused(
        "kind: Pod\napiVersion: v1\nmetadata: {name: A}\n",
        3,
        "metadata.name",
        "Lower case",
    );
}

#[test]
fn validate_reads_a_directory_and_counts_what_is_good() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    write(
        "a.yaml",
        &(policy("podSelector: {}")
            + "---\n"
            + &policy("podSelector: {}\ningres: []").replace("name: p", "name: q")),
    );
    write(
        "b.json",
        r#"{"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "a", "namespace": "x"}}"#,
    );
    write("c.yaml", &policy("podSelector: {}"));
    write("d.yaml~", "]");
    write(".e.yaml", "]");
    write(
        "f.yaml",
        "kind: Deployment\napiVersion: apps/v1\nmetadata: {name: a}\n",
    );
    write("g.yaml", "a: [\n");
    let report = dir::validate(directory.path()).unwrap();
    let said: Vec<String> = report
        .findings
        .iter()
        .map(|it| {
            it.to_string()
                .replace(&directory.path().display().to_string(), "D")
        })
        .collect();
    assert_eq!(said.len(), 4, "{said:#?}");
    assert_eq!(
        said[0],
        "D/a.yaml:12: error: NetworkPolicy x/q: spec.ingres: There is no such field"
    );
    assert_eq!(
        said[1],
        "D/c.yaml:1: error: NetworkPolicy x/p: Is in D/a.yaml already, which is used"
    );
    assert_eq!(
        said[2],
        "D/f.yaml:1: warning: Deployment: kind: Not used here"
    );
    assert!(said[3].starts_with("D/g.yaml:2: error: "), "{}", said[3]);
    assert_eq!(report.store.count(Kind::NetworkPolicy), 1);
    assert_eq!(report.store.count(Kind::Pod), 1);
}

#[test]
fn what_the_api_server_sends_may_have_more_fields() {
    let text = policy("podSelector: {}\nfuture: 1");
    let (documents, _) = document::read(&text);
    let value = Document::without_lines(documents[0].value.clone());
    let admission = admit(&value, Origin::Api);
    assert!(admission.object.is_some() && admission.findings.is_empty());
}

#[test]
fn s28_forwarding_modes_that_say_nothing_are_warned_of_and_the_service_is_used() {
    let with = |mode: &str, spec: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, annotations: {{sluice.dev/forwarding-mode: {mode}}}}}\nspec: {spec}\n"
        );
        let admission = one(&text);
        assert!(admission.object.is_some());
        let reasons = admission.findings.into_iter().map(|it| it.reason);
        reasons.collect::<Vec<_>>().join("; ")
    };
    let plain = "{clusterIP: 10.96.0.1, ports: [{port: 80}]}";
    assert_eq!(with("dsr", plain), "");
    assert_eq!(with("snat", plain), "");
    assert!(with("hybrid", plain).contains("not one of snat, dsr"));
    let local = "{clusterIP: 10.96.0.1, externalTrafficPolicy: Local, ports: [{port: 80}]}";
    assert!(with("dsr", local).contains("Has no effect"));
    let sctp = "{clusterIP: 10.96.0.1, ports: [{port: 80, protocol: SCTP}]}";
    assert!(with("dsr", sctp).contains("SCTP"));
}

#[test]
fn n21_a_bad_node_policy_is_refused_with_line_field_and_reason() {
    let cases = [
        ("ingress: []", 4, "spec", "nodeSelector"),
        (
            "nodeSelecter: {}\nnodeSelector: {}",
            5,
            "spec.nodeSelecter",
            "no such field",
        ),
        (
            "nodeSelector: {matchLabels: {a: 'b c'}}",
            5,
            "spec.nodeSelector.matchLabels[a]",
            "Letters",
        ),
        (
            "nodeSelector: {}\ningress:\n- from:\n  - podSelector: {}",
            8,
            "spec.ingress[0].from[0]",
            "namespaceSelector",
        ),
        (
            "nodeSelector: {}\negress:\n- to:\n  - ipBlock: {cidr: x}\n  - podSelector: {}",
            9,
            "spec.egress[0].to[1]",
            "namespaceSelector",
        ),
        (
            "nodeSelector: {}\ningress:\n- ports:\n  - port: 80\n  - port: ssh",
            9,
            "spec.ingress[0].ports[1].port",
            "no named ports",
        ),
        (
            "nodeSelector: {}\ningress:\n- ports:\n  - port: 80\n    endPort: 79",
            9,
            "spec.ingress[0].ports[0].endPort",
            "below",
        ),
        (
            "nodeSelector: {}\ningress:\n- from:\n  - ipBlock: {cidr: 10.0.0.0/33}",
            8,
            "spec.ingress[0].from[0].ipBlock.cidr",
            "no CIDR",
        ),
        (
            "nodeSelector: {}\npolicyTypes: [Both]",
            6,
            "spec.policyTypes[0]",
            "Both",
        ),
    ];
    for (spec, line, field, words) in cases {
        refused(&node_policy(spec), line, field, words);
    }
    let other = node_policy("nodeSelector: {}").replace("v1alpha1", "v1");
    refused(&other, 1, "apiVersion", "sluice.dev/v1alpha1");
    let good = one(&node_policy(
        "nodeSelector: {}\negress:\n- ports: [{port: http}]",
    ));
    assert_eq!(good.findings, []);
    let Some(Object::NodePolicy(policy)) = good.object else {
        panic!("{:?}", good.object)
    };
    // Where it is not said: ingress always, egress if there are rules for it.
    let count = |rules: Option<Vec<_>>| rules.map(|it| it.len());
    assert_eq!(
        (count(policy.ingress), count(policy.egress)),
        (Some(0), Some(1))
    );
}

#[test]
fn z06_a_manifest_that_claims_what_another_one_owns_is_named_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let service = |name: &str, spec: &str| {
        let (namespace, name) = name.split_once('/').unwrap();
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '2001-01-01T00:00:00Z'}}\nspec: {{{spec}, ports: [{{port: 53}}]}}\n"
        )
    };
    let dns = service("kube-system/dns", "clusterIP: 10.96.0.10");
    let thief = service(
        "a/x",
        "clusterIP: 10.96.0.66, externalIPs: [198.51.100.1, 10.96.0.10]",
    );
    fs::write(
        directory.path().join("a.yaml"),
        format!("{dns}---\n{thief}"),
    )
    .unwrap();
    let report = dir::validate(directory.path()).unwrap();
    let said: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    let place = directory.path().join("a.yaml").display().to_string();
    assert_eq!(
        said,
        [format!(
            "{place}:6: warning: Service a/x: spec.externalIPs[1]: external address 10.96.0.10 is not used: it is the ClusterIP of \
             Service kube-system/dns, which comes first. Choose another address"
        )]
    );
    // An age that a manifest gives itself is nobody's.
    let ages = report.store.services().map(|it| it.age.clone());
    assert!(ages.into_iter().all(|it| it == Age::default()));
}

#[test]
fn s10_manifests_with_addresses_that_nobody_can_have_are_refused() {
    for (address, what) in [
        ("239.1.1.1", "a multicast address"),
        ("ff02::1", "a multicast address"),
        ("255.255.255.255", "the broadcast address"),
        ("240.1.2.3", "an address of 240.0.0.0/4, which is reserved"),
        ("127.0.0.1", "a loopback address"),
        ("::1", "a loopback address"),
        ("169.254.169.254", "a link-local address"),
        ("fe80::1", "a link-local address"),
        ("0.0.0.0", "the unspecified address"),
        ("0.1.2.3", "an address of 0.0.0.0/8"),
    ] {
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: x}}\nspec: {{clusterIP: 10.96.0.1, externalIPs: ['{address}'], ports: [{{port: 80}}]}}\n"
        );
        let family = if address.contains(':') {
            "IPv6"
        } else {
            "IPv4"
        };
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s, namespace: x}}\naddressType: {family}\nendpoints: [{{addresses: ['{address}']}}]\nports: []\n"
        );
        for (text, field) in [
            (service, "spec.externalIPs[0]"),
            (slice, "endpoints[0].addresses[0]"),
        ] {
            let admission = one(&text);
            assert_eq!(admission.object, None, "{text}");
            let finding = &admission.findings[0];
            assert_eq!(finding.field, field);
            assert_eq!(
                finding.reason,
                format!("{address} is not used: it is {what}")
            );
        }
    }
}
