//! podman with its CNI backend: a network by conflist, containers of the same image.

use crate::{conflist, image};
use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_tests::cni::{CniLab, REFERENCE};
use sluice_tests::command;
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A podman with directories of its own, in the node's namespace; its containers go with it.
struct Podman<'a> {
    lab: &'a CniLab,
    directory: PathBuf,
}

impl<'a> Podman<'a> {
    fn start(lab: &'a CniLab) -> Result<Self> {
        let directory = lab.path("podman");
        let (bin, conf) = (directory.join("bin"), directory.join("net.d"));
        fs::create_dir_all(&bin)?;
        fs::create_dir_all(&conf)?;
        let plugin = program("sluice-cni").canonicalize()?;
        std::os::unix::fs::symlink(plugin, bin.join("sluice-cni"))?;
        fs::write(
            conf.join("10-sluice.conflist"),
            conflist(lab, "0.4.0").to_string(),
        )?;
        let settings = format!(
            "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [{bin:?}, \"{REFERENCE}\"]\n\
             network_config_dir = {conf:?}\n[engine]\ncgroup_manager = \"cgroupfs\"\n\
             events_logger = \"none\"\nruntime = \"runc\"\n"
        );
        fs::write(directory.join("containers.conf"), settings)?;
        fs::write(
            directory.join("policy.json"),
            r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
        )?;
        let podman = Self { lab, directory };
        let archive = image::archive(&podman.directory)?;
        let policy = podman.directory.join("policy.json");
        let (archive, policy) = (archive.to_string_lossy(), policy.to_string_lossy());
        podman.run(&[
            "load",
            "--quiet",
            "--signature-policy",
            &policy,
            "-i",
            &archive,
        ])?;
        Ok(podman)
    }

    fn run(&self, words: &[&str]) -> Result<String> {
        let path = |name: &str| self.directory.join(name);
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.lab.lab.host.path().display()))
            .arg("podman")
            .arg("--root")
            .arg(path("root"))
            .arg("--runroot")
            .arg(path("runroot"))
            .arg("--tmpdir")
            .arg(path("tmp"))
            .args(["--storage-driver", "vfs"])
            .args(words)
            .env("CONTAINERS_CONF", path("containers.conf"));
        let output = command.output().context("cannot start podman")?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "podman {words:?}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn container(&self, name: &str, more: &[&str]) -> Result<()> {
        let mut words = vec!["run", "--detach", "--name", name, "--network", "sluice"];
        words.extend(["--log-driver", "none", "--pull", "never"]);
        // Its defaults are more than a machine without CAP_SYS_RESOURCE allows.
        words.extend([
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1024:1024",
        ]);
        words.extend(more);
        words.push(image::NAME);
        self.run(&words).map(drop)
    }

    fn inspect(&self, name: &str) -> Result<Value> {
        let found: Value = serde_json::from_str(&self.run(&["inspect", name])?)?;
        Ok(found[0].clone())
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.run(&["rm", "--all", "--force", "--time", "0"]) {
            eprintln!("containers stay behind: {error:#}");
        }
    }
}

fn in_pod(inspected: &Value, words: &[&str]) -> Result<String> {
    let pid = inspected["State"]["Pid"].as_u64().context("no process")?;
    let (target, mut all) = (pid.to_string(), vec!["nsenter", "--net", "--target"]);
    all.push(&target);
    all.extend(words);
    command::run(&all)
}

#[test]
fn containers_of_podman_reach_each_other_and_come_back_after_a_stop() {
    let test = "containers_of_podman_reach_each_other_and_come_back_after_a_stop";
    if !need::met(
        test,
        &[
            Root,
            Kvm,
            Tool("podman"),
            Tool("runc"),
            Tool("nsenter"),
            Tool("ping"),
        ],
    ) {
        return;
    }
    if !Path::new("/usr/bin/conmon").exists() {
        return need::skip(test, "needs conmon");
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let podman = Podman::start(&lab).expect("podman");
    podman
        .container("web", &["--mac-address", "02:00:00:00:00:77"])
        .expect("a container");
    podman
        .container("shop", &["--ip", "10.88.0.99"])
        .expect("a container");
    let (web, shop) = (
        podman.inspect("web").expect("web"),
        podman.inspect("shop").expect("shop"),
    );
    let network = &web["NetworkSettings"]["Networks"]["sluice"];
    assert_eq!(network["MacAddress"], "02:00:00:00:00:77");
    assert_eq!(
        shop["NetworkSettings"]["Networks"]["sluice"]["IPAddress"],
        "10.88.0.99"
    );
    let shown = in_pod(&web, &["ip", "addr", "show", "eth0"]).expect("eth0");
    let address = network["IPAddress"].as_str().expect("an address");
    assert!(
        shown.contains(&format!("{address}/32")) && shown.contains("02:00:00:00:00:77"),
        "{shown}"
    );
    command::until("an answered ping", Duration::from_secs(30), || {
        in_pod(&web, &["ping", "-n", "-c", "1", "-W", "1", "10.88.0.99"])
    })
    .expect("containers reach each other");
    // The same container id is attached again: under its old name, with another address.
    podman
        .run(&["stop", "--time", "0", "web"])
        .expect("stopped");
    podman.run(&["start", "web"]).expect("started");
    let again = podman.inspect("web").expect("web");
    let address = again["NetworkSettings"]["Networks"]["sluice"]["IPAddress"].clone();
    let shown = in_pod(&again, &["ip", "addr", "show", "eth0"]).expect("eth0");
    assert!(
        shown.contains(address.as_str().expect("an address")),
        "{shown}"
    );
    podman
        .run(&["rm", "--all", "--force", "--time", "0"])
        .expect("removed");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}
