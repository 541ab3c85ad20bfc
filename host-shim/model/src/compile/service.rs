//! Services and their endpoints as rows: addresses, frontends, ports, sets of backends, Maglev tables.
//!
//! Each Service is compiled on its own, so a change of one costs what that one has. Which addresses are whose
//! [`Ownership`] says; what two Services may both claim besides (a port of one address, a node port) goes to the older one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use sluice_contract::service::{
    AddressRole, AddressRow, BackendRow, FrontendKind, FrontendRow, PortId, PortRow, ServiceRow,
    SetId, SetRow, SlotsRow, SourceRow,
};
use sluice_contract::types::Family;
use sluice_contract::{Protocol, limits};

use super::claims::{Claims, Owner};
use super::endpoints::{
    Categories, Endpoints, Here, ServiceEndpoints, Target, collect, endpoints_of_selector,
};
use super::node_endpoints::banned;
use super::numbers::Numbers;
use super::ownership::{Change, Ownership, addresses_of};
use super::service_room::{FIRST, TABLES, age_of_node};
use super::shares::Ledger;
use super::{Attached, Config, Maglev, complaints, maglev};
use crate::diff::Tables;
use crate::finding::Finding;
use crate::object::{
    AddressFamily, Affinity, Forwarding, Name, Service, ServicePort, TrafficPolicy,
};
use crate::store::{Changes, Store, service_of};

/// Backends of one set, at most: their index is 16 bits, and Maglev's largest table has 65521 slots.
const BACKENDS: usize = 65_521;

/// Everything that is kept between two changes.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(super) claims: Claims,
    owners: Ownership,
    /// Services with endpoints at nodes' addresses, and those that do not count.
    node_backed: BTreeMap<Name, BTreeSet<IpAddr>>,
    /// What was found of each Service, and what of it nobody has asked for yet.
    found: BTreeMap<Name, Vec<Finding>>,
    fresh: Vec<Finding>,
    ports: Numbers<PortKey>,
    sets: Numbers<(PortKey, u8)>,
    /// For the health checks of load balancers.
    local_ready: BTreeMap<Name, usize>,
    /// Nodes that have endpoints for clients outside, of Services whose clients stay with a node's own.
    ready_on: BTreeMap<Name, BTreeSet<Arc<str>>>,
    /// What the appliance has room for.
    pub(super) ledger: Ledger<TABLES>,
}

/// What a port's number stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct PortKey {
    service: Name,
    port: String,
    protocol: Protocol,
    v6: bool,
}

/// What the compiler reads.
#[derive(Clone, Copy)]
pub(crate) struct Ground<'a> {
    pub(crate) store: &'a Store,
    pub(crate) config: &'a Config,
    /// Addresses of the pods of this node.
    pub(crate) attached: &'a HashMap<&'a Name, &'a Attached>,
}

/// What is known of pods' addresses.
#[derive(Clone, Copy)]
pub(crate) struct PodAddresses<'a> {
    /// Those that pods have got or lost.
    pub(crate) changed: &'a BTreeSet<IpAddr>,
    pub(crate) pod_at: &'a dyn Fn(IpAddr) -> Option<Name>,
}

