//! The Kubernetes API: each kind is listed once and then watched.
//!
//! A watch that ends is resumed where it ended; bookmarks keep that place fresh. If the server has forgotten it (410), or what it
//! sends makes no sense, the kind is listed again, and what is not in the list is gone. Failures are waited out, longer each time,
//! with jitter, or as long as the server asks for; what is known stays in force meanwhile.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use http::{Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};

use super::announce::{self, Announcer, Writer};
use super::lines::Lines;
use super::{Running, Source};
use crate::finding::{Finding, Severity};
use crate::object::{Kind, Name, Object, ObjectKey};
use crate::store::Event;
use crate::validate::admit_as;

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// The longest answer that is read: a page of large objects.
const ANSWER: usize = 64 << 20;
/// Services and slices that other proxies or nobody serves are none of ours.
const SERVED: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
/// Pods that have ended have given their addresses back.
const LIVING: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// After the first failure; doubled with each one that follows.
    pub first: Duration,
    /// At most.
    pub most: Duration,
    /// The server ends a watch after this time; one that is silent for so long and a little more is dead.
    pub watch: Duration,
    /// For the next bytes of an answer.
    pub answer: Duration,
    /// How often it is looked whether a kind that the server does not have is there now.
    pub missing: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            most: Duration::from_secs(30),
            watch: Duration::from_secs(290),
            answer: Duration::from_secs(30),
            missing: Duration::from_secs(60),
        }
    }
}

/// The API server.
#[derive(Debug)]
pub struct Kubernetes {
    access: Access,
    patience: Patience,
    writer: Option<Writer>,
}

/// Whose credentials are used.
#[derive(Debug)]
pub(crate) enum Access {
    /// In a pod: its service account. Else `KUBECONFIG` or `~/.kube/config`.
    Infer,
    File(PathBuf),
    Given(Box<Config>),
}

impl Kubernetes {
    /// With the credentials of this pod, or of this user.
    pub fn infer() -> Self {
        Self {
            access: Access::Infer,
            patience: Patience::default(),
            writer: None,
        }
    }

    /// With the credentials of a kubeconfig.
    pub fn kubeconfig(path: impl Into<PathBuf>) -> Self {
        Self {
            access: Access::File(path.into()),
            patience: Patience::default(),
            writer: None,
        }
    }

    pub fn new(config: Config) -> Self {
        Self {
            access: Access::Given(Box::new(config)),
            patience: Patience::default(),
            writer: None,
        }
    }

    /// Writes annotations of the Node object of that name, too, as the announcer says.
    #[must_use]
    pub fn announcing(mut self, node: &str) -> (Self, Announcer) {
        let (announcer, writer) = announce::pair(node);
        self.writer = Some(writer);
        (self, announcer)
    }

    pub(crate) fn access(&self) -> &Access {
        &self.access
    }

    pub(crate) fn patience(&self) -> Patience {
        self.patience
    }

    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }
}

impl Source for Kubernetes {
    fn start(self, events: Sender<Event>) -> io::Result<Running> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("kubernetes".into())
            .spawn(move || {
                let local = LocalSet::new();
                local.block_on(&runtime, async move {
                    tokio::select! {
                        () = follow(self, events) => {}
                        // An error says that the other half is gone, which means the same.
                        _ = stopped => {}
                    }
                });
            })?;
        let stop = move || {
            // If nobody listens the thread has ended already.
            let _ = stop.send(());
        };
        Ok(Running::new(stop, thread))
    }
}

/// What the watchers of all kinds share.
struct Common {
    client: Client,
    patience: Patience,
    events: Sender<Event>,
    /// Kinds that have not been listed yet, and kinds that fail at the moment.
    missing: RefCell<HashSet<Kind>>,
    failing: RefCell<HashSet<Kind>>,
}

/// Nobody listens any more.
struct Ended;

/// Why a list or watch did not go on.
enum Failure {
    Ended,
    /// The place in history is gone: list again.
    Expired,
    /// There is no such kind, or, if so, it may not be read.
    Unknown {
        forbidden: bool,
    },
    /// Try again, after this time if the server says so.
    Passing(String, Option<Duration>),
}

impl From<Ended> for Failure {
    fn from(Ended: Ended) -> Self {
        Self::Ended
    }
}

