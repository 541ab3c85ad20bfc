//! Which pods are known to the appliance: each namespace has its share of the addresses of pods.
//!
//! A pod beyond it has no identity. Policies that single pods out accept nothing of it, and where only a denial could be about it
//! the appliance denies. Pods of this node come first.

use std::collections::BTreeMap;

use sluice_contract::message::Room;

use super::shares::{Lack, Ledger, of_objects};
use crate::object::{Age, Name};

/// The addresses of pods, and who has how many of them.
#[derive(Debug, Default)]
pub(super) struct PodRoom {
    ledger: Ledger<1>,
}

impl PodRoom {
    pub(super) fn set_room(&mut self, room: &Room) {
        self.ledger.set_room([of_objects(room.identities)]);
    }

    /// A pod has so many addresses now; 0 if it is gone.
    pub(super) fn set(&mut self, pod: &Name, is_attached: bool, addresses: usize) {
        let age = Age {
            created: is_attached.then_some(0),
            uid: None,
        };
        self.ledger.set(pod, &age, [addresses as u64]);
    }

    /// Decides anew which pods are left out; those of which that has changed.
    pub(super) fn settle(&mut self) -> Vec<Name> {
        self.ledger.settle()
    }

    pub(super) fn is_left_out(&self, pod: &Name) -> bool {
        self.ledger.lack(pod).is_some()
    }

    pub(super) fn leaves_any_out(&self) -> bool {
        self.ledger.left_out().next().is_some()
    }

    /// Namespaces of which pods are left out, and what that means.
    pub(super) fn left_out(&self) -> impl Iterator<Item = (String, String)> {
        let mut namespaces: BTreeMap<&str, (usize, &Name, &Lack)> = BTreeMap::new();
        for (pod, lack) in self.ledger.left_out() {
            let entry = namespaces.entry(&pod.namespace);
            entry.or_insert((0, pod, lack)).0 += 1;
        }
        namespaces.into_iter().map(|(namespace, (count, pod, lack))| {
            let Lack { share, room, .. } = lack;
            let reason = format!(
                "{count} of its pods, such as {pod}, are unknown to this node, and what policies let pods do by their labels they may \
                 not: the namespace has {share} of the {room} addresses of pods that the appliance has room for"
            );
            (format!("Namespace {namespace}"), reason)
        })
    }
}
