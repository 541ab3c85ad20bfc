//! What the API server refuses by the definition's schema and rules: the same mistakes that a node
//! refuses.
//!
//! The server's own evaluation is CEL with Kubernetes' extensions; of those only `isCIDR` is used,
//! and stands here for itself.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use cel::{Context, Env};
use serde_json::Value;
use sluice_model::validate::{Origin, admit};

use super::manifest::{documents, read};

/// What one rule may cost, and all rules of a definition together, where the server takes the
/// definition.
const RULE: u64 = 10_000_000;
const DEFINITION: u64 = 100_000_000;

fn schema() -> Value {
    let definition = documents(&read("deploy/nodepolicy.yaml")).remove(0).value;
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

fn rules(schema: &Value) -> impl Iterator<Item = (&str, &str)> {
    let rules = schema["x-kubernetes-validations"].as_array();
    rules.into_iter().flatten().map(|it| {
        (
            it["rule"].as_str().unwrap(),
            it["message"].as_str().unwrap(),
        )
    })
}

/// JSON as the server's CEL has it: numbers are signed.
fn cel_value(value: &Value) -> cel::Value {
    match value {
        Value::Null => cel::Value::Null,
        Value::Bool(it) => (*it).into(),
        Value::Number(it) => it.as_i64().unwrap().into(),
        Value::String(it) => it.as_str().into(),
        Value::Array(all) => all.iter().map(cel_value).collect::<Vec<_>>().into(),
        Value::Object(all) => {
            let fields = all.iter().map(|(name, it)| (name.clone(), cel_value(it)));
            fields.collect::<HashMap<String, cel::Value>>().into()
        }
    }
}

fn holds(rule: &str, value: &Value) -> bool {
    let env = Arc::new(Env::stdlib());
    let program = env.compile(rule).unwrap();
    let mut context = Context::with_env(env);
    context.add_variable_from_value("self", cel_value(value));
    let is_cidr = |text: Arc<String>| is_cidr(&text);
    context.add_function("isCIDR", is_cidr).unwrap();
    program.execute(&context).unwrap() == true.into()
}

/// As Kubernetes has it: no leading zeros, no IPv4 in IPv6.
fn is_cidr(text: &str) -> bool {
    let parsed = text.split_once('/').and_then(|(address, length)| {
        let address: std::net::IpAddr = address.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let number: u8 = length.parse().ok()?;
        Some(number <= most && number.to_string() == length && address == address.to_canonical())
    });
    parsed == Some(true)
}

/// Where an object does not keep to the schema, and why.
pub(crate) fn violations(value: &Value, schema: &Value, place: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |holds: bool, what: &str| {
        if !holds {
            found.push(format!("{place}: {what}"));
        }
    };
    let fits = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64(),
        _ => schema["x-kubernetes-int-or-string"] == true && (value.is_i64() || value.is_string()),
    };
    check(fits, "has another type");
    if !fits {
        return found;
    }
    let size = value.as_array().map(Vec::len);
    let size = size.or(value.as_str().map(str::len));
    let bound = |name: &str| schema[name].as_i64();
    let size = size.map(|it| i64::try_from(it).unwrap());
    check(
        bound("maxItems")
            .or(bound("maxLength"))
            .is_none_or(|it| size.unwrap() <= it),
        "is too long",
    );
    check(
        bound("minimum").is_none_or(|it| value.as_i64().unwrap() >= it),
        "is too small",
    );
    check(
        bound("maximum").is_none_or(|it| value.as_i64().unwrap() <= it),
        "is too large",
    );
    let listed = schema["enum"].as_array();
    check(
        listed.is_none_or(|it| it.contains(value)),
        "is none of the values",
    );
    for name in schema["required"].as_array().into_iter().flatten() {
        check(value.get(name.as_str().unwrap()).is_some(), "lacks a field");
    }
    for (rule, message) in rules(schema) {
        check(holds(rule, value), message);
    }
    for (name, it) in value.as_object().into_iter().flatten() {
        let place = format!("{place}.{name}");
        if schema["x-kubernetes-preserve-unknown-fields"] == true || place == ".metadata" {
            continue;
        }
        match (
            schema["properties"].get(name),
            schema.get("additionalProperties"),
        ) {
            (Some(schema), _) | (None, Some(schema)) => {
                found.extend(violations(it, schema, &place));
            }
            (None, None) => found.push(format!("{place}: is unknown")),
        }
    }
    for (index, it) in value.as_array().into_iter().flatten().enumerate() {
        found.extend(violations(
            it,
            &schema["items"],
            &format!("{place}[{index}]"),
        ));
    }
    found
}