async fn follow(source: Kubernetes, events: Sender<Event>) {
    let mut back_off = BackOff::new(source.patience);
    let client = loop {
        match connect(&source.access).await {
            Ok(client) => break client,
            Err(reason) => {
                if events.send(Event::Lost { reason }).is_err() {
                    return;
                }
                sleep(back_off.next()).await;
            }
        }
    };
    let common = Rc::new(Common {
        client,
        patience: source.patience,
        events,
        missing: RefCell::new(Kind::ALL.into_iter().collect()),
        failing: RefCell::default(),
    });
    let mut tasks = JoinSet::new();
    if let Some(writer) = source.writer {
        tasks.spawn_local(writer.run(common.client.clone(), source.patience));
    }
    for kind in Kind::ALL {
        let common = common.clone();
        tasks.spawn_local(async move { Watcher::new(kind, common).run().await });
    }
    // The first that ends has nobody to talk to; nor have the others.
    tasks.join_next().await;
}

pub(crate) async fn connect(access: &Access) -> Result<Client, String> {
    let mut config = match access {
        Access::Infer => Config::infer().await.map_err(|it| it.to_string())?,
        Access::File(path) => {
            let file = Kubeconfig::read_from(path).map_err(|it| it.to_string())?;
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(file, &options).await;
            config.map_err(|it| it.to_string())?
        }
        Access::Given(config) => (**config).clone(),
    };
    // Failures are counted and waited out here.
    config.default_retry = false;
    config.read_timeout = None;
    Client::try_from(config).map_err(|it| it.to_string())
}

struct Watcher {
    kind: Kind,
    common: Rc<Common>,
    back_off: BackOff,
    /// Where to resume; `None`: list first.
    place: Option<String>,
    /// Answers in a row that made no sense.
    nonsense: u32,
    has_listed: bool,
    /// It was said that the server does not have this kind.
    is_unknown: bool,
}

impl Watcher {
    fn new(kind: Kind, common: Rc<Common>) -> Self {
        Self {
            kind,
            back_off: BackOff::new(common.patience),
            common,
            place: None,
            nonsense: 0,
            has_listed: false,
            is_unknown: false,
        }
    }

    async fn run(mut self) {
        loop {
            let done = match self.place.clone() {
                None => self.list().await,
                Some(place) => self.watch(&place).await,
            };
            let pause = match done {
                Ok(()) => continue,
                Err(Failure::Ended) => return,
                Err(Failure::Expired) => {
                    self.place = None;
                    // A server that forgets at once is not asked without end.
                    self.back_off.next()
                }
                Err(Failure::Unknown { forbidden }) => {
                    self.place = None;
                    if self.go_without(forbidden).is_err()
                        || self.listed(Vec::new(), BTreeSet::new()).is_err()
                    {
                        return;
                    }
                    self.common.patience.missing
                }
                Err(Failure::Passing(reason, asked)) => {
                    let reason = format!("{}: {reason}", self.kind.plural());
                    self.common.failing.borrow_mut().insert(self.kind);
                    if self.send(Event::Lost { reason }).is_err() {
                        return;
                    }
                    asked.unwrap_or_default().max(self.back_off.next())
                }
            };
            sleep(pause).await;
        }
    }

    fn send(&self, event: Event) -> Result<(), Ended> {
        self.common.events.send(event).map_err(|_| Ended)
    }

    /// All is well with this kind; if it is with all, say so.
    fn well(&mut self) -> Result<(), Ended> {
        let was_missing = self.common.missing.borrow_mut().remove(&self.kind);
        let was_failing = self.common.failing.borrow_mut().remove(&self.kind);
        let all =
            self.common.missing.borrow().is_empty() && self.common.failing.borrow().is_empty();
        if (was_missing || was_failing) && all {
            return self.send(Event::InSync);
        }
        Ok(())
    }

    fn listed(&mut self, objects: Vec<Object>, refused: BTreeSet<Name>) -> Result<(), Ended> {
        let kind = self.kind;
        self.send(Event::Listed {
            kind,
            objects,
            refused,
        })?;
        self.back_off.reset();
        self.well()
    }

