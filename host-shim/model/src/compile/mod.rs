//! The store as tables. Everything here is a function of the objects and the links of this node: in which order they came
//! does not matter, and a change costs what depends on it.

mod claims;
mod complaints;
mod default_deny;
mod endpoints;
mod hash;
mod identity;
mod maglev;
mod matching;
mod node;
mod node_endpoints;
mod numbers;
mod ownership;
mod paint;
mod plan;
mod pod_room;
mod pods;
mod policy;
mod policy_left_out;
mod policy_room;
mod policy_shares;
mod publish;
mod ranges;
mod refusal;
mod resolvers;
mod route;
pub(crate) mod rules;
mod ruleset;
mod selector;
mod service;
mod service_room;
mod shares;
pub(crate) mod span;
mod survey;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use sluice_contract::message::Room;
use sluice_contract::policy::{Action, Established, RuleId, SettingsRow};
use sluice_contract::service::{ConnectionsRow, NatRow, PrefixRow, ServiceKey, ServiceRow};
use sluice_contract::{Identity, LinkId};

use crate::diff::Tables;
use crate::finding::{Finding, Severity};
use crate::object::rates::Rates;
use crate::object::{Forwarding, Name, Service, TrafficPolicy};
use crate::store::{Event, Store};

pub use default_deny::DefaultDeny;
pub use identity::{Displaced, Group, Identities};
pub use node::{FAILSAFE_EGRESS, FAILSAFE_INGRESS, HostPolicy, HostPolicyMode};
pub use plan::{AddressPlan, ServiceMatch};
pub use route::{Member, Members};
pub use rules::{RuleName, RuleNames, TierName};
pub(crate) use service::is_direct;
pub(crate) use survey::Survey;

/// What the node is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node's name.
    pub node: Arc<str>,
    /// The node reaches its own pods whatever policy says (probes of the kubelet).
    pub host_reaches_pods: bool,
    /// What becomes of connections that a change of policy would not let begin.
    pub established: Established,
    /// What rules deny passes, and is told.
    pub audit: bool,
    /// Whether NodePolicies hold for this node.
    pub host_policy: HostPolicy,
    /// Pods that no policy selects are denied everything but this.
    pub default_deny: Option<DefaultDeny>,
    /// Who is believed about the addresses of names, besides the cluster's DNS.
    pub resolvers: Vec<IpAddr>,
    /// Nobody makes EndpointSlices: pods that a Service selects are its endpoints.
    pub endpoints_from_selectors: bool,
    /// What becomes of pods of this node that no object describes.
    pub undescribed: Undescribed,
    /// Addresses of this node, besides those that its object names.
    pub node_addresses: Vec<IpAddr>,
    /// Addresses by which this node's own programs are at the host link.
    pub host_addresses: Vec<IpAddr>,
    /// Addresses of other nodes, besides those that objects name.
    pub peer_addresses: Vec<IpAddr>,
    /// Which addresses are whose, and which ones Services may have.
    pub addresses: AddressPlan,
    /// Which sets of backends are spread by Maglev.
    pub maglev: Maglev,
    /// How clients outside are led to endpoints on other nodes, where a Service does not say.
    pub forwarding: Forwarding,
    /// Why [`Forwarding::Dsr`] cannot be had on this node, if so.
    pub no_direct_return: Option<Arc<str>>,
    /// How the node translates; unless given, to its own addresses in the usual way.
    pub nat: Option<NatRow>,
    /// The ports that stand for pods in that usual way, first and last; the usual ones unless given.
    pub nat_ports: Option<(u16, u16)>,
    /// How it keeps connections.
    pub connections: Option<ConnectionsRow>,
    /// Ranges with a meaning: where pods and Services have their addresses, what keeps its source.
    pub prefixes: Vec<PrefixRow>,
}

/// What becomes of pods of this node that no object describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undescribed {
    /// They have no labels: nobody has to describe a pod.
    Unlabelled,
    /// They are what they were when they were last described; one that never was has no identity and is denied everything.
    AsBefore,
}

/// Which sets of backends are spread by Maglev, so that every node chooses the same backend. It costs about a hundred
/// slots a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maglev {
    Never,
    /// Those that are reached from outside the cluster.
    External,
    Always,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: Arc::from(""),
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
            host_policy: HostPolicy::default(),
            default_deny: None,
            resolvers: Vec::new(),
            endpoints_from_selectors: false,
            undescribed: Undescribed::Unlabelled,
            node_addresses: Vec::new(),
            host_addresses: Vec::new(),
            peer_addresses: Vec::new(),
            addresses: AddressPlan::default(),
            maglev: Maglev::External,
            forwarding: Forwarding::Snat,
            no_direct_return: None,
            nat: None,
            nat_ports: None,
            connections: None,
            prefixes: Vec::new(),
        }
    }
}

/// An address of a Service that clients outside send to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    pub address: IpAddr,
    pub service: Name,
    /// The nodes that have what it leads to, if not any has (`externalTrafficPolicy: Local`).
    pub on: Option<BTreeSet<Arc<str>>>,
}

