//! The rows that should be in force, small: each as the bytes it is sent as, and once.
//!
//! Beside them stands what has changed since the guest was last told: a change costs what has changed, however many rows
//! there are. What the guest has need not be kept: after any doubt it gets everything again.

use std::collections::BTreeMap;

use sluice_contract::frame::FRAME_MAX;
use sluice_contract::report::{Reject, RejectReason};
use sluice_contract::{Key, Row};

/// The rows that should be in force.
#[derive(Debug, Default)]
pub struct Desired {
    rows: BTreeMap<Key, Box<[u8]>>,
    /// Rows that the guest refused: left out until they change.
    refused: BTreeMap<Key, Reject>,
    /// What differs from what the guest was told last, and whether it has a row there.
    changed: BTreeMap<Key, bool>,
    revision: u64,
}

/// What the guest is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Put(Box<Row>),
    Remove(Key),
}

impl Desired {
    /// Puts rows; returns the revision that has them.
    pub fn put(&mut self, rows: impl IntoIterator<Item = Row>) -> u64 {
        self.change(rows, [])
    }

    /// Removes rows; returns the revision that has them no more.
    pub fn remove(&mut self, keys: impl IntoIterator<Item = Key>) -> u64 {
        self.change([], keys)
    }

    /// Puts and removes rows at once: the guest sees all of it or nothing.
    pub fn change(
        &mut self,
        put: impl IntoIterator<Item = Row>,
        remove: impl IntoIterator<Item = Key>,
    ) -> u64 {
        for row in put {
            self.put_row(&row);
        }
        for key in remove {
            let had = self.guest_has(&key);
            if self.rows.remove(&key).is_some() {
                self.changed.entry(key).or_insert(had);
            }
            self.refused.remove(&key);
        }
        self.revision += 1;
        self.revision
    }

    fn put_row(&mut self, row: &Row) {
        let key = row.key();
        let mut buffer = [0; FRAME_MAX];
        // A row that is too long for a frame cannot be: the contract bounds all of them.
        let Ok(bytes) = postcard::to_slice(row, &mut buffer) else {
            tracing::error!(?key, "a row is too long to be sent");
            return;
        };
        let had = self.guest_has(&key);
        let is_same = self.rows.get(&key).is_some_and(|there| **there == *bytes);
        if is_same && !self.refused.contains_key(&key) {
            return;
        }
        self.refused.remove(&key);
        self.changed.entry(key).or_insert(had);
        self.rows.insert(key, Box::from(&*bytes));
    }

    fn guest_has(&self, key: &Key) -> bool {
        self.rows.contains_key(key) && !self.refused.contains_key(key)
    }

    /// The number of the last change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether the row is desired.
    pub fn has(&self, key: Key) -> bool {
        self.rows.contains_key(&key)
    }

    /// Why the guest does not have this row, if it refused it.
    pub fn refusal(&self, key: Key) -> Option<Reject> {
        self.refused.get(&key).copied()
    }

    /// All refusals.
    pub fn refusals(&self) -> impl Iterator<Item = (Key, Reject)> + '_ {
        self.refused.iter().map(|(key, reject)| (*key, *reject))
    }

    /// Leaves a row out because the guest refused it; `false` if that is no way out.
    ///
    /// Policy and Services without the rows that did not fit would be other policy and Services, and every further row
    /// would not fit either: then what was in force before stays in force as a whole.
    pub(super) fn refuse(&mut self, key: Key, reject: Reject) -> bool {
        let is_of_cluster = matches!(key, Key::Policy(_) | Key::Service(_));
        let is_full = matches!(reject.reason, RejectReason::Full(_));
        if !self.rows.contains_key(&key)
            || self.refused.contains_key(&key)
            || (is_of_cluster && is_full)
        {
            return false;
        }
        self.refused.insert(key, reject);
        true
    }

    fn row(&self, key: &Key) -> Option<Box<Row>> {
        if self.refused.contains_key(key) {
            return None;
        }
        let row = postcard::from_bytes(self.rows.get(key)?);
        // They were written by the same code.
        row.ok().map(Box::new)
    }

    /// All rows, for a guest that has none.
    pub(super) fn take_all(&mut self) -> Vec<Change> {
        self.changed.clear();
        let rows = self.rows.keys().filter_map(|key| self.row(key));
        rows.map(Change::Put).collect()
    }

    /// What has changed since the last call. Links and the like go first, so that what they held is free; rows of Services and
    /// of the way to other nodes refer to each other, so what is referred to comes before and goes after.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        let changed = std::mem::take(&mut self.changed);
        let (mut first, mut puts, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for (key, had) in changed {
            match self.row(&key) {
                Some(row) => puts.push(Change::Put(row)),
                None if !had => {}
                None if is_referring(&key) => last.push(Change::Remove(key)),
                None => first.push(Change::Remove(key)),
            }
        }
        first.extend(puts);
        first.extend(last.into_iter().rev());
        first
    }
}

fn is_referring(key: &Key) -> bool {
    matches!(key, Key::Service(_) | Key::Overlay(_) | Key::Route(_))
}
