//! What this node says of itself: annotations of its own Node object, written through the API.
//!
//! They are written once they are known and whenever they change, as a merge of the object's status, which is what flannel's
//! own role allows. A failure is waited out and tried again.

use std::collections::BTreeMap;
use std::future::pending;

use http::{Request, header};
use kube::Client;
use kube::client::Body;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::kube::{BackOff, Patience, escape};

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
    pub(super) async fn run(mut self, client: Client, patience: Patience) {
        let mut back_off = BackOff::new(patience);
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            if !wanted.is_empty() {
                if let Err(reason) = write(&client, patience, &self.node, &wanted).await {
                    tracing::warn!(%reason, node = %self.node, "the node's annotations are not written");
                    sleep(back_off.next()).await;
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
}

async fn write(
    client: &Client,
    patience: Patience,
    node: &str,
    annotations: &Annotations,
) -> Result<(), String> {
    let merge = json!({"metadata": {"annotations": annotations}});
    let request = Request::patch(format!("/api/v1/nodes/{}/status", escape(node)))
        .header(header::CONTENT_TYPE, "application/merge-patch+json")
        .header(header::ACCEPT, "application/json")
        .body(Body::from(merge.to_string().into_bytes()))
        .map_err(|error| error.to_string())?;
    let answer = timeout(patience.answer, client.send(request)).await;
    let answer = answer.map_err(|_| "No answer")?;
    let status = answer.map_err(|error| error.to_string())?.status();
    if status.is_success() {
        Ok(())
    } else {
        Err(format!("The server answers {status}"))
    }
}
