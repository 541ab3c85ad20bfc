//! What both sides of the protocol make of any bytes: the entry points for fuzzing, and ports that only remember.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::client::{Client, ClientError};
use crate::message::{Identity, Page, PortCounters, PortKind, Refusal, Request, Status, text};
use crate::offloads::Offloads;
use crate::server::{Ports, Server};
use crate::{ID_MAX, packet};

/// Ports without an engine.
#[derive(Debug, Default)]
pub struct RememberedPorts {
    pub ports: BTreeMap<u16, PortKind>,
    pub held: Option<Duration>,
    pub frozen: bool,
    pub offloads: Option<Offloads>,
    pub quit: bool,
}

impl Ports for RememberedPorts {
    fn add(&mut self, id: u16, kind: PortKind, _descriptor: OwnedFd) -> Result<(), Refusal> {
        self.ports.insert(id, kind);
        Ok(())
    }

    fn remove(&mut self, id: u16) -> Result<(), Refusal> {
        let removed = self.ports.remove(&id);
        removed.map(|_| ()).ok_or(Refusal::NoSuchPort)
    }

    fn hold(&mut self, limit: Option<Duration>) -> Result<(), Refusal> {
        self.held = limit;
        Ok(())
    }

    fn offloads(&mut self, offloads: Offloads) -> Result<(), Refusal> {
        self.offloads = Some(offloads);
        Ok(())
    }

    fn status(&self) -> Result<Status, Refusal> {
        Ok(Status {
            ports: self.ports.len() as u16,
            held: self.held.is_some(),
            frozen: self.frozen,
            ..Status::default()
        })
    }

    fn counters(&self, after: u16) -> (Page, bool) {
        let mut page = Page::new();
        for id in self.ports.keys().filter(|id| **id > after) {
            let row = PortCounters {
                id: *id,
                ..PortCounters::default()
            };
            if page.push(row).is_err() {
                return (page, true);
            }
        }
        (page, false)
    }

    fn freeze(&mut self, frozen: bool) -> Result<(), Refusal> {
        self.frozen = frozen;
        Ok(())
    }

    fn quit(&mut self) {
        self.quit = true;
    }

    fn descriptor(&self, id: u16) -> Result<(PortKind, OwnedFd), Refusal> {
        let kind = self.ports.get(&id).ok_or(Refusal::NoSuchPort)?;
        let some = std::fs::File::open("/dev/null").map_err(|_| Refusal::Kernel(libc::EMFILE))?;
        Ok((*kind, some.into()))
    }
}

/// An identity for tests.
pub fn identity() -> Identity {
    Identity {
        program: text("sluice-vmm 0.1.0"),
        build: text("0123456789abcdef"),
        contract: 7,
    }
}

/// Feeds any bytes to the server: packets of any length with zero to two descriptors, after a good Hello.
///
/// # Panics
/// When the server breaks a promise: an answer that a client of our version does not understand, or a port with an id that is none.
///
/// # Errors
/// When the process is out of descriptors.
pub fn fuzz_server(bytes: &[u8]) -> std::io::Result<()> {
    let mut server = Server::new(identity(), RememberedPorts::default());
    let mut client = Client::default();
    let hello = Request::Hello {
        daemon: text("fuzz"),
        take_over: false,
    };
    if let Ok(packet) = client.request(&hello) {
        assert!(server.receive(1, &packet, Vec::new()).is_ok());
    }
    let mut rest = bytes;
    while let Some((&[control, length], after)) = rest.split_first_chunk::<2>() {
        let (body, after) = after.split_at(usize::from(length).min(after.len()));
        rest = after;
        let mut descriptors = Vec::new();
        for _ in 0..(control & 3).min(2) {
            descriptors.push(OwnedFd::from(std::fs::File::open("/dev/null")?));
        }
        // Mostly with a good header, because the rest is refused at once.
        let whole: Vec<u8> = if control & 4 == 0 {
            [&crate::VERSION.to_le_bytes()[..], &[0; 4], body].concat()
        } else {
            body.to_vec()
        };
        let token = u64::from(control >> 3 & 3);
        if let Ok(answer) = server.receive(token, &whole, descriptors) {
            let (header, _) = packet::split(&answer.packet).expect("answers have a header");
            let mut reader = Client::at(header.sequence);
            let read = reader.reply(&answer.packet);
            let understood = matches!(read, Ok(Some(_)) | Err(ClientError::Refused(_)));
            assert!(understood, "an answer that is none: {read:?}");
            reader = Client::at(header.sequence.wrapping_add(1));
            assert!(matches!(reader.reply(&answer.packet), Ok(None)));
        }
        if control & 128 != 0 {
            server.disconnected(token);
        }
        let ids = server.ports().ports.keys();
        assert!(ids.into_iter().all(|id| (1..=ID_MAX).contains(id)));
    }
    Ok(())
}

/// Feeds any bytes to the client as a reply.
pub fn fuzz_client(bytes: &[u8]) {
    let client = Client::default();
    // What it makes of them does not matter, only that it returns.
    let _ = client.reply(bytes);
    let ours = [&crate::VERSION.to_le_bytes()[..], &[0; 4], bytes].concat();
    let _ = client.reply(&ours);
}
