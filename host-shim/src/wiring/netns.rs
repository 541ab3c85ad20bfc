//! Network namespaces: doing something inside one, on a thread of its own.
//!
//! A thread that enters a namespace never comes back to the daemon's others, so no code can be in the wrong one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::GetStruct;
use serde::{Deserialize, Serialize};

/// A namespace, whatever path leads to it: a path like `/proc/PID/ns/net` leads to another one when the PID is given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsId {
    pub inode: u64,
    /// Inodes are given again, this number is not. `None`: before Linux 5.14.
    pub cookie: Option<u64>,
}

/// Of `asm-generic/socket.h`.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The socket option by which the kernel tells [`NetnsId::cookie`].
#[derive(Clone, Copy, Debug)]
struct NetnsCookie;

nix::getsockopt_impl!(
    NetnsCookie,
    libc::SOL_SOCKET,
    SO_NETNS_COOKIE,
    u64,
    GetStruct<u64>
);

/// An open network namespace.
#[derive(Debug)]
pub struct Netns(File);

impl Netns {
    /// Opens a namespace by path: `/var/run/netns/NAME`, `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When there is no such file. Whether it is a network namespace shows when it is entered.
    pub fn open(path: &Path) -> io::Result<Self> {
        File::open(path).map(Self)
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// What tells it from every other namespace of this boot.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn identity(&self) -> io::Result<NetnsId> {
        let inode = self.0.metadata()?.ino();
        let cookie = self.run(|| {
            let socket = UnixDatagram::unbound()?;
            Ok(getsockopt(&socket, NetnsCookie).ok())
        })?;
        Ok(NetnsId { inode, cookie })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.0
    }

    /// Runs `work` inside the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or as `work` says.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("netns".into())
                .spawn_scoped(scope, || {
                    setns(&self.0, CloneFlags::CLONE_NEWNET)?;
                    work()
                })?;
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the namespace's thread died")))
        })
    }
}

/// Whether an error says nothing about the namespace: this process or the kernel had no more of what it takes to look.
pub fn is_out_of_means(error: &io::Error) -> bool {
    let short = [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::EAGAIN,
        libc::ENOBUFS,
        libc::EINTR,
    ];
    error.raw_os_error().is_some_and(|e| short.contains(&e))
}

/// Sets a network sysctl (`ipv6/conf/eth0/accept_ra`) in the calling thread's namespace. A sysctl that this kernel does not
/// have is left alone: the feature it would turn off is not there either.
///
/// # Errors
/// As the kernel says.
pub fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    match fs::write(Path::new("/proc/sys/net").join(name), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}
