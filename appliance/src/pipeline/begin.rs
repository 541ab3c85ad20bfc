//! A packet that nobody knows: it reaches a Service or not, policy allows it or not, its source is rewritten or not, and only
//! then its connection begins.

use super::hide::{Hidden, Uncommitted, reason_of};
use super::refusal::{Answer, Refusal};
use super::transit::Stages;
use crate::address::Address;
use crate::connection::{Memo, Path, signal_of};
use crate::conntrack::{Attached, CommitError, Invalid, NewConnection, Signal, Stamp};
use crate::flow::{Flow, FlowHash};
use crate::frame::Frame;
use crate::nat;
use crate::observe::{Observer, Step};
use crate::parse::{Fragment, Packet};
use crate::reply;
use crate::service::{self, Choice, NoChoice, Origin, Question};
use crate::tables::Place;
use crate::verdict::Verdict;
use crate::wire::protocol;
use sluice_contract::service::PrefixUse;
use sluice_contract::{DropReason, LinkId};

/// Well-known UDP ports of tunnels: VXLAN by IANA and by Linux, Geneve.
const TUNNEL_PORTS: [u16; 3] = [4789, 8472, 6081];

/// A connection that only wants to be committed.
pub(super) struct Ready {
    new: NewConnection,
    /// The flow that leaves, before its source is rewritten.
    pub(super) to_backend: Flow,
    /// What its source becomes, if another.
    hidden: Option<Hidden>,
    path: Path,
}

impl<O: Observer> Stages<'_, '_, O> {
    /// A packet without a connection.
    pub(super) fn beginning(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        flow: &Flow,
        hash: FlowHash,
    ) -> Result<Verdict, Refusal> {
        if packet.fragment == Fragment::Later {
            return Err(DropReason::FragmentRefused.into());
        }
        let place = self.tables.place(packet.destination);
        let origin = Origin::of(frame.ingress);
        self.admit(frame, packet, origin)?;
        let named = self.named();
        let for_here = matches!(place, Place::Link(_) | Place::Node { .. });
        if self.origin.is_some() && named.is_none() && !for_here {
            // Nodes send each other what is for pods there, and for themselves; Services of other addresses were resolved where the
            // packet began.
            return Err(DropReason::NoRoute.into());
        }
        let served = match self.origin {
            _ if let Some(target) = named => Ok(self.adopt_choice(flow, place, target)?),
            Some(_) if !matches!(place, Place::Node { .. }) => Err(NoChoice::NotAService),
            _ => self.serve(flow, place, origin),
        };
        let choice = match served {
            Ok(choice) => Some(choice),
            Err(NoChoice::NotAService) => None,
            Err(NoChoice::UndefinedPort) if packet.is_echo() => return self.ping(frame, packet),
            Err(no) => return Err(refuse(no)),
        };
        let mut purpose = None;
        if choice.is_none() {
            if place == Place::Elsewhere {
                purpose = self.tables.purpose(packet.destination);
            }
            if purpose == Some(PrefixUse::Services) && self.is_unallocated(packet.destination) {
                return Err(DropReason::SvcUnallocated.into());
            }
            let own = origin == Origin::Outside && matches!(place, Place::Node { .. });
            if own && !self.is_of_the_cluster(packet.source) {
                // The node's own business, of which nothing is known here (row E-08).
                return self.hand_to_node(frame, packet, flow);
            }
        }
        let flow_hash = (flow, hash);
        let ready = self.prepare(frame, packet, flow_hash, choice.as_ref(), (place, purpose))?;
        self.commit(frame, packet, flow, hash, &ready, choice.as_ref())
    }

    /// Who may not even ask.
    pub(super) fn admit(
        &self,
        frame: &Frame<'_>,
        packet: &Packet,
        origin: Origin,
    ) -> Result<(), Refusal> {
        match origin {
            Origin::Outside if self.is_posing(packet) => Err(DropReason::Spoof.into()),
            Origin::Outside => match self.tables.place(packet.source) {
                Place::Link(link) if link != frame.ingress => Err(DropReason::Spoof.into()),
                Place::Node { .. } | Place::Cluster => Err(DropReason::Spoof.into()),
                _ => Ok(()),
            },
            Origin::Pod | Origin::Node => Ok(()),
        }
    }

    /// Whether a flow, as it leaves for `place`, enters a tunnel of the cluster: a node would unwrap what the sender wrote.
    fn is_encapsulation(&self, leaving: &Flow, place: Place) -> bool {
        let to_node = matches!(place, Place::Node { .. } | Place::Peer);
        let port = leaving.destination_port();
        let own = || self.tables.overlay().tunnel().map(|tunnel| tunnel.port);
        to_node
            && match leaving.protocol() {
                protocol::IPIP | protocol::IPV6_IN_IP => true,
                protocol::UDP => TUNNEL_PORTS.contains(&port) || own() == Some(port),
                _ => false,
            }
            && self.tables.nat().is_none_or(|nat| nat.row.deny_encap)
    }

