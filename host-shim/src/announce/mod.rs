//! Tells others what this node serves for as long as it does (rows O-18 to O-20): ranges of its pods, addresses of Services.
//!
//! A thread looks a few times a second: whether the appliance forwards, what the uplink knows of this node and of others, what
//! the cluster has Services at. An appliance that is away for a moment is a restart and nobody's business; one that stays away
//! is taken back.

pub mod config;
mod link;
mod routers;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
pub use sluice_announce::bgp::{Farewell, PeerReport as RouterReport};
use sluice_contract::Prefix;
use sluice_model::compile::Served;

use self::config::AnnounceConfig;
use self::link::Link;
use self::routers::Routers;
use crate::cluster::Cluster;
use crate::uplink::{Sight, View as UplinkView};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// An appliance that is back within this time was never away.
const AWAY: Duration = Duration::from_millis(500);

/// What others are told, and how things stand with them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnounceReport {
    /// What routers are told at the moment.
    pub routes: Vec<String>,
    /// Addresses that this node answers for on its link.
    pub answered: BTreeSet<IpAddr>,
    /// Addresses of Services that are not announced, because `uplink.service_addresses` has them not.
    pub withheld: BTreeSet<IpAddr>,
    /// The routers.
    pub routers: Vec<RouterReport>,
    /// What is not as it should be, one sentence each.
    pub problems: BTreeSet<String>,
}

/// The thread that looks.
#[derive(Debug)]
pub struct Announce {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What clients outside may send to, as the cluster has it; nothing while that is not known.
    served: Option<Arc<Vec<Served>>>,
    stop: Option<Farewell>,
    report: AnnounceReport,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is looked at.
pub(crate) struct View {
    pub(crate) config: AnnounceConfig,
    /// This node's name in the cluster.
    pub(crate) node: String,
    /// The network card.
    pub(crate) interface: String,
    /// Addresses of Services lie within these.
    pub(crate) service_ranges: Vec<Prefix>,
    pub(crate) uplink: UplinkView,
    /// The appliance forwards.
    pub(crate) forwards: Box<dyn Fn() -> bool + Send>,
}

impl Announce {
    /// Starts to look. With a cluster nothing is said before its Services are known.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(crate) fn start(view: View, cluster: Option<&Cluster>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        match cluster {
            None => shared.lock().served = Some(Arc::default()),
            Some(cluster) => {
                let told = shared.clone();
                cluster.follow_served(Box::new(move |served| {
                    told.lock().served = Some(Arc::new(served));
                    told.changed.notify_all();
                }));
            }
        }
        let looking = shared.clone();
        let thread = std::thread::Builder::new()
            .name("announce".into())
            .spawn(move || look(&view, &looking))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// How things stand.
    pub fn report(&self) -> AnnounceReport {
        self.shared.lock().report.clone()
    }

    /// Says nothing any more; with a silent farewell routers keep for a while what they were told.
    pub fn stop(&mut self, farewell: Farewell) {
        self.shared.lock().stop = Some(farewell);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

fn look(view: &View, shared: &Shared) {
    let mut routers = view.config.bgp.clone().map(Routers::new);
    let mut link = view
        .config
        .l2
        .then(|| Link::new(&view.node, &view.interface));
    let mut forwarded: Option<Instant> = None;
    loop {
        let (stop, served) = {
            let state = shared.lock();
            (state.stop, state.served.clone())
        };
        if let Some(farewell) = stop {
            if let Some(routers) = &mut routers {
                routers.stop(farewell);
            }
            return;
        }
        if (view.forwards)() {
            forwarded = Some(Instant::now());
        }
        // One that has never forwarded has nothing to take back, and routers may know its former life.
        if let (Some(at), Some(served)) = (forwarded, served) {
            let is_there = at.elapsed() < AWAY;
            let sight = view.uplink.look(link.is_some());
            let (own, withheld) = sort_out(view, &served);
            let mut report = AnnounceReport {
                withheld,
                ..AnnounceReport::default()
            };
            if let Some(routers) = &mut routers {
                let routes = match is_there {
                    true => routes(view, &own, &sight),
                    false => BTreeSet::new(),
                };
                routers.tell(routes, &sight, &mut report);
            }
            if let Some(link) = &mut link {
                link.answer(&own, is_there, &sight, &mut report);
            }
            let mut state = shared.lock();
            for problem in report.problems.difference(&state.report.problems) {
                tracing::warn!("{problem}");
            }
            state.report = report;
        }
        let state = shared.lock();
        if state.stop.is_none() {
            drop(shared.changed.wait_timeout(state, LOOK));
        }
    }
}

/// What may be announced of what is served, and what is kept back.
fn sort_out<'a>(view: &View, served: &'a [Served]) -> (Vec<&'a Served>, BTreeSet<IpAddr>) {
    if !view.config.services {
        return Default::default();
    }
    let is_ours = |it: &&Served| view.service_ranges.iter().any(|r| r.contains(it.address));
    let (own, others): (Vec<_>, Vec<_>) = served.iter().partition(is_ours);
    (own, others.into_iter().map(|it| it.address).collect())
}

/// What routers are to be told.
fn routes(view: &View, served: &[&Served], sight: &Sight) -> BTreeSet<Prefix> {
    let is_here = |it: &&&Served| {
        let on = it.on.as_ref();
        on.is_none_or(|nodes| nodes.contains(view.node.as_str()))
    };
    let host = |it: &&Served| {
        let bits = if it.address.is_ipv4() { 32 } else { 128 };
        Prefix::new(it.address, bits)
    };
    let mut routes: BTreeSet<Prefix> = served.iter().filter(is_here).filter_map(host).collect();
    if view.config.pods {
        routes.extend(&sight.ranges);
    }
    routes
}