impl Engine {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            claims: Claims::default(),
            owners: Ownership::new(config),
            node_backed: BTreeMap::new(),
            found: BTreeMap::new(),
            fresh: Vec::new(),
            ports: Numbers::default(),
            sets: Numbers::default(),
            local_ready: BTreeMap::new(),
            ready_on: BTreeMap::new(),
            ledger: Ledger::default(),
        }
    }

    /// Addresses that are this node's or other nodes', whatever objects say.
    pub(crate) fn declare(&mut self, config: &Config, tables: &mut Tables) {
        let of = |addresses: &[IpAddr], role| -> Vec<ServiceRow> {
            let row = |address: &IpAddr| AddressRow {
                address: *address,
                role,
            };
            addresses.iter().map(row).map(ServiceRow::Address).collect()
        };
        let mut rows = of(&config.node_addresses, AddressRole::Node);
        rows.extend(of(&config.peer_addresses, AddressRole::Peer));
        // No object has this name.
        let name = Name::new("", "");
        self.offer(&Owner { name, age: FIRST }, rows, tables);
    }

    pub(crate) fn update(
        &mut self,
        ground: Ground<'_>,
        changes: &Changes,
        touched: &[Name],
        pods: PodAddresses<'_>,
        tables: &mut Tables,
    ) {
        for node in &changes.nodes {
            let name = Name {
                namespace: Arc::from(""),
                name: node.clone(),
            };
            let rows = node_rows(ground, node);
            let age = age_of_node(ground, node);
            self.offer(&Owner { name, age }, rows, tables);
        }
        let moved = self.owners.update(&Change {
            store: ground.store,
            changes,
            pod_addresses: pods.changed,
            pod_at: pods.pod_at,
        });
        let mut services = concerned(ground, changes, touched);
        services.extend(self.with_other_nodes(ground, changes, &moved.node_addresses));
        services.extend(moved.services);
        for name in &services {
            let service = ground.store.services.get(name);
            let rows = match service {
                Some(service) => self.compile(service, ground),
                None => Vec::new(),
            };
            if rows.is_empty() {
                self.ports.retain(|it| it.service != *name);
                self.sets.retain(|(it, _)| it.service != *name);
                self.local_ready.remove(name);
                self.ready_on.remove(name);
            }
            if service.is_none() {
                self.node_backed.remove(name);
            }
            let owner = service.map_or_else(|| Owner::named(name.clone()), Owner::of);
            self.offer(&owner, rows, tables);
        }
        self.make_room(ground, tables);
        for name in services {
            self.find(&name, ground.store);
        }
    }

    /// Services that may have other endpoints because of what is a node's address now, or of pods in the host's network.
    fn with_other_nodes(
        &self,
        ground: Ground<'_>,
        changes: &Changes,
        addresses: &BTreeSet<IpAddr>,
    ) -> Vec<Name> {
        let namespaces: BTreeSet<&Arc<str>> = changes.pods.iter().map(|it| &it.namespace).collect();
        let backed = self.node_backed.iter();
        let backed = backed.filter(|(name, _)| namespaces.contains(&name.namespace));
        let mut found: Vec<Name> = backed
            .filter(|(name, former)| {
                let service = ground.store.services.get(*name);
                let made = service.map(|it| endpoints_of_selector(it, ground));
                let made = made.unwrap_or_default();
                let now = service.and_then(|it| banned(it, &made, ground, &self.owners));
                now.as_ref() != Some(*former)
            })
            .map(|(name, _)| name.clone())
            .collect();
        if !addresses.is_empty() && ground.config.endpoints_from_selectors {
            let selecting = ground.store.services().filter(|it| !it.selector.is_empty());
            found.extend(selecting.map(|it| it.name.clone()));
        }
        if !addresses.is_empty() {
            let slices = ground.store.slices.values();
            let slices = slices.filter(|it| {
                let mut endpoints = it.endpoints.iter();
                endpoints.any(|endpoint| addresses.contains(&endpoint.address))
            });
            found.extend(slices.filter_map(service_of));
        }
        found
    }

    /// Notes what is wrong with a Service.
    fn find(&mut self, name: &Name, store: &Store) {
        let found = self.complaints(name, store);
        let former = self.found.remove(name).unwrap_or_default();
        let new = found.iter().filter(|it| !former.contains(it));
        self.fresh.extend(new.cloned());
        if !found.is_empty() {
            self.found.insert(name.clone(), found);
        }
    }

    fn complaints(&self, name: &Name, store: &Store) -> Vec<Finding> {
        let none = BTreeSet::new();
        let banned = self.node_backed.get(name).unwrap_or(&none);
        let lost = self.claims.lost(name);
        let service = store.services.get(name);
        service.map_or_else(Vec::new, |it| {
            complaints::of(it, &self.owners, banned, &lost)
        })
    }

    /// All that is wrong with Services now. The object that another one lost to may have changed since.
    pub(crate) fn findings(&self, store: &Store) -> Vec<Finding> {
        let losing = self.owners.losing().chain(self.claims.losers());
        let banned = self.node_backed.iter().filter(|(_, it)| !it.is_empty());
        let names: BTreeSet<&Name> = losing.chain(banned.map(|(name, _)| name)).collect();
        let found = names.into_iter().map(|name| self.complaints(name, store));
        found.flatten().collect()
    }

    pub(crate) fn take_new_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.fresh)
    }

    pub(crate) fn owners(&self) -> &Ownership {
        &self.owners
    }

    /// How many ready endpoints a Service has on this node.
    pub(crate) fn local_ready(&self, service: &Name) -> usize {
        if self.ledger.lack(service).is_some() {
            return 0;
        }
        self.local_ready.get(service).copied().unwrap_or_default()
    }

    /// Nodes that clients of a Service may be sent to whose traffic stays with a node's own endpoints.
    pub(crate) fn ready_on(&self, service: &Name) -> BTreeSet<Arc<str>> {
        self.ready_on.get(service).cloned().unwrap_or_default()
    }

    pub(super) fn compile(&mut self, service: &Service, ground: Ground<'_>) -> Vec<ServiceRow> {
        let mut rows = Vec::new();
        let mut local_ready = BTreeSet::new();
        let mut ready_on: Option<BTreeSet<Arc<str>>> = None;
        let made = endpoints_of_selector(service, ground);
        let banned = banned(service, &made, ground, &self.owners);
        match &banned {
            Some(banned) => self
                .node_backed
                .insert(service.name.clone(), banned.clone()),
            None => self.node_backed.remove(&service.name),
        };
        let endpoints = ServiceEndpoints {
            made,
            banned: banned.unwrap_or_default(),
        };
        for family in [AddressFamily::V4, AddressFamily::V6] {
            let is_v6 = family == AddressFamily::V6;
            let of_family = |it: &IpAddr| it.is_ipv6() == is_v6;
            if !service.cluster_ips.iter().any(of_family) {
                continue;
            }
            for port in &service.ports {
                let categories = categories(service, port, family, &endpoints, ground);
                local_ready.insert(categories.local_ready);
                // Who is sent to a node may want any of the ports.
                ready_on = Some(match ready_on {
                    Some(so_far) => so_far.intersection(&categories.ready_on).cloned().collect(),
                    None => categories.ready_on.clone(),
                });
                self.port(service, port, is_v6, &categories, ground.config, &mut rows);
            }
        }
        // The least of its ports: a Service is as healthy as that.
        let ready = local_ready.last().copied().unwrap_or_default();
        self.local_ready.insert(service.name.clone(), ready);
        match ready_on.filter(|it| !it.is_empty()) {
            Some(nodes) => self.ready_on.insert(service.name.clone(), nodes),
            None => self.ready_on.remove(&service.name),
        };
        rows
    }

    fn port(
        &mut self,
        service: &Service,
        port: &ServicePort,
        v6: bool,
        categories: &Categories,
        config: &Config,
        rows: &mut Vec<ServiceRow>,
    ) {
        let key = PortKey {
            service: service.name.clone(),
            port: port.name.clone(),
            protocol: port.protocol,
            v6,
        };
        let id = PortId(self.ports.number(&key));
        let family = if v6 { Family::V6 } else { Family::V4 };
        let frontends = frontends(service, port, v6, id, &self.owners);
        let is_external = frontends
            .iter()
            .any(|it| it.kind != FrontendKind::ClusterIp);
        let spread = match config.maglev {
            Maglev::Never => false,
            Maglev::External => is_external,
            Maglev::Always => true,
        };
        let mut sets: Vec<(&[Target], SetId)> = Vec::new();
        let mut chosen = [None; 3];
        let purposes = [
            (&categories.cluster, spread),
            (&categories.local, spread),
            (&categories.serving, false),
        ];
        for ((purpose, (targets, spread)), chosen) in (0u8..).zip(purposes).zip(&mut chosen) {
            let targets = targets
                .get(..BACKENDS.min(targets.len()))
                .unwrap_or_default();
            if targets.is_empty() {
                continue;
            }
            // Equal backends are one set, under the first purpose's number.
            if let Some((_, id)) = sets.iter().find(|(it, _)| *it == targets) {
                *chosen = Some(*id);
                continue;
            }
            let id = SetId(self.sets.number(&(key.clone(), purpose)));
            set_rows(id, family, targets, spread, rows);
            sets.push((targets, id));
            *chosen = Some(id);
        }
        let [cluster, local, serving] = chosen;
        let ranges = service
            .source_ranges
            .iter()
            .filter(|it| it.address().is_ipv6() == v6);
        let ranges: Vec<_> = ranges.collect();
        let lengths: BTreeSet<u8> = ranges.iter().map(|it| it.length()).collect();
        rows.push(ServiceRow::Port(PortRow {
            id,
            family,
            cluster,
            local,
            serving,
            endpoints: categories.any,
            internal_local: service.internal_policy == TrafficPolicy::Local,
            external_local: service.external_policy == TrafficPolicy::Local,
            direct_return: is_direct(service, config) == Ok(true),
            affinity: match service.affinity {
                Affinity::None => 0,
                Affinity::ClientIp(timeout) => u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX),
            },
            source_lengths: lengths.into_iter().take(limits::SOURCE_LENGTHS).collect(),
        }));
        for range in ranges {
            let prefix = sluice_contract::types::Prefix::new(range.address(), range.length());
            rows.extend(prefix.map(|prefix| ServiceRow::Source(SourceRow { port: id, prefix })));
        }
        for frontend in frontends {
            if !frontend.address.is_unspecified() {
                let role = match frontend.kind {
                    FrontendKind::ClusterIp => AddressRole::Cluster,
                    _ => AddressRole::External,
                };
                let address = frontend.address;
                rows.push(ServiceRow::Address(AddressRow { address, role }));
            }
            rows.push(ServiceRow::Frontend(frontend));
        }
    }
}

