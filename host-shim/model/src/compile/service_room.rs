//! Services that do not fit into the appliance: each namespace has its share of every table, and what a namespace wants
//! beyond it is left out, by name.

use std::collections::BTreeSet;

use sluice_contract::message::Room;
use sluice_contract::service::ServiceRow;

use super::claims::Owner;
use super::service::{Engine, Ground, node_rows};
use super::shares::{Lack, Rows, of_objects};
use crate::diff::Tables;
use crate::object::{Age, Name};

/// Tables of Services.
pub(super) const TABLES: usize = 7;

/// What they hold.
const HELD: [&str; TABLES] = [
    "addresses",
    "addresses with ports",
    "ports",
    "sets of endpoints",
    "endpoints",
    "pieces of Maglev tables",
    "source ranges",
];

/// Older than any object.
pub(super) const FIRST: Age = Age {
    created: Some(i64::MIN),
    uid: None,
};

/// This node comes before the others.
pub(super) fn age_of_node(ground: Ground<'_>, node: &str) -> Age {
    if *node == *ground.config.node {
        FIRST
    } else {
        Age::default()
    }
}

fn room_of_services(room: &Room) -> Rows<TABLES> {
    [
        room.addresses,
        room.frontends,
        room.ports,
        room.sets,
        room.backends,
        room.chunks,
        room.sources,
    ]
    .map(of_objects)
}

fn count(rows: &[ServiceRow]) -> Rows<TABLES> {
    let mut addresses = BTreeSet::new();
    let [
        _,
        mut frontends,
        mut ports,
        mut sets,
        mut backends,
        mut chunks,
        mut sources,
    ] = [0; TABLES];
    for row in rows {
        match row {
            ServiceRow::Address(row) => drop(addresses.insert(row.address)),
            ServiceRow::Frontend(_) => frontends += 1,
            ServiceRow::Port(_) => ports += 1,
            ServiceRow::Set(_) => sets += 1,
            ServiceRow::Backend(_) => backends += 1,
            ServiceRow::Slots(_) => chunks += 1,
            ServiceRow::Source(_) => sources += 1,
            ServiceRow::Prefix(_) | ServiceRow::Nat(_) | ServiceRow::Connections(_) => {}
        }
    }
    let addresses = addresses.len() as u64;
    [addresses, frontends, ports, sets, backends, chunks, sources]
}

impl Engine {
    pub(super) fn set_room(&mut self, room: &Room) {
        self.ledger.set_room(room_of_services(room));
    }

    /// Publishes what an owner has, unless it does not fit.
    pub(super) fn offer(&mut self, owner: &Owner, rows: Vec<ServiceRow>, tables: &mut Tables) {
        self.ledger.set(&owner.name, &owner.age, count(&rows));
        let rows = match self.ledger.lack(&owner.name) {
            Some(_) => Vec::new(),
            None => rows,
        };
        self.claims.publish(owner, rows, tables);
    }

    /// Decides anew what fits.
    pub(super) fn make_room(&mut self, ground: Ground<'_>, tables: &mut Tables) {
        let moved = self.ledger.settle();
        let (out, back): (Vec<Name>, Vec<Name>) = moved
            .into_iter()
            .partition(|it| self.ledger.lack(it).is_some());
        for name in out {
            let owner = Owner::named(name);
            self.claims.publish(&owner, Vec::new(), tables);
        }
        for name in back {
            let (owner, rows) = match ground.store.services.get(&name) {
                _ if name.namespace.is_empty() && name.name.is_empty() => continue,
                _ if name.namespace.is_empty() => {
                    let rows = node_rows(ground, &name.name);
                    let age = age_of_node(ground, &name.name);
                    (Owner { name, age }, rows)
                }
                Some(service) => (Owner::of(service), self.compile(service, ground)),
                None => continue,
            };
            self.claims.publish(&owner, rows, tables);
        }
    }

    /// Objects that do not fit, and why.
    pub(super) fn left_out(&self) -> impl Iterator<Item = (String, String)> {
        self.ledger.left_out().map(|(name, lack)| {
            let object = if name.namespace.is_empty() {
                format!("Node {}", name.name)
            } else {
                format!("Service {name}")
            };
            let reason = format!("It is left out on this node: {}", sentence(name, lack));
            (object, reason)
        })
    }
}

fn sentence(name: &Name, lack: &Lack) -> String {
    let held = HELD.get(lack.table).copied().unwrap_or_default();
    let Lack {
        needs, room, share, ..
    } = lack;
    let owner = if name.namespace.is_empty() {
        "the nodes have".to_owned()
    } else {
        format!("namespace {} has", name.namespace)
    };
    format!(
        "it needs {needs} {held}, and {owner} {share} of the {room} that the appliance has room for"
    )
}
