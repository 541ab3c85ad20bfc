//! Services and their endpoints as rows: addresses, frontends, ports, sets of backends, Maglev tables.
//!
//! Each Service is compiled on its own, so a change of one costs what that one has. What two Services may both claim (an
//! address, a frontend) goes to the first by name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use sluice_contract::service::{
    AddressRole, AddressRow, BackendRow, FrontendKind, FrontendRow, PortId, PortRow, ServiceKey,
    ServiceRow, SetId, SetRow, SlotsRow, SourceRow,
};
use sluice_contract::types::Family;
use sluice_contract::{Protocol, limits};

use super::endpoints::{Categories, Endpoints, Here, Made, Target, collect, endpoints_of_selector};
use super::numbers::Numbers;
use super::{Attached, Config, Maglev, maglev};
use crate::diff::Tables;
use crate::object::{
    AddressFamily, Affinity, Forwarding, Name, Service, ServicePort, TrafficPolicy,
};
use crate::store::{Changes, Store};

/// Backends of one set, at most: their index is 16 bits, and Maglev's largest table has 65521 slots.
const BACKENDS: usize = 65_521;

/// Everything that is kept between two changes.
#[derive(Debug, Default)]
pub(crate) struct Engine {
    /// Which rows come from which Service, or (by an empty namespace) node.
    owned: HashMap<Name, BTreeSet<ServiceKey>>,
    claims: BTreeMap<ServiceKey, BTreeMap<(u8, Name), ServiceRow>>,
    ports: Numbers<PortKey>,
    sets: Numbers<(PortKey, u8)>,
    /// For the health checks of load balancers.
    local_ready: BTreeMap<Name, usize>,
    /// Nodes that have endpoints for clients outside, of Services whose clients stay with a node's own.
    ready_on: BTreeMap<Name, BTreeSet<Arc<str>>>,
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

impl Engine {
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
        self.publish(&Name::new("", ""), rows, tables);
    }

    pub(crate) fn update(
        &mut self,
        ground: Ground<'_>,
        changes: &Changes,
        touched: &[Name],
        tables: &mut Tables,
    ) {
        for node in &changes.nodes {
            let name = Name {
                namespace: Arc::from(""),
                name: node.clone(),
            };
            let rows = node_rows(ground, node);
            self.publish(&name, rows, tables);
        }
        let mut services = changes.services.clone();
        if changes.nodes.iter().any(|it| **it == *ground.config.node) {
            // The node's zone decides about hints.
            services.extend(ground.store.services().map(|it| it.name.clone()));
        } else if ground.config.endpoints_from_selectors {
            let pods = changes.pods.iter().chain(touched);
            let namespaces: BTreeSet<&Arc<str>> = pods.map(|it| &it.namespace).collect();
            let concerned = ground
                .store
                .services()
                .filter(|it| namespaces.contains(&it.name.namespace));
            services.extend(
                concerned
                    .filter(|it| !it.selector.is_empty())
                    .map(|it| it.name.clone()),
            );
        }
        for name in services {
            let rows = match ground.store.services.get(&name) {
                Some(service) => self.compile(service, ground),
                None => Vec::new(),
            };
            if rows.is_empty() {
                self.ports.retain(|it| it.service != name);
                self.sets.retain(|(it, _)| it.service != name);
                self.local_ready.remove(&name);
                self.ready_on.remove(&name);
            }
            self.publish(&name, rows, tables);
        }
    }

    /// How many ready endpoints a Service has on this node.
    pub(crate) fn local_ready(&self, service: &Name) -> usize {
        self.local_ready.get(service).copied().unwrap_or_default()
    }

    /// Nodes that clients of a Service may be sent to whose traffic stays with a node's own endpoints.
    pub(crate) fn ready_on(&self, service: &Name) -> BTreeSet<Arc<str>> {
        self.ready_on.get(service).cloned().unwrap_or_default()
    }

    /// Puts the rows of an owner in place of those it had.
    fn publish(&mut self, owner: &Name, rows: Vec<ServiceRow>, tables: &mut Tables) {
        let former = self.owned.remove(owner).unwrap_or_default();
        let mut now = BTreeSet::new();
        for row in rows {
            let key = row.key();
            if now.insert(key) {
                self.put(owner, row, tables);
            }
        }
        for key in former.difference(&now) {
            self.take(owner, key, tables);
        }
        if !now.is_empty() {
            self.owned.insert(owner.clone(), now);
        }
    }

    fn put(&mut self, owner: &Name, row: ServiceRow, tables: &mut Tables) {
        let key = row.key();
        match rank(&row) {
            None => tables.set_service(key, Some(row)),
            Some(rank) => {
                let claims = self.claims.entry(key).or_default();
                // One owner has one claim, of whatever rank.
                claims.retain(|(_, it), _| it != owner);
                claims.insert((rank, owner.clone()), row);
                tables.set_service(key, claims.values().next().cloned());
            }
        }
    }

