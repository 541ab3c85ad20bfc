//! Who owns an address: which of the Services that claim it may use it, and why the others may not.
//!
//! What belongs to the cluster itself comes first: addresses of nodes and pods, and the ranges that both and ClusterIPs come
//! from. Then Services, by the kind of their claim (ClusterIP, load balancer's address, external address), then by age: the
//! name counts only where nothing says the age. The Service that comes first owns the address for its namespace: others of
//! the same namespace may use ports that it does not, those of other namespaces may not use any. So no object of a namespace
//! changes what becomes of packets to an address of another one.
//!
//! All of it is a function of the objects, the links and the configuration, whatever their order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::ranges::Ranges;
use super::refusal::{ClaimKind, Refusal};
use super::{Attached, Config};
use crate::object::{Age, Name, Node, Prefix, Service};
use crate::store::{Changes, Store};

/// A range of a Node object that is wider is no range of pods.
const WIDEST: u8 = 8;
/// Flannel's annotations of nodes.
const FLANNEL: &str = "flannel.alpha.coreos.com/";

/// A Service's claim of an address, in the order in which claims count.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim {
    kind: ClaimKind,
    age: Age,
    service: Name,
}

/// Who may use an address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    Nobody(Refusal),
    /// Everybody, port by port.
    Anybody,
    /// The Services of that one's namespace; of a ClusterIP that Service alone.
    First(ClaimKind, Name),
}

/// An address that Services claim.
#[derive(Debug)]
struct Claimed {
    /// Sorted; one, as a rule.
    claims: Vec<Claim>,
    decision: Option<Decision>,
}

/// What a Service claims, each address once.
#[derive(Debug, Default)]
struct Wanted {
    age: Age,
    addresses: Box<[(IpAddr, ClaimKind)]>,
}

impl Decision {
    /// Whose Services may use the address, if only those of one namespace may.
    fn namespace(&self) -> Option<&Arc<str>> {
        match self {
            Self::First(_, first) => Some(&first.namespace),
            Self::Nobody(_) | Self::Anybody => None,
        }
    }

    fn admits(&self, service: &Name) -> Result<(), Refusal> {
        match self {
            Self::Nobody(refusal) => Err(refusal.clone()),
            Self::Anybody => Ok(()),
            Self::First(kind, first) => {
                let shares = *kind != ClaimKind::ClusterIp && first.namespace == service.namespace;
                if shares || first == service {
                    Ok(())
                } else {
                    Err(Refusal::Service(*kind, first.clone()))
                }
            }
        }
    }
}

/// What of an address is known by a Node object.
#[derive(Debug, Default, PartialEq, Eq)]
struct Share {
    addresses: Vec<IpAddr>,
    ranges: Vec<Prefix>,
}

/// All claims and who owns what.
#[derive(Debug)]
pub(crate) struct Ownership {
    external: Ranges,
    services: Ranges,
    cluster: Ranges,
    pods: Ranges,
    /// In words whose they are.
    nodes: BTreeMap<IpAddr, BTreeSet<Arc<str>>>,
    of_node: HashMap<Arc<str>, Share>,
    claimed: BTreeMap<IpAddr, Claimed>,
    of_service: HashMap<Name, Wanted>,
    /// Services that may not use all their addresses.
    losing: BTreeSet<Name>,
}

/// What may have changed the owner of an address.
pub(crate) struct Change<'a> {
    pub(crate) store: &'a Store,
    pub(crate) changes: &'a Changes,
    /// Addresses that pods have got or lost.
    pub(crate) pod_addresses: &'a BTreeSet<IpAddr>,
    /// Which pod has an address.
    pub(crate) pod_at: &'a dyn Fn(IpAddr) -> Option<Name>,
}

/// What follows from a change.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Services that may use other addresses than before.
    pub(crate) services: BTreeSet<Name>,
    /// Addresses that have become a node's, or are no more.
    pub(crate) node_addresses: BTreeSet<IpAddr>,
}

impl Ownership {
    pub(crate) fn new(config: &Config) -> Self {
        let plan = &config.addresses;
        let mut owners = Self {
            external: Ranges::of(&plan.external),
            services: Ranges::of(&plan.services),
            cluster: Ranges::of(&plan.cluster),
            pods: Ranges::of(&plan.pods),
            nodes: BTreeMap::new(),
            of_node: HashMap::new(),
            claimed: BTreeMap::new(),
            of_service: HashMap::new(),
            losing: BTreeSet::new(),
        };
        let own: Arc<str> = format!("node {}", config.node).into();
        let local = (config.node_addresses.iter())
            .chain(&config.host_addresses)
            .chain(&plan.local);
        let peers = config.peer_addresses.iter();
        let peer: Arc<str> = "a node of uplink.peers".into();
        for (address, words) in local
            .map(|it| (it, &own))
            .chain(peers.map(|it| (it, &peer)))
        {
            (owners.nodes.entry(*address).or_default()).insert(words.clone());
        }
        owners
    }

