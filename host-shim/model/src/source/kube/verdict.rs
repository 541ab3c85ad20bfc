//! What a node writes into the status of a NodePolicy: whether the object was accepted.
//!
//! All nodes of one version judge alike, so the condition `Accepted` is one for all of them, and a
//! generation of the object costs a write or two however many nodes there are:
//!
//! * The first node to write wins. Each waits a moment of its own, looks at the object as it is
//!   followed, and writes nothing if the condition of this generation is there.
//! * A write names the version of the object that was seen, so that of two nodes at once one is
//!   refused (409), and looks again.
//! * A refusal is written over an acceptance, never the other way round:
//!   nodes of two versions end with the refusal.
//!
//! It is nothing that the network needs. A node that may not write there (403), or whose server's
//! definition has no status (404), goes on without, and tries again after [`QUIET`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use k8s_openapi::jiff::{Timestamp, Unit};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::back_off::spread;
use super::request::{Ask, collection, escape};
use super::server::{Failure, Server};
use crate::finding::{Finding, Severity};
use crate::object::Kind;

const ACCEPTED: &str = "Accepted";
/// A write comes within this time after the object was seen.
const MOMENT: Duration = Duration::from_secs(5);
/// After a write that the server does not allow nothing is tried for so long.
const QUIET: Duration = Duration::from_secs(600);
/// Objects that wait for a write, at most; what does not fit is written when it is seen again.
const WAITING: usize = 1024;
/// The longest text of a condition.
const MESSAGE: usize = 1024;

/// The conditions that are to be written.
#[derive(Debug)]
pub(super) struct Verdicts {
    moment: Duration,
    waiting: RefCell<BTreeMap<String, Waiting>>,
    quiet_until: Cell<Option<Instant>>,
    changed: Notify,
}

#[derive(Clone, Debug)]
struct Waiting {
    due: Instant,
    patch: Value,
}

impl Verdicts {
    /// `moment` is how long nodes spread their writes over.
    pub(super) fn new(moment: Duration) -> Self {
        Self {
            moment: moment.min(MOMENT),
            waiting: RefCell::default(),
            quiet_until: Cell::default(),
            changed: Notify::new(),
        }
    }

    /// An object was seen, and this is wrong with it.
    pub(super) fn judged(&self, object: &Value, findings: &[Finding]) {
        let name = object.pointer("/metadata/name").and_then(Value::as_str);
        let Some(name) = name else {
            return;
        };
        let mut waiting = self.waiting.borrow_mut();
        let Some(patch) = patch(object, findings) else {
            waiting.remove(name);
            return;
        };
        let due = match waiting.get(name) {
            Some(former) => former.due,
            None if waiting.len() >= WAITING => return,
            None => Instant::now() + spread(self.moment),
        };
        waiting.insert(name.to_owned(), Waiting { due, patch });
        self.changed.notify_one();
    }

    /// The object is gone.
    pub(super) fn gone(&self, name: &str) {
        self.waiting.borrow_mut().remove(name);
    }

    /// This was written, or cannot be. What the object needs since then stays.
    fn sent(&self, name: &str, patch: &Value) {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.get(name).is_some_and(|it| it.patch == *patch) {
            waiting.remove(name);
        }
    }

    /// Writes for good.
    pub(super) async fn run(self: Rc<Self>, server: Rc<Server>) {
        loop {
            let next = self.next();
            let Some((name, waiting)) = next else {
                self.changed.notified().await;
                continue;
            };
            if waiting.due > Instant::now() {
                tokio::select! {
                    () = sleep_until(waiting.due) => {}
                    () = self.changed.notified() => {}
                }
                continue;
            }
            let path = collection(Kind::NodePolicy.api_version(), Kind::NodePolicy.plural());
            let path = format!("{path}/{}/status", escape(&name));
            let done = server.send(&Ask::merge(&path, &waiting.patch)).await;
            if let Err(Failure::Unavailable(_, asked)) = done {
                server.wait(asked).await;
                continue;
            }
            self.sent(&name, &waiting.patch);
            if let Err(Failure::Absent { reason, .. }) = done {
                tracing::info!(%reason, policy = name, "the status of NodePolicies is not written");
                self.waiting.borrow_mut().clear();
                self.quiet_until.set(Some(Instant::now() + QUIET));
            }
        }
    }

    /// What is to be written first.
    fn next(&self) -> Option<(String, Waiting)> {
        let mut waiting = self.waiting.borrow_mut();
        if self.quiet_until.get().is_some_and(|it| Instant::now() < it) {
            waiting.clear();
            return None;
        }
        let first = waiting.iter().min_by_key(|(_, it)| it.due);
        first.map(|(name, it)| (name.clone(), it.clone()))
    }
}

/// The change that an object's status needs, if it needs one.
fn patch(object: &Value, findings: &[Finding]) -> Option<Value> {
    let generation = object.pointer("/metadata/generation")?.as_i64()?;
    let conditions = object.pointer("/status/conditions");
    let conditions = conditions.and_then(Value::as_array);
    let is_ours = |it: &&Value| it.get("type").and_then(Value::as_str) == Some(ACCEPTED);
    let former = conditions.into_iter().flatten().find(is_ours);
    let text = |field: &str| former?.get(field)?.as_str();
    let judged = former.and_then(|it| it.get("observedGeneration")?.as_i64());
    let errors = || findings.iter().filter(|it| it.severity == Severity::Error);
    let is_accepted = errors().next().is_none();
    let status = if is_accepted { "True" } else { "False" };
    match judged {
        Some(judged) if judged > generation => return None,
        Some(judged) if judged == generation && (is_accepted || text("status") == Some(status)) => {
            return None;
        }
        _ => {}
    }
    let since = text("lastTransitionTime").filter(|_| text("status") == Some(status));
    let now = Timestamp::now().round(Unit::Second).ok()?.to_string();
    let (reason, message) = if is_accepted {
        ("Valid", "The nodes that it selects follow it".to_owned())
    } else {
        ("Invalid", explained(errors()))
    };
    let condition = json!({
        "type": ACCEPTED, "status": status, "observedGeneration": generation,
        "reason": reason, "message": message, "lastTransitionTime": since.unwrap_or(&now),
    });
    let others = conditions.into_iter().flatten();
    let others = others.filter(|it| !is_ours(it)).cloned();
    let all: Vec<Value> = others.chain([condition]).collect();
    Some(json!({
        "metadata": {"resourceVersion": object.pointer("/metadata/resourceVersion")},
        "status": {"conditions": all},
    }))
}

/// What is wrong, in one line.
fn explained<'a>(errors: impl Iterator<Item = &'a Finding>) -> String {
    let parts = errors.map(|it| format!("{}: {}", it.field, it.reason));
    let mut text = parts.collect::<Vec<_>>().join("; ");
    text.insert_str(0, "Nodes go on with what was in force before: ");
    if let Some((end, _)) = text.char_indices().nth(MESSAGE) {
        text.truncate(end);
    }
    text
}
