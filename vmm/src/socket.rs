//! Connecting to a unix socket without ever blocking the caller.
//!
//! `std` connects in blocking mode: a listener whose backlog is full would stop the thread that also serves the guest.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::connect;
use rustix::net::socket_with;

/// Connects to the listener at `path`; the stream is non-blocking.
///
/// # Errors
/// Nobody listens there, the backlog is full (`WouldBlock`), or the path is no usable socket address.
pub fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

/// Whether `path` fits into a unix socket address at all.
///
/// # Errors
/// It does not: longer than 107 bytes, or it contains a zero byte.
pub fn check_path(path: &Path) -> io::Result<()> {
    SocketAddrUnix::new(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn connecting_reaches_a_listener_and_fails_at_once_without_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert_eq!(
            connect_unix(&path).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let listener = UnixListener::bind(&path).unwrap();
        connect_unix(&path).unwrap();
        drop(listener);
        assert_eq!(
            connect_unix(&path).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }

    #[test]
    fn a_path_longer_than_a_socket_address_is_refused() {
        let path = "x".repeat(109);
        assert!(check_path(Path::new(&path)).is_err());
        assert!(check_path(Path::new("/run/sluice/trunk.sock")).is_ok());
    }
}
