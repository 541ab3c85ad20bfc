//! The daemon's side: a state machine that numbers requests and knows their replies, and a connection that waits with a limit.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::message::{Identity, PortCounters, PortKind, Refusal, Reply, Request, Status, text};
use crate::offloads::Offloads;
use crate::packet::{self, Packet};
use crate::wire;
use crate::{ID_MAX, PACKET_MAX, VERSION};

/// Longer than the engine's own limit, so that a late engine is a refusal and not a broken connection.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the connection to the appliance's process is broken")]
    Broken(#[from] io::Error),
    #[error("the appliance's process speaks version {0} of the ports protocol, not {VERSION}")]
    Version(u16),
    #[error("the appliance's process sent what is no reply")]
    Malformed,
    #[error("the appliance's process gave a reply that belongs to another request")]
    Unexpected,
    #[error("the appliance's process refused: {0}")]
    Refused(#[from] Refusal),
}

/// Numbers and matches; no I/O.
#[derive(Debug, Default)]
pub struct Client {
    sequence: u32,
}

impl Client {
    /// A client that waits for the reply of this number.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn at(sequence: u32) -> Self {
        Self { sequence }
    }

    /// The packet of the next request. At most one request waits for its reply.
    ///
    /// # Errors
    /// Never with the requests there are: all fit.
    pub fn request(&mut self, request: &Request) -> Result<Packet, ClientError> {
        self.sequence = self.sequence.wrapping_add(1);
        packet::write(self.sequence, request).ok_or(ClientError::Malformed)
    }

    /// Reads a packet; `None` if it is the reply to an earlier request, which came too late.
    ///
    /// # Errors
    /// When it is no reply, of another version, or a refusal.
    pub fn reply(&self, bytes: &[u8]) -> Result<Option<Reply>, ClientError> {
        let (header, body) = packet::split(bytes).ok_or(ClientError::Malformed)?;
        if header.version != VERSION {
            return Err(ClientError::Version(header.version));
        }
        if header.sequence != self.sequence {
            return Ok(None);
        }
        match packet::read(body).ok_or(ClientError::Malformed)? {
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => Ok(Some(reply)),
        }
    }
}

/// A connection to an appliance's process. After [`ClientError::Broken`] it is of no more use.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    client: Client,
    /// What came with the last packet.
    received: Option<OwnedFd>,
}

impl Connection {
    /// Connects to the process that listens at `path` and says Hello.
    ///
    /// # Errors
    /// When none listens, it is of another version, or another daemon is connected and `take_over` is false.
    pub fn open(
        path: &Path,
        daemon: &str,
        take_over: bool,
    ) -> Result<(Self, Identity), ClientError> {
        Self::over(wire::connect(path)?, daemon, take_over)
    }

    /// The same over a socket that is connected already.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn over(
        socket: OwnedFd,
        daemon: &str,
        take_over: bool,
    ) -> Result<(Self, Identity), ClientError> {
        let client = Client::default();
        let mut connection = Self {
            socket,
            client,
            received: None,
        };
        let daemon = text(daemon);
        match connection.call(&Request::Hello { daemon, take_over }, None)? {
            Reply::Welcome(identity) => Ok((connection, identity)),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// The process at the other end.
    pub fn peer_pid(&self) -> Option<i32> {
        wire::peer_pid(&self.socket)
    }

    /// Serves a port. The caller keeps its descriptor: a tap stays attached when the appliance's process ends.
    ///
    /// # Errors
    /// As the process says.
    pub fn add_port(
        &mut self,
        id: u16,
        kind: PortKind,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(), ClientError> {
        self.done(&Request::AddPort { id, kind }, Some(descriptor))
    }

    /// Stops serving a port.
    ///
    /// # Errors
    /// [`Refusal::NoSuchPort`] when there is none.
    pub fn remove_port(&mut self, id: u16) -> Result<(), ClientError> {
        self.done(&Request::RemovePort { id }, None)
    }

    /// Leaves frames in the ports for so long, or (`None`) lets them pass.
    ///
    /// # Errors
    /// As the process says.
    pub fn hold(&mut self, limit: Option<Duration>) -> Result<(), ClientError> {
        let millis = |limit: Duration| u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let request = limit.map_or(Request::Release, |limit| Request::Hold {
            millis: millis(limit),
        });
        self.done(&request, None)
    }

    /// Says what the taps may leave unfinished.
    ///
    /// # Errors
    /// As the process says.
    pub fn offloads(&mut self, offloads: Offloads) -> Result<(), ClientError> {
        self.done(&Request::Offloads(offloads), None)
    }

    /// How the engine is.
    ///
    /// # Errors
    /// As the process says.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        match self.call(&Request::Status, None)? {
            Reply::Status(status) => Ok(status),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// The counters of all ports.
    ///
    /// # Errors
    /// As the process says, or when its pages do not ascend.
    pub fn counters(&mut self) -> Result<Vec<PortCounters>, ClientError> {
        let mut all: Vec<PortCounters> = Vec::new();
        let mut after = 0;
        loop {
            let before = after;
            let reply = self.call(&Request::Counters { after }, None)?;
            let Reply::Counters { rows, more } = reply else {
                return Err(ClientError::Unexpected);
            };
            for row in *rows {
                if row.id <= after || row.id > ID_MAX {
                    return Err(ClientError::Malformed);
                }
                after = row.id;
                all.push(row);
            }
            if !more {
                return Ok(all);
            }
            // An empty page that promises more would be asked for again for ever.
            if after == before {
                return Err(ClientError::Malformed);
            }
        }
    }

    /// Stops all work of the engine, or lets it go on.
    ///
    /// # Errors
    /// As the process says.
    pub fn freeze(&mut self, frozen: bool) -> Result<(), ClientError> {
        let request = if frozen {
            Request::Freeze
        } else {
            Request::Thaw
        };
        self.done(&request, None)
    }

    /// A copy of a port's descriptor: of a tap, so that the interface keeps its carrier when the process ends.
    ///
    /// # Errors
    /// [`Refusal::NoSuchPort`] when there is none.
    pub fn descriptor(&mut self, id: u16) -> Result<(PortKind, OwnedFd), ClientError> {
        match self.call(&Request::Descriptor { id }, None)? {
            Reply::Descriptor { kind } => {
                let descriptor = self.received.take().ok_or(ClientError::Malformed)?;
                Ok((kind, descriptor))
            }
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Ends the appliance's process.
    ///
    /// # Errors
    /// As the process says.
    pub fn quit(&mut self) -> Result<(), ClientError> {
        self.done(&Request::Quit, None)
    }

    fn done(
        &mut self,
        request: &Request,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), ClientError> {
        match self.call(request, descriptor)? {
            Reply::Done => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    fn call(
        &mut self,
        request: &Request,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Reply, ClientError> {
        let packet = self.client.request(request)?;
        wire::send(self.socket.as_fd(), &packet, descriptor)?;
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; PACKET_MAX];
        loop {
            self.wait(deadline)?;
            let length = match wire::receive(self.socket.as_fd(), &mut buffer) {
                Ok((length, descriptors)) => {
                    self.received = descriptors.into_iter().next();
                    length
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            if let Some(reply) = self.client.reply(bytes)? {
                return Ok(reply);
            }
        }
    }

    fn wait(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
