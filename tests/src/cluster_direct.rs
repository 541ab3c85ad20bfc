//! Direct return across nodes: the outside asks node 1, the pod of node 2 answers, and its answers come from node 2's card.

use crate::capture::Capture;
use crate::cluster::{Cluster, FAR4, FAR6};
use crate::cluster_claims::Claim;
use crate::cluster_objects::{CLUSTER_LB, CLUSTER_PORT, SERVICE_PORT};
use crate::cluster_services::{reached, silent};
use crate::command;
use crate::traffic::{PORT, at, serve};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

pub const CLAIM: (&str, Claim) = (
    "a backend's node answers clients outside itself",
    backends_nodes_answer_themselves,
);

/// What turns it on in a node's configuration.
pub fn turn_on(config: &mut Value) {
    config["services"] = json!({"forwarding": "dsr"});
}

/// Clients keep their address towards a backend on another node than they asked, and its answers pass by no other node, though they
/// come from the address that was asked. Source ranges and policy hold.
///
/// # Errors
/// If anything is otherwise.
pub fn backends_nodes_answer_themselves(cluster: &Cluster) -> Result<String> {
    let _serving = serve(&cluster.pod(2)?.netns)?;
    let (outside, near) = (&cluster.outside, Cluster::near());
    let (asked, of_backend) = (cluster.lab(1)?, cluster.lab(2)?);
    let card = of_backend
        .host
        .run(&["cat", "/sys/class/net/eth0/address"])?;
    for (family, own) in Cluster::own(1).iter().enumerate() {
        let balanced = CLUSTER_LB[family];
        let way = |from: &str| {
            let family = ["-4", "-6"][family];
            let route = ["ip", family, "route", "replace", balanced, "via", own];
            outside.run(&[&route[..], &["src", from]].concat())
        };
        way(&near[family])?;
        for (address, port) in [(own.as_str(), CLUSTER_PORT), (balanced, SERVICE_PORT)] {
            let answers = format!("src host {address} and src port {port}");
            let capture = Capture::start(outside, "eth0", &answers)?;
            reached(cluster, outside, &at(address, port), &near[family])?;
            for protocol in ["tcp", "udp"] {
                let lines = capture.until_fields(protocol, &["eth.src"], 1)?;
                let senders: BTreeSet<&str> = lines.iter().map(|line| line.trim()).collect();
                ensure!(
                    senders == BTreeSet::from([card.trim()]),
                    "{protocol} answers of {address} come from {senders:?}"
                );
            }
        }
        way([FAR4, FAR6][family])?;
        silent(asked, "svc_source_range", outside, (balanced, SERVICE_PORT))?;
        way(&near[family])?;
        // The backend's own node has nothing to pass on.
        let there = &Cluster::own(2)[family];
        reached(cluster, outside, &at(there, CLUSTER_PORT), &near[family])?;
    }
    policy_sees_the_client(cluster)?;
    Ok(format!(
        "a node's port and a load balancer's address, TCP and UDP, both families; port {PORT} of the pod sees the client"
    ))
}

fn policy_sees_the_client(cluster: &Cluster) -> Result<()> {
    let outside = &cluster.outside;
    let own = &Cluster::own(1)[0];
    cluster.objects.deny_all(true)?;
    let denied = command::until("the policy", Duration::from_secs(30), || {
        let end = (own.as_str(), CLUSTER_PORT);
        silent(cluster.lab(2)?, "policy_ingress", outside, end)
    });
    cluster.objects.deny_all(false)?;
    denied?;
    command::until(
        "the outside to be let in again",
        Duration::from_secs(30),
        || {
            reached(
                cluster,
                outside,
                &at(own, CLUSTER_PORT),
                &Cluster::near()[0],
            )
        },
    )
}
