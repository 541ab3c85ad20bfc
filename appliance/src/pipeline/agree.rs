//! Whether both ends of a connection agree that it begins, each by its own policy: pods, and the node itself.

use super::refusal::Refusal;
use super::transit::Stages;
use crate::address::Address;
use crate::flow::Flow;
use crate::observe::{Observer, Step};
use crate::policy::{Decision, Query};
use crate::service::Origin;
use crate::tables::Place;
use sluice_contract::policy::{Direction, RuleId, WouldDeny};
use sluice_contract::service::PrefixUse;
use sluice_contract::{DropReason, Identity, LinkId, Protocol};

impl<O: Observer> Stages<'_, '_, O> {
    /// Who is at an address that is nobody's here.
    fn identity_elsewhere(&self, address: Address) -> Identity {
        let policy = self.tables.policy();
        let identity = policy.identity_of(core::net::IpAddr::from(address));
        if identity == Identity::WORLD && policy.leaves_pods_out() && self.may_be_a_pod(address) {
            return Identity::UNLISTED;
        }
        identity
    }

    /// Whether another node's pod may have the address: it lies behind that node and is not the node's own, or pods' addresses are
    /// from that range.
    fn may_be_a_pod(&self, address: Address) -> bool {
        let tables = self.tables;
        tables.place(address) != Place::Peer
            && (tables.overlay().remote(address).is_some()
                || tables.purpose(address) == Some(PrefixUse::Pods))
    }

    /// Whether the pods at both ends agree, each for itself, and the node where it is an end. `begun` is what the backend will
    /// see, but for its source, which is the true one. `is_old`: it has begun before.
    pub(super) fn policy(
        &mut self,
        ingress: LinkId,
        begun: &Flow,
        place: Place,
        is_old: bool,
    ) -> Result<RuleId, Refusal> {
        let identity = |place: Place, address| match place {
            Place::Link(link) => self.tables.link(link).map(|link| link.identity()),
            Place::Node { .. } => Some(Identity::HOST),
            _ => Some(self.identity_elsewhere(address)),
        };
        let source = match Origin::of(ingress) {
            Origin::Outside => identity(Place::Elsewhere, begun.source()),
            Origin::Node => Some(Identity::HOST),
            Origin::Pod => identity(Place::Link(ingress), begun.source()),
        }
        .unwrap_or(Identity::WORLD);
        let told = self.origin.and_then(|origin| origin.identity);
        let sources = match told.filter(|told| told.is_pod() && *told != source) {
            // Of an address that nobody has yet, its node is believed.
            Some(told) if source == Identity::WORLD => [Some(told), None],
            // One of them is out of date, or a lie: only what both may is allowed.
            differs => [Some(source), differs],
        };
        let destination = identity(place, begun.destination()).unwrap_or(Identity::WORLD);
        let mut rule = RuleId::NONE;
        let target = match place {
            Place::Link(link) => Some(link),
            Place::Node { .. } => Some(LinkId::HOST),
            _ => None,
        };
        if target == Some(ingress) {
            // A pod may always reach itself, and so may the node.
            return Ok(rule);
        }
        if ingress.is_pod() {
            let peer = (destination, begun.destination());
            let query = query(ingress, Direction::Egress, peer, begun);
            let names = self.names_at(ingress, begun.destination(), is_old);
            let decision = self.tables.policy().judge_named(&query, &names);
            rule = self.take(&query, begun, decision)?;
        } else if ingress == LinkId::HOST {
            let peer = (destination, begun.destination());
            let query = query(ingress, Direction::Egress, peer, begun);
            let is_own_pod = target.is_some_and(LinkId::is_pod);
            rule = self.ask_node(&query, begun, is_own_pod)?.unwrap_or(rule);
        }
        let Some(link) = target else {
            return Ok(rule);
        };
        for source in sources.into_iter().flatten() {
            let query = query(link, Direction::Ingress, (source, begun.source()), begun);
            if link.is_pod() {
                let decision = self.tables.policy().judge(&query);
                rule = self.take(&query, begun, decision)?;
            } else if link == LinkId::HOST {
                rule = self.ask_node(&query, begun, false)?.unwrap_or(rule);
            }
        }
        Ok(rule)
    }

    /// What the node's own policy says; `None`: it has none in this direction.
    fn ask_node(
        &mut self,
        query: &Query,
        begun: &Flow,
        is_own_pod: bool,
    ) -> Result<Option<RuleId>, Refusal> {
        let decision = self.tables.policy().judge_node(query, is_own_pod);
        decision.map(|it| self.take(query, begun, it)).transpose()
    }

    /// A decision in force: noted, and audited where that is wanted.
    fn take(&mut self, query: &Query, begun: &Flow, decision: Decision) -> Result<RuleId, Refusal> {
        self.observer.note(Step::Policy {
            direction: query.direction,
            link: query.link,
            peer: query.peer,
            rule: decision.rule,
            accepted: decision.accepted,
        });
        let policy = self.tables.policy();
        let is_audited = match query.link {
            LinkId::HOST => policy.is_node_audited(),
            _ => policy.is_audited(),
        };
        if !decision.accepted && is_audited {
            if !O::DRY {
                self.state.would_deny = self.state.would_deny.wrapping_add(1);
                let event = WouldDeny {
                    link: query.link,
                    direction: query.direction,
                    peer: query.peer_address,
                    protocol: begun.protocol(),
                    port: query.port,
                    rule: decision.rule,
                };
                self.state.audited.note(event, self.now);
            }
            return Ok(decision.rule);
        }
        match (decision.accepted, query.direction) {
            (true, _) => Ok(decision.rule),
            (false, Direction::Egress) => Err(DropReason::PolicyEgress.into()),
            (false, Direction::Ingress) => Err(DropReason::PolicyIngress.into()),
        }
    }
}

/// What one end is asked about its peer.
fn query(
    link: LinkId,
    direction: Direction,
    (peer, address): (Identity, Address),
    begun: &Flow,
) -> Query {
    Query {
        link,
        direction,
        peer,
        peer_address: address.into(),
        protocol: Protocol::from_number(begun.protocol()),
        port: begun.destination_port(),
    }
}
