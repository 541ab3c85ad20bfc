//! The thread that keeps the trunk's rings served: connects, hands over, notices that a backend is gone, connects again.
//!
//! It lives as long as the virtual machine. The guest keeps running while nobody serves its rings; a backend that comes back
//! gets the same memory and rings, and every ring is kicked and called once, because a notification may have died with the old
//! backend.

use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::mpsc::SyncSender;
use std::sync::mpsc::TryRecvError;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::memory::GuestRam;
use crate::virtio::backend::ANSWER_TIME;
use crate::virtio::backend::Activation;
use crate::virtio::backend::Backend;
use crate::virtio::backend::BackendError;
use crate::virtio::backend::RingEvents;

/// The first wait after a failed attempt; doubled up to the last, which bounds how long a restarted daemon waits for its rings.
/// Twenty attempts a second cost 0.02 % of a core.
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_LAST: Duration = Duration::from_millis(50);
/// A reset waits for the thread, which may be waiting for an answer itself.
const RESET_TIME: Duration = ANSWER_TIME.saturating_add(Duration::from_millis(200));

/// The trunk cannot be set up at start.
#[derive(Debug, thiserror::Error)]
pub enum TrunkError {
    #[error(
        "no vhost-user backend answers at {path} (waited {} ms); sluice-node listens there",
        waited.as_millis()
    )]
    NoBackend {
        path: PathBuf,
        waited: Duration,
        source: BackendError,
    },
    #[error("cannot start the trunk thread")]
    Thread(#[source] io::Error),
}

#[derive(Debug)]
enum Command {
    Start(Activation),
    /// Answered when no backend touches the rings any more.
    Reset(SyncSender<()>),
}

/// The vCPU thread's end of the trunk thread. The thread ends when this is dropped.
#[derive(Debug)]
pub struct Trunk {
    commands: Option<Sender<Command>>,
    wake: Arc<EventFd>,
    features: u64,
}

impl Trunk {
    /// Connects for the first time, waiting at most `patience` for somebody to listen at `path`.
    ///
    /// # Errors
    /// Nobody did, or the thread cannot be started.
    pub fn connect(
        path: PathBuf,
        patience: Duration,
        ram: Arc<GuestRam>,
        rings: Vec<RingEvents>,
    ) -> Result<Trunk, TrunkError> {
        let backend = first_backend(&path, patience, rings.len())?;
        let features = backend.features();
        let wake = Arc::new(event::eventfd().map_err(TrunkError::Thread)?);
        let (commands, receiver) = mpsc::channel();
        let server = Server {
            path,
            ram,
            rings,
            commands: receiver,
            wake: Arc::clone(&wake),
            backend: Some(backend),
            active: None,
            retry: RETRY_FIRST,
            last_error: String::new(),
        };
        thread::Builder::new()
            .name("trunk".into())
            .spawn(move || server.serve())
            .map_err(TrunkError::Thread)?;
        Ok(Trunk {
            commands: Some(commands),
            wake,
            features,
        })
    }

    /// What the first backend offered.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Has the rings served from now on, by this backend and each that follows.
    pub fn start(&self, activation: Activation) {
        self.send(Command::Start(activation));
    }

    /// Takes the rings back; returns when nobody touches them.
    pub fn reset(&self) {
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(Command::Reset(answer));
        if answered.recv_timeout(RESET_TIME).is_err() {
            tracing::error!("the trunk thread did not confirm a reset in time");
        }
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands
            && commands.send(command).is_err()
        {
            tracing::error!("the trunk thread is gone");
        }
        event::signal(&self.wake);
    }
}

impl Drop for Trunk {
    fn drop(&mut self) {
        self.commands = None;
        event::signal(&self.wake);
    }
}

fn first_backend(path: &Path, patience: Duration, rings: usize) -> Result<Backend, TrunkError> {
    let begin = Instant::now();
    loop {
        let source = match Backend::connect(path, rings as u64) {
            Ok(backend) => return Ok(backend),
            Err(error) => error,
        };
        let waited = begin.elapsed();
        if waited >= patience {
            return Err(TrunkError::NoBackend {
                path: path.to_path_buf(),
                waited,
                source,
            });
        }
        thread::sleep(RETRY_FIRST.min(patience.saturating_sub(waited)));
    }
}

struct Server {
    path: PathBuf,
    ram: Arc<GuestRam>,
    rings: Vec<RingEvents>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    backend: Option<Backend>,
    active: Option<Activation>,
    retry: Duration,
    last_error: String,
}

impl Server {
    fn serve(mut self) {
        loop {
            let backend_spoke = self.wait();
            event::drain(&self.wake);
            if backend_spoke {
                self.backend = None;
                tracing::warn!(path = %self.path.display(), "trunk backend gone, reconnecting");
            }
            loop {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if self.backend.is_none() {
                self.reconnect();
            }
        }
    }

    /// Waits for a command, the backend's end, or the time to try again. Returns whether the backend said anything.
    fn wait(&self) -> bool {
        let mut fds = vec![PollFd::from_borrowed_fd(
            event::fd(&self.wake),
            PollFlags::IN,
        )];
        let mut limit = None;
        match &self.backend {
            Some(backend) => fds.push(PollFd::from_borrowed_fd(
                backend.socket(),
                PollFlags::IN | PollFlags::RDHUP,
            )),
            None => limit = Timespec::try_from(self.retry).ok(),
        }
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) => fds
                .get(1)
                .is_some_and(|socket| !socket.revents().is_empty()),
            Err(Errno::INTR) => false,
            Err(error) => {
                tracing::error!(%error, "poll failed in the trunk thread");
                thread::sleep(RETRY_LAST);
                false
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(activation) => {
                self.active = Some(activation);
                self.start_rings();
            }
            Command::Reset(answer) => {
                let active = self.active.take();
                if let (Some(backend), Some(active)) = (&mut self.backend, active)
                    && let Err(error) = backend.stop(active.queues.len())
                {
                    self.lose(&error);
                }
                // The vCPU thread may have stopped waiting.
                let _ = answer.send(());
            }
        }
    }

    fn reconnect(&mut self) {
        match Backend::connect(&self.path, self.rings.len() as u64) {
            Ok(backend) => {
                self.backend = Some(backend);
                self.start_rings();
                if self.backend.is_some() {
                    self.retry = RETRY_FIRST;
                    self.last_error.clear();
                    tracing::info!(path = %self.path.display(), "trunk backend connected");
                }
            }
            Err(error) => self.lose(&error),
        }
    }

    fn start_rings(&mut self) {
        let (Some(backend), Some(active)) = (&mut self.backend, &self.active) else {
            return;
        };
        if let Err(error) = backend.start(&self.ram, active, &self.rings) {
            self.lose(&error);
            return;
        }
        for ring in &self.rings {
            event::signal(&ring.kick);
            event::signal(&ring.call);
        }
    }

    /// Gives the backend up. The same reason is told once, not at every attempt.
    fn lose(&mut self, error: &BackendError) {
        self.backend = None;
        self.retry = (self.retry * 2).min(RETRY_LAST);
        let text = describe(error);
        if text != self.last_error {
            tracing::warn!(path = %self.path.display(), error = %text, "trunk not served");
            self.last_error = text;
        }
    }
}

/// The error and its causes on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
