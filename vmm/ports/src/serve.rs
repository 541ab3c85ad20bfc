//! The thread behind the listening socket: at most a few connections, each read as packets come, none waited for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::PACKET_MAX;
use crate::server::{Ports, Server, Token};
use crate::wire;

/// Connections at a time: the owner, one that takes over, and room for a person's look. More wait in the backlog.
const CONNECTIONS: usize = 4;

struct Connection {
    token: Token,
    socket: OwnedFd,
}

/// Serves the connections that `listener` accepts until `stop` becomes readable.
///
/// # Errors
/// When the kernel refuses to wait.
pub fn serve<P: Ports>(
    listener: &OwnedFd,
    stop: &OwnedFd,
    server: &mut Server<P>,
) -> io::Result<()> {
    let mut connections: Vec<Connection> = Vec::with_capacity(CONNECTIONS);
    let mut next: Token = 0;
    loop {
        let mut fds = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        let accepting = connections.len() < CONNECTIONS;
        let interest = if accepting {
            PollFlags::POLLIN
        } else {
            PollFlags::empty()
        };
        fds.push(PollFd::new(listener.as_fd(), interest));
        let sockets = connections.iter().map(|c| c.socket.as_fd());
        fds.extend(sockets.map(|socket| PollFd::new(socket, PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        let [stopped, knocking, ref readable @ ..] = ready[..] else {
            continue;
        };
        if stopped {
            return Ok(());
        }
        let tokens = connections.iter().map(|c| c.token);
        let readable: Vec<Token> = tokens
            .zip(readable)
            .filter_map(|(token, ready)| ready.then_some(token))
            .collect();
        for token in readable {
            answer(&mut connections, token, server);
        }
        if knocking && accepting {
            match wire::accept(listener.as_fd()) {
                Ok(socket) => {
                    next += 1;
                    connections.push(Connection {
                        token: next,
                        socket,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => tracing::warn!(%error, "connection to the ports socket refused"),
            }
        }
    }
}

/// Reads one packet of a connection and answers it; closes the connection if either fails.
fn answer<P: Ports>(connections: &mut Vec<Connection>, token: Token, server: &mut Server<P>) {
    let Some(connection) = connections.iter().find(|c| c.token == token) else {
        return;
    };
    let socket = connection.socket.as_fd();
    let mut buffer = [0; PACKET_MAX];
    let answered = wire::receive(socket, &mut buffer).and_then(|(length, descriptors)| {
        let bytes = buffer.get(..length).unwrap_or_default();
        let answer = server.receive(token, bytes, descriptors);
        let answer = answer.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        // A daemon that does not read its answers loses its connection instead of the thread its time.
        wire::send(
            socket,
            &answer.packet,
            answer.descriptor.as_ref().map(AsFd::as_fd),
        )
        .map_err(|error| io::Error::other(format!("it does not take answers: {error}")))?;
        Ok(answer.replaced)
    });
    match answered {
        Ok(None) => {}
        Ok(Some(replaced)) => {
            tracing::info!("another daemon took over");
            connections.retain(|c| c.token != replaced);
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => {
            tracing::info!(%error, "daemon left the ports socket");
            server.disconnected(token);
            connections.retain(|c| c.token != token);
        }
    }
}
