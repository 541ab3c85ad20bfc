//! Direct return (row S-28): a client outside asks this node for a Service, a pod of another node answers the client itself.
//!
//! ```text
//! client ── client → frontend ──→ node asked ══ the same, telling the backend ══→ backend's node ── client → backend ──→ pod
//!    ↑                                                                                   │
//!    └──────────────────────────────── frontend → client ────────────────────────────────┘
//! ```
//!
//! The node asked chooses the backend and remembers it, but translates nothing; it sees one direction only. The backend's node
//! translates as if the client had asked there, after its own tables have said that the frontend is that backend's.

use super::refusal::Refusal;
use super::transit::Stages;
use crate::address::{Address, Family};
use crate::connection::{Memo, Path, Way};
use crate::conntrack::{Hit, NewConnection};
use crate::flow::{Direction, Flow};
use crate::frame::Frame;
use crate::mtu;
use crate::observe::{Observer, Step};
use crate::overlay::Target;
use crate::parse::Packet;
use crate::route::{self, NextHop};
use crate::service::{self, Choice, NoChoice, Origin, Question};
use crate::tables::{Place, Tables};
use sluice_contract::overlay::PeerId;
use sluice_contract::service::PrefixUse;
use sluice_contract::{DropReason, LinkId};

/// Whether a node may send a packet on that names a backend here: from a client outside the cluster, to an address at which
/// that node serves. The backend is asked about later.
pub(super) fn may_pass_on(tables: &Tables<'_>, peer: PeerId, packet: &Packet) -> bool {
    let to = packet.destination;
    let serves = match tables.place(to) {
        Place::External => true,
        Place::Peer => super::tunnel::may_speak(tables, peer, to),
        _ => false,
    };
    serves && is_outside(tables, packet.source)
}

/// Whether a client is neither of a node nor of a pod, as far as anybody knows.
fn is_outside(tables: &Tables<'_>, client: Address) -> bool {
    let overlay = tables.overlay();
    tables.place(client) == Place::Elsewhere
        && overlay.remote(client).is_none()
        && overlay.peer_at(client).is_none()
        && matches!(tables.purpose(client), None | Some(PrefixUse::Keep))
        && !client.is_link_local6()
}

/// How answers to a new connection come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answers {
    /// From the backend's node to the client.
    pub(super) direct: bool,
    /// The client's address is not needed to lead them back here.
    pub(super) unmasked: bool,
}

impl<O: Observer> Stages<'_, '_, O> {
    /// Another node named the backend of a packet.
    pub(super) fn named(&self) -> Option<Target> {
        self.origin.and_then(|origin| origin.target)
    }

    /// The choice of the node that named the backend, if this node's tables have it too.
    pub(super) fn adopt_choice(
        &mut self,
        flow: &Flow,
        place: Place,
        target: Target,
    ) -> Result<Choice, Refusal> {
        let question = Question {
            flow,
            place,
            origin: Origin::Outside,
            now: self.now,
        };
        let here = matches!(self.tables.place(target.address), Place::Link(link) if link.is_pod());
        let choice = service::confirm(self.tables, &question, target).map_err(|no| match no {
            NoChoice::SourceRange(_) => DropReason::SvcSourceRange,
            _ => DropReason::SvcDirectReturn,
        })?;
        self.observer.note(Step::Frontend {
            service: choice.service,
            kind: choice.kind,
        });
        if !here {
            return Err(DropReason::SvcDirectReturn.into());
        }
        Ok(choice)
    }

    /// How the answers to a connection that is about to begin come back.
    pub(super) fn answers(
        &self,
        new: &mut NewConnection,
        choice: &Choice,
        place: Place,
        path: Path,
    ) -> Answers {
        let usual = Answers {
            direct: false,
            unmasked: false,
        };
        if !choice.direct {
            return usual;
        }
        if self.named().is_some() {
            return Answers {
                direct: true,
                unmasked: true,
            };
        }
        if self.origin.is_some() {
            return usual;
        }
        if matches!(place, Place::Link(link) if link.is_pod()) {
            return Answers {
                direct: false,
                unmasked: true,
            };
        }
        let direct = self.can_name_to(path)
            && is_outside(self.tables, new.original().source())
            && new.expect_no_answers();
        Answers {
            direct,
            unmasked: direct,
        }
    }

    /// Whether what leaves that way can name a backend.
    fn can_name_to(&self, path: Path) -> bool {
        let overlay = self.tables.overlay();
        let tells = || {
            overlay
                .tunnel()
                .is_some_and(|tunnel| tunnel.protocol.tells_backend())
        };
        let Way::Peer(peer) = path.way else {
            return false;
        };
        overlay.peer(peer).is_some_and(|peer| !peer.is_direct()) && tells()
    }

    /// Whether a connection with direct return still leaves as it did: by the tunnel from the node asked, by a pod's link from
    /// the backend's node.
    pub(super) fn still_direct(&self, former: Path, now: Path) -> bool {
        match former.way {
            Way::Peer(_) => self.can_name_to(now),
            _ => now.way == Way::Link && now.link.is_pod(),
        }
    }

    /// The packet goes on as it came, and tells its backend: that of the flow `to` which it would else become.
    pub(super) fn name_target(&mut self, to: &Flow, hop: &mut NextHop) {
        let target = Target {
            address: to.destination(),
            port: to.destination_port(),
        };
        // A few bytes.
        hop.mtu = hop.mtu.saturating_sub(target.option_length() as u16);
        self.target = Some(target);
    }

    /// A packet of a connection with direct return, or one that claims to be.
    #[cold]
    pub(super) fn directly(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        hit: Hit,
        memo: &Memo,
        hop: &mut NextHop,
    ) -> Result<(), Refusal> {
        let passes_on = matches!(memo.path(Direction::Original).way, Way::Peer(_));
        if self.named().is_some() && (passes_on || !memo.direct) {
            return Err(DropReason::Spoof.into());
        }
        match (hit.direction, passes_on) {
            (Direction::Original, true) => {
                let to = self.state.conntrack.outgoing(hit);
                self.name_target(&to.ok_or(DropReason::CtInvalid)?, hop);
                Ok(())
            }
            // They go the other way.
            (Direction::Reply, true) => Err(DropReason::CtInvalid.into()),
            (Direction::Original, false) => Ok(()),
            (Direction::Reply, false) => {
                self.clamp_answer(frame, packet, hop);
                Ok(())
            }
        }
    }

    /// What the client sends has to fit the tunnel that it passes on its way here, though the answers pass none.
    fn clamp_answer(&self, frame: &mut Frame<'_>, packet: &Packet, hop: &NextHop) {
        let tunnel = self.tables.overlay().tunnel();
        let Some(tunnel) = tunnel.filter(|tunnel| tunnel.clamp_mss) else {
            return;
        };
        // Which family the other node came by is not remembered; IPv6 takes more.
        let underlay = match tunnel.source6 {
            Some(_) => Family::V6,
            None => Family::V4,
        };
        let target = Target {
            address: packet.source,
            port: 0,
        };
        let overhead = mtu::overhead(tunnel.protocol, underlay) + target.option_length();
        // About a hundred bytes.
        mtu::clamp_mss(frame, packet, hop.mtu.saturating_sub(overhead as u16));
    }

    /// What this node tells the client of a packet that named a backend here does not go back in the tunnel.
    pub(super) fn return_to_client(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
    ) -> Option<()> {
        let path = self.path(packet.source).ok()?;
        let hop = self.hop(path).ok()?;
        if hop.link != LinkId::UPLINK || hop.exit.is_some() {
            return None;
        }
        route::address(frame, &hop)
    }
}
