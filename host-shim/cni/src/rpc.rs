//! What the thin binary and the node say to each other: one request line, then `accepted`, then one answer line.
//!
//! `accepted` separates a node that hangs (cut after seconds) from one that works (a delegate may take its time). Every
//! line is bounded and carries the protocol's version; a peer of another version is refused by both numbers.

use crate::config::{self, Config};
use crate::env::Environment;
use crate::error::{CniError, Code};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// The version of this protocol.
pub const VERSION: u32 = 1;
/// The longest line: a configuration and its environment.
pub const LINE: usize = config::LIMIT + (64 << 10);
/// The socket's name in the run directory.
pub const SOCKET: &str = "cni.sock";

/// One call, as the binary hands it to the node and as it is kept for later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub v: u32,
    pub env: Environment,
    pub config: Value,
}

impl Request {
    /// The call of `env` with `config`.
    pub fn new(env: &Environment, config: &Config) -> Self {
        Self {
            v: VERSION,
            env: env.clone(),
            config: config.raw.clone(),
        }
    }
}

/// What the node says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub v: u32,
    #[serde(flatten)]
    pub body: Body,
}

/// The three things a node can say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Body {
    /// The request was read; the answer follows.
    Accepted(bool),
    /// What goes to standard output; `null` for nothing.
    Result(Value),
    Error(CniError),
}

impl Answer {
    /// An answer of this version.
    pub const fn new(body: Body) -> Self {
        Self { v: VERSION, body }
    }
}

/// How a call can fail without an answer of the node.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    #[error("the node cannot be reached at {path}")]
    Unreachable { path: PathBuf, source: io::Error },
    #[error("the node did not accept the call within {0:?}")]
    NotAccepted(Duration),
    #[error("the node did not answer within {0:?}")]
    NotAnswered(Duration),
    #[error("the connection to the node broke")]
    Broken(#[source] io::Error),
    #[error("the node said what cannot be read")]
    Garbage(#[source] serde_json::Error),
    #[error("the node speaks version {node} of the protocol, the plugin {VERSION}")]
    Version { node: u32 },
}

impl Unanswered {
    /// What the runtime is told where the call cannot be kept for later.
    pub fn to_error(&self, code: Code) -> CniError {
        let cause = std::error::Error::source(self).map(ToString::to_string);
        let advice = match self {
            Self::Unreachable { .. } => {
                Some("is sluice-node running, and is its run_dir the network's runDir?".to_owned())
            }
            Self::Version { .. } => Some("install the plugin that came with the node".to_owned()),
            Self::NotAccepted(_) | Self::NotAnswered(_) => {
                Some("`sluice status` and the node's log say more".to_owned())
            }
            _ => None,
        };
        let details: Vec<String> = cause.into_iter().chain(advice).collect();
        CniError::new(code, self.to_string()).details(&details.join("; "))
    }
}

/// How long each part of a call may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub accepted: Duration,
    pub answered: Duration,
}

/// Asks the node behind `socket_path`.
///
/// # Errors
/// If there is no answer, for whatever reason; an error that the node answers is in the `Ok`.
pub fn call(
    socket_path: &Path,
    request: &Request,
    patience: Patience,
) -> Result<Result<Value, CniError>, Unanswered> {
    let started = Instant::now();
    let stream = reach(socket_path, started + patience.accepted).map_err(|source| {
        Unanswered::Unreachable {
            path: socket_path.to_owned(),
            source,
        }
    })?;
    let mut line = serde_json::to_vec(request).map_err(Unanswered::Garbage)?;
    line.push(b'\n');
    let mut lines = Lines::new(&stream, LINE);
    let mut limit = patience.accepted;
    let late = |error: io::Error, limit: Duration, accepted: bool| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut if accepted => Unanswered::NotAnswered(limit),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Unanswered::NotAccepted(limit),
        _ => Unanswered::Broken(error),
    };
    write_until(&stream, &line, started + limit).map_err(|error| late(error, limit, false))?;
    let mut accepted = false;
    loop {
        let line = lines
            .next(Some(started + limit))
            .map_err(|e| late(e, limit, accepted))?;
        let answer: Answer = serde_json::from_slice(&line).map_err(Unanswered::Garbage)?;
        if answer.v != VERSION {
            return Err(Unanswered::Version { node: answer.v });
        }
        match answer.body {
            Body::Accepted(_) => (accepted, limit) = (true, patience.answered),
            Body::Result(value) => return Ok(Ok(value)),
            Body::Error(error) => return Ok(Err(error)),
        }
    }
}

