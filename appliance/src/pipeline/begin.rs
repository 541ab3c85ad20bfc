//! A packet that nobody knows: it reaches a Service or not, policy allows it or not, its source is rewritten or not, and only
//! then its connection begins.

use super::refusal::{Answer, Refusal};
use super::transit::Stages;
use crate::address::Address;
use crate::connection::{Memo, Path, signal_of};
use crate::conntrack::{Attached, CommitError, Invalid, NewConnection, Signal, Stamp};
use crate::flow::{Flow, FlowHash};
use crate::frame::Frame;
use crate::nat::{self, Candidates};
use crate::observe::{Observer, Step};
use crate::parse::{Fragment, Packet};
use crate::reply::{self, Trouble};
use crate::service::{self, Choice, NoChoice, Origin, Question};
use crate::tables::Place;
use crate::verdict::Verdict;
use crate::wire::protocol;
use sluice_contract::{DropReason, LinkId, Protocol};

/// Well-known UDP ports of tunnels: VXLAN by IANA and by Linux, Geneve.
const TUNNEL_PORTS: [u16; 3] = [4789, 8472, 6081];

/// A connection that only wants to be committed.
struct Ready {
    new: NewConnection,
    /// The flow that leaves, before its source is rewritten.
    to_backend: Flow,
    masquerade: bool,
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
        if choice.is_none() {
            if place == Place::Elsewhere && self.is_unallocated(packet) {
                return Err(DropReason::SvcUnallocated.into());
            }
            let own = origin == Origin::Outside && matches!(place, Place::Node { .. });
            if own && !self.is_of_the_cluster(packet.source) {
                // The node's own business, of which nothing is known here (row E-08).
                return self.hand_to_node(frame, packet, flow);
            }
        }
        let ready = self.prepare(frame, packet, (flow, hash), choice.as_ref(), place)?;
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

    /// An address of the cluster's Services that nobody has: it must not wander off to the uplink (row S-07).
    fn is_unallocated(&self, packet: &Packet) -> bool {
        self.tables.purpose(packet.destination)
            == Some(sluice_contract::service::PrefixUse::Services)
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
        place: Place,
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
        let leaves = choice.is_none()
            && ingress.is_pod()
            && self.tables.nat().is_some_and(|nat| {
                let to = to_backend.destination();
                nat::leaves_cluster(self.tables, nat, to, place, path)
            });
        let unmasked = answers.is_some_and(|answers| answers.unmasked);
        Ok(Ready {
            new,
            to_backend,
            masquerade: leaves || choice.is_some_and(|choice| choice.masquerade && !unmasked),
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
        let owner = new.owner();
        if let Some(link) = self.tables.link(owner).filter(|_| !O::DRY) {
            self.state.conntrack.belongs_to(owner, link.group(owner));
        }
        let committed = if ready.masquerade {
            self.masquerade(&mut new, flow, ready, None)
        } else {
            new.reply = ready.to_backend.reversed();
            match self.try_commit(&new) {
                Err(CommitError::ReplyTaken(_)) => {
                    self.masquerade(&mut new, flow, ready, Some(flow.source()))
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

    /// Commits with another source: the node's address, or `own` after that did not do, and a port that is free towards the
    /// backend. The shares are asked first, which costs no search; and a search is bounded.
    fn masquerade(
        &mut self,
        new: &mut NewConnection,
        flow: &Flow,
        ready: &Ready,
        own: Option<Address>,
    ) -> Result<(), Uncommitted> {
        let owner = new.owner();
        if let Err(error) = self.state.conntrack.has_share(owner) {
            if !O::DRY {
                self.state.conntrack.count_refused(owner, error);
            }
            return Err(error.into());
        }
        let nat = self.tables.nat().ok_or(DropReason::NatNoAddress)?;
        let address = own.or_else(|| nat.address(flow.family()));
        let address = address.ok_or(DropReason::NatNoAddress)?;
        // Without a port there is nothing to choose.
        let has_port = flow.is_icmp() || Protocol::from_number(flow.protocol()).is_some();
        if !has_port {
            let tried = self.try_port(new, ready, (address, 0));
            return tried.map_err(|error| match error {
                CommitError::ReplyTaken(_) => exhausted(),
                error => error.into(),
            });
        }
        let range = nat::range(nat);
        let ct = &self.state.conntrack;
        let remote = ct.remote(&ready.to_backend.with_source(address, 0).reversed());
        let mut candidates = Candidates::of(&self.state.hasher, nat, flow);
        if !ct.has_port(remote, owner, range, self.now) {
            return Err(exhausted());
        }
        let first = candidates.first();
        // The flow's own source was one try.
        for _ in u32::from(own.is_some())..nat::ATTEMPTS {
            let known = self.state.conntrack.free_port(remote, range, first);
            let Some(port) = known.unwrap_or_else(|| candidates.next()) else {
                break;
            };
            match self.try_port(new, ready, (address, port)) {
                Err(CommitError::ReplyTaken(hit)) if !O::DRY => {
                    let ct = &mut self.state.conntrack;
                    ct.port_is_taken(remote, range, &new.reply, hit);
                }
                Err(CommitError::ReplyTaken(_)) => {}
                other => return other.map_err(Into::into),
            }
        }
        if !O::DRY {
            self.state.conntrack.ports_are_exhausted(remote, self.now);
        }
        Err(exhausted())
    }

    fn try_port(
        &mut self,
        new: &mut NewConnection,
        ready: &Ready,
        (address, port): (Address, u16),
    ) -> Result<(), CommitError> {
        new.reply = ready.to_backend.with_source(address, port).reversed();
        self.try_commit(new)?;
        self.observer.note(Step::Masquerade { address, port });
        Ok(())
    }

    fn try_commit(&mut self, new: &NewConnection) -> Result<(), CommitError> {
        if O::DRY {
            let ct = &self.state.conntrack;
            let taken = ct.lookup(&new.reply, ct.hash(&new.reply), self.now);
            return taken.map_or(Ok(()), |hit| Err(CommitError::ReplyTaken(hit)));
        }
        self.state.conntrack.commit(new, self.now).map(|_| ())
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
            CommitError::ReplyTaken(_) => Err(DropReason::NatExhausted.into()),
            CommitError::Full => Err(DropReason::CtFull.into()),
            CommitError::Quota => Err(DropReason::CtQuota.into()),
            CommitError::Family => Err(DropReason::Malformed.into()),
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

/// Why a connection did not begin.
enum Uncommitted {
    Conntrack(CommitError),
    Refused(Refusal),
}

impl From<CommitError> for Uncommitted {
    fn from(error: CommitError) -> Self {
        Self::Conntrack(error)
    }
}

impl From<DropReason> for Uncommitted {
    fn from(reason: DropReason) -> Self {
        Self::Refused(reason.into())
    }
}

const fn exhausted() -> Uncommitted {
    let answer = Answer::Error(Trouble::Prohibited);
    Uncommitted::Refused(Refusal::told(DropReason::NatExhausted, answer))
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
