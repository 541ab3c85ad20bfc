//! What a server governs in the real process: the engine behind its mailbox, and the ports' counters.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::net::{AddressFamily, SocketType, sockopt};

use sluice_ports::message::{
    CarriedCounts, Page, PortCounters, PortKind, Refusal, Status, drop_counts,
};
use sluice_ports::offloads::Offloads;
use sluice_ports::server::Ports;
use sluice_ports::tap;

use crate::driver::{Command, DriverCounters, Mailbox, Unanswered};
use crate::engine::TrunkCounters;
use crate::links::{Carried, LinkCounters};
use crate::pair::Driving;

/// The engine of this process.
pub struct EnginePorts {
    mailbox: Mailbox,
    trunk: Arc<TrunkCounters>,
    driver: Arc<DriverCounters>,
    driving: Arc<Driving>,
    started: Instant,
    ports: BTreeMap<u16, Port>,
    quit: Box<dyn FnMut() + Send>,
}

struct Port {
    kind: PortKind,
    /// A copy for the daemon, should it ask.
    descriptor: OwnedFd,
    counters: Arc<LinkCounters>,
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
        driving: Arc<Driving>,
        quit: Box<dyn FnMut() + Send>,
    ) -> Self {
        Self {
            mailbox,
            trunk,
            driver,
            driving,
            started: Instant::now(),
            ports: BTreeMap::new(),
            quit,
        }
    }
}

fn late(_: Unanswered) -> Refusal {
    Refusal::Late
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
        let copy = descriptor.try_clone().map_err(|error| kernel(&error))?;
        let counters = Arc::new(LinkCounters::default());
        let given = counters.clone();
        let added = self.mailbox.ask(|reply| Command::AddLink {
            id,
            tap: descriptor,
            counters: given,
            reply,
        });
        let added = added.map_err(late)?;
        added.map_err(|error| kernel(&error))?;
        let port = Port {
            kind,
            descriptor: copy,
            counters,
        };
        self.ports.insert(id, port);
        Ok(())
    }

    fn remove(&mut self, id: u16) -> Result<(), Refusal> {
        let removed = self
            .mailbox
            .ask(|reply| Command::RemoveLink { id, reply })
            .map_err(late)?;
        self.ports.remove(&id);
        removed.then_some(()).ok_or(Refusal::NoSuchPort)
    }

    fn hold(&mut self, limit: Option<Duration>) -> Result<(), Refusal> {
        let command = limit.map_or(Command::Release, Command::Hold);
        self.mailbox.send(command).map_err(late)
    }

    fn offloads(&mut self, offloads: Offloads) -> Result<(), Refusal> {
        self.mailbox.send(Command::Allow(offloads)).map_err(late)
    }

    fn status(&self) -> Result<Status, Refusal> {
        let now = self
            .mailbox
            .ask(|reply| Command::Report { reply })
            .map_err(late)?;
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
            features: self.driving.features(),
            first_sent_micros: self.trunk.first_sent().map(|at| {
                let micros = at.saturating_duration_since(self.started).as_micros();
                u64::try_from(micros).unwrap_or(u64::MAX)
            }),
            drive: self.driving.drive().0,
            reason: self.driving.drive().1,
            exit_nanos: self.driving.exit_nanos(),
        })
    }

    fn counters(&self, after: u16) -> (Page, bool) {
        let mut rows = Page::new();
        let above = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        for (id, port) in self.ports.range(above) {
            if rows.push(row(*id, &port.counters)).is_err() {
                return (rows, true);
            }
        }
        (rows, false)
    }

    fn freeze(&mut self, frozen: bool) -> Result<(), Refusal> {
        self.mailbox
            .ask(|reply| Command::Freeze { frozen, reply })
            .map_err(late)
    }

    fn quit(&mut self) {
        (self.quit)();
    }

    fn descriptor(&self, id: u16) -> Result<(PortKind, OwnedFd), Refusal> {
        let port = self.ports.get(&id).ok_or(Refusal::NoSuchPort)?;
        let copy = port
            .descriptor
            .try_clone()
            .map_err(|error| kernel(&error))?;
        Ok((port.kind, copy))
    }
}

fn is_of(kind: PortKind, descriptor: &OwnedFd) -> bool {
    match kind {
        PortKind::Tap => tap::vnet_header_size(descriptor.as_fd())
            .is_ok_and(|size| [tap::HEADER, tap::LONG_HEADER].contains(&size)),
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

fn row(id: u16, counters: &LinkCounters) -> PortCounters {
    PortCounters {
        id,
        to_guest: carried(&counters.to_guest),
        from_guest: carried(&counters.from_guest),
        cut: counters.cut.value(),
        drops: drop_counts(&counters.drops),
    }
}

fn carried(carried: &Carried) -> CarriedCounts {
    CarriedCounts {
        frames: carried.frames.value(),
        bytes: carried.bytes.value(),
        gso: carried.gso.value(),
    }
}
