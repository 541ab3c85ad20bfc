//! The I/O of the trunk as one step: taps to guest, then guest to taps.
//!
//! The engine owns rings and taps and nothing else: no thread, no sleep, no clock. A driver calls [`Engine::step`] for as
//! long as it makes progress and, before it sleeps, [`Engine::arm`]; which thread that is, is not known here.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_ports::drops::{Counter, Drops};

use super::links::{LinkCounters, Links};
use super::receive::{Phase, Receiver};
use super::ring::{Ring, RingError};
use super::send::Sender;

/// Frames per phase: the phase structure is what makes small packets fast, and gains end at about 64 (measured:
/// 239-243 kpps per core in phases of 64 against 215 one by one).
pub const PHASE: u16 = 64;

/// The guest's queue of receive buffers (virtio 1.2 §5.1.2).
pub const RECEIVE: usize = 0;
/// The guest's queue of frames to send.
pub const TRANSMIT: usize = 1;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Frames moved from taps to the guest.
    pub to_guest: u32,
    /// Chains taken from the guest, forwarded or dropped.
    pub from_guest: u32,
}

impl Progress {
    /// Whether anything moved.
    pub fn any(self) -> bool {
        self.to_guest != 0 || self.from_guest != 0
    }
}

/// What a driver has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: there is work now.
    Work,
    /// A kick of either ring, or a frame on a tap ([`Engine::readiness`]).
    TapsAndKicks,
    /// A kick only: the guest has no room for what the taps hold.
    Kicks,
}

/// Counters of the trunk as a whole.
#[derive(Debug, Default)]
pub struct TrunkCounters {
    /// Chains and frames that no link could be blamed for.
    pub drops: Drops,
    /// Times the guest was called (interrupted).
    pub calls: Counter,
    /// Times frames had to wait in the taps because the guest had too few receive buffers.
    pub starved: Counter,
    /// Rings stopped because the guest broke them.
    pub broken: Counter,
    /// When the present guest's first frame reached a tap.
    first_sent: Mutex<Option<Instant>>,
}

