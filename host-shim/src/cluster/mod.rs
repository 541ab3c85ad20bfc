//! The cluster as this node follows it: objects from a source into the model, the model's rows into the control channel.
//!
//! Before the source has said everything once, the appliance is told nothing: one that runs goes on with the tables it has,
//! a new one carries no frame. A link and what policy says of it are one change, so no frame passes in between.

mod audit;
pub mod config;
mod health;
mod plan;
pub mod report;
mod room;
pub mod tenants;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sluice_contract::row::{LinkRow, MarkingRow, RatesRow};
use sluice_contract::{Key, LinkId, Row, Tenant};
use sluice_model::compile::{
    Attached, Config as ModelConfig, DefaultDeny, Displaced, HostPolicy, Members, Model, Served,
    Undescribed,
};
use sluice_model::diff::Step;
use sluice_model::finding::Finding;
use sluice_model::object::Name;
use sluice_model::source::announce::Announcer;
use sluice_model::source::dir::Directory;
use sluice_model::source::{Running, Source};
use sluice_model::store::Event;

use self::config::{PolicyMode, ServicesConfig, SourceConfig};
use self::health::Health;
use self::tenants::{RatesConfig, Tenants};
use crate::config::Config;
use crate::control::Control;
use crate::files;
use crate::hostlink::policy::Mode;
use crate::uplink::config::PeerConfig;

/// Events that are taken together, at most.
const BATCH: usize = 4096;
/// Findings of one change that are logged; the status has all.
const LOGGED: usize = 20;

/// The cluster, followed.
#[derive(Debug)]
pub struct Cluster {
    shared: Arc<Shared>,
    running: Mutex<Option<Running>>,
    announcer: Option<Announcer>,
    /// Held by whoever is being answered.
    asking: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    /// `directory` or `kubernetes`, and which one.
    mode: &'static str,
    place: String,
    state: Mutex<State>,
    changed: Condvar,
    control: Control,
    health: Health,
    identities: PathBuf,
}

struct State {
    model: Model,
    links: BTreeMap<LinkId, Told>,
    tenants: Tenants,
    /// Limits of pods that say nothing of them.
    rates: RatesConfig,
    /// The source has said everything once, and the control channel has it.
    is_known: bool,
    findings: BTreeSet<Finding>,
    displaced: Vec<Displaced>,
    nodes: Nodes,
    /// Who wants to know what clients outside may send to.
    served: Option<ServedListener>,
    heard: Option<Instant>,
    compiled: Duration,
}

/// A link and whether the appliance is to have it: only with an identity.
#[derive(Debug)]
struct Told {
    row: LinkRow,
    is_told: bool,
    /// The DSCP that the appliance gives to what comes from it.
    dscp: Option<u8>,
    /// How many packets and connections it may carry.
    rates: Option<RatesRow>,
}

/// All nodes, once they are known, and who wants to know of them.
#[derive(Default)]
struct Nodes {
    present: Option<Arc<Members>>,
    listener: Option<Listener>,
}

/// Told of addresses that clients outside may send to, whenever one may have changed. It must not wait for anything.
pub type ServedListener = Box<dyn FnMut(Vec<Served>) + Send>;

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut state = f.debug_struct("State");
        state
            .field("model", &self.model)
            .field("links", &self.links);
        state
            .field("is_known", &self.is_known)
            .finish_non_exhaustive()
    }
}

/// Told of all nodes whenever one changes. It must not wait for anything.
pub type Listener = Box<dyn FnMut(&Arc<Members>) + Send>;

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.present).finish()
    }
}

/// A change that is not in force for longer is no mere work in progress.
const PATIENCE: Duration = Duration::from_secs(10);