/// A policy with this in its `spec`.
fn policy(rest: &str) -> sluice_model::document::Document {
    let text = format!(
        "apiVersion: sluice.dev/v1alpha1\nkind: NodePolicy\nmetadata: {{name: p}}\nspec: {{nodeSelector: {{}}, {rest}}}\n"
    );
    documents(&text).remove(0)
}

fn is_good_for_a_node(document: &sluice_model::document::Document) -> bool {
    let admission = admit(document, Origin::File(Path::new("p.yaml")));
    admission.object.is_some()
}

#[test]
fn n21_the_server_refuses_the_mistakes_that_a_node_refuses_and_says_which() {
    let mistakes = [
        (
            "ingress: [{from: [{podSelector: {}}]}]",
            ".spec.ingress[0].from[0]: podSelector needs namespaceSelector",
        ),
        (
            "egress: [{to: [{podSelector: {}}]}]",
            ".spec.egress[0].to[0]: podSelector needs namespaceSelector",
        ),
        (
            "ingress: [{ports: [{port: http}]}]",
            ".spec.ingress[0].ports[0].port: has to be a number",
        ),
        (
            "ingress: [{ports: [{port: 80, endPort: 79}]}]",
            ".spec.ingress[0].ports[0]: endPort is less than port",
        ),
        (
            "ingress: [{ports: [{endPort: 80}]}]",
            ".spec.ingress[0].ports[0]: endPort needs port",
        ),
        (
            "egress: [{ports: [{port: http, endPort: 80}]}]",
            ".spec.egress[0].ports[0]: endPort needs port beside it, as a number",
        ),
        (
            "ingress: [{ports: [{port: 65536}]}]",
            ".spec.ingress[0].ports[0].port: has to be from 1 to 65535",
        ),
        (
            "egress: [{ports: [{port: 0}]}]",
            ".spec.egress[0].ports[0].port: has to be from 1 to 65535",
        ),
        (
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]",
            ".spec.ingress[0].from[0].ipBlock.cidr: is no range",
        ),
        (
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]",
            ".spec.ingress[0].from[0].ipBlock.cidr: is no range",
        ),
        (
            "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [ten]}}]}]",
            ".spec.egress[0].to[0].ipBlock.except[0]: is no range",
        ),
        (
            "ingress: [{from: [{}]}]",
            ".spec.ingress[0].from[0]: needs namespaceSelector",
        ),
        (
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, namespaceSelector: {}}]}]",
            ".spec.ingress[0].from[0]: ipBlock stands alone",
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: In}]}}]}]",
            ".spec.ingress[0].from[0].namespaceSelector.matchExpressions[0]: In and NotIn need",
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}}]}]",
            ".spec.ingress[0].from[0].namespaceSelector.matchExpressions[0]: In and NotIn need",
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}]}]",
            ".spec.ingress[0].from[0].namespaceSelector.matchExpressions[0]: Exists and DoesNotExist take",
        ),
        (
            "policyTypes: [Sideways]",
            ".spec.policyTypes[0]: is none of the values",
        ),
    ];
    let schema = schema();
    for (spec, wanted) in mistakes {
        let document = policy(spec);
        let found = violations(&document.value, &schema, "");
        assert!(
            found.len() == 1 && found[0].starts_with(wanted),
            "{spec}: {found:?}"
        );
        assert!(!is_good_for_a_node(&document), "{spec}");
    }
}