    fn take(&mut self, owner: &Name, key: &ServiceKey, tables: &mut Tables) {
        let Some(claims) = self.claims.get_mut(key) else {
            return tables.set_service(*key, None);
        };
        claims.retain(|(_, it), _| it != owner);
        tables.set_service(*key, claims.values().next().cloned());
        if claims.is_empty() {
            self.claims.remove(key);
        }
    }

    fn compile(&mut self, service: &Service, ground: Ground<'_>) -> Vec<ServiceRow> {
        let mut rows = Vec::new();
        let mut local_ready = BTreeSet::new();
        let mut ready_on: Option<BTreeSet<Arc<str>>> = None;
        let made = endpoints_of_selector(service, ground);
        for family in [AddressFamily::V4, AddressFamily::V6] {
            let is_v6 = family == AddressFamily::V6;
            let of_family = |it: &IpAddr| it.is_ipv6() == is_v6;
            if !service.cluster_ips.iter().any(of_family) {
                continue;
            }
            for port in &service.ports {
                let categories = categories(service, port, family, &made, ground);
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
        let frontends = frontends(service, port, v6, id);
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
    made: &[Made],
    ground: Ground<'_>,
) -> Categories {
    let mut endpoints = Endpoints::default();
    collect(service, port, family, ground.store, made, &mut endpoints);
    let zone = ground.store.node(&ground.config.node);
    let here = Here {
        node: &ground.config.node,
        zone: zone.and_then(|it| it.labels.get("topology.kubernetes.io/zone")),
    };
    endpoints.categorize(service, port, here)
}

/// The same for people, in each family that the Service has.
pub(crate) fn endpoints_of(
    service: &Service,
    port: &ServicePort,
    store: &Store,
    config: &Config,
    links: &[&Attached],
) -> Vec<Categories> {
    let ground = Ground {
        store,
        config,
        attached: &links.iter().map(|it| (&it.pod, *it)).collect(),
    };
    let made = endpoints_of_selector(service, ground);
    let families = [AddressFamily::V4, AddressFamily::V6];
    let served = families.into_iter().filter(|it| {
        let is_v6 = *it == AddressFamily::V6;
        service.cluster_ips.iter().any(|ip| ip.is_ipv6() == is_v6)
    });
    served
        .map(|family| categories(service, port, family, &made, ground))
        .collect()
}

/// Addresses and frontends may be claimed by several; the lowest rank wins. `None`: the row can only have one owner.
fn rank(row: &ServiceRow) -> Option<u8> {
    match row {
        ServiceRow::Address(row) => Some(match row.role {
            AddressRole::Node | AddressRole::NodeWithoutPorts => 0,
            AddressRole::Peer => 1,
            AddressRole::Cluster => 2,
            AddressRole::External => 3,
        }),
        ServiceRow::Frontend(_) => Some(0),
        _ => None,
    }
}

/// Flannel's annotations of nodes.
const FLANNEL: &str = "flannel.alpha.coreos.com/";

fn node_rows(ground: Ground<'_>, name: &str) -> Vec<ServiceRow> {
    let role = if *name == *ground.config.node {
        AddressRole::Node
    } else {
        AddressRole::Peer
    };
    let Some(node) = ground.store.node(name) else {
        return Vec::new();
    };
    let mut addresses: Vec<IpAddr> = node.addresses.iter().map(|it| it.address).collect();
    if role == AddressRole::Peer {
        // Flannel may reach it by another address than those of its status.
        let public = ["public-ip", "public-ipv6"].into_iter();
        let said = public.filter_map(|it| node.annotations.get(&format!("{FLANNEL}{it}")));
        for address in said.filter_map(|it| it.parse().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    let row = |address| ServiceRow::Address(AddressRow { address, role });
    addresses.into_iter().map(row).collect()
}

fn frontends(service: &Service, port: &ServicePort, v6: bool, id: PortId) -> Vec<FrontendRow> {
    let load_balancers = service.load_balancer.iter().filter(|it| !it.proxied);
    let addresses = (service
        .cluster_ips
        .iter()
        .map(|it| (*it, FrontendKind::ClusterIp)))
    .chain(
        service
            .external_ips
            .iter()
            .map(|it| (*it, FrontendKind::ExternalIp)),
    )
    .chain(load_balancers.map(|it| (it.address, FrontendKind::LoadBalancer)));
    let mut seen = BTreeSet::new();
    let mut frontends: Vec<FrontendRow> = addresses
        .filter(|(address, _)| address.is_ipv6() == v6 && seen.insert(*address))
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
