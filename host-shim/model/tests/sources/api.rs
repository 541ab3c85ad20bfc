//! A small API server: lists and watches over HTTP/1.1, as the real one speaks, and every fault that is asked of it.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What goes wrong with the next request that fits.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fault {
    /// The connection ends before an answer.
    Drop,
    Status(u16, &'static str),
    /// Whatever else: this as the answer, or as a line of the watch.
    Garbage,
    /// The next event is cut off in the middle, and with it the connection.
    HalfEvent,
    /// The answer comes a few bytes at a time.
    Slow,
    /// A watch that begins well and then says 410.
    Expired,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By path (`/api/v1/pods`), then `namespace/name`.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    history: Vec<(u64, String, Value)>,
    /// What happened before is forgotten.
    oldest: u64,
    faults: VecDeque<(&'static str, Fault)>,
    requests: Vec<String>,
    /// Kinds that this server does not have.
    unknown: Vec<&'static str>,
    stopped: bool,
    /// Every connection ends without a word.
    away: bool,
    page: usize,
    /// Watches that began before the latest cut end.
    cuts: u64,
    /// The last version that was told to a watch of each kind.
    told: BTreeMap<String, u64>,
}

/// The server. Ends with the test.
pub(crate) struct Api {
    shared: Arc<(Mutex<State>, Condvar)>,
    pub(crate) address: SocketAddr,
}

impl Api {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            version: 100,
            page: 2,
            ..State::default()
        };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let server = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if server.0.lock().unwrap().stopped {
                    return;
                }
                let server = server.clone();
                // A client that goes away in the middle is no concern of the server.
                std::thread::spawn(move || drop(serve(&server, &stream.unwrap())));
            }
        });
        Self { shared, address }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let done = work(&mut self.shared.0.lock().unwrap());
        self.shared.1.notify_all();
        done
    }

    pub(crate) fn put(&self, path: &str, object: &Value) {
        self.with(|state| {
            let mut object = object.clone();
            state.version += 1;
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            let name = name(&object);
            let former = state
                .objects
                .entry(path.into())
                .or_default()
                .insert(name, object.clone());
            let kind = if former.is_some() {
                "MODIFIED"
            } else {
                "ADDED"
            };
            state.history.push((
                state.version,
                path.into(),
                json!({"type": kind, "object": object}),
            ));
        });
    }

    pub(crate) fn delete(&self, path: &str, name: &str) {
        self.with(|state| {
            state.version += 1;
            let object = state
                .objects
                .entry(path.into())
                .or_default()
                .remove(name)
                .unwrap();
            state.history.push((
                state.version,
                path.into(),
                json!({"type": "DELETED", "object": object}),
            ));
        });
    }

    /// Changes the state without telling any watch, and forgets all history.
    pub(crate) fn rewrite(&self, path: &str, objects: &[Value]) {
        self.with(|state| {
            state.version += 1;
            let objects = objects.iter().map(|it| (name(it), it.clone())).collect();
            state.objects.insert(path.into(), objects);
            state.oldest = state.version;
            state.history.clear();
        });
    }

    /// Tells all watches of a kind how far they are.
    pub(crate) fn bookmark(&self, path: &str) {
        self.with(|state| {
            state.version += 1;
            let object = json!({"metadata": {"resourceVersion": state.version.to_string()}});
            state.history.push((
                state.version,
                path.into(),
                json!({"type": "BOOKMARK", "object": object}),
            ));
        });
    }

    /// Once all watches of a kind know how far they are, history before that is forgotten and they are cut off.
    pub(crate) fn forget_and_cut(&self, path: &str) {
        let mut state = self.shared.0.lock().unwrap();
        while state.told.get(path) != Some(&state.version) {
            state = self.shared.1.wait(state).unwrap();
        }
        state.oldest = state.version;
        state.history.clear();
        state.cuts += 1;
        self.shared.1.notify_all();
    }

    /// From now on nobody is answered, and watches break off; or all is well again.
    pub(crate) fn go_away(&self, away: bool) {
        self.with(|state| state.away = away);
    }

    /// The next request whose line contains `what` meets this fault.
    pub(crate) fn fail(&self, what: &'static str, fault: Fault) {
        self.with(|state| state.faults.push_back((what, fault)));
    }

    pub(crate) fn lacks(&self, path: &'static str) {
        self.with(|state| state.unknown.push(path));
    }

    pub(crate) fn faults_left(&self) -> usize {
        self.with(|state| state.faults.len())
    }

    pub(crate) fn object(&self, path: &str, name: &str) -> Value {
        self.with(|state| state.objects[path][name].clone())
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.with(|state| state.requests.clone())
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.with(|state| state.stopped = true);
        // Wakes the listener so that it sees that.
        drop(TcpStream::connect(self.address));
    }
}

