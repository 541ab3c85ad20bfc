//! Who is at the other end of a local socket.

use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

/// Whether the process that connected runs as root or as the user of this one. The socket's mode says the same; this holds
/// even where somebody has changed the mode, or passed the socket's directory on.
pub fn is_trusted(stream: &UnixStream) -> bool {
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| may_call(peer.uid(), geteuid().as_raw()))
}

fn may_call(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_the_own_user_may_call_and_no_one_else() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(is_trusted(&one));
        assert!(may_call(0, 0) && may_call(0, 1000) && may_call(1000, 1000));
        assert!(!may_call(1000, 0) && !may_call(1001, 1000));
    }
}
