//! Policy: who has which identity, which policies hold for which link, and the rulesets that follow.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use sluice_contract::policy::{BindingRow, Direction, LAYERS, LayerId, RulesetId, RulesetRow};
use sluice_contract::{Identity, LinkId};

use super::identity::{Displaced, Group, Identities};
use super::rules::{Applied, RuleNames, names_nodes};
use super::ruleset::{Ground, Ruleset};
use super::selector::{SelectorId, Selectors};
use super::{Attached, hash};
use crate::diff::Tables;
use crate::object::{Labels, Name, NamedPort, Pod};
use crate::store::{Changes, Store};

/// Everything that is kept between two changes.
#[derive(Debug, Default)]
pub(crate) struct Engine {
    identities: Identities,
    selectors: Selectors,
    names: RuleNames,
    pods: HashMap<Name, View>,
    /// Pods that say that they have an address: one, as a rule.
    claims: BTreeMap<IpAddr, BTreeSet<Name>>,
    rulesets: BTreeMap<RulesetId, Entry>,
    ids: HashMap<Applied, RulesetId>,
    by_selector: HashMap<SelectorId, BTreeSet<RulesetId>>,
    by_network_policy: HashMap<Name, BTreeSet<RulesetId>>,
    by_cluster_policy: HashMap<Name, BTreeSet<RulesetId>>,
    bound: BTreeMap<LinkId, [RulesetId; 2]>,
}

/// What policy sees of a pod.
#[derive(Debug, PartialEq, Eq)]
struct View {
    identity: Identity,
    addresses: Vec<IpAddr>,
}

#[derive(Debug)]
struct Entry {
    applied: Applied,
    users: u32,
    ruleset: Ruleset,
}

/// Rulesets in which classes have to be looked at again.
type Affected = BTreeMap<RulesetId, BTreeSet<Identity>>;

impl Engine {
    pub(crate) fn new(displaced: impl IntoIterator<Item = Displaced>) -> Self {
        Self {
            identities: Identities::new(displaced),
            ..Self::default()
        }
    }

    pub(crate) fn identities(&self) -> &Identities {
        &self.identities
    }

    pub(crate) fn names(&self) -> &RuleNames {
        &self.names
    }

    pub(crate) fn identity_of_pod(&self, pod: &Name) -> Option<Identity> {
        self.pods.get(pod).map(|view| view.identity)
    }

