//! One process of an appliance: started so that it outlives the daemon, or found running from an earlier life of it.
#![expect(unsafe_code, reason = "what happens between fork and exec")]

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::cgroup::Group;

/// A log that is longer is shortened to its last part. With that of the process before it stays below a mebibyte.
const LOG_CAP: u64 = 384 << 10;
const LOG_KEPT: u64 = 128 << 10;
/// Clock ticks of `/proc` in a second: the same on every x86 kernel.
const TICKS: f64 = 100.0;
/// Daemons that wait to be accepted.
const BACKLOG: i32 = 4;

/// A running process.
#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    /// When it was started.
    pub started: SystemTime,
    pidfd: OwnedFd,
    child: Option<Child>,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Exit status or signal, in words; an adopted one does not tell.
    pub status: String,
    /// The line of its log that says most about it.
    pub line: String,
}

/// What a process is started with besides its command line.
#[derive(Debug)]
pub(super) struct Birth<'a> {
    pub(super) log: &'a Path,
    /// The listening end that it inherits, by the same number.
    pub(super) ports: OwnedFd,
    pub(super) group: Option<Arc<Group>>,
}

impl Process {
    /// Starts a process in a session of its own, its output going to `log`. From here on it is the process that listens on the
    /// ports socket, also in the eyes of the kernel: a peer's credentials name it.
    ///
    /// # Errors
    /// When the program cannot be started, or the log cannot be written.
    pub(super) fn start(command: &[OsString], birth: Birth<'_>) -> io::Result<Self> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let Birth { log, ports, group } = birth;
        // What a former one said stays readable until the next start.
        if log.exists() {
            fs::rename(log, log.with_extension("log.1"))?;
        }
        // `sluice-vmm` keeps a file small that it may read as well.
        let output = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .open(log)?;
        let prepare = move || -> io::Result<()> {
            // Ctrl-C in the daemon's terminal, and that terminal's end, are for the daemon alone.
            nix::unistd::setsid()?;
            fcntl(&ports, FcntlArg::F_SETFD(FdFlag::empty()))?;
            // SAFETY: the descriptor is open; the call takes no pointers.
            if unsafe { libc::listen(ports.as_raw_fd(), BACKLOG) } != 0 {
                return Err(io::Error::last_os_error());
            }
            // Whether that went well is seen from outside: without its own group the process is as good.
            let _ = group.as_ref().map(|group| group.enter());
            Ok(())
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        // SAFETY: between fork and exec `prepare` makes system calls only, and allocates nothing unless one fails.
        let child = unsafe { command.pre_exec(prepare) }
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", program.display())))?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok(Self {
            pid,
            started: SystemTime::now(),
            pidfd: open(pid)?,
            child: Some(child),
        })
    }

    /// The process of that id, which an earlier daemon started.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn adopt(pid: i32) -> io::Result<Self> {
        let pidfd = open(pid)?;
        Ok(Self {
            pid,
            started: started(pid).unwrap_or_else(SystemTime::now),
            pidfd,
            child: None,
        })
    }

    /// Whether an earlier daemon started it.
    pub fn is_adopted(&self) -> bool {
        self.child.is_none()
    }

    /// Readable when the process has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Collects the ended process.
    pub fn collect(mut self, log: &Path) -> Ending {
        let status = match self.child.as_mut().map(Child::wait) {
            None => "ended (it was adopted, so its status is not known)".into(),
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => format!("unknown: {error}"),
        };
        Ending {
            status,
            line: telling_line(log),
        }
    }

    /// Ends the process: gives it `patience` for what it was asked, then signals, and after as long insists.
    pub fn end(mut self, was_asked: bool, patience: Duration) {
        if !(was_asked && self.wait(patience)) {
            self.signal(Signal::TERM);
            if !self.wait(patience) {
                self.signal(Signal::KILL);
                self.wait(Duration::from_secs(2));
            }
        }
        if let Some(child) = &mut self.child
            && let Err(error) = child.wait()
        {
            tracing::warn!(%error, "the appliance's process is not collected");
        }
    }

    fn signal(&self, signal: Signal) {
        // Fails only when the process has ended, which is what is wanted.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    fn wait(&self, limit: Duration) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.ended(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).is_ok_and(|n| n != 0)
    }
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// The process that started that one.
pub(super) fn parent(pid: i32) -> Option<i32> {
    stat(pid)?.get(1)?.parse().ok()
}

/// When a process was started.
fn started(pid: i32) -> Option<SystemTime> {
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let born: f64 = stat(pid)?.get(19)?.parse().ok()?;
    let age = Duration::try_from_secs_f64(uptime - born / TICKS).ok()?;
    SystemTime::now().checked_sub(age)
}

/// Fields of `/proc/PID/stat` after the command name, which may contain anything (proc(5)).
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// The log's last report of a fault, or else its last line.
fn telling_line(log: &Path) -> String {
    let text = tail(log, 16 << 10).unwrap_or_default();
    let lines = || text.lines().rev().map(str::trim).filter(|l| !l.is_empty());
    let tells = |line: &&str| {
        ["\"fault\"", "\"panic\"", "watchdog"]
            .iter()
            .any(|w| line.contains(w))
    };
    let line = lines()
        .find(tells)
        .or_else(|| lines().next())
        .unwrap_or("it said nothing");
    line.chars().take(500).collect()
}

/// Keeps the last part of a log that has become too long, for a process that does not do so itself. What it writes in between
/// may be lost.
///
/// # Errors
/// As the file system says.
pub(super) fn shorten(log: &Path) -> io::Result<()> {
    if fs::metadata(log)?.len() <= LOG_CAP {
        return Ok(());
    }
    let kept = tail(log, LOG_KEPT)?;
    let mut file = OpenOptions::new().append(true).open(log)?;
    file.set_len(0)?;
    file.write_all(kept.as_bytes())
}

fn tail(path: &Path, most: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