/// Whether clients outside are answered by the endpoint's node.
///
/// # Errors
/// Why not, though they should be.
pub(crate) fn is_direct<'c>(service: &Service, config: &'c Config) -> Result<bool, &'c str> {
    let asked = service.forwarding.unwrap_or(config.forwarding) == Forwarding::Dsr;
    match &config.no_direct_return {
        _ if !asked || service.external_policy == TrafficPolicy::Local => Ok(false),
        Some(reason) => Err(reason),
        None => Ok(true),
    }
}

/// Which endpoints of a port may be used from here.
fn categories(
    service: &Service,
    port: &ServicePort,
    family: AddressFamily,
    given: &ServiceEndpoints,
    ground: Ground<'_>,
) -> Categories {
    let mut endpoints = Endpoints::default();
    collect(service, port, family, ground.store, given, &mut endpoints);
    let zone = ground.store.node(&ground.config.node);
    let here = Here {
        node: &ground.config.node,
        zone: zone.and_then(|it| it.labels.get("topology.kubernetes.io/zone")),
    };
    endpoints.categorize(service, port, here)
}

/// The same for people, in each family that the Service has.
pub(crate) fn categories_of(
    service: &Service,
    port: &ServicePort,
    ground: Ground<'_>,
    owners: &Ownership,
) -> Vec<Categories> {
    let made = endpoints_of_selector(service, ground);
    let banned = banned(service, &made, ground, owners).unwrap_or_default();
    let endpoints = ServiceEndpoints { made, banned };
    let families = [AddressFamily::V4, AddressFamily::V6];
    let served = families.into_iter().filter(|it| {
        let is_v6 = *it == AddressFamily::V6;
        service.cluster_ips.iter().any(|ip| ip.is_ipv6() == is_v6)
    });
    served
        .map(|family| categories(service, port, family, &endpoints, ground))
        .collect()
}

