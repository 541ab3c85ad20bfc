//! The cluster as it is known now: every valid object once, and what has changed since somebody last looked.
//!
//! The store is a plain map: putting an object twice, or in another order, gives the same store.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use crate::finding::Finding;
use crate::object::{
    ClusterPolicy, EndpointSlice, Kind, Labels, Name, NamedPort, NetworkPolicy, Node, NodePolicy,
    Object, ObjectKey, Pod, Service,
};

/// What a source says.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Put(Object),
    Removed(ObjectKey),
    /// All objects of a kind. What is not among them is gone; what is among the refused stays as it was.
    Listed {
        kind: Kind,
        objects: Vec<Object>,
        refused: BTreeSet<Name>,
    },
    /// What is wrong in one place (a file, an object), in place of what was wrong there before.
    Findings {
        place: String,
        findings: Vec<Finding>,
    },
    /// Everything that there was at the beginning has been said, and the source is following.
    InSync,
    /// The source cannot follow at the moment; what is known stays in force.
    Lost {
        reason: String,
    },
}

/// Which objects differ from what they were when [`Store::take_changes`] was called last.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Changes {
    pub namespaces: BTreeSet<Arc<str>>,
    pub nodes: BTreeSet<Arc<str>>,
    pub pods: BTreeSet<Name>,
    /// Services that changed themselves or in their endpoints.
    pub services: BTreeSet<Name>,
    pub network_policies: BTreeSet<Name>,
    pub cluster_policies: BTreeSet<Name>,
    pub node_policies: BTreeSet<Name>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Objects of one kind. Whoever has a snapshot has the same ones, until one of them changes.
type Shared<K, V> = Arc<BTreeMap<K, V>>;

/// All objects.
#[derive(Debug, Default)]
pub struct Store {
    pub(crate) namespaces: Shared<Arc<str>, Arc<Labels>>,
    /// Of those that name one.
    address_pools: Shared<Arc<str>, Arc<str>>,
    /// With which DSCP packets of a namespace's pods go on, where it says.
    egress_dscps: Shared<Arc<str>, u8>,
    /// Policies that no source gave and none takes away.
    own_policies: Arc<BTreeSet<Name>>,
    pub(crate) nodes: Shared<Arc<str>, Node>,
    pub(crate) pods: Shared<Name, Pod>,
    pub(crate) services: Shared<Name, Service>,
    pub(crate) slices: Shared<Name, EndpointSlice>,
    /// Slices by service.
    pub(crate) slices_of: Shared<Name, BTreeSet<Name>>,
    pub(crate) network_policies: Shared<Name, NetworkPolicy>,
    pub(crate) cluster_policies: Shared<Name, ClusterPolicy>,
    pub(crate) node_policies: Shared<Name, NodePolicy>,
    findings: BTreeMap<String, Vec<Finding>>,
    changes: Changes,
    in_sync: bool,
    lost: Option<String>,
    labels: Interner<Labels>,
    ports: Interner<[NamedPort]>,
    text: Interner<str>,
}

