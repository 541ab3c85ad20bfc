//! A containerd of the test's own, with the node's plugin and no other.

use crate::cri::{Cri, Metadata, PortMapping, SandboxConfig};
use crate::{conflist, image};
use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_tests::cni::{CniLab, REFERENCE};
use sluice_tests::command::{self, Running};
use sluice_tests::lab::program;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A containerd in the node's namespace, ended with this value; its pods go first.
pub(crate) struct Containerd {
    pub(crate) cri: Cri,
    sandboxes: Vec<String>,
    running: Option<Running>,
    directory: PathBuf,
}

/// Starts containerd with the node's plugin and no other.
pub(crate) fn start(lab: &CniLab) -> Result<Containerd> {
    let directory = lab.path("containerd");
    let (bin, conf) = (directory.join("bin"), directory.join("net.d"));
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(&conf)?;
    std::os::unix::fs::symlink(
        program("sluice-cni").canonicalize()?,
        bin.join("sluice-cni"),
    )?;
    // containerd itself sets the loopback up with this one.
    std::os::unix::fs::symlink(Path::new(REFERENCE).join("loopback"), bin.join("loopback"))?;
    fs::write(
        conf.join("10-sluice.conflist"),
        conflist(lab, "1.0.0").to_string(),
    )?;
    fs::write(directory.join("config.toml"), config(&directory))?;
    let log = fs::File::create(directory.join("log"))?;
    // Only its network is the node's: sandboxes' namespaces are mounted where the node can see them.
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", lab.lab.host.path().display()))
        .args(["containerd", "--config"])
        .arg(directory.join("config.toml"))
        .stdout(log.try_clone()?)
        .stderr(log);
    let running = Running::start("containerd", &mut command)?;
    let cri = Cri::new(directory.join("sock"));
    let containerd = Containerd {
        cri,
        sandboxes: Vec::new(),
        running: Some(running),
        directory,
    };
    containerd.ready()?;
    containerd.import()?;
    Ok(containerd)
}

fn config(directory: &Path) -> String {
    let path = |name: &str| directory.join(name).display().to_string();
    format!(
        r#"version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{sock}"
[ttrpc]
  address = "{sock}.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{conf}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"#,
        root = path("root"),
        state = path("state"),
        sock = path("sock"),
        bin = path("bin"),
        conf = path("net.d"),
        image = image::NAME,
    )
}

impl Containerd {
    fn ready(&self) -> Result<()> {
        command::until("a ready containerd", Duration::from_secs(30), || {
            let unready = self.cri.unready()?;
            anyhow::ensure!(unready.is_empty(), "{unready:?}");
            Ok(())
        })
        .with_context(|| self.log())
    }

    fn log(&self) -> String {
        let text = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn import(&self) -> Result<()> {
        let archive = image::archive(&self.directory)?;
        let socket = self.directory.join("sock");
        command::run(&[
            "ctr",
            "--address",
            &socket.to_string_lossy(),
            "--namespace",
            "k8s.io",
            "images",
            "import",
            "--snapshotter",
            "native",
            &archive.to_string_lossy(),
        ])
        .map(drop)
    }

    /// Runs a pod's sandbox; returns its id, addresses, namespace and CNI result.
    pub(crate) fn pod(&mut self, name: &str, ports: Vec<PortMapping>) -> Result<Pod> {
        let metadata = Metadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "shop".into(),
            attempt: 0,
        };
        let config = SandboxConfig {
            metadata: Some(metadata),
            hostname: name.into(),
            log_directory: String::new(),
            port_mappings: ports,
            annotations: HashMap::from([("kubernetes.io/egress-bandwidth".into(), "100M".into())]),
        };
        let id = self.cri.run(config).with_context(|| self.log())?;
        self.sandboxes.push(id.clone());
        let status = self.cri.status(&id)?;
        let netns = status.info["runtimeSpec"]["linux"]["namespaces"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|namespace| namespace["type"] == "network")
            .and_then(|namespace| namespace["path"].as_str())
            .context("no namespace in the status")?
            .to_owned();
        Ok(Pod {
            id,
            ips: status.ips,
            netns,
            result: status.info["cniResult"].clone(),
        })
    }

    pub(crate) fn remove(&mut self, id: &str) -> Result<()> {
        self.cri.stop(id)?;
        self.cri.remove(id)?;
        self.sandboxes.retain(|sandbox| sandbox != id);
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for id in std::mem::take(&mut self.sandboxes) {
            if let Err(error) = self.remove(&id) {
                eprintln!("a sandbox stays behind: {error:#}");
            }
        }
        if let Some(mut running) = self.running.take() {
            running.stop(Duration::from_secs(20));
        }
    }
}

pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) ips: Vec<String>,
    netns: String,
    pub(crate) result: Value,
}

impl Pod {
    pub(crate) fn run(&self, words: &[&str]) -> Result<String> {
        let net = format!("--net={}", self.netns);
        let mut all = vec!["nsenter", &net];
        all.extend(words);
        command::run(&all)
    }

    /// Starts the traffic server in the pod.
    pub(crate) fn serve(&self) -> Result<Running> {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns))
            .arg(program("sluice-load"))
            .arg("serve")
            .stdout(std::process::Stdio::null());
        let server = Running::start("sluice-load", &mut command)?;
        command::until("the traffic server", Duration::from_secs(30), || {
            let listening = self.run(&["ss", "-ltnH", "sport", "=", ":7000"])?;
            anyhow::ensure!(!listening.trim().is_empty(), "not listening yet");
            Ok(())
        })?;
        Ok(server)
    }

    pub(crate) fn addresses(&self) -> Result<Vec<String>> {
        let found: Value =
            serde_json::from_str(&self.run(&["ip", "-j", "addr", "show", "dev", "eth0"])?)?;
        let infos = found[0]["addr_info"].as_array().context("no addresses")?;
        let global = infos.iter().filter(|info| info["scope"] == "global");
        Ok(global
            .map(|info| info["local"].as_str().unwrap_or_default().to_owned())
            .collect())
    }
}

pub(crate) fn skipped(test: &str) -> bool {
    let wanted = [
        Root,
        Kvm,
        Tool("containerd"),
        Tool("ctr"),
        Tool("runc"),
        Tool("nsenter"),
        Tool("ping"),
    ];
    let plugin = Path::new(REFERENCE).join("loopback");
    if plugin.exists() {
        return !need::met(test, &wanted);
    }
    need::skip(
        test,
        &format!("needs {} (containernetworking-plugins)", plugin.display()),
    );
    true
}
