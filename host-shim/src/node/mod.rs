//! The node: trunk, control channel, supervisor and links put together, started and stopped as a whole.
//!
//! Order matters at the start. The sockets listen first, so that a VMM of an earlier life finds its way back; the rows are
//! complete before the control channel speaks, so that no running guest is ever told of fewer pods than there are.

mod bandwidth;
pub mod links;
pub(crate) mod ports;
pub mod readiness;
pub mod report;
mod self_test;
mod ways;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
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

use self::links::{Link, LinkError, LinkTable, SavedLink};
use self::ways::Ways;
use crate::cluster::{Cluster, pod_name};
use crate::config::{Config, ConfigError, OnStop, PodConfig};
use crate::control::{Control, NotInForce};
use crate::files;
use crate::hostlink::HostLinkError;
use crate::supervisor::Supervisor;
use crate::supervisor::command::Sockets;
use crate::uplink::UplinkError;
use crate::wiring::WiringError;
use sluice_trunk::driver::{Command, Driver, DriverCounters, Polling};
use sluice_trunk::engine::{Engine, TrunkCounters};
use sluice_trunk::features::{Features, Offloads};
use sluice_trunk::links::LinkCounters;
use sluice_trunk::tap;
use sluice_trunk::vhost::{self, TrunkState};

/// How long a new link may take to be in force before it is taken back.
const IN_FORCE: Duration = Duration::from_secs(5);
/// For how long frames wait in the taps for a guest to be configured.
const HELD: Duration = Duration::from_secs(2);
/// How long the cluster's source may take to tell of a new pod. With the wait for the appliance it stays below what a
/// runtime allows an ADD.
const KNOWN: Duration = Duration::from_secs(4);
/// How long a removed link may take to be out of force before its tap goes anyway.
const OUT_OF_FORCE: Duration = Duration::from_secs(1);

/// Links that are wired at once: one holds the kernel's lock, one does what needs none.
const WIRING: usize = 2;

/// What a node cannot do.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("Cannot {step}")]
    Start { step: String, source: io::Error },
    #[error("Another sluice-node uses {0}")]
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
    #[error("The trunk takes no link")]
    Trunk(#[source] io::Error),
}

