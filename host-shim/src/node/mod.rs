//! The node: ports, control channel, supervisor and links put together, started and stopped as a whole.
//!
//! Order matters at the start. The appliance of an earlier life is found first, because it has the taps; the rows are complete
//! before the control channel speaks, so that no running guest ever hears of fewer pods than there are. The daemon itself moves
//! no frame.

mod bandwidth;
pub mod links;
pub(crate) mod ports;
pub mod readiness;
pub mod report;
mod self_test;
mod ways;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use sluice_cni::gate::Gate;
use sluice_cni::verbs::Counters;
use sluice_contract::policy::PolicyKey;
use sluice_contract::row::NodeRow;
use sluice_contract::{Key, LinkId, Row};
use sluice_model::object::Name;
use sluice_model::object::rates::Rates;
use sluice_model::taint::Observer;
use sluice_ports::message::PortKind;
use sluice_ports::offloads::Offloads;
use sluice_ports::tap;

use self::links::{Link, LinkError, LinkTable, SavedLink};
use self::ways::Ways;
use crate::appliance::ports::{PortError, Ports};
use crate::cluster::{Cluster, pod_name};
use crate::config::{Config, ConfigError, OnStop, PodConfig};
use crate::control::{Control, NotInForce};
use crate::files;
use crate::hostlink::HostLinkError;
use crate::supervisor::command::Sockets;
use crate::supervisor::{self, Supervisor, SupervisorError, Usurped};
use crate::uplink::UplinkError;
use crate::wiring::WiringError;

/// How long a new link may take to be in force before it is taken back.
const IN_FORCE: Duration = Duration::from_secs(5);
/// How long the cluster's source may take to tell of a new pod. With the wait for the appliance it stays below what a
/// runtime allows an ADD.
const KNOWN: Duration = Duration::from_secs(4);
/// How long a removed link may take to be out of force before its tap goes anyway.
const OUT_OF_FORCE: Duration = Duration::from_secs(1);

/// How long the daemon whose place is taken may need to end.
const GIVING_WAY: Duration = Duration::from_secs(10);

/// Links that are wired at once: one holds the kernel's lock, one does what needs none.
const WIRING: usize = 2;

