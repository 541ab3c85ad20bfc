//! The thread that runs the engine: polls while there is work and a little longer, then sleeps on taps and kicks.
//!
//! How long it polls adapts as a halt-polling hypervisor does: a sleep that ended sooner than the longest allowed poll says
//! that polling would have caught it, so the poll grows; a long sleep says it was wasted, so it shrinks, down to zero. On
//! two cores a spinning thread takes time from the pods, on many it saves a wake of 20-70 µs per burst.
//!
//! Where others want the core (`crowd`), or the guest is to run on it (`place`), the thread does not poll: it would take time
//! from those whose frames it waits for.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::crowd::Crowd;
use super::drops::Counter;
use super::engine::{Engine, Wait};
use super::features::Offloads;
use super::mailbox::{Inbox, mailbox};
use super::place::{Place, Seat};
use crate::tap;

pub use super::mailbox::{Command, EngineReport, Mailbox, Unanswered};

/// How long to poll.
#[derive(Clone, Copy, Debug)]
pub struct Polling {
    /// The longest poll before sleeping; zero means never to poll.
    pub longest: Duration,
}

/// What the driver has been doing.
#[derive(Debug, Default)]
pub struct DriverCounters {
    /// Steps that moved something.
    pub busy: Counter,
    /// Times it went to sleep.
    pub sleeps: Counter,
    seat: Mutex<Seat>,
}

