//! A speaker of BGP that announces and learns nothing: one thread for each router, which connects, says what is served, and
//! says it again when it changes.
//!
//! Nobody is listened for: routers of a rack take sessions from their nodes, and the port stays free for a daemon of the
//! host's own.

pub mod config;
mod inbox;
mod session;
mod socket;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use self::config::{BgpConfig, PeerConfig};
pub use self::session::Farewell;
use self::session::{Ending, Sides, Surroundings};
pub use self::wire::NextHops;
use crate::Routes;

/// Between two attempts: at first, and at most.
const PAUSE: [Duration; 2] = [
    Duration::from_millis(if cfg!(test) { 5 } else { 1000 }),
    Duration::from_secs(if cfg!(test) { 1 } else { 30 }),
];
/// A session that lasted so long was one; the next attempt comes soon.
const LASTED: Duration = Duration::from_secs(10);
/// How long the end of all sessions may take.
const ENDING: Duration = Duration::from_secs(1);

/// How things stand with a router.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    pub address: IpAddr,
    pub asn: u32,
    /// The session is there, and everything was said.
    pub established: bool,
    /// Routes that the router was told of.
    pub routes: usize,
    /// Sessions that came about.
    pub sessions: u64,
    /// Why there is no session, or why the last one ended.
    pub problem: Option<String>,
}

/// The speaker.
#[derive(Debug)]
pub struct Speaker(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: BgpConfig,
    router_id: Ipv4Addr,
    next_hops: NextHops,
    state: Mutex<State>,
    ended: Condvar,
    /// For each router, in the configuration's order.
    news: Vec<EventFd>,
}

#[derive(Debug)]
struct State {
    /// Nothing while it is not known what is served: routers that keep routes of an earlier life keep them until then.
    routes: Option<Routes>,
    stop: Option<Farewell>,
    running: usize,
    peers: Vec<PeerReport>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        for news in &self.news {
            let _ = news.write(1); // only fails when the thread is awake
        }
    }
}

impl Speaker {
    /// Starts a thread for each router. Nothing is said before [`announce`](Self::announce).
    ///
    /// # Errors
    /// When there is no identifier, or the kernel gives no thread or descriptor.
    pub fn start(config: BgpConfig, next_hops: NextHops) -> io::Result<Self> {
        let router_id = config.router_id.or(next_hops.v4).ok_or_else(|| {
            let reason =
                "announce.bgp.router_id: without an IPv4 address of the uplink it must be given";
            io::Error::new(io::ErrorKind::InvalidInput, reason)
        })?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let news = config.peers.iter();
        let news = news.map(|_| EventFd::from_value_and_flags(0, flags));
        let peers = config.peers.iter().map(|peer| PeerReport {
            address: peer.address,
            asn: peer.asn,
            established: false,
            routes: 0,
            sessions: 0,
            problem: None,
        });
        let state = State {
            routes: None,
            stop: None,
            running: 0,
            peers: peers.collect(),
        };
        let shared = Arc::new(Shared {
            news: news.collect::<Result<_, _>>()?,
            config,
            router_id,
            next_hops,
            state: Mutex::new(state),
            ended: Condvar::new(),
        });
        let speaker = Self(shared.clone());
        for index in 0..shared.news.len() {
            let peer = Peer {
                shared: shared.clone(),
                index,
            };
            shared.lock().running += 1;
            let started = std::thread::Builder::new()
                .name("bgp".into())
                .spawn(move || peer.run());
            if let Err(error) = started {
                shared.lock().running -= 1;
                return Err(error);
            }
        }
        Ok(speaker)
    }

    /// From now on this is served, and nothing else.
    pub fn announce(&self, routes: Routes) {
        let mut state = self.0.lock();
        if state.routes.as_ref() != Some(&routes) {
            state.routes = Some(routes);
            drop(state);
            self.0.wake();
        }
    }

    /// How things stand, router by router.
    pub fn report(&self) -> Vec<PeerReport> {
        self.0.lock().peers.clone()
    }

    /// Ends all sessions. Where routers keep nothing, or in no case are to, they are told.
    pub fn stop(&self, farewell: Farewell) {
        let keeps = self.0.config.graceful_restart_seconds > 0;
        let mut state = self.0.lock();
        if state.stop.is_none() {
            state.stop = Some(if keeps { farewell } else { Farewell::Spoken });
        }
        drop(state);
        self.0.wake();
        let deadline = Instant::now() + ENDING;
        let mut state = self.0.lock();
        while state.running > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return;
            };
            let woken = self.0.ended.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        self.stop(Farewell::Spoken);
    }
}

