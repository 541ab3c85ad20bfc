//! The taint that keeps pods off a node whose network does not work: put on the Node object, and
//! taken away.
//!
//! A thread of its own reads the object and changes its taints where they are not as wanted. The
//! change names the version that was read, so nothing that somebody else does in between is lost.
//! Failures are waited out, longer each time. What is wanted is looked after: a node that is
//! registered anew has the taints of its registration again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch::{self, Receiver, Sender};
use tokio::time::sleep;

use crate::source::Running;
use crate::source::kube::Kubernetes;
use crate::source::kube::answer::parse;
use crate::source::kube::back_off::BackOff;
use crate::source::kube::request::{Ask, escape};
use crate::source::kube::server::{Failure, Server};

/// How often the object is read when nothing is to be changed.
const LOOK: Duration = Duration::from_secs(60);

/// The taint of one node.
#[derive(Debug)]
pub struct NodeTaint {
    wanted: Sender<Option<bool>>,
    shared: Arc<Mutex<State>>,
    _running: Running,
}

/// Sees how far it is, from anywhere.
#[derive(Clone, Debug)]
pub struct Observer(Arc<Mutex<State>>);

impl Observer {
    /// Why the taint is not as wanted, if so.
    pub fn problem(&self) -> Option<String> {
        lock(&self.0).problem.clone()
    }
}

fn lock(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Whether the object had the taint when it was last seen since something was wanted.
    pub tainted: Option<bool>,
    /// Why it is not as wanted.
    pub problem: Option<String>,
}

impl NodeTaint {
    /// Looks after the taint `key` of `node`, as soon as it is said what is wanted.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub fn start(api: Kubernetes, node: &str, key: &str) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (wanted, listen) = watch::channel(None);
        let (end, mut ended) = watch::channel(());
        let shared = Arc::<Mutex<State>>::default();
        let keeper = Keeper {
            path: format!("/api/v1/nodes/{}", escape(node)),
            key: key.to_owned(),
            server: Server::new(api),
            shared: shared.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("node-taint".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = keeper.run(listen) => {}
                        // An error means that the other half is gone, which is the same.
                        _ = ended.changed() => {}
                    }
                });
            })?;
        Ok(Self {
            wanted,
            shared,
            _running: Running::new(move || drop(end), thread),
        })
    }

    /// Says what is wanted.
    pub fn want(&self, tainted: bool) {
        // What was seen before says nothing of how this went.
        lock(&self.shared).tainted = None;
        self.wanted.send_replace(Some(tainted));
    }

    /// How far it is.
    pub fn state(&self) -> State {
        lock(&self.shared).clone()
    }

    pub fn observer(&self) -> Observer {
        Observer(self.shared.clone())
    }
}

struct Keeper {
    path: String,
    key: String,
    server: Server,
    shared: Arc<Mutex<State>>,
}

impl Keeper {
    async fn run(&self, mut wanted: Receiver<Option<bool>>) {
        let mut back_off = BackOff::new(self.server.patience());
        loop {
            let now = *wanted.borrow_and_update();
            let result = match now {
                None => Ok(()),
                Some(tainted) => self.bring(tainted).await,
            };
            match (&result, now) {
                (Ok(()), Some(tainted)) => self.note(Some(tainted), None),
                (Ok(()), None) => {}
                (Err(failure), _) => self.note(None, Some(failure.reason().to_owned())),
            }
            let pause = async {
                match result {
                    Ok(()) => {
                        back_off.reset();
                        sleep(LOOK).await;
                    }
                    Err(Failure::Unavailable(_, asked)) => self.server.wait(asked).await,
                    Err(Failure::Refused(_, asked)) => {
                        self.server.pause(back_off.next(), asked).await;
                    }
                    Err(Failure::Absent { .. } | Failure::Expired) => {
                        self.server.pause(back_off.next(), None).await;
                    }
                }
            };
            tokio::select! {
                () = pause => {}
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn note(&self, tainted: Option<bool>, problem: Option<String>) {
        let mut state = lock(&self.shared);
        if state.problem != problem {
            let log = |it: &String| tracing::warn!(taint = %self.key, problem = %it, "the node's taint cannot be changed at the moment");
            problem.iter().for_each(log);
        }
        state.tainted = tainted.or(state.tainted);
        state.problem = problem;
    }

    /// Makes the object as wanted.
    async fn bring(&self, tainted: bool) -> Result<(), Failure> {
        let node = self.ask(&Ask::get(self.path.clone())).await?;
        let taints = node.pointer("/spec/taints").and_then(Value::as_array);
        let taints = taints.cloned().unwrap_or_default();
        let is_ours = |taint: &Value| taint["key"] == *self.key;
        if taints.iter().any(is_ours) == tainted {
            return Ok(());
        }
        let mut changed: Vec<Value> = taints.into_iter().filter(|it| !is_ours(it)).collect();
        if tainted {
            changed.push(json!({"key": self.key, "effect": "NoSchedule"}));
        }
        let patch = json!({
            "metadata": {"resourceVersion": node.pointer("/metadata/resourceVersion")},
            "spec": {"taints": changed},
        });
        self.ask(&Ask::merge(&self.path, &patch)).await?;
        tracing::info!(taint = %self.key, tainted, "the node's taint is changed");
        Ok(())
    }

    async fn ask(&self, ask: &Ask) -> Result<Value, Failure> {
        let answer = self.server.send(ask).await?;
        parse(answer, self.server.patience().answer).await
    }
}
