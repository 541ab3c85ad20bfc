//! What a node says of itself: status, links, drops. The types are the API's and the CLI's alike.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sluice_contract::message::Counter;
use sluice_contract::report::{CounterId, DropReason};
use sluice_contract::{Key, LinkId};
use sluice_ports::drops::HostDrop;
use sluice_ports::message::Status as PortsStatus;
use sluice_ports::message::{CarriedCounts, Drive, DropCounts, PortCounters};

use super::Node;
use super::links::{Link, SavedLink};
use super::ways::WayReport;
use crate::announce::AnnounceReport;
use crate::cluster::Cluster;
use crate::cluster::report::ClusterReport;
use crate::uplink::report::NetworkReport;

/// How long a report waits for the appliance's counters.
const GUEST_COUNTERS: Duration = Duration::from_millis(500);

/// Refused rows that are problems each; `control.refused` has more.
const REFUSED: usize = 10;

/// Everything about the node at a glance.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub node_version: &'static str,
    pub contract_version: u16,
    /// Nothing is wrong.
    pub healthy: bool,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
    pub uptime_ms: u64,
    pub machine: crate::supervisor::MachineStatus,
    pub trunk: TrunkReport,
    pub control: crate::control::ControlStatus,
    /// Where policy and Services come from; absent when the configuration names no source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterReport>,
    /// This node's end of the tunnel and all other nodes; absent when the configuration names no uplink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkReport>,
    /// What others are told; absent when the configuration names nobody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce: Option<AnnounceReport>,
    /// The MTU of a pod that is linked now.
    pub pod_mtu: u16,
    pub start: StartTimes,
    pub links: Vec<LinkReport>,
    /// The way to other nodes and to the outside, if there is one.
    pub uplink: Option<WayReport>,
    /// The way to the node itself.
    pub host_link: Option<WayReport>,
    /// The plugin's calls, by name.
    pub cni: BTreeMap<String, u64>,
    /// What the appliance counted, by name; absent when it does not answer.
    pub guest: Option<BTreeMap<String, u64>>,
}

/// The trunk, as the appliance's process serves it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TrunkReport {
    /// The process answers on its ports socket.
    pub connected: bool,
    /// Both rings are served.
    pub serving: bool,
    /// How many ports are.
    pub ports: u16,
    /// Frames wait in the ports; nothing moves.
    pub held: bool,
    pub frozen: bool,
    /// Feature bits the guest accepted.
    pub features: String,
    /// What this kernel's taps can do.
    pub offloads: Vec<String>,
    /// Which thread moves the frames, and why.
    pub drive: Drive,
    pub drive_reason: String,
    /// What it costs to leave the guest and to enter it again, as measured at its start.
    pub exit_nanos: Option<u32>,
    /// Times the guest was interrupted.
    pub calls: u64,
    /// Steps that moved frames.
    pub busy_steps: u64,
    /// Times that thread went to sleep.
    pub sleeps: u64,
    /// Times frames waited in the taps for the guest.
    pub starved: u64,
    /// Rings stopped because the guest broke them.
    pub broken: u64,
}

/// Milliseconds from the start of the appliance's process; absent when it has not come so far, the first also when an earlier
/// daemon started it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StartTimes {
    pub to_configured_ms: Option<f64>,
    pub to_first_forwarded_ms: Option<f64>,
}

/// One link.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LinkReport {
    pub id: u16,
    pub pod: String,
    pub netns: PathBuf,
    pub interface: String,
    pub addresses: Vec<IpAddr>,
    pub mac: String,
    pub mtu: u16,
    pub wiring: crate::wiring::Mode,
    pub from_pod: CarriedReport,
    pub to_pod: CarriedReport,
    /// Frames of this link that ended on the host, by reason.
    pub drops: BTreeMap<String, u64>,
}

/// What went one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedReport {
    pub frames: u64,
    pub bytes: u64,
    /// Segmentation-offload frames among them.
    pub gso: u64,
}

/// A way for a packet to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropReport {
    /// `host` or `appliance`.
    pub place: String,
    /// The pod whose link it was, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    pub reason: String,
    pub count: u64,
    pub meaning: String,
}

impl From<CarriedCounts> for CarriedReport {
    fn from(carried: CarriedCounts) -> Self {
        let CarriedCounts { frames, bytes, gso } = carried;
        Self { frames, bytes, gso }
    }
}

