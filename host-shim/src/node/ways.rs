//! The links that are no pod's: how they come up, go down, and what they say of themselves.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};

use serde::Serialize;
use sluice_contract::LinkId;

use super::report::CarriedReport;
use super::{Node, NodeError};
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
            let (uplink, tap) = Uplink::start(config, &self.control)?;
            self.ways().uplink = Some(uplink);
            self.add_way(LinkId::UPLINK, crate::uplink::TAP, tap)?;
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
