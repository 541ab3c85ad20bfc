//! What this node says of itself: annotations of its own Node object, written through the API.
//!
//! They are written once they are known and whenever they change, as a merge of the object's status, which is what flannel's
//! own role allows. A failure is waited out and tried again.

use std::collections::BTreeMap;
use std::future::pending;
use std::rc::Rc;

use serde_json::json;
use tokio::sync::watch;

use super::kube::back_off::BackOff;
use super::kube::request::{Ask, escape};
use super::kube::server::{Failure, Server};

/// Annotations by name; without a value they are taken away.
pub type Annotations = BTreeMap<String, Option<String>>;

/// Says what the annotations are.
#[derive(Clone, Debug)]
pub struct Announcer(watch::Sender<Annotations>);

/// Hears it, and writes.
#[derive(Debug)]
pub(super) struct Writer {
    node: String,
    wanted: watch::Receiver<Annotations>,
}

/// The two ends, for a node of this name. Nothing is written before something was said.
pub(super) fn pair(node: &str) -> (Announcer, Writer) {
    let (sender, wanted) = watch::channel(Annotations::new());
    let node = node.to_owned();
    (Announcer(sender), Writer { node, wanted })
}

impl Announcer {
    /// This is what the object is to say.
    pub fn say(&self, annotations: Annotations) {
        self.0.send_if_modified(|now| {
            let differs = *now != annotations;
            *now = annotations;
            differs
        });
    }
}

impl Writer {
    /// Writes for good.
    pub(super) async fn run(mut self, server: Rc<Server>) {
        let mut back_off = BackOff::new(server.patience());
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            if !wanted.is_empty() {
                if let Err(failure) = self.write(&server, &wanted).await {
                    let reason = failure.reason();
                    tracing::warn!(%reason, node = %self.node, "the node's annotations are not written");
                    match failure {
                        Failure::Unavailable(_, asked) => server.wait(asked).await,
                        Failure::Refused(_, asked) => server.pause(back_off.next(), asked).await,
                        _ => server.pause(back_off.next(), None).await,
                    }
                    continue;
                }
                tracing::info!(node = %self.node, "the node's annotations are written");
                back_off.reset();
            }
            if self.wanted.changed().await.is_err() {
                // Nobody says anything any more. Whoever ends first ends the source.
                pending::<()>().await;
            }
        }
    }

    async fn write(&self, server: &Server, annotations: &Annotations) -> Result<(), Failure> {
        let path = format!("/api/v1/nodes/{}/status", escape(&self.node));
        let patch = json!({"metadata": {"annotations": annotations}});
        server.send(&Ask::merge(&path, &patch)).await?;
        Ok(())
    }
}
