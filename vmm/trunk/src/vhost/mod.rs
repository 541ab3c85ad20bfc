//! The vhost-user backend: what the VMM says on the trunk socket becomes commands to the driver.
//!
//! One thread listens and serves one VMM at a time; a second one waits in the socket's backlog until the first has gone. The
//! VMM is not trusted either: a malformed message ends the connection, never the daemon.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::backend::Backend;
use self::wire::Reply;
use super::driver::Mailbox;
use super::features::Features;
use super::pair::Driving;

mod backend;
#[cfg(test)]
mod tests;
mod wire;

/// What is known of the VMM on the trunk socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrunkPeer {
    /// Its process id, as the kernel reports it.
    pub pid: Option<i32>,
    /// The features it accepted.
    pub features: u64,
    /// Whether both rings are being served.
    pub serving: bool,
}

/// Who is on the trunk socket, and who may be.
#[derive(Clone, Debug, Default)]
pub struct TrunkState(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    peer: Option<TrunkPeer>,
    /// The only process that is served, if one is known.
    only: Option<i32>,
    driving: Option<Arc<Driving>>,
}

impl TrunkState {
    /// The VMM that is connected now.
    pub fn peer(&self) -> Option<TrunkPeer> {
        self.lock().peer
    }

    /// From the next connection on serves this process alone, or anybody.
    pub fn admit_only(&self, pid: Option<i32>) {
        self.lock().only = pid;
    }

    /// Whether that process may be served, here and wherever else the VMM connects.
    pub fn admits(&self, pid: Option<i32>) -> bool {
        self.lock().only.is_none_or(|only| pid == Some(only))
    }

    /// Has the features that a guest accepts reported there as well.
    #[must_use]
    pub fn reporting(self, driving: Arc<Driving>) -> Self {
        self.lock().driving = Some(driving);
        self
    }

    /// Records the VMM that is connected now; called by the conversation with it.
    pub fn set(&self, peer: Option<TrunkPeer>) {
        let mut state = self.lock();
        state.peer = peer;
        if let Some(driving) = &state.driving {
            driving.set_features(peer.map_or(0, |peer| peer.features));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves the VMMs that connect to `listener`, one after the other, on the calling thread, for good.
pub fn serve(listener: &UnixListener, offered: Features, mailbox: &Mailbox, state: &TrunkState) {
    for connection in listener.incoming() {
        match connection {
            Ok(stream) => converse(&stream, offered, mailbox, state),
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the trunk socket");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}

fn converse(stream: &UnixStream, offered: Features, mailbox: &Mailbox, state: &TrunkState) {
    let pid = peer_pid(stream);
    if !state.admits(pid) {
        tracing::warn!(
            pid,
            "connection to the trunk refused: not the VMM that was started"
        );
        return;
    }
    state.set(Some(TrunkPeer {
        pid,
        ..TrunkPeer::default()
    }));
    tracing::info!(pid, "VMM connected to the trunk");
    let mut backend = Backend::new(offered, mailbox.clone(), pid, state.clone());
    let end = loop {
        if let Err(error) = answer(stream, &mut backend) {
            break error;
        }
    };
    if let Err(error) = backend.stop_all() {
        tracing::error!(pid, %error, "trunk connection not closed in order");
    }
    state.set(None);
    match end.kind() {
        io::ErrorKind::InvalidData => tracing::warn!(pid, error = %end, "trunk connection ended"),
        _ => tracing::info!(pid, "VMM left the trunk"),
    }
}

/// Reads one request, does what it asks for, and answers.
fn answer(stream: &UnixStream, backend: &mut Backend) -> io::Result<()> {
    let (request, ticket) = wire::receive(stream)?;
    let reply = backend.obey(request).unwrap_or_else(|refusal| {
        let error: &dyn std::error::Error = &refusal;
        tracing::warn!(error, "trunk request refused");
        Reply::Refused
    });
    ticket.reply(stream, reply)
}

/// The process at the other end of a unix socket.
pub fn peer_pid(stream: &UnixStream) -> Option<i32> {
    let credentials = nix::sys::socket::sockopt::PeerCredentials;
    nix::sys::socket::getsockopt(stream, credentials)
        .ok()
        .map(|c| c.pid())
}
