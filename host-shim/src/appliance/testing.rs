//! A process of an appliance without the appliance: it serves the ports protocol, and writes down what it was asked.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use sluice_ports::message::{Identity, Page, PortKind, Refusal, Status};
use sluice_ports::offloads::Offloads;
use sluice_ports::serve::serve;
use sluice_ports::server::{Ports, Server};
use sluice_ports::testing::{RememberedPorts, identity};
use sluice_ports::wire;

/// Ports that write down what changes them. The end of `_alive` is the end of the server.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    ports: RememberedPorts,
    log: Arc<Mutex<Vec<String>>>,
    alive: Option<io::PipeWriter>,
}

impl Recorder {
    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }
}

impl Ports for Recorder {
    fn add(&mut self, id: u16, kind: PortKind, descriptor: OwnedFd) -> Result<(), Refusal> {
        self.note(format!("add {id} {kind:?}"));
        self.ports.add(id, kind, descriptor)
    }

    fn remove(&mut self, id: u16) -> Result<(), Refusal> {
        self.note(format!("remove {id}"));
        self.ports.remove(id)
    }

    fn hold(&mut self, limit: Option<Duration>) -> Result<(), Refusal> {
        self.note(if limit.is_some() { "hold" } else { "release" }.into());
        self.ports.hold(limit)
    }

    fn offloads(&mut self, offloads: Offloads) -> Result<(), Refusal> {
        self.ports.offloads(offloads)
    }

    fn status(&self) -> Result<Status, Refusal> {
        self.ports.status()
    }

    fn counters(&self, after: u16) -> (Page, bool) {
        self.ports.counters(after)
    }

    fn freeze(&mut self, frozen: bool) -> Result<(), Refusal> {
        self.ports.freeze(frozen)
    }

    fn quit(&mut self) {
        self.note("quit".into());
        self.alive = None;
    }

    fn descriptor(&self, id: u16) -> Result<(PortKind, OwnedFd), Refusal> {
        self.ports.descriptor(id)
    }
}

/// Serves daemons that connect to an inherited listener, until one says Quit.
pub(crate) fn serve_inherited(listener: &OwnedFd, identity: Identity) -> io::Result<()> {
    let (stop, alive) = io::pipe()?;
    let recorder = Recorder {
        alive: Some(alive),
        ..Recorder::default()
    };
    serve(listener, &stop.into(), &mut Server::new(identity, recorder))
}

/// The same on a thread of the test.
#[derive(Debug)]
pub(crate) struct Fake {
    pub(crate) path: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
    stop: Option<io::PipeWriter>,
}

impl Fake {
    pub(crate) fn at(path: &Path) -> Self {
        let listener = wire::listen(path).unwrap();
        let log = Arc::<Mutex<Vec<String>>>::default();
        let (stopped, stop) = io::pipe().unwrap();
        let recorder = Recorder {
            log: log.clone(),
            ..Recorder::default()
        };
        let run = move || {
            let mut server = Server::new(identity(), recorder);
            serve(&listener, &stopped.into(), &mut server).unwrap();
        };
        Self {
            path: path.into(),
            log,
            thread: Some(std::thread::spawn(run)),
            stop: Some(stop),
        }
    }

    /// What it was asked since the last time.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop = None;
        // Its panic is the test's.
        let ended = self.thread.take().map(JoinHandle::join);
        let _ = std::fs::remove_file(&self.path);
        assert!(ended.is_none_or(|it| it.is_ok()) || std::thread::panicking());
    }
}
