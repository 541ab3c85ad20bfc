//! The other nodes, and what they must know of this one.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};
use sluice_host::announce::AnnounceReport;
use sluice_host::api::{self, Request};
use sluice_host::uplink::report::{NetworkReport, PeerReport, ProbeState, SizeReport};

use crate::cluster::Failure;
use crate::{Output, table};

/// The other nodes: where they are known from, how they are reached, and why they are not.
pub(crate) fn peers(socket: &Path, output: Output) -> Result<ExitCode, Failure> {
    let network = ask(socket)?;
    let text = match output {
        Output::Json => pretty(&network.peers)?,
        Output::Text => peers_table(&network.peers),
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// This node as a manifest: what others are to be told of it.
pub(crate) fn node(socket: &Path, output: Output) -> Result<ExitCode, Failure> {
    let node = manifest(&ask(socket)?);
    let text = match output {
        Output::Json => pretty(&node)?,
        Output::Text => serde_yaml_ng::to_string(&node).map_err(io::Error::other)?,
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn ask(socket: &Path) -> Result<NetworkReport, Failure> {
    let mut status: Value = api::ask(socket, &Request::Status)?;
    let network = status.get_mut("network").map(Value::take);
    let network = network.ok_or_else(|| io::Error::other("the node has no uplink"))?;
    Ok(serde_json::from_value(network).map_err(io::Error::from)?)
}

fn pretty(value: &impl serde::Serialize) -> io::Result<String> {
    let value = serde_json::to_value(value).map_err(io::Error::from)?;
    Ok(format!("{value:#}\n"))
}

fn manifest(network: &NetworkReport) -> Value {
    let address = |address| json!({"type": "InternalIP", "address": address});
    let addresses: Vec<Value> = network.addresses.iter().map(address).collect();
    let mut spec = json!({"podCIDRs": network.pods});
    if let Some(first) = network.pods.first() {
        spec["podCIDR"] = first.as_str().into();
    }
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": network.node, "annotations": network.annotations},
        "spec": spec,
        "status": {"addresses": addresses},
    })
}

/// What the status says of it, as lines with their names.
pub(crate) fn status_lines(network: &NetworkReport) -> Vec<(&'static str, String)> {
    let tunnel = &network.tunnel;
    let mut lines = vec![(
        "tunnel",
        format!(
            "{} port {} vni {} mac {}, {} with MTU {}",
            tunnel.protocol, tunnel.port, tunnel.vni, tunnel.mac, network.interface, network.mtu
        ),
    )];
    let from = |origin: &str| {
        let used = |it: &&PeerReport| it.origin == origin && it.problem.is_none();
        network.peers.iter().filter(used).count()
    };
    let unused = network.peers.iter().filter(|it| it.problem.is_some());
    lines.push((
        "peers",
        format!(
            "{} of the cluster, {} of the configuration, {} not reached (`sluice peers`)",
            from(sluice_host::uplink::report::ORIGIN_CLUSTER),
            from(sluice_host::uplink::report::ORIGIN_CONFIGURATION),
            unused.clone().count(),
        ),
    ));
    let of_state = |state| move |it: &&PeerReport| it.probe.state == state;
    let count = |state| network.peers.iter().filter(of_state(state)).count();
    lines.push((
        "probes",
        format!(
            "{} answer, {} do not, {} have not yet, {} not probed",
            count(ProbeState::Reachable),
            count(ProbeState::Unreachable),
            count(ProbeState::NoAnswerYet),
            count(ProbeState::NotProbed),
        ),
    ));
    let own = network.wrong.as_ref().map(|why| (&network.node, why));
    let others = unused.filter_map(|it| Some((&it.name, it.problem.as_ref()?)));
    for (name, why) in own.into_iter().chain(others).take(SHOWN) {
        lines.push(("", format!("! node {name}: {why}")));
    }
    let found = |it: &'_ PeerReport| Some((it.name.clone(), it.probe.finding.clone()?));
    for (name, what) in network.peers.iter().filter_map(found).take(SHOWN) {
        lines.push(("", format!("! node {name}: {what}")));
    }
    lines
}

/// What the status says of those who are told what this node serves.
pub(crate) fn announce_lines(announce: &AnnounceReport) -> Vec<(&'static str, String)> {
    let told = announce.routers.iter().filter(|it| it.established).count();
    let mut lines = vec![(
        "announces",
        format!(
            "{} routes, known to {told} of {} routers; {} addresses on the link",
            announce.routes.len(),
            announce.routers.len(),
            announce.answered.len(),
        ),
    )];
    lines.extend(announce.problems.iter().map(|it| ("", format!("! {it}"))));
    let silent = announce.routers.iter().filter(|it| !it.established);
    lines.extend(silent.map(|it| {
        let why = it.problem.as_deref().unwrap_or("no session yet");
        (
            "",
            format!("! router {} (AS {}): {why}", it.address, it.asn),
        )
    }));
    let withheld = announce.withheld.iter().take(SHOWN);
    lines.extend(withheld.map(|it| {
        let why = "it is not within `uplink.service_addresses`";
        ("", format!("! {it} of a Service is not announced: {why}"))
    }));
    lines
}

/// Nodes that cannot be used, in the status; `sluice peers` has all.
const SHOWN: usize = 10;

fn peers_table(peers: &[PeerReport]) -> String {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let row = |it: &PeerReport| {
        [
            it.name.clone(),
            it.origin.clone(),
            or_dash(it.address.map(|address| address.to_string())),
            or_dash(it.way.clone()),
            or_dash(it.mac.clone()),
            or_dash(it.mtu.map(|mtu| mtu.to_string())),
            or_dash(Some(it.pods.join(",")).filter(|pods| !pods.is_empty())),
            it.probe.state.word().into(),
            or_dash(
                it.probe
                    .last_answer_ms
                    .map(|ms| format!("{:.1} s ago", ms as f64 / 1e3)),
            ),
            or_dash(
                it.probe
                    .rtt_us
                    .map(|us| format!("{:.2} ms", us as f64 / 1e3)),
            ),
            lost(&[&it.probe.small, &it.probe.full]),
            or_dash(largest(it)),
            it.problem
                .clone()
                .or_else(|| it.probe.finding.clone())
                .unwrap_or_else(|| "used".into()),
        ]
    };
    let head = [
        "NODE", "FROM", "ADDRESS", "WAY", "MAC", "MTU", "PODS", "ANSWERS", "LAST", "RTT", "LOST",
        "LARGEST", "STATE",
    ];
    table(head, &peers.iter().map(row).collect::<Vec<_>>())
}

/// Of how many probes of each size, small and full.
fn lost(sizes: &[&SizeReport]) -> String {
    let one = |it: &&&SizeReport| format!("{}/{}", it.lost, it.sent);
    let sent = sizes.iter().filter(|it| it.sent > 0);
    let texts: Vec<String> = sent.map(|it| one(&it)).collect();
    if texts.is_empty() {
        return "-".into();
    }
    texts.join(" ")
}

/// What came through, of what should.
fn largest(peer: &PeerReport) -> Option<String> {
    let probe = &peer.probe;
    let largest = probe.largest?;
    Some(format!("{largest}/{}", probe.full.size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::source::dir;

    #[test]
    fn o03_this_node_as_a_manifest_is_read_without_a_finding() {
        let network = NetworkReport {
            node: "here".into(),
            addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            pods: vec!["10.244.1.0/24".into(), "fd00:244:0:1::/64".into()],
            annotations: [("sluice.dev/tunnel-mac".into(), "02:00:00:00:00:01".into())].into(),
            ..NetworkReport::default()
        };
        let directory = std::env::temp_dir().join(format!("sluice-node-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let text = serde_yaml_ng::to_string(&manifest(&network)).unwrap();
        std::fs::write(directory.join("here.yaml"), text).unwrap();
        let report = dir::validate(&directory).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(report.findings, []);
        let node = report.store.node("here").unwrap();
        assert_eq!((node.addresses.len(), node.pod_cidrs.len()), (2, 2));
        assert_eq!(node.annotations, network.annotations);
    }
}
