//! The engine with what surrounds it, for whichever thread steps it: commands, kicks, holds, and what to sleep on.
//!
//! The thread that steps it is the driver's own (`driver`), or the one that runs the guest (`pair`). Neither is known here:
//! [`Core::step`] moves what there is, and [`Core::sleep`] waits until there may be more.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use sluice_ports::offloads::Offloads;
use sluice_ports::tap;

use crate::driver::DriverCounters;
use crate::engine::{Engine, Progress, Wait};
use crate::mailbox::{Command, EngineReport, Inbox, Mailbox, mailbox};

const EDGE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLET);
const MAIL: u64 = 0;
const TAPS: u64 = 1;
/// What the stepping thread waits for besides: see [`Alarm`].
const OTHER: u64 = 2;
/// Kick of queue `n` is event `KICK + n`.
const KICK: u64 = 3;

/// Why a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// There may be work.
    Event,
    /// The time is over.
    Timeout,
}

/// What ends a core's sleep, for any thread to add to.
#[derive(Clone, Debug)]
pub struct Alarm(Arc<Epoll>);

impl Alarm {
    /// Ends every sleep while this is readable. What is in it is for others to take.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn watch(&self, other: BorrowedFd<'_>) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, OTHER);
        Ok(self.0.add(other, event)?)
    }
}

/// The engine and its surroundings.
#[derive(Debug)]
pub struct Core {
    engine: Engine,
    inbox: Inbox,
    epoll: Arc<Epoll>,
    kicks: [Option<File>; 2],
    /// What the guest takes, and what the daemon allows.
    offloads: Offloads,
    allowed: Offloads,
    taps_watched: bool,
    held_until: Option<Instant>,
    ended: bool,
    counters: Arc<DriverCounters>,
}

impl Core {
    /// A core without a guest, and the way to send it commands.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn new(engine: Engine, counters: Arc<DriverCounters>) -> io::Result<(Self, Mailbox)> {
        let (mailbox, inbox) = mailbox()?;
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        epoll.add(inbox.readiness(), EpollEvent::new(EDGE, MAIL))?;
        let taps = EpollEvent::new(EpollFlags::EPOLLIN, TAPS);
        epoll.add(engine.readiness(), taps)?;
        let core = Self {
            engine,
            inbox,
            epoll,
            kicks: [None, None],
            offloads: Offloads::ALL,
            allowed: Offloads::ALL,
            taps_watched: true,
            held_until: None,
            ended: false,
            counters,
        };
        Ok((core, mailbox))
    }

    /// What ends its sleeps.
    pub fn alarm(&self) -> Alarm {
        Alarm(self.epoll.clone())
    }

    /// Readable after a command was sent.
    pub fn mail(&self) -> BorrowedFd<'_> {
        self.inbox.readiness()
    }

    /// Carries out commands, and moves up to one phase of frames in each direction.
    pub fn step(&mut self) -> Progress {
        self.read_mail();
        let progress = self.engine.step();
        if progress.any() {
            self.counters.busy.add(1);
        } else if let Some(until) = self.held_until
            && until <= Instant::now()
        {
            tracing::info!("frames no longer wait for a configured appliance");
            self.hold(None);
        }
        progress
    }

    /// A command asked for the end.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Waits for work, at most for `limit`.
    pub fn sleep(&mut self, limit: Option<Duration>) -> Woken {
        let wait = self.engine.arm();
        if wait == Wait::Work {
            self.engine.disarm();
            return Woken::Event;
        }
        self.watch_taps(wait == Wait::TapsAndKicks);
        self.counters.sleeps.add(1);
        let held = self
            .held_until
            .map(|until| until.saturating_duration_since(Instant::now()));
        let shortest = match (limit, held) {
            (Some(limit), Some(held)) => Some(limit.min(held)),
            (limit, held) => limit.or(held),
        };
        let woken = self.wait(shortest);
        self.engine.disarm();
        woken
    }

    /// Which descriptor it was does not matter: the next step looks everywhere. Kicks are edge-triggered and never read, which
    /// saves a syscall per wake.
    fn wait(&self, limit: Option<Duration>) -> Woken {
        let mut events = [EpollEvent::empty(); 4];
        let timeout = limit.map_or(EpollTimeout::NONE, |limit| {
            let millis = limit.as_micros().div_ceil(1000);
            EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::MAX)
        });
        match self.epoll.wait(&mut events, timeout) {
            Ok(0) => Woken::Timeout,
            Ok(_) | Err(nix::errno::Errno::EINTR) => Woken::Event,
            Err(error) => {
                tracing::error!(%error, "the trunk cannot sleep");
                Woken::Event
            }
        }
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

    fn hold(&mut self, until: Option<Instant>) {
        self.held_until = until;
        self.engine.hold(until.is_some());
    }

    /// Carries out commands that were sent.
    pub fn read_mail(&mut self) {
        for command in self.inbox.take() {
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::StartRing {
                queue,
                ring,
                call,
                kick,
            } => {
                self.set_kick(queue, kick);
                self.engine.start_ring(queue, *ring, call);
            }
            Command::StopRing { queue, reply } => {
                self.set_kick(queue, None);
                // The asker may have given up; then the index is not needed.
                let _ = reply.send(self.engine.stop_ring(queue));
            }
            Command::SetCall { queue, call } => self.engine.set_call(queue, call),
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
            Command::Stop => self.ended = true,
        }
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

fn apply(id: u16, tap: BorrowedFd<'_>, offloads: Offloads) {
    let set = tap::set_offloads(tap, offloads);
    // What is no tap, as the probes' link, takes whole frames only.
    let is_tap = |error: &io::Error| error.raw_os_error() != Some(libc::ENOTTY);
    if let Err(error) = set.or_else(|error| if is_tap(&error) { Err(error) } else { Ok(()) }) {
        tracing::warn!(link = id, %error, ?offloads, "tap does not take the offloads");
    }
}
