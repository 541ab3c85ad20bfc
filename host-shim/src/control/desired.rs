//! The rows that should be in force, small: each as the bytes it is sent as, and once.
//!
//! Beside them stands what has changed since the guest was last told: a change costs what has changed, however many rows
//! there are. What the guest has need not be kept: after any doubt it gets everything again.
//!
//! What the guest refuses stays desired: it may be taken once something else has changed, so it is offered again now and
//! then.

use std::collections::BTreeMap;

use sluice_contract::frame::FRAME_MAX;
use sluice_contract::message::Room;
use sluice_contract::policy::PolicyKey;
use sluice_contract::report::{Reject, RejectReason};
use sluice_contract::{Key, Row};

/// The rows that should be in force.
#[derive(Debug, Default)]
pub struct Desired {
    rows: BTreeMap<Key, Box<[u8]>>,
    /// Rows that are desired and that the guest does not have, or does not use.
    refused: BTreeMap<Key, Refusal>,
    /// What differs from what the guest was told last, and whether it may have a row there.
    changed: BTreeMap<Key, bool>,
    /// The guest denies more than the rows say, because some did not fit. Only a fresh change ends that.
    guarded: bool,
    revision: u64,
    plan: Plan,
}

/// Whether rows are chosen by what a guest has room for, and for which guest they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Plan {
    /// Nobody chooses: all rows are sent to any guest.
    #[default]
    Unplanned,
    /// They have to be chosen before a guest gets them.
    Awaited,
    For(Room),
}

/// Why the guest does not have a row.
#[derive(Debug)]
struct Refusal {
    reject: Reject,
    /// It is offered again in the change that is under way: unless it is refused again, it is taken.
    offered: bool,
}

/// What the guest is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Put(Box<Row>),
    Remove(Key),
}

/// What a refusal amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// A desired row is not in force.
    Row,
    /// It was not before, for the same reason.
    Again,
    /// Nothing is missing: the row was not there when it was to go, or is another one by now.
    Nothing,
    /// A row that should be gone is still there.
    Left,
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
            if self.rows.remove(&key).is_some() {
                self.changed.entry(key).or_insert(true);
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
        let had = self.rows.contains_key(&key);
        let is_same = self.rows.get(&key).is_some_and(|there| **there == *bytes);
        if is_same && !self.refused.contains_key(&key) {
            return;
        }
        self.refused.remove(&key);
        self.changed.entry(key).or_insert(had);
        self.rows.insert(key, Box::from(&*bytes));
    }

    /// From now on a guest gets rows only once they are [planned](Self::planned) for its room.
    pub(super) fn await_plan(&mut self) {
        if self.plan == Plan::Unplanned {
            self.plan = Plan::Awaited;
        }
    }

    /// The rows were chosen for a guest of this room.
    pub(super) fn planned(&mut self, room: Room) {
        self.plan = Plan::For(room);
    }

    /// Whether the rows may be sent to a guest of this room.
    pub(super) fn is_planned_for(&self, room: &Room) -> bool {
        match &self.plan {
            Plan::Unplanned => true,
            Plan::Awaited => false,
            Plan::For(planned) => planned == room,
        }
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
        self.refused.get(&key).map(|refusal| refusal.reject)
    }

    /// All refusals.
    pub fn refusals(&self) -> impl ExactSizeIterator<Item = (Key, Reject)> + '_ {
        self.refused
            .iter()
            .map(|(key, refusal)| (*key, refusal.reject))
    }

    /// The guest left this out of the change that is under way.
    pub(super) fn refuse(&mut self, key: Key, reject: Reject) -> Refused {
        if !self.rows.contains_key(&key) {
            return match reject.reason {
                RejectReason::InUse(_) => Refused::Left,
                _ => Refused::Nothing,
            };
        }
        if self.changed.contains_key(&key) {
            return Refused::Nothing;
        }
        let offered = false;
        let former = self.refused.insert(key, Refusal { reject, offered });
        self.guarded |= guards(&key);
        match former {
            Some(former) if former.reject == reject => Refused::Again,
            _ => Refused::Row,
        }
    }

    /// The change that was under way is in force; how many rows are not.
    pub(super) fn in_force(&mut self) -> usize {
        self.refused.retain(|_, refusal| !refusal.offered);
        self.refused.len()
    }

    /// Whether only a fresh change ends what the guest denies for rows that did not fit, and that all fit now.
    pub(super) fn is_guarded_for_nothing(&self) -> bool {
        self.guarded && !self.refused.keys().any(guards)
    }

    /// Offers the guest again what it refused, with the next change.
    pub(super) fn offer_again(&mut self) {
        let refused = self.refused.iter().filter(|(_, it)| !is_there(&it.reject));
        let keys = refused.map(|(key, _)| (*key, true));
        let keys: Vec<_> = keys.collect();
        for (key, had) in keys {
            self.changed.entry(key).or_insert(had);
        }
    }

    /// Whether there is anything that [`Self::offer_again`] would offer.
    pub(super) fn has_offers(&self) -> bool {
        self.refused.values().any(|it| !is_there(&it.reject))
    }

    fn row(&self, key: &Key) -> Option<Box<Row>> {
        let row = postcard::from_bytes(self.rows.get(key)?);
        // They were written by the same code.
        row.ok().map(Box::new)
    }

    /// All rows, for a guest that has none.
    pub(super) fn take_all(&mut self) -> Vec<Change> {
        self.changed.clear();
        self.guarded = false;
        for refusal in self.refused.values_mut() {
            refusal.offered = true;
        }
        let rows = self.rows.keys().filter_map(|key| self.row(key));
        rows.map(Change::Put).collect()
    }

    /// What has changed since the last call. Links and the like go first, so that what they held is free; rows of Services and
    /// of the way to other nodes refer to each other, so what is referred to comes before and goes after.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        let changed = std::mem::take(&mut self.changed);
        let (mut first, mut puts, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for (key, refusal) in &mut self.refused {
            // Sets that are not complete are named with each change that leaves them so.
            refusal.offered = changed.contains_key(key) || is_there(&refusal.reject);
        }
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

/// Whether the guest has the row, and only does not use it.
const fn is_there(reject: &Reject) -> bool {
    matches!(reject.reason, RejectReason::Incomplete(_))
}

/// Rows without which the guest denies more than the others say.
const fn guards(key: &Key) -> bool {
    matches!(
        key,
        Key::Policy(PolicyKey::Identity(_) | PolicyKey::Class(..))
    )
}

const fn is_referring(key: &Key) -> bool {
    matches!(key, Key::Service(_) | Key::Overlay(_) | Key::Route(_))
}