impl LinkReport {
    /// A link and the counters of its port; without, nothing is counted.
    pub(crate) fn new(saved: &SavedLink, counters: Option<&PortCounters>) -> Self {
        let none = PortCounters::default();
        let counters = counters.unwrap_or(&none);
        Self {
            id: saved.id.raw(),
            pod: saved.pod.name.clone(),
            netns: saved.pod.netns.clone(),
            interface: saved.pod.interface.clone(),
            addresses: saved.pod.addresses.clone(),
            mac: saved.mac.to_string(),
            mtu: saved.mtu,
            wiring: saved.wiring,
            from_pod: counters.to_guest.into(),
            to_pod: counters.from_guest.into(),
            drops: named_drops(&counters.drops),
        }
    }
}

/// Drops by the name of their reason. One that this daemon does not know has its number for a name.
pub(super) fn named_drops(counts: &DropCounts) -> BTreeMap<String, u64> {
    let name = |code| match HostDrop::from_code(code) {
        Some(reason) => reason.name().to_owned(),
        None => format!("reason_{code}"),
    };
    counts
        .iter()
        .map(|(code, count)| (name(*code), *count))
        .collect()
}

impl Node {
    /// Everything at a glance.
    pub fn status(&self) -> Status {
        let machine = self.supervisor.status();
        let control = self.control.status();
        let ports = self.ports.status();
        let first_sent = ports.as_ref().and_then(|it| it.first_sent_micros);
        let counters = self.ports.counters();
        let trunk = self.trunk_report(ports);
        let mut problems = Vec::new();
        problems.extend(machine.problem.clone());
        if machine.pid.is_none() && machine.isolation != "external" {
            problems.push("No appliance is running".into());
        }
        if !trunk.serving {
            problems.push("The appliance does not serve the trunk".into());
        }
        problems.extend(control.problem.clone());
        problems.extend(control.full.clone());
        let cluster = self.cluster.as_ref().map(Cluster::report);
        problems.extend(cluster.iter().flat_map(Cluster::problems));
        problems.extend(self.taint_problem());
        problems.extend(self.way_problems());
        if !control.settled {
            problems.push("The appliance does not have the present configuration".into());
        }
        problems.extend(control.refused.iter().take(REFUSED).cloned());
        if let Some(more @ 1..) = control.refused_rows.checked_sub(REFUSED) {
            problems.push(format!("{more} more rows are not in force"));
        }
        Status {
            node_version: env!("CARGO_PKG_VERSION"),
            contract_version: sluice_contract::VERSION,
            healthy: problems.is_empty(),
            problems,
            uptime_ms: self.started.elapsed().as_millis() as u64,
            network: self.network_report(),
            announce: self.announce_report(),
            pod_mtu: self.pod_mtu(),
            start: self.start_times(first_sent),
            links: self.links_with(&counters),
            uplink: self.way_report(LinkId::UPLINK, &counters),
            host_link: self.way_report(LinkId::HOST, &counters),
            cni: self.cni.get().map(|it| it.report()).unwrap_or_default(),
            guest: self.guest_counters().map(|counters| by_name(&counters)),
            machine,
            trunk,
            control,
            cluster,
        }
    }

    fn taint_problem(&self) -> Option<String> {
        let reason = self.taint.get()?.problem()?;
        Some(format!(
            "The taint of the Node object cannot be changed: {reason}"
        ))
    }

    /// Why no pod can be served now, if so. Does not ask the guest: cheap.
    pub fn appliance_problem(&self) -> Option<String> {
        let control = self.control.status();
        if !control.connected {
            return Some("The appliance is not connected".into());
        }
        if let Some(problem) = control.problem {
            return Some(problem);
        }
        (!self.ports.are_served()).then(|| "The appliance does not serve the trunk".into())
    }

    /// Why the appliance does not have a link, if so.
    pub fn link_problem(&self, link: &Link) -> Option<String> {
        self.control.problem_of(Key::Link(link.saved.id))
    }

    /// How many rows of the node's own the appliance refused.
    pub fn refused_rows(&self) -> usize {
        self.control.refused_of_node()
    }

    /// All links.
    pub fn link_reports(&self) -> Vec<LinkReport> {
        self.links_with(&self.ports.counters())
    }

    /// One of them.
    pub fn link_report(&self, link: &Link) -> LinkReport {
        let id = link.saved.id.raw();
        LinkReport::new(&link.saved, self.ports.counters().get(&id))
    }