fn name(object: &Value) -> String {
    let text = |field: &str| {
        object["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    format!("{}/{}", text("namespace"), text("name"))
}

fn serve(shared: &(Mutex<State>, Condvar), stream: &TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut header = String::from("-");
        let mut length = 0;
        while !header.trim().is_empty() {
            header.clear();
            reader.read_line(&mut header)?;
            let lower = header.to_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let target = line.split(' ').nth(1).unwrap().to_owned();
        let fault = {
            let mut state = shared.0.lock().unwrap();
            if state.away {
                return Ok(());
            }
            state.requests.push(target.clone());
            let at = state
                .faults
                .iter()
                .position(|(what, _)| target.contains(what));
            at.and_then(|at| state.faults.remove(at))
                .map(|(_, fault)| fault)
        };
        if line.starts_with("PATCH ") && target.ends_with("/status") {
            match fault {
                Some(Fault::Status(code, header)) => answer(stream, code, header, "{}", false)?,
                Some(_) => return Ok(()),
                None => answer(stream, merge(shared, &target, &body), "", "{}", false)?,
            }
            continue;
        }
        let Some((path, query)) = target.split_once('?') else {
            match fault {
                Some(Fault::Drop) => return Ok(()),
                Some(Fault::Status(code, header)) => answer(stream, code, header, "{}", false)?,
                _ => {
                    let patch = (!body.is_empty()).then(|| serde_json::from_slice(&body).unwrap());
                    let (code, object) = one(&mut shared.0.lock().unwrap(), &target, patch);
                    shared.1.notify_all();
                    answer(stream, code, "", &object.to_string(), false)?;
                }
            }
            continue;
        };
        let parameter = |key: &str| {
            let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs
                .find(|(it, _)| *it == key)
                .map(|(_, value)| value.to_owned())
        };
        let unknown = shared.0.lock().unwrap().unknown.contains(&path);
        match fault {
            Some(Fault::Drop) => return Ok(()),
            Some(Fault::Status(code, header)) => answer(stream, code, header, "{}", false)?,
            _ if unknown => answer(stream, 404, "", "{}", false)?,
            fault if parameter("watch").is_some() => {
                let from = parameter("resourceVersion").unwrap().parse().unwrap();
                return watch(shared, stream, path, from, fault.as_ref());
            }
            Some(Fault::Garbage) => answer(stream, 200, "", "{\"items\": 7", false)?,
            fault => {
                let from: usize = parameter("continue").map_or(0, |it| it.parse().unwrap());
                let list = list(&shared.0.lock().unwrap(), path, from);
                answer(
                    stream,
                    200,
                    "",
                    &list.to_string(),
                    fault == Some(Fault::Slow),
                )?;
            }
        }
    }
}

/// Merges annotations into an object, as a patch of its status does (RFC 7386).
fn merge(shared: &(Mutex<State>, Condvar), target: &str, body: &[u8]) -> u16 {
    let (path, object) = target.trim_end_matches("/status").rsplit_once('/').unwrap();
    let mut state = shared.0.lock().unwrap();
    let objects = state.objects.entry(path.into()).or_default();
    let Some(object) = objects.get_mut(&format!("/{object}")) else {
        return 404;
    };
    let patch: Value = serde_json::from_slice(body).unwrap();
    for (name, value) in patch["metadata"]["annotations"].as_object().unwrap() {
        let annotations = &mut object["metadata"]["annotations"];
        if value.is_null() {
            annotations.as_object_mut().map(|all| all.remove(name));
        } else {
            annotations[name] = value.clone();
        }
    }
    let object = object.clone();
    state.version += 1;
    let event = json!({"type": "MODIFIED", "object": object});
    let version = state.version;
    state.history.push((version, path.into(), event));
    drop(state);
    shared.1.notify_all();
    200
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

/// One object without a namespace: as it is, or with its taints changed by whoever knows its version.
fn one(state: &mut State, target: &str, patch: Option<Value>) -> (u16, Value) {
    let refused = |code: u16, reason: &str| {
        let status = json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason});
        (code, status)
    };
    let (path, name) = target.rsplit_once('/').unwrap();
    let name = format!("/{name}");
    let Some(mut object) = state
        .objects
        .get(path)
        .and_then(|all| all.get(&name))
        .cloned()
    else {
        return refused(404, "NotFound");
    };
    let Some(patch) = patch else {
        return (200, object);
    };
    if patch["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] {
        return refused(409, "Conflict");
    }
    state.version += 1;
    object["metadata"]["resourceVersion"] = json!(state.version.to_string());
    object["spec"]["taints"] = patch["spec"]["taints"].clone();
    let all = state.objects.entry(path.into()).or_default();
    all.insert(name, object.clone());
    let event = json!({"type": "MODIFIED", "object": object});
    state.history.push((state.version, path.into(), event));
    (200, object)
}

fn answer(
    mut stream: &TcpStream,
    code: u16,
    header: &str,
    body: &str,
    slow: bool,
) -> std::io::Result<()> {
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

fn chunk(mut stream: &TcpStream, text: &str) -> std::io::Result<()> {
    write!(stream, "{:x}\r\n{text}\r\n", text.len())
}

fn watch(
    shared: &(Mutex<State>, Condvar),
    mut stream: &TcpStream,
    path: &str,
    mut from: u64,
    fault: Option<&Fault>,
) -> std::io::Result<()> {
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
            state.told.insert(path.into(), from);
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