/// Services that have changed themselves or in their endpoints.
fn concerned(ground: Ground<'_>, changes: &Changes, touched: &[Name]) -> BTreeSet<Name> {
    let mut services = changes.services.clone();
    let all = || ground.store.services();
    if changes.nodes.iter().any(|it| **it == *ground.config.node) {
        // The node's zone decides about hints.
        services.extend(all().map(|it| it.name.clone()));
    } else if ground.config.endpoints_from_selectors {
        let pods = changes.pods.iter().chain(touched);
        let namespaces: BTreeSet<&Arc<str>> = pods.map(|it| &it.namespace).collect();
        let selecting = all().filter(|it| namespaces.contains(&it.name.namespace));
        let selecting = selecting.filter(|it| !it.selector.is_empty());
        services.extend(selecting.map(|it| it.name.clone()));
    }
    services
}

pub(super) fn node_rows(ground: Ground<'_>, name: &str) -> Vec<ServiceRow> {
    let role = if *name == *ground.config.node {
        AddressRole::Node
    } else {
        AddressRole::Peer
    };
    let Some(node) = ground.store.node(name) else {
        return Vec::new();
    };
    // Flannel may reach another node by another address than those of its status.
    let addresses = addresses_of(node, role == AddressRole::Peer);
    let row = |address| ServiceRow::Address(AddressRow { address, role });
    addresses.into_iter().map(row).collect()
}

