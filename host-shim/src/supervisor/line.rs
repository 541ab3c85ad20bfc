//! A connection to the appliance's process, and why there is none.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use sluice_ports::client::{ClientError, Connection};
use sluice_ports::message::{Identity, Refusal};
use sluice_ports::wire;

/// An open connection.
#[derive(Debug)]
pub(crate) struct Line {
    pub(super) connection: Connection,
    pub(super) identity: Identity,
    /// The process at the other end, as the kernel names it.
    pub(super) pid: i32,
    /// The same socket once more: it shows when the other end has closed.
    pub(super) watch: OwnedFd,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoLine {
    #[error("no process listens")]
    Absent,
    #[error("another daemon is connected")]
    InUse,
    #[error("process {pid}: {error}")]
    Deaf { pid: i32, error: ClientError },
}

impl Line {
    /// Connects to the process that listens at `path`. `asking` is given a copy of the socket, by which the wait for an answer can
    /// be ended.
    pub(super) fn open(
        path: &Path,
        take_over: bool,
        asking: impl FnOnce(OwnedFd),
    ) -> Result<Self, NoLine> {
        let absent = |error: io::Error| {
            tracing::debug!(%error, path = %path.display(), "no connection");
            NoLine::Absent
        };
        let socket = wire::connect(path).map_err(absent)?;
        // The process called listen(2) itself, or the daemon did so in its name.
        let pid = wire::peer_pid(&socket).unwrap_or_default();
        let copy = || socket.as_fd().try_clone_to_owned();
        let (watch, to_end) = copy().and_then(|one| Ok((one, copy()?))).map_err(absent)?;
        asking(to_end);
        match Connection::over(socket, DAEMON, take_over) {
            Ok((connection, identity)) => Ok(Self {
                connection,
                identity,
                pid,
                watch,
            }),
            Err(ClientError::Refused(Refusal::InUse)) => Err(NoLine::InUse),
            Err(error) => Err(NoLine::Deaf { pid, error }),
        }
    }
}

/// How this daemon names itself.
const DAEMON: &str = concat!("sluice-node ", env!("CARGO_PKG_VERSION"));
