//! Policy: who has which identity, which policies hold for which link, and the rulesets that follow.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use sluice_contract::policy::{BindingRow, Direction, RulesetId};
use sluice_contract::{Identity, LinkId};

use super::identity::{Displaced, Identities};
use super::node::Subject;
use super::pod_room::PodRoom;
use super::pods::Pods;
use super::policy_room::Fit;
use super::policy_shares::Weight;
use super::publish::{publish, publish_row, retract};
use super::rules::{Applied, RuleNames, names_nodes};
use super::ruleset::{Ground, Ruleset};
use super::selector::{SelectorId, Selectors};
use super::{Attached, Config, hash};
use crate::diff::Tables;
use crate::object::Name;
use crate::store::{Changes, Store};

/// Everything that is kept between two changes.
#[derive(Debug)]
pub(crate) struct Engine {
    pods: Pods,
    selectors: Selectors,
    names: RuleNames,
    pub(super) rulesets: BTreeMap<RulesetId, Entry>,
    ids: HashMap<Applied, RulesetId>,
    by_selector: HashMap<SelectorId, BTreeSet<RulesetId>>,
    by_network_policy: HashMap<Name, BTreeSet<RulesetId>>,
    by_cluster_policy: HashMap<Name, BTreeSet<RulesetId>>,
    by_node_policy: HashMap<Name, BTreeSet<RulesetId>>,
    pub(super) bound: BTreeMap<LinkId, [RulesetId; 2]>,
    pub(super) node: Subject,
    pub(super) fit: Fit,
    pub(super) pod_room: PodRoom,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) applied: Applied,
    users: u32,
    pub(super) ruleset: Ruleset,
    /// It does not fit: what it consists of is kept aside, and the appliance has none of it.
    pub(super) is_aside: bool,
    pub(super) weight: Option<Weight>,
}

/// Rulesets in which classes have to be looked at again.
type Affected = BTreeMap<RulesetId, BTreeSet<Identity>>;

impl Engine {
    pub(crate) fn new(config: &Config, displaced: impl IntoIterator<Item = Displaced>) -> Self {
        Self {
            pods: Pods::new(config.undescribed, displaced),
            selectors: Selectors::default(),
            names: RuleNames::default(),
            rulesets: BTreeMap::new(),
            ids: HashMap::new(),
            by_selector: HashMap::new(),
            by_network_policy: HashMap::new(),
            by_cluster_policy: HashMap::new(),
            by_node_policy: HashMap::new(),
            bound: BTreeMap::new(),
            node: Subject::new(config),
            fit: Fit::default(),
            pod_room: PodRoom::default(),
        }
    }

    pub(crate) fn identities(&self) -> &Identities {
        self.pods.identities()
    }

    pub(crate) fn names(&self) -> &RuleNames {
        &self.names
    }

    /// A pod that has an address.
    pub(crate) fn pod_at(&self, address: IpAddr) -> Option<&Name> {
        self.pods.at(address)
    }

    pub(crate) fn identity_of_pod(&self, pod: &Name) -> Option<Identity> {
        self.pods.identity(pod)
    }

