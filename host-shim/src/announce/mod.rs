//! Tells others what this node serves for as long as it does (rows O-18 to O-20): ranges of its pods, addresses of Services.
//!
//! A thread looks a few times a second: whether the appliance forwards, what the uplink knows of this node, what the cluster
//! has Services at. An appliance that is away for a moment is a restart and nobody's business; one that stays away is taken
//! back.

pub mod config;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
pub use sluice_announce::bgp::{Farewell, PeerReport as RouterReport};
use sluice_announce::bgp::{NextHops, Speaker};
use sluice_contract::Prefix;
use sluice_model::compile::Served;

use self::config::AnnounceConfig;
use crate::cluster::Cluster;
use crate::uplink::Own;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// An appliance that is back within this time was never away.
const AWAY: Duration = Duration::from_millis(500);

/// What others are told, and how things stand with them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnounceReport {
    /// What is announced at the moment.
    pub routes: Vec<String>,
    /// Addresses of Services that are not, because `uplink.service_addresses` has them not.
    pub withheld: Vec<IpAddr>,
    /// The routers.
    pub routers: Vec<RouterReport>,
    /// Why nobody is told, if so.
    pub problem: Option<String>,
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
    served: Option<Vec<Served>>,
    stop: Option<Farewell>,
    speaker: Option<Speaker>,
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
    /// Addresses of Services lie within these.
    pub(crate) service_ranges: Vec<Prefix>,
    /// What the uplink knows of this node.
    pub(crate) own: Own,
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
            None => shared.lock().served = Some(Vec::new()),
            Some(cluster) => {
                let told = shared.clone();
                cluster.follow_served(Box::new(move |served| {
                    told.lock().served = Some(served);
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
        let state = self.shared.lock();
        let mut report = state.report.clone();
        report.routers = state
            .speaker
            .as_ref()
            .map(Speaker::report)
            .unwrap_or_default();
        report
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
    let mut forwarded: Option<Instant> = None;
    let mut spoken_for = NextHops::default();
    let mut state = shared.lock();
    loop {
        if let Some(farewell) = state.stop {
            let speaker = state.speaker.take();
            drop(state);
            if let Some(speaker) = speaker {
                speaker.stop(farewell);
            }
            return;
        }
        if (view.forwards)() {
            forwarded = Some(Instant::now());
        }
        // One that has never forwarded has nothing to take back, and routers may know its former life.
        if let (Some(at), Some(served)) = (forwarded, &state.served) {
            let (routes, withheld) = match at.elapsed() < AWAY {
                true => routes(view, served),
                false => Default::default(),
            };
            let (_, addresses) = view.own.ranges_and_addresses();
            let next_hops = next_hops(&addresses);
            state.report.withheld = withheld;
            if state.speaker.is_some() && next_hops != spoken_for {
                let former = state.speaker.take();
                drop(state);
                drop(former); // which takes back what it has said
                state = shared.lock();
            }
            if state.speaker.is_none() {
                match view
                    .config
                    .bgp
                    .clone()
                    .map(|it| Speaker::start(it, next_hops))
                {
                    Some(Ok(speaker)) => {
                        state.speaker = Some(speaker);
                        state.report.problem = None;
                        spoken_for = next_hops;
                    }
                    Some(Err(error)) => {
                        let problem = Some(error.to_string());
                        if state.report.problem != problem {
                            tracing::warn!(%error, "routers are told nothing");
                        }
                        state.report.problem = problem;
                    }
                    None => {}
                }
            }
            state.report.routes = routes.iter().map(ToString::to_string).collect();
            if let Some(speaker) = &state.speaker {
                speaker.announce(Arc::new(routes));
            }
        }
        let woken = shared.changed.wait_timeout(state, LOOK);
        state = woken.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// What is to be announced, and addresses of Services that are kept back.
fn routes(view: &View, served: &[Served]) -> (BTreeSet<Prefix>, Vec<IpAddr>) {
    let mut routes = BTreeSet::new();
    let mut withheld = BTreeSet::new();
    if view.config.pods {
        routes.extend(view.own.ranges_and_addresses().0);
    }
    if view.config.services {
        for it in served {
            let is_ours = view.service_ranges.iter().any(|r| r.contains(it.address));
            if !is_ours {
                withheld.insert(it.address);
            } else if it.is_here {
                routes.extend(host(it.address));
            }
        }
    }
    (routes, withheld.into_iter().collect())
}

fn host(address: IpAddr) -> Option<Prefix> {
    Prefix::new(address, if address.is_ipv4() { 32 } else { 128 })
}

fn next_hops(addresses: &[IpAddr]) -> NextHops {
    NextHops {
        v4: addresses.iter().find_map(|it| match it {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        }),
        v6: addresses.iter().find_map(|it| match it {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        }),
    }
}
