//! Commands to the engine's thread: a bounded queue, and answers that are waited for with a limit.
//!
//! The thread looks at one atomic flag per step and reads a bounded number of commands, so that a flood of commands costs the
//! sender its time and not the pods theirs. A sender that finds the queue full, or no answer in time, gets an error instead of
//! waiting for a thread that may never come back.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use sluice_ports::offloads::Offloads;

use crate::links::LinkCounters;
use crate::ring::Ring;

/// Commands that may wait. A VMM's whole start is about a dozen.
const ROOM: usize = 256;
/// How long a sender waits for room or for an answer. A step takes about a millisecond at worst.
const PATIENCE: Duration = Duration::from_secs(1);
/// Commands that the thread carries out between two steps.
pub(crate) const TURN: usize = 64;

/// What the driver is asked to do between steps.
#[derive(Debug)]
pub enum Command {
    /// Serve a ring.
    StartRing {
        queue: usize,
        ring: Box<Ring>,
        call: Option<File>,
        kick: Option<File>,
    },
    /// Stop serving a ring; the index to continue from is sent back when it was served.
    StopRing {
        queue: usize,
        reply: mpsc::Sender<Option<u16>>,
    },
    /// Call the guest by this descriptor from now on.
    SetCall { queue: usize, call: Option<File> },
    /// Leave frames in the taps until [`Release`](Command::Release), but for no longer than this: whatever happened to the guest
    /// or to the control channel, connectivity must not hang on it.
    Hold(Duration),
    /// Let frames to the guest.
    Release,
    /// The guest takes these offloads: tell every tap, and those to come.
    Offloads(Offloads),
    /// What the taps may leave unfinished, whatever the guest takes: for every tap, and those to come.
    Allow(Offloads),
    /// Send back how the engine is. An answer also shows that the thread is alive.
    Report { reply: mpsc::Sender<EngineReport> },
    /// Stop all work once the guest's ready frames are sent, or go on; answered when that is so.
    Freeze {
        frozen: bool,
        reply: mpsc::Sender<()>,
    },
    /// Serve a tap.
    AddLink {
        id: u16,
        tap: OwnedFd,
        counters: Arc<LinkCounters>,
        reply: mpsc::Sender<io::Result<()>>,
    },
    /// Stop serving a tap and close it.
    RemoveLink { id: u16, reply: mpsc::Sender<bool> },
    /// End the thread, if it is the engine's own.
    Stop,
}

/// How the engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineReport {
    /// Frames wait in the taps.
    pub held: bool,
    /// Nothing moves.
    pub frozen: bool,
    /// Both rings are served.
    pub serving: bool,
}

/// Why a command has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    #[error("the trunk's thread has ended")]
    Stopped,
    #[error("the trunk's thread did not answer within {} s", PATIENCE.as_secs())]
    Late,
}

/// The way to the driver's thread.
#[derive(Clone, Debug)]
pub struct Mailbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    room: Condvar,
    /// Set after sending: the thread looks at the queue only when this is set.
    mail: AtomicBool,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Queue {
    commands: VecDeque<Command>,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mailbox and the thread's end of it.
///
/// # Errors
/// When the process is out of descriptors.
pub(crate) fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let shared = Arc::new(Shared {
        queue: Mutex::default(),
        room: Condvar::new(),
        mail: AtomicBool::new(false),
        wake: EventFd::from_value_and_flags(0, flags)?,
    });
    Ok((Mailbox(shared.clone()), Inbox(shared)))
}

impl Mailbox {
    /// Sends a command, waiting for room if need be.
    ///
    /// # Errors
    /// When the thread has ended, or has taken no command for [`PATIENCE`].
    pub fn send(&self, command: Command) -> Result<(), Unanswered> {
        let full = |queue: &mut Queue| queue.commands.len() >= ROOM && !queue.closed;
        let (mut queue, waited) = self
            .0
            .room
            .wait_timeout_while(self.0.lock(), PATIENCE, full)
            .unwrap_or_else(PoisonError::into_inner);
        if queue.closed {
            return Err(Unanswered::Stopped);
        }
        if waited.timed_out() {
            return Err(Unanswered::Late);
        }
        queue.commands.push_back(command);
        drop(queue);
        self.0.mail.store(true, Ordering::Release);
        // Only fails when the counter is full, and then the thread is awake.
        let _ = self.0.wake.write(1);
        Ok(())
    }

    /// Commands wait to be carried out.
    pub(crate) fn is_waiting(&self) -> bool {
        self.0.mail.load(Ordering::Acquire)
    }

    /// Sends a command that is answered, and waits for the answer.
    ///
    /// # Errors
    /// As [`send`](Self::send), or when the answer takes longer than [`PATIENCE`]; the command may be carried out later then.
    pub fn ask<T>(
        &self,
        command: impl FnOnce(mpsc::Sender<T>) -> Command,
    ) -> Result<T, Unanswered> {
        let (reply, answer) = mpsc::channel();
        self.send(command(reply))?;
        answer.recv_timeout(PATIENCE).map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => Unanswered::Late,
            mpsc::RecvTimeoutError::Disconnected => Unanswered::Stopped,
        })
    }
}

/// The thread's end. Dropping it refuses all further commands.
#[derive(Debug)]
pub(crate) struct Inbox(Arc<Shared>);

impl Inbox {
    /// Readable after a command was sent; edge-triggered watching needs no read.
    pub(crate) fn readiness(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    /// Up to [`TURN`] commands, if any were sent. What is left comes with the next call. Cost without mail: one atomic.
    pub(crate) fn take(&self) -> Vec<Command> {
        if !self.0.mail.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        let mut queue = self.0.lock();
        let count = queue.commands.len().min(TURN);
        let commands = queue.commands.drain(..count).collect();
        if !queue.commands.is_empty() {
            self.0.mail.store(true, Ordering::Release);
        }
        drop(queue);
        self.0.room.notify_all();
        commands
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.closed = true;
        // Dropping the commands drops their answers' senders: whoever waits learns of the end.
        queue.commands.clear();
        drop(queue);
        self.0.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn remove(reply: mpsc::Sender<bool>) -> Command {
        Command::RemoveLink { id: 16, reply }
    }

    #[test]
    fn flood_of_commands_is_bounded_and_read_in_turns() {
        let (mailbox, inbox) = mailbox().unwrap();
        for _ in 0..ROOM {
            mailbox.send(Command::Release).unwrap();
        }
        let begin = Instant::now();
        assert_eq!(mailbox.send(Command::Release), Err(Unanswered::Late));
        assert!(begin.elapsed() >= PATIENCE);
        let mut taken = 0;
        for commands in std::iter::repeat_with(|| inbox.take()).take_while(|c| !c.is_empty()) {
            assert!(commands.len() <= TURN);
            taken += commands.len();
        }
        assert_eq!(taken, ROOM);
        mailbox.send(Command::Release).unwrap();
    }

    #[test]
    fn question_to_a_thread_that_never_answers_ends_in_time() {
        let (mailbox, inbox) = mailbox().unwrap();
        let begin = Instant::now();
        assert_eq!(mailbox.ask(remove), Err(Unanswered::Late));
        assert!(begin.elapsed() < PATIENCE * 3);
        drop(inbox);
        assert_eq!(mailbox.ask(remove), Err(Unanswered::Stopped));
    }
}
