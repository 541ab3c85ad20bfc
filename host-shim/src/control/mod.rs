//! The control channel: keeps the guest's tables equal to what the daemon desires, and hears what the guest has to say.
//!
//! One thread listens on the control socket, where the VMM brings the console's bytes, and runs a [`session::Session`] for the
//! machine that is connected. Desired rows live here, so a guest that comes back with nothing gets everything again.

#[cfg(test)]
mod changes_tests;
mod desired;
#[cfg(test)]
mod refusal_tests;
mod server;
pub mod session;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod words;

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;
use sluice_contract::message::{Counter, GuestHello, Room};
use sluice_contract::name::Learnt;
use sluice_contract::policy::WouldDeny;
use sluice_contract::report::{Reject, RejectReason};
use sluice_contract::service::ServiceKey;
use sluice_contract::{Generation, Key, LinkId, Row, VERSION};

use self::desired::Desired;
use self::session::Event;

/// Changes in a row whose time until they are in force is measured.
const WAITING: usize = 1024;
/// Lines of the guest kept for the status.
const NOTES: usize = 16;
/// Refused rows that are spelled out in the status, and new ones of one change in the log; the others are counted.
const SPELLED: usize = 64;
const LOGGED: usize = 8;
/// Lines of the guest that are logged in a second; the others are counted.
const LINES_PER_SECOND: u32 = 20;

/// How far the guest is.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ControlStatus {
    /// A VMM is connected to the control socket.
    pub connected: bool,
    /// Everything desired is in force, except the rows in `refused`.
    pub settled: bool,
    /// The generation in force.
    pub generation: u64,
    /// The version of the contract that the guest speaks.
    pub guest_version: Option<u16>,
    /// Build id of its image, in hexadecimal.
    pub image: Option<String>,
    pub ram_mib: Option<u32>,
    /// From the guest's first instruction to its `Hello`.
    pub hello_us: Option<u64>,
    /// Sessions begun since the VMM connected, the first one not counted.
    pub resyncs: u64,
    /// Times that bytes of the guest made no frame.
    pub garbage: u64,
    /// Some of the rows that the guest refused, a sentence each.
    pub refused: Vec<String>,
    /// How many it refused.
    pub refused_rows: usize,
    /// What did not fit into the guest, if so.
    pub full: Option<String>,
    /// Why nothing can be configured, if so.
    pub problem: Option<String>,
    /// Lines of the guest that were dropped because there were too many.
    pub lines_dropped: u64,
    /// The last things the guest said.
    pub notes: VecDeque<String>,
    /// Rows that should be in force.
    pub rows: usize,
    /// How long the last change took from here to the guest's acknowledgement, and the longest since it connected.
    pub last_change_ms: f64,
    pub longest_change_ms: f64,
}

/// Why a change is not in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotInForce {
    #[error("{}", words::sentence(.0))]
    Refused(Reject),
    #[error("The appliance did not answer within {0:?}")]
    Late(Duration),
}

/// What a guest has room for, and in how much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    pub room: Room,
    pub ram_mib: u32,
}

#[derive(Debug, Default)]
struct State {
    desired: Desired,
    status: ControlStatus,
    /// The revision in force.
    revision: u64,
    stats: Option<(u32, Vec<Counter>)>,
    /// The token to be asked for next.
    stats_wanted: Option<u32>,
    names: Option<(u32, Vec<Learnt>)>,
    names_wanted: Option<(u32, Option<LinkId>)>,
    token: u32,
    shut_down: bool,
    stop: bool,
    /// So many parts of what is desired are not known yet; nobody is talked to before all are.
    held: u32,
    /// Changes that are not in force yet, and since when.
    waiting: VecDeque<(u64, Instant)>,
    in_force_at: Option<Instant>,
    /// Refusals of the change under way that were logged, or only counted.
    refusals: usize,
    /// The guest has tables, of this life of the daemon or an earlier one.
    forwards: bool,
    /// The present second of guest lines, and how many there were in it.
    lines: Option<(Instant, u32)>,
    /// Who finds the neighbors that packets wait for.
    finder: Option<mpsc::SyncSender<IpAddr>>,
    /// Who writes down what passed although a rule denies it.
    auditor: Option<mpsc::SyncSender<WouldDeny>>,
    /// Who chooses rows that fit into the guest.
    planner: Option<mpsc::Sender<Measured>>,
}