    /// The same of a store that nothing is compiled of.
    pub(crate) fn of<'a>(
        store: &Store,
        config: &Config,
        links: impl Iterator<Item = &'a Attached>,
    ) -> Self {
        let mut pods: HashMap<IpAddr, &Name> = HashMap::new();
        let described = store.pods().filter(|it| !it.host_network && !it.ended);
        let described = described.map(|it| (&it.name, &it.addresses));
        for (name, addresses) in described.chain(links.map(|it| (&it.pod, &it.addresses))) {
            pods.extend(addresses.iter().map(|address| (*address, name)));
        }
        let mut owners = Self::new(config);
        owners.update(&Change {
            store,
            changes: &store.everything(),
            pod_addresses: &BTreeSet::new(),
            pod_at: &|address| pods.get(&address).map(|it| (*it).clone()),
        });
        owners
    }

    /// Brings everything up to date.
    pub(crate) fn update(&mut self, change: &Change<'_>) -> Moved {
        let mut moved = Moved::default();
        let mut suspects: BTreeSet<IpAddr> = BTreeSet::new();
        for name in &change.changes.nodes {
            self.node(name, change.store.node(name), &mut moved, &mut suspects);
        }
        let of_pods = change.pod_addresses.iter();
        suspects.extend(of_pods.filter(|it| self.claimed.contains_key(it)));
        for name in &change.changes.services {
            self.service(name, change.store.services.get(name), &mut suspects);
        }
        for address in suspects {
            self.decide(address, change.pod_at, &mut moved.services);
        }
        for name in moved.services.iter().chain(&change.changes.services) {
            let wanted = self.of_service.get(name).map(|it| it.addresses.iter());
            let mut wanted = wanted.into_iter().flatten();
            let loses = wanted.any(|(address, _)| self.admits(name, *address).is_err());
            if loses {
                self.losing.insert(name.clone());
            } else {
                self.losing.remove(name);
            }
        }
        moved
    }

    fn node(
        &mut self,
        name: &Arc<str>,
        node: Option<&Node>,
        moved: &mut Moved,
        suspects: &mut BTreeSet<IpAddr>,
    ) {
        let share = node.map(Share::of).unwrap_or_default();
        let former = self.of_node.remove(name).unwrap_or_default();
        if former == share {
            self.of_node.insert(name.clone(), share);
            return;
        }
        let words: Arc<str> = format!("node {name}").into();
        for address in &former.addresses {
            if let Some(nodes) = self.nodes.get_mut(address) {
                nodes.remove(&words);
                if nodes.is_empty() {
                    self.nodes.remove(address);
                }
            }
        }
        for address in &share.addresses {
            (self.nodes.entry(*address).or_default()).insert(words.clone());
        }
        let changed = former.addresses.iter().chain(&share.addresses);
        moved.node_addresses.extend(changed.copied());
        suspects.extend((moved.node_addresses.iter()).filter(|it| self.claimed.contains_key(it)));
        for range in &former.ranges {
            self.pods.remove(*range);
        }
        for range in &share.ranges {
            self.pods.add(*range);
        }
        for range in former.ranges.iter().chain(&share.ranges) {
            let inside = self.claimed.range(range.address()..=range.last());
            suspects.extend(inside.map(|(address, _)| *address));
        }
        if node.is_some() {
            self.of_node.insert(name.clone(), share);
        }
    }

    fn service(&mut self, name: &Name, service: Option<&Service>, suspects: &mut BTreeSet<IpAddr>) {
        let wanted = service.map(Wanted::of).unwrap_or_default();
        let former = self.of_service.remove(name).unwrap_or_default();
        for (address, kind) in &former.addresses {
            if let Some(claimed) = self.claimed.get_mut(address) {
                let claim = former.claim(*kind, name);
                claimed.claims.retain(|it| *it != claim);
                suspects.insert(*address);
            }
        }
        for (address, kind) in &wanted.addresses {
            let claimed = self.claimed.entry(*address).or_insert_with(|| Claimed {
                claims: Vec::with_capacity(1),
                decision: None,
            });
            let claim = wanted.claim(*kind, name);
            let place = claimed.claims.partition_point(|it| *it < claim);
            claimed.claims.insert(place, claim);
            suspects.insert(*address);
        }
        if !wanted.addresses.is_empty() {
            self.of_service.insert(name.clone(), wanted);
        }
    }

    /// Decides about an address again; `moved` gets the Services for which that means something else than before.
    fn decide(
        &mut self,
        address: IpAddr,
        pod_at: &dyn Fn(IpAddr) -> Option<Name>,
        moved: &mut BTreeSet<Name>,
    ) {
        let claims = self.claimed.get(&address).map(|it| &it.claims);
        let Some(first) = claims.and_then(|it| it.first()) else {
            self.claimed.remove(&address);
            return;
        };
        let decision = self.decision(address, first, pod_at);
        let Some(claimed) = self.claimed.get_mut(&address) else {
            return;
        };
        if claimed.decision.as_ref() == Some(&decision) {
            return;
        }
        let former = claimed.decision.replace(decision.clone());
        // Those of neither namespace have no part before and none after.
        let sides = || former.iter().chain([&decision]);
        let concerned: Vec<&Arc<str>> = sides().filter_map(Decision::namespace).collect();
        let all = sides().count() > concerned.len();
        let claims = claimed.claims.iter().map(|it| &it.service);
        let concerned = claims.filter(|it| all || concerned.contains(&&it.namespace));
        moved.extend(concerned.cloned());
    }

    fn decision(
        &self,
        address: IpAddr,
        first: &Claim,
        pod_at: &dyn Fn(IpAddr) -> Option<Name>,
    ) -> Decision {
        if let Some(node) = self.nodes.get(&address).and_then(|it| it.first()) {
            let listed = self.external.find(address);
            return match listed == Some(Prefix::host(address)) {
                true => Decision::Anybody,
                false => Decision::Nobody(Refusal::Node(node.clone())),
            };
        }
        let refusal = (pod_at(address).map(Refusal::Pod))
            .or_else(|| self.pods.find(address).map(Refusal::PodRange))
            .or_else(|| match first.kind {
                ClaimKind::ClusterIp => None,
                ClaimKind::LoadBalancer | ClaimKind::External => self.not_external(address),
            });
        let open = || Decision::First(first.kind, first.service.clone());
        refusal.map_or_else(open, Decision::Nobody)
    }

    /// Why an address that is no node's and no pod's may not come from outside.
    fn not_external(&self, address: IpAddr) -> Option<Refusal> {
        if let Some(range) = self.services.find(address) {
            return Some(Refusal::ServiceRange(range));
        }
        let listed = self.external.find(address);
        if listed.is_none() && !self.external.is_empty() {
            return Some(Refusal::NotListed);
        }
        // Routes to the cluster may be wider than what they are for: what is listed within one is meant.
        let cluster = self.cluster.find(address)?;
        let is_carved_out = listed.is_some_and(|listed| cluster.covers(&listed));
        (!is_carved_out).then_some(Refusal::ClusterRange(cluster))
    }

    /// Whether a Service may use an address that it claims.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn admits(&self, service: &Name, address: IpAddr) -> Result<(), Refusal> {
        let decision = self
            .claimed
            .get(&address)
            .and_then(|it| it.decision.as_ref());
        decision.map_or(Ok(()), |it| it.admits(service))
    }

    /// Whether an address is a node's.
    pub(crate) fn is_node(&self, address: IpAddr) -> bool {
        self.nodes.contains_key(&address)
    }

    /// The addresses that a Service claims and may not use, and why.
    pub(crate) fn refused(&self, service: &Name) -> Vec<(IpAddr, ClaimKind, Refusal)> {
        if !self.losing.contains(service) {
            return Vec::new();
        }
        let wanted = self.of_service.get(service).map(|it| it.addresses.iter());
        let refused = |(address, kind): &(IpAddr, ClaimKind)| {
            let refusal = self.admits(service, *address).err()?;
            Some((*address, *kind, refusal))
        };
        wanted.into_iter().flatten().filter_map(refused).collect()
    }

    /// Services that may not use all their addresses.
    pub(crate) fn losing(&self) -> impl Iterator<Item = &Name> {
        self.losing.iter()
    }
}

