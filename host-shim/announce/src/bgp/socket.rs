//! Connects to a router.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::config::PeerConfig;

/// How long a connection may take to come up.
const PATIENCE: Duration = Duration::from_secs(3);
/// Hops within one's own autonomous system, unless told otherwise.
const HOPS_INTERNAL: u8 = 64;
/// Longest password (TCP_MD5SIG_MAXKEYLEN).
const PASSWORD_MAX: usize = 80;

/// The kernel's `struct tcp_md5sig`.
#[repr(C)]
struct Signature {
    address: libc::sockaddr_storage,
    flags: u8,
    prefix_length: u8,
    key_length: u16,
    interface: libc::c_int,
    key: [u8; PASSWORD_MAX],
}

/// Connects; with a password, only to somebody who has it as well.
///
/// # Errors
/// As the kernel says, or what is wrong with the password.
pub(crate) fn connect(peer: &PeerConfig, is_internal: bool) -> io::Result<TcpStream> {
    let address = SocketAddr::from((peer.address, peer.port));
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    let hops = peer.hops.unwrap_or(match is_internal {
        true => HOPS_INTERNAL,
        false => 1,
    });
    let ttl = match peer.ttl_security {
        true => {
            least_ttl(
                &socket,
                peer.address,
                u8::MAX - (peer.hops.unwrap_or(1).saturating_sub(1)),
            )?;
            u8::MAX
        }
        false => hops,
    };
    match peer.address {
        IpAddr::V4(_) => socket.set_ttl_v4(ttl.into())?,
        IpAddr::V6(_) => socket.set_unicast_hops_v6(ttl.into())?,
    }
    if let Some(path) = &peer.password_file {
        let text = std::fs::read_to_string(path)?;
        let password = text.lines().next().unwrap_or_default().as_bytes();
        sign(&socket, address, password)?;
    }
    socket.connect_timeout(&address.into(), PATIENCE)?;
    Ok(socket.into())
}

/// Has segments that have come with a lower TTL dropped (RFC 5082).
fn least_ttl(socket: &Socket, address: IpAddr, ttl: u8) -> io::Result<()> {
    let (level, option) = match address {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MINTTL),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT),
    };
    let ttl = libc::c_int::from(ttl);
    // SAFETY: the descriptor is open, and the kernel only reads the number.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const ttl).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has every segment to and from `address` signed (RFC 2385).
fn sign(socket: &Socket, address: SocketAddr, password: &[u8]) -> io::Result<()> {
    if password.is_empty() || password.len() > PASSWORD_MAX {
        let reason = format!(
            "the password has {} octets, not 1 to {PASSWORD_MAX}",
            password.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let mut signature = Signature {
        // SAFETY: plain numbers and octets, for which all zero is a value.
        address: unsafe { std::mem::zeroed() },
        flags: 0,
        prefix_length: 0,
        key_length: password.len() as u16,
        interface: 0,
        key: [0; PASSWORD_MAX],
    };
    let target = socket2::SockAddr::from(address);
    // SAFETY: a `SockAddr` holds `len()` initialized octets, and a `sockaddr_storage` is never shorter than they are.
    unsafe {
        std::ptr::copy_nonoverlapping(
            target.as_ptr().cast::<u8>(),
            (&raw mut signature.address).cast::<u8>(),
            target.len() as usize,
        );
    }
    for (to, from) in signature.key.iter_mut().zip(password) {
        *to = *from;
    }
    let length = size_of::<Signature>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel only reads `length` octets of the structure.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_MD5SIG,
            (&raw const signature).cast(),
            length,
        )
    };
    match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