    /// Yields the addresses that pods have got or lost.
    pub(crate) fn update(
        &mut self,
        store: &Store,
        links: &BTreeMap<LinkId, Attached>,
        changes: &Changes,
        touched: &[Name],
        tables: &mut Tables,
    ) -> BTreeSet<IpAddr> {
        let local: HashMap<&Name, (LinkId, &Attached)> = links
            .iter()
            .map(|(link, it)| (&it.pod, (*link, it)))
            .collect();
        let mut pods: BTreeSet<&Name> = changes.pods.iter().chain(touched).collect();
        for pod in &pods {
            let attached = local.get(pod).map(|(_, it)| *it);
            let count = self.pods.addresses(pod, store.pod(pod), attached);
            self.pod_room.set(pod, attached.is_some(), count);
        }
        let moved = self.pod_room.settle();
        pods.extend(&moved);
        tables.leave_pods_out(self.pod_room.leaves_any_out());
        let mut affected = Affected::new();
        let mut addresses = BTreeSet::new();
        for pod in &pods {
            let attached = local.get(pod).map(|(_, it)| *it);
            let is_left_out = self.pod_room.is_left_out(pod);
            let touched = self.pods.update(pod, store.pod(pod), attached, is_left_out);
            addresses.extend(touched.addresses);
            for identity in touched.appeared.into_iter().chain(touched.gone) {
                self.reselect(identity, store, &mut affected);
            }
        }
        for address in &addresses {
            let is_attached = |it: &Name| {
                local
                    .get(it)
                    .is_some_and(|(_, it)| it.addresses.contains(address))
            };
            let owner = self.pods.owner(*address, store, is_attached);
            tables.set_identity(*address, owner);
        }
        for namespace in &changes.namespaces {
            self.update_namespace(namespace, store, &mut affected);
        }
        let policies = !changes.namespaces.is_empty()
            || !changes.network_policies.is_empty()
            || !changes.cluster_policies.is_empty();
        let stale = self.stale(store, changes, !addresses.is_empty());
        // First those that hold no more for anybody: they need not be compiled again.
        self.bind(store, links, |it| policies || pods.contains(it), tables);
        self.bind_node(store, changes, tables);
        for id in &stale {
            let is_aside = self.rulesets.get(id).is_some_and(|it| it.is_aside);
            self.recompile(*id, is_aside, store, tables);
        }
        self.update_classes(&affected, &stale, store, tables);
        self.make_room(store, links, tables);
        addresses
    }

    /// An identity is new or gone, or its namespace has other labels.
    fn reselect(&mut self, identity: Identity, store: &Store, affected: &mut Affected) {
        let labels = self
            .pods
            .identities()
            .group(identity)
            .map(|it| store.namespace_labels(&it.namespace));
        let group = self
            .pods
            .identities()
            .group(identity)
            .zip(labels.as_deref());
        for selector in self.selectors.update(identity, group) {
            for ruleset in self.by_selector.get(&selector).into_iter().flatten() {
                affected.entry(*ruleset).or_default().insert(identity);
            }
        }
    }

    fn update_namespace(&mut self, namespace: &str, store: &Store, affected: &mut Affected) {
        let inside = self
            .pods
            .identities()
            .iter()
            .filter(|(_, it)| &*it.namespace == namespace);
        let inside: Vec<Identity> = inside.map(|(identity, _)| identity).collect();
        for identity in inside {
            self.reselect(identity, store, affected);
        }
    }

    /// Rulesets that have to be compiled again.
    fn stale(&self, store: &Store, changes: &Changes, addresses: bool) -> BTreeSet<RulesetId> {
        let network = changes
            .network_policies
            .iter()
            .filter_map(|it| self.by_network_policy.get(it));
        let cluster = changes
            .cluster_policies
            .iter()
            .filter_map(|it| self.by_cluster_policy.get(it));
        let node = changes
            .node_policies
            .iter()
            .filter_map(|it| self.by_node_policy.get(it));
        let mut stale: BTreeSet<RulesetId> =
            (network.chain(cluster).chain(node).flatten().copied()).collect();
        if !changes.nodes.is_empty() {
            let with_nodes = store.cluster_policies().filter(|it| names_nodes(it));
            let with_nodes = with_nodes.filter_map(|it| self.by_cluster_policy.get(&it.name));
            stale.extend(with_nodes.flatten());
        }
        if addresses {
            let follows = self
                .rulesets
                .iter()
                .filter(|(_, it)| it.ruleset.follows_addresses);
            stale.extend(follows.map(|(id, _)| *id));
        }
        stale
    }

