//! Keeps one process of an appliance running: adopts the one that an earlier daemon left, or starts one, and starts another when
//! it ends.
//!
//! The first restart comes at once, because pods are waiting; a process that keeps dying young is restarted ever later, up to
//! five seconds. It is never tied to the daemon's life: it has a session, a control group and the ports socket for itself, and
//! only [`Supervisor::stop`] with `end` ends it. By the ports socket the next daemon finds it again, whatever its command line.

mod cgroup;
pub mod command;
mod line;
pub mod process;

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use sluice_ports::message::{Identity, text};
use sluice_ports::offloads::Offloads;
use sluice_ports::wire;

use self::cgroup::Group;
use self::command::{Choice, Kind, Recipe, Sockets};
use self::line::{Line, NoLine};
use self::process::{Birth, Ending, Process};
use crate::appliance::ports::Ports;
use crate::config::Config;
use crate::files;

/// A process that lived this long did not die of its start.
const GROWN_UP: Duration = Duration::from_secs(10);
/// The second and the longest pause before a restart.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// Between two looks at the log of a process that does not keep it short itself.
const LOG_WATCH: Duration = Duration::from_millis(250);
/// Between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(50);
/// A process that has not answered for so long never will.
const DEAF: Duration = Duration::from_secs(30);
/// How long a process may take to end in order.
const ENDING: Duration = Duration::from_secs(2);
/// For how long the place of a daemon may be taken by one that was killed this moment.
const LINGERING: Duration = Duration::from_secs(1);

/// The appliance's process, for people.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MachineStatus {
    /// `kvm`, `process`, `tcg` or `external`.
    pub isolation: &'static str,
    /// What stands between a pod's packets and this machine's kernel.
    pub isolates: &'static str,
    /// Why that one.
    pub why: String,
    pub pid: Option<i32>,
    /// Program and version, and the build id of its appliance.
    pub program: Option<String>,
    pub build: Option<String>,
    /// It was started by an earlier life of the daemon.
    pub adopted: bool,
    /// Milliseconds since it was started.
    pub uptime_ms: Option<u64>,
    /// Restarts in this life of the daemon.
    pub restarts: u64,
    /// How the last one ended.
    pub last_ending: Option<Ending>,
    /// Why none could be started, or what does not answer.
    pub problem: Option<String>,
    /// Why it shares the daemon's control group, if so.
    pub cgroup_problem: Option<String>,
    /// Where its output is.
    pub log: PathBuf,
}

/// Why a daemon is not to be.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error(
        "Another sluice-node is connected to the appliance of {0}: end it, or start this one with --take-over"
    )]
    InUse(PathBuf),
    #[error("Cannot start the supervisor")]
    Start(#[from] io::Error),
}

#[derive(Debug, Default)]
struct State {
    status: MachineStatus,
    started: Option<(Instant, SystemTime)>,
    stop: Option<Stop>,
    /// A connection whose answer is waited for.
    asking: Option<OwnedFd>,
}

#[derive(Clone, Copy, Debug)]
struct Stop {
    end: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ports: Ports,
    kind: Option<Kind>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who may connect to the control channel.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Shared>);

impl Admission {
    /// Whether a process is the appliance's: the one that runs, or QEMU, which is its child. Any, when it is started by other means.
    pub fn admits(&self, pid: Option<i32>) -> bool {
        let own = self.0.lock().status.pid;
        match self.0.kind {
            None => true,
            Some(_) if pid.is_none() || own.is_none() => false,
            Some(Kind::Tcg) => pid == own || pid.and_then(process::parent) == own,
            Some(Kind::Kvm | Kind::Process) => pid == own,
        }
    }
}

/// What is done when another daemon has taken over.
pub type Usurped = Box<dyn Fn() + Send>;

/// Connects to the appliance of a run directory in place of the daemon that has it. `None`: there is none.
pub(crate) fn take_over(config: &Config) -> Option<Line> {
    let path = Sockets::in_dir(&config.run_dir).ports;
    // What is wrong shows again when it is looked for.
    Line::open(&path, true, |_| ()).ok()
}