/// Told whenever it changes whether the guest has tables to forward by.
type Gate = Box<dyn Fn(bool) + Send + Sync>;

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
    gate: Gate,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// The way to the control thread.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

impl Control {
    /// Without a thread yet: rows can be put, so that no guest ever sees a part of them. `gate` is told whether the guest can
    /// forward: not when one comes or goes, and again once it has a generation in force.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn new(gate: impl Fn(bool) + Send + Sync + 'static) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)?;
        let (state, changed) = (Mutex::default(), Condvar::new());
        Ok(Self(Arc::new(Shared {
            state,
            changed,
            wake,
            gate: Box::new(gate),
        })))
    }

    /// Starts the thread on a listening socket. `admits` is asked of the process that connects, by its id.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub fn serve(
        &self,
        listener: UnixListener,
        admits: impl Fn(Option<i32>) -> bool + Send + 'static,
    ) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let server = server::Server::new(listener, Box::new(admits), self.0.clone());
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || server.run())?;
        Ok(())
    }

    /// Tells `finder` of neighbors on the uplink that packets wait for.
    pub fn find_neighbors(&self, finder: mpsc::SyncSender<IpAddr>) {
        self.0.lock().finder = Some(finder);
    }

    /// Tells `auditor` of connections that began although a rule denies them.
    pub fn audit(&self, auditor: mpsc::SyncSender<WouldDeny>) {
        self.0.lock().auditor = Some(auditor);
    }

    /// Tells `planner` what each guest has room for. From now on a guest gets rows only once they are
    /// [planned](Self::planned) for that.
    pub fn plan(&self, planner: mpsc::Sender<Measured>) {
        let mut state = self.0.lock();
        state.desired.await_plan();
        state.planner = Some(planner);
    }

    /// The rows that are desired were chosen for a guest of this room.
    pub fn planned(&self, room: Room) {
        self.0.lock().desired.planned(room);
        self.0.wake();
    }

    /// Puts rows; the number is for [`wait`](Self::wait).
    pub fn put(&self, rows: impl IntoIterator<Item = Row>) -> u64 {
        self.change(rows, [])
    }

    /// Puts and removes rows at once; the number is for [`wait`](Self::wait).
    pub fn change(
        &self,
        put: impl IntoIterator<Item = Row>,
        remove: impl IntoIterator<Item = Key>,
    ) -> u64 {
        let revision = {
            let mut state = self.0.lock();
            let revision = state.desired.change(put, remove);
            if state.waiting.len() < WAITING {
                state.waiting.push_back((revision, Instant::now()));
            }
            revision
        };
        self.0.wake();
        revision
    }

    /// The number of the last change.
    pub fn revision(&self) -> u64 {
        self.0.lock().desired.revision()
    }

    /// Tells no guest anything until [`release`](Self::release): a part of what is desired is not known yet.
    pub fn hold(&self) {
        self.0.lock().held += 1;
    }

    /// Ends one [`hold`](Self::hold).
    pub fn release(&self) {
        let mut state = self.0.lock();
        state.held = state.held.saturating_sub(1);
        if state.held > 0 {
            return;
        }
        // What was desired before waited for something else than the guest.
        let now = Instant::now();
        state.waiting.iter_mut().for_each(|(_, at)| *at = now);
        drop(state);
        self.0.wake();
    }

    /// Removes rows; the number is for [`wait`](Self::wait).
    pub fn remove(&self, keys: impl IntoIterator<Item = Key>) -> u64 {
        self.change([], keys)
    }

    /// Waits until a revision is in force, and `key` was not refused.
    ///
    /// # Errors
    /// Refused, or not in time.
    pub fn wait(&self, revision: u64, key: Key, limit: Duration) -> Result<(), NotInForce> {
        let done = self.0.wait(limit, |state| {
            let refused = state
                .desired
                .refusal(key)
                .map(|reject| Err(NotInForce::Refused(reject)));
            refused.or_else(|| (state.revision >= revision).then_some(Ok(())))
        });
        done.unwrap_or(Err(NotInForce::Late(limit)))
    }

    /// Whether the guest has what was desired as of `revision`.
    pub fn is_in_force(&self, revision: u64) -> bool {
        self.0.lock().revision >= revision
    }

    /// Why the guest does not have the row of `key`, if so.
    pub fn problem_of(&self, key: Key) -> Option<String> {
        let state = self.0.lock();
        if !state.desired.has(key) {
            return Some("It is not configured".into());
        }
        let refusal = state.desired.refusal(key)?;
        Some(words::sentence(&refusal))
    }

    /// How many rows of the node's own are not in force: all but those of pods, Services and policies.
    pub fn refused_of_node(&self) -> usize {
        let is_own = |key: &Key| match key {
            Key::Link(link) => !link.is_pod(),
            Key::Service(key) => matches!(
                key,
                ServiceKey::Nat | ServiceKey::Connections | ServiceKey::Prefix(_)
            ),
            Key::Node | Key::Overlay(_) | Key::Route(_) => true,
            Key::Policy(_) | Key::Bandwidth(_) | Key::Marking(_) | Key::Rates(_) => false,
        };
        let state = self.0.lock();
        let refusals = state.desired.refusals();
        refusals.filter(|(key, _)| is_own(key)).count()
    }

    /// How far the guest is.
    pub fn status(&self) -> ControlStatus {
        let state = self.0.lock();
        ControlStatus {
            rows: state.desired.len(),
            ..state.status.clone()
        }
    }

    /// Whether the appliance has tables to forward by: those that are desired, or those of an earlier life of the daemon.
    pub fn forwards(&self) -> bool {
        let state = self.0.lock();
        state.status.connected && state.forwards
    }

    /// When everything desired was first in force after the VMM last connected.
    pub fn in_force_at(&self) -> Option<Instant> {
        self.0.lock().in_force_at
    }

    /// Nothing is in force, or a change has not been for so long.
    pub fn is_late(&self, patience: Duration) -> bool {
        let state = self.0.lock();
        let oldest = state.waiting.front();
        state.in_force_at.is_none() || oldest.is_some_and(|(_, since)| since.elapsed() > patience)
    }

    /// Asks the guest for its counters.
    pub fn counters(&self, limit: Duration) -> Option<Vec<Counter>> {
        let token = {
            let mut state = self.0.lock();
            state.token = state.token.wrapping_add(1);
            state.stats_wanted = Some(state.token);
            state.token
        };
        self.0.wake();
        self.0.wait(limit, |state| {
            let (_, counters) = state.stats.take_if(|(answered, _)| *answered == token)?;
            Some(counters)
        })
    }

    /// Asks the guest what a pod was told of names, also what is over; or for all pods what holds. Whoever asks next takes the
    /// turn of who waits.
    pub fn names(&self, link: Option<LinkId>, limit: Duration) -> Option<Vec<Learnt>> {
        let token = {
            let mut state = self.0.lock();
            state.token = state.token.wrapping_add(1);
            state.names_wanted = Some((state.token, link));
            state.token
        };
        self.0.wake();
        self.0.wait(limit, |state| {
            let (_, names) = state.names.take_if(|(answered, _)| *answered == token)?;
            Some(names)
        })
    }

    /// Asks the guest to end in order.
    pub fn shut_down_guest(&self) {
        self.0.lock().shut_down = true;
        self.0.wake();
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.0.lock().stop = true;
        self.0.wake();
    }
}

