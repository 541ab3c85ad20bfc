//! One object: read, or changed by a patch.

use serde_json::{Value, json};

use super::State;
use super::http::status;

/// One object without a namespace as it is, or with a patch merged into it. A patch that names a
/// version counts only if the object has that version.
pub(super) fn patch(state: &mut State, path: &str, change: Option<Value>) -> (u16, Value) {
    let is_status = path.ends_with("/status");
    let (collection, name) = path.trim_end_matches("/status").rsplit_once('/').unwrap();
    let name = format!("/{name}");
    let found = state.objects.get(collection).and_then(|it| it.get(&name));
    let Some(mut object) = found.cloned() else {
        return (404, status(404, "not found"));
    };
    let Some(mut change) = change else {
        return (200, object);
    };
    let version = change.pointer("/metadata/resourceVersion");
    if version.is_some_and(|it| *it != object["metadata"]["resourceVersion"]) {
        return (409, status(409, "the object has been modified"));
    }
    if is_status {
        // Of a custom resource only the status is taken, of a Node the metadata too.
        change.as_object_mut().unwrap().remove("spec");
    }
    merge(&mut object, &change);
    state.version += 1;
    object["metadata"]["resourceVersion"] = json!(state.version.to_string());
    let all = state.objects.entry(collection.into()).or_default();
    all.insert(name, object.clone());
    let event = json!({"type": "MODIFIED", "object": object});
    state
        .history
        .push((state.version, collection.into(), event));
    (200, object)
}

/// RFC 7386.
fn merge(target: &mut Value, change: &Value) {
    let Some(fields) = change.as_object() else {
        *target = change.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(name);
        } else {
            merge(&mut target[name], value);
        }
    }
}
