//! GC: what the runtime does not list is removed, of this network only, and one failure does not stop the rest.
//!
//! An attachment that is not listed and whose pod is gone is stale. One that is not listed although its pod is there may be
//! the runtime's mistake (a list taken at the wrong moment): it is removed when a second GC a minute later does not list it
//! either (row I-06).

use super::Verbs;
use super::address::{self, Source};
use super::node::Node;
use super::record::Key;
use crate::config::{Attachment, Config};
use crate::env::Environment;
use crate::error::{CniError, Code};
use sluice_ipam::Lease;
use sluice_ipam::pool::{BETWEEN_OBSERVATIONS, Standing};
use std::collections::{BTreeSet, HashMap};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl<N: Node> Verbs<N> {
    pub(super) fn gc(&self, env: &Environment, config: &Config) -> Result<(), CniError> {
        let valid: BTreeSet<Attachment> = config.valid_attachments()?.into_iter().collect();
        self.gc_at(env, config, &valid, Instant::now())
    }

    /// The same at a given time.
    ///
    /// # Errors
    /// Code 107 naming all that could not be removed.
    pub fn gc_at(
        &self,
        env: &Environment,
        config: &Config,
        valid: &BTreeSet<Attachment>,
        now: Instant,
    ) -> Result<(), CniError> {
        let mut failures = Vec::new();
        self.collect_records(config, valid, now, &mut failures);
        if let Err(error) = self.collect_addresses(env, config, valid, now) {
            failures.push(error.to_string());
        }
        if failures.is_empty() {
            return Ok(());
        }
        let msg = format!("{} stale things could not be removed", failures.len());
        Err(CniError::new(Code::GcIncomplete, msg).details(&failures.join("; ")))
    }

    fn collect_records(
        &self,
        config: &Config,
        valid: &BTreeSet<Attachment>,
        now: Instant,
        failures: &mut Vec<String>,
    ) {
        let records = self.records.all(Some(&config.name));
        let mut unlisted = HashMap::new();
        for record in records {
            // A call works on it: the runtime knows of it.
            if is_listed(valid, &record.key) || self.busy.is_claimed(&record.key) {
                continue;
            }
            let since = {
                let seen = self.unlisted.lock().unwrap_or_else(PoisonError::into_inner);
                seen.get(&record.key).copied().unwrap_or(now)
            };
            let is_certain = now.saturating_duration_since(since) >= BETWEEN_OBSERVATIONS;
            if !is_certain && self.node.is_alive(&record.link) {
                unlisted.insert(record.key.clone(), since);
                continue;
            }
            let claim = self.busy.claim(&record.key);
            match claim.and_then(|_claim| self.remove(&record)) {
                Ok(()) => {
                    self.counters.collected.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    failures.push(format!(
                        "{} {}: {error}",
                        record.key.container_id, record.key.ifname
                    ));
                }
            }
        }
        let mut seen = self.unlisted.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|key, _| key.network != config.name);
        seen.extend(unlisted);
    }

    fn collect_addresses(
        &self,
        env: &Environment,
        config: &Config,
        valid: &BTreeSet<Attachment>,
        now: Instant,
    ) -> Result<(), CniError> {
        let pool = match address::source(&self.pools, &self.node, config, None)? {
            Source::Own(own) => own.pool,
            Source::Delegate(delegate) => {
                let answer = address::ask_delegate(&delegate.name, "GC", env, config);
                match (answer, delegate.store) {
                    // Older than GC, but its store is one that we can read.
                    (Err(error), Some((dir, _))) if address::is_unknown_verb(&error) => {
                        self.pools.open(&dir)?
                    }
                    (Err(error), None) if address::is_unknown_verb(&error) => {
                        let name = &delegate.name;
                        tracing::warn!(plugin = name, "CNI: the IPAM plugin has no GC: skipped");
                        return Ok(());
                    }
                    (answer, _) => return answer.map(drop),
                }
            }
        };
        let records = self.records.all(Some(&config.name));
        let observe = |lease: &Lease| {
            let listed = valid.iter().any(|attachment| {
                lease.container_id == attachment.container_id
                    && lease
                        .ifname
                        .as_ref()
                        .is_none_or(|ifname| *ifname == attachment.ifname)
            });
            let recorded = records
                .iter()
                .any(|record| lease.is_of(&address::owner_of(&record.key)));
            // Never listed and never recorded: from before us, perhaps of a pod that lives.
            if listed || recorded {
                Standing::Live
            } else {
                Standing::Unseen
            }
        };
        pool.collect(&observe, now, address::now())?;
        Ok(())
    }
}

fn is_listed(valid: &BTreeSet<Attachment>, key: &Key) -> bool {
    valid.iter().any(|attachment| {
        attachment.container_id == key.container_id && attachment.ifname == key.ifname
    })
}
