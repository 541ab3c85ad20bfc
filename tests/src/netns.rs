//! Network namespaces that stand for pods and nodes. Named after the lab's process, gone with their owner.

use crate::command;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Two labs of one process do not share names.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A namespace under `/run/netns`.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace whose name begins with `sluice-` and this process's id, and ends with `label`.
    ///
    /// # Errors
    /// If `ip netns add` refuses.
    pub fn new(label: &str) -> Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("sluice-{}-{number}-{label}", std::process::id());
        command::run(&["ip", "netns", "add", &name])?;
        let netns = Self { name };
        netns.run(&["ip", "link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The name as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs plain words inside.
    ///
    /// # Errors
    /// As [`command::run`].
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let mut all = vec!["ip", "netns", "exec", &self.name];
        all.extend(words);
        command::run(&all)
    }

    /// Runs plain words inside whose failure is an answer as well.
    ///
    /// # Errors
    /// As [`command::output`].
    pub fn output(&self, words: &[&str]) -> Result<std::process::Output> {
        let mut all = vec!["ip", "netns", "exec", &self.name];
        all.extend(words);
        command::output(&all)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Removes a namespace, also when the lab was interrupted.
pub(crate) fn remove(name: &str) {
    let removed = Command::new("ip").args(["netns", "del", name]).status();
    if !removed.is_ok_and(|status| status.success()) {
        eprintln!("the namespace {name} stays behind");
    }
}
