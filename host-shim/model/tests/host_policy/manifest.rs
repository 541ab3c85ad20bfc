//! The kind as clusters know it, and examples of it as people read them.

use std::fs;
use std::path::Path;

use serde_json::Value;
use sluice_model::document::{self, Document};
use sluice_model::object::Kind;
use sluice_model::validate::{Origin, admit};

use super::rules::violations;

pub(crate) fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    fs::read_to_string(root.join(path)).unwrap()
}

pub(crate) fn documents(text: &str) -> Vec<Document> {
    let (documents, error) = document::read(text);
    assert_eq!(error, None, "{text}");
    documents
}

#[test]
fn n21_the_definition_is_of_the_kind_that_is_asked_for_and_knows_all_its_fields() {
    let all = documents(&read("deploy/nodepolicy.yaml"));
    let [definition] = all.as_slice() else {
        panic!("{} documents", all.len())
    };
    let kind = Kind::NodePolicy;
    let (group, version) = kind.api_version().split_once('/').unwrap();
    let spec = &definition.value["spec"];
    assert_eq!(
        definition.value["metadata"]["name"],
        format!("{}.{group}", kind.plural())
    );
    assert_eq!(
        (
            &spec["group"],
            &spec["names"]["kind"],
            &spec["names"]["plural"],
            &spec["scope"]
        ),
        (
            &group.into(),
            &kind.name().into(),
            &kind.plural().into(),
            &"Cluster".into()
        )
    );
    assert_eq!(spec["versions"][0]["name"], version);

    let schema = &spec["versions"][0]["schema"]["openAPIV3Schema"];
    // A policy with every field.
    let whole = "
apiVersion: sluice.dev/v1alpha1
kind: NodePolicy
metadata: {name: whole, labels: {a: b}}
spec:
  nodeSelector: {matchLabels: {a: b}, matchExpressions: [{key: c, operator: NotIn, values: [d]}]}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - {namespaceSelector: {}, podSelector: {matchExpressions: [{key: c, operator: Exists}]}}
    - ipBlock: {cidr: 'fd00::/8', except: ['fd00::1/128']}
    ports: [{protocol: SCTP, port: 1, endPort: 2}, {protocol: UDP}]
  egress:
  - to: [{namespaceSelector: {matchLabels: {a: b}}}]
    ports: [{port: http}]
";
    let docs = read("docs/node-policy.md");
    let examples = docs.split("```yaml\n").skip(1);
    let examples: Vec<_> = examples.filter_map(|it| it.split("```").next()).collect();
    assert!(!examples.is_empty());
    for text in examples.into_iter().chain([whole]) {
        for document in documents(text) {
            let admission = admit(&document, Origin::File(Path::new("a.yaml")));
            assert!(admission.findings.is_empty(), "{:?}", admission.findings);
            assert!(admission.object.is_some());
            assert_eq!(violations(&document.value, schema, ""), [""; 0]);
        }
    }
    // The schema is no less strict than that.
    let mut wrong = documents(whole).remove(0).value;
    wrong["spec"]["ingres"] = Value::Null;
    wrong["spec"]["policyTypes"][0] = "Sideways".into();
    assert_eq!(violations(&wrong, schema, "").len(), 2);
}
