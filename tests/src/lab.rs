//! A node with pods, in namespaces of its own: made, used, and gone without a trace.
//!
//! The node's "host" is a namespace as well, so that nothing of a lab touches the machine's own network.

use crate::command::{self, Running};
use crate::netns::Netns;
use crate::traffic;
use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt,
};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// How a pod is joined to its tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// A veth pair whose host end is glued to the tap.
    Veth,
    /// The tap itself is the pod's `eth0`.
    Tap,
}

impl Wiring {
    /// The word in the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Tap => "tap",
        }
    }
}

/// What a lab is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `kvm`, `process`, `tcg` or `auto`; by default what the variable `SLUICE_ISOLATION` says.
    pub isolation: String,
    pub pods: usize,
    pub wiring: Wiring,
    /// MiB of guest memory.
    pub memory: u32,
    /// Subnets for pods that a runtime adds through the CNI plugin.
    pub pod_cidrs: Vec<String>,
    /// The node's own addresses, where host ports are served.
    pub node_addresses: Vec<String>,
    /// Which node this is: its pods are 10.244.n.x and fd00:244:0:n::x.
    pub number: u8,
    /// The MTU of its pods.
    pub mtu: u16,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            isolation: std::env::var("SLUICE_ISOLATION").unwrap_or_else(|_| "auto".into()),
            pods: 2,
            wiring: Wiring::Veth,
            memory: 64,
            pod_cidrs: Vec::new(),
            node_addresses: Vec::new(),
            number: 0,
            mtu: 1500,
        }
    }
}

/// One pod: a namespace that the node gave an `eth0`.
#[derive(Debug)]
pub struct Pod {
    pub name: String,
    pub netns: Netns,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

/// A running node.
#[derive(Debug)]
pub struct Lab {
    // Order matters: the node ends before the namespaces that it works in.
    node: Option<Running>,
    pub pods: Vec<Pod>,
    pub host: Netns,
    directory: PathBuf,
}

/// The built programs: beside the running one, or where `SLUICE_BIN` says.
pub fn program(name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os("SLUICE_BIN") {
        return Path::new(&folder).join(name);
    }
    let here = std::env::current_exe().unwrap_or_default();
    here.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.exists())
        .unwrap_or_else(|| PathBuf::from(name))
}

/// The guest image: where `SLUICE_IMAGE` says, or where the guest profile builds it.
pub fn image() -> PathBuf {
    std::env::var_os("SLUICE_IMAGE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest/sluice-appliance"),
        PathBuf::from,
    )
}

impl Lab {
    /// Makes the namespaces and starts the node; returns when the node says that it forwards.
    ///
    /// # Errors
    /// With the node's own last words if it does not come up. Nothing is left then.
    pub fn start(plan: &Plan) -> Result<Self> {
        let mut lab = Self::prepare(plan)?;
        lab.start_node()?;
        Ok(lab)
    }

    /// Makes the namespaces and the configuration, starts nothing.
    ///
    /// # Errors
    /// If a namespace cannot be made.
    pub fn prepare(plan: &Plan) -> Result<Self> {
        let host = Netns::new("node")?;
        let directory = std::env::temp_dir().join(host.name());
        std::fs::create_dir_all(&directory)?;
        let pods = (0..plan.pods).map(|index| Pod::new(plan.number, index));
        let pods = pods.collect::<Result<Vec<_>>>()?;
        let lab = Self {
            node: None,
            pods,
            host,
            directory,
        };
        std::fs::write(
            lab.config_path(),
            serde_json::to_vec_pretty(&lab.config(plan))?,
        )?;
        Ok(lab)
    }

    fn config(&self, plan: &Plan) -> Value {
        let pods: Vec<_> = self
            .pods
            .iter()
            .map(|pod| {
                json!({
                    "name": pod.name,
                    "netns": pod.netns.path(),
                    "addresses": [pod.v4.to_string(), pod.v6.to_string()],
                    "wiring": plan.wiring.word(),
                })
            })
            .collect();
        json!({
            "run_dir": self.run_dir(),
            "image": image(),
            "vmm": program("sluice-vmm"),
            "isolation": plan.isolation,
            "memory_mib": plan.memory,
            "mtu": plan.mtu,
            "pods": pods,
            "cni": {
                "pod_cidrs": plan.pod_cidrs,
                "node_addresses": plan.node_addresses,
                "state_dir": self.directory.join("state"),
            },
        })
    }

    /// Adds the way to other nodes to the configuration of a node that is not started yet.
    ///
    /// # Errors
    /// If the file cannot be changed.
    pub fn configure_uplink(&self, uplink: &Value) -> Result<()> {
        self.change_config(|config| config["uplink"] = uplink.clone())
    }

    /// Changes the configuration of a node that is not started yet.
    ///
    /// # Errors
    /// If the file cannot be changed.
    pub fn change_config(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let path = self.config_path();
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        change(&mut config);
        std::fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(())
    }

    /// The node's run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// The manifests of a lab that follows any.
    pub fn manifests(&self) -> PathBuf {
        self.directory.join("manifests")
    }

    fn config_path(&self) -> PathBuf {
        self.directory.join("node.json")
    }

