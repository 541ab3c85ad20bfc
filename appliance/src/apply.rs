//! A change of the tables: rows go into the shadow copies, checked one by one; the commit exchanges the copies.
//!
//! Nothing here takes longer than a row or a slice: what is long (emptying the shadow, bringing it up to date after a
//! commit) is left to [`Apply::work`], and no message is to be given while [`Apply::is_busy`].
//!
//! Order within a change: a row after those it refers to; removals the other way round, and before a put that takes over
//! something unique (an address, a port) from the removed row.

use crate::address::{Address, Family};
use crate::policy::Refusal;
use crate::tables::{Link, Local, Node, Tables};
use sluice_contract::report::{Field, Reject, RejectReason};
use sluice_contract::row::{LinkRow, NodeRow};
use sluice_contract::{Generation, Key, LinkId, Row};

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Taken, nothing to say.
    Noted,
    /// In force.
    Committed(Generation),
    /// Not in force, and what was put so far is forgotten.
    Refused(Generation, Reject),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Open(Generation),
    /// The rest of a refused change is ignored.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Nothing,
    /// The shadow is made ready for rows: empty, if the change starts afresh.
    Prepare,
    /// The shadow becomes equal to the live copy.
    Sync,
}

/// The change in progress, if there is one.
#[derive(Debug)]
pub struct Apply {
    phase: Phase,
    work: Work,
    /// A change that begins when the work is done, and whether it starts afresh.
    opening: Option<bool>,
}

/// Which field of a row is wrong, and how.
pub(crate) type Fault = (Field, RejectReason);

impl Default for Apply {
    fn default() -> Self {
        Self {
            phase: Phase::Idle,
            work: Work::Nothing,
            opening: None,
        }
    }
}

impl Apply {
    /// Whether [`Self::work`] has to finish before the next message.
    pub fn is_busy(&self) -> bool {
        self.work != Work::Nothing
    }

    /// Does a slice of what is left to do: at most `budget` rows, give or take a block. `true` when nothing is left.
    pub fn work(&mut self, tables: &mut Tables<'_>, mut budget: usize) -> bool {
        loop {
            let done = match self.work {
                Work::Nothing => return true,
                Work::Prepare => tables.prepare_slice(&mut budget),
                Work::Sync => tables.sync_slice(&mut budget),
            };
            if !done {
                return false;
            }
            self.work = match self.opening.take() {
                Some(fresh) => {
                    tables.begin(fresh);
                    Work::Prepare
                }
                None => Work::Nothing,
            };
        }
    }

    /// Opens a change; one that was open is forgotten.
    pub fn begin(
        &mut self,
        tables: &mut Tables<'_>,
        generation: Generation,
        fresh: bool,
    ) -> Outcome {
        if generation.0 == 0 {
            let reject = reject(None, Field::Generation, RejectReason::Invalid);
            return self.refuse(tables, generation, reject);
        }
        self.abort(tables);
        self.phase = Phase::Open(generation);
        if self.is_busy() {
            self.opening = Some(fresh);
        } else {
            tables.begin(fresh);
            self.work = Work::Prepare;
        }
        Outcome::Noted
    }

    /// Adds a row, or replaces the one of its key.
    pub fn put(&mut self, tables: &mut Tables<'_>, row: &Row) -> Outcome {
        self.row(tables, row.key(), |tables| tables.put(row))
    }

    /// Takes a row away.
    pub fn remove(&mut self, tables: &mut Tables<'_>, key: Key) -> Outcome {
        self.row(tables, key, |tables| tables.remove(key))
    }

    fn row<'m>(
        &mut self,
        tables: &mut Tables<'m>,
        key: Key,
        change: impl FnOnce(&mut Tables<'m>) -> Result<(), Fault>,
    ) -> Outcome {
        let generation = match self.phase {
            Phase::Refused => return Outcome::Noted,
            Phase::Idle => {
                let reject = reject(Some(key), Field::Whole, RejectReason::OutOfOrder);
                return self.refuse(tables, Generation(0), reject);
            }
            Phase::Open(generation) => generation,
        };
        match change(tables) {
            Ok(()) => Outcome::Noted,
            Err((field, reason)) => {
                self.refuse(tables, generation, reject(Some(key), field, reason))
            }
        }
    }

    /// Puts the change in force.
    pub fn commit(&mut self, tables: &mut Tables<'_>, generation: Generation) -> Outcome {
        match self.phase {
            Phase::Refused => Outcome::Noted,
            Phase::Open(open) if open == generation => {
                tables.exchange(generation);
                self.phase = Phase::Idle;
                self.work = Work::Sync;
                Outcome::Committed(generation)
            }
            Phase::Open(_) | Phase::Idle => {
                let reject = reject(None, Field::Generation, RejectReason::OutOfOrder);
                self.refuse(tables, generation, reject)
            }
        }
    }

    /// Forgets a change in progress: its session is over, or a part of it was lost.
    pub fn abort(&mut self, tables: &mut Tables<'_>) {
        if matches!(self.phase, Phase::Open(_)) && self.opening.take().is_none() {
            tables.abort();
            self.work = Work::Sync;
        }
        self.phase = Phase::Idle;
    }

    fn refuse(
        &mut self,
        tables: &mut Tables<'_>,
        generation: Generation,
        reject: Reject,
    ) -> Outcome {
        self.abort(tables);
        self.phase = Phase::Refused;
        Outcome::Refused(generation, reject)
    }
}

fn refused_policy(refusal: Refusal) -> Fault {
    let reason = match refusal {
        Refusal::Full(capacity) => RejectReason::Full(capacity),
        Refusal::Invalid => RejectReason::Invalid,
        Refusal::Missing => RejectReason::Missing,
        Refusal::Busy => RejectReason::OutOfOrder,
    };
    (Field::Whole, reason)
}