    /// Decides for links which rulesets hold.
    fn bind(
        &mut self,
        store: &Store,
        links: &BTreeMap<LinkId, Attached>,
        is_wanted: impl Fn(&Name) -> bool,
        tables: &mut Tables,
    ) {
        let gone: Vec<LinkId> = self
            .bound
            .keys()
            .filter(|it| !links.contains_key(it))
            .copied()
            .collect();
        for link in gone {
            tables.set_binding(link, None);
            for ruleset in self.bound.remove(&link).into_iter().flatten() {
                self.release(ruleset, store, tables);
            }
        }
        let mut known: HashMap<Identity, [Option<Applied>; 2]> = HashMap::new();
        for (link, attached) in links {
            if !is_wanted(&attached.pod) && self.bound.contains_key(link) {
                continue;
            }
            let Some(identity) = self.identity_of_pod(&attached.pod) else {
                // Nobody knows what it is: the guest denies what has no binding.
                tables.set_binding(*link, None);
                for ruleset in self.bound.remove(link).into_iter().flatten() {
                    self.release(ruleset, store, tables);
                }
                continue;
            };
            let applied = known.entry(identity).or_insert_with(|| {
                let group = self.pods.identities().group(identity);
                [Direction::Ingress, Direction::Egress]
                    .map(|direction| group.and_then(|it| Applied::find(store, it, direction)))
            });
            let now = applied.clone().map(|it| self.acquire(it, store, tables));
            tables.set_binding(
                *link,
                Some(BindingRow {
                    link: *link,
                    ingress: self.in_force(now[0]),
                    egress: self.in_force(now[1]),
                }),
            );
            for ruleset in self.bound.insert(*link, now).into_iter().flatten() {
                self.release(ruleset, store, tables);
            }
        }
    }

    pub(super) fn acquire(
        &mut self,
        applied: Option<Applied>,
        store: &Store,
        tables: &mut Tables,
    ) -> RulesetId {
        let Some(applied) = applied else {
            return RulesetId::NONE;
        };
        if let Some(id) = self.ids.get(&applied) {
            if let Some(entry) = self.rulesets.get_mut(id) {
                entry.users += 1;
            }
            return *id;
        }
        // The last two bits tell layers apart.
        let mut id = RulesetId(hash::of(&applied) & !0b11);
        while id == RulesetId::NONE || id == RulesetId::NO_ROOM || self.rulesets.contains_key(&id) {
            id = RulesetId(id.0.wrapping_add(4));
        }
        for (names, index) in [
            (&applied.network, &mut self.by_network_policy),
            (&applied.cluster, &mut self.by_cluster_policy),
            (&applied.node, &mut self.by_node_policy),
        ] {
            for name in names {
                index.entry(name.clone()).or_default().insert(id);
            }
        }
        let ruleset = self.compile(id, &applied, false, store, tables);
        self.ids.insert(applied.clone(), id);
        let entry = Entry {
            applied,
            users: 1,
            ruleset,
            is_aside: false,
            weight: None,
        };
        publish(id, &entry.ruleset, tables);
        self.rulesets.insert(id, entry);
        id
    }

    pub(super) fn release(&mut self, id: RulesetId, store: &Store, tables: &mut Tables) {
        let Some(entry) = self.rulesets.get_mut(&id) else {
            return;
        };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        if let Some(entry) = self.rulesets.remove(&id) {
            self.ids.remove(&entry.applied);
            for (names, index) in [
                (&entry.applied.network, &mut self.by_network_policy),
                (&entry.applied.cluster, &mut self.by_cluster_policy),
                (&entry.applied.node, &mut self.by_node_policy),
            ] {
                for name in names {
                    if let Some(rulesets) = index.get_mut(name) {
                        rulesets.remove(&id);
                        if rulesets.is_empty() {
                            index.remove(name);
                        }
                    }
                }
            }
            if !entry.is_aside {
                retract(id, &entry.ruleset, tables);
            }
            self.drop_substitute(id, store, tables);
            self.forget(id);
            self.dissolve(id, entry.ruleset, entry.is_aside, store, tables);
        }
    }

