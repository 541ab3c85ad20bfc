//! The two threads that can move the frames of a guest in this process, and the hand-over between them.
//!
//! [`Pair`] is the engine's own thread. [`Inline`] is for the thread that runs the guest, which calls [`Inline::rest`] whenever the guest has
//! nothing to do. The thread that moves the frames holds the lock on the engine and asks `policy` whether to go on; the other waits.
//! Commands are carried out by the one that holds the lock, or, while the guest runs, by the engine's own thread.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use sluice_ports::message::{Drive, Reason};

use crate::core::{Alarm, Core, Woken};
use crate::driver::{DriverCounters, Mailbox, run_once};
use crate::engine::{Engine, TrunkCounters};
use crate::policy::{Policy, Wish};
use crate::poll::Poll;

/// Frames that a resting guest is given before it runs again. More would wait too long for their turn.
const MOST: u32 = 192;
/// How long the guest's thread may wait between two looks at what else it waits for.
const LOOK: Duration = Duration::from_millis(500);
/// Between two tries to reach commands that the other thread will most likely carry out itself.
const RETRY: Duration = Duration::from_millis(1);

/// Which thread moves the frames, for reports and for the guest.
pub struct Driving {
    drive: AtomicU8,
    reason: AtomicU8,
    exit_nanos: AtomicU32,
    features: AtomicU64,
    /// Says to the guest whether frames move while it runs, and ends a sleep of its thread.
    tell: Box<dyn Fn(Drive) + Send + Sync>,
}

impl std::fmt::Debug for Driving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driving")
            .field("drive", &self.drive())
            .finish_non_exhaustive()
    }
}

const DRIVES: [Drive; 2] = [Drive::Apart, Drive::Inline];
const REASONS: [Reason; 8] = [
    Reason::OnlyOne,
    Reason::Asked,
    Reason::CheapExit,
    Reason::OneCore,
    Reason::ManyFrames,
    Reason::FewFrames,
    Reason::RareFrames,
    Reason::Crowded,
];

fn place<T: PartialEq>(all: &[T], one: &T) -> u8 {
    let at = all.iter().position(|other| other == one).unwrap_or(0);
    u8::try_from(at).unwrap_or(0)
}

impl Driving {
    /// A program that has only one way.
    pub fn only(drive: Drive) -> Arc<Self> {
        Self::new((drive, Reason::OnlyOne), Box::new(|_| {}))
    }

    fn new((drive, reason): (Drive, Reason), tell: Box<dyn Fn(Drive) + Send + Sync>) -> Arc<Self> {
        tell(drive);
        Arc::new(Self {
            drive: AtomicU8::new(place(&DRIVES, &drive)),
            reason: AtomicU8::new(place(&REASONS, &reason)),
            exit_nanos: AtomicU32::new(0),
            features: AtomicU64::new(0),
            tell,
        })
    }

    /// Which thread, and why.
    pub fn drive(&self) -> (Drive, Reason) {
        let at = |index: &AtomicU8| usize::from(index.load(Ordering::Acquire));
        (
            DRIVES.get(at(&self.drive)).copied().unwrap_or_default(),
            REASONS.get(at(&self.reason)).copied().unwrap_or_default(),
        )
    }

    /// What an exit costs, once it was measured.
    pub fn exit_nanos(&self) -> Option<u32> {
        Some(self.exit_nanos.load(Ordering::Relaxed)).filter(|nanos| *nanos != 0)
    }

    /// The features that the guest accepted.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    /// The guest accepted these features.
    pub fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    fn set(&self, (drive, reason): (Drive, Reason)) {
        self.reason
            .store(place(&REASONS, &reason), Ordering::Release);
        let before = self.drive.swap(place(&DRIVES, &drive), Ordering::AcqRel);
        if before != place(&DRIVES, &drive) {
            (self.tell)(drive);
        }
    }
}

#[derive(Debug)]
struct State {
    core: Core,
    policy: Policy,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    driving: Arc<Driving>,
    ended: AtomicBool,
    /// Wakes the engine's own thread: its turn has come, or the end.
    turn: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, drive: Drive) -> bool {
        self.driving.drive().0 == drive
    }

    /// Lets the policy decide; whether the other thread is to go on.
    fn hands_over(&self, state: &mut State, now: Instant) -> bool {
        if let Some(nanos) = self.driving.exit_nanos() {
            state.policy.exit_costs(Duration::from_nanos(nanos.into()));
        }
        let changed = state.policy.review(now);
        if changed || state.policy.present() != self.driving.drive() {
            self.driving.set(state.policy.present());
        }
        changed
    }
}

/// The engine's own thread.
#[derive(Debug)]
pub struct Pair {
    shared: Arc<Shared>,
    mailbox: Mailbox,
    thread: Option<JoinHandle<()>>,
}

/// What the guest's thread does with the engine.
#[derive(Debug)]
pub struct Inline {
    shared: Arc<Shared>,
    trunk: Arc<TrunkCounters>,
    alarm: Alarm,
    poll: Poll,
}

/// Why a rest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// The guest has frames, or is to look for itself.
    Frames,
    /// One of the other descriptors is readable, or the time is over: the caller looks.
    Other,
    /// Frames are moved by the engine's own thread: the caller sleeps as it likes.
    Apart,
}

