//! One VMM process: started so that it outlives the daemon, or found running from an earlier life of it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A log that is longer is shortened to its last part. With that of the VMM before it stays below a mebibyte.
const LOG_CAP: u64 = 384 << 10;
const LOG_KEPT: u64 = 128 << 10;

/// What is written down of a VMM, so that the next daemon knows it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub pid: i32,
    /// Start time in clock ticks since boot: with the pid it names a process for good.
    pub start_ticks: u64,
    /// The command line it was started with.
    pub command: Vec<OsString>,
    /// When it was started.
    pub started: SystemTime,
}

/// A running VMM.
#[derive(Debug)]
pub struct Process {
    pub record: Record,
    pidfd: OwnedFd,
    child: Option<Child>,
}

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Exit status or signal, in words; an adopted one does not tell.
    pub status: String,
    /// The line of its log that says most about it.
    pub line: String,
}

impl Process {
    /// Starts a VMM in a process group of its own, its output going to `log`.
    ///
    /// # Errors
    /// When the program cannot be started, or the log cannot be written.
    pub fn start(command: Vec<OsString>, log: &Path) -> io::Result<Self> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
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
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C in the daemon's terminal is for the daemon alone.
            .process_group(0)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", program.display())))?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let pidfd = open(pid)?;
        let start_ticks = start_ticks(pid).unwrap_or_default();
        let started = SystemTime::now();
        let record = Record {
            pid,
            start_ticks,
            command,
            started,
        };
        Ok(Self {
            record,
            pidfd,
            child: Some(child),
        })
    }

    /// Finds the process of a record, if it is still the same and alive.
    pub fn find(record: Record) -> Option<Self> {
        let pidfd = open(record.pid).ok()?;
        // After the descriptor is open the pid cannot be given to another.
        let same = start_ticks(record.pid) == Some(record.start_ticks) && !is_zombie(record.pid);
        same.then_some(Self {
            record,
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

    /// Ends the process: asks, and after `patience` insists.
    pub fn end(mut self, patience: Duration) {
        self.signal(Signal::TERM);
        if !self.wait(patience) {
            self.signal(Signal::KILL);
            self.wait(Duration::from_secs(2));
        }
        if let Some(child) = &mut self.child
            && let Err(error) = child.wait()
        {
            tracing::warn!(%error, "VMM not collected");
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

/// Fields of `/proc/PID/stat` after the command name, which may contain anything.
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// Field 22 of `/proc/PID/stat` (proc(5)).
fn start_ticks(pid: i32) -> Option<u64> {
    stat(pid)?.get(19)?.parse().ok()
}

fn is_zombie(pid: i32) -> bool {
    stat(pid).is_some_and(|fields| fields.first().is_some_and(|state| state == "Z"))
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

/// Keeps the last part of a log that has become too long, for a VMM that does not do so itself. What it writes in between
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
