//! The verbs, on the node's side: what each does, in which order, and what it undoes when a step fails.
//!
//! Calls of one attachment wait for each other; calls of different attachments run beside each other.

mod add;
pub mod address;
mod check;
mod del;
mod gc;
pub mod node;
pub mod record;
mod status;

use crate::config::Config;
use crate::deferred::Deferred;
use crate::env::{Environment, Verb};
use crate::error::{CniError, Code};
use crate::plugin;
use crate::rpc::{self, Body, Request};
use address::Pools;
use node::Node;
use record::{Key, Records};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Says the answer to the caller.
pub type Deliver<'a> = dyn FnMut(Body) -> io::Result<()> + 'a;

/// How often each thing happened.
#[derive(Debug, Default)]
pub struct Counters {
    /// DELs that were kept while the node was away, and carried out later (`cni_deferred_del_total`).
    pub deferred_dels: AtomicU64,
    /// Attachments that GC found stale.
    pub collected: AtomicU64,
    /// Calls that succeeded and calls that failed, by the order of [`Verb::ALL`].
    pub answered: [[AtomicU64; 2]; Verb::ALL.len()],
}

impl Counters {
    /// By name; calls of verbs that nobody used are left out.
    pub fn report(&self) -> BTreeMap<String, u64> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut all = BTreeMap::from([
            ("cni_deferred_del_total".into(), value(&self.deferred_dels)),
            ("cni_collected_total".into(), value(&self.collected)),
        ]);
        for ((_, verb), counters) in Verb::ALL.iter().zip(&self.answered) {
            for (how, counter) in ["", "failed_"].iter().zip(counters) {
                if value(counter) > 0 {
                    all.insert(format!("cni_{verb}_{how}total"), value(counter));
                }
            }
        }
        all
    }
}

/// All verbs of a node.
#[derive(Debug)]
pub struct Verbs<N> {
    node: N,
    records: Records,
    deferred: Deferred,
    pools: Pools,
    busy: Busy,
    /// Ports claimed by calls that are under way; those of complete attachments are in their records.
    ports: Mutex<()>,
    steady: Mutex<status::Steady>,
    /// Attachments that a GC did not list although they look alive, and since when.
    unlisted: Mutex<HashMap<Key, Instant>>,
    pub counters: Arc<Counters>,
}

/// How long a call waits for another one that works on the same attachment.
const CLAIM: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// The attachments that a call works on.
#[derive(Debug, Default)]
struct Busy {
    keys: Mutex<HashSet<Key>>,
    freed: Condvar,
}

/// The right to work on one attachment.
#[derive(Debug)]
struct Claim<'a> {
    busy: &'a Busy,
    key: Key,
}

impl Busy {
    fn keys(&self) -> MutexGuard<'_, HashSet<Key>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for other calls that work on the attachment, but not for ever: a call that never ends must not take the
    /// threads of all that come after it.
    ///
    /// # Errors
    /// [`Code::Later`] if another call still has it.
    fn claim(&self, key: &Key) -> Result<Claim<'_>, CniError> {
        let deadline = Instant::now() + CLAIM;
        let mut keys = self.keys();
        while !keys.insert(key.clone()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CniError::new(
                    Code::Later,
                    format!(
                        "another call has worked on {} of {} for {} s",
                        key.ifname,
                        key.container_id,
                        CLAIM.as_secs()
                    ),
                ));
            }
            (keys, _) = self
                .freed
                .wait_timeout(keys, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(Claim {
            busy: self,
            key: key.clone(),
        })
    }

    fn is_claimed(&self, key: &Key) -> bool {
        self.keys().contains(key)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.busy.keys().remove(&self.key);
        self.busy.freed.notify_all();
    }
}

fn disk(what: &'static str) -> impl FnOnce(io::Error) -> CniError {
    move |error| CniError::new(Code::Io, format!("cannot {what}")).details(&error)
}

impl<N: Node> Verbs<N> {
    /// The verbs over `node`, with records below `run_dir` and kept DELs below `state_dir`. Calls that died with an earlier
    /// life of the node are undone, and DELs that were kept are carried out.
    ///
    /// # Errors
    /// If the records cannot be read.
    pub fn start(node: N, run_dir: &Path, state_dir: &Path) -> io::Result<Arc<Self>> {
        let verbs = Arc::new(Self {
            node,
            records: Records::open(run_dir)?,
            deferred: Deferred::new(state_dir),
            pools: Pools::default(),
            busy: Busy::default(),
            ports: Mutex::default(),
            steady: Mutex::default(),
            unlisted: Mutex::default(),
            counters: Arc::default(),
        });
        verbs.undo_half_made();
        verbs.carry_out_deferred();
        Ok(verbs)
    }