    pub(crate) fn update(
        &mut self,
        store: &Store,
        links: &BTreeMap<LinkId, Attached>,
        changes: &Changes,
        touched: &[Name],
        tables: &mut Tables,
    ) {
        let local: HashMap<&Name, (LinkId, &Attached)> = links
            .iter()
            .map(|(link, it)| (&it.pod, (*link, it)))
            .collect();
        let pods: BTreeSet<&Name> = changes.pods.iter().chain(touched).collect();
        let mut affected = Affected::new();
        let mut addresses = BTreeSet::new();
        for pod in &pods {
            let attached = local.get(pod).map(|(_, it)| *it);
            self.update_pod(pod, store, attached, &mut addresses, &mut affected);
        }
        for address in &addresses {
            let identity = self.owner(*address, store, &local);
            tables.set_identity(*address, identity);
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
        for id in &stale {
            self.recompile(*id, store, tables);
        }
        self.update_classes(&affected, &stale, store, tables);
    }

    /// A pod has appeared, changed or gone.
    fn update_pod(
        &mut self,
        name: &Name,
        store: &Store,
        attached: Option<&Attached>,
        addresses: &mut BTreeSet<IpAddr>,
        affected: &mut Affected,
    ) {
        let now = see(name, store.pod(name), attached);
        let former = self.pods.remove(name);
        let view = now.map(|(group, addresses)| {
            let (identity, is_new) = self.identities.acquire(group);
            if is_new {
                self.reselect(identity, store, affected);
            }
            View {
                identity,
                addresses,
            }
        });
        if let Some(former) = &former
            && view.as_ref() == Some(former)
        {
            // Acquired once more than it is used.
            self.identities.release(former.identity);
        }
        if former == view {
            // What it claims may count for more or less now: it is being deleted, it was attached.
            addresses.extend(view.iter().flat_map(|it| &it.addresses));
            self.pods.extend(view.map(|it| (name.clone(), it)));
            return;
        }
        if let Some(former) = former {
            for address in &former.addresses {
                if let Some(claims) = self.claims.get_mut(address) {
                    claims.remove(name);
                    if claims.is_empty() {
                        self.claims.remove(address);
                    }
                }
                addresses.insert(*address);
            }
            if self.identities.release(former.identity) {
                self.reselect(former.identity, store, affected);
            }
        }
        if let Some(view) = view {
            for address in &view.addresses {
                self.claims
                    .entry(*address)
                    .or_default()
                    .insert(name.clone());
                addresses.insert(*address);
            }
            self.pods.insert(name.clone(), view);
        }
    }

    /// An identity is new or gone, or its namespace has other labels.
    fn reselect(&mut self, identity: Identity, store: &Store, affected: &mut Affected) {
        let labels = self
            .identities
            .group(identity)
            .map(|it| store.namespace_labels(&it.namespace));
        let group = self.identities.group(identity).zip(labels.as_deref());
        for selector in self.selectors.update(identity, group) {
            for ruleset in self.by_selector.get(&selector).into_iter().flatten() {
                affected.entry(*ruleset).or_default().insert(identity);
            }
        }
    }

    fn update_namespace(&mut self, namespace: &str, store: &Store, affected: &mut Affected) {
        let inside = self
            .identities
            .iter()
            .filter(|(_, it)| &*it.namespace == namespace);
        let inside: Vec<Identity> = inside.map(|(identity, _)| identity).collect();
        for identity in inside {
            self.reselect(identity, store, affected);
        }
    }

    /// Whose an address is: of several pods that claim it the one that is attached here, then one that is not being
    /// deleted, then the first by name.
    fn owner(
        &self,
        address: IpAddr,
        store: &Store,
        local: &HashMap<&Name, (LinkId, &Attached)>,
    ) -> Option<Identity> {
        let owner = self.claims.get(&address)?.iter().min_by_key(|name| {
            let attached = local
                .get(name)
                .is_some_and(|(_, it)| it.addresses.contains(&address));
            let terminating = store.pod(name).is_some_and(|it| it.terminating);
            (!attached, terminating)
        })?;
        self.identity_of_pod(owner)
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
        let mut stale: BTreeSet<RulesetId> = network.chain(cluster).flatten().copied().collect();
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
                continue;
            };
            let applied = known.entry(identity).or_insert_with(|| {
                let group = self.identities.group(identity);
                [Direction::Ingress, Direction::Egress]
                    .map(|direction| group.and_then(|it| Applied::find(store, it, direction)))
            });
            let now = applied.clone().map(|it| self.acquire(it, store, tables));
            tables.set_binding(
                *link,
                Some(BindingRow {
                    link: *link,
                    ingress: now[0],
                    egress: now[1],
                }),
            );
            for ruleset in self.bound.insert(*link, now).into_iter().flatten() {
                self.release(ruleset, store, tables);
            }
        }
    }

    fn acquire(
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
        while id == RulesetId::NONE || self.rulesets.contains_key(&id) {
            id = RulesetId(id.0.wrapping_add(4));
        }
        for (names, index) in [
            (&applied.network, &mut self.by_network_policy),
            (&applied.cluster, &mut self.by_cluster_policy),
        ] {
            for name in names {
                index.entry(name.clone()).or_default().insert(id);
            }
        }
        let ruleset = self.compile(id, &applied, store, tables);
        self.ids.insert(applied.clone(), id);
        let entry = Entry {
            applied,
            users: 1,
            ruleset,
        };
        publish(id, &entry.ruleset, tables);
        self.rulesets.insert(id, entry);
        id
    }

    fn release(&mut self, id: RulesetId, store: &Store, tables: &mut Tables) {
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
            retract(id, &entry.ruleset, tables);
            self.dissolve(id, entry.ruleset, store, tables);
        }
    }

    fn recompile(&mut self, id: RulesetId, store: &Store, tables: &mut Tables) {
        let Some(entry) = self.rulesets.get(&id) else {
            return;
        };
        let applied = entry.applied.clone();
        // The new one first: what both use is not given back in between.
        let ruleset = self.compile(id, &applied, store, tables);
        publish(id, &ruleset, tables);
        let former = self
            .rulesets
            .get_mut(&id)
            .map(|entry| std::mem::replace(&mut entry.ruleset, ruleset));
        if let Some(former) = former {
            self.dissolve(id, former, store, tables);
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
        store: &Store,
        tables: &mut Tables,
    ) -> Ruleset {
        let tiers = applied.tiers(store);
        let ruleset = self.ground(store, tables, |ground| {
            Ruleset::compile(id, applied, tiers, ground)
        });
        for selector in ruleset.selectors() {
            self.by_selector.entry(selector).or_default().insert(id);
        }
        ruleset
    }

    fn dissolve(&mut self, id: RulesetId, ruleset: Ruleset, store: &Store, tables: &mut Tables) {
        for selector in ruleset.selectors() {
            if let Some(rulesets) = self.by_selector.get_mut(&selector) {
                rulesets.remove(&id);
                if rulesets.is_empty() {
                    self.by_selector.remove(&selector);
                }
            }
        }
        self.ground(store, tables, |ground| ruleset.dissolve(ground));
    }

    fn ground<T>(
        &mut self,
        store: &Store,
        tables: &mut Tables,
        work: impl FnOnce(&mut Ground<'_>) -> T,
    ) -> T {
        let (addresses, spans) = tables.for_compiler();
        work(&mut Ground {
            identities: &self.identities,
            selectors: &mut self.selectors,
            spans,
            names: &mut self.names,
            addresses,
            namespace: &|namespace| store.namespace_labels(namespace),
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
            self.ground(store, tables, |ground| {
                for layer in &mut entry.ruleset.layers {
                    for identity in identities {
                        layer.update_class(*identity, ground);
                    }
                }
            });
            for layer in &entry.ruleset.layers {
                for identity in identities {
                    let span = layer.classes.get(identity).map(|(span, _)| *span);
                    tables.set_class(layer.row.id, *identity, span);
                }
            }
            publish_row(*id, &entry.ruleset, tables);
            self.rulesets.insert(*id, entry);
        }
    }
}

/// Group and addresses of a pod; `None`: policy does not see it.
fn see(
    name: &Name,
    pod: Option<&Pod>,
    attached: Option<&Attached>,
) -> Option<(Group, Vec<IpAddr>)> {
    match (pod, attached) {
        (Some(pod), Some(attached)) => Some((Group::of(pod), attached.addresses.clone())),
        (Some(pod), None) => {
            let has_own = !pod.host_network && !pod.ended && !pod.addresses.is_empty();
            has_own.then(|| (Group::of(pod), pod.addresses.clone()))
        }
        (None, Some(attached)) => {
            let ports: Arc<[NamedPort]> = Arc::from([]);
            let group = Group {
                namespace: name.namespace.clone(),
                labels: Arc::new(Labels::default()),
                ports,
            };
            Some((group, attached.addresses.clone()))
        }
        (None, None) => None,
    }
}

/// Puts a ruleset's rows in place of those it had.
fn publish(id: RulesetId, ruleset: &Ruleset, tables: &mut Tables) {
    for index in 0..LAYERS as u64 {
        let layer = LayerId(id.0 | index);
        let now = ruleset
            .layers
            .iter()
            .find(|it| it.row.id == layer)
            .map(|it| &it.classes);
        for identity in tables.classes_of(layer) {
            if now.is_none_or(|it| !it.contains_key(&identity)) {
                tables.set_class(layer, identity, None);
            }
        }
        for (identity, (span, _)) in now.into_iter().flatten() {
            tables.set_class(layer, *identity, Some(*span));
        }
    }
    publish_row(id, ruleset, tables);
}

fn publish_row(id: RulesetId, ruleset: &Ruleset, tables: &mut Tables) {
    let layers = ruleset.layers.iter().map(|layer| {
        let mut row = layer.row;
        row.classes = !layer.classes.is_empty();
        row
    });
    let row = RulesetRow {
        id,
        layers: layers.collect(),
    };
    tables.set_ruleset(id, Some(row));
}

fn retract(id: RulesetId, ruleset: &Ruleset, tables: &mut Tables) {
    tables.set_ruleset(id, None);
    for layer in &ruleset.layers {
        for identity in layer.classes.keys() {
            tables.set_class(layer.row.id, *identity, None);
        }
    }
}
