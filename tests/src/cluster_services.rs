//! What Sluice claims of Services in a cluster, each shown on a running one. The backend is the pod of node 2 throughout, and
//! what it sees of its clients is what tshark finds at its interface.

use crate::capture::Capture;
use crate::cluster::{Cluster, FAR4, FAR6};
use crate::cluster_claims::Claim;
use crate::cluster_objects::{
    CLUSTER_IPS, CLUSTER_LB, CLUSTER_PORT, HEALTH_PORT, LOCAL_LB, LOCAL_PORT, NOBODYS_IPS,
    NOBODYS_PORT, SERVICE_PORT,
};
use crate::command;
use crate::lab::Lab;
use crate::netns::Netns;
use crate::traffic::{Attempt, PORT, at, attempt, datagrams, serve, stream};
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeSet;
use std::time::Duration;

const BULK: u64 = 1_000_000;
/// For what is to be in force.
const PATIENCE: Duration = Duration::from_secs(20);

/// All of them, by what they say.
pub const ALL: [(&str, Claim); 6] = [
    (
        "ClusterIPs lead to other nodes",
        cluster_ips_lead_across_nodes,
    ),
    (
        "nobody's ClusterIP leads nowhere",
        nobodys_cluster_ip_leads_nowhere,
    ),
    ("node ports serve the outside", node_ports_serve_the_outside),
    ("node ports serve the cluster", node_ports_serve_the_cluster),
    (
        "a load balancer's addresses lead to their Service",
        load_balancers_addresses_lead_to_their_service,
    ),
    (
        "load balancers learn where the endpoints are",
        load_balancers_learn_where_the_endpoints_are,
    ),
];

/// A client reaches the backend by `to`, with TCP and UDP, and the backend sees `source` each time.
pub(crate) fn reached(cluster: &Cluster, client: &Netns, to: &str, source: &str) -> Result<()> {
    let backend = &cluster.pod(2)?.netns;
    let capture = Capture::start(backend, "eth0", &format!("dst port {PORT}"))?;
    stream(client, to, BULK)?;
    datagrams(client, to, "0.02")?;
    let wanted = ["TCP", "UDP"].map(|protocol| (protocol, source.to_owned()));
    let what = format!("{source} at the backend, from {} by {to}", client.name());
    command::until(&what, PATIENCE, || {
        let text = capture.read("")?;
        let seen: BTreeSet<_> = text.lines().filter_map(beginning).collect();
        ensure!(seen == wanted.clone().into(), "the backend sees {seen:?}");
        Ok(())
    })
}

/// Protocol and source of what begins something, out of a line of tcpdump's.
fn beginning(line: &str) -> Option<(&'static str, String)> {
    let protocol = match line.split_once("Flags [") {
        Some((_, flags)) if flags.starts_with("S]") => "TCP",
        Some(_) => return None,
        // What tcpdump makes of the payload depends on the port.
        None => "UDP",
    };
    let (ends, _) = line.split_once(" > ")?;
    let (source, _port) = ends.rsplit(' ').next()?.rsplit_once('.')?;
    Some((protocol, source.to_owned()))
}

/// Frames that node `lab` dropped for `reason`.
pub(crate) fn dropped(lab: &Lab, reason: &str) -> Result<u64> {
    // A busy appliance answers late, and the status then goes without its counters.
    command::until("the appliance's counters", PATIENCE, || {
        let status = lab.status()?;
        let counters = status["guest"].as_object().context("no answer")?;
        let count = counters.get(&format!("dropped.{reason}"));
        Ok(count.and_then(serde_json::Value::as_u64).unwrap_or(0))
    })
}

