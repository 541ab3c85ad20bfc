//! What was recorded: what a cluster's watches and this node's CNI said, line by line, and the ways to say it otherwise.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use sluice_contract::LinkId;
use sluice_model::compile::{Attached, Model};
use sluice_model::object::{Kind, Name, ObjectKey};
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

/// Whose state something says: an object's, or a link's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    Object(Kind, String),
    Link(u16),
}

/// One line: a subject's new state; `None`: it is gone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Said {
    pub(crate) subject: Subject,
    pub(crate) state: Option<Value>,
}

impl Said {
    fn read(line: &str) -> Self {
        let line: Value = serde_json::from_str(line).unwrap();
        let kind = line["type"].as_str().unwrap();
        let is_gone = kind == "DELETED" || kind == "DETACHED";
        if let Some(link) = line["link"].as_u64() {
            return Self {
                subject: Subject::Link(link.try_into().unwrap()),
                state: (!is_gone).then_some(line),
            };
        }
        let kind = Kind::ALL.into_iter().find(|it| it.name() == line["kind"]);
        let kind = kind.unwrap();
        let name = name(kind, &line["object"]).to_string();
        Self {
            subject: Subject::Object(kind, name),
            state: (!is_gone).then(|| line["object"].clone()),
        }
    }

    /// Tells a model. `false`: that is no valid object, so a source would not say it.
    pub(crate) fn tell(&self, model: &mut Model) -> bool {
        match (&self.subject, &self.state) {
            (Subject::Link(link), state) => {
                let link = LinkId::new(*link).unwrap();
                match state {
                    None => model.detach(link),
                    Some(state) => model.attach(link, attached(state)),
                }
                true
            }
            (Subject::Object(kind, name), None) => {
                let name = match name.split_once('/') {
                    Some((namespace, name)) => Name::new(namespace, name),
                    None => Name::new("", name),
                };
                model.apply(Event::Removed(ObjectKey { kind: *kind, name }));
                true
            }
            (Subject::Object(kind, _), Some(state)) => {
                let object = admit_as(*kind, state.clone()).object;
                let event = object.map(Event::Put);
                let is_valid = event.is_some();
                event.into_iter().for_each(|event| model.apply(event));
                is_valid
            }
        }
    }
}

fn name(kind: Kind, object: &Value) -> Name {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    let namespace = if kind.is_namespaced() {
        text("namespace")
    } else {
        ""
    };
    Name::new(namespace, text("name"))
}

fn attached(line: &Value) -> Attached {
    let (namespace, name) = line["pod"].as_str().unwrap().split_once('/').unwrap();
    let addresses = line["addresses"].as_array().unwrap().iter();
    Attached {
        pod: Name::new(namespace, name),
        addresses: addresses
            .map(|it| it.as_str().unwrap().parse().unwrap())
            .collect(),
    }
}

/// All lines of a recording.
pub(crate) fn read(text: &str) -> Vec<Said> {
    text.lines().map(Said::read).collect()
}

/// What each subject says, in the order in which it says it.
pub(crate) fn by_subject(said: &[Said]) -> BTreeMap<&Subject, Vec<&Said>> {
    let mut all: BTreeMap<&Subject, Vec<&Said>> = BTreeMap::new();
    for it in said {
        all.entry(&it.subject).or_default().push(it);
    }
    all
}

/// Only what holds in the end.
pub(crate) fn squashed(said: &[Said]) -> Vec<Said> {
    let last = by_subject(said)
        .into_values()
        .filter_map(|all| all.last().copied());
    last.filter(|it| it.state.is_some()).cloned().collect()
}

/// Subjects from the last to the first; each says its own in order, for that is what a watch promises.
pub(crate) fn reversed(said: &[Said]) -> Vec<Said> {
    let mut places: Vec<&Subject> = Vec::new();
    for it in said {
        if !places.contains(&&it.subject) {
            places.push(&it.subject);
        }
    }
    let all = by_subject(said);
    let backwards = places.iter().rev().flat_map(|it| all[*it].iter().copied());
    backwards.cloned().collect()
}

/// Subjects interleaved anyhow.
pub(crate) fn shuffled(said: &[Said], seed: u64) -> Vec<Said> {
    let mut random = Random(seed);
    let mut queues: Vec<Vec<&Said>> = by_subject(said).into_values().collect();
    let mut result = Vec::new();
    while !queues.is_empty() {
        let at = random.below(queues.len());
        result.push(queues[at].remove(0).clone());
        queues.retain(|it| !it.is_empty());
    }
    result
}

/// Every change of an object field by field. Not every step is a valid object.
pub(crate) fn split(said: &[Said]) -> Vec<Said> {
    let mut states: BTreeMap<&Subject, Value> = BTreeMap::new();
    let mut result = Vec::new();
    for it in said {
        let former = match (&it.subject, &it.state) {
            (Subject::Object(..), Some(_)) => states.get(&it.subject).cloned(),
            _ => None,
        };
        if let (Some(mut step), Some(to)) = (former, &it.state) {
            for part in ["metadata", "spec", "status", "endpoints", "ports"] {
                for field in fields(&step[part], &to[part]) {
                    set(&mut step, to, part, &field);
                    result.push(Said {
                        subject: it.subject.clone(),
                        state: Some(step.clone()),
                    });
                }
            }
        }
        result.push(it.clone());
        match &it.state {
            Some(state) => states.insert(&it.subject, state.clone()),
            None => states.remove(&it.subject),
        };
    }
    result
}

/// Fields, or indices, at which two values differ.
fn fields(from: &Value, to: &Value) -> Vec<String> {
    let keyed = |value: &Value| -> Map<String, Value> {
        match value {
            Value::Object(fields) => fields.clone(),
            Value::Array(items) => {
                let numbered = items.iter().enumerate();
                numbered
                    .map(|(at, it)| (format!("{at:03}"), it.clone()))
                    .collect()
            }
            _ => Map::new(),
        }
    };
    let (from, to) = (keyed(from), keyed(to));
    let mut names: Vec<String> = from.keys().chain(to.keys()).cloned().collect();
    names.sort();
    names.dedup();
    names.retain(|it| from.get(it) != to.get(it));
    names
}

fn set(step: &mut Value, to: &Value, part: &str, field: &str) {
    match (&mut step[part], &to[part]) {
        (Value::Array(items), Value::Array(wanted)) => {
            let at: usize = field.parse().unwrap();
            match wanted.get(at) {
                Some(item) if at < items.len() => items[at] = item.clone(),
                Some(item) => items.push(item.clone()),
                None => items.truncate(at),
            }
        }
        (Value::Object(fields), Value::Object(wanted)) => {
            match wanted.get(field) {
                Some(value) => fields.insert(field.into(), value.clone()),
                None => fields.remove(field),
            };
        }
        (part, wanted) => *part = wanted.clone(),
    }
}

/// Numbers that follow from a seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let state = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = state.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}