    /// From the underlay as it is, but with a source that lies behind a node whose packets come in a tunnel. Nodes themselves
    /// are on the underlay and may come either way.
    fn is_posing(&self, packet: &Packet) -> bool {
        let overlay = self.tables.overlay();
        let peer = || overlay.peer(overlay.remote(packet.source)?);
        self.origin.is_none()
            && peer().is_some_and(|peer| !peer.is_direct())
            && self.tables.place(packet.source) != Place::Peer
    }

    /// Whether the node answers `client` through the appliance: what came in a tunnel, and pods of other nodes.
    fn is_of_the_cluster(&self, client: Address) -> bool {
        let remote = || self.tables.overlay().remote(client).is_some();
        self.origin.is_some() || (self.tables.place(client) != Place::Peer && remote())
    }

    fn serve(&mut self, flow: &Flow, place: Place, origin: Origin) -> Result<Choice, NoChoice> {
        let question = Question {
            flow,
            place,
            origin,
            now: self.now,
        };
        let chosen = service::choose(self.tables, &self.state.affinities, &question);
        match &chosen {
            Ok(choice) => {
                self.observer.note(Step::Frontend {
                    service: choice.service,
                    kind: choice.kind,
                });
                self.observer.note(Step::Backend {
                    address: choice.address,
                    port: choice.port,
                });
            }
            Err(_) => {
                if let Ok(frontend) = service::frontend(self.tables, flow, place) {
                    self.observer.note(Step::Frontend {
                        service: frontend.service(),
                        kind: frontend.kind(),
                    });
                }
            }
        }
        chosen
    }

    /// Whether an address of the cluster's Services is nobody's: it must not wander off to the uplink (row S-07). Pods behind another
    /// node have theirs, even if they lie in a range that somebody took for the Services'.
    fn is_unallocated(&self, address: Address) -> bool {
        self.tables.overlay().remote(address).is_none()
    }

    /// An echo request to a Service's address (row S-31).
    fn ping(&mut self, frame: &mut Frame<'_>, packet: &Packet) -> Result<Verdict, Refusal> {
        let answered = self.tables.nat().is_none_or(|nat| nat.row.answer_ping);
        if !answered || packet.fragment != Fragment::Whole {
            return Err(DropReason::SvcUndefinedPort.into());
        }
        self.may_answer(frame.ingress)?;
        reply::echo(frame, packet, self.own_mac(frame.ingress))?;
        Ok(Verdict::Reply)
    }

    fn hand_to_node(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        flow: &Flow,
    ) -> Result<Verdict, Refusal> {
        let hop = self.hop(Path::to(LinkId::HOST))?;
        self.has_room(frame, packet, &hop)?;
        self.send(frame, packet, flow, flow, &hop)
    }

    /// Everything that has to say yes.
    fn prepare(
        &mut self,
        frame: &Frame<'_>,
        packet: &Packet,
        (flow, hash): (&Flow, FlowHash),
        choice: Option<&Choice>,
        (place, purpose): (Place, Option<PrefixUse>),
    ) -> Result<Ready, Refusal> {
        let ingress = frame.ingress;
        let signal = signal_of(frame, packet).ok_or(DropReason::CtNotOpening)?;
        let mut new = self.open(flow, hash, ingress, &signal)?;
        let (to_backend, place) = match choice {
            None => (*flow, place),
            Some(choice) => (
                flow.with_destination(choice.address, choice.port),
                self.tables.place(choice.address),
            ),
        };
        // Whoever may write a Service names its backends: none of them is a way into a tunnel, wherever the client is.
        let is_suspect = choice.is_some() || ingress.is_pod();
        if is_suspect && self.is_encapsulation(&to_backend, place) {
            return Err(DropReason::EncapFromPod.into());
        }
        let path = self.path_at(to_backend.destination(), place)?;
        let tunnelled = self.origin.map(|origin| origin.peer);
        let answers = choice.map(|choice| self.answers(&mut new, choice, place, path));
        let direct = answers.is_some_and(|answers| answers.direct);
        let names = direct && self.named().is_none();
        let back = if names {
            Path::to(ingress)
        } else {
            self.path_back(ingress, flow.source(), tunnelled)?
        };
        let rule = self.policy(ingress, &to_backend, place, false)?;
        if let Some(link) = self.tables.link(ingress).filter(|_| !O::DRY) {
            let group = link.group(ingress);
            self.state.conntrack.belongs_to(ingress, group);
        }
        let unmasked = answers.is_some_and(|answers| answers.unmasked);
        let masquerades = match choice {
            Some(choice) => choice.masquerade && !unmasked,
            None => self.leaves_cluster(ingress, (place, purpose), path),
        };
        // As early as it may be: a flood of what finds no port gets no further.
        let hidden = if masquerades {
            Some(self.hide(ingress, &to_backend, None)?)
        } else {
            None
        };
        let mut hop = self.hop(path)?;
        if names {
            self.name_target(&to_backend, &mut hop);
        }
        self.may_connect(ingress, hop.link)?;
        self.has_room(frame, packet, &hop)?;
        let memo = Memo {
            service: choice.map(|choice| choice.service),
            paths: [path, back],
            rule,
            direct,
        };
        new.attached = Attached {
            stamp: Stamp {
                originator: self.incarnation(ingress),
                responder: self.incarnation_of(place),
                policy: self.tables.epoch,
            },
            words: memo.pack(),
        };
        Ok(Ready {
            new,
            to_backend,
            hidden,
            path,
        })
    }

