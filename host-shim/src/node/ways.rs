//! The links that are no pod's: how they come up, go down, and what they say of themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::PoisonError;

use serde::Serialize;
use sluice_contract::LinkId;
use sluice_ports::message::{PortCounters, PortKind};
use sluice_ports::tap;

use super::ports;
use super::report::{CarriedReport, named_drops};
use super::{Node, NodeError, cannot};
use crate::announce::{Announce, AnnounceReport, Farewell, View};
use crate::config::Config;
use crate::hostlink;
use crate::hostlink::config::HostLinkConfig;
use crate::hostlink::{LocalPort, LocalPorts};
use crate::uplink::config::{UplinkConfig, parse_prefix};
use crate::uplink::report::NetworkReport;
use crate::uplink::{Ground, Uplink};

/// What there is of them.
#[derive(Debug, Default)]
pub(super) struct Ways {
    uplink: Option<Uplink>,
    /// Host ports as the node's own programs use them, and why they cannot, if so.
    local_ports: Option<LocalPorts>,
    local_problem: Option<String>,
    announce: Option<Announce>,
    reports: Vec<(LinkId, Way)>,
}

/// One of them, as reports see it.
#[derive(Debug)]
struct Way {
    tap: &'static str,
    knows_tunnels: bool,
}

/// The uplink's tap, or the host's.
#[derive(Clone, Debug, Serialize)]
pub struct WayReport {
    pub tap: &'static str,
    /// The kernel cuts large frames in tunnels; else the appliance's process does.
    pub knows_tunnels: bool,
    pub to_appliance: CarriedReport,
    pub from_appliance: CarriedReport,
    /// Frames that it has cut.
    pub cut: u64,
    /// Frames that ended on the host, by reason.
    pub drops: BTreeMap<String, u64>,
}

impl Node {
    /// Makes them as configured.
    pub(super) fn link_ways(&self) -> Result<(), NodeError> {
        hostlink::guard(self.config.host_link.as_ref())?;
        self.remove_unwanted_ways();
        if let Some(config) = &self.config.uplink {
            let cluster = self.config.host_link.as_ref();
            let cluster = cluster.map_or_else(Vec::new, HostLinkConfig::ranges);
            let ground = Ground {
                config: config.clone(),
                cluster,
                node: self.config.node_name.clone(),
                has_source: self.cluster.is_some(),
                // One that is told its MTU keeps it.
                host_link: self
                    .config
                    .host_link
                    .clone()
                    .filter(|_| self.config.mtu.is_none()),
                mtu: self.config.mtu,
            };
            let found = self.ports.found(LinkId::UPLINK)?;
            let (uplink, ends) = Uplink::start(&ground, &self.control, found, self.host_ports())?;
            if let Some(cluster) = &self.cluster {
                uplink.follow(cluster);
            }
            let announce = self.announce(config, &uplink);
            let mut ways = self.ways();
            ways.uplink = Some(uplink);
            ways.announce = announce?;
            drop(ways);
            self.add_way(LinkId::UPLINK, crate::uplink::TAP, ends.tap)?;
            if let Some(probes) = ends.probes {
                self.ports.add(LinkId::PROBES, PortKind::Socket, probes)?;
            }
        }
        if let Some(config) = &self.config.host_link {
            let found = self.ports.found(LinkId::HOST)?;
            let (tap, row, ports) = hostlink::make(config, self.pod_mtu(), found)?;
            self.control.put([row]);
            self.ways().local_ports = Some(ports);
            self.add_way(LinkId::HOST, hostlink::TAP, tap)?;
        }
        Ok(())
    }

    fn announce(
        &self,
        config: &UplinkConfig,
        uplink: &Uplink,
    ) -> Result<Option<Announce>, NodeError> {
        let Some(announce) = &self.config.announce else {
            return Ok(None);
        };
        let (control, ports) = (self.control.clone(), self.ports.clone());
        let ranges = config.service_addresses.iter();
        let view = View {
            config: announce.clone(),
            service_ranges: ranges.filter_map(|it| parse_prefix(it)).collect(),
            node: self.config.node_name.clone(),
            interface: config.interface.clone(),
            uplink: uplink.view(),
            forwards: Box::new(move || control.forwards() && ports.are_served()),
        };
        let started = Announce::start(view, self.cluster.as_ref());
        started
            .map(Some)
            .map_err(cannot("tell others what is served"))
    }

    /// What others are told, if anybody is.
    pub(super) fn announce_report(&self) -> Option<AnnounceReport> {
        self.ways().announce.as_ref().map(Announce::report)
    }

    /// The MTU of a pod that is linked now and says nothing else.
    pub fn pod_mtu(&self) -> u16 {
        let uplink = || self.ways().uplink.as_ref().map(Uplink::pod_mtu);
        let mtu = self.config.mtu.or_else(uplink);
        mtu.unwrap_or(Config::PLAIN_MTU)
    }