    fn links_with(&self, counters: &BTreeMap<u16, PortCounters>) -> Vec<LinkReport> {
        let links = self.links();
        let report = |link: &Link| {
            let id = link.saved.id.raw();
            LinkReport::new(&link.saved, counters.get(&id))
        };
        links.all().map(report).collect()
    }

    /// Every way in which packets ended, on the host and in the appliance; absent when the appliance does not answer.
    pub fn drop_reports(&self) -> Vec<DropReport> {
        let status = self.ports.status().unwrap_or_default();
        let mut reports: Vec<_> = on_host(None, &status.drops).collect();
        let counters = self.ports.counters();
        for link in self.links().all() {
            if let Some(port) = counters.get(&link.saved.id.raw()) {
                reports.extend(on_host(Some(&link.saved.pod.name), &port.drops));
            }
        }
        let guest = self.guest_counters().unwrap_or_default();
        let dropped = guest.iter().filter_map(|counter| match counter.id {
            CounterId::Dropped(reason) => Some((reason, counter.value)),
            _ => None,
        });
        reports.extend(dropped.map(in_appliance));
        reports
    }

    fn guest_counters(&self) -> Option<Vec<Counter>> {
        self.control.counters(GUEST_COUNTERS)
    }

    fn trunk_report(&self, status: Option<PortsStatus>) -> TrunkReport {
        let connected = status.is_some();
        let status = status.unwrap_or_default();
        TrunkReport {
            connected,
            serving: status.serving,
            ports: status.ports,
            held: status.held,
            frozen: status.frozen,
            features: format!("{:#x}", status.features),
            offloads: self
                .taps
                .to_string()
                .split(',')
                .map(str::to_owned)
                .collect(),
            drive: status.drive,
            drive_reason: status.reason.text().into(),
            exit_nanos: status.exit_nanos,
            calls: status.calls,
            busy_steps: status.busy,
            sleeps: status.sleeps,
            starved: status.starved,
            broken: status.broken,
        }
    }

    fn start_times(&self, first_sent_micros: Option<u64>) -> StartTimes {
        let configured = || {
            let started = self.supervisor.started_at()?;
            let time = self
                .control
                .in_force_at()?
                .checked_duration_since(started)?;
            Some(time.as_secs_f64() * 1000.0)
        };
        StartTimes {
            to_configured_ms: configured(),
            to_first_forwarded_ms: first_sent_micros.map(|micros| micros as f64 / 1000.0),
        }
    }
}

fn on_host<'a>(
    pod: Option<&'a str>,
    counts: &'a DropCounts,
) -> impl Iterator<Item = DropReport> + 'a {
    counts.iter().filter_map(move |(code, count)| {
        let reason = HostDrop::from_code(*code)?;
        Some(DropReport {
            place: "host".into(),
            pod: pod.map(str::to_owned),
            reason: reason.name().into(),
            count: *count,
            meaning: reason.meaning().into(),
        })
    })
}

fn in_appliance((reason, count): (DropReason, u64)) -> DropReport {
    let (place, meaning) = ("appliance".into(), reason.meaning().into());
    DropReport {
        place,
        pod: None,
        reason: reason.name().into(),
        count,
        meaning,
    }
}

fn by_name(counters: &[Counter]) -> BTreeMap<String, u64> {
    counters.iter().map(|c| (name_of(c.id), c.value)).collect()
}

/// The name of a counter in reports: `dropped.spoof`, `link_sent.16`, `gso_forwarded`.
fn name_of(id: CounterId) -> String {
    let of_link = |name: &str, link: LinkId| format!("{name}.{link}");
    match id {
        CounterId::Dropped(reason) => format!("dropped.{}", reason.name()),
        CounterId::LinkReceived(link) => of_link("link_received", link),
        CounterId::LinkReceivedBytes(link) => of_link("link_received_bytes", link),
        CounterId::LinkSent(link) => of_link("link_sent", link),
        CounterId::LinkSentBytes(link) => of_link("link_sent_bytes", link),
        other => snake_case(&format!("{other:?}")),
    }
}

fn snake_case(name: &str) -> String {
    let mut text = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.push(c.to_ascii_lowercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_stable_names() {
        let link = LinkId::new(16).unwrap();
        let cases = [
            (CounterId::Received, "received"),
            (CounterId::GsoForwardedBytes, "gso_forwarded_bytes"),
            (CounterId::LinkSent(link), "link_sent.16"),
            (CounterId::Dropped(DropReason::Spoof), "dropped.spoof"),
        ];
        for (id, name) in cases {
            assert_eq!(name_of(id), name);
        }
    }
}
