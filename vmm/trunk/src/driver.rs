//! A thread of its own for the engine: polls while there is work and a little longer, then sleeps on taps and kicks.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sluice_ports::drops::Counter;

use crate::core::Core;
use crate::engine::Engine;
use crate::poll::Poll;

pub use crate::mailbox::{Command, EngineReport, Mailbox, Unanswered};

/// How long to poll.
#[derive(Clone, Copy, Debug)]
pub struct Polling {
    /// The longest poll before sleeping; zero means never to poll.
    pub longest: Duration,
}

/// What the stepping thread has been doing.
#[derive(Debug, Default)]
pub struct DriverCounters {
    /// Steps that moved something.
    pub busy: Counter,
    /// Times it went to sleep.
    pub sleeps: Counter,
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
        let (mut core, mailbox) = Core::new(engine, counters.clone())?;
        let run = move || {
            let mut poll = Poll::new(polling.longest);
            while !core.has_ended() {
                run_once(&mut core, &mut poll, None);
            }
        };
        let thread = std::thread::Builder::new()
            .name("trunk".into())
            .spawn(run)?;
        Ok(Self {
            mailbox,
            counters,
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

/// One step, or one look or sleep when there is nothing to move. Returns the frames moved.
pub(crate) fn run_once(core: &mut Core, poll: &mut Poll, limit: Option<Duration>) -> u32 {
    let progress = core.step();
    if progress.any() {
        poll.worked();
        return progress.to_guest + progress.from_guest;
    }
    let now = Instant::now();
    if core.has_ended() {
        return 0;
    }
    if poll.goes_on(now) {
        std::hint::spin_loop();
    } else {
        core.sleep(limit);
        poll.slept(now.elapsed());
    }
    0
}
