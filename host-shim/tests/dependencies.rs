//! What the daemon is made of: nothing by which it could read a ring or map guest memory.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panic")]

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

/// The names of all crates that a crate of the workspace links, itself among them, whatever the features.
fn linked(root: &str) -> BTreeSet<String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let metadata = command
        .args(["metadata", "--offline", "--format-version", "1"])
        .args([
            "--manifest-path",
            concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
        ])
        .output()
        .unwrap();
    let problem = String::from_utf8_lossy(&metadata.stderr);
    assert!(metadata.status.success(), "{problem}");
    let metadata: Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let named = |wanted: &str| {
        let found = packages.iter().find(|it| it["name"] == wanted);
        found.unwrap_or_else(|| unreachable!("no {wanted}"))["id"].clone()
    };
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let (mut open, mut seen) = (vec![named(root)], BTreeSet::new());
    while let Some(id) = open.pop() {
        let package = packages.iter().find(|it| it["id"] == id).unwrap();
        if !seen.insert(package["name"].as_str().unwrap().to_owned()) {
            continue;
        }
        let node = nodes.iter().find(|it| it["id"] == id).unwrap();
        // Those for tests and for building have a kind.
        let is_linked = |dependency: &&Value| {
            let kinds = dependency["dep_kinds"].as_array().unwrap();
            kinds.iter().any(|it| it["kind"].is_null())
        };
        let dependencies = node["deps"].as_array().unwrap().iter().filter(is_linked);
        open.extend(dependencies.map(|it| it["pkg"].clone()));
    }
    seen
}

#[test]
fn the_daemon_links_nothing_that_moves_a_frame() {
    let daemon = linked("sluice-host");
    assert!(daemon.contains("sluice-ports"), "{daemon:?}");
    for foreign in [
        "sluice-trunk",
        "sluice-vmm",
        "vm-memory",
        "virtio-queue",
        "vhost",
    ] {
        assert!(!daemon.contains(foreign), "the daemon links {foreign}");
    }
    // The same look finds them where they are.
    let trunk = linked("sluice-trunk");
    assert!(
        trunk.contains("vm-memory") && trunk.contains("sluice-ports"),
        "{trunk:?}"
    );
}
