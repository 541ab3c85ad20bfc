//! Who gets how much of a table that is too small for everything: fair shares of namespaces, and within a share what is
//! older first.
//!
//! A namespace that needs no more than its share gets all of it, whatever others ask for. What is left over goes to the
//! others, older objects first, and is taken back when a namespace needs its share. All of it follows from the objects
//! alone, so neither the order in which they came nor a restart makes a difference.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::object::{Age, Name};

/// Rows by table.
pub(super) type Rows<const N: usize> = [u64; N];

/// What does not fit, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lack {
    /// The table, by its place among those that are divided.
    pub(super) table: usize,
    pub(super) needs: u64,
    /// What there is room for, and how much of it the namespace has.
    pub(super) room: u64,
    pub(super) share: u64,
}

/// Where rows that belong to no namespace are counted: of nodes, and of policies of the cluster.
pub(super) const CLUSTER: &str = "";
/// Parts of a table, of which some have a minimum.
const PARTS: u64 = 16;

/// What an owner has at least, however many others there are.
fn minimum(owner: &str, room: u64) -> u64 {
    let parts = match owner {
        CLUSTER => 8,
        "kube-system" | "default" => 2,
        _ => 0,
    };
    room * parts / PARTS
}

/// The rows that are left for objects of the cluster. A part is kept free for host ports and the node's own addresses.
pub(super) const fn of_objects(room: u32) -> u64 {
    let room = room as u64;
    room - room.div_ceil(PARTS)
}

/// A table divided among owners.
#[derive(Debug)]
pub(super) struct Division {
    room: u64,
    level: u64,
    demands: HashMap<Arc<str>, u64>,
}

impl Division {
    /// The highest level up to which every owner can have what it needs.
    pub(super) fn new(room: u64, demands: HashMap<Arc<str>, u64>) -> Self {
        let mut division = Self {
            room,
            level: u64::MAX,
            demands,
        };
        if division.sum() > room {
            let (mut low, mut high) = (0, room);
            while low < high {
                division.level = low + (high - low).div_ceil(2);
                if division.sum() <= room {
                    low = division.level;
                } else {
                    high = division.level - 1;
                }
            }
            division.level = low;
        }
        division
    }

    fn sum(&self) -> u64 {
        self.demands.keys().map(|owner| self.share(owner)).sum()
    }

    pub(super) fn share(&self, owner: &str) -> u64 {
        let demand = self.demands.get(owner).copied().unwrap_or_default();
        demand.min(self.level.max(minimum(owner, self.room)))
    }

    /// What an owner could have at most without taking anything from others.
    pub(super) fn limit(&self, owner: &str) -> u64 {
        let limit = self.level.max(minimum(owner, self.room));
        limit.min(self.room)
    }
}

/// What each object needs, what there is room for, and what is left out.
#[derive(Debug)]
pub(super) struct Ledger<const N: usize> {
    room: Option<Rows<N>>,
    needs: BTreeMap<Name, Entry<N>>,
    total: Rows<N>,
    out: BTreeMap<Name, Lack>,
    changed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry<const N: usize> {
    /// Older ones are served first.
    age: Age,
    rows: Rows<N>,
}

impl<const N: usize> Default for Ledger<N> {
    fn default() -> Self {
        Self {
            room: None,
            needs: BTreeMap::new(),
            total: [0; N],
            out: BTreeMap::new(),
            changed: false,
        }
    }
}

impl<const N: usize> Ledger<N> {
    pub(super) fn set_room(&mut self, room: Rows<N>) {
        self.changed |= self.room.replace(room) != Some(room);
    }

    /// What an object needs now.
    pub(super) fn set(&mut self, name: &Name, age: &Age, rows: Rows<N>) {
        let is_gone = rows == [0; N];
        let entry = Entry {
            age: age.clone(),
            rows,
        };
        let former = if is_gone {
            self.out.remove(name);
            self.needs.remove(name)
        } else {
            self.needs.insert(name.clone(), entry)
        };
        let before = former.as_ref().map_or([0; N], |it| it.rows);
        self.changed |= before != rows || former.is_some_and(|it| it.age != *age);
        for ((total, before), now) in self.total.iter_mut().zip(before).zip(rows) {
            *total = *total + now - before;
        }
    }

