//! Rows by owner. Addresses and frontends may be claimed by several owners: the one that comes first has the row.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sluice_contract::service::{AddressRole, FrontendKind, ServiceKey, ServiceRow};

use crate::diff::Tables;
use crate::object::{Age, Name, Service};

/// A Service, or (by an empty namespace) a node.
#[derive(Clone, Debug)]
pub(super) struct Owner {
    pub(super) name: Name,
    pub(super) age: Age,
}

/// Who claims a row, in the order in which claims count.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claimant {
    rank: u8,
    age: Age,
    name: Name,
}

impl Owner {
    pub(super) fn of(service: &Service) -> Self {
        Self {
            name: service.name.clone(),
            age: service.age.clone(),
        }
    }

    /// One that has no age.
    pub(super) fn named(name: Name) -> Self {
        let age = Age::default();
        Self { name, age }
    }

    /// As what it claims a row; `None`: the row can only have one owner.
    pub(super) fn claimant(&self, row: &ServiceRow) -> Option<Claimant> {
        Some(Claimant {
            rank: rank(row)?,
            age: self.age.clone(),
            name: self.name.clone(),
        })
    }
}

impl Claimant {
    pub(super) fn name(&self) -> &Name {
        &self.name
    }
}

/// All rows and whose they are.
#[derive(Debug, Default)]
pub(super) struct Claims {
    owned: HashMap<Name, BTreeSet<ServiceKey>>,
    /// Sorted; one each, as a rule.
    claims: BTreeMap<ServiceKey, Vec<(Claimant, ServiceRow)>>,
    /// Frontends that several Services claim.
    contested: BTreeSet<ServiceKey>,
}

impl Claims {
    /// Puts the rows of an owner in place of those it had.
    pub(super) fn publish(&mut self, owner: &Owner, rows: Vec<ServiceRow>, tables: &mut Tables) {
        let former = self.owned.remove(&owner.name).unwrap_or_default();
        let mut now = BTreeSet::new();
        for row in rows {
            let key = row.key();
            if now.insert(key) {
                self.put(owner, row, tables);
            }
        }
        for key in former.difference(&now) {
            self.take(&owner.name, key, tables);
        }
        if !now.is_empty() {
            self.owned.insert(owner.name.clone(), now);
        }
    }

    fn put(&mut self, owner: &Owner, row: ServiceRow, tables: &mut Tables) {
        let key = row.key();
        let Some(claimant) = owner.claimant(&row) else {
            return tables.set_service(key, Some(row));
        };
        let claims = (self.claims.entry(key)).or_insert_with(|| Vec::with_capacity(1));
        // One owner has one claim, of whatever rank.
        claims.retain(|(it, _)| it.name != owner.name);
        let place = claims.partition_point(|(it, _)| *it < claimant);
        claims.insert(place, (claimant, row));
        if claims.len() > 1 && matches!(key, ServiceKey::Frontend { .. }) {
            self.contested.insert(key);
        }
        tables.set_service(key, claims.first().map(|(_, row)| row.clone()));
    }

    fn take(&mut self, owner: &Name, key: &ServiceKey, tables: &mut Tables) {
        let Some(claims) = self.claims.get_mut(key) else {
            return tables.set_service(*key, None);
        };
        claims.retain(|(it, _)| it.name != *owner);
        tables.set_service(*key, claims.first().map(|(_, row)| row.clone()));
        if claims.len() < 2 {
            self.contested.remove(key);
        }
        if claims.is_empty() {
            self.claims.remove(key);
        }
    }

    /// Frontends that a Service claims and another one has, and which one.
    pub(super) fn lost(&self, service: &Name) -> Vec<(ServiceKey, Name)> {
        if self.contested.is_empty() {
            return Vec::new();
        }
        let owned = self.owned.get(service).into_iter().flatten();
        let contested = owned.filter(|key| self.contested.contains(key));
        let lost = contested.filter_map(|key| {
            let (first, _) = self.claims.get(key)?.first()?;
            (first.name != *service).then(|| (*key, first.name.clone()))
        });
        lost.collect()
    }

    /// Services that have lost a frontend to another one.
    pub(super) fn losers(&self) -> impl Iterator<Item = &Name> {
        let claims = self.contested.iter().filter_map(|key| self.claims.get(key));
        claims.flat_map(|it| it.iter().skip(1).map(|(claimant, _)| &claimant.name))
    }
}

/// The lowest rank wins. `None`: the row can only have one owner.
fn rank(row: &ServiceRow) -> Option<u8> {
    match row {
        ServiceRow::Address(row) => Some(match row.role {
            AddressRole::Node | AddressRole::NodeWithoutPorts => 0,
            AddressRole::Peer => 1,
            AddressRole::Cluster => 2,
            AddressRole::External => 3,
        }),
        ServiceRow::Frontend(row) => Some(match row.kind {
            FrontendKind::ClusterIp => 0,
            FrontendKind::LoadBalancer => 1,
            FrontendKind::ExternalIp => 2,
            FrontendKind::NodePort | FrontendKind::HostPort => 3,
        }),
        _ => None,
    }
}
