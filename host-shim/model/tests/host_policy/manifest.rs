//! The kind as clusters know it, and examples of it as people read them.

use std::fs;
use std::path::Path;

use serde_json::Value;
use sluice_model::document::{self, Document};
use sluice_model::object::Kind;
use sluice_model::validate::{Origin, admit};

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    fs::read_to_string(root.join(path)).unwrap()
}

fn documents(text: &str) -> Vec<Document> {
    let (documents, error) = document::read(text);
    assert_eq!(error, None, "{text}");
    documents
}

/// What an API server would take away or refuse, by this schema.
fn differences(value: &Value, schema: &Value, place: &str) -> Vec<String> {
    let required = schema["required"].as_array().into_iter().flatten();
    let missing = required.filter(|it| value.get(it.as_str().unwrap()).is_none());
    let mut found: Vec<String> = missing.map(|it| format!("{place} lacks {it}")).collect();
    let is_one = |allowed: &Vec<Value>| allowed.contains(value);
    if !schema["enum"].as_array().is_none_or(is_one) {
        found.push(format!("{place}: {value}"));
    }
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let place = format!("{place}.{name}");
                let known = [&schema["properties"][name], &schema["additionalProperties"]];
                match known.into_iter().find(|it| !it.is_null()) {
                    Some(schema) => found.extend(differences(value, schema, &place)),
                    None if schema["properties"].is_null() && place.starts_with(".metadata") => {}
                    None => found.push(format!("{place} is not known")),
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                found.extend(differences(item, &schema["items"], place));
            }
        }
        _ => {
            let kind = schema["type"].as_str();
            let fits = match value {
                Value::String(_) => kind == Some("string"),
                Value::Number(_) => kind == Some("integer"),
                _ => false,
            };
            if !fits && schema["x-kubernetes-int-or-string"] != true {
                found.push(format!("{place} is no {kind:?}"));
            }
        }
    }
    found
}

#[test]
fn n21_the_definition_is_of_the_kind_that_is_asked_for_and_knows_all_its_fields() {
    let all = documents(&read("deploy/nodepolicy.yaml"));
    let [definition, role] = all.as_slice() else {
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
    let rule = &role.value["rules"][0];
    assert_eq!(
        (&rule["apiGroups"][0], &rule["resources"][0]),
        (&group.into(), &kind.plural().into())
    );

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
            assert_eq!(differences(&document.value, schema, ""), [""; 0]);
        }
    }
    // The schema is no less strict than that.
    let mut wrong = documents(whole).remove(0).value;
    wrong["spec"]["ingres"] = Value::Null;
    wrong["spec"]["policyTypes"][0] = "Sideways".into();
    assert_eq!(differences(&wrong, schema, "").len(), 2);
}
