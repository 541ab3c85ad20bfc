//! The uplink: a tap beside the node's network card, tc filters that bring the appliance its own, and the rows that tell
//! it how to reach the other nodes and the outside.
//!
//! `filter` says what belongs to the appliance, `mirror` what the host knows of the underlay, `neighbors` whom of it the
//! appliance is told of, `members` which other nodes there are, `rows` makes rows and filters of it all. A thread follows the
//! host's and the cluster's changes and puts what differs.

pub mod config;
mod filter;
mod flannel;
mod follow;
mod members;
mod mirror;
mod mtu;
mod neighbors;
mod numbers;
pub mod ports;
mod probe;
pub mod report;
mod reserved;
mod rows;
mod spare;
mod taken;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use sluice_contract::Prefix;
use sluice_model::compile::Members;
use sluice_model::source::announce::Announcer;
use sluice_ports::tap;

use self::config::{ProbeConfig, SegmentationBy};
use self::follow::Following;
use self::mirror::Changes;
use self::neighbors::Asked;
use self::probe::{Prober, Probes};
use self::report::{NetworkReport, PeerReport, ProbeState};
use self::reserved::Reserved;
use crate::cluster::Cluster;
use crate::control::Control;
use crate::wiring::netlink::{Change, Netlink, Redirect};
use crate::wiring::quiet;

pub use self::rows::Ground;

/// The tap beside the card.
pub const TAP: &str = "sluplink";
/// Neighbors to be found that may wait.
const FINDS: usize = 16;

/// What of the uplink cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("Uplink {interface}: cannot {step}")]
pub struct UplinkError {
    pub interface: String,
    pub step: &'static str,
    pub source: io::Error,
}

/// What the thread and others share.
#[derive(Debug)]
struct Shared {
    ending: AtomicBool,
    /// Wakes the thread.
    asked: Arc<EventFd>,
    /// The nodes of the cluster, once they are known.
    members: Mutex<Option<Arc<Members>>>,
    report: Mutex<NetworkReport>,
    /// Who is told what this node's object is to say.
    announcer: Mutex<Option<Announcer>>,
    /// Single ports of the node that lead to pods: the protocol's number and the port.
    host_ports: Mutex<BTreeSet<(u8, u16)>>,
    problems: Mutex<Vec<String>>,
    probes: Probes,
}

impl Shared {
    fn new(probes: ProbeConfig) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            ending: AtomicBool::default(),
            asked: Arc::new(EventFd::from_value_and_flags(0, flags)?),
            members: Mutex::default(),
            report: Mutex::default(),
            announcer: Mutex::default(),
            host_ports: Mutex::default(),
            problems: Mutex::default(),
            probes: Probes::new(probes)?,
        })
    }

    fn wake(&self) {
        // Only fails when the counter is full, and then the thread is awake.
        let _ = self.asked.write(1);
    }

    fn members(&self) -> MutexGuard<'_, Option<Arc<Members>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announcer(&self) -> MutexGuard<'_, Option<Announcer>> {
        self.announcer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self) -> MutexGuard<'_, NetworkReport> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host_ports(&self) -> MutexGuard<'_, BTreeSet<(u8, u16)>> {
        self.host_ports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn problems(&self) -> MutexGuard<'_, Vec<String>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the uplink knows, for others to look at.
#[derive(Debug)]
pub(crate) struct View(Arc<Shared>);

/// What it knew at one moment.
#[derive(Debug)]
pub(crate) struct Sight {
    /// Ranges of this node's pods, and its addresses.
    pub(crate) ranges: Vec<Prefix>,
    pub(crate) addresses: Vec<IpAddr>,
    /// The cluster's other nodes, except those that do not answer any more.
    pub(crate) others: Vec<Other>,
}

/// Another node, by its name.
#[derive(Debug)]
pub(crate) enum Other {
    Reached(String),
    /// It has not answered in this life of the daemon.
    NeverHeard(String),
}

impl Other {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Reached(name) | Self::NeverHeard(name) => name,
        }
    }
}

impl View {
    /// What it knows now; of others only if they are wanted: they may be thousands.
    pub(crate) fn look(&self, wants_others: bool) -> Sight {
        let mut known = NetworkReport::default();
        {
            let all = self.0.report();
            known.pods.clone_from(&all.pods);
            known.addresses.clone_from(&all.addresses);
            if wants_others {
                known.peers.clone_from(&all.peers);
            }
        }
        self.0.probes.complete(&mut known);
        let ranges = known.pods.iter().filter_map(|it| config::parse_prefix(it));
        Sight {
            ranges: ranges.collect(),
            others: known.peers.iter().filter_map(other).collect(),
            addresses: known.addresses,
        }
    }
}

