//! `sluice install` and `sluice uninstall`: what a person or an init container calls.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::install::{InstallError, Installation};
use crate::api::{self, ClientError, Request};

/// Where things go.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// Where the runtime looks for plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Where the runtime looks for networks
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// The file there; runtimes take the first by name
    #[arg(long, value_name = "FILE", default_value = "10-sluice.conflist")]
    conf_file: String,
    /// The network's name
    #[arg(long, value_name = "NAME", default_value = "sluice")]
    network: String,
    /// Where what must survive a restart lies, as the node has it
    #[arg(long, value_name = "DIR", default_value = "/var/lib/sluice")]
    state_dir: PathBuf,
}

/// Flags of `sluice install`.
#[derive(Args, Clone, Debug)]
pub struct InstallFlags {
    #[command(flatten)]
    places: Places,
    /// The newest CNI version that the runtime speaks
    #[arg(long, value_name = "VERSION", default_value = "1.0.0")]
    cni_version: String,
    /// The plugin; beside this program unless given
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

/// Flags of `sluice uninstall`.
#[derive(Args, Clone, Debug)]
pub struct UninstallFlags {
    #[command(flatten)]
    places: Places,
    /// Also while pods are attached
    #[arg(long)]
    force: bool,
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("The node does not forward, so nothing is installed")]
    SelfTest(#[source] ClientError),
    #[error("{0:?} is no CNI version that the plugin speaks")]
    Version(String),
    #[error(transparent)]
    Install(#[from] InstallError),
}

impl Places {
    fn installation(&self, run_dir: &Path, version: &str) -> Installation {
        // What a runtime calls, it calls from a directory of its own.
        let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
        Installation {
            bin_dir: self.bin_dir.clone(),
            conf_dir: self.conf_dir.clone(),
            file: self.conf_file.clone(),
            network: self.network.clone(),
            version: version.into(),
            run_dir: whole(run_dir),
            state_dir: whole(&self.state_dir),
        }
    }
}

impl InstallFlags {
    /// Installs, if the node forwards a frame; returns what to tell.
    ///
    /// # Errors
    /// Why not; the configuration is then not there, or as it was.
    pub fn run(&self, run_dir: &Path) -> Result<String, CommandError> {
        let version = &self.cni_version;
        if sluice_cni::version::Version::parse(version).is_err() {
            return Err(CommandError::Version(version.clone()));
        }
        let socket = run_dir.join("node.sock");
        let tested: Value =
            api::ask(&socket, &Request::SelfTest).map_err(CommandError::SelfTest)?;
        let beside = std::env::current_exe()
            .unwrap_or_default()
            .with_file_name("sluice-cni");
        let it = self.places.installation(run_dir, version);
        it.install(self.program.as_ref().unwrap_or(&beside))?;
        let mut told = format!(
            "the node forwards (a frame there and back in {} µs)\n{}\n{}\n",
            tested["micros"],
            it.bin_dir.join("sluice-cni").display(),
            it.conf_dir.join(&it.file).display(),
        );
        if !it.bin_dir.join("loopback").exists() {
            told.push_str("note: containerd also wants the plugin `loopback` there (containernetworking-plugins)\n");
        }
        Ok(told)
    }
}

impl UninstallFlags {
    /// Removes what install placed.
    ///
    /// # Errors
    /// Why not.
    pub fn run(&self, run_dir: &Path) -> Result<String, CommandError> {
        self.places
            .installation(run_dir, "1.0.0")
            .uninstall(self.force)?;
        Ok("the plugin and its network are gone\n".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        flags: InstallFlags,
    }

    #[test]
    fn c16_places_are_written_down_so_that_they_are_found_from_anywhere() {
        let line = Line::parse_from(["install", "--state-dir", "state"]);
        let it = line.flags.places.installation(Path::new("run"), "1.0.0");
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            (it.run_dir, it.state_dir),
            (here.join("run"), here.join("state"))
        );
    }
}
