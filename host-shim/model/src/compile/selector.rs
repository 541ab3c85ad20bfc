//! Which identities the selectors of policies match, kept up to date one identity at a time.
//!
//! A selector is tried only on identities that have what it cannot do without (its namespace, one of its labels): tens of
//! thousands of selectors cost a new identity no more than those that are about pods like it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use sluice_contract::Identity;

use super::identity::{Group, Identities};
use crate::object::{Labels, Operator, PodSelector, Selector};

/// A selector in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SelectorId(u32);

/// What is selected.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Wanted {
    /// Pods of this namespace.
    Own(Arc<str>, Selector),
    /// Pods of namespaces with these labels.
    Across(Selector, Selector),
    /// Pods that have a port of this name.
    Port(String),
}

impl Wanted {
    /// Of a policy in `namespace`.
    pub(crate) fn new(selector: &PodSelector, namespace: &Arc<str>) -> Self {
        match &selector.namespaces {
            None => Self::Own(namespace.clone(), selector.pods.clone()),
            Some(namespaces) => Self::Across(namespaces.clone(), selector.pods.clone()),
        }
    }

    /// Whether it is every pod.
    pub(crate) fn is_everything(&self) -> bool {
        matches!(self, Self::Across(namespaces, pods) if namespaces.is_everything() && pods.is_everything())
    }

    pub(crate) fn matches(&self, group: &Group, namespace: &Labels) -> bool {
        match self {
            Self::Own(own, pods) => *own == group.namespace && pods.matches(&group.labels),
            Self::Across(namespaces, pods) => {
                pods.matches(&group.labels) && namespaces.matches(namespace)
            }
            Self::Port(name) => group.named(name).next().is_some(),
        }
    }

    /// What a group has to have at least one of; empty: nothing in particular.
    fn anchors(&self) -> Vec<Anchor> {
        match self {
            Self::Own(namespace, _) => vec![Anchor::Namespace(namespace.clone())],
            Self::Across(namespaces, pods) => match (pods.pairs(), namespaces.pairs()) {
                (Some(pairs), _) => pairs
                    .map(|(k, v)| Anchor::Label(k.into(), v.into()))
                    .collect(),
                (None, Some(pairs)) => pairs
                    .map(|(k, v)| Anchor::NamespaceLabel(k.into(), v.into()))
                    .collect(),
                (None, None) => vec![Anchor::Any],
            },
            Self::Port(name) => vec![Anchor::Port(name.clone())],
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own(namespace, pods) => write!(f, "pods {pods} in {namespace}"),
            Self::Across(namespaces, pods) => write!(f, "pods {pods} in namespaces {namespaces}"),
            Self::Port(name) => write!(f, "pods with a port {name}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Anchor {
    Any,
    Namespace(Arc<str>),
    Label(String, String),
    NamespaceLabel(String, String),
    Port(String),
}

impl Selector {
    /// Keys and values of which one has to be there, if the selector says so.
    fn pairs(&self) -> Option<impl Iterator<Item = (&str, &str)>> {
        self.requirements().find_map(|it| match &it.operator {
            Operator::In(values) => {
                Some(values.iter().map(|value| (it.key.as_str(), value.as_str())))
            }
            _ => None,
        })
    }
}

#[derive(Debug)]
struct Entry {
    wanted: Wanted,
    users: u32,
    members: BTreeSet<Identity>,
}

/// All selectors in use.
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    entries: HashMap<SelectorId, Entry>,
    ids: HashMap<Wanted, SelectorId>,
    anchored: HashMap<Anchor, BTreeSet<SelectorId>>,
    matching: HashMap<Identity, BTreeSet<SelectorId>>,
    next: u32,
}

impl Selectors {
    /// One more user of a selector.
    pub(crate) fn acquire<'a>(
        &mut self,
        wanted: &Wanted,
        identities: &Identities,
        namespace: impl Fn(&str) -> Arc<Labels> + 'a,
    ) -> SelectorId {
        if let Some(id) = self.ids.get(wanted) {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.users += 1;
            }
            return *id;
        }
        let id = SelectorId(self.next);
        self.next = self.next.wrapping_add(1);
        let mut labels: BTreeMap<Arc<str>, Arc<Labels>> = BTreeMap::new();
        let mut members = BTreeSet::new();
        for (identity, group) in identities.iter() {
            let labels = labels
                .entry(group.namespace.clone())
                .or_insert_with_key(|it| namespace(it));
            if wanted.matches(group, labels) {
                members.insert(identity);
                self.matching.entry(identity).or_default().insert(id);
            }
        }
        for anchor in wanted.anchors() {
            self.anchored.entry(anchor).or_default().insert(id);
        }
        self.ids.insert(wanted.clone(), id);
        let entry = Entry {
            wanted: wanted.clone(),
            users: 1,
            members,
        };
        self.entries.insert(id, entry);
        id
    }

    /// One user less.
    pub(crate) fn release(&mut self, id: SelectorId) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        if let Some(entry) = self.entries.remove(&id) {
            self.ids.remove(&entry.wanted);
            for anchor in entry.wanted.anchors() {
                if let Some(there) = self.anchored.get_mut(&anchor) {
                    there.remove(&id);
                    if there.is_empty() {
                        self.anchored.remove(&anchor);
                    }
                }
            }
            for identity in entry.members {
                if let Some(matching) = self.matching.get_mut(&identity) {
                    matching.remove(&id);
                }
            }
        }
    }

    pub(crate) fn members(&self, id: SelectorId) -> impl Iterator<Item = Identity> {
        self.entries
            .get(&id)
            .into_iter()
            .flat_map(|it| it.members.iter().copied())
    }

    pub(crate) fn contains(&self, id: SelectorId, identity: Identity) -> bool {
        self.entries
            .get(&id)
            .is_some_and(|it| it.members.contains(&identity))
    }

    /// An identity is new, or its namespace's labels have changed, or (`None`) it is gone. Which selectors match it now and
    /// did not, or the other way round.
    pub(crate) fn update(
        &mut self,
        identity: Identity,
        group: Option<(&Group, &Labels)>,
    ) -> Vec<SelectorId> {
        let now = group
            .map(|(group, labels)| self.find(group, labels))
            .unwrap_or_default();
        let before = self.matching.remove(&identity).unwrap_or_default();
        let toggled: Vec<SelectorId> = now.symmetric_difference(&before).copied().collect();
        for id in &toggled {
            if let Some(entry) = self.entries.get_mut(id) {
                if now.contains(id) {
                    entry.members.insert(identity);
                } else {
                    entry.members.remove(&identity);
                }
            }
        }
        if !now.is_empty() {
            self.matching.insert(identity, now);
        }
        toggled
    }

    fn find(&self, group: &Group, labels: &Labels) -> BTreeSet<SelectorId> {
        let own = |(k, v): (&str, &str)| Anchor::Label(k.into(), v.into());
        let of_namespace = |(k, v): (&str, &str)| Anchor::NamespaceLabel(k.into(), v.into());
        let anchors = [Anchor::Any, Anchor::Namespace(group.namespace.clone())]
            .into_iter()
            .chain(group.labels.iter().map(own))
            .chain(labels.iter().map(of_namespace))
            .chain(group.ports.iter().map(|it| Anchor::Port(it.name.clone())));
        let mut tried = HashSet::new();
        let mut found = BTreeSet::new();
        for id in anchors.filter_map(|it| self.anchored.get(&it)).flatten() {
            let matches = |entry: &Entry| entry.wanted.matches(group, labels);
            if tried.insert(*id) && self.entries.get(id).is_some_and(matches) {
                found.insert(*id);
            }
        }
        found
    }
}
