//! What a server governs in the real process: the engine behind its mailbox, and the ports' counters.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::net::{AddressFamily, SocketType, sockopt};

use super::message::{Page, PortCounters, PortKind, Refusal, Status, drop_counts};
use super::server::Ports;
use crate::driver::{Command, DriverCounters, Mailbox, Unanswered};
use crate::engine::TrunkCounters;
use crate::features::Offloads;
use crate::links::LinkCounters;
use crate::tap;
use crate::vnet;

/// The engine of this process.
pub struct EnginePorts {
    mailbox: Mailbox,
    trunk: Arc<TrunkCounters>,
    driver: Arc<DriverCounters>,
    ports: BTreeMap<u16, Arc<LinkCounters>>,
    quit: Box<dyn FnMut() + Send>,
}

impl std::fmt::Debug for EnginePorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnginePorts")
            .field("ports", &self.ports.len())
            .finish_non_exhaustive()
    }
}

impl EnginePorts {
    /// The ports of the engine behind `mailbox`; `quit` asks the process to end.
    pub fn new(
        mailbox: Mailbox,
        trunk: Arc<TrunkCounters>,
        driver: Arc<DriverCounters>,
        quit: Box<dyn FnMut() + Send>,
    ) -> Self {
        Self {
            mailbox,
            trunk,
            driver,
            ports: BTreeMap::new(),
            quit,
        }
    }
}

impl From<Unanswered> for Refusal {
    fn from(_: Unanswered) -> Self {
        Self::Late
    }
}

fn kernel(error: &io::Error) -> Refusal {
    Refusal::Kernel(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Ports for EnginePorts {
    fn add(&mut self, id: u16, kind: PortKind, descriptor: OwnedFd) -> Result<(), Refusal> {
        if !is_of(kind, &descriptor) {
            return Err(Refusal::Kind);
        }
        never_wait(&descriptor).map_err(|error| kernel(&error))?;
        let counters = Arc::new(LinkCounters::default());
        let given = counters.clone();
        let added = self.mailbox.ask(|reply| Command::AddLink {
            id,
            tap: descriptor,
            counters: given,
            reply,
        })?;
        added.map_err(|error| kernel(&error))?;
        self.ports.insert(id, counters);
        Ok(())
    }

    fn remove(&mut self, id: u16) -> Result<(), Refusal> {
        let removed = self
            .mailbox
            .ask(|reply| Command::RemoveLink { id, reply })?;
        self.ports.remove(&id);
        removed.then_some(()).ok_or(Refusal::NoSuchPort)
    }

    fn hold(&mut self, limit: Option<Duration>) -> Result<(), Refusal> {
        let command = limit.map_or(Command::Release, Command::Hold);
        Ok(self.mailbox.send(command)?)
    }

    fn offloads(&mut self, offloads: Offloads) -> Result<(), Refusal> {
        Ok(self.mailbox.send(Command::Allow(offloads))?)
    }

    fn status(&self) -> Result<Status, Refusal> {
        let now = self.mailbox.ask(|reply| Command::Report { reply })?;
        Ok(Status {
            ports: u16::try_from(self.ports.len()).unwrap_or(u16::MAX),
            held: now.held,
            frozen: now.frozen,
            serving: now.serving,
            busy: self.driver.busy.value(),
            sleeps: self.driver.sleeps.value(),
            calls: self.trunk.calls.value(),
            starved: self.trunk.starved.value(),
            broken: self.trunk.broken.value(),
            drops: drop_counts(&self.trunk.drops),
        })
    }

    fn counters(&self, after: u16) -> (Page, bool) {
        let mut rows = Page::new();
        let above = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        for (id, counters) in self.ports.range(above) {
            if rows.push(PortCounters::read(*id, counters)).is_err() {
                return (rows, true);
            }
        }
        (rows, false)
    }

    fn freeze(&mut self, frozen: bool) -> Result<(), Refusal> {
        self.mailbox
            .ask(|reply| Command::Freeze { frozen, reply })?;
        Ok(())
    }

    fn quit(&mut self) {
        (self.quit)();
    }
}

fn is_of(kind: PortKind, descriptor: &OwnedFd) -> bool {
    match kind {
        PortKind::Tap => tap::vnet_header_size(descriptor.as_fd())
            .is_ok_and(|size| [vnet::HEADER, vnet::LONG_HEADER].contains(&size)),
        PortKind::Socket => {
            sockopt::socket_domain(descriptor) == Ok(AddressFamily::UNIX)
                && sockopt::socket_type(descriptor) == Ok(SocketType::SEQPACKET)
        }
    }
}

fn never_wait(descriptor: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