/// The thread that keeps the process running.
#[derive(Debug)]
pub struct Supervisor {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Supervisor {
    /// Looks for a process of an earlier life, whose ports are found when this returns, and starts the thread. `line` is the
    /// connection to it, if there is one already.
    ///
    /// # Errors
    /// When another daemon is connected, or the kernel gives no thread.
    pub(crate) fn start(
        config: &Config,
        ports: &Ports,
        taps: Offloads,
        (line, usurped): (Option<Line>, Usurped),
    ) -> Result<Self, SupervisorError> {
        let Choice { kind, why } = command::choose(config);
        let isolation = kind.map_or("external", Kind::word);
        tracing::info!(isolation, %why, "isolation chosen");
        let group = kind.map(|_| Group::make());
        let (group, cgroup_problem) = match group {
            Some(Ok(group)) => (Some(Arc::new(group)), None),
            Some(Err(error)) => (None, Some(error.to_string())),
            None => (None, None),
        };
        let log = config.run_dir.join("vmm.log");
        let status = MachineStatus {
            isolation,
            isolates: kind.map_or("not known: it is started by other means", Kind::isolates),
            why,
            log: log.clone(),
            cgroup_problem,
            ..Default::default()
        };
        let keeper = Keeper {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    status,
                    ..State::default()
                }),
                ports: ports.clone(),
                kind,
            }),
            starts: kind
                .map(|kind| Recipe::new(kind, config, taps))
                .map(Starts::Recipe),
            ports: ports.clone(),
            sockets: Sockets::in_dir(&config.run_dir),
            log,
            group,
            usurped,
        };
        keeper.spawn(line)
    }

    /// The process now.
    pub fn status(&self) -> MachineStatus {
        let identity = self.shared.ports.identity();
        let state = self.shared.lock();
        let mut status = state.status.clone();
        let age = state
            .started
            .map(|(_, at)| at.elapsed().unwrap_or_default());
        status.uptime_ms = age.map(|age| age.as_millis() as u64);
        if let Some(Identity { program, build, .. }) = identity {
            status.program = Some(program.as_str().into());
            status.build = Some(build.as_str().into());
        }
        status
    }

    /// Who may connect to the control channel.
    pub fn admission(&self) -> Admission {
        Admission(self.shared.clone())
    }

    /// When the running process was started, if this daemon did it.
    pub fn started_at(&self) -> Option<Instant> {
        let state = self.shared.lock();
        state
            .started
            .filter(|_| !state.status.adopted)
            .map(|(at, _)| at)
    }

    /// Ends the thread, and with `end` the process as well.
    pub fn stop(&self, end: bool) {
        {
            let mut state = self.shared.lock();
            state.stop = Some(Stop { end });
            if let Some(asking) = &state.asking {
                // A process that does not answer is not waited for.
                let _ = rustix::net::shutdown(asking, rustix::net::Shutdown::Both);
            }
        }
        self.shared.ports.wake();
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

/// What starts a process.
#[derive(Debug)]
enum Starts {
    Recipe(Recipe),
    /// A command line in which `FD` stands for the number of the listener, and the identity that is wanted.
    #[cfg(test)]
    Command(Vec<std::ffi::OsString>, Identity),
}

impl Starts {
    /// The command line, given the number of the listener.
    fn command(&self, ports: i32) -> io::Result<Vec<std::ffi::OsString>> {
        match self {
            Self::Recipe(recipe) => Ok(recipe.command_line(ports, &recipe.build()?)),
            #[cfg(test)]
            Self::Command(words, _) => Ok(words
                .iter()
                .map(|word| {
                    if word == "FD" {
                        ports.to_string().into()
                    } else {
                        word.clone()
                    }
                })
                .collect()),
        }
    }

    /// Why a process is not the one that would be started.
    fn difference(&self, found: &Identity) -> Option<String> {
        let (program, build, contract) = match self {
            Self::Recipe(recipe) => {
                // An image that cannot be read starts nothing better.
                let build = recipe.build().ok();
                let build = build.map(|build| text(&build));
                (
                    recipe.kind().program(),
                    build,
                    u32::from(sluice_contract::VERSION),
                )
            }
            #[cfg(test)]
            Self::Command(_, wanted) => {
                let name = wanted.program.split(' ').next().unwrap_or_default();
                (name, Some(wanted.build.clone()), wanted.contract)
            }
        };
        if found.program.split(' ').next() != Some(program) {
            return Some(format!("it is {}, not {program}", found.program));
        }
        if found.contract != contract {
            let theirs = found.contract;
            return Some(format!(
                "it speaks version {theirs} of the contract, not {contract}"
            ));
        }
        let build = build.filter(|build| *build != found.build)?;
        Some(format!("its appliance is {}, not {build}", found.build))
    }
}

/// Why the process is no longer watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    Ended,
    Deaf,
    ToStop,
    TakenOver,
}

