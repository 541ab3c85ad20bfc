//! What a node says of itself: status, links, drops. The types are the API's and the CLI's alike.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sluice_contract::message::Counter;
use sluice_contract::report::{CounterId, DropReason};
use sluice_contract::{Key, LinkId};

use super::Node;
use super::links::Link;
use super::ways::WayReport;
use crate::announce::AnnounceReport;
use crate::cluster::Cluster;
use crate::cluster::report::ClusterReport;
use crate::uplink::report::NetworkReport;
use sluice_trunk::drops::HostDrop;
use sluice_trunk::links::Carried;
use sluice_trunk::place::Seat;

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

/// The trunk.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TrunkReport {
    pub connected: bool,
    /// Both rings are served.
    pub serving: bool,
    /// Process id of the VMM on the socket.
    pub pid: Option<i32>,
    /// Feature bits the guest accepted.
    pub features: String,
    /// What this kernel's taps can do.
    pub offloads: Vec<&'static str>,
    /// Times the guest was interrupted.
    pub calls: u64,
    /// Steps that moved frames.
    pub busy_steps: u64,
    /// Times the I/O thread went to sleep.
    pub sleeps: u64,
    /// Which cores the trunk's thread takes, seen from the guest's.
    pub seat: Seat,
    /// Times frames waited in the taps for the guest.
    pub starved: u64,
    /// Rings stopped because the guest broke them.
    pub broken: u64,
}

/// Milliseconds from the VMM's start; absent when an earlier daemon started it or it has not come so far.
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

impl From<&Carried> for CarriedReport {
    fn from(carried: &Carried) -> Self {
        let Carried { frames, bytes, gso } = carried;
        Self {
            frames: frames.value(),
            bytes: bytes.value(),
            gso: gso.value(),
        }
    }
}

impl From<&Link> for LinkReport {
    fn from(link: &Link) -> Self {
        let (saved, counters) = (&link.saved, &link.counters);
        Self {
            id: saved.id.raw(),
            pod: saved.pod.name.clone(),
            netns: saved.pod.netns.clone(),
            interface: saved.pod.interface.clone(),
            addresses: saved.pod.addresses.clone(),
            mac: saved.mac.to_string(),
            mtu: saved.mtu,
            wiring: saved.wiring,
            from_pod: (&counters.to_guest).into(),
            to_pod: (&counters.from_guest).into(),
            drops: counters
                .drops
                .seen()
                .map(|(r, n)| (r.name().to_owned(), n))
                .collect(),
        }
    }
}

impl Node {
    /// Everything at a glance.
    pub fn status(&self) -> Status {
        let machine = self.supervisor.status();
        let control = self.control.status();
        let trunk = self.trunk_report();
        let mut problems = Vec::new();
        problems.extend(machine.problem.clone());
        if machine.pid.is_none() && machine.isolation != "external" {
            problems.push("No VMM is running".into());
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
            start: self.start_times(),
            links: self.link_reports(),
            uplink: self.way_report(LinkId::UPLINK),
            host_link: self.way_report(LinkId::HOST),
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

    /// Why no pod can be served now, if so. Asks nobody: cheap.
    pub fn appliance_problem(&self) -> Option<String> {
        let control = self.control.status();
        if !control.connected {
            return Some("The appliance is not connected".into());
        }
        if let Some(problem) = control.problem {
            return Some(problem);
        }
        let is_serving = self.trunk.peer().is_some_and(|peer| peer.serving);
        (!is_serving).then(|| "The appliance does not serve the trunk".into())
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
        self.links().all().map(LinkReport::from).collect()
    }

    /// Every way in which packets ended, on the host and in the appliance; absent when the appliance does not answer.
    pub fn drop_reports(&self) -> Vec<DropReport> {
        let mut reports: Vec<_> = self
            .trunk_counters
            .drops
            .seen()
            .map(|d| on_host(None, d))
            .collect();
        for link in self.links().all() {
            let pod = &link.saved.pod.name;
            reports.extend(
                link.counters
                    .drops
                    .seen()
                    .map(|d| on_host(Some(pod.clone()), d)),
            );
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

    fn trunk_report(&self) -> TrunkReport {
        let peer = self.trunk.peer();
        let o = self.offloads;
        let names = [
            (o.checksum, "checksum"),
            (o.tso4, "tso4"),
            (o.tso6, "tso6"),
            (o.uso, "uso"),
        ];
        TrunkReport {
            connected: peer.is_some(),
            serving: peer.is_some_and(|p| p.serving),
            pid: peer.and_then(|p| p.pid),
            features: format!("{:#x}", peer.map_or(0, |p| p.features)),
            offloads: names
                .into_iter()
                .filter(|(on, _)| *on)
                .map(|(_, name)| name)
                .collect(),
            calls: self.trunk_counters.calls.value(),
            busy_steps: self.driver_counters.busy.value(),
            sleeps: self.driver_counters.sleeps.value(),
            seat: self.driver_counters.seat(),
            starved: self.trunk_counters.starved.value(),
            broken: self.trunk_counters.broken.value(),
        }
    }

    fn start_times(&self) -> StartTimes {
        let Some(started) = self.supervisor.started_at() else {
            return StartTimes::default();
        };
        let since = |at: Option<Instant>| {
            let time = at?.checked_duration_since(started)?;
            Some(time.as_secs_f64() * 1000.0)
        };
        StartTimes {
            to_configured_ms: since(self.control.in_force_at()),
            to_first_forwarded_ms: since(self.trunk_counters.first_sent()),
        }
    }
}

fn on_host(pod: Option<String>, (reason, count): (HostDrop, u64)) -> DropReport {
    let (place, meaning) = ("host".into(), reason.meaning().into());
    DropReport {
        place,
        pod,
        reason: reason.name().into(),
        count,
        meaning,
    }
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