pub(super) fn frontends(
    service: &Service,
    port: &ServicePort,
    v6: bool,
    id: PortId,
    owners: &Ownership,
) -> Vec<FrontendRow> {
    let own = service.cluster_ips.iter();
    let balanced = service.load_balancer.iter().filter(|it| !it.proxied);
    let external = service.external_ips.iter();
    let addresses = (own.map(|it| (*it, FrontendKind::ClusterIp)))
        .chain(balanced.map(|it| (it.address, FrontendKind::LoadBalancer)))
        .chain(external.map(|it| (*it, FrontendKind::ExternalIp)));
    let is_own = |address: IpAddr| owners.admits(&service.name, address).is_ok();
    let mut seen = BTreeSet::new();
    let mut frontends: Vec<FrontendRow> = addresses
        .filter(|(address, _)| address.is_ipv6() == v6 && seen.insert(*address))
        .filter(|(address, _)| is_own(*address))
        .map(|(address, kind)| FrontendRow {
            address,
            protocol: port.protocol,
            port: port.port,
            service: id,
            kind,
        })
        .collect();
    let any = if v6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    frontends.extend(port.node_port.map(|node_port| FrontendRow {
        address: any,
        protocol: port.protocol,
        port: node_port,
        service: id,
        kind: FrontendKind::NodePort,
    }));
    frontends
}

fn set_rows(
    id: SetId,
    family: Family,
    targets: &[Target],
    spread: bool,
    rows: &mut Vec<ServiceRow>,
) {
    let slots = if spread {
        maglev::size(targets.len())
    } else {
        0
    };
    rows.push(ServiceRow::Set(SetRow {
        id,
        family,
        count: u16::try_from(targets.len()).unwrap_or(u16::MAX),
        slots,
    }));
    for (index, (address, port)) in (0u16..).zip(targets) {
        rows.push(ServiceRow::Backend(BackendRow {
            set: id,
            index,
            address: *address,
            port: *port,
        }));
    }
    if spread {
        let table = maglev::table(targets, slots);
        for (chunk, slots) in (0u16..).zip(table.chunks(limits::SLOT_CHUNK)) {
            rows.push(ServiceRow::Slots(SlotsRow {
                set: id,
                chunk,
                slots: slots.iter().copied().collect(),
            }));
        }
    }
}
