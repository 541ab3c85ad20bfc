//! The store as tables. Everything here is a function of the objects and the links of this node: in which order they came
//! does not matter, and a change costs what depends on it.

mod hash;
mod identity;
mod paint;
mod policy;
mod rules;
mod ruleset;
mod selector;
pub(crate) mod span;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use sluice_contract::policy::{Action, Established, RuleId, SettingsRow};
use sluice_contract::{Identity, LinkId};

use crate::diff::Tables;
use crate::object::Name;
use crate::store::{Event, Store};

pub use identity::{Displaced, Group, Identities};
pub use rules::{RuleName, RuleNames};

/// What the node is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node's name.
    pub node: Arc<str>,
    /// The node reaches its own pods whatever policy says (probes of the kubelet).
    pub host_reaches_pods: bool,
    /// What becomes of connections that a change of policy would not let begin.
    pub established: Established,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: Arc::from(""),
            host_reaches_pods: true,
            established: Established::Judged,
        }
    }
}

/// A pod of this node, as the CNI plugin attached it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub pod: Name,
    pub addresses: Vec<IpAddr>,
}

/// The model of the cluster: objects in, rows out.
#[derive(Debug)]
pub struct Model {
    store: Store,
    links: BTreeMap<LinkId, Attached>,
    /// Links that came, changed or went since the last compilation.
    touched: Vec<Name>,
    policy: policy::Engine,
    tables: Tables,
}

impl Model {
    /// `displaced`: what [`Identities::displaced`] said before the daemon ended.
    pub fn new(config: &Config, displaced: impl IntoIterator<Item = Displaced>) -> Self {
        let mut tables = Tables::default();
        tables.set_settings(SettingsRow {
            unbound: Action::Deny,
            host_reaches_pods: config.host_reaches_pods,
            established: config.established,
        });
        Self {
            store: Store::default(),
            links: BTreeMap::new(),
            touched: Vec::new(),
            policy: policy::Engine::new(displaced),
            tables,
        }
    }

    /// Takes what a source says.
    pub fn apply(&mut self, event: Event) {
        self.store.apply(event);
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
        self.policy.update(
            &self.store,
            &self.links,
            &changes,
            &touched,
            &mut self.tables,
        );
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The rows that should be in force, as of the last [`Self::compile`].
    pub fn tables(&mut self) -> &mut Tables {
        &mut self.tables
    }

    /// The pods of this node.
    pub fn links(&self) -> impl Iterator<Item = (LinkId, &Attached)> {
        self.links.iter().map(|(link, attached)| (*link, attached))
    }

    /// What policy sees of the pod behind a link; belongs into its `LinkRow`.
    pub fn identity(&self, link: LinkId) -> Option<Identity> {
        self.policy.identity_of_pod(&self.links.get(&link)?.pod)
    }

    pub fn identities(&self) -> &Identities {
        self.policy.identities()
    }

    /// Which rule a number means.
    pub fn rule(&self, rule: RuleId) -> Option<&RuleName> {
        self.policy.names().get(rule)
    }
}
