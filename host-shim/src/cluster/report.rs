//! What the node says of the cluster. The types are the API's and the CLI's alike.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sluice_contract::name::Learnt;
use sluice_contract::{LinkId, limits};
use sluice_model::compile::{HostPolicyMode, Snapshot};
use sluice_model::explain::{Restrictions, Told};
use sluice_model::finding::Severity;
use sluice_model::object::{Kind, Name};
use sluice_model::overview::{self, PolicySummary, ServiceSummary};
use sluice_model::source::announce::Announcer;
use sluice_model::trace::{self, Answer, End, Question};

use super::{Cluster, pod_name};

/// Findings in a report; the log has had the others.
const FINDINGS: usize = 100;

/// Longest wait for the appliance to say what pods were told.
const ANSWER: Duration = Duration::from_secs(2);
/// It did not.
const SILENT: Told = Told::Unknown(
    "the appliance did not say which addresses the pod was told they have; see `sluice status`",
);

/// The source and what came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterReport {
    /// `directory` or `kubernetes`.
    pub source: String,
    /// Which directory or kubeconfig.
    pub place: String,
    /// `enforce`, or `audit`: what policy denies passes, and is logged.
    pub policy_mode: String,
    /// The same of NodePolicies: `off`, `audit` or `enforce`.
    #[serde(default)]
    pub host_policy_mode: String,
    /// Everything has been said once.
    pub in_sync: bool,
    /// Why the source cannot be followed at the moment, if so. What is known stays in force.
    pub lost: Option<String>,
    /// Why annotations of the Node object are not written, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations_problem: Option<String>,
    /// Milliseconds since the source last said something.
    pub heard_ms: Option<u64>,
    /// What the last change took to compile.
    pub compile_ms: f64,
    /// Objects in use by kind.
    pub objects: BTreeMap<String, usize>,
    /// Objects of which something is wrong, at most a hundred of them; `wrong` says how many there are.
    pub findings: Vec<String>,
    pub wrong: usize,
    /// How many of those are errors: the object is not used as it is written.
    pub errors: usize,
    /// How many objects do not fit into the appliance.
    #[serde(default)]
    pub left_out: usize,
    /// Rows that policy and Services make for the appliance.
    pub rows: RowCounts,
}

/// Rows for the appliance by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCounts {
    pub identities: usize,
    pub bindings: usize,
    pub rulesets: usize,
    pub classes: usize,
    pub spans: usize,
    pub all: usize,
}

/// What policies say about a pod, or `node` and a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodPolicies {
    pub pod: String,
    pub directions: Vec<Restrictions>,
    /// The addresses that it was told names in its rules have, if there are any and its appliance answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<LearntName>,
}

/// What pods of this node were told of names in their rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LearntNames {
    pub names: Vec<LearntName>,
    /// There is more than is told at once.
    pub more: bool,
}

/// An address that a name has for a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LearntName {
    pub pod: String,
    pub link: u16,
    pub name: String,
    pub address: IpAddr,
    /// For how long that holds.
    pub seconds: i32,
}

/// Why nothing can be said of what a pod was told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTold {
    #[error("There is no pod {0}: `sluice link list` has those of this node")]
    NoPod(Name),
    #[error("Pod {pod} is not on this node: ask on {node}, where it is")]
    Elsewhere { pod: Name, node: String },
    #[error("The appliance did not answer within {ANSWER:?}: `sluice status` says how it is")]
    Silent,
}

impl Cluster {
    /// The source at a glance.
    pub fn report(&self) -> ClusterReport {
        let mut state = self.shared.lock();
        let tables = state.model.tables();
        let (counts, all) = (tables.counts(), tables.len());
        let store = state.model.store();
        let disappointed: Vec<_> = overview::disappointed(store, state.model.config()).collect();
        let refused = state.model.findings();
        let left_out = state.model.left_out();
        let findings = || {
            let of_services = refused.iter().chain(&disappointed);
            store.findings().chain(of_services).chain(&left_out)
        };
        ClusterReport {
            source: self.shared.mode.into(),
            place: self.shared.place.clone(),
            policy_mode: if state.model.config().audit {
                "audit"
            } else {
                "enforce"
            }
            .into(),
            host_policy_mode: match state.model.config().host_policy.mode {
                HostPolicyMode::Off => "off",
                HostPolicyMode::Audit => "audit",
                HostPolicyMode::Enforce => "enforce",
            }
            .into(),
            in_sync: store.is_in_sync(),
            lost: store.lost().map(str::to_owned),
            annotations_problem: self.announcer.as_ref().and_then(Announcer::problem),
            heard_ms: state
                .heard
                .map(|at| Instant::now().duration_since(at).as_millis() as u64),
            compile_ms: state.compiled.as_secs_f64() * 1e3,
            objects: Kind::ALL
                .into_iter()
                .map(|kind| (kind.name().to_owned(), store.count(kind)))
                .collect(),
            findings: findings().take(FINDINGS).map(ToString::to_string).collect(),
            wrong: findings().count(),
            errors: findings()
                .filter(|it| it.severity == Severity::Error)
                .count(),
            left_out: left_out.len(),
            rows: RowCounts {
                identities: counts.identities,
                bindings: counts.bindings,
                rulesets: counts.rulesets,
                classes: counts.classes,
                spans: counts.spans,
                all,
            },
        }
    }

