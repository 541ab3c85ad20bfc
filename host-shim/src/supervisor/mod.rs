//! Keeps one VMM running: adopts the one that an earlier daemon left, or starts one, and starts another when it ends.
//!
//! The first restart comes at once, because pods are waiting; a VMM that keeps dying young is restarted ever later, up to
//! five seconds. The VMM is never tied to the daemon's life: only [`Supervisor::stop`] with `end` ends it.

pub mod command;
pub mod process;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;
use std::os::fd::AsFd;

use self::command::{Choice, Kind, Sockets};
use self::process::{Ending, Process, Record};
use crate::config::Config;
use crate::files;
use sluice_trunk::vhost::TrunkState;

/// Within this time an old VMM has connected again: its longest pause between attempts is 200 ms under KVM, and QEMU's one
/// second (`reconnect=1`).
const ADOPTION: [Duration; 2] = [Duration::from_millis(300), Duration::from_millis(1500)];
/// A VMM that lived this long did not die of its start.
const GROWN_UP: Duration = Duration::from_secs(10);
/// The second and the longest pause before a restart.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// Between two looks at the log of a VMM that does not keep it short itself.
const LOG_WATCH: u16 = 250;
/// How long a VMM may take to end in order.
const ENDING: Duration = Duration::from_secs(2);

/// The VMM, for people.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MachineStatus {
    /// `kvm`, `tcg` or `external`.
    pub isolation: &'static str,
    /// Why that one.
    pub why: String,
    pub pid: Option<i32>,
    /// It was started by an earlier life of the daemon.
    pub adopted: bool,
    /// Milliseconds since it was started.
    pub uptime_ms: Option<u64>,
    /// Restarts in this life of the daemon.
    pub restarts: u64,
    /// How the last one ended.
    pub last_ending: Option<Ending>,
    /// Why none could be started.
    pub problem: Option<String>,
    /// Where its output is.
    pub log: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    status: MachineStatus,
    started: Option<(Instant, SystemTime)>,
    stop: Option<Stop>,
}

#[derive(Clone, Copy, Debug)]
struct Stop {
    end: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that keeps the VMM running.
#[derive(Debug)]
pub struct Supervisor {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Supervisor {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel gives no thread or descriptor.
    pub fn start(config: &Config, trunk: TrunkState) -> io::Result<Self> {
        let Choice { kind, why } = command::choose(config);
        let log = config.run_dir.join("vmm.log");
        let isolation = match kind {
            Some(Kind::Kvm) => "kvm",
            Some(Kind::Tcg) => "tcg",
            None => "external",
        };
        tracing::info!(isolation, %why, "isolation chosen");
        let status = MachineStatus {
            isolation,
            why,
            log: log.clone(),
            ..Default::default()
        };
        let state = State {
            status,
            ..State::default()
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake,
        });
        let Some(kind) = kind else {
            return Ok(Self {
                shared,
                thread: Mutex::new(None),
            });
        };
        let command = command::command_line(kind, config, &Sockets::in_dir(&config.run_dir));
        let record = config.run_dir.join("vmm.json");
        let patience = ADOPTION[usize::from(kind == Kind::Tcg)];
        let keeper = Keeper {
            shared: shared.clone(),
            trunk,
            command,
            log,
            record,
            patience,
            watches_log: kind == Kind::Tcg,
        };
        let run = move || keeper.run();
        let thread = std::thread::Builder::new()
            .name("supervisor".into())
            .spawn(run)?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The VMM now.
    pub fn status(&self) -> MachineStatus {
        let state = self.shared.lock();
        let mut status = state.status.clone();
        let age = state
            .started
            .map(|(_, at)| at.elapsed().unwrap_or_default());
        status.uptime_ms = age.map(|age| age.as_millis() as u64);
        status
    }

    /// When the running VMM was started, if this daemon did it.
    pub fn started_at(&self) -> Option<Instant> {
        let state = self.shared.lock();
        state
            .started
            .filter(|_| !state.status.adopted)
            .map(|(at, _)| at)
    }

    /// Ends the thread, and with `end` the VMM as well.
    pub fn stop(&self, end: bool) {
        self.shared.lock().stop = Some(Stop { end });
        // Only fails when the counter is full, and then the thread is awake.
        let _ = self.shared.wake.write(1);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|t| t.join().is_err()) {
            tracing::error!("the supervisor's thread had died");
        }
    }
}

struct Keeper {
    shared: Arc<Shared>,
    trunk: TrunkState,
    command: Vec<std::ffi::OsString>,
    log: PathBuf,
    record: PathBuf,
    patience: Duration,
    /// The VMM writes to its log what its guest likes (QEMU); else it keeps it short itself.
    watches_log: bool,
}

impl Keeper {
    fn run(self) {
        let mut process = self.adopt();
        let mut pause = Duration::ZERO;
        loop {
            let running = match process.take() {
                Some(running) => running,
                None => match self.start() {
                    Some(running) => running,
                    None => {
                        pause = (pause * 2).clamp(PAUSE[0], PAUSE[1]);
                        if self.rest(pause) {
                            return;
                        }
                        continue;
                    }
                },
            };
            self.announce(&running);
            let born = Instant::now();
            if !self.watch(&running) {
                return self.let_go(running);
            }
            self.mourn(running);
            pause = if born.elapsed() >= GROWN_UP {
                Duration::ZERO
            } else {
                pause
            };
            if self.rest(pause) {
                return;
            }
            pause = (pause * 2).clamp(PAUSE[0], PAUSE[1]);
        }
    }

