//! What the node says of the cluster. The types are the API's and the CLI's alike.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use sluice_model::compile::Snapshot;
use sluice_model::explain::Restrictions;
use sluice_model::finding::Severity;
use sluice_model::object::Kind;
use sluice_model::overview::{self, PolicySummary, ServiceSummary};
use sluice_model::trace::{self, Answer, Question};

use super::{Cluster, pod_name};

/// Findings in a report; the log has had the others.
const FINDINGS: usize = 100;

/// The source and what came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterReport {
    /// `directory` or `kubernetes`.
    pub source: String,
    /// Which directory or kubeconfig.
    pub place: String,
    /// `enforce`, or `audit`: what policy denies passes, and is logged.
    pub policy_mode: String,
    /// Everything has been said once.
    pub in_sync: bool,
    /// Why the source cannot be followed at the moment, if so. What is known stays in force.
    pub lost: Option<String>,
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

/// What policies say about a pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodPolicies {
    pub pod: String,
    pub directions: Vec<Restrictions>,
}

impl Cluster {
    /// The source at a glance.
    pub fn report(&self) -> ClusterReport {
        let mut state = self.shared.lock();
        let tables = state.model.tables();
        let (counts, all) = (tables.counts(), tables.len());
        let store = state.model.store();
        let disappointed: Vec<_> = overview::disappointed(store, state.model.config()).collect();
        let findings = || store.findings().chain(&disappointed);
        ClusterReport {
            source: self.shared.mode.into(),
            place: self.shared.place.clone(),
            policy_mode: if state.model.config().audit {
                "audit"
            } else {
                "enforce"
            }
            .into(),
            in_sync: store.is_in_sync(),
            lost: store.lost().map(str::to_owned),
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
    /// server they are anybody's.
    pub fn problems(report: &ClusterReport) -> Vec<String> {
        let mut problems = Vec::new();
        if !report.in_sync {
            problems.push("The cluster is not known yet, and the appliance is told nothing".into());
        }
        if let Some(reason) = &report.lost {
            problems.push(format!("The cluster cannot be followed: {reason}"));
        }
        if report.source == "directory" && report.errors > 0 {
            let count = report.errors;
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
        self.ask(|now| overview::policies(&now.store, now.links.values().map(|it| &it.pod)))
    }

    /// What policies say about a pod.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn policies_of(&self, pod: &str) -> Result<PodPolicies, trace::Wrong> {
        let name = pod_name(pod);
        let directions = self.ask(|now| trace::show(&now.store, &now.links, &name))?;
        Ok(PodPolicies {
            pod: name.to_string(),
            directions: directions.into(),
        })
    }

    /// Who decides about a connection.
    ///
    /// # Errors
    /// An end is not there, or the question is none.
    pub fn trace(&self, from: &str, to: &str) -> Result<Answer, trace::Wrong> {
        let question = Question::parse(from, to)?;
        self.ask(|now| trace::trace(&now.store, &now.config, &now.links, &question))
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