struct Keeper {
    shared: Arc<Shared>,
    /// `None`: it is started by other means.
    starts: Option<Starts>,
    ports: Ports,
    sockets: Sockets,
    log: PathBuf,
    group: Option<Arc<Group>>,
    usurped: Usurped,
}

impl Keeper {
    fn spawn(self, line: Option<Line>) -> Result<Supervisor, SupervisorError> {
        let shared = self.shared.clone();
        let found = self.look(line)?;
        let thread = std::thread::Builder::new()
            .name("supervisor".into())
            .spawn(move || self.run(found))?;
        Ok(Supervisor {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The process of an earlier life, if it is what would be started now; any other ends.
    fn look(&self, line: Option<Line>) -> Result<Option<(Process, OwnedFd)>, SupervisorError> {
        let deadline = Instant::now() + LINGERING;
        let opened = match line {
            Some(line) => Ok(line),
            None => loop {
                match Line::open(&self.sockets.ports, false, |_| ()) {
                    Err(NoLine::InUse) if Instant::now() < deadline => std::thread::sleep(AGAIN),
                    opened => break opened,
                }
            },
        };
        let mut line = match opened {
            Ok(line) => line,
            Err(NoLine::Absent) => return Ok(None),
            Err(NoLine::InUse) => {
                let run_dir = self.sockets.ports.parent().map(PathBuf::from);
                return Err(SupervisorError::InUse(run_dir.unwrap_or_default()));
            }
            Err(NoLine::Deaf { pid, error }) => {
                tracing::warn!(pid, %error, "an earlier appliance does not answer");
                self.end_useless(pid, false);
                return Ok(None);
            }
        };
        let pid = line.pid;
        let outcome = self.ports.find(&mut line.connection);
        let difference = self
            .starts
            .as_ref()
            .and_then(|it| it.difference(&line.identity));
        let useless = match (outcome, difference) {
            (Err(error), _) => error.to_string(),
            (_, Some(difference)) => difference,
            _ => match Process::adopt(pid) {
                Ok(process) => match self.ports.adopt(line.connection, line.identity) {
                    Ok(()) => {
                        tracing::info!(pid, "appliance adopted");
                        self.announce(&mut self.shared.lock(), &process);
                        return Ok(Some((process, line.watch)));
                    }
                    Err(error) => {
                        tracing::warn!(pid, %error, "an earlier appliance is of no use");
                        self.end_useless(pid, false);
                        return Ok(None);
                    }
                },
                Err(error) => error.to_string(),
            },
        };
        tracing::warn!(pid, reason = %useless, "an earlier appliance is of no use: ending it");
        let was_asked = line.connection.quit().is_ok();
        self.end_useless(pid, was_asked);
        Ok(None)
    }

    fn end_useless(&self, pid: i32, was_asked: bool) {
        if self.starts.is_none() {
            return;
        }
        match Process::adopt(pid) {
            Ok(process) => process.end(was_asked, ENDING),
            // It has ended already.
            Err(error) => tracing::debug!(pid, %error, "an earlier appliance is gone"),
        }
    }

    fn run(self, found: Option<(Process, OwnedFd)>) {
        if self.starts.is_none() {
            return self.follow(found);
        }
        let mut found = found;
        let mut pause = Duration::ZERO;
        loop {
            let (running, line) = match found.take() {
                Some((running, line)) => (running, Some(line)),
                None => match self.start() {
                    Some(running) => (running, None),
                    None => {
                        pause = (pause * 2).clamp(PAUSE[0], PAUSE[1]);
                        if self.rest(pause) {
                            return;
                        }
                        continue;
                    }
                },
            };
            let born = Instant::now();
            match self.watch(Some(&running), line) {
                Watched::ToStop => return self.let_go(running),
                Watched::TakenOver => return self.give_way(),
                Watched::Ended => self.mourn(running),
                Watched::Deaf => {
                    tracing::error!(
                        pid = running.pid,
                        "the appliance does not answer: ending it"
                    );
                    self.ports.ended();
                    running.end(false, ENDING);
                    self.buried(Ending {
                        status: "ended by the daemon".into(),
                        line: "it did not answer on the ports socket".into(),
                    });
                }
            }
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

    /// Stays connected to a process that is started by other means, whenever there is one.
    fn follow(self, found: Option<(Process, OwnedFd)>) {
        match self.watch(None, found.map(|(_, line)| line)) {
            Watched::TakenOver => self.give_way(),
            _ => self.ports.disconnected(),
        }
    }

    fn start(&self) -> Option<Process> {
        let problem = |error: io::Error| {
            tracing::error!(%error, "the appliance cannot be started");
            let text = format!("Cannot start the appliance: {error}");
            self.shared.lock().status.problem = Some(text);
        };
        files::remove(&self.sockets.ports);
        let listener = wire::listen(&self.sockets.ports).map_err(problem).ok()?;
        let starts = self.starts.as_ref()?;
        let command = starts.command(listener.as_raw_fd()).map_err(problem).ok()?;
        let birth = Birth {
            log: &self.log,
            ports: listener,
            group: self.group.clone(),
        };
        // Held until its id is known: it may come to the control channel at any moment.
        let mut state = self.shared.lock();
        match Process::start(&command, birth) {
            Ok(started) => {
                tracing::info!(pid = started.pid, "appliance started");
                if self.group.is_some() && !Group::has(started.pid) {
                    let text = "the kernel did not let it enter one of its own".to_owned();
                    state.status.cgroup_problem = Some(text);
                }
                self.announce(&mut state, &started);
                Some(started)
            }
            Err(error) => {
                drop(state);
                problem(error);
                None
            }
        }
    }

    fn announce(&self, state: &mut State, process: &Process) {
        state.status.pid = Some(process.pid);
        state.status.adopted = process.is_adopted();
        state.status.problem = None;
        state.started = Some((Instant::now(), process.started));
    }

    /// Waits for the process's end, and keeps connected to it.
    fn watch(&self, process: Option<&Process>, line: Option<OwnedFd>) -> Watched {
        let mut line = line;
        let mut was_connected = line.is_some();
        let (mut silent_since, mut next) = (Instant::now(), Instant::now());
        loop {
            if self.shared.lock().stop.is_some() {
                return Watched::ToStop;
            }
            self.ports.settle();
            if !self.ports.is_connected() {
                if line.take().is_some() {
                    // A process that has ended closes its sockets before it is seen to have ended.
                    silent_since = Instant::now();
                    next = silent_since + AGAIN;
                }
                if Instant::now() >= next {
                    match self.connect(!was_connected && process.is_some()) {
                        Ok(watch) => {
                            line = Some(watch);
                            was_connected = true;
                            self.shared.lock().status.problem = None;
                        }
                        Err(NoLine::InUse) if was_connected => return Watched::TakenOver,
                        Err(error) => {
                            let is_late = silent_since.elapsed() >= DEAF;
                            if process.is_some() && is_late {
                                return Watched::Deaf;
                            }
                            tracing::debug!(%error, "no connection to the appliance's process");
                            next = Instant::now() + AGAIN;
                        }
                    }
                    continue;
                }
            }
            if self.wait(process, line.as_ref(), next) {
                return Watched::Ended;
            }
        }
    }

    /// Connects to the process that listens now.
    fn connect(&self, is_new: bool) -> Result<OwnedFd, NoLine> {
        let asking = |socket: OwnedFd| {
            let mut state = self.shared.lock();
            if state.stop.is_none() {
                state.asking = Some(socket);
            }
        };
        let opened = Line::open(&self.sockets.ports, false, asking);
        self.shared.lock().asking = None;
        let Line {
            connection,
            identity,
            pid,
            watch,
        } = opened?;
        let connected = self.ports.connect(connection, identity, is_new);
        connected.map_err(|error| NoLine::Deaf { pid, error })?;
        if self.starts.is_none() {
            self.shared.lock().status.pid = Some(pid);
        }
        Ok(watch)
    }

    /// Until something happens; true when the process has ended.
    fn wait(&self, process: Option<&Process>, line: Option<&OwnedFd>, next: Instant) -> bool {
        let mut limit = match line {
            Some(_) => None,
            None => Some(next.saturating_duration_since(Instant::now()) + Duration::from_millis(1)),
        };
        // Else it keeps its log short itself.
        let watches_log = self.shared.kind == Some(Kind::Tcg);
        if watches_log {
            limit = Some(limit.map_or(LOG_WATCH, |limit| limit.min(LOG_WATCH)));
        }
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX)
        });
        let woken = self.ports.woken();
        let mut fds = vec![PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
        // Its end alone is waited for: answers are for those who ask.
        fds.extend(line.map(|line| PollFd::new(line.as_fd(), PollFlags::empty())));
        fds.extend(process.map(|it| PollFd::new(it.ended(), PollFlags::POLLIN)));
        let ready = poll(&mut fds, timeout);
        let is_ready =
            |fd: Option<&PollFd<'_>>| ready.is_ok() && fd.is_some_and(|fd| fd.any() == Some(true));
        let has_ended = process.is_some() && is_ready(fds.last());
        let has_left = line.is_some() && is_ready(fds.get(1));
        // Empty when something else woke the thread.
        let _ = woken.read();
        if has_left {
            self.ports.disconnected();
        }
        if watches_log && let Err(error) = process::shorten(&self.log) {
            tracing::debug!(%error, "the appliance's log cannot be kept short");
        }
        has_ended
    }

    fn mourn(&self, process: Process) {
        self.ports.ended();
        let pid = process.pid;
        let ending = process.collect(&self.log);
        tracing::error!(pid, status = %ending.status, line = %ending.line, "the appliance's process ended");
        self.buried(ending);
    }

    fn buried(&self, ending: Ending) {
        let mut state = self.shared.lock();
        state.status.pid = None;
        state.status.restarts += 1;
        state.status.last_ending = Some(ending);
        state.started = None;
    }

    fn let_go(&self, process: Process) {
        let end = self.shared.lock().stop.is_some_and(|stop| stop.end);
        if end {
            let was_asked = self.ports.is_connected();
            self.ports.quit();
            process.end(was_asked, ENDING);
            self.clear();
        }
        // The next daemon may come at once.
        self.ports.disconnected();
    }

    fn clear(&self) {
        for path in [
            &self.log,
            &self.log.with_extension("log.1"),
            &self.sockets.ports,
        ] {
            files::remove(path);
        }
        if let Some(group) = &self.group {
            group.remove();
        }
    }

    fn give_way(&self) {
        tracing::warn!("another daemon has taken over the appliance: this one ends");
        self.ports.taken_over();
        let text = "Another daemon has taken over the appliance".to_owned();
        self.shared.lock().status.problem = Some(text);
        (self.usurped)();
    }

    /// Waits; true when the daemon is to stop.
    fn rest(&self, pause: Duration) -> bool {
        let deadline = Instant::now() + pause;
        loop {
            let stop = self.shared.lock().stop;
            if let Some(stop) = stop {
                if stop.end {
                    self.clear();
                }
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let woken = self.ports.woken();
            let mut fds = [PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
            // An error ends the wait early, which does no harm.
            let _ = poll(&mut fds, timeout);
            let _ = woken.read();
        }
    }
}

#[cfg(test)]
mod tests;