/// Nothing comes back to the client, and the node counts what it dropped for that reason.
pub(crate) fn silent(
    node: &Lab,
    reason: &str,
    client: &Netns,
    (address, port): (&str, u16),
) -> Result<()> {
    let before = dropped(node, reason)?;
    let seen = command::until("the count of what was dropped", PATIENCE, || {
        let seen = attempt(client, address, port)?;
        let is_counted = dropped(node, reason)? > before;
        ensure!(
            is_counted || seen != Attempt::Silent,
            "{address}:{port}: no {reason}"
        );
        Ok(seen)
    })?;
    ensure!(seen == Attempt::Silent, "{address}:{port}: {seen:?}");
    Ok(())
}

/// Pods and nodes reach a Service's addresses whose backend is on another node, and on their own, as themselves.
///
/// # Errors
/// If they do not, or the backend sees somebody else.
pub fn cluster_ips_lead_across_nodes(cluster: &Cluster) -> Result<String> {
    let _serving = serve(&cluster.pod(2)?.netns)?;
    let (pod, nodes) = (cluster.pod(1)?, [cluster.lab(1)?, cluster.lab(2)?]);
    for (family, address) in CLUSTER_IPS.into_iter().enumerate() {
        let to = at(address, SERVICE_PORT);
        let mut clients = vec![(&pod.netns, pod.addresses())];
        for (number, node) in (1..).zip(nodes) {
            clients.push((&node.host, Cluster::own(number)));
        }
        for (client, own) in clients {
            reached(cluster, client, &to, &own[family])?;
        }
    }
    Ok(
        "a pod and both nodes, TCP and UDP, both families; the backend sees the client itself"
            .into(),
    )
}

/// What pods and nodes send to an address of the ClusterIPs' ranges that no Service has ends at their own node, and nothing of it is on
/// the wire; a port that a Service does not have is refused.
///
/// # Errors
/// If it goes anywhere else.
pub fn nobodys_cluster_ip_leads_nowhere(cluster: &Cluster) -> Result<String> {
    let (pod, node) = (cluster.pod(1)?, cluster.lab(1)?);
    let filter = NOBODYS_IPS.map(|address| format!("host {address}"));
    let wire = Capture::start(&node.host, "eth0", &filter.join(" or "))?;
    for (nobodys, somebodys) in NOBODYS_IPS.into_iter().zip(CLUSTER_IPS) {
        for client in [&pod.netns, &node.host] {
            silent(node, "svc_unallocated", client, (nobodys, SERVICE_PORT))?;
            let seen = attempt(client, somebodys, SERVICE_PORT + 1)?;
            ensure!(seen == Attempt::Refused, "{somebodys}: {seen:?}");
        }
    }
    let left = wire.frames()?.len();
    ensure!(left == 0, "{left} frames went to the wire");
    Ok("dropped at the node, for a pod and for the node itself, in both families".into())
}

/// The outside reaches a Service by a port of any node. With the policy Cluster the backend sees the node, with Local the client;
/// where Local has no backend nobody answers, and where there is none at all it is refused.
///
/// # Errors
/// If anything is otherwise.
pub fn node_ports_serve_the_outside(cluster: &Cluster) -> Result<String> {
    let _serving = serve(&cluster.pod(2)?.netns)?;
    let (outside, near) = (&cluster.outside, Cluster::near());
    for (number, node) in (1..).zip(&cluster.nodes) {
        for (family, own) in Cluster::own(number).iter().enumerate() {
            reached(cluster, outside, &at(own, CLUSTER_PORT), own)?;
            if number == 2 {
                reached(cluster, outside, &at(own, LOCAL_PORT), &near[family])?;
            } else {
                silent(node, "svc_no_local_ep", outside, (own, LOCAL_PORT))?;
            }
            command::until("a refusal", PATIENCE, || {
                let seen = attempt(outside, own, NOBODYS_PORT)?;
                ensure!(seen == Attempt::Refused, "nobody's port: {seen:?}");
                Ok(())
            })?;
        }
    }
    Ok("Cluster: the node's address by every node; Local: the client's, and silence without a backend".into())
}