    /// Why an object is left out, if it is.
    pub(super) fn lack(&self, name: &Name) -> Option<&Lack> {
        self.out.get(name)
    }

    pub(super) fn left_out(&self) -> impl Iterator<Item = (&Name, &Lack)> {
        self.out.iter()
    }

    /// Decides anew what is left out; the objects of which that has changed.
    ///
    /// # Cost
    /// A comparison as long as everything fits; otherwise a look at every object.
    pub(super) fn settle(&mut self) -> Vec<Name> {
        if !std::mem::take(&mut self.changed) {
            return Vec::new();
        }
        let Some(room) = self.room else {
            return Vec::new();
        };
        let fits = self.total.iter().zip(room).all(|(it, room)| *it <= room);
        let now = if fits {
            BTreeMap::new()
        } else {
            self.decide(room)
        };
        let former = std::mem::replace(&mut self.out, now);
        let gone = former.keys().filter(|it| !self.out.contains_key(*it));
        let new = self.out.keys().filter(|it| !former.contains_key(*it));
        gone.chain(new).cloned().collect()
    }

    fn decide(&self, room: Rows<N>) -> BTreeMap<Name, Lack> {
        let mut demands: [HashMap<Arc<str>, u64>; N] = std::array::from_fn(|_| HashMap::new());
        for (name, entry) in &self.needs {
            for (demands, rows) in demands.iter_mut().zip(entry.rows) {
                *demands.entry(name.namespace.clone()).or_default() += rows;
            }
        }
        let mut tables = room.into_iter().zip(demands);
        let tables: [Division; N] = std::array::from_fn(|_| {
            let (room, demands) = tables.next().unwrap_or_default();
            Division::new(room, demands)
        });
        let mut order: Vec<(&Name, &Entry<N>)> = self.needs.iter().collect();
        order.sort_by_key(|(name, entry)| (&entry.age, *name));
        let mut free = room;
        let mut used: HashMap<&str, Rows<N>> = HashMap::new();
        let mut out = BTreeMap::new();
        // Shares first: they always fit side by side.
        for (name, entry) in &order {
            let used = used.entry(&name.namespace).or_insert([0; N]);
            let over = (0..N).find(|table| {
                let share = tables.get(*table).map_or(0, |it| it.share(&name.namespace));
                at(used, *table) + at(&entry.rows, *table) > share
            });
            match over {
                None => {
                    add(used, &entry.rows);
                    take(&mut free, &entry.rows);
                }
                Some(table) => {
                    let lack = Lack {
                        table,
                        needs: at(&entry.rows, table),
                        room: at(&room, table),
                        share: tables.get(table).map_or(0, |it| it.limit(&name.namespace)),
                    };
                    out.insert((*name).clone(), lack);
                }
            }
        }
        // What is left over, to whoever was there first.
        for (name, entry) in order {
            if !out.contains_key(name) {
                continue;
            }
            if (0..N).all(|table| at(&entry.rows, table) <= at(&free, table)) {
                take(&mut free, &entry.rows);
                out.remove(name);
            }
        }
        out
    }
}

fn at<const N: usize>(rows: &Rows<N>, table: usize) -> u64 {
    rows.get(table).copied().unwrap_or_default()
}

fn add<const N: usize>(to: &mut Rows<N>, rows: &Rows<N>) {
    to.iter_mut().zip(rows).for_each(|(to, it)| *to += it);
}

fn take<const N: usize>(from: &mut Rows<N>, rows: &Rows<N>) {
    (from.iter_mut().zip(rows)).for_each(|(from, it)| *from = from.saturating_sub(*it));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn left_out(ledger: &Ledger<1>) -> Vec<String> {
        ledger.left_out().map(|(it, _)| it.to_string()).collect()
    }

    fn made(created: i64) -> Age {
        Age {
            created: Some(created),
            uid: None,
        }
    }

    fn ledger(room: u64) -> Ledger<1> {
        let mut ledger = Ledger::default();
        ledger.set_room([room]);
        ledger
    }

    #[test]
    fn who_stays_below_its_share_loses_nothing() {
        let mut it = ledger(100);
        it.set(&Name::new("a", "small"), &made(1), [10]);
        it.set(&Name::new("a", "huge"), &made(2), [10_000]);
        it.set(&Name::new("a", "late"), &made(3), [20]);
        it.set(&Name::new("b", "new"), &made(4), [50]);
        let mut moved = it.settle();
        moved.sort();
        assert_eq!(moved, [Name::new("a", "huge")]);
        assert_eq!(left_out(&it), ["a/huge"]);
        let lack = it.lack(&Name::new("a", "huge")).unwrap();
        assert_eq!((lack.needs, lack.room), (10_000, 100));
    }

    #[test]
    fn what_was_borrowed_is_given_back() {
        let mut it = ledger(100);
        for n in 0..10 {
            it.set(&Name::new("a", &n.to_string()), &made(n), [10]);
        }
        assert!(it.settle().is_empty());
        it.set(&Name::new("b", "x"), &made(100), [30]);
        let moved = it.settle();
        assert_eq!(
            moved,
            left_out(&it)
                .iter()
                .map(|it| Name::new("a", &it[2..]))
                .collect::<Vec<_>>()
        );
        assert_eq!(left_out(&it), ["a/7", "a/8", "a/9"], "the youngest");
        it.set(&Name::new("b", "x"), &made(100), [0]);
        assert_eq!(it.settle().len(), 3);
        assert!(left_out(&it).is_empty());
    }

    #[test]
    fn the_cluster_and_its_system_have_a_minimum() {
        let mut it = ledger(1600);
        for n in 0..200 {
            it.set(&Name::new(&format!("t{n}"), "x"), &made(0), [100]);
        }
        it.set(&Name::new("kube-system", "dns"), &made(1000), [200]);
        it.set(&Name::new("", "node"), &made(1000), [800]);
        it.settle();
        assert!(left_out(&it).iter().all(|it| it.starts_with('t')));
    }

    proptest! {
        /// Whatever a namespace asks for, the others have what they would have if it asked for its share alone, and all
        /// that is let in fits; in whatever order it came.
        #[test]
        fn shares_are_fair_fit_and_do_not_depend_on_order(
            objects in prop::collection::btree_map((0..5u8, 0..20u8), (0..9i64, 1..60u64), 1..60),
            room in 1..600u64,
        ) {
            let name = |(owner, n): &(u8, u8)| Name::new(&format!("n{owner}"), &n.to_string());
            let mut one = ledger(room);
            for (key, (since, rows)) in &objects {
                one.set(&name(key), &made(*since), [*rows]);
                one.settle();
            }
            let mut other = ledger(room);
            for (key, (since, rows)) in objects.iter().rev() {
                other.set(&name(key), &made(*since), [*rows]);
            }
            other.settle();
            prop_assert_eq!(left_out(&one), left_out(&other));
            let fitting = |it: &&(u8, u8)| one.lack(&name(it)).is_none();
            let used: u64 = objects.keys().filter(fitting).map(|it| objects[it].1).sum();
            prop_assert!(used <= room);
            let owners = objects.keys().map(|it| it.0).collect::<std::collections::BTreeSet<_>>();
            for owner in &owners {
                let own = || objects.keys().filter(|it| it.0 == *owner);
                let demand: u64 = own().map(|it| objects[it].1).sum();
                if demand <= room / owners.len() as u64 {
                    prop_assert!(own().all(|it| one.lack(&name(it)).is_none()));
                }
            }
        }
    }
}
