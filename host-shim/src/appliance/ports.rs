//! The ports that the appliance's process serves, and the one connection to it.
//!
//! The daemon keeps a descriptor of its own of every port. An interface keeps its carrier when the process ends, and the next
//! process is given all of them again. Without a process a port is only kept: adding one does not wait.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use sluice_contract::LinkId;
use sluice_ports::client::{ClientError, Connection};
use sluice_ports::message::{Identity, PortCounters, PortKind, Refusal, Status};

/// For how long frames wait in the ports for a guest to be configured.
const HELD: Duration = Duration::from_secs(2);

/// Why a port is not served.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    #[error(transparent)]
    Process(#[from] ClientError),
    #[error("Its descriptor cannot be copied")]
    Copy(#[source] io::Error),
    #[error("Another daemon has taken over the appliance")]
    TakenOver,
}

#[derive(Debug)]
struct Port {
    kind: PortKind,
    descriptor: OwnedFd,
}

/// The process at the other end.
#[derive(Debug)]
struct Process {
    connection: Connection,
    identity: Identity,
    served: BTreeSet<u16>,
}

#[derive(Debug, Default)]
struct State {
    process: Option<Process>,
    kept: BTreeMap<u16, Port>,
    /// What the process of an earlier life served and this life has not asked for yet.
    found: BTreeMap<u16, Port>,
    /// The process has forwarded: nothing is held back from it any more.
    forwards: bool,
    taken_over: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Whether the guest can forward, if that has changed and the process does not know it yet. By itself: it changes while others
    /// wait for the process.
    gate: Mutex<Option<bool>>,
    wake: EventFd,
}

/// The ports. All copies are of the same.
#[derive(Clone, Debug)]
pub struct Ports(Arc<Shared>);

impl Ports {
    /// None yet, and no process.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(Shared {
            state: Mutex::default(),
            gate: Mutex::default(),
            wake: EventFd::from_value_and_flags(0, flags)?,
        })))
    }

    /// Serves a port from now on: by the process that runs, and by every one after it.
    ///
    /// # Errors
    /// When the process refuses it; it is not kept then.
    pub fn add(&self, id: LinkId, kind: PortKind, descriptor: OwnedFd) -> Result<(), PortError> {
        let id = id.raw();
        let mut state = self.usable()?;
        // The same tap that the process has: what is found is only ever put back.
        let found = state.found.remove(&id).is_some();
        let has = state
            .process
            .as_ref()
            .is_some_and(|it| it.served.contains(&id));
        if !(found && has && kind == PortKind::Tap) {
            let added = self.ask(&mut state, |process| {
                process.connection.add_port(id, kind, descriptor.as_fd())?;
                process.served.insert(id);
                Ok(())
            });
            match added {
                // The next process gets it.
                None | Some(Err(ClientError::Broken(_))) => {}
                Some(outcome) => outcome?,
            }
        }
        state.kept.insert(id, Port { kind, descriptor });
        Ok(())
    }

    /// Serves a port no more. One that is not served is as good.
    ///
    /// # Errors
    /// When the process did not answer in time: it may still carry it out.
    pub fn remove(&self, id: LinkId) -> Result<(), PortError> {
        let mut state = self.usable()?;
        state.kept.remove(&id.raw());
        state.found.remove(&id.raw());
        Ok(self.withdraw(&mut state, id.raw())?)
    }

    fn withdraw(&self, state: &mut State, id: u16) -> Result<(), ClientError> {
        let removed = self.ask(state, |process| match process.served.remove(&id) {
            true => process.connection.remove_port(id),
            false => Ok(()),
        });
        match removed {
            Some(Err(ClientError::Broken(_) | ClientError::Refused(Refusal::NoSuchPort))) => Ok(()),
            other => other.unwrap_or(Ok(())),
        }
    }

    /// The tap of a port that an earlier life of the daemon added and a process had: it is attached already, and cannot be a
    /// second time.
    ///
    /// # Errors
    /// When this process is out of descriptors.
    pub fn found(&self, id: LinkId) -> Result<Option<File>, PortError> {
        let state = self.usable()?;
        let tap = state
            .found
            .get(&id.raw())
            .filter(|it| it.kind == PortKind::Tap);
        let copy = tap.map(|it| it.descriptor.try_clone()).transpose();
        Ok(copy.map_err(PortError::Copy)?.map(File::from))
    }

    /// Ends the service of whatever was found and this life has not asked for.
    pub fn forget_found(&self) {
        let Ok(mut state) = self.usable() else {
            return;
        };
        for id in std::mem::take(&mut state.found).into_keys() {
            tracing::info!(id, "a port of an earlier life is served no more");
            if let Err(error) = self.withdraw(&mut state, id) {
                tracing::warn!(id, %error, "a port of an earlier life is still served");
            }
        }
    }

    /// The guest can forward, or cannot. The supervisor's thread passes it on.
    pub fn gate(&self, forwards: bool) {
        *self.gate_lock() = Some(forwards);
        self.wake();
    }

    /// How the process is; absent when there is none that answers.
    pub fn status(&self) -> Option<Status> {
        let mut state = self.lock();
        self.ask(&mut state, |it| it.connection.status())?.ok()
    }

    /// Whether both rings of the guest are served.
    pub fn are_served(&self) -> bool {
        self.status().is_some_and(|status| status.serving)
    }

    /// Which process it is.
    pub fn identity(&self) -> Option<Identity> {
        Some(self.lock().process.as_ref()?.identity.clone())
    }

    /// The counters of all ports by id; none when there is no process that answers.
    pub fn counters(&self) -> BTreeMap<u16, PortCounters> {
        let mut state = self.lock();
        let counters = self.ask(&mut state, |it| it.connection.counters());
        let rows = counters.and_then(Result::ok).unwrap_or_default();
        rows.into_iter().map(|row| (row.id, row)).collect()
    }

    /// Readable when there is something to [settle](Self::settle) or a process to connect to.
    pub(crate) fn woken(&self) -> &EventFd {
        &self.0.wake
    }

    pub(crate) fn wake(&self) {
        // Only fails when the counter is full, and then its reader is awake.
        let _ = self.0.wake.write(1);
    }

    /// Whether a process serves them.
    pub(crate) fn is_connected(&self) -> bool {
        self.lock().process.is_some()
    }

    /// Keeps the ports of a process of an earlier life until they are wanted or forgotten. Their interfaces keep their carrier
    /// even if that process is of no use.
    ///
    /// # Errors
    /// When the process does not answer.
    pub(crate) fn find(&self, connection: &mut Connection) -> Result<(), ClientError> {
        let mut found = BTreeMap::new();
        for row in connection.counters()? {
            let (kind, descriptor) = connection.descriptor(row.id)?;
            found.insert(row.id, Port { kind, descriptor });
        }
        self.lock().found = found;
        Ok(())
    }

    /// A process of an earlier life goes on. If it forwards, nothing is held back from it.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) fn adopt(
        &self,
        mut connection: Connection,
        identity: Identity,
    ) -> Result<(), ClientError> {
        let status = connection.status()?;
        let served = connection.counters()?.iter().map(|row| row.id).collect();
        let mut state = self.lock();
        state.forwards = !status.held;
        state.process = Some(Process {
            connection,
            identity,
            served,
        });
        Ok(())
    }

    /// Another process, or the same one by another connection: what it lacks of the ports is added, what it has and is not
    /// wanted goes. A new one begins held.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) fn connect(
        &self,
        mut connection: Connection,
        identity: Identity,
        is_new: bool,
    ) -> Result<(), ClientError> {
        if is_new {
            connection.hold(Some(HELD))?;
        }
        let mut served: BTreeSet<u16> = connection.counters()?.iter().map(|it| it.id).collect();
        let mut state = self.lock();
        let is_known = |id: &u16| state.kept.contains_key(id) || state.found.contains_key(id);
        for id in served.clone().into_iter().filter(|id| !is_known(id)) {
            connection.remove_port(id)?;
            served.remove(&id);
        }
        for (id, port) in &state.kept {
            // A socket may be another than the one that is served.
            if served.contains(id) && port.kind == PortKind::Tap {
                continue;
            }
            match connection.add_port(*id, port.kind, port.descriptor.as_fd()) {
                Ok(()) => drop(served.insert(*id)),
                Err(error @ ClientError::Broken(_)) => return Err(error),
                // Its interface was removed, say. The others are served all the same.
                Err(error) => tracing::error!(id, %error, "the appliance does not serve a port"),
            }
        }
        state.process = Some(Process {
            connection,
            identity,
            served,
        });
        drop(state);
        // What was said of the guest while there was no connection.
        self.settle();
        Ok(())
    }

    /// Tells the process whether the guest can forward, if that has changed.
    pub(crate) fn settle(&self) {
        let mut state = self.lock();
        if state.process.is_none() {
            return;
        }
        let Some(forwards) = self.gate_lock().take() else {
            return;
        };
        let limit = match forwards {
            true => None,
            // A guest whose channel begins anew still has its tables.
            false if state.forwards => return,
            false => Some(HELD),
        };
        state.forwards |= forwards;
        match self.ask(&mut state, |it| it.connection.hold(limit)) {
            // For the next connection, unless it has changed since.
            Some(Err(ClientError::Broken(_))) => {
                self.gate_lock().get_or_insert(forwards);
            }
            Some(Err(error)) => {
                tracing::error!(%error, forwards, "frames are neither held back nor released");
            }
            _ => {}
        }
    }

    /// The connection has ended; the process may be there still.
    pub(crate) fn disconnected(&self) {
        self.lock().process = None;
    }

    /// The process has ended, and what was said of its guest with it.
    pub(crate) fn ended(&self) {
        let mut state = self.lock();
        state.process = None;
        state.forwards = false;
        *self.gate_lock() = None;
    }

    /// Another daemon has the process now: from here on nothing is changed.
    pub(crate) fn taken_over(&self) {
        let mut state = self.lock();
        state.process = None;
        state.taken_over = true;
    }

    /// Asks the process to end in order.
    pub(crate) fn quit(&self) {
        let mut state = self.lock();
        if let Some(Err(error)) = self.ask(&mut state, |it| it.connection.quit()) {
            tracing::warn!(%error, "the appliance's process was not asked to end");
        }
        state.process = None;
    }

    /// Lets go of all descriptors: an interface that is not persistent goes.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.kept.clear();
        state.found.clear();
    }

    fn ask<T>(
        &self,
        state: &mut State,
        ask: impl FnOnce(&mut Process) -> Result<T, ClientError>,
    ) -> Option<Result<T, ClientError>> {
        let answer = ask(state.process.as_mut()?);
        if let Err(ClientError::Broken(error)) = &answer {
            tracing::warn!(%error, "the connection to the appliance's process is lost");
            state.process = None;
            self.wake();
        }
        Some(answer)
    }

    fn usable(&self) -> Result<MutexGuard<'_, State>, PortError> {
        let state = self.lock();
        match state.taken_over {
            true => Err(PortError::TakenOver),
            false => Ok(state),
        }
    }

    fn gate_lock(&self) -> MutexGuard<'_, Option<bool>> {
        self.0.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::appliance::testing::Fake;

    /// Only root is served by a process of an appliance.
    fn fake(name: &str) -> Option<Fake> {
        let dir = std::env::temp_dir();
        let path = dir.join(format!("sluice-ports-{name}-{}", std::process::id()));
        nix::unistd::geteuid().is_root().then(|| Fake::at(&path))
    }

    fn open(fake: &Fake) -> (Connection, Identity) {
        Connection::open(&fake.path, "test", true).unwrap()
    }

    fn some() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    const UPLINK: LinkId = LinkId::UPLINK;
    const PROBES: LinkId = LinkId::PROBES;

    #[test]
    fn ports_wait_for_a_process_and_a_new_one_begins_held() {
        let ports = Ports::new().unwrap();
        ports.add(UPLINK, PortKind::Tap, some()).unwrap();
        assert!(ports.status().is_none() && ports.counters().is_empty());
        let Some(first) = fake("first") else { return };
        let (connection, identity) = open(&first);
        ports.connect(connection, identity, true).unwrap();
        assert_eq!(first.asked(), ["hold", "add 1 Tap"]);
        ports.gate(true);
        ports.settle();
        assert_eq!(first.asked(), ["release"]);
        // Its channel begins anew, and it forwards all the same.
        ports.gate(false);
        ports.settle();
        assert_eq!(first.asked(), [""; 0]);

        // The next process is given everything again, and is not taken for one that forwards.
        drop(first);
        ports.ended();
        ports.add(PROBES, PortKind::Socket, some()).unwrap();
        ports.remove(LinkId::HOST).unwrap();
        let next = fake("next").unwrap();
        let (connection, identity) = open(&next);
        ports.connect(connection, identity, true).unwrap();
        assert_eq!(next.asked(), ["hold", "add 1 Tap", "add 3 Socket"]);
        ports.gate(false);
        ports.settle();
        assert_eq!(next.asked(), ["hold"]);
        ports.remove(UPLINK).unwrap();
        assert_eq!(next.asked(), ["remove 1"]);
        assert_eq!(ports.counters().into_keys().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn what_an_earlier_life_added_is_taken_back_and_the_rest_goes() {
        let Some(fake) = fake("found") else { return };
        let earlier = Ports::new().unwrap();
        let (connection, identity) = open(&fake);
        earlier.connect(connection, identity, true).unwrap();
        let pods = [16, 17].map(|id| LinkId::new(id).unwrap());
        for id in [UPLINK, pods[0], pods[1]] {
            earlier.add(id, PortKind::Tap, some()).unwrap();
        }
        earlier.add(PROBES, PortKind::Socket, some()).unwrap();
        earlier.gate(true);
        earlier.settle();
        drop(earlier);
        fake.asked();

        let ports = Ports::new().unwrap();
        let (mut connection, identity) = open(&fake);
        ports.find(&mut connection).unwrap();
        ports.adopt(connection, identity).unwrap();
        // It forwards: a channel that begins anew holds nothing back.
        ports.gate(false);
        ports.settle();
        for id in [UPLINK, pods[0]] {
            let tap = ports.found(id).unwrap().unwrap();
            ports.add(id, PortKind::Tap, tap.into()).unwrap();
        }
        assert!(ports.found(LinkId::HOST).unwrap().is_none());
        assert!(ports.found(PROBES).unwrap().is_none(), "it is no tap");
        assert_eq!(fake.asked(), [""; 0]);
        // A socket is another in each life.
        ports.add(PROBES, PortKind::Socket, some()).unwrap();
        ports.forget_found();
        assert_eq!(fake.asked(), ["add 3 Socket", "remove 17"]);
    }

    #[test]
    fn a_connection_that_is_lost_is_made_good_without_touching_what_is_served() {
        let Some(fake) = fake("lost") else { return };
        let ports = Ports::new().unwrap();
        let (connection, identity) = open(&fake);
        ports.connect(connection, identity, true).unwrap();
        ports.add(UPLINK, PortKind::Tap, some()).unwrap();
        ports.add(LinkId::HOST, PortKind::Tap, some()).unwrap();
        fake.asked();
        // Another connection takes the place: the next question finds it gone.
        let (other, identity) = open(&fake);
        assert!(ports.status().is_none() && !ports.is_connected());
        ports.remove(LinkId::HOST).unwrap();
        ports.gate(true);
        ports.connect(other, identity, false).unwrap();
        assert_eq!(fake.asked(), ["remove 2", "release"]);
        assert!(ports.status().is_some_and(|status| status.ports == 1));

        ports.taken_over();
        let refused = ports.add(PROBES, PortKind::Socket, some()).unwrap_err();
        assert!(matches!(refused, PortError::TakenOver));
        assert!(ports.remove(UPLINK).is_err());
        ports.forget_found();
        assert_eq!(fake.asked(), [""; 0]);
    }
}