/// Connects, without ever hanging in a full backlog.
fn reach(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    loop {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            // The backlog is full: somebody lives there, and is busy.
            Err(nix::Error::EAGAIN) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

fn write_until(mut stream: &UnixStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(remaining(deadline)?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The lines of a stream, none longer than a bound.
#[derive(Debug)]
pub struct Lines<'a> {
    stream: &'a UnixStream,
    buffer: Vec<u8>,
    limit: usize,
}

impl<'a> Lines<'a> {
    /// The lines of `stream`, up to `limit` bytes each.
    pub const fn new(stream: &'a UnixStream, limit: usize) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            limit,
        }
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// `TimedOut` after the deadline, `UnexpectedEof` where the peer is gone, `InvalidData` for a line too long.
    pub fn next(&mut self, deadline: Option<Instant>) -> io::Result<Vec<u8>> {
        let mut searched = 0;
        loop {
            if let Some(at) = self
                .buffer
                .iter()
                .skip(searched)
                .position(|byte| *byte == b'\n')
            {
                let rest = self.buffer.split_off(searched + at + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                return Ok(line);
            }
            searched = self.buffer.len();
            if searched > self.limit {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    "the line is too long",
                ));
            }
            self.stream
                .set_read_timeout(deadline.map(remaining).transpose()?)?;
            let mut chunk = [0; 8192];
            let mut stream = self.stream;
            match stream.read(&mut chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.buffer.extend(chunk.iter().take(read)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Says `body` on `stream`, within a bound.
///
/// # Errors
/// If the peer is gone or does not read.
pub fn answer(stream: &UnixStream, body: Body) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Answer::new(body))?;
    line.push(b'\n');
    write_until(stream, &line, Instant::now() + Duration::from_secs(5))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patience(millis: u64) -> Patience {
        let accepted = Duration::from_millis(millis);
        Patience {
            accepted,
            answered: 2 * accepted,
        }
    }

    fn request() -> Request {
        let env = Environment::read(|name| (name == "CNI_COMMAND").then(|| "STATUS".into()));
        let config =
            Config::parse(br#"{"cniVersion":"1.1.0","name":"n","type":"sluice-cni"}"#).unwrap();
        Request::new(&env.unwrap(), &config)
    }

    fn node(script: impl FnOnce(UnixStream) + Send + 'static) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        thread::spawn(move || script(listener.accept().unwrap().0));
        (dir, path)
    }

    #[test]
    fn an_answer_in_pieces_is_one_answer() {
        let (_dir, path) = node(|mut stream| {
            let line = Lines::new(&stream, LINE).next(None).unwrap();
            let got: Request = serde_json::from_slice(&line).unwrap();
            assert_eq!(got, request());
            for piece in [
                r#"{"v":1,"accepted":true}"#,
                "\n{\"v\":1,",
                "\"result\":5}\n",
            ] {
                stream.write_all(piece.as_bytes()).unwrap();
            }
        });
        assert_eq!(
            call(&path, &request(), patience(5000)).unwrap().unwrap(),
            Value::from(5)
        );
    }

    #[test]
    fn a_node_that_hangs_speaks_garbage_or_another_version_is_no_answer() {
        let nobody = call(Path::new("/nonexistent/cni.sock"), &request(), patience(10));
        assert!(matches!(nobody, Err(Unanswered::Unreachable { .. })));
        let (_dir, path) = node(|stream| {
            let _until_the_peer_is_gone = Lines::new(&stream, 0).next(None);
            let _until_the_peer_is_gone = Lines::new(&stream, usize::MAX).next(None);
        });
        let hanging = call(&path, &request(), patience(30));
        assert!(
            matches!(hanging, Err(Unanswered::NotAccepted(_))),
            "{hanging:?}"
        );
        let says = |text: &'static str| {
            let (_dir, path) = node(move |mut stream| {
                let _request = Lines::new(&stream, LINE).next(None);
                stream.write_all(text.as_bytes()).unwrap();
            });
            call(&path, &request(), patience(5000)).unwrap_err()
        };
        assert!(matches!(says("what?\n"), Unanswered::Garbage(_)));
        assert!(matches!(
            says("{\"v\":1,\"accepted\":true}\n"),
            Unanswered::Broken(_)
        ));
        let other = says("{\"v\":7,\"result\":null}\n");
        assert!(
            other.to_string().contains('7') && other.to_string().contains('1'),
            "{other}"
        );
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let (a, mut b) = UnixStream::pair().unwrap();
        b.write_all(&[b'x'; 64]).unwrap();
        let error = Lines::new(&a, 32).next(None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
    }
}