/// A pod of this node, as the CNI plugin attached it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub pod: Name,
    pub addresses: Vec<IpAddr>,
}

/// What a model was compiled of at one moment. Whoever has it holds up nobody.
#[derive(Debug)]
pub struct Snapshot {
    pub store: Store,
    pub config: Config,
    /// The pods of this node.
    pub links: BTreeMap<LinkId, Attached>,
}

/// Policy of a store as it would be with just these links, beside whatever is in force.
#[derive(Debug)]
pub(crate) struct Rehearsal {
    pub(crate) tables: Tables,
    engine: policy::Engine,
}

impl Rehearsal {
    pub(crate) fn new(store: &Store, config: &Config, links: &BTreeMap<LinkId, Attached>) -> Self {
        let mut tables = Tables::default();
        tables.set_settings(settings(config));
        let mut engine = policy::Engine::new(config, []);
        engine.update(store, links, &store.everything(), &[], &mut tables);
        Self { tables, engine }
    }

    pub(crate) fn names(&self) -> &RuleNames {
        self.engine.names()
    }
}

fn settings(config: &Config) -> SettingsRow {
    SettingsRow {
        unbound: Action::Deny,
        host_reaches_pods: config.host_reaches_pods,
        established: config.established,
        audit: config.audit,
        audit_node: config.host_policy.mode == HostPolicyMode::Audit,
        unlisted_pods: false,
    }
}

/// The model of the cluster: objects in, rows out.
#[derive(Debug)]
pub struct Model {
    store: Store,
    links: BTreeMap<LinkId, Attached>,
    /// Links that came, changed or went since the last compilation.
    touched: Vec<Name>,
    config: Config,
    policy: policy::Engine,
    services: service::Engine,
    tables: Tables,
    nodes_changed: bool,
    /// The appliance's memory, for people.
    ram_mib: u32,
}

impl Model {
    /// `displaced`: what [`Identities::displaced`] said before the daemon ended.
    pub fn new(config: &Config, displaced: impl IntoIterator<Item = Displaced>) -> Self {
        let mut tables = Tables::default();
        tables.set_settings(settings(config));
        let rows = (config.connections.map(ServiceRow::Connections).into_iter())
            .chain(config.prefixes.iter().copied().map(ServiceRow::Prefix));
        for row in rows {
            tables.set_service(row.key(), Some(row));
        }
        let mut model = Self {
            store: Store::default(),
            links: BTreeMap::new(),
            touched: Vec::new(),
            config: config.clone(),
            policy: policy::Engine::new(config, displaced),
            services: service::Engine::new(config),
            tables,
            nodes_changed: true,
            ram_mib: 0,
        };
        if let Some(default) = &config.default_deny {
            model.store.put_own(default_deny::policy(default));
        }
        model.services.declare(config, &mut model.tables);
        model.translate();
        model
    }

    /// Takes what a source says.
    pub fn apply(&mut self, event: Event) {
        self.store.apply(event);
    }

    /// What the appliance has room for, and in how much memory. Rows are chosen so that they fit.
    pub fn set_room(&mut self, room: Room, ram_mib: u32) {
        self.ram_mib = ram_mib;
        self.policy.set_room(&room);
        self.services.set_room(&room);
    }

    /// Objects that are left out because they do not fit into the appliance, as of the last [`Self::compile`].
    pub fn left_out(&self) -> Vec<Finding> {
        let policies = self.policy.left_out(&self.store, &self.links);
        let all = policies.into_iter().chain(self.services.left_out());
        let ram = self.ram_mib;
        let finding = |(object, reason)| Finding {
            file: None,
            line: 0,
            severity: Severity::Error,
            object,
            field: String::new(),
            reason: format!(
                "{reason}. Make it smaller, or give the appliance more memory than its {ram} MiB (`memory_mib`)"
            ),
        };
        all.map(finding).collect()
    }

    /// A pod was attached to this link.
    pub fn attach(&mut self, link: LinkId, attached: Attached) {
        self.touched.push(attached.pod.clone());
        if let Some(former) = self.links.insert(link, attached) {
            self.touched.push(former.pod);
        }
    }

    /// The link is no more.
    pub fn detach(&mut self, link: LinkId) {
        self.touched
            .extend(self.links.remove(&link).map(|it| it.pod));
    }

    /// Brings the tables up to date with the store and the links.
    pub fn compile(&mut self) {
        let changes = self.store.take_changes();
        let touched = std::mem::take(&mut self.touched);
        let pod_addresses = self.policy.update(
            &self.store,
            &self.links,
            &changes,
            &touched,
            &mut self.tables,
        );
        let resolvers = if self.tables.has_names() {
            resolvers::all(&self.store, &self.config)
        } else {
            BTreeSet::new()
        };
        self.tables.set_resolvers(resolvers);
        let attached: HashMap<_, _> = self.links.values().map(|it| (&it.pod, it)).collect();
        let ground = service::Ground {
            store: &self.store,
            config: &self.config,
            attached: &attached,
        };
        let policy = &self.policy;
        let pods = service::PodAddresses {
            changed: &pod_addresses,
            pod_at: &|address| policy.pod_at(address).cloned(),
        };
        self.services
            .update(ground, &changes, &touched, pods, &mut self.tables);
        self.nodes_changed |= !changes.nodes.is_empty();
        if changes.nodes.contains(&self.config.node) {
            self.translate();
        }
    }

