//! `make run`: the node of an example, shown until Ctrl-C.
//!
//! The example's own `node.json` is used as it is; the namespaces that it names are made first and removed at the end.

use crate::command::{self, Running};
use crate::lab::{image, program};
use crate::signals;
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// A namespace with the name that the example gave it.
struct Named(String);

impl Named {
    fn new(name: &str) -> Result<Self> {
        command::run(&["ip", "netns", "add", name])
            .with_context(|| format!("is another `make run` using the namespace {name}?"))?;
        let named = Self(name.to_owned());
        command::run(&["ip", "-n", name, "link", "set", "lo", "up"])?;
        Ok(named)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        crate::netns::remove(&self.0);
    }
}

/// Runs the example until SIGINT or SIGTERM.
///
/// # Errors
/// If the example is not one, or the node does not start; everything made so far is removed.
pub fn run(example: &Path) -> Result<()> {
    let config_path = example.join("node.json");
    let mut config: Value = serde_json::from_slice(
        &std::fs::read(&config_path)
            .with_context(|| format!("{} is no example", example.display()))?,
    )
    .with_context(|| format!("{} is not JSON", config_path.display()))?;
    let pods: Vec<(String, PathBuf)> = config["pods"]
        .as_array()
        .context("the example has no pods")?
        .iter()
        .filter_map(|pod| {
            Some((
                pod["name"].as_str()?.to_owned(),
                PathBuf::from(pod["netns"].as_str()?),
            ))
        })
        .collect();
    let host = Named::new("sluice-example-node")?;
    let mut namespaces = Vec::new();
    for (_, path) in &pods {
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .context("a netns without a name")?;
        namespaces.push(Named::new(name)?);
    }
    let directory = std::env::temp_dir().join("sluice-example");
    std::fs::create_dir_all(&directory)?;
    let _gone = Directory(directory.clone());
    config["run_dir"] = directory.join("run").to_string_lossy().into();
    config["image"] = image().to_string_lossy().into();
    config["vmm"] = program("sluice-vmm").to_string_lossy().into();
    if let Some(manifests) = config["source"]["directory"].as_str() {
        // In an example's file it is meant beside that file.
        let manifests = std::fs::canonicalize(example.join(manifests))?;
        config["source"]["directory"] = manifests.to_string_lossy().into();
    }
    let own = directory.join("node.json");
    std::fs::write(&own, serde_json::to_vec_pretty(&config)?)?;
    let mut node = std::process::Command::new("ip");
    node.args(["netns", "exec", &host.0])
        .arg(program("sluice-node"))
        .arg("--config")
        .arg(&own);
    let mut node = Running::start("sluice-node", node.stdout(Stdio::null()))?;
    show(&mut node, &directory.join("run"), &namespaces)
}

struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}

fn show(node: &mut Running, run_dir: &Path, namespaces: &[Named]) -> Result<()> {
    let (program, run_dir) = (program("sluice"), run_dir.to_string_lossy().into_owned());
    let names: Vec<_> = namespaces.iter().map(|n| n.0.as_str()).collect();
    while !signals::ended() {
        anyhow::ensure!(
            node.is_running(),
            "sluice-node has ended; its messages are above"
        );
        let status =
            command::output(&[&program.to_string_lossy(), "--run-dir", &run_dir, "status"])?;
        print!("\x1b[H\x1b[2J{}", String::from_utf8_lossy(&status.stdout));
        eprint!("{}", String::from_utf8_lossy(&status.stderr));
        println!(
            "\npods: {}   try: ip netns exec {} ping <address>   end: Ctrl-C",
            names.join(", "),
            names[0]
        );
        for _ in 0..10 {
            if signals::ended() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    println!("\nending");
    node.stop(Duration::from_secs(10));
    Ok(())
}
