//! The node's socket: one JSON object per line, asked and answered, for the CLI and whoever else.
//!
//! A request is `{"v": 1, "request": {"op": "status"}}`; the answer `{"v": 1, "ok": …}` or `{"v": 1, "error": "…"}`. Lines, connections
//! and waiting are bounded; a request of another version is refused with both numbers. The socket is for root alone.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sluice_cni::peer;

use crate::cluster::Cluster;
use crate::config::PodConfig;
use crate::node::{Node, NodeError};

/// The version of this interface.
pub const API_VERSION: u32 = 1;
/// Longest line either way is much longer than this for a status, so only requests are held to it.
const REQUEST_MAX: u64 = 64 << 10;
/// Longest answer a client reads.
const ANSWER_MAX: u64 = 64 << 20;
/// Connections served at once; more are closed at once.
const CONNECTIONS: usize = 32;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status,
    Links,
    Drops,
    LinkAdd {
        pod: PodConfig,
    },
    LinkDel {
        name: String,
    },
    /// Sends a frame through the appliance and back.
    SelfTest,
    Policies,
    /// What policies say about a pod.
    PolicyOf {
        pod: String,
    },
    /// What a pod of the node, or all of them, were told of names in their rules.
    Names {
        #[serde(default)]
        pod: Option<String>,
    },
    /// Who decides about a connection.
    Trace {
        from: String,
        to: String,
    },
    Services,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    v: u32,
    request: Value,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    v: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ok: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Serves connections on threads of their own, for good.
///
/// # Errors
/// When the kernel gives no thread.
pub fn serve(listener: UnixListener, node: &Arc<Node>) -> io::Result<()> {
    let node = node.clone();
    let open = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        for stream in listener.incoming().flatten() {
            if !peer::is_trusted(&stream) {
                tracing::warn!("API connection refused: its process does not run as root");
                continue;
            }
            let Some(seat) = Seat::take(&open) else {
                continue;
            };
            let node = node.clone();
            let converse = move || {
                let _seat = seat;
                if let Err(error) = converse(&stream, &node) {
                    tracing::debug!(%error, "API connection ended");
                }
            };
            if let Err(error) = std::thread::Builder::new()
                .name("api".into())
                .spawn(converse)
            {
                tracing::warn!(%error, "API connection not served");
            }
        }
    };
    std::thread::Builder::new()
        .name("api-accept".into())
        .spawn(accept)
        .map(drop)
}

/// One of the connections that are served at once; given back however the connection ends, also when it gets no thread.
#[derive(Debug)]
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(open: &Arc<AtomicUsize>) -> Option<Self> {
        let seat = Self(open.clone());
        (open.fetch_add(1, Ordering::Relaxed) < CONNECTIONS).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(stream: &UnixStream, node: &Node) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut reader = BufReader::new(stream);
    while let Some(line) = read_line(&mut reader, REQUEST_MAX)? {
        let answer = match answer(&line, node) {
            Ok(ok) => Answer {
                v: API_VERSION,
                ok: Some(ok),
                error: None,
            },
            Err(error) => Answer {
                v: API_VERSION,
                ok: None,
                error: Some(error),
            },
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        (&*stream).write_all(&text)?;
    }
    Ok(())
}

fn read_line(reader: &mut impl BufRead, most: u64) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let n = reader.take(most).read_until(b'\n', &mut line)?;
    if n == 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "line too long or cut off",
        ));
    }
    String::from_utf8(line).map(Some).map_err(io::Error::other)
}

/// Reads a request as far as its version allows.
fn understand(line: &str) -> Result<Request, String> {
    let question: Question =
        serde_json::from_str(line).map_err(|e| format!("The request is not understood: {e}"))?;
    if question.v != API_VERSION {
        let v = question.v;
        return Err(format!(
            "The request is of version {v}, this node speaks version {API_VERSION}"
        ));
    }
    serde_json::from_value(question.request)
        .map_err(|e| format!("The request is not understood: {e}"))
}

fn answer(line: &str, node: &Node) -> Result<Value, String> {
    let value = match understand(line)? {
        Request::Status => serde_json::to_value(node.status()),
        Request::Links => serde_json::to_value(node.link_reports()),
        Request::Drops => serde_json::to_value(node.drop_reports()),
        Request::SelfTest => {
            let took = node.self_test().map_err(|e| with_causes(&e))?;
            serde_json::to_value(serde_json::json!({"micros": took.as_micros() as u64}))
        }
        Request::Policies => serde_json::to_value(cluster(node)?.policies()),
        Request::PolicyOf { pod } => {
            let policies = cluster(node)?.policies_of(&pod);
            serde_json::to_value(policies.map_err(|e| e.to_string())?)
        }
        Request::Names { pod } => {
            let names = cluster(node)?.names(pod.as_deref());
            serde_json::to_value(names.map_err(|e| e.to_string())?)
        }
        Request::Trace { from, to } => {
            let answer = cluster(node)?.trace(&from, &to);
            serde_json::to_value(answer.map_err(|e| e.to_string())?)
        }
        Request::Services => serde_json::to_value(cluster(node)?.services()),
        Request::LinkAdd { pod } => {
            let link = node.add_link(pod).map_err(|e| with_causes(&e))?;
            serde_json::to_value(node.link_report(&link))
        }
        Request::LinkDel { name } => {
            let link = node.remove_link(&name).map_err(|e| with_causes(&e))?;
            serde_json::to_value(node.link_report(&link))
        }
    };
    value.map_err(|e| e.to_string())
}

