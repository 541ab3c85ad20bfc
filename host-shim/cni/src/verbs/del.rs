//! DEL: remove whatever there is, by our own record, and succeed on whatever there is not.

use super::address;
use super::node::Node;
use super::record::{Key, Record};
use super::{Verbs, disk};
use crate::config::Config;
use crate::env::{Environment, Verb};
use crate::error::CniError;
use std::sync::atomic::Ordering;

impl<N: Node> Verbs<N> {
    pub(super) fn del(&self, env: &Environment, config: &Config) -> Result<(), CniError> {
        let key = Key::of(env, config);
        let _claim = self.busy.claim(&key)?;
        self.del_held(env, config, &key)?;
        let read = disk("read the kept DELs");
        let kept = self
            .deferred
            .of(&key.network, &key.container_id, &key.ifname)
            .map_err(read)?;
        if let Some(kept) = kept {
            self.deferred
                .forget(&kept)
                .map_err(disk("forget a kept DEL"))?;
            self.counters.deferred_dels.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The caller holds the attachment.
    pub(super) fn del_held(
        &self,
        env: &Environment,
        config: &Config,
        key: &Key,
    ) -> Result<(), CniError> {
        if let Some(record) = self.records.read(key) {
            return self.remove(&record);
        }
        // Nothing was made, or somebody else made it: what the address store says is all there can be.
        let chained = config.ipam.is_none() && config.previous().ok().flatten().is_some();
        if chained {
            return Ok(());
        }
        let source = address::source(&self.pools, &self.node, config, None)?;
        source.del(env, config)
    }

    /// Undoes an attachment: the link first, because an address is free only when nobody uses it.
    pub(super) fn remove(&self, record: &Record) -> Result<(), CniError> {
        self.node.detach(&record.name, &record.link)?;
        let config = Config::for_verb(Verb::Del, record.config.clone())?;
        let is_foreign = record.link.adopt.is_some() && config.ipam.is_none();
        if !is_foreign {
            let env = Environment {
                verb: Verb::Del,
                container_id: record.key.container_id.clone(),
                netns: String::new(),
                ifname: record.key.ifname.clone(),
                args: String::new(),
                path: record.path.clone(),
                netns_override: false,
            };
            let source = address::source(&self.pools, &self.node, &config, None)?;
            source.del(&env, &config)?;
        }
        self.records
            .remove(&record.key)
            .map_err(disk("forget the attachment"))
    }
}