/// Who is in the cluster reaches ports of nodes as well, also those of a Service that the outside reaches on one node only.
///
/// # Errors
/// If anything is otherwise.
pub fn node_ports_serve_the_cluster(cluster: &Cluster) -> Result<String> {
    let _serving = serve(&cluster.pod(2)?.netns)?;
    let (pod, node) = (cluster.pod(1)?, cluster.lab(1)?);
    let (here, there) = (Cluster::own(1), Cluster::own(2));
    for (family, own) in pod.addresses().iter().enumerate() {
        let (here, there) = (&here[family], &there[family]);
        reached(cluster, &pod.netns, &at(here, CLUSTER_PORT), here)?;
        reached(cluster, &pod.netns, &at(here, LOCAL_PORT), own)?;
        reached(cluster, &pod.netns, &at(there, LOCAL_PORT), own)?;
        reached(cluster, &node.host, &at(there, CLUSTER_PORT), there)?;
        reached(cluster, &node.host, &at(there, LOCAL_PORT), here)?;
    }
    Ok("a pod by its own node and by another, a node by another".into())
}

/// The addresses of a load balancer lead to the Service, from outside by whichever node they are routed to and from pods, but
/// only for clients in the Service's source ranges.
///
/// # Errors
/// If they do not.
pub fn load_balancers_addresses_lead_to_their_service(cluster: &Cluster) -> Result<String> {
    let _serving = serve(&cluster.pod(2)?.netns)?;
    let (outside, near) = (&cluster.outside, Cluster::near());
    for (number, node) in (1..).zip(&cluster.nodes) {
        for (family, own) in Cluster::own(number).iter().enumerate() {
            let way = |address: &str, from: &str| {
                let family = ["-4", "-6"][family];
                let route = ["ip", family, "route", "replace", address, "via", own];
                outside.run(&[&route[..], &["src", from]].concat())
            };
            let (cluster_lb, local_lb) = (CLUSTER_LB[family], LOCAL_LB[family]);
            way(cluster_lb, &near[family])?;
            way(local_lb, &near[family])?;
            reached(cluster, outside, &at(cluster_lb, SERVICE_PORT), own)?;
            if number == 2 {
                let to = at(local_lb, SERVICE_PORT);
                reached(cluster, outside, &to, &near[family])?;
            } else {
                silent(node, "svc_no_local_ep", outside, (local_lb, SERVICE_PORT))?;
            }
            way(cluster_lb, [FAR4, FAR6][family])?;
            silent(
                node,
                "svc_source_range",
                outside,
                (cluster_lb, SERVICE_PORT),
            )?;
        }
    }
    let pod = cluster.pod(1)?;
    for (family, own) in pod.addresses().iter().enumerate() {
        let to = at(LOCAL_LB[family], SERVICE_PORT);
        reached(cluster, &pod.netns, &to, own)?;
    }
    Ok("by every node and from a pod; not for who is in none of its source ranges".into())
}

/// Every node says on the health check port whether it has endpoints of the Service with the policy Local.
///
/// # Errors
/// If one does not, or says something else.
pub fn load_balancers_learn_where_the_endpoints_are(cluster: &Cluster) -> Result<String> {
    for (number, _) in (1..).zip(&cluster.nodes) {
        let (status, count) = match number {
            2 => ("HTTP/1.1 200", 1),
            _ => ("HTTP/1.1 503", 0),
        };
        for own in Cluster::own(number) {
            let ask = format!(
                "exec 3<>/dev/tcp/{own}/{HEALTH_PORT} && printf 'GET / HTTP/1.1\\r\\n\\r\\n' >&3 && cat <&3"
            );
            command::until("an answer", PATIENCE, || {
                let answer = cluster.outside.run(&["timeout", "5", "bash", "-c", &ask])?;
                let endpoints = format!("\"localEndpoints\":{count}");
                ensure!(
                    answer.starts_with(status) && answer.contains(&endpoints),
                    "node {number} says {answer}"
                );
                Ok(())
            })?;
        }
    }
    Ok("one endpoint at node 2, none elsewhere, asked from outside in both families".into())
}
