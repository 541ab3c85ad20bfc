//! The source of a new connection becomes another one, with a port that nobody else has towards its far end.
//!
//! Shares are asked first, before anything is made ready for the packet: a flood of what finds no port costs little more than one
//! of packets that go nowhere. Only then ports are tried, at most [`nat::ATTEMPTS`].

use super::begin::Ready;
use super::refusal::{Answer, Refusal};
use super::transit::Stages;
use crate::address::Address;
use crate::connection::Path;
use crate::conntrack::{CommitError, NewConnection, Remote};
use crate::flow::Flow;
use crate::nat::{self, Candidates};
use crate::observe::{Observer, Step};
use crate::reply::Trouble;
use crate::tables::Place;
use sluice_contract::service::PrefixUse;
use sluice_contract::{DropReason, LinkId, Protocol};

/// What hides a source.
#[derive(Clone, Copy)]
pub(super) struct Hidden {
    address: Address,
    /// Towards whom a port is looked for. Of a protocol without ports there is nothing to choose.
    remote: Option<Remote>,
}

/// Why a connection did not begin.
pub(super) enum Uncommitted {
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

impl<O: Observer> Stages<'_, '_, O> {
    /// Whether a pod's flow leaves the cluster, and under the node's address.
    pub(super) fn leaves_cluster(
        &self,
        ingress: LinkId,
        (place, purpose): (Place, Option<PrefixUse>),
        path: Path,
    ) -> bool {
        let nat = self.tables.nat().filter(|_| ingress.is_pod());
        nat.is_some_and(|nat| nat::leaves_cluster(nat, purpose, place, path))
    }

    /// What may hide the source of `owner`'s flow: the node's address, or `own`. The shares of connections and of ports are asked,
    /// which costs no search.
    pub(super) fn hide(
        &mut self,
        owner: LinkId,
        to_backend: &Flow,
        own: Option<Address>,
    ) -> Result<Hidden, Refusal> {
        if let Err(error) = self.state.conntrack.has_share(owner) {
            if !O::DRY {
                self.state.conntrack.count_refused(owner, error);
            }
            return Err(reason_of(error).into());
        }
        let nat = self.tables.nat().ok_or(DropReason::NatNoAddress)?;
        let address = own.or_else(|| nat.address(to_backend.family()));
        let address = address.ok_or(DropReason::NatNoAddress)?;
        let protocol = to_backend.protocol();
        if !to_backend.is_icmp() && Protocol::from_number(protocol).is_none() {
            let remote = None;
            return Ok(Hidden { address, remote });
        }
        let ct = &self.state.conntrack;
        let remote = ct.remote(&to_backend.with_source(address, 0).reversed());
        if !ct.has_port(remote, owner, nat::range(nat), self.now) {
            return Err(exhausted());
        }
        let remote = Some(remote);
        Ok(Hidden { address, remote })
    }

    /// Commits with another source, and a port that is free towards the backend, of at most so many.
    pub(super) fn masquerade(
        &mut self,
        new: &mut NewConnection,
        flow: &Flow,
        ready: &Ready,
        hidden: Hidden,
        attempts: u32,
    ) -> Result<(), Uncommitted> {
        let Hidden { address, remote } = hidden;
        let Some(remote) = remote else {
            let tried = self.try_port(new, ready, (address, 0));
            return tried.map_err(|error| match error {
                CommitError::ReplyTaken(_) => Uncommitted::Refused(exhausted()),
                error => error.into(),
            });
        };
        let nat = self.tables.nat().ok_or(DropReason::NatNoAddress)?;
        let range = nat::range(nat);
        let mut candidates = Candidates::of(&self.state.hasher, nat, flow);
        let first = candidates.first();
        for _ in 0..attempts {
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
        Err(Uncommitted::Refused(exhausted()))
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

    pub(super) fn try_commit(&mut self, new: &NewConnection) -> Result<(), CommitError> {
        if O::DRY {
            let ct = &self.state.conntrack;
            let taken = ct.lookup(&new.reply, ct.hash(&new.reply), self.now);
            return taken.map_or(Ok(()), |hit| Err(CommitError::ReplyTaken(hit)));
        }
        self.state.conntrack.commit(new, self.now).map(|_| ())
    }
}

/// The reason of a packet whose connection was not taken in.
pub(super) const fn reason_of(error: CommitError) -> DropReason {
    match error {
        CommitError::ReplyTaken(_) | CommitError::Conflict(_) => DropReason::NatExhausted,
        CommitError::Full => DropReason::CtFull,
        CommitError::Quota => DropReason::CtQuota,
        CommitError::Family => DropReason::Malformed,
    }
}

const fn exhausted() -> Refusal {
    Refusal::told(DropReason::NatExhausted, Answer::Error(Trouble::Prohibited))
}