#[test]
fn n21_the_server_takes_what_a_node_takes() {
    let good = [
        "policyTypes: [Ingress, Egress], ingress: [], egress: []",
        "ingress: [{}], egress: [{}]",
        "ingress: [{from: [], ports: []}]",
        "ingress: [{from: [{namespaceSelector: {}}, {namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}]}]",
        "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {ipBlock: {cidr: 'fd00::/8'}}, {ipBlock: {cidr: '::/0'}}]}]",
        "ingress: [{ports: [{port: 1}, {port: 65535, protocol: SCTP}, {port: 80, endPort: 80}, {port: 1, endPort: 65535}, {protocol: UDP}]}]",
        "egress: [{ports: [{port: http}, {port: 443, protocol: TCP}]}]",
        "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: In, values: [b]}, {key: a, operator: Exists}]}}]}]",
    ];
    let schema = schema();
    for spec in good {
        let document = policy(spec);
        assert_eq!(violations(&document.value, &schema, ""), [""; 0], "{spec}");
        assert!(is_good_for_a_node(&document), "{spec}");
    }
}

/// Calls `visit` with each schema, where it is, how many values of it an object can have, and
/// whether it is explained.
fn walk(schema: &Value, place: &str, count: u64, visit: &mut impl FnMut(&Value, &str, u64)) {
    visit(schema, place, count);
    for (name, it) in schema["properties"].as_object().into_iter().flatten() {
        walk(it, &format!("{place}.{name}"), count, visit);
    }
    let items = [
        ("items", "maxItems"),
        ("additionalProperties", "maxProperties"),
    ];
    for (of, bound) in items {
        if let Some(it) = schema.get(of) {
            let most = schema[bound].as_u64();
            let most = most.unwrap_or_else(|| panic!("{place} has no {bound}"));
            walk(it, &format!("{place}[]"), count * most, visit);
        }
    }
}

/// A rule's cost at most: one for each word and operator, and a tenth of the longest text it can be
/// about.
fn cost(rule: &str, schema: &Value) -> u64 {
    let is_word = |it: char| it.is_alphanumeric() || it == '_';
    let words = rule.split(|it| !is_word(it)).filter(|it| !it.is_empty());
    let operators = rule.matches(['!', '<', '>', '|', '&', '=']);
    let text = schema["maxLength"]
        .as_u64()
        .unwrap_or_default()
        .div_ceil(10);
    (words.count() + operators.count()) as u64 + text
}

#[test]
fn n21_the_rules_cost_what_the_server_grants_and_every_field_is_explained() {
    let schema = schema();
    let mut total = 0;
    walk(&schema, "", 1, &mut |it, place, count| {
        for (rule, message) in rules(it) {
            let cost = cost(rule, it) * count;
            assert!(cost <= RULE, "{place}: {rule}: {cost}");
            assert!(message.len() > 10, "{place}: {rule}");
            total += cost;
        }
        if it["type"] == "string" {
            let bounds = ["maxLength", "enum", "format"];
            let is_bounded = bounds.iter().any(|bound| it.get(bound).is_some());
            let is_servers = [".apiVersion", ".kind"].contains(&place);
            assert!(is_bounded || is_servers, "{place} is not bounded");
        }
        let is_item = place.ends_with("[]");
        let is_explained = it["description"].as_str().is_some_and(|it| it.len() > 5);
        assert!(
            is_explained || is_item || place == ".metadata",
            "{place} is not explained"
        );
        // A structural schema: a type everywhere, or one of two.
        assert!(
            it["type"].is_string() || it["x-kubernetes-int-or-string"] == true,
            "{place}"
        );
    });
    assert!(total > 0 && total <= DEFINITION, "{total}");
}