    /// The node.
    pub fn node(&self) -> &N {
        &self.node
    }

    /// The attachments.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Carries out one call and hands its answer to `deliver`. Everything in it is checked again: the caller's word counts for
    /// nothing. An ADD whose result cannot be delivered is undone before anybody else can touch the attachment.
    pub fn call(&self, request: Request, deliver: &mut Deliver<'_>) {
        let env = request.env;
        let answered = match Self::admit(request.v, &env, request.config) {
            Err(error) => Err(error),
            Ok(config) => match env.verb {
                Verb::Add => self.add(&env, &config, deliver),
                Verb::Del => self.del(&env, &config).map(|()| Some(Value::Null)),
                Verb::Check => self.check(&env, &config).map(|()| Some(Value::Null)),
                Verb::Gc => self.gc(&env, &config).map(|()| Some(Value::Null)),
                Verb::Status => self.status(&env, &config).map(|()| Some(Value::Null)),
                Verb::Version => Ok(Some(plugin::version_object())),
            },
        };
        let failed = usize::from(answered.is_err());
        let of_verb = Verb::ALL.iter().position(|(verb, _)| *verb == env.verb);
        if let Some(count) = of_verb.and_then(|n| self.counters.answered.get(n)?.get(failed)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        // The caller may be gone; what it asked for is done or was refused.
        let _heard = match answered {
            Ok(Some(value)) => deliver(Body::Result(value)),
            Ok(None) => Ok(()),
            Err(error) => deliver(Body::Error(error)),
        };
    }

    fn admit(version: u32, env: &Environment, config: Value) -> Result<Config, CniError> {
        if version != rpc::VERSION {
            let ours = rpc::VERSION;
            return Err(CniError::new(
                Code::Later,
                format!("the plugin speaks version {version} of the protocol, the node {ours}"),
            ));
        }
        env.check()?;
        let config = Config::for_verb(env.verb, config)?;
        plugin::check(env, &config)?;
        Ok(config)
    }

    fn undo_half_made(&self) {
        for record in self
            .records
            .all(None)
            .into_iter()
            .filter(|record| !record.complete)
        {
            let claim = self.busy.claim(&record.key);
            if let Err(error) = claim.and_then(|_claim| self.remove(&record)) {
                tracing::warn!(%error, "CNI: a half-made attachment is left");
            }
        }
    }

    /// Carries out the DELs that were kept while no node was there, or while it did not hear in time.
    pub fn carry_out_deferred(&self) {
        let kept = match self.deferred.all() {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!(%error, "CNI: the kept DELs cannot be read");
                return;
            }
        };
        for kept in kept {
            let done = Config::for_verb(Verb::Del, kept.request.config).and_then(|config| {
                let key = Key::of(&kept.request.env, &config);
                let _claim = self.busy.claim(&key)?;
                // Under the claim: an ADD may have carried it out meanwhile, and what there is then is the ADD's.
                self.settle_deferred(&key)
            });
            if let Err(error) = done {
                tracing::warn!(%error, "CNI: a kept DEL cannot be carried out");
            }
        }
    }

    /// Carries out the kept DEL of an attachment, if there is one. The caller holds the attachment.
    fn settle_deferred(&self, key: &Key) -> Result<(), CniError> {
        let read = disk("read the kept DELs");
        let kept = self
            .deferred
            .of(&key.network, &key.container_id, &key.ifname)
            .map_err(read)?;
        let Some(kept) = kept else { return Ok(()) };
        let config = Config::for_verb(Verb::Del, kept.request.config.clone())?;
        self.del_held(&kept.request.env, &config, key)?;
        self.deferred
            .forget(&kept)
            .map_err(disk("forget a kept DEL"))?;
        self.counters.deferred_dels.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_waits_for_another_of_its_attachment_but_not_for_ever() {
        let key = |ifname: &str| Key {
            network: "n".into(),
            container_id: "c".into(),
            ifname: ifname.into(),
        };
        let busy = Busy::default();
        let held = busy.claim(&key("eth0")).unwrap();
        busy.claim(&key("eth1")).unwrap();
        let error = busy.claim(&key("eth0")).unwrap_err();
        assert_eq!(error.code, Code::Later);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| busy.claim(&key("eth0")).is_ok());
            std::thread::sleep(CLAIM / 10);
            drop(held);
            assert!(waiting.join().unwrap());
        });
        assert!(!busy.is_claimed(&key("eth0")));
    }
}
