//! Descriptors that a process was started with.
#![expect(
    unsafe_code,
    reason = "a number from the command line becomes a descriptor"
)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::wire;

/// The listening end of the ports protocol under this number; the number itself stays open and goes to no other program.
///
/// # Errors
/// When there is no descriptor of that number, or it is no listening `SOCK_SEQPACKET` unix socket.
pub fn listener(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number is not -1, and the borrow ends in this function, in which nothing closes descriptors. If none of
    // that number is open, the first call says so.
    let given = unsafe { BorrowedFd::borrow_raw(number) };
    let own = given.try_clone_to_owned()?;
    let is_listener = sockopt::socket_domain(&own)? == AddressFamily::UNIX
        && sockopt::socket_type(&own)? == SocketType::SEQPACKET
        && sockopt::socket_acceptconn(&own)?;
    if !is_listener {
        let text = format!("descriptor {number} is no listening SOCK_SEQPACKET unix socket");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    fcntl(given, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    let flags = nix::fcntl::OFlag::from_bits_retain(fcntl(&own, FcntlArg::F_GETFL)?);
    fcntl(
        &own,
        FcntlArg::F_SETFL(flags | nix::fcntl::OFlag::O_NONBLOCK),
    )?;
    // To a client SO_PEERCRED names the process that called listen(2) last: this one from now on, not the daemon that made the socket.
    rustix::net::listen(&own, wire::BACKLOG)?;
    Ok(own)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_a_listening_socket_of_the_right_kind_is_taken() {
        let path = std::env::temp_dir().join(format!("sluice-inherit-{}", std::process::id()));
        let listening = wire::listen(&path).unwrap();
        assert!(listener(listening.as_raw_fd()).is_ok());
        std::fs::remove_file(&path).unwrap();
        let (one, _other) = wire::pair().unwrap();
        let error = listener(one.as_raw_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(listener(file.as_raw_fd()).is_err());
        assert!(listener(-1).is_err());
        assert!(listener(i32::MAX).is_err());
    }
}