    async fn list(&mut self) -> Result<(), Failure> {
        let (mut objects, mut refused) = (Vec::new(), BTreeSet::new());
        let mut token = String::new();
        loop {
            let uri = self.uri(&[("limit", &PAGE.to_string()), ("continue", &token)]);
            let page: List =
                parse(&read(self.ask(uri).await?, self.common.patience.answer).await?)?;
            for item in page.items {
                match self.admit(item)? {
                    (_, Some(object)) => objects.push(object),
                    (Some(name), None) => {
                        refused.insert(name);
                    }
                    (None, None) => {}
                }
            }
            token = page.metadata.next.unwrap_or_default();
            if token.is_empty() {
                // Any version will do for a server that does not tell.
                self.place = page.metadata.resource_version.or(Some("0".to_owned()));
                break;
            }
        }
        self.has_listed = true;
        if std::mem::replace(&mut self.is_unknown, false) {
            tracing::info!(kind = %self.kind, "the API server has this kind now");
            self.note_kind(Vec::new())?;
        }
        self.listed(objects, refused)?;
        Ok(())
    }

    /// The server does not have this kind, which is said once.
    fn go_without(&mut self, forbidden: bool) -> Result<(), Ended> {
        let (kind, plural, version) = (self.kind, self.kind.plural(), self.kind.api_version());
        if !std::mem::replace(&mut self.is_unknown, true) {
            tracing::info!(%kind, version, forbidden, "the API server does not have this kind, the node goes on without");
        }
        let finding = forbidden.then(|| Finding {
            file: None,
            line: 0,
            severity: Severity::Warning,
            object: kind.name().to_owned(),
            field: String::new(),
            reason: format!(
                "The server forbids to read them, so there are none here: the node's role needs get, list and watch of {plural} ({version})"
            ),
        });
        self.note_kind(finding.into_iter().collect())
    }

    /// What is wrong with the kind as a whole.
    fn note_kind(&self, findings: Vec<Finding>) -> Result<(), Ended> {
        let place = self.kind.plural().to_owned();
        self.send(Event::Findings { place, findings })
    }

