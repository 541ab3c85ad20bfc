//! What becomes of all Services of a store, worked out at once: for people who ask, and for manifests that no node follows.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use sluice_contract::service::{FrontendRow, PortId, ServiceKey, ServiceRow};

use super::claims::{Claimant, Owner};
use super::endpoints::{Categories, endpoints_of_selector};
use super::node_endpoints::banned;
use super::ownership::Ownership;
use super::service::{Ground, categories_of, frontends};
use super::{Attached, Config, complaints};
use crate::finding::Finding;
use crate::object::{Name, Service, ServicePort};
use crate::store::Store;

/// Whose each address and port is.
pub(crate) struct Survey<'a> {
    store: &'a Store,
    config: &'a Config,
    attached: HashMap<&'a Name, &'a Attached>,
    owners: Ownership,
    /// Who comes first of those that claim a frontend.
    first: BTreeMap<ServiceKey, Claimant>,
}

impl<'a> Survey<'a> {
    pub(crate) fn new(store: &'a Store, config: &'a Config, links: &[&'a Attached]) -> Self {
        let owners = Ownership::of(store, config, links.iter().copied());
        let mut first: BTreeMap<ServiceKey, Claimant> = BTreeMap::new();
        for service in store.services() {
            let owner = Owner::of(service);
            for row in frontends_of(service, &owners) {
                let row = ServiceRow::Frontend(row);
                let Some(claimant) = owner.claimant(&row) else {
                    continue;
                };
                let there = first.entry(row.key()).or_insert_with(|| claimant.clone());
                if claimant < *there {
                    *there = claimant;
                }
            }
        }
        Self {
            store,
            config,
            attached: links.iter().map(|it| (&it.pod, *it)).collect(),
            owners,
            first,
        }
    }

    fn ground(&self) -> Ground<'_> {
        Ground {
            store: self.store,
            config: self.config,
            attached: &self.attached,
        }
    }

    /// Which endpoints of a port may be used from here, in each family that the Service has.
    pub(crate) fn endpoints(&self, service: &Service, port: &ServicePort) -> Vec<Categories> {
        categories_of(service, port, self.ground(), &self.owners)
    }

    pub(crate) fn is_used(&self, service: &Service, address: IpAddr) -> bool {
        self.owners.admits(&service.name, address).is_ok()
    }

    /// What a Service asks for and does not get.
    pub(crate) fn complaints(&self, service: &Service) -> Vec<Finding> {
        let ground = self.ground();
        let made = endpoints_of_selector(service, ground);
        let banned = banned(service, &made, ground, &self.owners).unwrap_or_default();
        let keys = frontends_of(service, &self.owners).into_iter();
        let lost = keys.filter_map(|row| {
            let key = ServiceRow::Frontend(row).key();
            let winner = self.first.get(&key)?.name();
            (*winner != service.name).then(|| (key, winner.clone()))
        });
        let lost: Vec<_> = lost.collect();
        complaints::of(service, &self.owners, &banned, &lost)
    }
}

fn frontends_of(service: &Service, owners: &Ownership) -> Vec<FrontendRow> {
    let has = |v6| service.cluster_ips.iter().any(|it| it.is_ipv6() == v6);
    let families = [false, true].into_iter().filter(|v6| has(*v6));
    let ports = families.flat_map(|v6| service.ports.iter().map(move |port| (v6, port)));
    let rows = ports.flat_map(|(v6, port)| frontends(service, port, v6, PortId(0), owners));
    rows.collect()
}
