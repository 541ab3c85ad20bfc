//! CHECK: what ADD made is still there, or which part of it is not.

use super::Verbs;
use super::address;
use super::node::Node;
use super::record::{Key, Record};
use crate::config::Config;
use crate::env::Environment;
use crate::error::{CniError, Code};
use crate::result::CniResult;
use std::thread;
use std::time::{Duration, Instant};

/// A link converges within this after ADD (checklist 38).
const CONVERGENCE: Duration = Duration::from_secs(1);

impl<N: Node> Verbs<N> {
    pub(super) fn check(&self, env: &Environment, config: &Config) -> Result<(), CniError> {
        let key = Key::of(env, config);
        let _claim = self.busy.claim(&key)?;
        let record = self.records.read(&key);
        let Some(record) = record else {
            let Key {
                network,
                container_id,
                ..
            } = &key;
            let msg = format!("missing: the attachment of {container_id} to {network}");
            return Err(CniError::new(Code::CheckFailed, msg));
        };
        if let Some(previous) = config.previous()? {
            check_previous(&previous, &record)?;
        }
        let is_foreign = record.link.adopt.is_some() && config.ipam.is_none();
        if !is_foreign {
            address::source(&self.pools, &self.node, config, None)?.check(
                env,
                config,
                &record.link.addresses,
            )?;
        }
        self.check_link(&record)
    }

    fn check_link(&self, record: &Record) -> Result<(), CniError> {
        let started = Instant::now();
        loop {
            let missing = self.node.missing(&record.name, &record.link)?;
            if missing.is_empty() {
                return Ok(());
            }
            if started.elapsed() >= CONVERGENCE {
                let msg = format!("missing: {}", missing.join(", "));
                return Err(CniError::new(Code::CheckFailed, msg));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Whether the result that the runtime kept is the one we gave, as far as it is ours. Plugins after us may have changed the
/// MAC and the routes.
fn check_previous(previous: &CniResult, record: &Record) -> Result<(), CniError> {
    let fault = |what: String| {
        Err(CniError::new(
            Code::CheckFailed,
            format!("prevResult does not have {what}"),
        ))
    };
    let link = &record.link;
    if !previous.interfaces.is_empty() && previous.pod_interface(&link.ifname).is_none() {
        return fault(format!("the interface {}", link.ifname));
    }
    let has = |ip| previous.ips.iter().any(|other| other.ip() == Some(ip));
    match link.addresses.iter().find(|ip| !has(**ip)) {
        Some(ip) => fault(format!("the address {ip}")),
        None => Ok(()),
    }
}