impl Cluster {
    /// Follows the source of the configuration, if it has one; `control` is held until everything is known.
    ///
    /// # Errors
    /// What the source needs of this machine is not to be had.
    pub fn start(config: &Config, control: &Control) -> io::Result<Option<Self>> {
        let Some(source) = &config.source else {
            return Ok(None);
        };
        let identities = config.run_dir.join("identities.json");
        let displaced = read_displaced(&identities);
        let model = Model::new(&model_config(config, source), displaced.clone());
        let (mode, place) = match (&source.directory, &source.kubernetes) {
            (Some(path), _) => ("directory", path.display().to_string()),
            (None, Some(kubernetes)) => {
                let file = kubernetes.kubeconfig.as_ref();
                let place = file.map_or_else(String::new, |path| path.display().to_string());
                ("kubernetes", place)
            }
            (None, None) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let asked = control.clone();
        let health = Health::start(config.health_port, move || !asked.is_late(PATIENCE))?;
        control.hold();
        let shared = Arc::new(Shared {
            mode,
            place,
            state: Mutex::new(State {
                model,
                links: BTreeMap::new(),
                tenants: Tenants::default(),
                rates: config.pod_rates,
                is_known: false,
                findings: BTreeSet::new(),
                displaced,
                nodes: Nodes::default(),
                served: None,
                heard: None,
                compiled: Duration::ZERO,
            }),
            changed: Condvar::new(),
            control: control.clone(),
            health,
            identities,
        });
        let (sender, events) = channel();
        let mut announcer = None;
        let running = match (&source.directory, &source.kubernetes) {
            (Some(path), _) => Directory::new(path).start(sender)?,
            (None, Some(kubernetes)) => {
                let mut api = kubernetes.api();
                if kubernetes.announce {
                    let (announcing, by) = api.announcing(&config.node_name);
                    (api, announcer) = (announcing, Some(by));
                }
                api.start(sender)?
            }
            (None, None) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let audited = [
            (config.policy.mode == PolicyMode::Audit, "policy"),
            (config.host_policy.mode == Mode::Audit, "the node's policy"),
        ];
        for (_, what) in audited.iter().filter(|(is_audited, _)| *is_audited) {
            tracing::warn!("{what} is audited: what it denies passes, and is logged");
        }
        if audited.iter().any(|(is_audited, _)| *is_audited) {
            audit::listen(&shared)?;
        }
        room::listen(&shared)?;
        let follower = shared.clone();
        std::thread::Builder::new()
            .name("cluster".into())
            .spawn(move || follower.follow(&events))?;
        Ok(Some(Self {
            shared,
            running: Mutex::new(Some(running)),
            announcer,
            asking: Mutex::new(()),
        }))
    }

    /// By which this node's object is told what to say, if the operator wants that.
    pub fn announcer(&self) -> Option<Announcer> {
        self.announcer.clone()
    }

    /// Follows no longer; what is in force stays.
    pub fn stop(&self) {
        let running = self.running.lock();
        drop(running.unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Forgets what an orderly end leaves nobody to need.
    pub fn remove_file(&self) {
        files::remove(&self.shared.identities);
    }

    /// Waits until enough is known to say what policy means for a pod: everything was said once, and where the source
    /// lists all pods, this one as well. `false`: not in time.
    pub fn await_pod(&self, pod: &Name, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        loop {
            let unlisted = state.model.config().undescribed == Undescribed::Unlabelled;
            if state.is_known && (unlisted || state.model.store().pod(pod).is_some()) {
                return true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            let woken = self.shared.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The pool that a pod's addresses come from, if it or its namespace names one.
    pub fn address_pool(&self, pod: &Name) -> Option<String> {
        let state = self.shared.lock();
        let pool = state.model.store().address_pool(pod);
        pool.map(|pool| pool.to_string())
    }

    /// The ranges of this node's pods, as its Node object has them; none while that is not known.
    pub fn own_pod_cidrs(&self) -> Vec<String> {
        let state = self.shared.lock();
        let own = state.model.store().node(&state.model.config().node);
        own.map_or_else(Vec::new, |node| {
            node.pod_cidrs.iter().map(ToString::to_string).collect()
        })
    }

    /// A pod has a link: `row` (whose identity is policy's to say) and `others`, in one change with what policy says of
    /// it. The number is for [`Control::wait`].
    pub fn attach(&self, pod: Name, mut row: LinkRow, others: Vec<Row>) -> u64 {
        let mut state = self.shared.lock();
        row.tenant = state.tenant(&pod.namespace);
        let addresses = row.addresses.to_vec();
        state.model.attach(row.id, Attached { pod, addresses });
        let told = Told {
            row,
            is_told: false,
            dscp: None,
            rates: None,
        };
        state.links.insert(told.row.id, told);
        self.shared.tell(&mut state, others, Vec::new())
    }

    /// The link is no more, nor are `others`.
    pub fn detach(&self, link: LinkId, mut others: Vec<Key>) -> u64 {
        let mut state = self.shared.lock();
        state.model.detach(link);
        let told = state.links.remove(&link);
        if told.as_ref().is_some_and(|told| told.dscp.is_some()) {
            others.push(Key::Marking(link));
        }
        if told.is_some_and(|told| told.rates.is_some()) {
            others.push(Key::Rates(link));
        }
        others.push(Key::Link(link));
        self.shared.tell(&mut state, Vec::new(), others)
    }

    /// Tells `listener` of all nodes, once they are known and whenever one changes. The appliance is told nothing before the
    /// listener was told once.
    pub fn follow_nodes(&self, mut listener: Listener) {
        let nodes = &mut self.shared.lock().nodes;
        if let Some(present) = &nodes.present {
            listener(present);
        }
        nodes.listener = Some(listener);
    }

    /// Tells `listener` what clients outside may send to, once it is known and whenever it may have changed.
    pub fn follow_served(&self, listener: ServedListener) {
        let mut state = self.shared.lock();
        state.served = Some(listener);
        state.tell_served();
    }
}

fn model_config(config: &Config, source: &SourceConfig) -> ModelConfig {
    let is_listed = source.kubernetes.is_some();
    ModelConfig {
        node: config.node_name.as_str().into(),
        host_reaches_pods: config.policy.host_reaches_pods,
        established: config.policy.established.into(),
        audit: config.policy.mode == PolicyMode::Audit,
        host_policy: HostPolicy::from(&config.host_policy),
        default_deny: config.policy.default_deny.as_ref().map(DefaultDeny::from),
        resolvers: (config.policy.resolvers.iter())
            .map(IpAddr::to_canonical)
            .collect(),
        endpoints_from_selectors: !is_listed,
        undescribed: if is_listed {
            Undescribed::AsBefore
        } else {
            Undescribed::Unlabelled
        },
        node_addresses: config.cni.node_addresses.clone(),
        host_addresses: (config.host_link.as_ref())
            .map_or_else(Vec::new, |link| link.addresses.clone()),
        peer_addresses: config.uplink.as_ref().map_or_else(Vec::new, |uplink| {
            let own = |peer: &PeerConfig| peer.own_addresses().collect::<Vec<_>>();
            uplink.peers.iter().flat_map(own).collect()
        }),
        addresses: plan::plan(config),
        prefixes: plan::service_ranges(config),
        forwarding: config.services.forwarding,
        no_direct_return: ServicesConfig::no_direct_return(config.uplink.as_ref()).map(Into::into),
        // What the uplink brings to the appliance, and nothing else.
        nat_ports: config
            .uplink
            .as_ref()
            .map(|uplink| uplink.snat_ports())
            .map(|ports| (ports.first(), ports.last())),
        ..ModelConfig::default()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(&self, events: &Receiver<Event>) {
        while let Ok(event) = events.recv() {
            let mut state = self.lock();
            state.take(event);
            // A lock held for long would keep ADDs waiting; a compilation for each event would take longer than the events.
            for event in events.try_iter().take(BATCH) {
                state.take(event);
            }
            state.heard = Some(Instant::now());
            self.tell(&mut state, Vec::new(), Vec::new());
            state.note_findings();
        }
    }

    /// Compiles what has changed and puts it, with rows that belong to the same change, on its way.
    fn tell(&self, state: &mut State, mut put: Vec<Row>, mut remove: Vec<Key>) -> u64 {
        if !state.model.store().is_in_sync() {
            // Nobody is told before everything is known, so the rows may wait where they will be found.
            return self.control.change(put, remove);
        }
        let begin = Instant::now();
        state.model.compile();
        for step in state.model.tables().take_delta() {
            match step {
                Step::Put(row) => put.push(row),
                Step::Remove(key) => remove.push(key),
            }
        }
        for (link, told) in &mut state.links {
            match state.model.identity(*link) {
                Some(identity) if told.is_told && told.row.identity == identity => {}
                Some(identity) => {
                    told.row.identity = identity;
                    told.is_told = true;
                    put.push(Row::Link(told.row.clone()));
                }
                None if told.is_told => {
                    told.is_told = false;
                    remove.push(Key::Link(*link));
                }
                None => {}
            }
            let dscp = state.model.egress_dscp(*link);
            if std::mem::replace(&mut told.dscp, dscp) != dscp {
                match dscp {
                    Some(dscp) => put.push(Row::Marking(MarkingRow { link: *link, dscp })),
                    None => remove.push(Key::Marking(*link)),
                }
            }
            let rates = state.rates.row(*link, &state.model.rates(*link));
            if std::mem::replace(&mut told.rates, rates) != rates {
                match rates {
                    Some(rates) => put.push(Row::Rates(rates)),
                    None => remove.push(Key::Rates(*link)),
                }
            }
        }
        state.compiled = begin.elapsed();
        let revision = if put.is_empty() && remove.is_empty() {
            self.control.revision()
        } else {
            self.control.change(put, remove)
        };
        state.tell_nodes();
        if !std::mem::replace(&mut state.is_known, true) {
            let (compiled, rows) = (state.compiled, state.model.tables().len());
            tracing::info!(source = self.mode, place = %self.place, ?compiled, rows, "the cluster is known");
            self.control.release();
        }
        let checks = state.model.health_checks();
        self.health.serve(checks, state.model.is_leaving());
        state.tell_served();
        self.keep_displaced(state);
        self.changed.notify_all();
        revision
    }

    /// Writes down who has not the number that follows from its labels, so that a number lasts.
    fn keep_displaced(&self, state: &mut State) {
        let now = state.model.identities().displaced();
        if now == state.displaced {
            return;
        }
        match files::write_json(&self.identities, &now) {
            Ok(()) => state.displaced = now,
            Err(error) => tracing::warn!(%error, "identities are not written down"),
        }
    }
}

impl State {
    /// The number of a namespace that gets a link.
    fn tenant(&mut self, namespace: &Arc<str>) -> Tenant {
        let in_use = self.links.values().map(|told| told.row.tenant);
        self.tenants.number(namespace, in_use)
    }

    fn take(&mut self, event: Event) {
        if let Event::Lost { reason } = &event {
            tracing::warn!(%reason, "the cluster cannot be followed at the moment");
        }
        self.model.apply(event);
    }

    fn note_findings(&mut self) {
        let found = self.model.store().findings().cloned();
        let now: BTreeSet<Finding> = found.chain(self.model.left_out()).collect();
        for finding in now.difference(&self.findings).take(LOGGED) {
            tracing::warn!(%finding, "an object is wrong");
        }
        let gone = self.findings.difference(&now).count();
        if gone > 0 {
            tracing::info!(gone, left = now.len(), "objects were put right");
        }
        self.findings = now;
        for finding in self.model.take_new_findings().iter().take(LOGGED) {
            tracing::warn!(%finding, "a Service does not get all it asks for");
        }
    }

    fn tell_served(&mut self) {
        if let Some(listener) = &mut self.served
            && self.is_known
        {
            listener(self.model.served());
        }
    }

    fn tell_nodes(&mut self) {
        let Some(members) = self.model.take_members() else {
            return;
        };
        let present = &*self.nodes.present.insert(Arc::new(members));
        if let Some(listener) = &mut self.nodes.listener {
            listener(present);
        }
    }
}

fn read_displaced(path: &Path) -> Vec<Displaced> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "identities are not read");
            return Vec::new();
        }
    };
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "identities are not understood");
        Vec::new()
    })
}

/// Which pod of the cluster a link's name means: `namespace/name`, or a name in `default`.
pub fn pod_name(text: &str) -> Name {
    match text.split_once('/') {
        Some((namespace, name)) if !name.contains('/') => Name::new(namespace, name),
        _ => Name::new("default", text),
    }
}

#[cfg(test)]
mod tests;
