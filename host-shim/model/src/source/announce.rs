//! Annotations of this node's own Node object, written through the API.
//!
//! They are written whenever the object, as it is followed, has other ones: once they are known,
//! when they change, when another client removed them, and when the object is made anew. It is a
//! merge of the object's status, which is what flannel's own role allows. Failures are waited out,
//! longer each time, and so is another client that writes other values again and again.

use std::collections::BTreeMap;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::kube::back_off::BackOff;
use super::kube::request::{Ask, escape};
use super::kube::server::{Failure, Server};

/// Annotations by name; without a value they are taken away.
pub type Annotations = BTreeMap<String, Option<String>>;

/// What is to be written, and whether it is.
#[derive(Clone, Debug)]
pub struct Announcer {
    wanted: watch::Sender<Annotations>,
    problem: watch::Receiver<Option<String>>,
}

/// Writes it.
#[derive(Debug)]
pub(super) struct Writer {
    node: String,
    wanted: watch::Receiver<Annotations>,
    problem: watch::Sender<Option<String>>,
    seen: watch::Receiver<Seen>,
}

/// The Node object's annotations as it is followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Seen {
    /// Nodes have not been listed yet.
    #[default]
    Unknown,
    /// There is no such object.
    Gone,
    Present(BTreeMap<String, String>),
}

/// Where the watcher of nodes notes what it sees of one of them.
#[derive(Debug)]
pub(super) struct Sight {
    node: String,
    seen: watch::Sender<Seen>,
}

/// The ends, for a node of this name. Nothing is written before something is wanted.
pub(super) fn ends(node: &str) -> (Announcer, Writer, Sight) {
    let (wanted_sender, wanted) = watch::channel(Annotations::new());
    let (problem, problems) = watch::channel(None);
    let (sight, seen) = watch::channel(Seen::Unknown);
    let announcer = Announcer {
        wanted: wanted_sender,
        problem: problems,
    };
    let writer = Writer {
        node: node.to_owned(),
        wanted,
        problem,
        seen,
    };
    let sight = Sight {
        node: node.to_owned(),
        seen: sight,
    };
    (announcer, writer, sight)
}

impl Announcer {
    /// The object is to have these.
    pub fn say(&self, annotations: Annotations) {
        self.wanted.send_if_modified(|now| {
            let differs = *now != annotations;
            *now = annotations;
            differs
        });
    }

    /// Why the object does not have them, if that is so.
    pub fn problem(&self) -> Option<String> {
        self.problem.borrow().clone()
    }
}

impl Sight {
    /// An object of the kind Node, as it is now.
    pub(super) fn present(&self, node: &Value) {
        if self.is_ours(node.pointer("/metadata/name").and_then(Value::as_str)) {
            self.note(Seen::of(node));
        }
    }

    /// The object of this name is gone.
    pub(super) fn gone(&self, name: &str) {
        if self.is_ours(Some(name)) {
            self.note(Seen::Gone);
        }
    }

    /// All objects have been listed, and these are their names.
    pub(super) fn listed(&self, mut names: impl Iterator<Item = Arc<str>>) {
        if !names.any(|it| *it == *self.node) {
            self.note(Seen::Gone);
        }
    }

    fn is_ours(&self, name: Option<&str>) -> bool {
        name == Some(&self.node)
    }

    fn note(&self, seen: Seen) {
        // Sent even if it is the same: what was written may have been undone in between.
        self.seen.send_replace(seen);
    }
}

impl Seen {
    fn of(node: &Value) -> Self {
        let annotations = node.pointer("/metadata/annotations");
        let annotations = annotations.and_then(Value::as_object);
        let text =
            |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
        Self::Present(annotations.into_iter().flatten().filter_map(text).collect())
    }

    /// Whether the object has what is wanted.
    fn has(&self, wanted: &Annotations) -> bool {
        match self {
            Self::Present(present) => wanted
                .iter()
                .all(|(name, value)| present.get(name) == value.as_ref()),
            Self::Unknown | Self::Gone => false,
        }
    }
}

impl Writer {
    /// Writes for good.
    pub(super) async fn run(mut self, server: Rc<Server>) {
        let patience = server.patience();
        let mut back_off = BackOff::new(patience);
        let mut written: Option<Instant> = None;
        let mut has_paused = false;
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let seen = self.seen.borrow_and_update().clone();
            if wanted.is_empty() || seen == Seen::Unknown || seen.has(&wanted) {
                self.note(None);
                self.changed().await;
                continue;
            }
            if seen == Seen::Gone {
                self.note(Some(format!("there is no Node object {}", self.node)));
                self.changed().await;
                continue;
            }
            // Somebody else writes other values, or what was seen is older than what was written: a
            // race helps nobody.
            let is_early = written.is_some_and(|at| at.elapsed() < 2 * patience.most);
            if is_early && !std::mem::replace(&mut has_paused, true) {
                server.pause(back_off.next(), None).await;
                continue;
            }
            if !is_early {
                back_off.reset();
            }
            if let Err(failure) = self.write(&server, &wanted).await {
                let reason = failure.reason();
                tracing::warn!(%reason, node = %self.node, "the node's annotations are not written");
                self.note(Some(reason.to_owned()));
                match failure {
                    Failure::Unavailable(_, asked) => server.wait(asked).await,
                    Failure::Refused(_, asked) => server.pause(back_off.next(), asked).await,
                    _ => server.pause(back_off.next(), None).await,
                }
                continue;
            }
            tracing::info!(node = %self.node, "the node's annotations are written");
            self.note(None);
            written = Some(Instant::now());
            has_paused = false;
            // The watch says that they are there, or that they are not.
            self.changed().await;
        }
    }

    fn note(&self, problem: Option<String>) {
        self.problem.send_if_modified(|now| {
            let differs = *now != problem;
            *now = problem;
            differs
        });
    }

    /// Something else is wanted, or the object is another.
    async fn changed(&mut self) {
        tokio::select! {
            // An end of one of them ends nothing: what is wanted is looked after, and whoever ends
            // first ends the source.
            Ok(()) = self.wanted.changed() => {}
            Ok(()) = self.seen.changed() => {}
            else => pending::<()>().await,
        }
    }

    async fn write(&self, server: &Server, annotations: &Annotations) -> Result<(), Failure> {
        let path = format!("/api/v1/nodes/{}/status", escape(&self.node));
        let patch = json!({"metadata": {"annotations": annotations}});
        server.send(&Ask::merge(&path, &patch)).await?;
        Ok(())
    }
}
