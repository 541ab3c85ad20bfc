//! A node that pods are added to by the CNI plugin, called as a runtime calls it: environment, standard input, exit status.

use crate::command;
use crate::lab::{Lab, Plan, Wiring, program};
use crate::netns::Netns;
use crate::underlay::{Underlay, node4, node6, pods_of};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where Debian's containernetworking-plugins are.
pub const REFERENCE: &str = "/usr/lib/cni";

/// A node with an appliance and no pods.
#[derive(Debug)]
pub struct CniLab {
    pub lab: Lab,
    directory: PathBuf,
}

/// What a plugin said.
#[derive(Clone, Debug)]
pub struct Said {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Said {
    /// The result of a call that succeeded.
    ///
    /// # Errors
    /// With what it said instead.
    pub fn result(&self) -> Result<Value> {
        anyhow::ensure!(
            self.success,
            "the plugin failed: {} {}",
            self.stdout,
            self.stderr
        );
        if self.stdout.is_empty() {
            Ok(Value::Null)
        } else {
            Ok(serde_json::from_str(&self.stdout)?)
        }
    }

    /// Code and words of a call that failed.
    ///
    /// # Errors
    /// If it succeeded, or said no error object.
    pub fn error(&self) -> Result<(u64, String)> {
        anyhow::ensure!(!self.success, "the plugin succeeded: {}", self.stdout);
        let object: Value = serde_json::from_str(&self.stdout).context(self.stderr.clone())?;
        let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
        let code = object["code"].as_u64().context("an error without code")?;
        Ok((code, format!("{} {}", text("msg"), text("details"))))
    }
}

/// The words of one call.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub verb: &'a str,
    pub container: &'a str,
    /// Path of the namespace; empty for none.
    pub netns: &'a str,
    pub ifname: &'a str,
    pub args: &'a str,
}

impl<'a> Call<'a> {
    /// The usual one: `eth0`.
    pub const fn new(verb: &'a str, container: &'a str, netns: &'a str) -> Self {
        Self {
            verb,
            container,
            netns,
            ifname: "eth0",
            args: "",
        }
    }
}

/// Starts a plugin and gives it its input.
///
/// # Errors
/// If it cannot be started.
pub fn start_plugin(command: &mut Command, call: &Call<'_>, config: &Value) -> Result<Child> {
    let variables = [
        ("CNI_COMMAND", call.verb),
        ("CNI_CONTAINERID", call.container),
        ("CNI_NETNS", call.netns),
        ("CNI_IFNAME", call.ifname),
        ("CNI_ARGS", call.args),
        ("CNI_PATH", REFERENCE),
    ];
    command.envs(variables.into_iter().filter(|(_, value)| !value.is_empty()));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("{:?}", command.get_program()))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    // It may fail before it reads.
    let _not_read = stdin.write_all(config.to_string().as_bytes());
    Ok(child)
}

/// Runs a plugin.
///
/// # Errors
/// If it cannot be started.
pub fn call_plugin(command: &mut Command, call: &Call<'_>, config: &Value) -> Result<Said> {
    let started = Instant::now();
    let output = start_plugin(command, call, config)?.wait_with_output()?;
    Ok(Said {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: started.elapsed(),
    })
}

impl CniLab {
    /// The subnets of the node's pods.
    pub const SUBNETS: [&'static str; 2] = ["10.88.0.0/24", "fd88::/64"];

    /// The node's own addresses.
    pub const NODE: [&'static str; 2] = ["192.0.2.10", "fd02::10"];

    /// A node that forwards.
    ///
    /// # Errors
    /// As the lab's.
    pub fn start(wiring: Wiring) -> Result<Self> {
        let mut cni = Self::prepare(wiring, &Plan::default().isolation)?;
        cni.lab.start_node()?;
        Ok(cni)
    }

    /// A node that is not started.
    ///
    /// # Errors
    /// As the lab's.
    pub fn prepare(wiring: Wiring, isolation: &str) -> Result<Self> {
        let plan = Plan {
            isolation: isolation.into(),
            pods: 0,
            wiring,
            pod_cidrs: Self::SUBNETS.map(Into::into).to_vec(),
            node_addresses: Self::NODE.map(Into::into).to_vec(),
            ..Plan::default()
        };
        Self::of(Lab::prepare(&plan)?)
    }

    /// A node that forwards, with a card on the wire and a way from itself to its pods; it is the wire's node 1.
    ///
    /// # Errors
    /// As the lab's.
    pub fn start_on(underlay: &Underlay, wiring: Wiring) -> Result<Self> {
        let own = [node4(1), node6(1)];
        let plan = Plan {
            pods: 0,
            number: 1,
            wiring,
            pod_cidrs: pods_of(1).to_vec(),
            node_addresses: own.to_vec(),
            ..Plan::default()
        };
        let lab = underlay.node(&plan, &json!({}), &[])?;
        let host_link = json!({"addresses": own, "routes": pods_of(1)});
        lab.change_config(|config| config["host_link"] = host_link)?;
        let mut cni = Self::of(lab)?;
        cni.lab.start_node()?;
        Ok(cni)
    }

    /// The plugin against this node.
    ///
    /// # Errors
    /// If the lab has no directory.
    pub fn of(lab: Lab) -> Result<Self> {
        let directory = lab
            .run_dir()
            .parent()
            .context("the lab's directory")?
            .to_owned();
        Ok(Self { lab, directory })
    }

    /// A file or folder of the lab's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The plugin's configuration with these keys beside the usual.
    pub fn config(&self, version: &str, keys: &Value) -> Value {
        let mut config = json!({
            "cniVersion": version,
            "name": "sluice",
            "type": "sluice-cni",
            "runDir": self.lab.run_dir(),
            "stateDir": self.path("state"),
            "ipam": {"type": "sluice", "dataDir": self.path("networks")},
        });
        for (key, value) in keys.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }

    /// Calls the plugin.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn call(&self, call: &Call<'_>, config: &Value) -> Result<Said> {
        call_plugin(&mut Command::new(program("sluice-cni")), call, config)
    }

    /// Calls a reference plugin in the node's namespace.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn call_reference(&self, name: &str, call: &Call<'_>, config: &Value) -> Result<Said> {
        let program = Path::new(REFERENCE).join(name);
        call_plugin(&mut self.lab.host.command(program), call, config)
    }

