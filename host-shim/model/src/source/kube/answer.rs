//! Answers: how they are read, within bounds, and what is in them.

use std::time::Duration;

use http::{Response, header};
use http_body_util::BodyExt;
use kube::client::Body;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use super::server::Failure;

/// The longest answer that is read: a page of large objects.
const ANSWER: usize = 64 << 20;
/// The longest explanation of a refusal that is read.
const REASON: usize = 64 << 10;
/// The longest time that a server may ask to be left alone for.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// A page of a list.
#[derive(Deserialize)]
pub(super) struct List {
    pub(super) metadata: ListMeta,
    #[serde(default)]
    pub(super) items: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListMeta {
    pub(super) resource_version: Option<String>,
    #[serde(rename = "continue")]
    pub(super) next: Option<String>,
}

/// One line of a watch.
#[derive(Deserialize)]
pub(super) struct Notice {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) object: Value,
}

/// The body of an answer, as JSON. `patience` is for the next bytes of it.
pub(crate) async fn parse<T: DeserializeOwned>(
    answer: Response<Body>,
    patience: Duration,
) -> Result<T, Failure> {
    let bytes = read(answer, patience, ANSWER).await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Failure::refused(format!("The answer is not what was asked for: {error}")))
}

/// Why a request was refused, as its answer has it: its status, and the message of its body if it
/// has one.
pub(super) async fn refusal(answer: Response<Body>, patience: Duration) -> String {
    let status = answer.status();
    let body = read(answer, patience, REASON).await.unwrap_or_default();
    let message = serde_json::from_slice::<Value>(&body).ok();
    let message = message.as_ref().and_then(|it| it.get("message")?.as_str());
    match message {
        Some(message) => format!("The server answers {status}: {message}"),
        None => format!("The server answers {status}"),
    }
}

/// For how long the server asks to be left alone, if it does.
pub(super) fn retry_after(answer: &Response<Body>) -> Option<Duration> {
    let asked = answer.headers().get(header::RETRY_AFTER)?;
    let seconds = asked.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER))
}

async fn read(
    answer: Response<Body>,
    patience: Duration,
    limit: usize,
) -> Result<Vec<u8>, Failure> {
    let mut body = answer.into_body();
    let mut bytes = Vec::new();
    loop {
        match timeout(patience, body.frame()).await {
            Err(_) => return Err(Failure::unavailable("The answer does not go on")),
            Ok(None) => return Ok(bytes),
            Ok(Some(Err(error))) => return Err(Failure::unavailable(error.to_string())),
            Ok(Some(Ok(frame))) => {
                let piece = frame.into_data().unwrap_or_default();
                if bytes.len() + piece.len() > limit {
                    return Err(Failure::refused("The answer is too long"));
                }
                bytes.extend_from_slice(&piece);
            }
        }
    }
}
