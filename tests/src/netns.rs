//! Network namespaces that stand for pods and nodes. Named after the lab's process, gone with their owner.

use crate::command;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// A namespace under `/run/netns`.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace whose name begins with `sluice-`, this process's id and `label`.
    ///
    /// # Errors
    /// If `ip netns add` refuses.
    pub fn new(label: &str) -> Result<Self> {
        let name = format!("sluice-{}-{label}", std::process::id());
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
        if let Err(error) = command::run(&["ip", "netns", "del", &self.name]) {
            eprintln!("a namespace stays behind: {error:#}");
        }
    }
}