impl DriverCounters {
    /// Which cores the thread takes at present.
    pub fn seat(&self) -> Seat {
        *self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_seat(&self, seat: Seat) {
        *self.seat.lock().unwrap_or_else(PoisonError::into_inner) = seat;
    }
}

/// The running thread.
#[derive(Debug)]
pub struct Driver {
    mailbox: Mailbox,
    counters: Arc<DriverCounters>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Driver {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel gives no thread or descriptor.
    pub fn start(
        engine: Engine,
        polling: Polling,
        counters: Arc<DriverCounters>,
    ) -> io::Result<Self> {
        let (mailbox, inbox) = mailbox()?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(inbox.readiness(), EpollEvent::new(EDGE, WAKE))?;
        epoll.add(
            engine.readiness(),
            EpollEvent::new(EpollFlags::EPOLLIN, TAPS),
        )?;
        let own_counters = counters.clone();
        let run = move || {
            let mut running = Running {
                engine,
                inbox,
                epoll,
                kicks: [None, None],
                offloads: Offloads::ALL,
                allowed: Offloads::ALL,
                longest: polling.longest,
                poll: polling.longest,
                crowd: Crowd::default(),
                place: Place::here(),
                taps_watched: true,
                held_until: None,
                counters,
            };
            running.run();
        };
        let thread = std::thread::Builder::new()
            .name("trunk".into())
            .spawn(run)?;
        Ok(Self {
            mailbox,
            counters: own_counters,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The way to the thread.
    pub fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// What it has been doing.
    pub fn counters(&self) -> &DriverCounters {
        &self.counters
    }

    /// Ends the thread and closes all taps.
    pub fn stop(&self) {
        // It may have ended by itself.
        let _ = self.mailbox.send(Command::Stop);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|t| t.join().is_err()) {
            tracing::error!("the trunk's thread had died");
        }
    }
}

const EDGE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLET);
const WAKE: u64 = 0;
const TAPS: u64 = 1;
/// Kick of queue `n` is event `KICK + n`.
const KICK: u64 = 2;

struct Running {
    engine: Engine,
    inbox: Inbox,
    epoll: Epoll,
    kicks: [Option<File>; 2],
    /// What the guest takes, and what the daemon allows.
    offloads: Offloads,
    allowed: Offloads,
    longest: Duration,
    /// The present length of a poll.
    poll: Duration,
    crowd: Crowd,
    place: Place,
    taps_watched: bool,
    held_until: Option<Instant>,
    counters: Arc<DriverCounters>,
}

impl Running {
    fn run(&mut self) {
        let mut idle_since = None;
        loop {
            if !self.read_mail() {
                return;
            }
            let progress = self.engine.step();
            if progress.any() {
                let frames = progress.to_guest + progress.from_guest;
                if self.place.moved(frames, Instant::now()) {
                    self.counters.set_seat(self.place.seat());
                }
                self.counters.busy.add(1);
                idle_since = None;
                continue;
            }
            let now = Instant::now();
            if self.held_until.is_some_and(|until| until <= now) {
                tracing::info!("frames no longer wait for a configured appliance");
                self.hold(None);
                continue;
            }
            let since = *idle_since.get_or_insert(now);
            self.crowd.look(now, since);
            let others_wait = self.crowd.is_there(now) || self.place.seat() == Seat::Shared;
            if now.duration_since(since) < self.poll && !others_wait {
                std::hint::spin_loop();
                continue;
            }
            self.sleep();
            idle_since = None;
        }
    }

    fn hold(&mut self, until: Option<Instant>) {
        self.held_until = until;
        self.engine.hold(until.is_some());
    }

    fn sleep(&mut self) {
        let wait = self.engine.arm();
        if wait == Wait::Work {
            self.engine.disarm();
            return;
        }
        self.watch_taps(wait == Wait::TapsAndKicks);
        self.counters.sleeps.add(1);
        let began = Instant::now();
        let mut events = [EpollEvent::empty(); 4];
        // Which descriptor it was does not matter: the next step looks everywhere. Kicks are edge-triggered and never
        // read, which saves a syscall per wake.
        let timeout = self.held_until.map_or(EpollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(began).as_millis() + 1;
            EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
        });
        let woken = self.epoll.wait(&mut events, timeout);
        if let Err(error) = woken
            && error != nix::errno::Errno::EINTR
        {
            tracing::error!(%error, "the trunk cannot sleep");
        }
        self.adapt(began.elapsed());
        self.engine.disarm();
    }

    /// See the top of this file.
    fn adapt(&mut self, slept: Duration) {
        self.poll = if slept < self.longest {
            (self.poll * 2).clamp(SHORTEST_POLL, self.longest)
        } else if self.poll > SHORTEST_POLL {
            self.poll / 2
        } else {
            Duration::ZERO
        };
    }

    /// A level-triggered watch on taps that the guest has no room for would end every sleep at once.
    fn watch_taps(&mut self, watched: bool) {
        if watched == self.taps_watched {
            return;
        }
        let interest = if watched {
            EpollFlags::EPOLLIN
        } else {
            EpollFlags::empty()
        };
        let mut event = EpollEvent::new(interest, TAPS);
        match self.epoll.modify(self.engine.readiness(), &mut event) {
            Ok(()) => self.taps_watched = watched,
            Err(error) => tracing::error!(%error, "cannot change what the trunk waits for"),
        }
    }

    /// Carries out commands that were sent; false when the thread is to end.
    fn read_mail(&mut self) -> bool {
        for command in self.inbox.take() {
            match command {
                Command::StartRing {
                    queue,
                    ring,
                    call,
                    kick,
                } => {
                    self.set_kick(queue, kick);
                    self.place.settle();
                    self.counters.set_seat(self.place.seat());
                    self.engine.start_ring(queue, *ring, call);
                }
                Command::StopRing { queue, reply } => {
                    self.set_kick(queue, None);
                    // The asker may have given up; then nobody needs the index.
                    let _ = reply.send(self.engine.stop_ring(queue));
                }
                Command::SetCall { queue, call } => self.engine.set_call(queue, call),
                Command::Serve(vmm) => {
                    self.place.belongs_to(vmm);
                    self.counters.set_seat(self.place.seat());
                }
                Command::Allow(offloads) => {
                    self.allowed = offloads;
                    self.apply_offloads();
                }
                Command::Report { reply } => {
                    let _ = reply.send(self.report());
                }
                Command::Freeze { frozen, reply } => {
                    self.engine.freeze(frozen);
                    let _ = reply.send(());
                }
                Command::Hold(limit) => self.hold(Some(Instant::now() + limit)),
                Command::Release => self.hold(None),
                Command::Offloads(offloads) => {
                    self.offloads = offloads;
                    self.apply_offloads();
                }
                Command::AddLink {
                    id,
                    tap,
                    counters,
                    reply,
                } => {
                    apply(id, tap.as_fd(), self.offloads.and(self.allowed));
                    let _ = reply.send(self.engine.add_link(id, tap, counters));
                }
                Command::RemoveLink { id, reply } => {
                    let _ = reply.send(self.engine.remove_link(id));
                }
                Command::Stop => return false,
            }
        }
        true
    }

    fn apply_offloads(&self) {
        for (id, tap) in self.engine.taps() {
            apply(id, tap, self.offloads.and(self.allowed));
        }
    }

    fn report(&self) -> EngineReport {
        EngineReport {
            held: self.held_until.is_some(),
            frozen: self.engine.is_frozen(),
            serving: self.engine.is_serving(),
        }
    }

    fn set_kick(&mut self, queue: usize, kick: Option<File>) {
        let Some(slot) = self.kicks.get_mut(queue) else {
            return;
        };
        if let Some(old) = slot.take() {
            // The VMM holds a copy of the descriptor, so closing ours would not end the watch.
            if let Err(error) = self.epoll.delete(&old) {
                tracing::warn!(queue, %error, "kick was not watched");
            }
        }
        let Some(kick) = kick else { return };
        let event = EpollEvent::new(EDGE, KICK + queue as u64);
        if let Err(error) = self.epoll.add(&kick, event) {
            tracing::error!(queue, %error, "cannot watch the kick");
            return;
        }
        *slot = Some(kick);
    }
}

/// The poll that a short sleep starts with.
const SHORTEST_POLL: Duration = Duration::from_micros(5);

fn apply(id: u16, tap: std::os::fd::BorrowedFd<'_>, offloads: Offloads) {
    let set = tap::set_offloads(tap, offloads);
    // What is no tap, as the probes' link, takes whole frames only.
    let is_tap = |error: &io::Error| error.raw_os_error() != Some(libc::ENOTTY);
    if let Err(error) = set.or_else(|error| if is_tap(&error) { Err(error) } else { Ok(()) }) {
        tracing::warn!(link = id, %error, ?offloads, "tap does not take the offloads");
    }
}
