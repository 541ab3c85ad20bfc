//! The rows that should be in force, small: each as the bytes it is sent as, and once.
//!
//! Beside them stands what has changed since the guest was last told: a change costs what has changed, however many rows
//! there are. What the guest has need not be kept: after any doubt it gets everything again.

use std::collections::{BTreeMap, BTreeSet};

use sluice_contract::frame::FRAME_MAX;
use sluice_contract::overlay::{OverlayKey, OverlayRow};
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
        if let (RejectReason::Full(capacity), Key::Overlay(full)) = (reject.reason, key) {
            self.refuse_beyond(full, capacity as usize, reject);
        }
        true
    }

    /// Peers and next hops are numbered: where one does not fit, none above does, nor what refers to it. Each refusal costs
    /// a session, and nothing else comes into force meanwhile.
    fn refuse_beyond(&mut self, full: OverlayKey, capacity: usize, reject: Reject) {
        let (mut hops, mut peers) = (BTreeSet::new(), BTreeSet::new());
        match full {
            OverlayKey::NextHop(id) => drop(hops.insert(id)),
            OverlayKey::Peer(id) => drop(peers.insert(id)),
            OverlayKey::Tunnel | OverlayKey::Remote(_) => return,
        }
        // In the order of keys: next hops, peers, ranges.
        let overlay: Vec<Key> = self.rows.keys().copied().filter(is_way).collect();
        for key in overlay {
            let Some(row) = self.row(&key) else { continue };
            let is_beyond = match (*row, full) {
                (Row::Overlay(OverlayRow::NextHop(row)), OverlayKey::NextHop(_)) => {
                    usize::from(row.id.0) >= capacity && hops.insert(row.id)
                }
                (Row::Overlay(OverlayRow::Peer(row)), _) => {
                    let full = matches!(full, OverlayKey::Peer(_));
                    let beyond = full && usize::from(row.id.0) >= capacity;
                    (beyond || hops.contains(&row.next_hop)) && peers.insert(row.id)
                }
                (Row::Overlay(OverlayRow::Remote(row)), _) => peers.contains(&row.peer),
                (Row::Route(row), _) => row.next_hop.is_some_and(|hop| hops.contains(&hop)),
                _ => false,
            };
            if is_beyond {
                self.refused.insert(key, reject);
            }
        }
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

fn is_way(key: &Key) -> bool {
    matches!(key, Key::Overlay(_) | Key::Route(_))
}

fn is_referring(key: &Key) -> bool {
    matches!(key, Key::Service(_) | Key::Overlay(_) | Key::Route(_))
}

#[cfg(test)]
mod tests {
    use sluice_contract::overlay::{NextHopId, NextHopRow, PeerId, PeerRow, RemoteRow};
    use sluice_contract::report::Field;
    use sluice_contract::row::RouteRow;
    use sluice_contract::{Mac, Prefix};

    use super::*;

    /// Four nodes, each behind a neighbor of its own, with a range and a route by the neighbor.
    fn four() -> Desired {
        let mut desired = Desired::default();
        for n in 0..4_u8 {
            let (id, next_hop) = (PeerId(n.into()), NextHopId(n.into()));
            let mac = Mac([2, 0, 0, 0, 0, n]);
            let range = |first: u8| Prefix::new([first, n, 0, 0].into(), 16).unwrap();
            let address = [192, 0, 2, n].into();
            desired.put([
                Row::Overlay(OverlayRow::NextHop(NextHopRow {
                    id: next_hop,
                    address,
                    mac: Some(mac),
                })),
                Row::Overlay(OverlayRow::Peer(PeerRow {
                    id,
                    address,
                    mac,
                    next_hop,
                    mtu: 1500,
                    direct: false,
                })),
                Row::Overlay(OverlayRow::Remote(RemoteRow {
                    prefix: range(10),
                    peer: id,
                })),
                Row::Route(RouteRow {
                    prefix: range(172),
                    next_hop: Some(next_hop),
                }),
            ]);
        }
        desired
    }

    fn refused(desired: &mut Desired, key: OverlayKey, capacity: u32) -> usize {
        let reject = Reject {
            object: Some(Key::Overlay(key)),
            field: Field::Id,
            reason: RejectReason::Full(capacity),
        };
        assert!(desired.refuse(Key::Overlay(key), reject));
        desired.refusals().count()
    }

    #[test]
    fn where_one_node_does_not_fit_none_above_is_tried() {
        let mut desired = four();
        // Two peers and their ranges; the neighbors and routes fit.
        assert_eq!(refused(&mut desired, OverlayKey::Peer(PeerId(2)), 2), 4);
        assert_eq!(desired.take_all().len(), 12);
        let mut desired = four();
        assert_eq!(
            refused(&mut desired, OverlayKey::NextHop(NextHopId(3)), 3),
            4
        );
        // One that changes is tried again.
        let moved = NextHopRow {
            id: NextHopId(3),
            address: [192, 0, 2, 9].into(),
            mac: None,
        };
        desired.put([Row::Overlay(OverlayRow::NextHop(moved))]);
        assert_eq!(desired.refusals().count(), 3);
    }
}