    /// The VMM of an earlier life, if it is what would be started now and it finds the trunk again.
    fn adopt(&self) -> Option<Process> {
        let text = fs::read(&self.record).ok()?;
        let record: Record = serde_json::from_slice(&text).ok()?;
        let wanted = record.command == self.command;
        let found = Process::find(record)?;
        let pid = found.record.pid;
        let deadline = Instant::now() + self.patience;
        while wanted && Instant::now() < deadline {
            if self.trunk.peer().is_some_and(|peer| peer.pid == Some(pid)) {
                tracing::info!(pid, "VMM adopted");
                return Some(found);
            }
            if self.rest(Duration::from_millis(5)) {
                return Some(found);
            }
        }
        tracing::warn!(pid, wanted, "an earlier VMM is of no use: ending it");
        found.end(ENDING);
        None
    }

    fn start(&self) -> Option<Process> {
        match Process::start(self.command.clone(), &self.log) {
            Ok(started) => {
                tracing::info!(pid = started.record.pid, "VMM started");
                if let Err(error) = files::write_json(&self.record, &started.record) {
                    tracing::warn!(%error, "VMM not written down: a later daemon will not know it");
                }
                Some(started)
            }
            Err(error) => {
                tracing::error!(%error, "VMM cannot be started");
                self.shared.lock().status.problem = Some(format!("Cannot start the VMM: {error}"));
                None
            }
        }
    }

    fn announce(&self, process: &Process) {
        self.trunk.admit_only(Some(process.record.pid));
        let mut state = self.shared.lock();
        state.status.pid = Some(process.record.pid);
        state.status.adopted = process.is_adopted();
        state.status.problem = None;
        state.started = Some((Instant::now(), process.record.started));
    }

    /// Waits for the process's end; false when the daemon is to stop first.
    fn watch(&self, process: &Process) -> bool {
        loop {
            if self.shared.lock().stop.is_some() {
                return false;
            }
            let mut fds = [
                PollFd::new(process.ended(), PollFlags::POLLIN),
                PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            ];
            let timeout = match self.watches_log {
                true => LOG_WATCH.into(),
                false => PollTimeout::NONE,
            };
            let ready = poll(&mut fds, timeout);
            if ready.is_ok() && fds[0].any() == Some(true) {
                return true;
            }
            if self.watches_log
                && let Err(error) = process::shorten(&self.log)
            {
                tracing::debug!(%error, "the VMM's log cannot be kept short");
            }
        }
    }

    fn mourn(&self, process: Process) {
        let pid = process.record.pid;
        self.trunk.admit_only(None);
        let ending = process.collect(&self.log);
        tracing::error!(pid, status = %ending.status, line = %ending.line, "VMM ended");
        let mut state = self.shared.lock();
        state.status.pid = None;
        state.status.restarts += 1;
        state.status.last_ending = Some(ending);
        state.started = None;
    }

    fn let_go(&self, process: Process) {
        let end = self.shared.lock().stop.is_some_and(|stop| stop.end);
        if end {
            process.end(ENDING);
            files::remove(&self.record);
            files::remove(&self.log);
            files::remove(&self.log.with_extension("log.1"));
        }
    }