impl Store {
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Put(object) => self.put(object),
            Event::Removed(key) => self.remove(&key),
            Event::Listed {
                kind,
                objects,
                refused,
            } => self.replace(kind, objects, &refused),
            Event::Findings { place, findings } => {
                if findings.is_empty() {
                    self.findings.remove(&place);
                } else {
                    self.findings.insert(place, findings);
                }
            }
            Event::InSync => {
                self.in_sync = true;
                self.lost = None;
            }
            Event::Lost { reason } => self.lost = Some(reason),
        }
    }

    /// The objects as they are now, for whoever wants to look at them for longer. Costs nothing but a copy of the kinds that
    /// change while it is looked at.
    #[must_use]
    pub fn snapshot(&self) -> Self {
        Self {
            namespaces: self.namespaces.clone(),
            address_pools: self.address_pools.clone(),
            egress_dscps: self.egress_dscps.clone(),
            own_policies: self.own_policies.clone(),
            nodes: self.nodes.clone(),
            pods: self.pods.clone(),
            services: self.services.clone(),
            slices: self.slices.clone(),
            slices_of: self.slices_of.clone(),
            network_policies: self.network_policies.clone(),
            cluster_policies: self.cluster_policies.clone(),
            node_policies: self.node_policies.clone(),
            in_sync: self.in_sync,
            lost: self.lost.clone(),
            ..Self::default()
        }
    }

    /// Whether the source has said everything once. Before that, absence of an object means nothing.
    pub fn is_in_sync(&self) -> bool {
        self.in_sync
    }

    /// Why the source does not follow at the moment.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// Everything that is wrong now.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.findings.values().flatten()
    }

    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Changes as if everything were new.
    pub(crate) fn everything(&self) -> Changes {
        Changes {
            namespaces: self.namespaces.keys().cloned().collect(),
            nodes: self.nodes.keys().cloned().collect(),
            pods: self.pods.keys().cloned().collect(),
            services: self.services.keys().cloned().collect(),
            network_policies: self.network_policies.keys().cloned().collect(),
            cluster_policies: self.cluster_policies.keys().cloned().collect(),
            node_policies: self.node_policies.keys().cloned().collect(),
        }
    }

    /// How many objects of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Namespace => self.namespaces.len(),
            Kind::Node => self.nodes.len(),
            Kind::Pod => self.pods.len(),
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::NetworkPolicy => self.network_policies.len(),
            Kind::ClusterNetworkPolicy => self.cluster_policies.len(),
            Kind::NodePolicy => self.node_policies.len(),
        }
    }

    pub fn pod(&self, name: &Name) -> Option<&Pod> {
        self.pods.get(name)
    }

    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// The pods of a namespace.
    pub fn pods_in(&self, namespace: &Arc<str>) -> impl Iterator<Item = &Pod> {
        let from = Name {
            namespace: namespace.clone(),
            name: Arc::from(""),
        };
        let of_namespace = self.pods.range(from..);
        of_namespace
            .take_while(move |(name, _)| name.namespace == *namespace)
            .map(|(_, pod)| pod)
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The labels of a node; one that nobody has described has none.
    pub(crate) fn node_labels(&self, name: &str) -> Arc<Labels> {
        let node = self.nodes.get(name);
        node.map(|it| it.labels.clone()).unwrap_or_default()
    }

    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    pub fn network_policies(&self) -> impl Iterator<Item = &NetworkPolicy> {
        self.network_policies.values()
    }

    /// The NetworkPolicies of a namespace.
    pub fn network_policies_in(
        &self,
        namespace: &Arc<str>,
    ) -> impl Iterator<Item = &NetworkPolicy> {
        let from = Name {
            namespace: namespace.clone(),
            name: Arc::from(""),
        };
        let of_namespace = self.network_policies.range(from..);
        of_namespace
            .take_while(move |(name, _)| name.namespace == *namespace)
            .map(|(_, policy)| policy)
    }

    pub fn cluster_policies(&self) -> impl Iterator<Item = &ClusterPolicy> {
        self.cluster_policies.values()
    }

    pub fn node_policies(&self) -> impl Iterator<Item = &NodePolicy> {
        self.node_policies.values()
    }

    /// The slices of a service.
    pub fn slices_of(&self, service: &Name) -> impl Iterator<Item = &EndpointSlice> {
        let names = self.slices_of.get(service).into_iter().flatten();
        names.filter_map(|name| self.slices.get(name))
    }

    /// The labels of a namespace. One that nobody has described still has its name.
    pub fn namespace_labels(&self, namespace: &str) -> Arc<Labels> {
        self.namespaces.get(namespace).cloned().unwrap_or_else(|| {
            let labels = Labels::default();
            labels.with("kubernetes.io/metadata.name", namespace).into()
        })
    }

    /// The pool that a pod's addresses come from: its own word, or its namespace's.
    pub fn address_pool(&self, pod: &Name) -> Option<Arc<str>> {
        let own = self.pods.get(pod).and_then(|pod| pod.address_pool.clone());
        own.or_else(|| self.address_pools.get(&pod.namespace).cloned())
    }

    /// The DSCP that a namespace gives to its pods' packets.
    pub fn namespace_dscp(&self, namespace: &str) -> Option<u8> {
        self.egress_dscps.get(namespace).copied()
    }

    /// Puts a policy of the node's own, which no source gives or takes away.
    pub(crate) fn put_own(&mut self, policy: ClusterPolicy) {
        Arc::make_mut(&mut self.own_policies).insert(policy.name.clone());
        self.put(Object::ClusterPolicy(policy));
    }

    fn put(&mut self, object: Object) {
        let name = object.name().clone();
        match object {
            Object::Namespace(it) => {
                let labels = self.labels.intern(it.labels);
                // Asked for with each new pod: no change that anything is compiled of.
                match it.address_pool {
                    Some(pool) => {
                        Arc::make_mut(&mut self.address_pools).insert(name.name.clone(), pool)
                    }
                    None => Arc::make_mut(&mut self.address_pools).remove(&name.name),
                };
                // The same holds of this.
                match it.egress_dscp {
                    Some(dscp) => {
                        Arc::make_mut(&mut self.egress_dscps).insert(name.name.clone(), dscp)
                    }
                    None => Arc::make_mut(&mut self.egress_dscps).remove(&name.name),
                };
                if self.namespaces.get(&name.name) != Some(&labels) {
                    self.changes.namespaces.insert(name.name.clone());
                    Arc::make_mut(&mut self.namespaces).insert(name.name, labels);
                }
            }
            Object::Node(it) => {
                if self.nodes.get(&name.name) != Some(&it) {
                    self.changes.nodes.insert(name.name.clone());
                    Arc::make_mut(&mut self.nodes).insert(name.name, it);
                }
            }
            Object::Pod(mut it) => {
                if self.pods.get(&name) != Some(&it) {
                    it.labels = self.labels.intern(it.labels);
                    it.ports = self.ports.intern(it.ports);
                    it.node = it.node.map(|node| self.text.intern(node));
                    it.name.namespace = self.text.intern(it.name.namespace);
                    self.changes.pods.insert(it.name.clone());
                    Arc::make_mut(&mut self.pods).insert(it.name.clone(), it);
                }
            }
            Object::Service(it) => {
                if self.services.get(&name) != Some(&it) {
                    self.changes.services.insert(name.clone());
                    Arc::make_mut(&mut self.services).insert(name, it);
                }
            }
            Object::EndpointSlice(it) => self.put_slice(name, it),
            Object::NetworkPolicy(it) => {
                if self.network_policies.get(&name) != Some(&it) {
                    self.changes.network_policies.insert(name.clone());
                    Arc::make_mut(&mut self.network_policies).insert(name, it);
                }
            }
            Object::ClusterPolicy(it) => {
                if self.cluster_policies.get(&name) != Some(&it) {
                    self.changes.cluster_policies.insert(name.clone());
                    Arc::make_mut(&mut self.cluster_policies).insert(name, it);
                }
            }
            Object::NodePolicy(it) => {
                if self.node_policies.get(&name) != Some(&it) {
                    self.changes.node_policies.insert(name.clone());
                    Arc::make_mut(&mut self.node_policies).insert(name, it);
                }
            }
        }
    }

    fn put_slice(&mut self, name: Name, mut slice: EndpointSlice) {
        if self.slices.get(&name) == Some(&slice) {
            return;
        }
        self.forget_slice(&name);
        for endpoint in &mut slice.endpoints {
            endpoint.node = endpoint.node.take().map(|it| self.text.intern(it));
            endpoint.zone = endpoint.zone.take().map(|it| self.text.intern(it));
            for hint in endpoint
                .zone_hints
                .iter_mut()
                .chain(&mut endpoint.node_hints)
            {
                *hint = self.text.intern(hint.clone());
            }
        }
        if let Some(service) = service_of(&slice) {
            Arc::make_mut(&mut self.slices_of)
                .entry(service.clone())
                .or_default()
                .insert(name.clone());
            self.changes.services.insert(service);
        }
        Arc::make_mut(&mut self.slices).insert(name, slice);
    }

    fn forget_slice(&mut self, name: &Name) {
        let Some(service) = Arc::make_mut(&mut self.slices)
            .remove(name)
            .as_ref()
            .and_then(service_of)
        else {
            return;
        };
        let slices_of = Arc::make_mut(&mut self.slices_of);
        if let Some(slices) = slices_of.get_mut(&service) {
            slices.remove(name);
            if slices.is_empty() {
                slices_of.remove(&service);
            }
        }
        self.changes.services.insert(service);
    }

    fn remove(&mut self, key: &ObjectKey) {
        let name = &key.name;
        match key.kind {
            Kind::Namespace => {
                Arc::make_mut(&mut self.address_pools).remove(&name.name);
                Arc::make_mut(&mut self.egress_dscps).remove(&name.name);
                if Arc::make_mut(&mut self.namespaces)
                    .remove(&name.name)
                    .is_some()
                {
                    self.changes.namespaces.insert(name.name.clone());
                }
            }
            Kind::Node => {
                if Arc::make_mut(&mut self.nodes).remove(&name.name).is_some() {
                    self.changes.nodes.insert(name.name.clone());
                }
            }
            Kind::Pod => {
                if Arc::make_mut(&mut self.pods).remove(name).is_some() {
                    self.changes.pods.insert(name.clone());
                }
            }
            Kind::Service => {
                if Arc::make_mut(&mut self.services).remove(name).is_some() {
                    self.changes.services.insert(name.clone());
                }
            }
            Kind::EndpointSlice => self.forget_slice(name),
            Kind::NetworkPolicy => {
                if Arc::make_mut(&mut self.network_policies)
                    .remove(name)
                    .is_some()
                {
                    self.changes.network_policies.insert(name.clone());
                }
            }
            Kind::ClusterNetworkPolicy => {
                if Arc::make_mut(&mut self.cluster_policies)
                    .remove(name)
                    .is_some()
                {
                    self.changes.cluster_policies.insert(name.clone());
                }
            }
            Kind::NodePolicy => {
                let gone = Arc::make_mut(&mut self.node_policies).remove(name);
                if gone.is_some() {
                    self.changes.node_policies.insert(name.clone());
                }
            }
        }
    }

    fn replace(&mut self, kind: Kind, objects: Vec<Object>, refused: &BTreeSet<Name>) {
        let kept: BTreeSet<&Name> = objects.iter().map(Object::name).chain(refused).collect();
        let gone: Vec<Name> = self
            .names(kind)
            .into_iter()
            .filter(|name| !kept.contains(name))
            .collect();
        for name in gone {
            self.remove(&ObjectKey { kind, name });
        }
        for object in objects {
            self.put(object);
        }
    }

    fn names(&self, kind: Kind) -> Vec<Name> {
        let wide = |name: &Arc<str>| Name {
            namespace: Arc::from(""),
            name: name.clone(),
        };
        match kind {
            Kind::Namespace => self.namespaces.keys().map(wide).collect(),
            Kind::Node => self.nodes.keys().map(wide).collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::NetworkPolicy => self.network_policies.keys().cloned().collect(),
            Kind::ClusterNetworkPolicy => {
                let given = self.cluster_policies.keys();
                let given = given.filter(|name| !self.own_policies.contains(name));
                given.cloned().collect()
            }
            Kind::NodePolicy => self.node_policies.keys().cloned().collect(),
        }
    }
}

pub(crate) fn service_of(slice: &EndpointSlice) -> Option<Name> {
    slice.service.as_ref().map(|service| Name {
        namespace: slice.name.namespace.clone(),
        name: service.clone(),
    })
}

/// Keeps one copy of what many objects share: most pods share their labels and ports with others.
#[derive(Debug)]
struct Interner<T: ?Sized> {
    known: HashSet<Arc<T>>,
    /// Clean up when it has grown to this.
    sweep_at: usize,
}

impl<T: ?Sized> Default for Interner<T> {
    fn default() -> Self {
        Self {
            known: HashSet::new(),
            sweep_at: 1024,
        }
    }
}

impl<T: ?Sized + Eq + Hash> Interner<T> {
    fn intern(&mut self, value: Arc<T>) -> Arc<T> {
        if let Some(known) = self.known.get(&value) {
            return known.clone();
        }
        if self.known.len() >= self.sweep_at {
            self.known.retain(|it| Arc::strong_count(it) > 1);
            self.sweep_at = (2 * self.known.len()).max(1024);
        }
        self.known.insert(value.clone());
        value
    }
}