/// What a node cannot do.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("Cannot {step}")]
    Start { step: String, source: io::Error },
    #[error("Another sluice-node uses {0}: end it, or start this one with --take-over")]
    Taken(PathBuf),
    #[error("Pod {name}")]
    Pod {
        name: String,
        source: Box<NodeError>,
    },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    #[error(transparent)]
    HostLink(#[from] HostLinkError),
    #[error(transparent)]
    Wiring(#[from] WiringError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    NotInForce(#[from] NotInForce),
    #[error("The cluster's source has not said what the pod {0} is, so its policy is not known")]
    NotKnown(String),
    #[error("The appliance serves no port")]
    Port(#[from] PortError),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
}

fn cannot<S: Into<String>>(step: S) -> impl FnOnce(io::Error) -> NodeError {
    let step = step.into();
    move |source| NodeError::Start { step, source }
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    config: Config,
    ports: Ports,
    control: Control,
    cluster: Option<Cluster>,
    supervisor: Supervisor,
    links: Mutex<LinkTable>,
    ways: Mutex<Ways>,
    /// What this kernel's taps can do.
    taps: Offloads,
    /// Another daemon has the appliance now, and with it everything that is left.
    gave_way: Arc<AtomicBool>,
    /// The kernel makes interfaces one at a time. Who waits for that here is woken once, not for each of twenty requests.
    wiring: Gate,
    started: Instant,
    /// What the plugin's calls came to, once it is served.
    cni: OnceLock<Arc<Counters>>,
    /// How the taint of the Node object is, once it is looked after.
    taint: OnceLock<Observer>,
    /// Held for as long as the daemon lives: one per run directory.
    _lock: Flock<File>,
}

impl Node {
    /// Brings a node up: everything of an earlier life that is still whole, and the configured pods.
    ///
    /// # Errors
    /// The step that failed; what this life made is removed then, unless the configuration says to leave it.
    pub fn start(config: Config, place: Place) -> Result<Self, NodeError> {
        let Place { take_over, usurped } = place;
        // The other daemon sees its connection closed, ends, and gives the run directory up.
        let line = take_over.then(|| supervisor::take_over(&config)).flatten();
        let patience = if take_over {
            GIVING_WAY
        } else {
            Duration::ZERO
        };
        let lock = claim(&config.run_dir, patience)?;
        let sockets = Sockets::in_dir(&config.run_dir);
        let (table, saved) = LinkTable::load(&config.run_dir)?;
        let taps = tap::probe().map_err(cannot("make a tap"))?;
        let ports = Ports::new().map_err(cannot("look after ports"))?;
        let gate = {
            let ports = ports.clone();
            move |forwards| ports.gate(forwards)
        };
        let control = Control::new(gate).map_err(cannot("start the control channel"))?;
        let gave_way = Arc::new(AtomicBool::new(false));
        let give_way = {
            let gave_way = gave_way.clone();
            move || {
                gave_way.store(true, Ordering::Release);
                usurped();
            }
        };
        let supervisor = Supervisor::start(&config, &ports, taps, (line, Box::new(give_way)))?;
        let stop = |error| {
            supervisor.stop(config.on_stop == OnStop::TearDown);
            error
        };
        let channel = listen(&sockets.control).map_err(&stop)?;
        let cluster = Cluster::start(&config, &control)
            .map_err(cannot("follow the cluster"))
            .map_err(&stop)?;
        let node = Self {
            config,
            ports,
            control,
            cluster,
            supervisor,
            links: Mutex::new(table),
            ways: Mutex::default(),
            taps,
            gave_way,
            wiring: Gate::new(WIRING),
            started: Instant::now(),
            cni: OnceLock::new(),
            taint: OnceLock::new(),
            _lock: lock,
        };
        let linked = node
            .restore(saved)
            // What the uplink is like decides the MTU of pods.
            .and_then(|()| node.link_ways())
            .and_then(|()| node.link_configured());
        node.ports.forget_found();
        let served = linked.and_then(|()| {
            let admission = node.supervisor.admission();
            node.control
                .serve(channel, move |pid| admission.admits(pid))
                .map_err(cannot("serve the control channel"))
        });
        if let Err(error) = served {
            node.stop();
            return Err(error);
        }
        Ok(node)
    }

    /// What was asked of it.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Has reports show the calls of the plugin.
    pub(crate) fn count_cni(&self, counters: Arc<Counters>) {
        // There is one server of the plugin in a node's life.
        let _first = self.cni.set(counters);
    }

    /// Whether its end is the end of its links.
    fn tears_down(&self) -> bool {
        self.config.on_stop == OnStop::TearDown && !self.gave_way.load(Ordering::Acquire)
    }

    /// The cluster, if it follows one.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// Ends the node, leaving behind what the configuration says.
    pub fn stop(&self) {
        let tear_down = self.tears_down();
        if let Some(cluster) = &self.cluster {
            cluster.stop();
        }
        self.control.stop();
        self.supervisor.stop(tear_down);
        if tear_down {
            let links: Vec<_> = self.links().all().cloned().collect();
            for link in links {
                if let Err(error) = self.dismantle(&link) {
                    tracing::error!(pod = %link.saved.pod.name, %error, "link not removed");
                }
            }
            self.links().remove_file();
            if let Some(cluster) = &self.cluster {
                cluster.remove_file();
            }
        }
        self.stop_ways();
        self.ports.close();
        let sockets = Sockets::in_dir(&self.config.run_dir);
        files::remove(&sockets.control);
        if tear_down {
            files::remove(&sockets.trunk);
            // Whoever opened it before now and locks it afterwards holds a file that has no name; the sockets it then
            // binds are its own all the same.
            files::remove(&self.config.run_dir.join("node.lock"));
        }
        tracing::info!(tear_down, "node stopped");
    }

    fn links(&self) -> MutexGuard<'_, LinkTable> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the links of an earlier life: attaches to what is whole, removes the rest.
    fn restore(&self, saved: Vec<SavedLink>) -> Result<(), NodeError> {
        for saved in saved {
            let configured = self.config.pods.contains(&saved.pod);
            let wanted = configured || !saved.from_config;
            let link = self.links().keep(saved)?;
            let spec = link.saved.spec();
            let found = self.ports.found(link.saved.id)?;
            let attached = if wanted {
                spec.attach(found)
            } else {
                not_wanted(&link)
            };
            match attached {
                Ok(tap) => {
                    self.serve(&link, tap)?;
                    tracing::info!(pod = %link.saved.pod.name, id = %link.saved.id, "link attached again");
                }
                Err(error) => {
                    tracing::warn!(pod = %link.saved.pod.name, %error, "link is not taken over");
                    self.dismantle(&link)?;
                }
            }
        }
        Ok(())
    }

    fn link_configured(&self) -> Result<(), NodeError> {
        for pod in &self.config.pods {
            if self.links().named(&pod.name).is_ok() {
                continue;
            }
            let made = self.make(pod.clone(), true);
            made.map_err(|e| NodeError::Pod {
                name: pod.name.clone(),
                source: Box::new(e),
            })?;
        }
        let mut rows = vec![Row::Node(NodeRow::default())];
        if self.cluster.is_none() {
            let snat = self
                .config
                .uplink
                .as_ref()
                .map(|uplink| uplink.snat_ports());
            rows.extend(ports::node_rows(&self.config.cni.node_addresses, snat));
        }
        self.control.put(rows);
        let links: Vec<Link> = self.links().all().cloned().collect();
        for link in &links {
            self.put_link(link);
        }
        self.host_ports_changed();
        Ok(())
    }

    /// Desires a link with what belongs to it; the number is for [`Control::wait`].
    fn put_link(&self, link: &Link) -> u64 {
        let saved = &link.saved;
        match &self.cluster {
            Some(cluster) => cluster.attach(saved.pod_name(), saved.row(), saved.own_rows()),
            None => self.put_rows(link),
        }
    }

    /// The same, whatever policy says.
    fn put_rows(&self, link: &Link) -> u64 {
        let rates = self.config.pod_rates.row(link.saved.id, &Rates::default());
        let rows = link
            .saved
            .own_rows()
            .into_iter()
            .chain(rates.map(Row::Rates));
        self.control.put(rows.chain([Row::Link(link.saved.row())]))
    }

    /// Links a pod; returns when the appliance has it in force.
    ///
    /// # Errors
    /// Why not; nothing of the link is left then.
    pub fn add_link(&self, pod: PodConfig) -> Result<Link, NodeError> {
        pod.check()?;
        self.await_pod(&pod_name(pod.pod.as_ref().unwrap_or(&pod.name)))?;
        self.link_pod(pod, self.cluster.is_some())
    }

    /// Waits until the cluster, if there is one, has said all that concerns a pod.
    ///
    /// # Errors
    /// When it does not in time.
    pub(crate) fn await_pod(&self, pod: &Name) -> Result<(), NodeError> {
        match &self.cluster {
            Some(cluster) if !cluster.await_pod(pod, KNOWN) => {
                Err(NodeError::NotKnown(pod.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// Links a pod that policy has (`judged`) or has not something to say about.
    fn link_pod(&self, pod: PodConfig, judged: bool) -> Result<Link, NodeError> {
        let link = self.make(pod, false)?;
        let revision = if judged {
            self.put_link(&link)
        } else {
            self.put_rows(&link)
        };
        let mut keys = vec![Key::Link(link.saved.id)];
        keys.extend(link.saved.own_rows().iter().map(Row::key));
        if judged {
            keys.push(Key::Policy(PolicyKey::Binding(link.saved.id)));
        }
        let in_force = keys
            .iter()
            .try_for_each(|key| self.control.wait(revision, *key, IN_FORCE));
        if let Err(error) = in_force {
            self.withdraw(&link)?;
            return Err(error.into());
        }
        if !link.saved.pod.host_ports.is_empty() {
            self.host_ports_changed();
        }
        Ok(link)
    }

    /// The link of a pod.
    ///
    /// # Errors
    /// When there is none.
    pub fn link(&self, name: &str) -> Result<Link, NodeError> {
        Ok(self.links().named(name)?)
    }

    /// Removes the link of a pod.
    ///
    /// # Errors
    /// When there is none, or something of it could not be removed.
    pub fn remove_link(&self, name: &str) -> Result<Link, NodeError> {
        let link = self.links().named(name)?;
        self.withdraw(&link)?;
        if !link.saved.pod.host_ports.is_empty() {
            self.host_ports_changed();
        }
        Ok(link)
    }

    /// The appliance forgets it first: no frame meets a link that is half there.
    fn withdraw(&self, link: &Link) -> Result<(), NodeError> {
        let key = Key::Link(link.saved.id);
        let mut own: Vec<Key> = link.saved.own_rows().iter().map(Row::key).collect();
        own.push(Key::Rates(link.saved.id));
        let revision = match &self.cluster {
            Some(cluster) => cluster.detach(link.saved.id, own),
            None => self.control.remove(own.into_iter().chain([key])),
        };
        // Without a guest there is nobody to forget it; a guest that comes is not told of it.
        let is_there = self.control.status().connected;
        if is_there && self.control.wait(revision, key, OUT_OF_FORCE).is_err() {
            tracing::warn!(id = %link.saved.id, "link removed without the appliance's acknowledgement");
        }
        self.dismantle(link)
    }

    fn make(&self, pod: PodConfig, from_config: bool) -> Result<Link, NodeError> {
        let defaults = (self.config.wiring, self.pod_mtu());
        let link = self.links().plan(pod, defaults, from_config)?;
        let made = {
            let _inside = Gate::enter(&self.wiring);
            link.saved.spec().create().map_err(NodeError::from)
        };
        let served = made.and_then(|tap| self.serve(&link, tap));
        if let Err(error) = served {
            self.dismantle(&link)?;
            return Err(error);
        }
        tracing::info!(pod = %link.saved.pod.name, id = %link.saved.id, mode = ?link.saved.wiring, "pod linked");
        Ok(link)
    }

    fn serve(&self, link: &Link, tap: File) -> Result<(), NodeError> {
        self.add_tap(link.saved.id, tap)
    }

    fn add_tap(&self, id: LinkId, tap: File) -> Result<(), NodeError> {
        Ok(self.ports.add(id, PortKind::Tap, tap.into())?)
    }

    /// Has the appliance's process forget a link's tap, removes its interfaces and forgets it.
    fn dismantle(&self, link: &Link) -> Result<(), NodeError> {
        let id = link.saved.id;
        match self.ports.remove(id) {
            // Everything is the other daemon's.
            Err(error @ PortError::TakenOver) => return Err(error.into()),
            // It may still be carried out; the interface goes in any case.
            Err(error) => tracing::error!(%id, %error, "it is not confirmed that a port is gone"),
            Ok(()) => {}
        }
        // What cannot be removed stays written down, for the next life to try.
        link.saved.spec().remove()?;
        self.links().forget(id)?;
        Ok(())
    }
}

fn not_wanted(link: &Link) -> Result<File, WiringError> {
    let source = io::Error::new(
        io::ErrorKind::NotFound,
        "the configuration no longer has it",
    );
    Err(WiringError {
        link: link.saved.id,
        step: "keep the link",
        source,
    })
}

/// How a node comes to its place.
pub struct Place {
    /// It takes the appliance from a daemon that runs.
    pub take_over: bool,
    /// Called when another daemon takes it from this one: the node is to be [stopped](Node::stop) then, and leaves everything.
    pub usurped: Usurped,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Place");
        shown
            .field("take_over", &self.take_over)
            .finish_non_exhaustive()
    }
}

/// Makes the run directory ours alone; waits so long for a daemon that gives it up.
fn claim(run_dir: &Path, patience: Duration) -> Result<Flock<File>, NodeError> {
    let step = || cannot(format!("use the run directory {}", run_dir.display()));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run_dir)
        .and_then(|()| own(run_dir))
        .map_err(step())?;
    let path = run_dir.join("node.lock");
    let deadline = Instant::now() + patience;
    loop {
        // Opened anew each time: a daemon that ends may remove it.
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path);
        match Flock::lock(file.map_err(step())?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, nix::errno::Errno::EAGAIN)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err((_, nix::errno::Errno::EAGAIN)) => return Err(NodeError::Taken(run_dir.into())),
            Err((_, error)) => return Err(step()(error.into())),
        }
    }
}

/// Makes sure that a directory is ours, whoever made it, and that others neither read it nor put anything into it.
fn own(dir: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(dir)?;
    let own = nix::unistd::geteuid().as_raw();
    let refuse = |reason| Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    if !found.is_dir() {
        return refuse("it is a link or a file: name a directory as run_dir".to_owned());
    }
    if found.uid() != own {
        return refuse(format!(
            "it belongs to user {}, not to {own}: remove it or name another run_dir",
            found.uid()
        ));
    }
    if found.mode() & 0o022 != 0 {
        return refuse("others may write into it: take that right away".to_owned());
    }
    // One that an earlier version made. A directory that was made for something else too keeps its mode.
    if found.mode() & 0o077 != 0 && dir.join("node.lock").exists() {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Listens on a socket that only root may use. One left by an earlier life is replaced: the lock says that nobody serves it.
///
/// # Errors
/// As the file system says.
pub fn listen(path: &Path) -> Result<UnixListener, NodeError> {
    let step = || cannot(format!("listen on {}", path.display()));
    files::remove(path);
    let listener = UnixListener::bind(path).map_err(step())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(step())?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_directory_is_ours_alone_or_refused() {
        let base = std::env::temp_dir().join(format!("sluice-own-{}", std::process::id()));
        let dir = base.join("run");
        let mode = || fs::metadata(&dir).unwrap().mode() & 0o777;
        drop(claim(&dir, Duration::ZERO).unwrap());
        assert_eq!(mode(), 0o700);
        // As an earlier version left it.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        drop(claim(&dir, Duration::ZERO).unwrap());
        assert_eq!(mode(), 0o700);
        let listener = listen(&dir.join("s.sock")).unwrap();
        let socket = fs::metadata(dir.join("s.sock")).unwrap();
        assert_eq!(socket.mode() & 0o777, 0o600);
        drop(listener);
        let shared = base.join("shared");
        fs::create_dir(&shared).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).unwrap();
        let refused = own(&shared).unwrap_err().to_string();
        assert!(refused.contains("others may write"), "{refused}");
        let link = base.join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        let refused = own(&link).unwrap_err().to_string();
        assert!(refused.contains("link"), "{refused}");
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&dir, Some(1), None).unwrap();
            let refused = claim(&dir, Duration::ZERO).unwrap_err();
            let source = std::error::Error::source(&refused).unwrap().to_string();
            assert!(source.contains("belongs to user 1"), "{source}");
        }
        fs::remove_dir_all(&base).unwrap();
    }
}
