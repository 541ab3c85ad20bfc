//! What the tasks of one source share: the server, where events go, and which kinds are followed.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;
use std::sync::mpsc::Sender;

use super::server::Server;
use super::verdict::Verdicts;
use crate::object::{Kind, Name};
use crate::source::announce::Sight;
use crate::store::Event;

/// What the watchers of all kinds share.
pub(super) struct Common {
    pub(super) server: Rc<Server>,
    events: Sender<Event>,
    /// Who writes annotations of this node's object, if so.
    pub(super) sight: Option<Sight>,
    pub(super) verdicts: Rc<Verdicts>,
    /// Kinds that have not been answered yet, and why kinds fail that fail at the moment.
    missing: RefCell<HashSet<Kind>>,
    failing: RefCell<BTreeMap<Kind, String>>,
}

impl Common {
    pub(super) fn new(
        server: Rc<Server>,
        events: Sender<Event>,
        sight: Option<Sight>,
        verdicts: Rc<Verdicts>,
    ) -> Self {
        Self {
            server,
            events,
            sight,
            verdicts,
            missing: RefCell::new(Kind::ALL.into_iter().collect()),
            failing: RefCell::default(),
        }
    }

    pub(super) fn send(&self, event: Event) -> Result<(), Ended> {
        self.events.send(event).map_err(|_| Ended)
    }

    /// This kind fails. The same reason is sent once.
    pub(super) fn failed(&self, kind: Kind, reason: &str) -> Result<(), Ended> {
        let reason = format!("{}: {reason}", kind.plural());
        let former = self.failing.borrow_mut().insert(kind, reason.clone());
        if former.as_ref() == Some(&reason) {
            return Ok(());
        }
        self.send(Event::Lost { reason })
    }

    /// This kind is followed. Sends `InSync` when all are.
    pub(super) fn well(&self, kind: Kind) -> Result<(), Ended> {
        let was_missing = self.missing.borrow_mut().remove(&kind);
        let was_failing = self.failing.borrow_mut().remove(&kind).is_some();
        if !was_missing && !was_failing {
            return Ok(());
        }
        let other = self.failing.borrow().values().next().cloned();
        match other {
            Some(reason) if was_failing => self.send(Event::Lost { reason }),
            None if self.missing.borrow().is_empty() => self.send(Event::InSync),
            _ => Ok(()),
        }
    }

    /// An object of this kind is gone.
    pub(super) fn gone(&self, kind: Kind, name: &Name) {
        match (kind, &self.sight) {
            (Kind::Node, Some(sight)) => sight.gone(&name.name),
            (Kind::NodePolicy, _) => self.verdicts.gone(&name.name),
            _ => {}
        }
    }
}

/// The receiver of events is gone.
pub(super) struct Ended;