fn cannot<S: Into<String>>(step: S) -> impl FnOnce(io::Error) -> NodeError {
    let step = step.into();
    move |source| NodeError::Start { step, source }
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    config: Config,
    driver: Driver,
    driver_counters: Arc<DriverCounters>,
    trunk: TrunkState,
    trunk_counters: Arc<TrunkCounters>,
    control: Control,
    cluster: Option<Cluster>,
    supervisor: Supervisor,
    links: Mutex<LinkTable>,
    ways: Mutex<Ways>,
    offloads: Offloads,
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
    pub fn start(config: Config) -> Result<Self, NodeError> {
        let lock = claim(&config.run_dir)?;
        let sockets = Sockets::in_dir(&config.run_dir);
        let (table, saved) = LinkTable::load(&config.run_dir)?;
        let offloads = tap::probe().map_err(cannot("make a tap"))?;
        let trunk_counters = Arc::new(TrunkCounters::default());
        let engine = Engine::new(trunk_counters.clone()).map_err(cannot("watch taps"))?;
        let driver_counters = Arc::new(DriverCounters::default());
        let polling = Polling {
            longest: config.polling(),
        };
        let driver = Driver::start(engine, polling, driver_counters.clone());
        let driver = driver.map_err(cannot("start the trunk"))?;
        let trunk = TrunkState::default();
        serve_trunk(&sockets.trunk, offloads, &driver, &trunk)?;
        let channel = listen(&sockets.control)?;
        let mailbox = driver.mailbox().clone();
        mailbox
            .send(Command::Hold(HELD))
            .map_err(|e| cannot("hold frames back")(io::Error::other(e)))?;
        let gate = move |forwards| {
            let command = if forwards {
                Command::Release
            } else {
                Command::Hold(HELD)
            };
            if let Err(error) = mailbox.send(command) {
                tracing::error!(%error, forwards, "frames are neither held back nor released");
            }
        };
        let control = Control::new(gate).map_err(cannot("start the control channel"))?;
        let cluster = Cluster::start(&config, &control).map_err(cannot("follow the cluster"))?;
        let supervisor = Supervisor::start(&config, trunk.clone());
        let supervisor = supervisor.map_err(cannot("start the supervisor"))?;
        let node = Self {
            config,
            driver,
            driver_counters,
            trunk,
            trunk_counters,
            control,
            cluster,
            supervisor,
            links: Mutex::new(table),
            ways: Mutex::default(),
            offloads,
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
        let served = linked.and_then(|()| {
            let state = node.trunk.clone();
            node.control
                .serve(channel, move |pid| state.admits(pid))
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
        self.config.on_stop == OnStop::TearDown
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
        self.driver.stop();
        let sockets = Sockets::in_dir(&self.config.run_dir);
        for path in [&sockets.trunk, &sockets.control] {
            files::remove(path);
        }
        if tear_down {
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
            let attached = if wanted {
                spec.attach()
            } else {
                spec.attach().and_then(|_| not_wanted(&link))
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
        self.add_tap(link.saved.id, tap, link.counters.clone())
    }

    fn add_tap(&self, id: LinkId, tap: File, counters: Arc<LinkCounters>) -> Result<(), NodeError> {
        let id = id.raw();
        let add = |reply| Command::AddLink {
            id,
            tap: OwnedFd::from(tap),
            counters,
            reply,
        };
        let answer = self.driver.mailbox().ask(add);
        answer
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(NodeError::Trunk)
    }

    /// Takes a link off the trunk, removes its interfaces and forgets it.
    fn dismantle(&self, link: &Link) -> Result<(), NodeError> {
        let id = link.saved.id;
        // False when it was never served.
        let left = self.driver.mailbox().ask(|reply| Command::RemoveLink {
            id: id.raw(),
            reply,
        });
        if let Err(error) = left {
            // The command may still be carried out; the interface goes in any case.
            tracing::error!(%id, %error, "the trunk did not confirm that a link is gone");
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

/// Makes the run directory ours alone.
fn claim(run_dir: &Path) -> Result<Flock<File>, NodeError> {
    let step = || cannot(format!("use the run directory {}", run_dir.display()));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run_dir)
        .and_then(|()| own(run_dir))
        .map_err(step())?;
    let path = run_dir.join("node.lock");
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&path);
    match Flock::lock(file.map_err(step())?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EAGAIN)) => Err(NodeError::Taken(run_dir.into())),
        Err((_, error)) => Err(step()(error.into())),
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

fn serve_trunk(
    path: &Path,
    offloads: Offloads,
    driver: &Driver,
    trunk: &TrunkState,
) -> Result<(), NodeError> {
    let listener = listen(path)?;
    let (mailbox, trunk) = (driver.mailbox().clone(), trunk.clone());
    let offered = Features::offered(offloads);
    let serve = move || vhost::serve(&listener, offered, &mailbox, &trunk);
    let thread = std::thread::Builder::new()
        .name("vhost-user".into())
        .spawn(serve);
    thread.map(drop).map_err(cannot("serve the trunk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_directory_is_ours_alone_or_refused() {
        let base = std::env::temp_dir().join(format!("sluice-own-{}", std::process::id()));
        let dir = base.join("run");
        let mode = || fs::metadata(&dir).unwrap().mode() & 0o777;
        drop(claim(&dir).unwrap());
        assert_eq!(mode(), 0o700);
        // As an earlier version left it.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        drop(claim(&dir).unwrap());
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
            let refused = claim(&dir).unwrap_err();
            let source = std::error::Error::source(&refused).unwrap().to_string();
            assert!(source.contains("belongs to user 1"), "{source}");
        }
        fs::remove_dir_all(&base).unwrap();
    }
}
