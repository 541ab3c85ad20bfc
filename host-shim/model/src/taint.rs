//! The taint that keeps pods off a node whose network does not work: put on the Node object, and taken away.
//!
//! A thread of its own reads the object and changes its taints where they are not as wanted. The change names the version that was
//! read, so nothing that somebody else does in between is lost. Failures are waited out, longer each time. What is wanted is looked
//! after: a node that is registered anew has the taints of its registration again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Request;
use kube::{Client, Error};
use serde_json::{Value, json};
use tokio::sync::watch::{self, Receiver, Sender};
use tokio::time::{sleep, timeout};

use crate::source::Running;
use crate::source::kube::{BackOff, Kubernetes, connect};

/// How often the object is read when nothing is to be changed.
const LOOK: Duration = Duration::from_secs(60);

/// The taint of one node.
#[derive(Debug)]
pub struct NodeTaint {
    wanted: Sender<Option<bool>>,
    shared: Arc<Mutex<State>>,
    _running: Running,
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
            uri: format!("/api/v1/nodes/{node}"),
            key: key.to_owned(),
            api,
            shared: shared.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("node-taint".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = keeper.run(listen) => {}
                        // An error says that the other half is gone, which means the same.
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
        self.lock().tainted = None;
        self.wanted.send_replace(Some(tainted));
    }

    /// How far it is.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Keeper {
    uri: String,
    key: String,
    api: Kubernetes,
    shared: Arc<Mutex<State>>,
}

impl Keeper {
    async fn run(&self, mut wanted: Receiver<Option<bool>>) {
        let mut back_off = BackOff::new(self.api.patience());
        let mut client = None;
        loop {
            let now = *wanted.borrow_and_update();
            let pause = match now {
                None => LOOK,
                Some(tainted) => match self.bring(&mut client, tainted).await {
                    Ok(()) => {
                        self.tell(Some(tainted), None);
                        back_off.reset();
                        LOOK
                    }
                    Err(reason) => {
                        self.tell(None, Some(reason));
                        back_off.next()
                    }
                },
            };
            tokio::select! {
                () = sleep(pause) => {}
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn tell(&self, tainted: Option<bool>, problem: Option<String>) {
        let mut state = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if state.problem != problem {
            let log = |it: &String| tracing::warn!(taint = %self.key, problem = %it, "the node's taint cannot be changed at the moment");
            problem.iter().for_each(log);
        }
        state.tainted = tainted.or(state.tainted);
        state.problem = problem;
    }

    /// Makes the object as wanted.
    async fn bring(&self, client: &mut Option<Client>, tainted: bool) -> Result<(), String> {
        if client.is_none() {
            *client = Some(connect(self.api.access()).await?);
        }
        let Some(client) = client else {
            return Err("There is no client".into());
        };
        let node = self
            .ask(client, Request::get(&self.uri), Vec::new())
            .await?;
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
        let request =
            Request::patch(&self.uri).header("content-type", "application/merge-patch+json");
        self.ask(client, request, patch.to_string().into_bytes())
            .await?;
        tracing::info!(taint = %self.key, tainted, "the node's taint is changed");
        Ok(())
    }

    async fn ask(
        &self,
        client: &Client,
        request: http::request::Builder,
        body: Vec<u8>,
    ) -> Result<Value, String> {
        let request = request.body(body).map_err(|it| it.to_string())?;
        let answer = timeout(self.api.patience().answer, client.request(request)).await;
        match answer.map_err(|_| "No answer".to_owned())? {
            Ok(value) => Ok(value),
            Err(Error::Api(status)) => Err(format!(
                "The server answers {}: {}",
                status.code, status.message
            )),
            Err(error) => Err(error.to_string()),
        }
    }
}