impl Pair {
    /// Starts the engine's own thread. `tell` says to the guest whether frames move while it runs, and
    /// ends a sleep of the guest's thread.
    ///
    /// # Errors
    /// When the kernel gives no thread or descriptor.
    pub fn start(
        engine: Engine,
        wish: Wish,
        longest_poll: Duration,
        counters: Arc<DriverCounters>,
        tell: Box<dyn Fn(Drive) + Send + Sync>,
    ) -> io::Result<(Self, Inline)> {
        let trunk = engine.counters().clone();
        let (core, mailbox) = Core::new(engine, counters)?;
        let alarm = core.alarm();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let policy = Policy::new(wish, cores);
        let driving = Driving::new(policy.present(), tell);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let watcher = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        watcher.add(core.mail(), EpollEvent::new(edge, 0))?;
        let turn = EventFd::from_flags(flags)?;
        watcher.add(&turn, EpollEvent::new(edge, 1))?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State { core, policy }),
            driving,
            ended: AtomicBool::new(false),
            turn,
        });
        let thread = std::thread::Builder::new().name("trunk".into()).spawn({
            let (shared, mailbox) = (shared.clone(), mailbox.clone());
            move || run(&shared, &mailbox, &watcher, longest_poll)
        })?;
        let inline = Inline {
            shared: shared.clone(),
            trunk,
            alarm,
            poll: Poll::new(longest_poll),
        };
        let pair = Self {
            shared,
            mailbox,
            thread: Some(thread),
        };
        Ok((pair, inline))
    }

    /// The way to the engine.
    pub fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// Which thread moves the frames.
    pub fn driving(&self) -> &Arc<Driving> {
        &self.shared.driving
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        // Only fails when the counter is full, and then the thread is awake.
        let _ = self.shared.turn.write(1);
        // One that has the lock for good would be asleep on its taps: commands wake it.
        let _ = self.mailbox.send(crate::driver::Command::Stop);
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the trunk's thread had died");
        }
    }
}

fn run(shared: &Shared, mailbox: &Mailbox, watcher: &Epoll, longest_poll: Duration) {
    let mut poll = Poll::new(longest_poll);
    while !shared.ended.load(Ordering::Acquire) {
        if shared.is(Drive::Apart) {
            move_frames(shared, &mut poll);
            continue;
        }
        let mut events = [EpollEvent::empty(); 2];
        // An error ends the wait early, which does no harm: what it waits for is looked at.
        let _ = watcher.wait(&mut events, EpollTimeout::NONE);
        while mailbox.is_waiting() && shared.is(Drive::Inline) {
            match shared.state.try_lock() {
                Ok(mut state) => state.core.read_mail(),
                Err(TryLockError::Poisoned(state)) => state.into_inner().core.read_mail(),
                // The guest's thread has it, and the same mail wakes that one.
                Err(TryLockError::WouldBlock) => std::thread::sleep(RETRY),
            }
        }
    }
}

/// Moves frames until the policy gives them to the guest's thread.
fn move_frames(shared: &Shared, poll: &mut Poll) {
    let mut state = shared.lock();
    while shared.is(Drive::Apart) && !shared.ended.load(Ordering::Acquire) {
        let frames = run_once(&mut state.core, poll, Some(LOOK));
        let now = Instant::now();
        if frames != 0 {
            state.policy.moved(frames, now);
        } else if poll.is_crowded(now) {
            state.policy.crowded(now);
        }
        shared.hands_over(&mut state, now);
    }
}

impl Inline {
    /// Ends every rest when this becomes readable. The caller takes what is in it.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn watch(&self, other: BorrowedFd<'_>) -> io::Result<()> {
        self.alarm.watch(other)
    }

    /// The cost of an exit was measured.
    pub fn exit_costs(&self, exit: Duration) {
        let nanos = u32::try_from(exit.as_nanos()).unwrap_or(u32::MAX);
        self.shared
            .driving
            .exit_nanos
            .store(nanos, Ordering::Relaxed);
    }

    /// The guest has nothing to do: moves what it has sent, and waits for something to give it, at most for `limit`.
    pub fn rest(&mut self, limit: Option<Duration>) -> Rest {
        if !self.shared.is(Drive::Inline) {
            return Rest::Apart;
        }
        let shared = self.shared.clone();
        let mut state = shared.lock();
        let deadline = limit.map(|limit| Instant::now() + limit);
        let calls = self.trunk.calls.value();
        let (mut frames, mut given) = (0, 0);
        loop {
            let progress = state.core.step();
            if progress.any() {
                self.poll.worked();
                given += progress.to_guest;
                frames += progress.to_guest + progress.from_guest;
                if given < MOST {
                    continue;
                }
            }
            let now = Instant::now();
            let hands_over = self.turn_ends(&mut state, &mut frames, now);
            if given != 0 || self.trunk.calls.value() != calls || hands_over {
                return Rest::Frames;
            }
            let left = deadline.map(|at| at.saturating_duration_since(now));
            if left == Some(Duration::ZERO) {
                return Rest::Other;
            }
            if self.poll.goes_on(now) {
                std::hint::spin_loop();
                continue;
            }
            let woken = state
                .core
                .sleep(Some(left.map_or(LOOK, |left| left.min(LOOK))));
            self.poll.slept(now.elapsed());
            let moves = state.core.step();
            given += moves.to_guest;
            frames += moves.to_guest + moves.from_guest;
            if given == 0 && (woken == Woken::Timeout || !moves.any()) {
                self.turn_ends(&mut state, &mut frames, Instant::now());
                return Rest::Other;
            }
        }
    }

    /// Tells the policy of the frames since the last time, and lets it decide. True when the other thread goes on.
    fn turn_ends(&self, state: &mut State, frames: &mut u32, now: Instant) -> bool {
        if *frames != 0 {
            state.policy.moved(std::mem::take(frames), now);
        }
        let hands_over = self.shared.hands_over(state, now);
        if hands_over {
            // Only fails when the counter is full, and then the thread is awake.
            let _ = self.shared.turn.write(1);
        }
        hands_over
    }
}