/// A node of the cluster, unless it answers no more.
fn other(peer: &PeerReport) -> Option<Other> {
    if peer.origin != report::ORIGIN_CLUSTER {
        return None;
    }
    match peer.probe.state {
        ProbeState::Reachable => Some(Other::Reached(peer.name.clone())),
        ProbeState::NoAnswerYet => Some(Other::NeverHeard(peer.name.clone())),
        ProbeState::Unreachable if peer.probe.last_answer_ms.is_none() => {
            Some(Other::NeverHeard(peer.name.clone()))
        }
        ProbeState::Unreachable | ProbeState::NotProbed => None,
    }
}

/// The running uplink.
#[derive(Debug)]
pub struct Uplink {
    interface: String,
    shared: Arc<Shared>,
    follower: Option<JoinHandle<()>>,
    prober: Option<Prober>,
    reserved: Reserved,
}

/// Descriptors for the appliance's process.
#[derive(Debug)]
pub struct Ends {
    /// The tap beside the card, for [`sluice_contract::LinkId::UPLINK`].
    pub tap: File,
    /// For [`sluice_contract::LinkId::PROBES`], if there are any.
    pub probes: Option<OwnedFd>,
}

impl Uplink {
    /// Makes the tap and the filters, or adopts those that are there, and tells the appliance of the other nodes. With a source
    /// `control` is held until [`Self::follow`] has brought the cluster's nodes. `found`: the tap's descriptor, if a process has it
    /// still. `host_ports` are those of the pods that are linked already, as of [`Self::set_host_ports`].
    ///
    /// # Errors
    /// The step that failed; what was made before is taken back, unless an earlier life made it.
    pub fn start(
        ground: &Ground,
        control: &Control,
        found: Option<File>,
        host_ports: BTreeSet<(u8, u16)>,
    ) -> Result<(Self, Ends), UplinkError> {
        let config = &ground.config;
        let failed = |step| {
            let interface = config.interface.clone();
            move |source| UplinkError {
                interface,
                step,
                source,
            }
        };
        let mut netlink = Netlink::open().map_err(failed("open netlink"))?;
        let shared = Arc::new(Shared::new(config.probes).map_err(failed("share what is known"))?);
        *shared.host_ports() = host_ports;
        let changes =
            Changes::listen(shared.asked.clone()).map_err(failed("listen for changes"))?;
        let card = netlink
            .interface(&config.interface)
            .and_then(|card| card.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(failed("find the network card"))?;
        if card.master.is_some() {
            let source = io::Error::other(
                "it is part of a bond, a bridge or the like: name that as the uplink, not its part",
            );
            return Err(failed("use the network card")(source));
        }
        free_cards(&mut netlink, Some(card.index)).map_err(failed("free another network card"))?;
        let before = netlink.interface(TAP).map_err(failed("look for the tap"))?;
        let tap = match (found.filter(|_| before.is_some()), config.segmentation) {
            (Some(found), _) => Ok(found),
            (None, SegmentationBy::Auto) => tap::attach_for_tunnels(TAP),
            (None, SegmentationBy::Daemon) => tap::attach(TAP),
        }
        .map_err(failed("make the tap"))?;
        let index = netlink.index(TAP).map_err(failed("find the tap"))?;
        quiet(TAP).map_err(failed("keep the host's IPv6 off the tap"))?;
        let change = Change {
            up: true,
            mtu: Some(card.mtu),
            ..Change::default()
        };
        netlink
            .change(index, &change)
            .map_err(failed("set up the tap"))?;
        netlink
            .keep_redirect(index, card.index)
            .map_err(failed("redirect the tap to the card"))?;
        let reserved = Reserved::keep(config.snat_ports())
            .map_err(failed("keep the host's programs off the pods' ports"))?;
        let holds = ground.has_source;
        if holds {
            control.hold();
        }
        let follower = rows::Follower::new(ground);
        let asked = follower.asked();
        let places = (card.index, index);
        let mut following = Following::new(follower, netlink, places, shared.clone(), holds);
        let began = following.begin(control);
        let uplink = Self {
            interface: config.interface.clone(),
            shared: shared.clone(),
            follower: None,
            prober: None,
            reserved,
        };
        let threads = began
            .map_err(failed("redirect the card to the tap"))
            .and_then(|()| {
                let found = find_neighbors(control, card.index, asked);
                found.map_err(failed("find neighbors"))
            })
            .and_then(|()| {
                let control = control.clone();
                let thread = std::thread::Builder::new().name("uplink".into());
                let run = move || following.run(&changes, &control);
                thread
                    .spawn(run)
                    .map_err(failed("follow the host's changes"))
            });
        let mut uplink = uplink;
        let probes = threads.and_then(|thread| {
            uplink.follower = Some(thread);
            uplink
                .probe(config.probes, control)
                .map_err(failed("probe other nodes"))
        });
        match probes {
            Ok(probes) => {
                // Until here closing the descriptor removes the tap, unless it was there before.
                if let Err(source) = tap::set_persistent(&tap, true) {
                    uplink.stop(before.is_none());
                    return Err(failed("make the tap persistent")(source));
                }
                tracing::info!(interface = %config.interface, peers = config.peers.len(), "uplink in use");
                Ok((uplink, Ends { tap, probes }))
            }
            Err(error) => {
                uplink.stop(before.is_none());
                Err(error)
            }
        }
    }

    fn probe(&mut self, config: ProbeConfig, control: &Control) -> io::Result<Option<OwnedFd>> {
        if config.interval_ms == 0 {
            return Ok(None);
        }
        let shared = self.shared.clone();
        let (prober, end) = Prober::start(&shared.probes, control, {
            let shared = shared.clone();
            move || shared.wake()
        })?;
        self.prober = Some(prober);
        Ok(Some(end))
    }

    /// The ports of the node that lead to pods, by the protocol's number; besides those of Services.
    pub fn set_host_ports(&self, ports: BTreeSet<(u8, u16)>) {
        *self.shared.host_ports() = ports;
        self.shared.wake();
    }

    /// Has the other nodes be those of the cluster, besides those of the configuration.
    pub fn follow(&self, cluster: &Cluster) {
        *self.shared.announcer() = cluster.announcer();
        let shared = self.shared.clone();
        cluster.follow_nodes(Box::new(move |members| {
            *shared.members() = Some(members.clone());
            shared.wake();
        }));
    }

    /// The MTU of pods that are linked now: what the card takes less what the tunnel adds.
    pub fn pod_mtu(&self) -> u16 {
        self.shared.report().pod_mtu
    }

    /// This node's end of the tunnel, and all other nodes.
    pub fn report(&self) -> NetworkReport {
        let mut report = self.shared.report().clone();
        self.shared.probes.complete(&mut report);
        report
    }

    /// What is known, for others to look at.
    pub(crate) fn view(&self) -> View {
        View(self.shared.clone())
    }

    /// What is not as it should be, one sentence each.
    pub fn problems(&self) -> Vec<String> {
        self.shared.problems().clone()
    }

    /// Ends the work on it. `remove`: the card is the host's again, and the tap goes; else everything stays as it is, for the next
    /// daemon.
    pub fn stop(&mut self, remove: bool) {
        self.prober = None;
        self.shared.ending.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(thread) = self.follower.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
        if !remove {
            return;
        }
        if let Err(error) = self::remove() {
            tracing::warn!(interface = %self.interface, %error, "the card keeps its filters");
        }
        if let Err(error) = self.reserved.give_back() {
            tracing::warn!(%error, "the pods' ports stay kept from the host's programs");
        }
    }
}

/// Gives the card back to the host and removes the tap; where there is none, nothing.
///
/// # Errors
/// As the kernel says.
pub(crate) fn remove() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    free_cards(&mut netlink, None)?;
    netlink.delete_tap(TAP)
}

/// Takes the filters of an earlier life off all interfaces but one.
fn free_cards(netlink: &mut Netlink, but: Option<u32>) -> io::Result<()> {
    for index in netlink.indices()? {
        let is_ours = |found: &Redirect| found.set().is_some();
        if Some(index) != but && netlink.redirects(index)?.iter().any(is_ours) {
            netlink.unredirect(index)?;
        }
    }
    Ok(())
}

/// Has the kernel find neighbors that packets in the appliance wait for.
fn find_neighbors(control: &Control, card: u32, asked: Asked) -> io::Result<()> {
    let (sender, wanted) = mpsc::sync_channel::<IpAddr>(FINDS);
    let mut netlink = Netlink::open()?;
    let find = move || {
        for address in wanted {
            let on_link = mirror::route(&mut netlink, address)
                .is_ok_and(|route| route.interface == card && route.next_hop == address);
            if on_link {
                asked.add(address);
                if let Err(error) = mirror::resolve(&mut netlink, card, address) {
                    tracing::debug!(%address, %error, "neighbor cannot be asked for");
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("neighbors".into())
        .spawn(find)?;
    control.find_neighbors(sender);
    Ok(())
}