impl Share {
    fn of(node: &Node) -> Self {
        let ranges = node.pod_cidrs.iter().copied();
        Self {
            addresses: addresses_of(node, true),
            ranges: ranges.filter(|it| it.length() >= WIDEST).collect(),
        }
    }
}

/// A node's addresses; with those by which flannel reaches it, which its status need not have.
pub(super) fn addresses_of(node: &Node, with_flannel: bool) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = node.addresses.iter().map(|it| it.address).collect();
    if with_flannel {
        let public = ["public-ip", "public-ipv6"].into_iter();
        let said = public.filter_map(|it| node.annotations.get(&format!("{FLANNEL}{it}")));
        for address in said.filter_map(|it| it.parse().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    addresses
}

impl Wanted {
    /// The addresses of a Service, each by its best claim, in the families that it is served in.
    fn of(service: &Service) -> Self {
        let has_family = |address: &IpAddr| {
            let mut own = service.cluster_ips.iter();
            own.any(|it| it.is_ipv4() == address.is_ipv4())
        };
        let mut seen = BTreeSet::new();
        let addresses = addresses_and_kinds(service)
            .filter(|(address, _)| has_family(address) && seen.insert(*address));
        Self {
            addresses: addresses.collect(),
            age: service.age.clone(),
        }
    }

    fn claim(&self, kind: ClaimKind, service: &Name) -> Claim {
        Claim {
            kind,
            age: self.age.clone(),
            service: service.clone(),
        }
    }
}

/// The addresses of a Service, the best claims first.
fn addresses_and_kinds(service: &Service) -> impl Iterator<Item = (IpAddr, ClaimKind)> {
    let own = service.cluster_ips.iter();
    let balanced = service.load_balancer.iter().map(|it| it.address);
    let external = service.external_ips.iter();
    (own.map(|it| (*it, ClaimKind::ClusterIp)))
        .chain(balanced.map(|it| (it, ClaimKind::LoadBalancer)))
        .chain(external.map(|it| (*it, ClaimKind::External)))
}
