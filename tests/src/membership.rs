//! Nodes of ours that know each other from Node objects: each follows a directory of manifests of its own.

use crate::lab::{Lab, Plan};
use crate::policy;
use crate::underlay::{Underlay, node4, node6, pods_of};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// The name of node `number`.
pub fn name(number: u8) -> String {
    format!("node-{number}")
}

/// Node `number` as an object: its addresses on the wire and its pods, without annotations.
pub fn object(number: u8) -> Value {
    let address = |address| json!({"type": "InternalIP", "address": address});
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name(number)},
        "spec": {"podCIDRs": pods_of(number)},
        "status": {"addresses": [address(node4(number)), address(node6(number))]},
    })
}

/// Writes a Node object into a node's manifests.
///
/// # Errors
/// As the file system says.
pub fn write(lab: &Lab, node: &Value) -> Result<()> {
    let name = node["metadata"]["name"].as_str().context("a name")?;
    policy::write(lab, &format!("{name}.json"), &format!("{node:#}\n"))
}

/// Takes a Node object away.
///
/// # Errors
/// As the file system says.
pub fn remove(lab: &Lab, number: u8) -> Result<()> {
    policy::remove(lab, &format!("{}.json", name(number)))
}

/// Node `number` with a pod, which knows of no other: not started yet. `uplink` is added to its uplink's configuration.
///
/// # Errors
/// If a namespace cannot be made.
pub fn prepare(underlay: &Underlay, number: u8, mtu: u16, uplink: &Value) -> Result<Lab> {
    let plan = Plan {
        pods: 1,
        number,
        mtu,
        ..Plan::default()
    };
    let lab = underlay.node(&plan, &json!({}), &[])?;
    std::fs::create_dir_all(lab.manifests())?;
    lab.change_config(|config| {
        config["node_name"] = name(number).into();
        config["source"] = json!({"directory": lab.manifests()});
        // What nodes tell each other is enough.
        config["uplink"] = json!({"interface": "eth0"});
        for (key, value) in uplink.as_object().into_iter().flatten() {
            config["uplink"][key] = value.clone();
        }
    })?;
    write(&lab, &object(number))?;
    Ok(lab)
}

/// What a node says of another one.
///
/// # Errors
/// If it does not answer, or says nothing of it.
pub fn seen(lab: &Lab, name: &str) -> Result<Value> {
    let peers: Vec<Value> = serde_json::from_str(&lab.sluice(&["peers", "-o", "json"])?)?;
    let mut peers = peers.into_iter();
    let peer = peers.find(|peer| peer["name"] == name);
    peer.with_context(|| format!("nothing is said of {name}"))
}
