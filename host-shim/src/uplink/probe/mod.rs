//! Probes of the ways to other nodes: echoes of two sizes, small and as large as pods' packets may be, which travel as pods'
//! packets do, through the appliance and its tunnel, to the first address of the peer's range. Nodes of ours answer there, and
//! so does flannel's VXLAN, whose device has that address.
//!
//! The link has no interface: its frames go between the appliance's process and this thread. `echo` makes and reads them, `path` judges one
//! peer, `paths` says whose turn it is.

mod echo;
mod path;
mod paths;

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use sluice_contract::row::LinkRow;
use sluice_contract::{Identity, LinkId, Prefix, Row};
use sluice_ports::wire;

use self::echo::{Echo, Kind};
use self::paths::{Paths, Send, Word};
use super::config::ProbeConfig;
use super::report::NetworkReport;
use crate::control::Control;

pub(super) use self::paths::Target;

/// Frames read before something else is done.
const BURST: usize = 256;
/// The longest frame that comes.
const FRAME: usize = 66 << 10;
/// Answers in a second: what many peers ask at their own budgets, and no flood.
const ANSWERS: u32 = 2000;
const SECOND: Duration = Duration::from_secs(1);

/// The address by which a range's node is probed: its first, which is no pod's. `None` if the range is too narrow to have one.
pub(super) fn end_of(range: Prefix) -> Option<IpAddr> {
    let widest = if range.address().is_ipv4() { 30 } else { 126 };
    (range.length() <= widest).then(|| range.address())
}

/// The link of the probes, as the appliance knows it.
pub(super) fn link(addresses: impl IntoIterator<Item = IpAddr>, mtu: u16) -> Row {
    Row::Link(LinkRow {
        id: LinkId::PROBES,
        mac: echo::OWN,
        addresses: addresses.into_iter().take(2).collect(),
        mtu,
        identity: Identity::HOST,
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    })
}

/// What the thread and others share.
#[derive(Debug)]
struct Shared {
    paths: Mutex<Paths>,
    ending: AtomicBool,
    wake: EventFd,
}

impl Shared {
    fn paths(&self) -> MutexGuard<'_, Paths> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of the peers, for those who ask.
#[derive(Clone, Debug)]
pub(super) struct Probes(Arc<Shared>);

impl Probes {
    pub(super) fn new(config: ProbeConfig) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(Shared {
            paths: Mutex::new(Paths::new(config)),
            ending: AtomicBool::default(),
            wake: EventFd::from_value_and_flags(0, flags)?,
        })))
    }

    /// These are to be probed and no others.
    pub(super) fn retarget(&self, targets: &[Target]) {
        self.0.paths().retarget(targets, Instant::now());
        self.wake();
    }

    /// The peers to whom less comes through than should, and how much.
    pub(super) fn limits(&self) -> BTreeMap<IpAddr, u16> {
        self.0.paths().limits()
    }

    /// Adds what is known of each peer.
    pub(super) fn complete(&self, report: &mut NetworkReport) {
        let (paths, now) = (self.0.paths(), Instant::now());
        for peer in &mut report.peers {
            if let Some(address) = peer.address {
                peer.probe = paths.report(address, now);
            }
        }
    }

    fn wake(&self) {
        let _ = self.0.wake.write(1); // only fails when the thread is awake
    }
}

/// The thread that sends and answers.
#[derive(Debug)]
pub(super) struct Prober {
    probes: Probes,
    thread: Option<JoinHandle<()>>,
}

