//! One kind, listed and then watched.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use serde_json::Value;
use tokio::time::timeout;

use super::absence::{Absence, Verdict};
use super::answer::{List, Notice, parse};
use super::back_off::{BackOff, jittered};
use super::common::{Common, Ended};
use super::request::{Ask, objects_of};
use super::server::Failure;
use crate::finding::{Finding, Severity};
use crate::object::{Kind, Name, Object, ObjectKey};
use crate::source::lines::Lines;
use crate::store::Event;
use crate::validate::admit_as;

/// Objects of one page of a list.
const PAGE: u32 = 500;

/// Why a list or watch did not go on.
enum Stop {
    Ended,
    Failed(Failure),
}

impl From<Ended> for Stop {
    fn from(Ended: Ended) -> Self {
        Self::Ended
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

fn unavailable(reason: impl Into<String>) -> Stop {
    Stop::Failed(Failure::unavailable(reason))
}

fn refused(reason: impl Into<String>) -> Stop {
    Stop::Failed(Failure::refused(reason))
}

pub(super) struct Watcher {
    kind: Kind,
    common: Rc<Common>,
    back_off: BackOff,
    /// Where to resume; `None`: list first.
    place: Option<String>,
    /// Answers in a row that made no sense.
    nonsense: u32,
    /// Objects were read, and what was read is in force.
    has_listed: bool,
    absence: Absence,
    /// The node goes on without this kind, because it is forbidden or (`false`) because the server
    /// does not have it.
    without: Option<bool>,
}

impl Watcher {
    pub(super) fn new(kind: Kind, common: Rc<Common>) -> Self {
        Self {
            kind,
            back_off: BackOff::new(common.server.patience()),
            common,
            place: None,
            nonsense: 0,
            has_listed: false,
            absence: Absence::default(),
            without: None,
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            let done = match self.place.clone() {
                None => self.list().await,
                Some(place) => self.watch(&place).await,
            };
            let done = match done {
                Err(Stop::Failed(failure)) => self.wait_out(failure).await,
                Err(Stop::Ended) => Err(Ended),
                Ok(()) => Ok(()),
            };
            if done.is_err() {
                return;
            }
        }
    }

    /// Waits until it makes sense to try again.
    async fn wait_out(&mut self, failure: Failure) -> Result<(), Ended> {
        let common = self.common.clone();
        let (server, kind) = (&common.server, self.kind);
        if !matches!(failure, Failure::Absent { .. }) {
            self.absence.interrupted();
        }
        match failure {
            Failure::Expired => {
                self.place = None;
                // A server that forgets at once is not asked without end.
                server.pause(self.back_off.next(), None).await;
            }
            Failure::Unavailable(reason, asked) => {
                common.failed(kind, &reason)?;
                server.wait(asked).await;
            }
            Failure::Refused(reason, asked) => {
                common.failed(kind, &reason)?;
                server.pause(self.back_off.next(), asked).await;
            }
            Failure::Absent { forbidden, reason } => {
                let pause = self.absent(forbidden, &reason)?;
                server.pause(pause, None).await;
            }
        }
        Ok(())
    }

    /// The server answers that there is no such kind, or that it may not be read. When to ask
    /// again.
    fn absent(&mut self, forbidden: bool, reason: &str) -> Result<Duration, Ended> {
        let (kind, patience) = (self.kind, self.common.server.patience());
        let verdict =
            self.absence
                .judge(kind, forbidden, self.has_listed, patience, Instant::now());
        if let Verdict::Open(left) = verdict {
            let right = if forbidden {
                "; the node's role needs list and watch of them"
            } else {
                ""
            };
            self.common.failed(kind, &format!("{reason}{right}"))?;
            let pause = self.back_off.next();
            return Ok(left.map_or(pause, |left| pause.min(left)));
        }
        if self.without.replace(forbidden) != Some(forbidden) {
            self.place = None;
            self.has_listed = false;
            self.go_without(forbidden)?;
            self.listed(Vec::new(), BTreeSet::new())?;
        }
        Ok(jittered(patience.missing))
    }

    fn listed(&mut self, objects: Vec<Object>, refused: BTreeSet<Name>) -> Result<(), Ended> {
        let kind = self.kind;
        self.common.send(Event::Listed {
            kind,
            objects,
            refused,
        })?;
        self.back_off.reset();
        self.common.well(kind)
    }

    async fn list(&mut self) -> Result<(), Stop> {
        let common = self.common.clone();
        let (mut objects, mut refused) = (Vec::new(), BTreeSet::new());
        let mut token = String::new();
        loop {
            let parameters = [("limit", &*PAGE.to_string()), ("continue", &token)];
            let ask = Ask::get(objects_of(self.kind, &parameters));
            let answer = common.server.send(&ask).await?;
            let page: List = parse(answer, common.server.patience().answer).await?;
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
                // Any version will do for a server that does not name one.
                self.place = page.metadata.resource_version.or(Some("0".to_owned()));
                break;
            }
        }
        if self.kind == Kind::Node
            && let Some(sight) = &self.common.sight
        {
            let names = objects.iter().map(|it| it.key().name.name);
            sight.listed(names.chain(refused.iter().map(|it| it.name.clone())));
        }
        self.has_listed = true;
        self.absence.over();
        if self.without.take().is_some() {
            tracing::info!(kind = %self.kind, "the API server has this kind now");
            self.note_kind(Vec::new())?;
        }
        self.listed(objects, refused)?;
        Ok(())
    }

    /// There are no such objects for this node.
    fn go_without(&self, forbidden: bool) -> Result<(), Ended> {
        let (kind, plural, version) = (self.kind, self.kind.plural(), self.kind.api_version());
        tracing::info!(%kind, version, forbidden, "the API server does not have this kind, the node goes on without");
        let finding = forbidden.then(|| Finding {
            file: None,
            line: 0,
            severity: Severity::Warning,
            object: kind.name().to_owned(),
            field: String::new(),
            reason: format!(
                "The server forbids to read them, so none is in force here: the node's role needs list and watch of {plural} ({version})"
            ),
        });
        self.note_kind(finding.into_iter().collect())
    }

    /// What is wrong with the kind as a whole.
    fn note_kind(&self, findings: Vec<Finding>) -> Result<(), Ended> {
        let place = self.kind.plural().to_owned();
        self.common.send(Event::Findings { place, findings })
    }

    /// Follows from a place until the server ends the watch.
    async fn watch(&mut self, place: &str) -> Result<(), Stop> {
        let common = self.common.clone();
        let patience = common.server.patience();
        let seconds = patience.watch.as_secs().max(1).to_string();
        let parameters = [
            ("watch", "1"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", place),
            ("timeoutSeconds", &seconds),
        ];
        let ask = Ask::get(objects_of(self.kind, &parameters));
        let mut body = common.server.send(&ask).await?.into_body();
        let began = Instant::now();
        let mut lines = Lines::default();
        let mut has_spoken = false;
        self.absence.interrupted();
        common.well(self.kind)?;
        let silence = patience.watch + patience.answer;
        loop {
            let frame = match timeout(silence, body.frame()).await {
                Err(_) => return Err(unavailable("The watch is silent")),
                // The rest of a line that was cut off is in the next watch again.
                Ok(None) if has_spoken || began.elapsed() > patience.most => return Ok(()),
                Ok(None) => {
                    common.server.pause(self.back_off.next(), None).await;
                    return Ok(());
                }
                Ok(Some(Err(error))) => return Err(unavailable(error.to_string())),
                Ok(Some(Ok(frame))) => frame,
            };
            let Ok(bytes) = frame.into_data() else {
                continue;
            };
            if !lines.push(&bytes) {
                return Err(refused("The watch sends a line without end"));
            }
            while let Some(line) = lines.next() {
                self.notice(&line)?;
                has_spoken = true;
            }
        }
    }

    /// One line of a watch.
    fn notice(&mut self, line: &[u8]) -> Result<(), Stop> {
        let Ok(notice) = serde_json::from_slice::<Notice>(line) else {
            self.nonsense += 1;
            if self.nonsense > 2 {
                self.nonsense = 0;
                return Err(Failure::Expired.into());
            }
            return Err(refused("The watch sends what is no event"));
        };
        let version = notice.object.pointer("/metadata/resourceVersion");
        let version = version.and_then(Value::as_str).map(str::to_owned);
        match notice.kind.as_str() {
            "ADDED" | "MODIFIED" => {
                if let (_, Some(object)) = self.admit(notice.object)? {
                    self.common.send(Event::Put(object))?;
                }
            }
            "DELETED" => {
                if let Some(name) = self.name(&notice.object) {
                    let kind = self.kind;
                    self.found(&name, Vec::new())?;
                    self.common.gone(kind, &name);
                    self.common.send(Event::Removed(ObjectKey { kind, name }))?;
                }
            }
            "ERROR" => {
                let code = notice.object.get("code").and_then(Value::as_u64);
                if code == Some(410) {
                    return Err(Failure::Expired.into());
                }
                let message = notice.object.get("message").and_then(Value::as_str);
                return Err(refused(message.unwrap_or("The watch failed")));
            }
            // BOOKMARK, and what newer servers may send.
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
        if self.kind == Kind::Node
            && let Some(sight) = &self.common.sight
        {
            sight.present(&value);
        }
        let status = (self.kind == Kind::NodePolicy).then(|| value.clone());
        let admission = admit_as(self.kind, value);
        if let Some(object) = status {
            self.common.verdicts.judged(&object, &admission.findings);
        }
        let name = admission.key.map(|(_, name)| name);
        if let Some(name) = &name {
            self.found(name, admission.findings)?;
        }
        Ok((name, admission.object))
    }

    fn found(&self, name: &Name, findings: Vec<Finding>) -> Result<(), Ended> {
        let place = format!("{} {name}", self.kind);
        self.common.send(Event::Findings { place, findings })
    }

    fn name(&self, object: &Value) -> Option<Name> {
        let text = |field: &str| object.pointer(field).and_then(Value::as_str);
        let namespace = text("/metadata/namespace").filter(|_| self.kind.is_namespaced());
        Some(Name::new(
            namespace.unwrap_or_default(),
            text("/metadata/name")?,
        ))
    }
}