    /// Says to which addresses the node translates.
    fn translate(&mut self) {
        let nat = self.config.nat.clone().or_else(|| {
            let own = self.store.node(&self.config.node);
            let own = own.into_iter().flat_map(|it| &it.addresses);
            let inside = own.filter(|it| !it.external).map(|it| it.address);
            let all: Vec<IpAddr> = (self.config.node_addresses.iter().copied())
                .chain(inside)
                .collect();
            let node4 = all.iter().find_map(|it| match it {
                IpAddr::V4(v4) => Some(*v4),
                IpAddr::V6(_) => None,
            });
            let node6 = all.iter().find_map(|it| match it {
                IpAddr::V6(v6) => Some(*v6),
                IpAddr::V4(_) => None,
            });
            let usual = NatRow::default();
            let ports = self.config.nat_ports;
            let (first_port, last_port) = ports.unwrap_or((usual.first_port, usual.last_port));
            (!all.is_empty()).then_some(NatRow {
                node4,
                node6,
                first_port,
                last_port,
                ..usual
            })
        });
        self.tables
            .set_service(ServiceKey::Nat, nat.map(ServiceRow::Nat));
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// With which DSCP the packets of the pod behind a link go on, if its annotations or its namespace's say so.
    pub fn egress_dscp(&self, link: LinkId) -> Option<u8> {
        let pod = &self.links.get(&link)?.pod;
        let own = self.store.pod(pod).and_then(|it| it.egress_dscp);
        own.or_else(|| self.store.namespace_dscp(&pod.namespace))
    }

    /// How many packets and connections the pod behind a link may send and be sent, as its annotations say.
    pub fn rates(&self, link: LinkId) -> Rates {
        let pod = self.links.get(&link).map(|attached| &attached.pod);
        let pod = pod.and_then(|pod| self.store.pod(pod));
        pod.map_or_else(Rates::default, |pod| pod.rates)
    }

    /// What there is now, to be looked at for longer.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            store: self.store.snapshot(),
            config: self.config.clone(),
            links: self.links.clone(),
        }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The rows that should be in force, as of the last [`Self::compile`].
    pub fn tables(&mut self) -> &mut Tables {
        &mut self.tables
    }

    /// The pods of this node.
    pub fn links(&self) -> &BTreeMap<LinkId, Attached> {
        &self.links
    }

    /// What policy sees of the pod behind a link; belongs into its `LinkRow`.
    pub fn identity(&self, link: LinkId) -> Option<Identity> {
        self.policy.identity_of_pod(&self.links.get(&link)?.pod)
    }

    pub fn identities(&self) -> &Identities {
        self.policy.identities()
    }

    /// All nodes, if one of them has changed since this was asked last, and at the first time.
    pub fn take_members(&mut self) -> Option<Members> {
        let changed = std::mem::take(&mut self.nodes_changed);
        changed.then(|| route::members(&self.store, &self.config.node))
    }

    /// Node ports on which health checks are answered: the Service, and how many ready endpoints it has here.
    pub fn health_checks(&self) -> Vec<(u16, Name, usize)> {
        let checked = self
            .store
            .services()
            .filter_map(|it| Some((it.health_check_port?, it)));
        checked
            .map(|(port, it)| (port, it.name.clone(), self.services.local_ready(&it.name)))
            .collect()
    }

    /// Addresses, ports and endpoints that Services ask for and do not get, and why.
    pub fn findings(&self) -> Vec<Finding> {
        self.services.findings(&self.store)
    }

    /// The same of Services of which something was found since this was asked last.
    pub fn take_new_findings(&mut self) -> Vec<Finding> {
        self.services.take_new_findings()
    }

    /// This node is about to be removed.
    pub fn is_leaving(&self) -> bool {
        let own = self.store.node(&self.config.node);
        own.is_some_and(|node| node.leaving)
    }

    /// What clients outside may send to, besides node ports.
    pub fn served(&self) -> Vec<Served> {
        let owners = self.services.owners();
        let of = |it: &Service| {
            let is_local = it.external_policy == TrafficPolicy::Local;
            let on = is_local.then(|| self.services.ready_on(&it.name));
            let balanced = it.load_balancer.iter().map(|it| it.address);
            let all: BTreeSet<IpAddr> = it.external_ips.iter().copied().chain(balanced).collect();
            let name = it.name.clone();
            let own = all
                .into_iter()
                .filter(|at| owners.admits(&name, *at).is_ok());
            let own: Vec<IpAddr> = own.collect();
            own.into_iter().map(move |address| Served {
                address,
                service: name.clone(),
                on: on.clone(),
            })
        };
        let all = self.store.services();
        let served = all.filter(|it| self.services.ledger.lack(&it.name).is_none());
        served.flat_map(of).collect()
    }

    /// Which rule a number means.
    pub fn rule(&self, rule: RuleId) -> Option<&RuleName> {
        self.policy.names().get(rule)
    }
}