fn cluster(node: &Node) -> Result<&Cluster, String> {
    let none = "The node follows no cluster: its configuration names no source";
    node.cluster().ok_or_else(|| none.into())
}

/// An error and its causes in one line.
pub fn with_causes(error: &NodeError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Why a question got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("No sluice-node answers at {path}")]
    Connect {
        path: std::path::PathBuf,
        source: io::Error,
    },
    #[error("The conversation with sluice-node broke off")]
    Broken(#[source] io::Error),
    #[error("{0}")]
    Refused(String),
    #[error("The answer is not understood")]
    NotUnderstood(#[source] serde_json::Error),
}

/// Asks the node at a socket.
///
/// # Errors
/// When there is none, it refuses, or it answers in a way that is not understood.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> Result<T, ClientError> {
    let connect = |source| ClientError::Connect {
        path: socket.into(),
        source,
    };
    let stream = UnixStream::connect(socket).map_err(connect)?;
    let converse = || -> io::Result<String> {
        stream.set_read_timeout(Some(SILENCE))?;
        let request = serde_json::to_value(request)?;
        let mut line = serde_json::to_vec(&Question {
            v: API_VERSION,
            request,
        })?;
        line.push(b'\n');
        (&stream).write_all(&line)?;
        let answer = read_line(&mut BufReader::new(&stream), ANSWER_MAX)?;
        answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    };
    let line = converse().map_err(ClientError::Broken)?;
    let answer: Answer = serde_json::from_str(&line).map_err(ClientError::NotUnderstood)?;
    match (answer.ok, answer.error) {
        (_, Some(error)) => Err(ClientError::Refused(error)),
        (ok, None) => {
            serde_json::from_value(ok.unwrap_or_default()).map_err(ClientError::NotUnderstood)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_understood_as_written() {
        let pod = r#"{"name": "a", "netns": "/n", "addresses": ["10.0.0.1"]}"#;
        let line = format!(r#"{{"v": 1, "request": {{"op": "link_add", "pod": {pod}}}}}"#);
        let pod = serde_json::from_str(pod).unwrap();
        assert_eq!(understand(&line), Ok(Request::LinkAdd { pod }));
        assert_eq!(
            understand(r#"{"v": 1, "request": {"op": "status"}}"#),
            Ok(Request::Status)
        );
    }

    #[test]
    fn other_versions_and_unknown_fields_are_refused_by_name() {
        let other = understand(r#"{"v": 2, "request": {"op": "anything"}}"#).unwrap_err();
        assert!(
            other.contains("version 2") && other.contains("version 1"),
            "{other}"
        );
        let field = r#"{"v": 1, "request": {"op": "link_del", "name": "a", "forec": true}}"#;
        assert!(understand(field).unwrap_err().contains("forec"));
        assert!(
            understand(r#"{"v": 1, "request": {"op": "stauts"}}"#)
                .unwrap_err()
                .contains("stauts")
        );
    }

    #[test]
    fn seats_are_given_back_by_connections_that_are_refused_or_get_no_thread() {
        let open = Arc::new(AtomicUsize::new(0));
        let seats: Vec<Seat> = std::iter::from_fn(|| Seat::take(&open)).collect();
        assert_eq!(seats.len(), CONNECTIONS);
        for _ in 0..3 {
            assert!(Seat::take(&open).is_none());
        }
        // What a thread that cannot be started does with the work it was given.
        drop(seats);
        assert_eq!(open.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn lines_are_bounded() {
        let mut short = io::Cursor::new(b"{}\nrest".to_vec());
        assert_eq!(read_line(&mut short, 3).unwrap(), Some("{}".into()));
        let mut long = io::Cursor::new(vec![b'x'; 100]);
        assert!(read_line(&mut long, 50).is_err());
        assert_eq!(
            read_line(&mut io::Cursor::new(Vec::new()), 50).unwrap(),
            None
        );
    }

    proptest! {
        #[test]
        fn any_line_is_judged_without_panic(line in ".{0,200}") {
            let _ = understand(&line);
        }
    }
}