    /// Adds a pod to a namespace made for it.
    ///
    /// # Errors
    /// If the plugin fails.
    pub fn add(&self, container: &str, keys: &Value) -> Result<(Netns, Value)> {
        let netns = Netns::new(container)?;
        let path = netns.path();
        let call = Call::new("ADD", container, path.to_str().context("path")?);
        let said = self.call(&call, &self.config("1.1.0", keys))?;
        Ok((netns, said.result()?))
    }

    /// Removes a pod; its namespace may be gone.
    ///
    /// # Errors
    /// If the plugin fails.
    pub fn del(&self, container: &str, netns: &str) -> Result<Said> {
        self.call(
            &Call::new("DEL", container, netns),
            &self.config("1.1.0", &Value::Null),
        )
    }

    /// Addresses that the store says are held.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn held(&self) -> Result<Vec<String>> {
        let dir = self.path("networks/sluice");
        if !dir.exists() {
            return Ok(Vec::new());
        }
        let names = std::fs::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>>>()?;
        Ok(names
            .into_iter()
            .filter(|name| name.parse::<std::net::IpAddr>().is_ok())
            .collect())
    }

    /// Whatever of pods is left in the node: interfaces, links, addresses, records. A DEL that the node was too busy to hear
    /// in time is waited for.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn left(&self) -> Result<Vec<String>> {
        command::until("the kept DELs", Duration::from_secs(60), || {
            let kept = self.path("state/deferred/sluice");
            let mut kept = std::fs::read_dir(kept).into_iter().flatten();
            anyhow::ensure!(kept.next().is_none(), "some are left");
            Ok(())
        })?;
        let mut left = Vec::new();
        for line in self.lab.host.run(&["ip", "-o", "link", "show"])?.lines() {
            let name = line.split(": ").nth(1).unwrap_or_default();
            if name.starts_with("slt") || name.starts_with("slv") {
                left.push(format!("interface {name}"));
            }
        }
        left.extend(self.held()?.into_iter().map(|ip| format!("address {ip}")));
        let links: Value =
            serde_json::from_str(&self.lab.sluice(&["link", "list", "-o", "json"])?)?;
        for link in links.as_array().into_iter().flatten() {
            left.push(format!("link {}", link["pod"]));
        }
        let records = self.lab.run_dir().join("attachments/sluice");
        if records.exists() {
            for entry in std::fs::read_dir(records)? {
                left.push(format!("record {}", entry?.file_name().to_string_lossy()));
            }
        }
        Ok(left)
    }
}

/// The addresses of an interface, as `ip -j addr` has them: `10.88.0.2/32`.
///
/// # Errors
/// If it is not there.
pub fn addresses(netns: &Netns, interface: &str) -> Result<Vec<String>> {
    let text = netns.run(&["ip", "-j", "addr", "show", "dev", interface])?;
    let found: Value = serde_json::from_str(&text)?;
    let infos = found[0]["addr_info"].as_array().context("no addresses")?;
    let global = infos.iter().filter(|info| info["scope"] == "global");
    Ok(global
        .map(|info| {
            format!(
                "{}/{}",
                info["local"].as_str().unwrap_or_default(),
                info["prefixlen"]
            )
        })
        .collect())
}

/// Pings until it is answered.
///
/// # Errors
/// If it is not, for some seconds.
pub fn ping(from: &Netns, to: &str) -> Result<()> {
    command::until("an answered ping", Duration::from_secs(30), || {
        from.run(&["ping", "-n", "-c", "1", "-W", "1", to])
            .map(drop)
    })
}