    /// Gives the host back what is its own, if the links go too; else all of it stays for the next daemon.
    pub(super) fn stop_ways(&self) {
        let tear_down = self.tears_down();
        let ways = std::mem::take(&mut *self.ways());
        if let Some(mut announce) = ways.announce {
            announce.stop(match tear_down {
                true => Farewell::Spoken,
                false => Farewell::Silent,
            });
        }
        if let Some(mut uplink) = ways.uplink {
            uplink.stop(tear_down);
        }
        if !tear_down {
            return;
        }
        if let Some(Err(error)) = ways
            .local_ports
            .map(|mut ports| ports.set(&BTreeSet::new()))
        {
            tracing::warn!(%error, "the host keeps its rules for host ports");
        }
        if let Err(error) = hostlink::remove() {
            tracing::warn!(%error, "the host link stays");
        }
        if let Err(error) = hostlink::guard(None) {
            tracing::warn!(%error, "pods and Services stay unreachable from the host");
        }
    }

    /// What an earlier life left of those that the configuration no longer names.
    fn remove_unwanted_ways(&self) {
        if self.config.host_link.is_none()
            && let Err(error) = hostlink::remove()
        {
            tracing::warn!(%error, "the host link of an earlier life stays");
        }
        if self.config.uplink.is_none()
            && let Err(error) = crate::uplink::remove()
        {
            tracing::warn!(%error, "the uplink of an earlier life stays");
        }
    }

    /// What one of them says of itself, if it is there.
    pub(super) fn way_report(
        &self,
        id: LinkId,
        counters: &BTreeMap<u16, PortCounters>,
    ) -> Option<WayReport> {
        let ways = self.ways();
        let (_, way) = ways.reports.iter().find(|(way, _)| *way == id)?;
        let counters = counters.get(&id.raw()).cloned().unwrap_or_default();
        Some(WayReport {
            tap: way.tap,
            knows_tunnels: way.knows_tunnels,
            to_appliance: counters.to_guest.into(),
            from_appliance: counters.from_guest.into(),
            cut: counters.cut,
            drops: named_drops(&counters.drops),
        })
    }

    /// This node's end of the tunnel and all other nodes, if it has an uplink.
    pub(super) fn network_report(&self) -> Option<NetworkReport> {
        self.ways().uplink.as_ref().map(Uplink::report)
    }

    /// What is not as it should be.
    pub(super) fn way_problems(&self) -> Vec<String> {
        let ways = self.ways();
        let uplink = ways.uplink.as_ref().map_or_else(Vec::new, Uplink::problems);
        uplink
            .into_iter()
            .chain(ways.local_problem.clone())
            .collect()
    }

    /// Pods have come or gone, and their host ports with them.
    pub(super) fn host_ports_changed(&self) {
        // Held over both, so that of two changes the later is the last to be carried out.
        let mut ways = self.ways();
        if let Some(uplink) = &ways.uplink {
            uplink.set_host_ports(self.host_ports());
        }
        let changed = ways.local_ports.as_mut().map(|local| {
            let wanted = self.local_ports(local.addresses());
            local.set(&wanted)
        });
        let told = |error| format!("The node's own programs do not reach all host ports: {error}");
        let problem = changed.and_then(Result::err).map(told);
        if problem != ways.local_problem {
            problem
                .iter()
                .for_each(|problem| tracing::warn!("{problem}"));
            ways.local_problem = problem;
        }
    }

    fn host_ports(&self) -> BTreeSet<(u8, u16)> {
        let links = self.links();
        let all = links.all().flat_map(|link| &link.saved.pod.host_ports);
        all.map(|port| (ports::protocol(port.protocol).number(), port.host_port))
            .collect()
    }

    /// Where the node's own programs find them: at the address of the node that a port names or at all, in the pod's families.
    fn local_ports(&self, own: &[IpAddr]) -> BTreeSet<LocalPort> {
        let links = self.links();
        let mut found = BTreeSet::new();
        for pod in links.all().map(|link| &link.saved.pod) {
            let leads = |own: &&IpAddr| pod.addresses.iter().any(|a| a.is_ipv4() == own.is_ipv4());
            for port in &pod.host_ports {
                let is_served = |own: &&IpAddr| port.host_ip.is_none_or(|named| named == **own);
                let at = own.iter().filter(leads).filter(is_served);
                found.extend(at.map(|own| LocalPort {
                    address: *own,
                    protocol: ports::protocol(port.protocol).number(),
                    port: port.host_port,
                }));
            }
        }
        found
    }

    fn add_way(&self, id: LinkId, name: &'static str, tap: File) -> Result<(), NodeError> {
        let header = tap::vnet_header_size(tap.as_fd()).map_err(cannot("ask a tap"))?;
        let way = Way {
            tap: name,
            knows_tunnels: header == tap::LONG_HEADER,
        };
        self.ways().reports.push((id, way));
        self.add_tap(id, tap)
    }

    fn ways(&self) -> std::sync::MutexGuard<'_, Ways> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
