//! Audit mode: what a rule denies passes, and is written into the log with the rule's name.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use sluice_contract::LinkId;
use sluice_contract::policy::{Direction, RuleId, WouldDeny};

use super::Shared;

/// The appliance tells of eight a second.
const WAITING: usize = 64;

/// Has the control channel tell of connections that would be denied.
pub(super) fn listen(shared: &Arc<Shared>) -> io::Result<()> {
    let (sender, events) = sync_channel(WAITING);
    shared.control.audit(sender);
    let shared = Arc::downgrade(shared);
    let log = move |events: Receiver<WouldDeny>| {
        while let Ok(event) = events.recv() {
            let Some(shared) = shared.upgrade() else {
                break;
            };
            shared.would_deny(&event);
        }
    };
    std::thread::Builder::new()
        .name("audit".into())
        .spawn(move || log(events))?;
    Ok(())
}

impl Shared {
    fn would_deny(&self, event: &WouldDeny) {
        let state = self.lock();
        let pod = state.model.links().get(&event.link);
        let pod = match pod {
            Some(it) => it.pod.to_string(),
            None if event.link == LinkId::HOST => format!("node {}", state.model.config().node),
            None => event.link.to_string(),
        };
        let rule = state.model.rule(event.rule);
        let rule = match rule {
            Some(rule) => rule.to_string(),
            None if event.rule == RuleId::NO_ROOM => "policies that do not fit".to_owned(),
            None => "no rule's".to_owned(),
        };
        drop(state);
        let direction = match event.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        let (peer, protocol, port) = (event.peer, event.protocol, event.port);
        tracing::info!(pod, direction, %peer, protocol, port, rule, "policy would deny");
    }
}
