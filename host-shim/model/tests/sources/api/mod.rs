//! A small API server: lists and watches over HTTP/1.1, as the real one speaks, and every fault
//! that is asked of it.
//!
//! [`http`] reads requests and answers them in the order of the real server: who asks (401),
//! whether that one may (403, by the rules of a role: [`rbac`]), and whether there is such a thing
//! (404). [`objects`] is what a patch does.

mod http;
mod objects;
mod rbac;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use serde_json::{Value, json};

pub(crate) use self::rbac::Right;

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
    /// A watch that begins well and then sends 410.
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
    requests: Vec<Heard>,
    /// Kinds that this server does not have.
    unknown: Vec<&'static str>,
    stopped: bool,
    /// Every connection ends without a word.
    away: bool,
    /// Requests that ended so.
    knocks: usize,
    /// Nothing is answered, and no watch goes on, until this ends.
    hangs: bool,
    /// Every client is answered 403, as by a server that has just opened its port.
    starts: bool,
    /// The rules of the client's role; without any it may do everything.
    rules: Option<Value>,
    /// What was asked for and allowed by the rules, and what was not allowed.
    used: BTreeSet<Right>,
    denied: BTreeSet<Right>,
    /// Paths that are forbidden whatever the rules allow.
    forbidden: Vec<&'static str>,
    /// The only bearer token that is accepted.
    token: Option<String>,
    page: usize,
    /// Watches that began before the latest cut end.
    cuts: u64,
    /// The last version that was sent to a watch of each kind.
    sent: BTreeMap<String, u64>,
}

/// A request, as far as tests ask for it.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    pub(crate) at: Instant,
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) agent: String,
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
                std::thread::spawn(move || drop(http::serve(&server, &stream.unwrap())));
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

    /// Once all watches of a kind know how far they are, history before that is forgotten and they
    /// are cut off.
    pub(crate) fn forget_and_cut(&self, path: &str) {
        let mut state = self.shared.0.lock().unwrap();
        while state.sent.get(path) != Some(&state.version) {
            state = self.shared.1.wait(state).unwrap();
        }
        state.oldest = state.version;
        state.history.clear();
        state.cuts += 1;
        self.shared.1.notify_all();
    }

    /// From now on nothing is answered, and watches break off; or all is well again.
    pub(crate) fn go_away(&self, away: bool) {
        self.with(|state| state.away = away);
    }

    /// How many requests there were while it was away.
    pub(crate) fn knocks(&self) -> usize {
        self.with(|state| state.knocks)
    }

    /// From now on requests wait and watches are silent; or they go on.
    pub(crate) fn hang(&self, hangs: bool) {
        self.with(|state| state.hangs = hangs);
    }

    /// From now on every client is answered 403, as while a server starts; or it has started.
    pub(crate) fn starting(&self, starts: bool) {
        self.with(|state| state.starts = starts);
    }

    /// The client may do from now on what the `rules` of a role allow, and nothing else.
    pub(crate) fn enforce(&self, rules: Value) {
        self.with(|state| state.rules = Some(rules));
    }

    /// This path is forbidden; or again allowed to clients that have the right.
    pub(crate) fn forbid(&self, path: &'static str, forbidden: bool) {
        self.with(|state| {
            state.forbidden.retain(|it| *it != path);
            if forbidden {
                state.forbidden.push(path);
            }
        });
    }

    /// Only requests with this token are answered.
    pub(crate) fn accept_only(&self, token: &str) {
        self.with(|state| state.token = Some(token.to_owned()));
    }

    /// What clients asked for and were allowed, and what they were not.
    pub(crate) fn rights(&self) -> (BTreeSet<Right>, BTreeSet<Right>) {
        self.with(|state| (state.used.clone(), state.denied.clone()))
    }

    /// The next request whose line contains `what` meets this fault.
    pub(crate) fn fail(&self, what: &'static str, fault: Fault) {
        self.with(|state| state.faults.push_back((what, fault)));
    }

    /// There is no such kind; until it [`appears`](Self::appears).
    pub(crate) fn lacks(&self, path: &'static str) {
        self.with(|state| state.unknown.push(path));
    }

    /// The kind is there from now on.
    pub(crate) fn appears(&self, path: &'static str) {
        self.with(|state| state.unknown.retain(|it| *it != path));
    }

    pub(crate) fn faults_left(&self) -> usize {
        self.with(|state| state.faults.len())
    }

    pub(crate) fn object(&self, path: &str, name: &str) -> Value {
        self.with(|state| state.objects[path][name].clone())
    }

    /// The targets of all requests.
    pub(crate) fn requests(&self) -> Vec<String> {
        let all = self.heard();
        all.into_iter().map(|it| it.target).collect()
    }

    pub(crate) fn heard(&self) -> Vec<Heard> {
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