    /// Waits; true when the daemon is to stop.
    fn rest(&self, pause: Duration) -> bool {
        let deadline = Instant::now() + pause;
        loop {
            if self.shared.lock().stop.is_some() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
            // An error ends the wait early, which does no harm.
            let _ = poll(&mut fds, timeout);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_trunk::vhost::TrunkPeer;

    /// A run directory with a script in the VMM's place.
    struct Lab {
        dir: PathBuf,
        trunk: TrunkState,
    }

    impl Lab {
        fn new(name: &str, script: &str) -> Self {
            use std::os::unix::fs::PermissionsExt;
            let dir = std::env::temp_dir().join(format!("sluice-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            let vmm = dir.join("vmm");
            fs::write(dir.join("script"), script).unwrap();
            fs::copy("/bin/sh", &vmm).unwrap();
            fs::set_permissions(&vmm, fs::Permissions::from_mode(0o700)).unwrap();
            Self {
                dir,
                trunk: TrunkState::default(),
            }
        }

        fn keeper(&self) -> (Keeper, Arc<Shared>) {
            let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            let shared = Arc::new(Shared {
                state: Mutex::default(),
                wake,
            });
            let keeper = Keeper {
                shared: shared.clone(),
                trunk: self.trunk.clone(),
                command: vec![self.dir.join("vmm").into(), self.dir.join("script").into()],
                log: self.dir.join("vmm.log"),
                record: self.dir.join("vmm.json"),
                patience: Duration::from_millis(300),
                watches_log: true,
            };
            (keeper, shared)
        }

        fn supervisor(&self) -> Supervisor {
            let (keeper, shared) = self.keeper();
            let thread = std::thread::spawn(move || keeper.run());
            Supervisor {
                shared,
                thread: Mutex::new(Some(thread)),
            }
        }
    }

    impl Drop for Lab {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.dir).unwrap();
        }
    }

    fn eventually(supervisor: &Supervisor, good: impl Fn(&MachineStatus) -> bool) -> MachineStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = supervisor.status();
            if good(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{status:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn is_alive(pid: i32) -> bool {
        // An adopted one was our child all the same, and stays a zombie until this process ends.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, fields)| !fields.starts_with('Z'))
    }

    #[test]
    fn p03_vmm_that_is_killed_is_replaced_at_once() {
        let lab = Lab::new("killed", "echo up; exec sleep 1000");
        let supervisor = lab.supervisor();
        let first = eventually(&supervisor, |s| s.pid.is_some()).pid.unwrap();
        let target = nix::unistd::Pid::from_raw(first);
        nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGKILL).unwrap();
        let status = eventually(&supervisor, |s| s.restarts == 1 && s.pid.is_some());
        assert_ne!(status.pid, Some(first));
        assert!(status.last_ending.unwrap().status.contains("SIGKILL"));
        supervisor.stop(true);
        assert!(!is_alive(status.pid.unwrap()));
        assert!(!lab.dir.join("vmm.json").exists() && !lab.dir.join("vmm.log").exists());
    }

    #[test]
    fn the_log_of_a_vmm_that_writes_for_ever_stays_short() {
        // Some megabytes in all, and then its last line.
        let script = "i=0; while [ $i -lt 200 ]; do head -c 20000 /dev/zero | tr '\\0' x; echo; \
                      i=$((i+1)); sleep 0.01; done; echo last; exec sleep 1000";
        let lab = Lab::new("log", script);
        let supervisor = lab.supervisor();
        let log = lab.dir.join("vmm.log");
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut largest = 0;
        while !fs::read_to_string(&log).is_ok_and(|text| text.ends_with("last\n")) {
            largest = largest.max(fs::metadata(&log).map_or(0, |it| it.len()));
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
        // What comes between two looks is on top.
        assert!(largest < 3 << 20, "{largest}");
        std::thread::sleep(Duration::from_millis(2 * u64::from(LOG_WATCH)));
        assert!(fs::metadata(&log).unwrap().len() <= 512 << 10);
        supervisor.stop(true);
    }

    #[test]
    fn crash_loop_is_slowed_down_and_its_telling_line_kept() {
        let script = "echo '{\"sluice\":\"fault\",\"rip\":1}'; echo 'and more'; exit 70";
        let lab = Lab::new("crash", script);
        let begin = Instant::now();
        let supervisor = lab.supervisor();
        let status = eventually(&supervisor, |s| s.restarts >= 4);
        // At once, then after 100, 200 and 400 ms.
        assert!(begin.elapsed() >= Duration::from_millis(300));
        let ending = status.last_ending.unwrap();
        assert_eq!(ending.line, "{\"sluice\":\"fault\",\"rip\":1}");
        assert!(ending.status.contains("70"), "{}", ending.status);
        supervisor.stop(true);
    }

    #[test]
    fn vmm_outlives_the_daemon_and_is_adopted_when_it_finds_the_trunk_again() {
        let lab = Lab::new("adopt", "exec sleep 1000");
        let supervisor = lab.supervisor();
        let pid = eventually(&supervisor, |s| s.pid.is_some()).pid;
        supervisor.stop(false);
        assert!(is_alive(pid.unwrap()));

        lab.trunk.set(Some(TrunkPeer {
            pid,
            ..TrunkPeer::default()
        }));
        let supervisor = lab.supervisor();
        let status = eventually(&supervisor, |s| s.pid.is_some());
        assert_eq!((status.pid, status.adopted), (pid, true));
        supervisor.stop(false);

        // One that does not come back, or is not what would be started now, is of no use.
        lab.trunk.set(None);
        let supervisor = lab.supervisor();
        let status = eventually(&supervisor, |s| s.pid.is_some());
        assert!(status.pid != pid && !status.adopted && !is_alive(pid.unwrap()));
        supervisor.stop(true);
    }

    #[test]
    fn record_of_another_process_is_not_believed() {
        let lab = Lab::new("record", "exec sleep 1000");
        let (keeper, _) = lab.keeper();
        let pid = std::process::id().cast_signed();
        let record = Record {
            pid,
            start_ticks: 1,
            command: keeper.command.clone(),
            started: SystemTime::now(),
        };
        files::write_json(&keeper.record, &record).unwrap();
        assert!(keeper.adopt().is_none());
    }

    #[test]
    fn vmm_that_cannot_be_started_is_a_problem_that_names_it() {
        let lab = Lab::new("missing", "");
        fs::remove_file(lab.dir.join("vmm")).unwrap();
        let supervisor = lab.supervisor();
        let problem = eventually(&supervisor, |s| s.problem.is_some())
            .problem
            .unwrap();
        assert!(problem.contains("vmm: No such file"), "{problem}");
        supervisor.stop(true);
    }
}