const fn reject(object: Option<Key>, field: Field, reason: RejectReason) -> Reject {
    Reject {
        object,
        field,
        reason,
    }
}

impl Tables<'_> {
    fn put(&mut self, row: &Row) -> Result<(), Fault> {
        match row {
            Row::Node(row) => self.put_node(row),
            Row::Link(row) => self.put_link(row),
            Row::Policy(row) => self.policy.put(row).map_err(refused_policy),
            Row::Overlay(row) => self.overlay.put(row),
            Row::Service(_) | Row::Route(_) => Err((Field::Whole, RejectReason::Full(0))),
        }
    }

    fn remove(&mut self, key: Key) -> Result<(), Fault> {
        match key {
            Key::Node => {
                self.node.shadow = Node::default();
                Ok(())
            }
            Key::Link(id) => self.remove_link(id),
            Key::Policy(key) => self.policy.remove(&key).map_err(refused_policy),
            Key::Overlay(key) => self.overlay.remove(key),
            Key::Service(_) | Key::Route(_) => Err((Field::Whole, RejectReason::Missing)),
        }
    }

    fn begin(&mut self, fresh: bool) {
        if fresh {
            self.node.shadow = Node::default();
            self.links.clear();
            self.locals.clear();
            self.overlay.clear();
        }
        // Busy is the only refusal, and `Apply` comes here settled.
        let _ = self.policy.begin(fresh);
    }

    fn prepare_slice(&mut self, budget: &mut usize) -> bool {
        self.links.clear_slice(budget)
            && self.locals.clear_slice(budget)
            && self.overlay.clear_slice(budget)
            && self.policy.settle(clamp(*budget))
    }

    fn abort(&mut self) {
        self.policy.abort();
    }

    fn sync_slice(&mut self, budget: &mut usize) -> bool {
        self.node.shadow = self.node.live;
        self.links.sync_slice(budget)
            && self.locals.sync_slice(budget)
            && self.overlay.sync_slice(budget)
            && self.policy.settle(clamp(*budget))
    }

    fn exchange(&mut self, generation: Generation) {
        core::mem::swap(&mut self.node.live, &mut self.node.shadow);
        self.links.exchange();
        self.locals.exchange();
        self.overlay.exchange();
        self.policy.commit();
        self.generation = generation;
        self.epoch = self.epoch.wrapping_add(1);
    }

    fn put_node(&mut self, row: &NodeRow) -> Result<(), Fault> {
        let node = Node::from(row);
        let wrong4 = node.gateway4.is_martian_in(Family::V4) || node.gateway4.is_multicast();
        if wrong4 || node.gateway6.is_unspecified() || node.gateway6.is_multicast() {
            return Err((Field::Gateway, RejectReason::Invalid));
        }
        if node.gateway_mac.is_group() || node.gateway_mac.0 == [0; 6] {
            return Err((Field::Mac, RejectReason::Invalid));
        }
        self.node.shadow = node;
        Ok(())
    }

    fn put_link(&mut self, row: &LinkRow) -> Result<(), Fault> {
        let known = row.id.is_pod() || row.id == LinkId::UPLINK || row.id == LinkId::HOST;
        if !known {
            return Err((Field::Id, RejectReason::Invalid));
        }
        if row.mac.is_group() || row.mac.0 == [0; 6] || row.mac == self.node.shadow.gateway_mac {
            return Err((Field::Mac, RejectReason::Invalid));
        }
        // RFC 791 asks for 576 everywhere, RFC 8200 for 1280.
        let least = if row.addresses.iter().any(core::net::IpAddr::is_ipv6) {
            1280
        } else {
            576
        };
        if row.mtu < least {
            return Err((Field::Mtu, RejectReason::Invalid));
        }
        for address in row.addresses.iter().map(|address| Address::from(*address)) {
            self.check_address(row.id, address)?;
        }
        self.remove_link_rows(row.id);
        for address in &row.addresses {
            self.locals
                .put(Local::new((*address).into(), row.id))
                .map_err(|full| (Field::Addresses, RejectReason::Full(full.capacity)))?;
        }
        self.links.write(row.id.index(), Link::new(row));
        Ok(())
    }

    fn check_address(&self, link: LinkId, address: Address) -> Result<(), Fault> {
        let node = &self.node.shadow;
        let nonsense = address.is_martian_in(address.family())
            || address.is_multicast()
            || address.is_broadcast4()
            || address.is_link_local6()
            || address == node.gateway4
            || address == node.gateway6;
        if nonsense {
            return Err((Field::Addresses, RejectReason::Invalid));
        }
        match self.locals.find_shadow(address).and_then(Local::link) {
            Some(other) if other != link => Err((Field::Addresses, RejectReason::Taken)),
            _ => Ok(()),
        }
    }

    fn remove_link(&mut self, id: LinkId) -> Result<(), Fault> {
        if self.remove_link_rows(id) {
            Ok(())
        } else {
            Err((Field::Id, RejectReason::Missing))
        }
    }

    /// Takes the link and its addresses out; `false` if there is none.
    fn remove_link_rows(&mut self, id: LinkId) -> bool {
        let Some(old) = self.links.shadow_at(id.index()).copied() else {
            return false;
        };
        for address in old.addresses() {
            self.locals.remove(address);
        }
        self.links.write(id.index(), crate::twin::Slot::empty());
        old.is_present()
    }
}

fn clamp(budget: usize) -> u32 {
    u32::try_from(budget).unwrap_or(u32::MAX)
}
