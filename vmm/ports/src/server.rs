//! The engine's side of the protocol as a state machine: bytes and descriptors in, bytes out, no I/O.
//!
//! One daemon at a time is the owner: the connection that said Hello first, or one that took over. The end of a connection
//! changes nothing but that.

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::message::{Identity, Page, PortKind, Refusal, Reply, Request, Status};
use crate::offloads::Offloads;
use crate::packet::{self, Packet};
use crate::{HOLD_MAX_MILLIS, ID_MAX, VERSION};

/// What a server governs.
pub trait Ports {
    /// Serves a port.
    ///
    /// # Errors
    /// Why not; the port that had the id before is served as it was, unless the engine was late.
    fn add(&mut self, id: u16, kind: PortKind, descriptor: OwnedFd) -> Result<(), Refusal>;
    /// Stops serving a port.
    ///
    /// # Errors
    /// When there is none, or the engine was late.
    fn remove(&mut self, id: u16) -> Result<(), Refusal>;
    /// Leaves frames in the ports for so long, or lets them pass.
    ///
    /// # Errors
    /// When the engine was late.
    fn hold(&mut self, limit: Option<Duration>) -> Result<(), Refusal>;
    /// Says what the taps may leave unfinished.
    ///
    /// # Errors
    /// When the engine was late.
    fn offloads(&mut self, offloads: Offloads) -> Result<(), Refusal>;
    /// How the engine is.
    ///
    /// # Errors
    /// When the engine was late.
    fn status(&self) -> Result<Status, Refusal>;
    /// A page of counters, and whether more follow.
    fn counters(&self, after: u16) -> (Page, bool);
    /// Stops or continues all work.
    ///
    /// # Errors
    /// When the engine was late.
    fn freeze(&mut self, frozen: bool) -> Result<(), Refusal>;
    /// Ends the process, after the answer was sent.
    fn quit(&mut self);
    /// A copy of a port's descriptor.
    ///
    /// # Errors
    /// When there is no such port, or the process is out of descriptors.
    fn descriptor(&self, id: u16) -> Result<(PortKind, OwnedFd), Refusal>;
}

/// A connection, as the server knows it.
pub type Token = u64;

/// What a packet led to.
#[derive(Debug)]
pub struct Answer {
    /// For the sender of the request.
    pub packet: Packet,
    /// What goes with it.
    pub descriptor: Option<OwnedFd>,
    /// The connection that lost its place, to be closed.
    pub replaced: Option<Token>,
}

/// The packet is of no version of the protocol: its connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a packet of the ports protocol")]
pub struct NoPacket;

/// The state machine.
#[derive(Debug)]
pub struct Server<P> {
    identity: Identity,
    ports: P,
    owner: Option<Token>,
}

impl<P: Ports> Server<P> {
    /// A server without connections.
    pub fn new(identity: Identity, ports: P) -> Self {
        Self {
            identity,
            ports,
            owner: None,
        }
    }

    /// What it governs.
    pub fn ports(&self) -> &P {
        &self.ports
    }

    /// Judges one packet and the descriptors that came with it; those it does not take are closed.
    ///
    /// # Errors
    /// When it is no packet at all, or the answer would be none.
    pub fn receive(
        &mut self,
        from: Token,
        bytes: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, NoPacket> {
        let (header, body) = packet::split(bytes).ok_or(NoPacket)?;
        let (mut replaced, mut copy) = (None, None);
        let reply = if header.version == VERSION {
            let request = packet::read(body).ok_or(Refusal::Malformed);
            request.and_then(|request| {
                self.obey(from, &request, descriptors, (&mut replaced, &mut copy))
            })
        } else {
            Err(Refusal::Version)
        };
        let reply = reply.unwrap_or_else(Reply::Refused);
        let packet = packet::write(header.sequence, &reply).ok_or(NoPacket)?;
        Ok(Answer {
            packet,
            descriptor: copy,
            replaced,
        })
    }

    /// The connection has ended.
    pub fn disconnected(&mut self, token: Token) {
        if self.owner == Some(token) {
            self.owner = None;
        }
    }

    fn obey(
        &mut self,
        from: Token,
        request: &Request,
        descriptors: Vec<OwnedFd>,
        (replaced, copy): (&mut Option<Token>, &mut Option<OwnedFd>),
    ) -> Result<Reply, Refusal> {
        let descriptor = match (request, <[OwnedFd; 1]>::try_from(descriptors)) {
            (Request::AddPort { .. }, Ok([one])) => Some(one),
            (Request::AddPort { .. }, Err(_)) => return Err(Refusal::Descriptor),
            (_, Err(none)) if none.is_empty() => None,
            _ => return Err(Refusal::Descriptor),
        };
        if let Request::Hello { take_over, .. } = request {
            return self.hello(from, *take_over, replaced);
        }
        if self.owner != Some(from) {
            return Err(Refusal::HelloFirst);
        }
        match *request {
            Request::Hello { .. } => {}
            Request::AddPort { id, kind } => {
                let descriptor = descriptor.ok_or(Refusal::Descriptor)?;
                self.ports.add(checked(id)?, kind, descriptor)?;
            }
            Request::RemovePort { id } => self.ports.remove(checked(id)?)?,
            Request::Hold { millis } => {
                let limit = Duration::from_millis(millis.min(HOLD_MAX_MILLIS).into());
                self.ports.hold(Some(limit))?;
            }
            Request::Release => self.ports.hold(None)?,
            Request::Offloads(offloads) => self.ports.offloads(offloads)?,
            Request::Status => return Ok(Reply::Status(self.ports.status()?)),
            Request::Counters { after } => {
                let (rows, more) = self.ports.counters(after);
                return Ok(Reply::Counters {
                    rows: Box::new(rows),
                    more,
                });
            }
            Request::Freeze => self.ports.freeze(true)?,
            Request::Thaw => self.ports.freeze(false)?,
            Request::Quit => self.ports.quit(),
            Request::Descriptor { id } => {
                let (kind, descriptor) = self.ports.descriptor(checked(id)?)?;
                *copy = Some(descriptor);
                return Ok(Reply::Descriptor { kind });
            }
        }
        Ok(Reply::Done)
    }

    fn hello(
        &mut self,
        from: Token,
        take_over: bool,
        replaced: &mut Option<Token>,
    ) -> Result<Reply, Refusal> {
        match self.owner {
            Some(owner) if owner != from && !take_over => return Err(Refusal::InUse),
            Some(owner) if owner != from => *replaced = Some(owner),
            _ => {}
        }
        self.owner = Some(from);
        Ok(Reply::Welcome(self.identity.clone()))
    }
}

fn checked(id: u16) -> Result<u16, Refusal> {
    if (1..=ID_MAX).contains(&id) {
        Ok(id)
    } else {
        Err(Refusal::Id)
    }
}
