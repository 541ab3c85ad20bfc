//! The Kubernetes API: each kind is listed once and then watched.
//!
//! * `watcher`: one kind. A watch that ends is resumed where it ended; bookmarks keep that place
//!   fresh. If the server has forgotten it (410), or what it sends makes no sense, the kind is
//!   listed again, and what is not in the list is gone.
//! * `absence`: when a 403 or 404 means that there are no such objects.
//! * `server`: requests, credentials and the back-off of all tasks. `access`: where the server is,
//!   and as whom it is asked.
//! * `verdict`: the condition that is written into the status of NodePolicies. `unfollowed`: older
//!   kinds that are named.
//! * `request`, `answer`: what is sent and what comes back. `common`: what the tasks share.
//!   `back_off`: the pauses of one task.
//!
//! What is known stays in force while the server is away.

mod absence;
mod access;
pub(crate) mod answer;
pub(crate) mod back_off;
mod common;
pub(crate) mod request;
pub(crate) mod server;
mod unfollowed;
mod verdict;
mod watcher;

use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use kube::Config;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, LocalSet};

use self::access::Access;
use self::common::Common;
use self::server::Server;
use self::verdict::Verdicts;
use self::watcher::Watcher;
use super::announce::{self, Announcer, Sight, Writer};
use super::{Running, Source};
use crate::object::Kind;
use crate::store::Event;

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// After the first failure; doubled with each one that follows.
    pub first: Duration,
    /// At most.
    pub most: Duration,
    /// The server ends a watch after this time; one that is silent for so long and a little more is
    /// dead.
    pub watch: Duration,
    /// For the next bytes of an answer.
    pub answer: Duration,
    /// For an answer of a server that was away a moment ago; longer if it was away for long.
    pub probe: Duration,
    /// How long a server has to forbid a kind before that is believed.
    pub lasting: Duration,
    /// How often to look whether a kind that the server does not have is there now.
    pub missing: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            most: Duration::from_secs(30),
            watch: Duration::from_secs(290),
            answer: Duration::from_secs(30),
            probe: Duration::from_secs(2),
            lasting: Duration::from_secs(10),
            missing: Duration::from_secs(10),
        }
    }
}

/// The API server.
#[derive(Debug)]
pub struct Kubernetes {
    access: Access,
    patience: Patience,
    writer: Option<(Writer, Sight)>,
}

impl Kubernetes {
    /// With the credentials of this pod, or of this user.
    pub fn infer() -> Self {
        Self::with_access(Access::Infer)
    }

    /// With the credentials of a kubeconfig.
    pub fn kubeconfig(path: impl Into<PathBuf>) -> Self {
        Self::with_access(Access::File(path.into()))
    }

    pub fn new(config: Config) -> Self {
        Self::with_access(Access::Given(Box::new(config)))
    }

    fn with_access(access: Access) -> Self {
        Self {
            access,
            patience: Patience::default(),
            writer: None,
        }
    }

    /// Writes annotations of the Node object of that name, too, as the announcer has them.
    #[must_use]
    pub fn announcing(mut self, node: &str) -> (Self, Announcer) {
        let (announcer, writer, sight) = announce::ends(node);
        self.writer = Some((writer, sight));
        (self, announcer)
    }

    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }
}

impl Source for Kubernetes {
    fn start(self, events: Sender<Event>) -> io::Result<Running> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("kubernetes".into())
            .spawn(move || {
                let local = LocalSet::new();
                local.block_on(&runtime, async move {
                    tokio::select! {
                        () = follow(self, events) => {}
                        // An error means that the other half is gone, which is the same.
                        _ = stopped => {}
                    }
                });
            })?;
        let stop = move || {
            // An error means that the thread has ended already.
            let _ = stop.send(());
        };
        Ok(Running::new(stop, thread))
    }
}

async fn follow(mut source: Kubernetes, events: Sender<Event>) {
    let (writer, sight) = source.writer.take().unzip();
    let server = Rc::new(Server::new(source));
    let verdicts = Rc::new(Verdicts::new(server.patience().most));
    let common = Common::new(server.clone(), events, sight, verdicts.clone());
    let common = Rc::new(common);
    let mut tasks = JoinSet::new();
    if let Some(writer) = writer {
        tasks.spawn_local(writer.run(server.clone()));
    }
    tasks.spawn_local(verdicts.run(server));
    tasks.spawn_local(unfollowed::look(common.clone()));
    for kind in Kind::ALL {
        let common = common.clone();
        tasks.spawn_local(async move { Watcher::new(kind, common).run().await });
    }
    // The first that ends has lost its receiver; so have the others.
    tasks.join_next().await;
}