    /// Where the node's log goes.
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("node.log")
    }

    /// Starts the node daemon (again) and waits until it is healthy.
    ///
    /// # Errors
    /// With the end of its log if it does not become healthy in time.
    pub fn start_node(&mut self) -> Result<()> {
        self.spawn_node()?;
        self.healthy(Duration::from_secs(60))
    }

    /// Starts the node daemon and waits until it answers, healthy or not.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn start_node_only(&mut self) -> Result<()> {
        self.spawn_node()?;
        command::until("an answer of the node", Duration::from_secs(20), || {
            self.status().map(drop)
        })
    }

    fn spawn_node(&mut self) -> Result<()> {
        self.node = Some(self.another_daemon(&[])?);
        Ok(())
    }

    /// Starts one more daemon with the same configuration and these flags; it writes to the same log.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn another_daemon(&self, flags: &[&str]) -> Result<Running> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let mut command = self.host.command(program("sluice-node"));
        command.arg("--config").arg(self.config_path()).args(flags);
        command
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log));
        Running::start("sluice-node", &mut command)
    }

    /// Takes this daemon for the node's from now on.
    pub fn follow_daemon(&mut self, daemon: Running) {
        self.node = Some(daemon);
    }

    /// Waits until the node says that it is healthy.
    ///
    /// # Errors
    /// With the end of the node's log if it does not in `patience`.
    pub fn healthy(&mut self, patience: Duration) -> Result<()> {
        let node = self.node.as_mut().context("the node was not started")?;
        let (program, run_dir) = (program("sluice"), self.directory.join("run"));
        let ready = command::until("a healthy node", patience, || {
            if !node.is_running() {
                return Ok(Err("sluice-node has ended"));
            }
            let words = [
                &program.to_string_lossy(),
                "--run-dir",
                &run_dir.to_string_lossy(),
                "status",
            ];
            command::run(&words).map(|_| Ok(()))
        });
        let problem = match ready {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(ended)) => anyhow::Error::msg(ended),
            Err(late) => late,
        };
        Err(problem.context(format!("the node's log ends with:\n{}", self.log_tail())))
    }

    /// The last lines of the node's log.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// `sluice status -o json`, also of a node that is not healthy.
    ///
    /// # Errors
    /// If the node does not answer.
    pub fn status(&self) -> Result<Value> {
        let output = self.sluice(&["status", "-o", "json"])?;
        serde_json::from_str(&output).context("the status is not JSON")
    }

    /// Runs `sluice` against this node and returns what it printed, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot start or printed nothing.
    pub fn sluice(&self, words: &[&str]) -> Result<String> {
        let program = program("sluice");
        let run_dir = self.run_dir();
        let mut all = vec![program.to_str().context("path")?, "--run-dir"];
        all.push(run_dir.to_str().context("path")?);
        all.extend(words);
        let output = command::output(&all)?;
        if output.stdout.is_empty() && !output.status.success() {
            anyhow::bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The daemon's process, for tests that hurt it.
    pub fn node(&mut self) -> Option<&mut Running> {
        self.node.as_mut()
    }

    /// Forgets the daemon's process after it was killed, so that [`Self::start_node`] can start another.
    pub fn forget_node(&mut self) {
        self.node = None;
    }

    /// Starts the traffic server in `pod`.
    ///
    /// # Errors
    /// If it does not listen within a few seconds.
    pub fn serve(&self, pod: usize) -> Result<Running> {
        traffic::serve(&self.pods.get(pod).context("no such pod")?.netns)
    }

    /// Runs the traffic client in `pod`.
    ///
    /// # Errors
    /// If it fails; with what it said.
    pub fn load(&self, pod: usize, words: &[&str]) -> Result<crate::load::Outcome> {
        traffic::load(&self.pods.get(pod).context("no such pod")?.netns, words)
    }
}

impl Lab {
    /// The appliance's process, whether a daemon looks after it or not: it listens on the ports socket.
    ///
    /// # Errors
    /// If there is none.
    pub fn appliance(&self) -> Result<Pid> {
        let kind = SockType::SeqPacket;
        let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let path = self.run_dir().join("ports.sock");
        connect(socket.as_raw_fd(), &UnixAddr::new(&path)?)?;
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
        Ok(Pid::from_raw(peer.pid()))
    }

    /// Ends the process that a daemon left behind: it was killed, or its configuration says so.
    fn end_left_appliance(&self) {
        if let Ok(pid) = self.appliance() {
            let _gone_already = kill(pid, Signal::SIGKILL);
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(node) = &mut self.node {
            node.stop(Duration::from_secs(10));
        }
        self.end_left_appliance();
        let keep = std::env::var_os("SLUICE_KEEP_LOGS").is_some();
        if !keep && let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("{} stays behind: {error}", self.directory.display());
        }
    }
}

impl Pod {
    /// Its addresses as text, IPv4 first.
    pub fn addresses(&self) -> [String; 2] {
        [self.v4.to_string(), self.v6.to_string()]
    }

    fn new(node: u8, index: usize) -> Result<Self> {
        let name = format!("pod-{index}");
        let last = u8::try_from(index + 2).context("too many pods for a /24")?;
        Ok(Self {
            netns: Netns::new(&name)?,
            name,
            v4: Ipv4Addr::new(10, 244, node, last),
            v6: Ipv6Addr::new(0xfd00, 0x244, 0, node.into(), 0, 0, 0, last.into()),
        })
    }
}
