//! Network namespaces: doing something inside one, on a thread of its own.
//!
//! A thread that enters a namespace never comes back to the daemon's others, so no code can be in the wrong one.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

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
