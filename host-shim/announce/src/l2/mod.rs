//! Answers on the node's own link for addresses that no card has: ARP and neighbor discovery (row O-20). A switch and its
//! hosts send to where the answer says; who takes an address over says so unasked.

mod frames;
mod socket;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub use self::frames::Mac;
use self::socket::Wire;

/// How often it is said that an address has moved, and how long between: a frame may be lost.
const SAYINGS: u32 = 3;
const BETWEEN: Duration = Duration::from_millis(500);
/// Questions answered before something else is done.
const BURST: usize = 64;

/// The thread that answers; it ends with this.
#[derive(Debug)]
pub struct Responder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    news: EventFd,
}

#[derive(Debug)]
struct State {
    own: Mac,
    addresses: BTreeSet<IpAddr>,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = self.news.write(1); // only fails when the thread is awake
    }
}

impl Responder {
    /// Listens on the card of that index and MAC; nothing is answered before [`serve`](Self::serve).
    ///
    /// # Errors
    /// As the kernel says.
    pub fn start(card: u32, own: Mac) -> io::Result<Self> {
        let wire = Wire::open(card)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                own,
                addresses: BTreeSet::new(),
                stop: false,
            }),
            news: EventFd::from_value_and_flags(0, flags)?,
        });
        let answering = shared.clone();
        std::thread::Builder::new()
            .name("l2".into())
            .spawn(move || answering.run(&wire))?;
        Ok(Self(shared))
    }

    /// Answers for these addresses and no others.
    pub fn serve(&self, addresses: BTreeSet<IpAddr>) {
        let mut state = self.0.lock();
        if state.addresses != addresses {
            state.addresses = addresses;
            drop(state);
            self.0.wake();
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.0.lock().stop = true;
        self.0.wake();
    }
}

/// When an address is to be announced next, and how often still.
type Sayings = BTreeMap<IpAddr, (Instant, u32)>;

impl Shared {
    fn run(&self, wire: &Wire) {
        let mut known = BTreeSet::new();
        let mut sayings = Sayings::new();
        let mut buffer = [0; 256];
        loop {
            let own = {
                let state = self.lock();
                if state.stop {
                    return;
                }
                let now = Instant::now();
                sayings.retain(|address, _| state.addresses.contains(address));
                for address in state.addresses.difference(&known) {
                    sayings.insert(*address, (now, SAYINGS));
                }
                known.clone_from(&state.addresses);
                state.own
            };
            say(wire, own, &mut sayings);
            if !self.wait(wire, &sayings) {
                return;
            }
            for _ in 0..BURST {
                let Some(frame) = wire.next(&mut buffer) else {
                    break;
                };
                let asked = frames::question(frame).filter(|it| known.contains(&it.wanted));
                if let Some(answer) = asked.and_then(|it| frames::answer(&it, own)) {
                    // Who asked asks again.
                    let _ = wire.send(&answer);
                }
            }
        }
    }

    /// Waits for questions, for news, or until something is to be said; `false` if that cannot be.
    fn wait(&self, wire: &Wire, sayings: &Sayings) -> bool {
        let timeout = sayings.values().map(|(at, _)| *at).min();
        let timeout = timeout.map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [read(wire.as_fd()), read(self.news.as_fd())];
        let waited = poll(&mut fds, timeout);
        let _ = self.news.read(); // nothing to read is no news
        match waited {
            Ok(_) | Err(nix::errno::Errno::EINTR) => true,
            Err(error) => {
                tracing::error!(%error, "questions for addresses are no longer answered");
                false
            }
        }
    }
}

fn say(wire: &Wire, own: Mac, sayings: &mut Sayings) {
    let now = Instant::now();
    for (address, (at, left)) in sayings.iter_mut().filter(|(_, (at, _))| *at <= now) {
        if let Some(frame) = frames::announcement(*address, own) {
            let _ = wire.send(&frame); // it is said again
        }
        *at = now + BETWEEN;
        *left -= 1;
    }
    sayings.retain(|_, (_, left)| *left > 0);
}