    /// Follows from a place until the server ends the watch.
    async fn watch(&mut self, place: &str) -> Result<(), Failure> {
        let patience = self.common.patience;
        let seconds = patience.watch.as_secs().max(1).to_string();
        let uri = self.uri(&[
            ("watch", "1"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", place),
            ("timeoutSeconds", &seconds),
        ]);
        let mut body = self.ask(uri).await?.into_body();
        let mut lines = Lines::default();
        let mut has_spoken = false;
        self.well()?;
        let silence = patience.watch + patience.answer;
        loop {
            let frame = match timeout(silence, body.frame()).await {
                Err(_) => return Err(passing("The watch is silent")),
                // The rest of a line that was cut off is in the next watch again.
                Ok(None) if has_spoken => return Ok(()),
                Ok(None) => {
                    sleep(self.back_off.next()).await;
                    return Ok(());
                }
                Ok(Some(Err(error))) => return Err(passing(&error.to_string())),
                Ok(Some(Ok(frame))) => frame,
            };
            let Ok(bytes) = frame.into_data() else {
                continue;
            };
            if !lines.push(&bytes) {
                return Err(passing("The watch sends a line without end"));
            }
            while let Some(line) = lines.next() {
                self.notice(&line)?;
                has_spoken = true;
            }
        }
    }

    /// One line of a watch.
    fn notice(&mut self, line: &[u8]) -> Result<(), Failure> {
        let Ok(notice) = serde_json::from_slice::<Notice>(line) else {
            self.nonsense += 1;
            if self.nonsense > 2 {
                self.nonsense = 0;
                return Err(Failure::Expired);
            }
            return Err(passing("The watch sends what is no event"));
        };
        let version = notice.object.pointer("/metadata/resourceVersion");
        let version = version.and_then(Value::as_str).map(str::to_owned);
        match notice.kind.as_str() {
            "ADDED" | "MODIFIED" => {
                if let (_, Some(object)) = self.admit(notice.object)? {
                    self.send(Event::Put(object))?;
                }
            }
            "DELETED" => {
                if let Some(name) = self.name(&notice.object) {
                    let kind = self.kind;
                    self.found(&name, Vec::new())?;
                    self.send(Event::Removed(ObjectKey { kind, name }))?;
                }
            }
            "BOOKMARK" => {}
            "ERROR" => {
                let code = notice.object.get("code").and_then(Value::as_u64);
                if code == Some(410) {
                    return Err(Failure::Expired);
                }
                let message = notice.object.get("message").and_then(Value::as_str);
                return Err(passing(message.unwrap_or("The watch failed")));
            }
            _ => {}
        }
        self.nonsense = 0;
        self.back_off.reset();
        if version.is_some() {
            self.place = version;
        }
        Ok(())
    }

    /// Validates an object; its name, as far as it has one, and itself if it is good.
    fn admit(&self, value: Value) -> Result<(Option<Name>, Option<Object>), Ended> {
        let admission = admit_as(self.kind, value);
        let name = admission.key.map(|(_, name)| name);
        if let Some(name) = &name {
            self.found(name, admission.findings)?;
        }
        Ok((name, admission.object))
    }

    fn found(&self, name: &Name, findings: Vec<Finding>) -> Result<(), Ended> {
        let place = format!("{} {name}", self.kind);
        self.send(Event::Findings { place, findings })
    }

    fn name(&self, object: &Value) -> Option<Name> {
        let text = |field: &str| object.pointer(field).and_then(Value::as_str);
        let namespace = text("/metadata/namespace").filter(|_| self.kind.is_namespaced());
        Some(Name::new(
            namespace.unwrap_or_default(),
            text("/metadata/name")?,
        ))
    }

    fn uri(&self, parameters: &[(&str, &str)]) -> String {
        let version = self.kind.api_version();
        let root = if version.contains('/') { "apis" } else { "api" };
        let mut uri = format!("/{root}/{version}/{}?", self.kind.plural());
        let selector = match self.kind {
            Kind::Pod => ("fieldSelector", LIVING),
            Kind::Service | Kind::EndpointSlice => ("labelSelector", SERVED),
            _ => ("", ""),
        };
        for (key, value) in parameters.iter().chain([&selector]) {
            if !value.is_empty() {
                uri += &format!("{key}={}&", escape(value));
            }
        }
        uri.pop();
        uri
    }

    async fn ask(&self, uri: String) -> Result<Response<Body>, Failure> {
        let request = Request::get(uri)
            .header(header::ACCEPT, "application/json")
            .body(Body::empty())
            .map_err(|error| passing(&error.to_string()))?;
        let answer = timeout(
            self.common.patience.answer,
            self.common.client.send(request),
        )
        .await;
        let answer = answer.map_err(|_| passing("No answer"))?;
        let answer = answer.map_err(|error| passing(&error.to_string()))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let asked = answer.headers().get(header::RETRY_AFTER);
        let asked = asked
            .and_then(|it| it.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        Err(match status {
            StatusCode::GONE => Failure::Expired,
            StatusCode::NOT_FOUND => Failure::Unknown { forbidden: false },
            // A server that does not have a kind says so to those alone who may read it. What was read once stays.
            StatusCode::FORBIDDEN if self.kind == Kind::NodePolicy && !self.has_listed => {
                Failure::Unknown { forbidden: true }
            }
            _ => Failure::Passing(format!("The server answers {status}"), asked),
        })
    }
}

async fn read(answer: Response<Body>, patience: Duration) -> Result<Vec<u8>, Failure> {
    let mut body = answer.into_body();
    let mut bytes = Vec::new();
    loop {
        match timeout(patience, body.frame()).await {
            Err(_) => return Err(passing("The answer does not go on")),
            Ok(None) => return Ok(bytes),
            Ok(Some(Err(error))) => return Err(passing(&error.to_string())),
            Ok(Some(Ok(frame))) => {
                let piece = frame.into_data().unwrap_or_default();
                if bytes.len() + piece.len() > ANSWER {
                    return Err(passing("The answer is too long"));
                }
                bytes.extend_from_slice(&piece);
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Result<List, Failure> {
    serde_json::from_slice(bytes)
        .map_err(|error| passing(&format!("The answer is no list: {error}")))
}

fn passing(reason: &str) -> Failure {
    Failure::Passing(reason.to_owned(), None)
}

/// A value in a query; everything but letters, digits and a few harmless signs by number.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                escaped.push(char::from(byte));
            }
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}

#[derive(Deserialize)]
struct List {
    metadata: ListMeta,
    #[serde(default)]
    items: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    resource_version: Option<String>,
    #[serde(rename = "continue")]
    next: Option<String>,
}

#[derive(Deserialize)]
struct Notice {
    #[serde(rename = "type")]
    kind: String,
    object: Value,
}

/// Longer after each failure, and never the same for two clients.
pub(crate) struct BackOff {
    patience: Patience,
    next: Duration,
}

impl BackOff {
    pub(crate) fn new(patience: Patience) -> Self {
        let next = patience.first;
        Self { patience, next }
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.patience.first;
    }

    /// From half to all of the time that it is now.
    pub(crate) fn next(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.patience.most);
        let random = std::hash::RandomState::new().build_hasher().finish();
        now.mul_f64(0.5 + (random % 1000) as f64 / 2000.0)
    }
}