/// The side of one router's thread.
struct Peer {
    shared: Arc<Shared>,
    index: usize,
}

impl Peer {
    fn run(self) {
        let mut pause = PAUSE[0];
        let mut restarted = true;
        while self.await_routes() {
            let begin = Instant::now();
            let ending = self.once(restarted);
            let was_up = self.over(&ending);
            restarted &= !was_up;
            if matches!(ending, Ending::Stopped) {
                break;
            }
            if was_up && begin.elapsed() >= LASTED {
                pause = PAUSE[0];
            }
            self.rest(pause);
            pause = (pause * 2).min(PAUSE[1]);
        }
        self.shared.lock().running -= 1;
        self.shared.ended.notify_all();
    }

    fn config(&self) -> Option<&PeerConfig> {
        self.shared.config.peers.get(self.index)
    }

    fn once(&self, restarted: bool) -> Ending {
        let Some(peer) = self.config() else {
            return Ending::Stopped;
        };
        let own = &self.shared.config;
        let stream = match socket::connect(peer, peer.asn == own.asn) {
            Ok(stream) => stream,
            Err(error) => return Ending::Connection(error),
        };
        let sides = Sides {
            own,
            router_id: self.shared.router_id,
            next_hops: self.shared.next_hops,
            peer,
            restarted,
        };
        session::hold(stream, sides, self)
    }

    /// Notes that there is no session any more; whether there was one.
    fn over(&self, ending: &Ending) -> bool {
        let mut state = self.shared.lock();
        let Some(report) = state.peers.get_mut(self.index) else {
            return false;
        };
        let was_up = std::mem::replace(&mut report.established, false);
        report.routes = 0;
        let problem = Some(ending.to_string());
        let is_news = report.problem != problem;
        let (address, asn) = (report.address, report.asn);
        report.problem = problem;
        drop(state);
        if was_up || is_news {
            tracing::warn!(%address, asn, %ending, "no session with the router");
        }
        was_up
    }

    /// Waits until it is known what to say; `false` when nothing is to be said any more.
    fn await_routes(&self) -> bool {
        loop {
            let state = self.shared.lock();
            match (state.stop, &state.routes) {
                (Some(_), _) => return false,
                (None, Some(_)) => return true,
                (None, None) => {}
            }
            drop(state);
            self.wait(None);
        }
    }

    /// Waits for the next attempt, or for the end.
    fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while self.shared.lock().stop.is_none() && Instant::now() < until {
            self.wait(Some(until));
        }
    }

    /// Waits for news, and takes note of them.
    fn wait(&self, until: Option<Instant>) {
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [PollFd::new(self.news(), PollFlags::POLLIN)];
        // Whatever it says, those who wait look for themselves.
        let _ = poll(&mut fds, timeout);
        self.note();
    }

    fn note(&self) {
        if let Some(news) = self.shared.news.get(self.index) {
            let _ = news.read(); // nothing to read is no news
        }
    }
}

impl Surroundings for Peer {
    fn news(&self) -> BorrowedFd<'_> {
        // Each router has one.
        self.shared.news[self.index].as_fd()
    }

    fn routes(&self) -> Routes {
        self.note();
        self.shared.lock().routes.clone().unwrap_or_default()
    }

    fn stop(&self) -> Option<Farewell> {
        self.shared.lock().stop
    }

    fn told(&self, routes: usize) {
        let mut state = self.shared.lock();
        let Some(report) = state.peers.get_mut(self.index) else {
            return;
        };
        report.routes = routes;
        report.problem = None;
        if !std::mem::replace(&mut report.established, true) {
            report.sessions += 1;
            let (address, asn) = (report.address, report.asn);
            tracing::info!(%address, asn, routes, "the router knows what is served");
        }
    }
}

/// For fuzzing: what a router sends, up to what is read of its OPEN.
#[cfg(any(test, feature = "testing"))]
pub fn fuzz_router(bytes: &[u8]) {
    let mut inbox = inbox::Inbox::new();
    // In pieces, as a connection brings it.
    for piece in bytes.chunks(61) {
        inbox.push(piece);
        loop {
            match inbox.next() {
                Ok(Some(inbox::Came::Message(rustbgpd_wire::Message::Open(open)))) => {
                    session::fuzz_open(&open);
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}