impl Prober {
    /// Begins; the descriptor is for the port [`LinkId::PROBES`]. `changed` is called when another size is the largest that
    /// comes through to a peer.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn start(
        probes: &Probes,
        control: &Control,
        changed: impl Fn() + std::marker::Send + 'static,
    ) -> io::Result<(Self, OwnedFd)> {
        let (own, appliances) = wire::pair()?;
        // Whose echo it is: no other program's, nor a former life's.
        let random = RandomState::new();
        let worker = Worker {
            probes: probes.clone(),
            control: control.clone(),
            socket: own.into(),
            id: random.hash_one(0) as u16,
            cookie: random.hash_one(1),
            limits: BTreeMap::new(),
            changed: Box::new(changed),
            answers: (Instant::now(), 0),
        };
        let thread = std::thread::Builder::new().name("probes".into());
        let prober = Self {
            probes: probes.clone(),
            thread: Some(thread.spawn(move || worker.run())?),
        };
        Ok((prober, appliances))
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.probes.0.ending.store(true, Ordering::Release);
        self.probes.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the probes ended by a panic");
        }
    }
}

struct Worker {
    probes: Probes,
    control: Control,
    /// A packet is a frame; that the kernel keeps their order is of no use here.
    socket: UnixDatagram,
    id: u16,
    cookie: u64,
    limits: BTreeMap<IpAddr, u16>,
    changed: Box<dyn Fn() + std::marker::Send>,
    /// Since when, and how many.
    answers: (Instant, u32),
}

impl Worker {
    fn run(mut self) {
        let mut frame = vec![0; FRAME];
        while !self.probes.0.ending.load(Ordering::Acquire) {
            let next = self.turn();
            if let Err(error) = self.wait(next) {
                tracing::error!(%error, "peers are no longer probed");
                return;
            }
            let _ = self.probes.0.wake.read(); // not an event of ours is no error
            for _ in 0..BURST {
                let Ok(length) = self.socket.recv(&mut frame) else {
                    break;
                };
                let echo = frame.get(..length).and_then(Echo::read);
                if let Some(echo) = echo {
                    self.hear(&echo);
                }
            }
        }
    }

    /// Sends what is due; when the next is.
    fn turn(&mut self) -> Option<Instant> {
        let status = self.control.status();
        let (sends, words, limits, next) = {
            let now = Instant::now();
            let mut paths = self.probes.0.paths();
            if !(status.connected && status.settled) {
                paths.excuse(now);
                return paths.next(now);
            }
            let (sends, words) = paths.turn(now);
            (sends, words, paths.limits(), paths.next(now))
        };
        for send in sends {
            self.send(&send);
        }
        words.iter().for_each(say);
        if limits != self.limits {
            self.limits = limits;
            (self.changed)();
        }
        next
    }

    fn send(&self, send: &Send) {
        let echo = Echo {
            kind: Kind::Request,
            from: send.ends.0,
            to: send.ends.1,
            id: self.id,
            sequence: send.sequence,
            cookie: self.cookie,
            size: send.size,
        };
        if let Some(frame) = echo.frame() {
            // A process that takes nothing is as good as a loss.
            let _ = self.socket.send(&frame);
        }
    }

    fn hear(&mut self, echo: &Echo) {
        let now = Instant::now();
        let mut paths = self.probes.0.paths();
        match echo.kind {
            Kind::Reply if (echo.id, echo.cookie) == (self.id, self.cookie) => {
                paths.answered(echo.from, echo.sequence, echo.size, now);
            }
            Kind::Request if paths.is_peer(echo.from) => {
                drop(paths);
                if now.saturating_duration_since(self.answers.0) >= SECOND {
                    self.answers = (now, 0);
                }
                if self.answers.1 < ANSWERS
                    && let Some(frame) = echo.answer()
                {
                    self.answers.1 += 1;
                    let _ = self.socket.send(&frame);
                }
            }
            _ => {}
        }
    }

    fn wait(&self, next: Option<Instant>) -> io::Result<()> {
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [read(self.socket.as_fd()), read(self.probes.0.wake.as_fd())];
        let timeout = next.map_or(PollTimeout::NONE, |next| {
            let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn say(word: &Word) {
    match word {
        Word::Good(peer, what) => tracing::info!(%peer, "{what}"),
        Word::Bad(peer, what) => tracing::warn!(%peer, "{what}"),
        Word::More(count) => tracing::warn!(
            count,
            "more was found about peers; `sluice peers` has all of it"
        ),
    }
}