impl Shared {
    /// Has the state changed by `change`, and tells the gate if that changed whether the guest forwards.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let before = state.forwards;
        let result = change(&mut state);
        if state.forwards != before {
            (self.gate)(state.forwards);
        }
        drop(state);
        self.changed.notify_all();
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Only fails when the counter is full, and then the thread is awake.
        let _ = self.wake.write(1);
    }

    /// Waits until `look` finds something, at most `limit`.
    fn wait<T>(&self, limit: Duration, mut look: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    fn learn(&mut self, event: Event) {
        match event {
            Event::Greeted(hello) => self.greeted(&hello),
            Event::VersionRefused { guest } => {
                let text = format!(
                    "The appliance speaks version {guest} of the contract, this node version {VERSION}: \
                     use an image and a sluice-node of the same build"
                );
                tracing::error!("{text}");
                self.status.guest_version = Some(guest);
                self.status.problem = Some(text);
            }
            Event::InForce {
                generation,
                revision,
            } => self.in_force(generation, revision),
            Event::Refused(reject) => {
                self.refusals += 1;
                if self.refusals <= LOGGED {
                    tracing::error!("{}", words::sentence(&reject));
                }
            }
            Event::Rejected(reject) => {
                tracing::error!(?reject, "the appliance refused a whole change");
            }
            Event::Stats { token, counters } => self.stats = Some((token, counters)),
            Event::Names { token, names } => self.names = Some((token, names)),
            Event::Log { .. } | Event::Fault { .. } if !self.admits_line() => {
                self.status.lines_dropped += 1;
            }
            Event::Log { level, text } => {
                let text = presentable(&text);
                tracing::info!(?level, guest = %text, "appliance");
                self.note(format!("{level:?}: {text}"));
            }
            Event::Fault { text } => {
                let text = presentable(&text);
                tracing::error!(guest = %text, "appliance is about to end");
                self.note(format!("fault: {text}"));
            }
            Event::Unresolved(address) => {
                // Without a finder, or when it is busy, the packet's sender tries again.
                let _ = self.finder.as_ref().map(|finder| finder.try_send(address));
            }
            Event::WouldDeny(event) => {
                // When it is busy, the counter still has it.
                let _ = self.auditor.as_ref().map(|to| to.try_send(event));
            }
            Event::Restarted { why } => {
                tracing::warn!(why, "control session begins anew");
                self.status.resyncs += 1;
                self.status.settled = false;
            }
        }
    }

    /// The guest is not trusted to be brief.
    fn admits_line(&mut self) -> bool {
        let now = Instant::now();
        let (since, count) = self.lines.get_or_insert((now, 0));
        if now.duration_since(*since) >= Duration::from_secs(1) {
            (*since, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        *count <= LINES_PER_SECOND
    }

    fn greeted(&mut self, hello: &GuestHello) {
        tracing::info!(
            generation = hello.generation.0,
            uptime_us = hello.uptime_us,
            "appliance greeted"
        );
        let status = &mut self.status;
        status.guest_version = Some(hello.version);
        status.image = Some(hello.image.iter().map(|b| format!("{b:02x}")).collect());
        status.ram_mib = Some(hello.ram_mib);
        status.hello_us = Some(hello.uptime_us);
        status.generation = hello.generation.0;
        status.problem = None;
        let measured = Measured {
            room: hello.room,
            ram_mib: hello.ram_mib,
        };
        // Without a planner every row is sent.
        let _ = self.planner.as_ref().map(|to| to.send(measured));
        self.forwards = hello.generation != Generation::default();
    }

    fn in_force(&mut self, generation: Generation, revision: u64) {
        tracing::info!(generation = generation.0, revision, "generation in force");
        self.revision = revision;
        self.status.generation = generation.0;
        self.learn_refusals();
        let mut since = None;
        while let Some((_, at)) = self.waiting.pop_front_if(|(number, _)| *number <= revision) {
            since.get_or_insert(at);
        }
        if let Some(since) = since {
            let took = since.elapsed().as_secs_f64() * 1e3;
            self.status.last_change_ms = took;
            self.status.longest_change_ms = self.status.longest_change_ms.max(took);
        }
        self.in_force_at.get_or_insert_with(Instant::now);
        self.forwards = true;
    }

    fn learn_refusals(&mut self) {
        if let Some(more @ 1..) = self.refusals.checked_sub(LOGGED) {
            tracing::error!(more, "further rows are not in force");
        }
        self.refusals = 0;
        let refusals = || self.desired.refusals().map(|(_, reject)| reject);
        let is_full = |it: &Reject| matches!(it.reason, RejectReason::Full(_));
        let status = &mut self.status;
        status.refused_rows = refusals().len();
        let spelled = refusals().take(SPELLED);
        status.refused = spelled.map(|it| words::sentence(&it)).collect();
        let unfit = refusals().filter(is_full).count();
        status.full = (unfit > 0).then(|| {
            format!(
                "{unfit} rows do not fit into the appliance and are left out; what policy needs of them is denied. \
                 Raise memory_mib, or delete what is not needed"
            )
        });
    }

    fn note(&mut self, text: String) {
        if self.status.notes.len() == NOTES {
            self.status.notes.pop_front();
        }
        self.status.notes.push_back(text);
    }

    fn disconnected(&mut self) {
        let notes = std::mem::take(&mut self.status.notes);
        self.status = ControlStatus {
            notes,
            ..ControlStatus::default()
        };
        self.waiting.clear();
        // A guest that comes back may have nothing.
        self.revision = 0;
        self.in_force_at = None;
        self.forwards = false;
    }
}

/// What a guest says, as it may reach a terminal: without characters that drive one.
fn presentable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// A number that differs between lives of the daemon.
fn seed() -> u64 {
    let time = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    (time.as_nanos() as u64) ^ u64::from(std::process::id()) << 40
}
