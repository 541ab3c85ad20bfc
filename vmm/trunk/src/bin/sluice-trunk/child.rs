//! The monitor as a child: it never outlives this process, and this process never outlives it.
#![expect(
    unsafe_code,
    reason = "the child asks for its end before it becomes another program"
)]

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long it may take to end in order.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running child.
#[derive(Debug)]
pub(crate) struct Child {
    process: std::process::Child,
    descriptor: OwnedFd,
}

impl Child {
    pub(crate) fn start(program: &OsStr, arguments: &[OsString]) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments);
        let parent = rustix::process::getpid();
        // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // The parent may have ended before that was asked for.
                match rustix::process::getppid() {
                    Some(now) if now == parent => Ok(()),
                    _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
                }
            });
        }
        let process = command.spawn()?;
        let descriptor = pidfd_open(Pid::from_child(&process), PidfdFlags::empty())?;
        Ok(Self {
            process,
            descriptor,
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }

    /// Readable once it has ended.
    pub(crate) fn ended(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// Ends it if it has not ended by itself, and gives its exit status.
    pub(crate) fn end(mut self) -> u8 {
        // One that has ended already takes no signal.
        let _ = pidfd_send_signal(&self.descriptor, Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.process.try_wait() {
                Ok(Some(status)) => {
                    let code = status.code().or(status.signal().map(|signal| 128 + signal));
                    return u8::try_from(code.unwrap_or(1)).unwrap_or(1);
                }
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) => {
                    let _ = self.process.kill();
                }
                Err(error) => {
                    tracing::error!(%error, "the child's status is not known");
                    return 1;
                }
            }
        }
    }
}
