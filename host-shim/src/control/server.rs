//! The thread on the control socket: one VMM at a time, bytes in and out without ever blocking on it.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::session::Session;
use super::{Shared, seed};

/// Bytes that may wait for a guest that does not read. A session holds all rows once, and what is left of an earlier one goes
/// when it begins, so only more rows than any guest takes come to this.
const BACKLOG: usize = 64 << 20;
/// Bytes taken from the guest at once.
const READ_CHUNK: usize = 16 << 10;

/// Whether a process, by its id, is the machine that is expected.
type Admits = Box<dyn Fn(Option<i32>) -> bool + Send>;

pub(super) struct Server {
    listener: UnixListener,
    admits: Admits,
    shared: Arc<Shared>,
    peer: Option<Peer>,
}

struct Peer {
    stream: UnixStream,
    session: Session,
}

impl Server {
    pub(super) fn new(listener: UnixListener, admits: Admits, shared: Arc<Shared>) -> Self {
        Self {
            listener,
            admits,
            shared,
            peer: None,
        }
    }

    pub(super) fn run(mut self) {
        while !self.shared.lock().stop {
            self.obey();
            self.advance();
            if let Err(error) = self.wait() {
                tracing::error!(%error, "control thread cannot wait");
                std::thread::sleep(Duration::from_millis(100));
            }
            self.accept();
            self.read();
        }
    }

    /// Waits for the guest, for a new VMM, for a change of the desired rows, or for the session's deadline.
    fn wait(&mut self) -> io::Result<()> {
        // The listener is left alone while somebody is connected: a second VMM waits in the backlog.
        let mut fds = vec![PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
        let mut timeout = PollTimeout::NONE;
        let is_held = self.shared.lock().held > 0;
        match &mut self.peer {
            None if is_held => {}
            None => fds.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)),
            Some(peer) => {
                let mut interest = PollFlags::POLLIN;
                if !peer.session.output().is_empty() {
                    interest |= PollFlags::POLLOUT;
                }
                if let Some(deadline) = peer.session.deadline() {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let millis = left.as_millis().min(60_000) as i32 + 1;
                    timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
                }
                fds.push(PollFd::new(peer.stream.as_fd(), interest));
            }
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Empty when something else woke the thread.
        let _ = self.shared.wake.read();
        Ok(())
    }

    fn accept(&mut self) {
        if self.peer.is_some() || self.shared.lock().held > 0 {
            return;
        }
        match self.listener.accept() {
            Ok((stream, _)) => {
                if !self.is_admitted(&stream) {
                    return;
                }
                if let Err(error) = stream.set_nonblocking(true) {
                    tracing::warn!(%error, "control connection refused");
                    return;
                }
                tracing::info!("VMM connected to the control channel");
                let session = Session::new(Instant::now(), seed());
                self.peer = Some(Peer { stream, session });
                self.shared.lock().status.connected = true;
                // However long ago the last one went.
                (self.shared.gate)(false);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::warn!(%error, "cannot accept on the control socket"),
        }
    }

    /// Only root, or who runs the daemon, and only the VMM that was started, if one was.
    fn is_admitted(&self, stream: &UnixStream) -> bool {
        let peer = getsockopt(stream, PeerCredentials).ok();
        let (pid, uid) = peer.map(|peer| (peer.pid(), peer.uid())).unzip();
        let is_own = uid.is_some_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw());
        let is_admitted = is_own && (self.admits)(pid);
        if !is_admitted {
            tracing::warn!(
                pid,
                uid,
                "connection to the control channel refused: not the VMM that was started"
            );
        }
        is_admitted
    }

    fn read(&mut self) {
        let Some(peer) = &mut self.peer else { return };
        let mut chunk = [0; READ_CHUNK];
        match peer.stream.read(&mut chunk) {
            Ok(0) => self.drop_peer("closed"),
            Ok(n) => {
                let mut events = Vec::new();
                let bytes = chunk.get(..n).unwrap_or_default();
                self.shared.change(|state| {
                    let desired = &mut state.desired;
                    peer.session
                        .receive(bytes, Instant::now(), desired, &mut events);
                    events.into_iter().for_each(|event| state.learn(event));
                    state.status.garbage = peer.session.garbage();
                });
            }
            Err(error) if is_transient(&error) => {}
            Err(_) => self.drop_peer("broken"),
        }
    }

    /// Passes on what others asked of the session.
    fn obey(&mut self) {
        let Some(peer) = &mut self.peer else { return };
        let mut state = self.shared.lock();
        if std::mem::take(&mut state.shut_down) {
            peer.session.shut_down();
        }
        if let Some(token) = state.stats_wanted
            && peer.session.ask_for_stats(token)
        {
            state.stats_wanted = None;
        }
        if let Some((token, link)) = state.names_wanted
            && peer.session.ask_for_names(token, link)
        {
            state.names_wanted = None;
        }
    }

    fn advance(&mut self) {
        let Some(peer) = &mut self.peer else { return };
        self.shared.change(|state| {
            let mut events = Vec::new();
            peer.session
                .advance(Instant::now(), &mut state.desired, &mut events);
            events.into_iter().for_each(|event| state.learn(event));
            state.status.settled = peer.session.is_settled();
        });
        let output = peer.session.output();
        match peer.stream.write(output) {
            Ok(written) => drop(output.drain(..written)),
            Err(error) if is_transient(&error) && output.len() < BACKLOG => {}
            Err(_) if output.is_empty() => {}
            Err(_) => self.drop_peer("does not read"),
        }
    }

    fn drop_peer(&mut self, why: &'static str) {
        tracing::info!(why, "VMM left the control channel");
        self.peer = None;
        self.shared.change(super::State::disconnected);
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