    /// What is wrong with it, one sentence each. What is wrong with objects counts where the operator wrote them; in an API
    /// server they are anybody's. So is what does not fit.
    pub fn problems(report: &ClusterReport) -> Vec<String> {
        let mut problems = Vec::new();
        if !report.in_sync {
            problems.push("The cluster is not known yet, and the appliance is told nothing".into());
        }
        if let Some(reason) = &report.lost {
            problems.push(format!("The cluster cannot be followed: {reason}"));
        }
        if let Some(reason) = &report.annotations_problem {
            problems.push(format!(
                "The annotations of the Node object are not written: {reason}"
            ));
        }
        if report.source == "directory" && report.errors > report.left_out {
            let count = report.errors - report.left_out;
            let first = report.findings.iter().find(|it| it.contains("error: "));
            problems.push(format!(
                "{count} errors in manifests; what they are about stays as it was: {}",
                first.map_or("", String::as_str)
            ));
        }
        problems
    }

    /// All policies.
    pub fn policies(&self) -> Vec<PolicySummary> {
        self.ask(|now| {
            let here = now.links.values().map(|it| &it.pod);
            overview::policies(&now.store, Some(&now.config.node), here)
        })
    }

    /// What policies say about a pod or a node.
    ///
    /// # Errors
    /// There is no such one.
    pub fn policies_of(&self, subject: &str) -> Result<PodPolicies, trace::Wrong> {
        let end: End = subject.parse()?;
        self.ask(|now| {
            let directions = trace::show(&now.store, &now.config, &now.links, &end)?;
            let mut rules = directions.iter().flat_map(|it| &it.rules);
            let link = match &end {
                End::Pod(name) => link_of(now, name),
                _ => None,
            };
            let link = link.filter(|_| rules.any(|it| it.names_domains));
            let told = link.and_then(|link| self.shared.control.names(Some(link), ANSWER));
            Ok(PodPolicies {
                pod: end.to_string(),
                directions: directions.into(),
                names: self.described(now, &told.unwrap_or_default()),
            })
        })
    }

    /// What a pod of this node, or all of them, were told of names in their rules.
    ///
    /// # Errors
    /// [`NotTold`]
    pub fn names(&self, pod: Option<&str>) -> Result<LearntNames, NotTold> {
        let pod = pod.map(pod_name);
        self.ask(|now| {
            let link = pod.map(|pod| match (link_of(now, &pod), now.store.pod(&pod)) {
                (Some(link), _) => Ok(link),
                (None, None) => Err(NotTold::NoPod(pod)),
                (None, Some(described)) => {
                    let node = described.node.clone();
                    let node = node.map_or("the node".into(), |it| it.to_string());
                    Err(NotTold::Elsewhere { pod, node })
                }
            });
            let told = self.shared.control.names(link.transpose()?, ANSWER);
            let told = told.ok_or(NotTold::Silent)?;
            Ok(LearntNames {
                names: self.described(now, &told),
                more: told.len() >= limits::NAMES_TOLD,
            })
        })
    }

    /// What holds, in words. What no rule names any more is left out.
    fn described(&self, now: &Snapshot, told: &[Learnt]) -> Vec<LearntName> {
        let mut state = self.shared.lock();
        let tables = state.model.tables();
        let held = told.iter().filter(|it| it.holds());
        let describe = |it: &Learnt| {
            Some(LearntName {
                pod: now.links.get(&it.link)?.pod.to_string(),
                link: it.link.raw(),
                name: tables.name(it.name)?.to_string(),
                address: it.address,
                seconds: it.left,
            })
        };
        let mut all: Vec<_> = held.filter_map(describe).collect();
        all.sort_unstable();
        all
    }

    /// Who decides about a connection.
    ///
    /// # Errors
    /// An end is not there, or the question is none.
    pub fn trace(&self, from: &str, to: &str) -> Result<Answer, trace::Wrong> {
        let question = Question::parse(from, to)?;
        let told = |link| match self.shared.control.names(Some(link), ANSWER) {
            Some(names) => Told::Known(names),
            None => SILENT,
        };
        self.ask(|now| trace::trace(&now.store, &now.config, &now.links, &question, told))
    }

    /// All Services that have an address.
    pub fn services(&self) -> Vec<ServiceSummary> {
        self.ask(overview::services)
    }

    /// Answers from what there is now, while changes go on. One question at a time: an answer may need as much memory as all
    /// rules.
    pub(super) fn ask<T>(&self, answer: impl FnOnce(&Snapshot) -> T) -> T {
        let turn = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.shared.lock().model.snapshot();
        let answer = answer(&now);
        drop(turn);
        answer
    }
}

/// The link of a pod of this node.
fn link_of(now: &Snapshot, pod: &Name) -> Option<LinkId> {
    let mut links = now.links.iter();
    links.find(|(_, it)| it.pod == *pod).map(|(link, _)| *link)
}
