//! Identities: one number for all pods of a namespace with equal labels and equal named ports.
//!
//! The number follows from what it stands for, so it is the same after a restart and in whatever order pods are seen. Where two
//! meet on one number, the later one takes the next free number and is remembered in [`Identities::displaced`], which the
//! daemon keeps on disk.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sluice_contract::Identity;

use super::hash;
use crate::object::{Labels, Name, NamedPort, Pod};

/// What a number stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group {
    pub namespace: Arc<str>,
    pub labels: Arc<Labels>,
    pub ports: Arc<[NamedPort]>,
}

impl Group {
    pub(crate) fn of(pod: &Pod) -> Self {
        Self {
            namespace: pod.name.namespace.clone(),
            labels: pod.labels.clone(),
            ports: pod.ports.clone(),
        }
    }

    /// Of a pod that no object describes.
    pub(crate) fn undescribed(name: &Name) -> Self {
        Self {
            namespace: name.namespace.clone(),
            labels: Arc::new(Labels::default()),
            ports: Arc::from([]),
        }
    }

    /// The number of a named port; `protocol` unknown to ClusterNetworkPolicies.
    pub(crate) fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a NamedPort> {
        self.ports.iter().filter(move |port| port.name == name)
    }
}

/// A number that is not the one that follows from its group. Kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Displaced {
    pub namespace: String,
    pub labels: Labels,
    pub ports: Vec<NamedPort>,
    pub number: u32,
}

/// All groups in use.
#[derive(Debug, Default)]
pub struct Identities {
    numbers: HashMap<Group, (Identity, u32)>,
    groups: BTreeMap<Identity, Group>,
    /// From an earlier life: who had to step aside for whom.
    remembered: HashMap<Group, Identity>,
}

impl Identities {
    /// With what an earlier daemon left behind.
    pub fn new(displaced: impl IntoIterator<Item = Displaced>) -> Self {
        let remembered = displaced.into_iter().map(|it| {
            let group = Group {
                namespace: it.namespace.into(),
                labels: it.labels.into(),
                ports: it.ports.into(),
            };
            (group, Identity(it.number))
        });
        Self {
            remembered: remembered.collect(),
            ..Self::default()
        }
    }

    /// What has to be kept on disk: nearly always nothing.
    pub fn displaced(&self) -> Vec<Displaced> {
        let displaced = self
            .groups
            .iter()
            .filter(|(it, group)| **it != proposal(group));
        displaced
            .map(|(identity, group)| Displaced {
                namespace: group.namespace.to_string(),
                labels: (*group.labels).clone(),
                ports: group.ports.to_vec(),
                number: identity.0,
            })
            .collect()
    }

    pub fn group(&self, identity: Identity) -> Option<&Group> {
        self.groups.get(&identity)
    }

    pub fn number(&self, group: &Group) -> Option<Identity> {
        self.numbers.get(group).map(|(identity, _)| *identity)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Identity, &Group)> {
        self.groups
            .iter()
            .map(|(identity, group)| (*identity, group))
    }

    /// One more pod of this group. The number, and whether it is new.
    pub(crate) fn acquire(&mut self, group: Group) -> (Identity, bool) {
        if let Some((identity, pods)) = self.numbers.get_mut(&group) {
            *pods += 1;
            return (*identity, false);
        }
        let remembered = self.remembered.get(&group).copied();
        let mut identity = remembered.unwrap_or_else(|| proposal(&group));
        while !identity.is_pod() || self.groups.contains_key(&identity) {
            identity = Identity(identity.0.wrapping_add(1));
        }
        self.groups.insert(identity, group.clone());
        self.numbers.insert(group, (identity, 1));
        (identity, true)
    }

    /// One pod less. Whether it was the last one.
    pub(crate) fn release(&mut self, identity: Identity) -> bool {
        let Some(group) = self.groups.get(&identity) else {
            return false;
        };
        let Some((_, pods)) = self.numbers.get_mut(group) else {
            return false;
        };
        *pods -= 1;
        if *pods > 0 {
            return false;
        }
        if let Some(group) = self.groups.remove(&identity) {
            self.numbers.remove(&group);
        }
        true
    }
}

fn proposal(group: &Group) -> Identity {
    let span = u64::from(u32::MAX - Identity::FIRST_POD);
    let number = u32::try_from(hash::of(group) % span).unwrap_or_default();
    Identity(Identity::FIRST_POD + number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(app: &str) -> Group {
        Group {
            namespace: "x".into(),
            labels: Arc::new([("app".to_owned(), app.to_owned())].into_iter().collect()),
            ports: [].into(),
        }
    }

    #[test]
    fn numbers_do_not_depend_on_order_and_last_while_they_are_used() {
        let names: Vec<String> = (0..500).map(|it| it.to_string()).collect();
        let (mut one, mut other) = (Identities::default(), Identities::default());
        for name in &names {
            one.acquire(group(name));
        }
        for name in names.iter().rev() {
            other.acquire(group(name));
            other.acquire(group(name));
        }
        for name in &names {
            assert_eq!(one.number(&group(name)), other.number(&group(name)));
        }
        let number = other.number(&group("7")).unwrap();
        assert!(!other.release(number));
        assert!(other.release(number));
        assert_eq!(other.group(number), None);
    }

    #[test]
    fn who_stepped_aside_keeps_its_number_after_a_restart() {
        let mut first = Identities::default();
        let taken = proposal(&group("a"));
        // Somebody else is already where "a" belongs.
        first.groups.insert(taken, group("b"));
        first.numbers.insert(group("b"), (taken, 1));
        let (number, _) = first.acquire(group("a"));
        assert_ne!(number, taken);
        let mut second = Identities::new(first.displaced());
        assert_eq!(second.acquire(group("a")), (number, true));
        assert_eq!(second.acquire(group("b")), (taken, true));
    }
}