    /// Compiles a ruleset again, for the appliance or to be kept aside.
    pub(super) fn recompile(
        &mut self,
        id: RulesetId,
        is_aside: bool,
        store: &Store,
        tables: &mut Tables,
    ) {
        let Some(entry) = self.rulesets.get(&id) else {
            return;
        };
        let applied = entry.applied.clone();
        // The new one first: what both use is not given back in between.
        let ruleset = self.compile(id, &applied, is_aside, store, tables);
        if !is_aside {
            publish(id, &ruleset, tables);
        }
        let former = self.rulesets.get_mut(&id).map(|entry| {
            let was_aside = std::mem::replace(&mut entry.is_aside, is_aside);
            entry.weight = None;
            let former = std::mem::replace(&mut entry.ruleset, ruleset);
            (former, was_aside)
        });
        if let Some((former, was_aside)) = former {
            if is_aside && !was_aside {
                retract(id, &former, tables);
            }
            self.dissolve(id, former, was_aside, store, tables);
            // What the new one selects by was taken out with the former.
            if let Some(entry) = self.rulesets.get(&id) {
                for selector in entry.ruleset.selectors() {
                    self.by_selector.entry(selector).or_default().insert(id);
                }
            }
        }
    }

    fn compile(
        &mut self,
        id: RulesetId,
        applied: &Applied,
        is_aside: bool,
        store: &Store,
        tables: &mut Tables,
    ) -> Ruleset {
        let tiers = applied.tiers(store);
        let ruleset = self.ground(is_aside, store, tables, |ground| {
            Ruleset::compile(id, applied, tiers, ground)
        });
        for selector in ruleset.selectors() {
            self.by_selector.entry(selector).or_default().insert(id);
        }
        ruleset
    }

    fn dissolve(
        &mut self,
        id: RulesetId,
        ruleset: Ruleset,
        is_aside: bool,
        store: &Store,
        tables: &mut Tables,
    ) {
        for selector in ruleset.selectors() {
            if let Some(rulesets) = self.by_selector.get_mut(&selector) {
                rulesets.remove(&id);
                if rulesets.is_empty() {
                    self.by_selector.remove(&selector);
                }
            }
        }
        self.ground(is_aside, store, tables, |ground| ruleset.dissolve(ground));
    }

    /// Works with the spans that the appliance has, or with those that are kept aside.
    pub(super) fn ground<T>(
        &mut self,
        is_aside: bool,
        store: &Store,
        tables: &mut Tables,
        work: impl FnOnce(&mut Ground<'_>) -> T,
    ) -> T {
        let (addresses, in_force) = tables.for_compiler();
        let pieces = self.fit.pieces();
        let spans = if is_aside {
            &mut self.fit.aside
        } else {
            in_force
        };
        work(&mut Ground {
            identities: self.pods.identities(),
            selectors: &mut self.selectors,
            spans,
            names: &mut self.names,
            addresses,
            namespace: &|namespace| store.namespace_labels(namespace),
            pieces,
        })
    }

    fn update_classes(
        &mut self,
        affected: &Affected,
        stale: &BTreeSet<RulesetId>,
        store: &Store,
        tables: &mut Tables,
    ) {
        for (id, identities) in affected {
            if stale.contains(id) {
                continue;
            }
            let Some(mut entry) = self.rulesets.remove(id) else {
                continue;
            };
            entry.weight = None;
            self.ground(entry.is_aside, store, tables, |ground| {
                for layer in &mut entry.ruleset.layers {
                    for identity in identities {
                        layer.update_class(*identity, ground);
                    }
                }
            });
            let is_aside = entry.is_aside;
            for layer in (entry.ruleset.layers.iter()).filter(|_| !is_aside) {
                for identity in identities {
                    let span = layer.classes.get(identity).map(|(span, _)| *span);
                    tables.set_class(layer.row.id, *identity, span);
                }
            }
            if !is_aside {
                publish_row(*id, &entry.ruleset, tables);
            }
            self.rulesets.insert(*id, entry);
        }
    }
}
