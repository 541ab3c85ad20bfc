//! Requests and answers over HTTP/1.1.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Result, Write};
use std::net::TcpStream;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::objects::patch;
use super::rbac::Right;
use super::{Fault, Heard, State};

/// One request.
struct Request {
    heard: Heard,
    token: Option<String>,
    body: Vec<u8>,
}

impl Request {
    /// `None`: the connection has ended.
    fn read(reader: &mut impl BufRead) -> Result<Option<Self>> {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let (mut header, mut length) = (String::from("-"), 0);
        let (mut agent, mut token) = (String::new(), None);
        while !header.trim().is_empty() {
            header.clear();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match name.to_lowercase().as_str() {
                "content-length" => length = value.parse().unwrap(),
                "user-agent" => agent = value.to_owned(),
                "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let mut words = line.split(' ').map(str::to_owned);
        let heard = Heard {
            at: Instant::now(),
            method: words.next().unwrap(),
            target: words.next().unwrap(),
            agent,
        };
        Ok(Some(Self { heard, token, body }))
    }

    fn path(&self) -> &str {
        let target = &self.heard.target;
        target.split_once('?').map_or(target, |(path, _)| path)
    }

    fn parameter(&self, key: &str) -> Option<&str> {
        let (_, query) = self.heard.target.split_once('?')?;
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(it, _)| *it == key).map(|(_, value)| value)
    }

    fn right(&self) -> Right {
        let is_watch = self.parameter("watch").is_some();
        Right::of(&self.heard.method, self.path(), is_watch)
    }
}

/// An error as the server words it.
pub(super) fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "status": "Failure", "code": code, "message": message})
}

/// Answers the requests of one connection.
pub(super) fn serve(shared: &(Mutex<State>, Condvar), stream: &TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(request) = Request::read(&mut reader)? {
        let mut state = awake(shared, shared.0.lock().unwrap());
        if state.away {
            state.knocks += 1;
            return Ok(());
        }
        state.requests.push(request.heard.clone());
        let target = &request.heard.target;
        let at = state
            .faults
            .iter()
            .position(|(what, _)| target.contains(what));
        let fault = at.and_then(|at| state.faults.remove(at));
        let fault = fault.map(|(_, fault)| fault);
        let refused = refusal(&mut state, &request);
        drop(state);
        match (&fault, refused) {
            (Some(Fault::Drop), _) => return Ok(()),
            (Some(Fault::Status(code, header)), _) => answer(stream, *code, header, "{}", false)?,
            (_, Some((code, reason))) => {
                let body = status(code, &reason).to_string();
                answer(stream, code, "", &body, false)?;
            }
            (fault, None) => {
                if handle(shared, stream, &request, fault.as_ref())? {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// Why a request is not even looked at, in the real server's order.
fn refusal(state: &mut State, request: &Request) -> Option<(u16, String)> {
    if state.token.is_some() && request.token != state.token {
        return Some((401, "Unauthorized".into()));
    }
    let right = request.right();
    let is_allowed = !state.starts
        && !state.forbidden.iter().any(|it| request.path() == *it)
        && state.rules.as_ref().is_none_or(|it| right.is_in(it));
    if !is_allowed {
        let reason = format!("cannot {right}");
        if !state.starts {
            state.denied.insert(right);
        }
        return Some((403, reason));
    }
    state.used.insert(right);
    let is_unknown = state
        .unknown
        .iter()
        .any(|it| request.path().starts_with(it));
    is_unknown.then(|| (404, "404 page not found".into()))
}

/// Answers a request that is allowed. Whether the connection is over.
fn handle(
    shared: &(Mutex<State>, Condvar),
    stream: &TcpStream,
    request: &Request,
    fault: Option<&Fault>,
) -> Result<bool> {
    let path = request.path();
    if request.parameter("watch").is_some() {
        let from = request.parameter("resourceVersion").unwrap();
        let from = from.parse().unwrap();
        return watch(shared, stream, path, from, fault).map(|()| true);
    }
    if fault == Some(&Fault::Garbage) {
        return answer(stream, 200, "", "{\"items\": 7", false).map(|()| false);
    }
    let mut state = shared.0.lock().unwrap();
    let (code, body) = if request.parameter("limit").is_some() {
        let from: usize = request
            .parameter("continue")
            .map_or(0, |it| it.parse().unwrap());
        (200, list(&state, path, from))
    } else {
        let change = (!request.body.is_empty()).then(|| {
            let change: Value = serde_json::from_slice(&request.body).unwrap();
            change
        });
        patch(&mut state, path, change)
    };
    drop(state);
    shared.1.notify_all();
    let is_slow = fault == Some(&Fault::Slow);
    answer(stream, code, "", &body.to_string(), is_slow).map(|()| false)
}

fn list(state: &State, path: &str, from: usize) -> Value {
    let empty = BTreeMap::new();
    let objects = state.objects.get(path).unwrap_or(&empty);
    let items: Vec<&Value> = objects.values().skip(from).take(state.page).collect();
    let next = if from + items.len() < objects.len() {
        (from + items.len()).to_string()
    } else {
        String::new()
    };
    json!({"kind": "List", "metadata": {"resourceVersion": state.version.to_string(), "continue": next}, "items": items})
}

fn answer(mut stream: &TcpStream, code: u16, header: &str, body: &str, slow: bool) -> Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {code} Any\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{header}\r\n"
    )?;
    let size = if slow { 40 } else { length.max(1) };
    for piece in body.as_bytes().chunks(size) {
        stream.write_all(piece)?;
        if slow {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}

fn chunk(mut stream: &TcpStream, text: &str) -> Result<()> {
    write!(stream, "{:x}\r\n{text}\r\n", text.len())
}

fn watch(
    shared: &(Mutex<State>, Condvar),
    mut stream: &TcpStream,
    path: &str,
    mut from: u64,
    fault: Option<&Fault>,
) -> Result<()> {
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )?;
    let expired = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}});
    match fault {
        Some(Fault::Garbage) => {
            chunk(stream, "{]\n")?;
            return write!(stream, "0\r\n\r\n");
        }
        Some(Fault::Expired) => return chunk(stream, &format!("{expired}\n")),
        _ => {}
    }
    let end = Instant::now() + Duration::from_secs(60);
    let mut state = shared.0.lock().unwrap();
    let cuts = state.cuts;
    loop {
        state = awake(shared, state);
        if state.away {
            return Ok(());
        }
        if state.cuts > cuts {
            return write!(stream, "0\r\n\r\n");
        }
        if from < state.oldest {
            return chunk(stream, &format!("{expired}\n"));
        }
        let news = state
            .history
            .iter()
            .find(|(version, of, _)| *version > from && of == path);
        if let Some((version, _, event)) = news {
            let line = format!("{event}\n");
            from = *version;
            if fault == Some(&Fault::HalfEvent) {
                chunk(stream, &line[..line.len() / 2])?;
                return Ok(());
            }
            chunk(stream, &line)?;
            state.sent.insert(path.into(), from);
            shared.1.notify_all();
            continue;
        }
        if state.stopped || Instant::now() > end {
            return write!(stream, "0\r\n\r\n");
        }
        (state, _) = shared
            .1
            .wait_timeout(state, Duration::from_millis(100))
            .unwrap();
    }
}

/// Waits as long as the server hangs.
fn awake<'a>(
    shared: &'a (Mutex<State>, Condvar),
    mut state: MutexGuard<'a, State>,
) -> MutexGuard<'a, State> {
    while state.hangs && !state.stopped {
        state = shared.1.wait(state).unwrap();
    }
    state
}
