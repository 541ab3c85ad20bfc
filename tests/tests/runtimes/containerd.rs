//! containerd and runc: pods made through the CRI, as a kubelet makes them.

use crate::cri::{Cri, Metadata, PortMapping, SandboxConfig};
use crate::{conflist, image};
use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_tests::cni::{CniLab, REFERENCE};
use sluice_tests::command::{self, Running};
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A containerd in the node's namespace, ended with this value; its pods go first.
struct Containerd {
    cri: Cri,
    sandboxes: Vec<String>,
    running: Option<Running>,
    directory: PathBuf,
}

/// Starts containerd with the node's plugin and no other.
fn start(lab: &CniLab) -> Result<Containerd> {
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
    fn pod(&mut self, name: &str, ports: Vec<PortMapping>) -> Result<Pod> {
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

    fn remove(&mut self, id: &str) -> Result<()> {
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

struct Pod {
    id: String,
    ips: Vec<String>,
    netns: String,
    result: Value,
}

impl Pod {
    fn run(&self, words: &[&str]) -> Result<String> {
        let net = format!("--net={}", self.netns);
        let mut all = vec!["nsenter", &net];
        all.extend(words);
        command::run(&all)
    }

    fn addresses(&self) -> Result<Vec<String>> {
        let found: Value =
            serde_json::from_str(&self.run(&["ip", "-j", "addr", "show", "dev", "eth0"])?)?;
        let infos = found[0]["addr_info"].as_array().context("no addresses")?;
        let global = infos.iter().filter(|info| info["scope"] == "global");
        Ok(global
            .map(|info| info["local"].as_str().unwrap_or_default().to_owned())
            .collect())
    }
}

fn skipped(test: &str) -> bool {
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

#[test]
fn two_pods_of_containerd_reach_each_other_and_are_what_the_result_says() {
    if skipped("two_pods_of_containerd_reach_each_other_and_are_what_the_result_says") {
        return;
    }
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let mut containerd = start(&lab).expect("containerd");
        let web = containerd.pod("web", Vec::new()).expect("a pod");
        let shop = containerd.pod("shop", Vec::new()).expect("a pod");
        for pod in [&web, &shop] {
            assert_eq!(
                pod.addresses().expect("eth0"),
                pod.ips,
                "the status has the pod's addresses"
            );
            let of_result: Vec<String> = pod.result["Interfaces"]["eth0"]["IPConfigs"]
                .as_array()
                .expect("a result")
                .iter()
                .map(|ip| ip["IP"].as_str().unwrap_or_default().to_owned())
                .collect();
            assert_eq!(of_result, pod.ips);
            let shown = pod.run(&["ip", "link", "show", "eth0"]).expect("eth0");
            let mac = pod.result["Interfaces"]["eth0"]["Mac"]
                .as_str()
                .expect("a MAC");
            assert!(shown.contains(mac), "{shown}");
        }
        command::until("an answered ping", Duration::from_secs(10), || {
            for ip in &shop.ips {
                web.run(&["ping", "-n", "-c", "1", "-W", "1", ip])?;
            }
            Ok(())
        })
        .expect("pods reach each other");
        // The node knows the pods by their Kubernetes names.
        let links = lab
            .lab
            .sluice(&["link", "list", "-o", "json"])
            .expect("links");
        assert!(
            links.contains("shop/web") && links.contains("shop/shop"),
            "{links}"
        );
        for pod in [web, shop] {
            containerd.cri.stop(&pod.id).expect("stopped");
            // Stops it once more, which is no failure.
            containerd.remove(&pod.id).expect("removed");
        }
        assert_eq!(lab.left().expect("a look"), [""; 0]);
    }
}

#[test]
fn c04_a_pod_of_containerd_is_removed_while_the_node_is_away() {
    if skipped("c04_a_pod_of_containerd_is_removed_while_the_node_is_away") {
        return;
    }
    let mut lab = CniLab::start(Wiring::Veth).expect("a node");
    let mut containerd = start(&lab).expect("containerd");
    let pod = containerd.pod("web", Vec::new()).expect("a pod");
    let node = lab.lab.node().expect("a node");
    node.signal(nix::sys::signal::Signal::SIGKILL);
    node.wait().expect("its end");
    lab.lab.forget_node();
    containerd.remove(&pod.id).expect("removed without a node");
    assert!(
        !lab.held().expect("a look").is_empty(),
        "nobody could free the address yet"
    );
    lab.lab.start_node().expect("a node again");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn b03_host_ports_of_containerd_reach_the_node_and_do_not_clash() {
    if skipped("b03_host_ports_of_containerd_reach_the_node_and_do_not_clash") {
        return;
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let mut containerd = start(&lab).expect("containerd");
    let port = PortMapping {
        protocol: 0,
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    };
    let first = containerd.pod("first", vec![port.clone()]).expect("a pod");
    let second = containerd.pod("second", vec![port]);
    let said = format!("{:#}", second.err().expect("the port is taken"));
    assert!(said.contains("host port 8080/tcp"), "{said}");
    let record = lab
        .lab
        .run_dir()
        .join(format!("attachments/sluice/{}@eth0", first.id));
    let record: Value = serde_json::from_slice(&fs::read(record).expect("a record")).expect("json");
    assert_eq!(record["link"]["ports"][0]["hostPort"], 8080);
    assert_eq!(
        record["link"]["bandwidth"]["egress"]["bits_per_second"],
        100_000_000
    );
    containerd.remove(&first.id).expect("removed");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}