impl TrunkCounters {
    /// When the present guest's first frame reached a tap.
    pub fn first_sent(&self) -> Option<Instant> {
        *self
            .first_sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_first_sent(&self, at: Option<Instant>) {
        *self
            .first_sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = at;
    }

    pub(super) fn call(&self, call: Option<&File>) {
        let Some(call) = call else { return };
        self.calls.add(1);
        signal(call);
    }
}

fn signal(mut call: &File) {
    // The VMM shares the open file: it may have taken O_NONBLOCK away again and filled the counter, and a write would wait then.
    // Such a counter is as readable as it gets, so nothing is lost.
    let mut fds = [PollFd::new(call.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
        // A VMM that fills it between the look and the write stops its own trunk; commands then fail by their time limit.
        let _ = call.write(&1u64.to_ne_bytes());
    }
}

/// Rings and taps of one trunk.
#[derive(Debug)]
pub struct Engine {
    links: Links,
    receiver: Option<Receiver>,
    sender: Option<Sender>,
    counters: Arc<TrunkCounters>,
    starved: bool,
    /// Frames stay in the taps: the guest could only drop them.
    held: bool,
    /// Nothing moves: another process has the rings, or will have.
    frozen: bool,
}

impl Engine {
    /// An engine without links and without a guest.
    ///
    /// # Errors
    /// When the kernel gives no epoll instance.
    pub fn new(counters: Arc<TrunkCounters>) -> io::Result<Self> {
        let links = Links::new()?;
        Ok(Self {
            links,
            receiver: None,
            sender: None,
            counters,
            starved: false,
            held: false,
            frozen: false,
        })
    }

    /// What it counts.
    pub fn counters(&self) -> &Arc<TrunkCounters> {
        &self.counters
    }

    /// Moves up to one phase of frames in each direction.
    ///
    /// Cost: at most as many receive chains as the ring has entries, [`PHASE`] chains of the other ring, and the segments of 64 KiB
    /// frames that `send` allows: about a millisecond, whatever the guest does to its rings meanwhile.
    pub fn step(&mut self) -> Progress {
        let mut progress = Progress::default();
        if self.frozen {
            return progress;
        }
        if let Some(receiver) = self.receiver.as_mut().filter(|_| !self.held) {
            self.links.collect_ready();
            match receiver.run(&mut self.links, u32::from(PHASE), &self.counters) {
                Ok(Phase { frames, starved }) => {
                    if starved && !self.starved {
                        self.counters.starved.add(1);
                    }
                    progress.to_guest = frames;
                    self.starved = starved;
                }
                Err(error) => self.give_up(RECEIVE, error),
            }
        }
        if let Some(sender) = &mut self.sender {
            match sender.run(&self.links, PHASE, &self.counters) {
                Ok(chains) => progress.from_guest = chains,
                Err(error) => self.give_up(TRANSMIT, error),
            }
        }
        progress
    }

    /// Prepares for sleep: asks the guest for kicks and says what to wait for.
    pub fn arm(&mut self) -> Wait {
        let mut work = false;
        if self.frozen {
            return Wait::Kicks;
        }
        if let Some(sender) = &mut self.sender {
            match sender.ring.ask_for_kick() {
                Ok(pending) => work |= pending,
                Err(error) => self.give_up(TRANSMIT, error),
            }
        }
        // Receive buffers only matter to a starved engine: else the guest would kick at every refill.
        let starved = self.starved && !self.held && self.links.any_active();
        if let Some(receiver) = self.receiver.as_mut().filter(|_| starved) {
            match receiver.ring.ask_for_kick() {
                Ok(more) => work |= more,
                Err(error) => self.give_up(RECEIVE, error),
            }
        }
        match &self.receiver {
            _ if work => Wait::Work,
            None => Wait::Kicks,
            Some(_) if self.held || starved => Wait::Kicks,
            Some(_) if self.links.any_active() => Wait::Work,
            Some(_) => Wait::TapsAndKicks,
        }
    }

    /// The sleep is over: kicks are no longer wanted.
    pub fn disarm(&mut self) {
        if let Some(sender) = &mut self.sender {
            sender.ring.refuse_kicks();
        }
        if let Some(receiver) = &mut self.receiver {
            receiver.ring.refuse_kicks();
        }
    }

    /// Whether frames stay in the taps, where they keep, instead of going to a guest that is not yet told what to do with them.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Stops all work, after what the guest has made ready was sent; or goes on, looking at every tap anew.
    ///
    /// Cost: at most as many chains as the transmit ring has entries.
    pub fn freeze(&mut self, frozen: bool) {
        if frozen && !self.frozen {
            self.send_ready();
        }
        if !frozen && self.frozen {
            self.links.activate_all();
        }
        self.frozen = frozen;
    }

    fn send_ready(&mut self) {
        let Some(sender) = &mut self.sender else {
            return;
        };
        let most = u32::from(sender.ring.size());
        let mut sent = 0;
        while sent < most {
            match sender.run(&self.links, PHASE, &self.counters) {
                Ok(0) => return,
                Ok(chains) => sent += chains,
                Err(error) => return self.give_up(TRANSMIT, error),
            }
        }
    }

    /// Whether all work is stopped.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Whether both rings are served.
    pub fn is_serving(&self) -> bool {
        self.receiver.is_some() && self.sender.is_some()
    }

    /// Readable when a tap that was empty has a frame.
    pub fn readiness(&self) -> BorrowedFd<'_> {
        self.links.readiness()
    }

    /// Adds a tap as a link, replacing the link of that id.
    ///
    /// # Errors
    /// When the id is no link id or the tap cannot be watched.
    pub fn add_link(
        &mut self,
        id: u16,
        tap: OwnedFd,
        counters: Arc<LinkCounters>,
    ) -> io::Result<()> {
        self.links.add(id, tap, counters)
    }

    /// Removes a link; false when there is none.
    pub fn remove_link(&mut self, id: u16) -> bool {
        self.links.remove(id)
    }

    /// Every link's tap.
    pub fn taps(&self) -> impl Iterator<Item = (u16, BorrowedFd<'_>)> {
        self.links.taps()
    }

    /// Serves a ring from now on. Queue numbers other than the trunk's two are ignored.
    pub fn start_ring(&mut self, queue: usize, mut ring: Ring, call: Option<File>) {
        ring.refuse_kicks();
        match queue {
            RECEIVE => self.receiver = Some(Receiver::new(ring, call)),
            TRANSMIT => {
                self.counters.set_first_sent(None);
                self.sender = Some(Sender::new(ring, call));
            }
            _ => {}
        }
    }

    /// Stops serving a ring; the index from which another backend continues, if it was served.
    pub fn stop_ring(&mut self, queue: usize) -> Option<u16> {
        match queue {
            RECEIVE => self.receiver.take().map(|r| r.ring.base()),
            TRANSMIT => self.sender.take().map(|s| s.ring.base()),
            _ => None,
        }
    }

    /// Replaces the file descriptor by which the guest is called, and calls it: what was published before may have found none.
    pub fn set_call(&mut self, queue: usize, call: Option<File>) {
        call.as_ref().map(signal);
        match (queue, &mut self.receiver, &mut self.sender) {
            (RECEIVE, Some(receiver), _) => receiver.call = call,
            (TRANSMIT, _, Some(sender)) => sender.call = call,
            _ => {}
        }
    }

    fn give_up(&mut self, queue: usize, error: RingError) {
        tracing::error!(queue, %error, "ring stopped: the guest broke it");
        self.counters.broken.add(1);
        self.stop_ring(queue);
    }
}