    fn open(
        &mut self,
        flow: &Flow,
        hash: FlowHash,
        ingress: LinkId,
        signal: &Signal,
    ) -> Result<NewConnection, Refusal> {
        let opened = self
            .state
            .conntrack
            .open(flow, hash, ingress, signal, self.now);
        match opened {
            Ok(new) => {
                self.observer.note(Step::New);
                Ok(new)
            }
            Err(invalid) => {
                self.observer.note(Step::Invalid(invalid));
                Err(match invalid {
                    Invalid::NotOpening | Invalid::Unsolicited => DropReason::CtNotOpening.into(),
                    _ => DropReason::CtInvalid.into(),
                })
            }
        }
    }

    /// The connection begins, with the first source that nobody else has towards that backend.
    fn commit(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        flow: &Flow,
        hash: FlowHash,
        ready: &Ready,
        choice: Option<&Choice>,
    ) -> Result<Verdict, Refusal> {
        let mut new = ready.new;
        let committed = if let Some(hidden) = ready.hidden {
            self.masquerade(&mut new, flow, ready, hidden, nat::ATTEMPTS)
        } else {
            new.reply = ready.to_backend.reversed();
            match self.try_commit(&new) {
                Err(CommitError::ReplyTaken(_)) => {
                    let hidden = self.hide(new.owner(), &ready.to_backend, Some(flow.source()))?;
                    // The flow's own source was one try.
                    self.masquerade(&mut new, flow, ready, hidden, nat::ATTEMPTS - 1)
                }
                other => other.map_err(Uncommitted::Conntrack),
            }
        };
        match committed {
            Ok(()) => self.committed(frame, packet, flow, ready.path, &new, choice),
            Err(Uncommitted::Refused(refusal)) => Err(refusal),
            Err(Uncommitted::Conntrack(error)) => {
                self.not_committed(frame, packet, flow, hash, error)
            }
        }
    }

    fn not_committed(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        flow: &Flow,
        hash: FlowHash,
        error: CommitError,
    ) -> Result<Verdict, Refusal> {
        match error {
            // Another packet of this flow was first, on another queue: this one belongs to its connection.
            CommitError::Conflict(hit) => self.belonging(frame, packet, flow, hash, hit),
            error => Err(reason_of(error).into()),
        }
    }

    fn committed(
        &mut self,
        frame: &mut Frame<'_>,
        packet: &Packet,
        flow: &Flow,
        path: Path,
        new: &NewConnection,
        choice: Option<&Choice>,
    ) -> Result<Verdict, Refusal> {
        if let Some(choice) = choice
            && choice.affinity != 0
            && !O::DRY
        {
            self.state.affinities.remember(
                choice.service,
                flow.source(),
                (choice.address, choice.port),
                choice.affinity,
                self.now,
            );
        }
        let hop = self.hop(path)?;
        self.send(frame, packet, flow, &new.outgoing(), &hop)
    }
}

/// What a Service without a backend tells.
const fn refuse(no: NoChoice) -> Refusal {
    let (reason, answer) = match no {
        NoChoice::NotAService => (DropReason::NoRoute, None),
        NoChoice::UndefinedPort => (DropReason::SvcUndefinedPort, Some(Answer::Refused)),
        NoChoice::SourceRange(_) => (DropReason::SvcSourceRange, None),
        NoChoice::NoEndpoint(_) => (DropReason::SvcNoEndpoint, Some(Answer::Refused)),
        NoChoice::NoLocalEndpoint(_) => (DropReason::SvcNoLocalEndpoint, None),
    };
    Refusal { reason, answer }
}
