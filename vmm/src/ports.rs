//! The ports of this process: the engine, the thread it may use, and the server that daemons talk to.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use sluice_ports::message::Drive;
use sluice_ports::message::Identity;
use sluice_ports::serve::serve;
use sluice_ports::server::Server;
use sluice_ports::wire;
use sluice_trunk::driver::DriverCounters;
use sluice_trunk::engine::Engine;
use sluice_trunk::engine::TrunkCounters;
use sluice_trunk::pair::Inline;
use sluice_trunk::pair::Pair;
use sluice_trunk::policy::Wish;
use sluice_trunk::ports::EnginePorts;
use vmm_sys_util::eventfd::EventFd;

use crate::event;

/// The longest poll for a frame before a thread sleeps: about what a wake costs twice over.
const LONGEST_POLL: Duration = Duration::from_micros(60);

/// Ports that are served; they end when this is dropped.
#[derive(Debug)]
pub struct ServedPorts {
    pair: Pair,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl ServedPorts {
    /// Starts the engine, and the server of the daemons that connect to `listener`. `tell` says to the guest whether frames move
    /// while it runs; `quit` is raised when a daemon asks for the end.
    ///
    /// # Errors
    /// The host is out of threads or descriptors.
    pub fn start(
        listener: Arc<OwnedFd>,
        identity: Identity,
        wish: Wish,
        tell: Box<dyn Fn(Drive) + Send + Sync>,
        quit: Arc<EventFd>,
    ) -> io::Result<(ServedPorts, Inline)> {
        let trunk = Arc::new(TrunkCounters::default());
        let counters = Arc::new(DriverCounters::default());
        let engine = Engine::new(trunk.clone())?;
        let (pair, inline) = Pair::start(engine, wish, LONGEST_POLL, counters.clone(), tell)?;
        let quitting = Box::new(move || event::signal(&quit));
        let ports = EnginePorts::new(
            pair.mailbox().clone(),
            trunk,
            counters,
            pair.driving().clone(),
            quitting,
        );
        let (stop, stopped) = wire::pair()?;
        let thread = thread::Builder::new().name("ports".into()).spawn(move || {
            let mut server = Server::new(identity, ports);
            if let Err(error) = serve(&listener, &stopped, &mut server) {
                tracing::error!(%error, "the ports are no longer served");
            }
        })?;
        let served = ServedPorts {
            pair,
            stop,
            thread: Some(thread),
        };
        Ok((served, inline))
    }

    /// The engine and its threads.
    #[must_use]
    pub fn pair(&self) -> &Pair {
        &self.pair
    }
}

impl Drop for ServedPorts {
    fn drop(&mut self) {
        // Readable at the other end from now on.
        let _ = rustix::net::shutdown(&self.stop, rustix::net::Shutdown::Both);
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the thread of the ports had died");
        }
    }
}
