//! The links that are no pod's: how they come up, go down, and what they say of themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};

use serde::Serialize;
use sluice_contract::LinkId;

use super::ports;
use super::report::CarriedReport;
use super::{Node, NodeError};
use crate::hostlink;
use crate::hostlink::config::HostLinkConfig;
use crate::trunk::links::LinkCounters;
use crate::trunk::vnet;
use crate::uplink::Uplink;
use crate::wiring::tap;

/// What there is of them.
#[derive(Debug, Default)]
pub(super) struct Ways {
    uplink: Option<Uplink>,
    reports: Vec<(LinkId, Way)>,
}

/// One of them, as reports see it.
#[derive(Debug)]
struct Way {
    tap: &'static str,
    knows_tunnels: bool,
    counters: Arc<LinkCounters>,
}

/// The uplink's tap, or the host's.
#[derive(Clone, Debug, Serialize)]
pub struct WayReport {
    pub tap: &'static str,
    /// The kernel cuts large frames in tunnels; else the daemon does.
    pub knows_tunnels: bool,
    pub to_appliance: CarriedReport,
    pub from_appliance: CarriedReport,
    /// Frames that the daemon has cut.
    pub cut: u64,
    /// Frames that ended on the host, by reason.
    pub drops: BTreeMap<String, u64>,
}

impl Node {
    /// Makes them as configured.
    pub(super) fn link_ways(&self) -> Result<(), NodeError> {
        if let Some(config) = &self.config.uplink {
            let cluster = self.config.host_link.as_ref();
            let cluster = cluster.map_or_else(Vec::new, HostLinkConfig::ranges);
            let (uplink, tap) = Uplink::start(config, cluster, &self.control)?;
            uplink.set_host_ports(self.host_ports());
            self.ways().uplink = Some(uplink);
            self.add_way(LinkId::UPLINK, crate::uplink::TAP, tap)?;
        }
        if let Some(config) = &self.config.host_link {
            let (tap, row) = hostlink::make(config, self.config.mtu)?;
            self.control.put([row]);
            self.add_way(LinkId::HOST, hostlink::TAP, tap)?;
        }
        Ok(())
    }

    /// Gives the host back what is its own.
    pub(super) fn stop_ways(&self) {
        let ways = std::mem::take(&mut *self.ways());
        if let Some(mut uplink) = ways.uplink {
            uplink.stop();
        }
    }

    /// What one of them says of itself, if it is there.
    pub(super) fn way_report(&self, id: LinkId) -> Option<WayReport> {
        let ways = self.ways();
        let (_, way) = ways.reports.iter().find(|(way, _)| *way == id)?;
        let counters = &way.counters;
        Some(WayReport {
            tap: way.tap,
            knows_tunnels: way.knows_tunnels,
            to_appliance: (&counters.to_guest).into(),
            from_appliance: (&counters.from_guest).into(),
            cut: counters.cut.value(),
            drops: counters
                .drops
                .seen()
                .map(|(reason, count)| (reason.name().to_owned(), count))
                .collect(),
        })
    }

    /// What is not as it should be.
    pub(super) fn way_problems(&self) -> Vec<String> {
        let ways = self.ways();
        ways.uplink.as_ref().map_or_else(Vec::new, Uplink::problems)
    }

    /// Pods have come or gone, and their host ports with them.
    pub(super) fn host_ports_changed(&self) {
        let ports = self.host_ports();
        if let Some(uplink) = &self.ways().uplink {
            uplink.set_host_ports(ports);
        }
    }

    fn host_ports(&self) -> BTreeSet<(u8, u16)> {
        let links = self.links();
        let all = links.all().flat_map(|link| &link.saved.pod.host_ports);
        all.map(|port| (ports::protocol(port.protocol).number(), port.host_port))
            .collect()
    }

    fn add_way(&self, id: LinkId, name: &'static str, tap: File) -> Result<(), NodeError> {
        let header = tap::vnet_header_size(tap.as_fd()).map_err(NodeError::Trunk)?;
        let counters = Arc::<LinkCounters>::default();
        let way = Way {
            tap: name,
            knows_tunnels: header == vnet::LONG_HEADER,
            counters: counters.clone(),
        };
        self.ways().reports.push((id, way));
        self.add_tap(id, tap, counters)
    }

    fn ways(&self) -> std::sync::MutexGuard<'_, Ways> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
