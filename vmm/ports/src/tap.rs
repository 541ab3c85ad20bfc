//! Tap devices: create, re-attach, offloads.
//!
//! Every tap has a 12-byte vnet header and is non-blocking. A tap that is to outlive the daemon is made persistent; after a
//! crash the same name is attached again, from inside the network namespace where the interface now lives.
#![expect(unsafe_code, reason = "the tun driver is spoken to by ioctl")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::offloads::Offloads;

/// Length of a tap's header: `virtio_net_hdr_v1`.
pub const HEADER: usize = 12;
/// Length of the header of a tap that knows tunnels: `virtio_net_hdr_v1_hash_tunnel`.
pub const LONG_HEADER: usize = 24;

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, libc::TUNSETPERSIST);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(tun_set_vnet_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
nix::ioctl_read_bad!(tun_get_vnet_header_size, libc::TUNGETVNETHDRSZ, libc::c_int);

/// `TUN_F_UDP_TUNNEL_GSO` and `TUN_F_UDP_TUNNEL_GSO_CSUM`, younger than the libc crate.
const TUNNELS: libc::c_uint = 0x80 | 0x100;

/// Attaches to the tap of this name in the calling thread's network namespace, creating it when there is none.
///
/// # Errors
/// As the kernel says: no `/dev/net/tun`, no permission, or the name belongs to another kind of interface.
pub fn attach(name: &str) -> io::Result<File> {
    attach_with(name, HEADER)
}

/// The same with a vnet header that tells of tunnels, where the kernel has it (Linux ≥ 6.17).
///
/// # Errors
/// As [`attach`].
pub fn attach_for_tunnels(name: &str) -> io::Result<File> {
    let tap = attach_with(name, LONG_HEADER)?;
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | TUNNELS;
    // SAFETY: `tap` is an open tun file and the argument is a plain integer.
    let known = unsafe { tun_set_offload(tap.as_raw_fd(), all.cast_signed()) };
    if known.is_err() {
        let size = HEADER as libc::c_int;
        // SAFETY: `tap` is an open tun file, and `size` lives across the call, which only reads it.
        unsafe { tun_set_vnet_header_size(tap.as_raw_fd(), &raw const size)? };
    }
    Ok(tap)
}

/// Bytes of the tap's vnet header.
///
/// # Errors
/// When it is no tap.
pub fn vnet_header_size(tap: BorrowedFd<'_>) -> io::Result<usize> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as it is borrowed, and `size` lives across the call.
    unsafe { tun_get_vnet_header_size(tap.as_raw_fd(), &raw mut size)? };
    Ok(usize::try_from(size).unwrap_or(0))
}

fn attach_with(name: &str, header: usize) -> io::Result<File> {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid `ifreq`: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let size = header as libc::c_int;
    // SAFETY: `tap` is an open tun file, and `request` and `size` live across the calls, which only read them.
    unsafe {
        tun_set_iff(tap.as_raw_fd(), &raw const request)?;
        tun_set_vnet_header_size(tap.as_raw_fd(), &raw const size)?;
    }
    Ok(tap)
}

/// Makes the interface outlive its last file descriptor, or not.
///
/// # Errors
/// As the kernel says.
pub fn set_persistent(tap: &File, persistent: bool) -> io::Result<()> {
    // SAFETY: `tap` is an open file and the argument is a plain integer.
    unsafe { tun_set_persist(tap.as_raw_fd(), i32::from(persistent))? };
    Ok(())
}

/// Tells the kernel which unfinished frames the guest takes: without checksum, or longer than the MTU.
///
/// # Errors
/// `EINVAL` when this kernel does not know one of them.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let mut flags = 0;
    // Segmentation without checksum offload is refused by the kernel.
    if offloads.checksum {
        let choice = [
            (true, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ];
        flags = choice
            .iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, flag)| all | flag);
        // What comes in a tunnel comes as whole as what does not.
        if offloads.tso4 && offloads.tso6 && vnet_header_size(tap)? == LONG_HEADER {
            flags |= TUNNELS;
        }
    }
    // SAFETY: the descriptor is open for as long as it is borrowed; the argument is a plain integer.
    unsafe { tun_set_offload(tap.as_raw_fd(), flags.cast_signed())? };
    Ok(())
}

/// Finds out what this kernel's taps can do, on a tap of its own in a namespace of its own.
///
/// # Errors
/// When no tap can be made at all.
pub fn probe() -> io::Result<Offloads> {
    let probe = || -> io::Result<Offloads> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        let tap = attach("probe0")?;
        let without_uso = Offloads {
            uso: false,
            ..Offloads::ALL
        };
        let ladder = [Offloads::ALL, without_uso, Offloads::NONE];
        let works = |o: &Offloads| set_offloads(std::os::fd::AsFd::as_fd(&tap), *o).is_ok();
        Ok(ladder.into_iter().find(works).unwrap_or(Offloads::NONE))
    };
    let thread = std::thread::Builder::new()
        .name("tap-probe".into())
        .spawn(probe)?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the probing thread died")))
}
