//! A change of the tables: rows go into the shadow copies, checked one by one; the commit exchanges the copies.
//!
//! Nothing here takes longer than a row or a slice: what is long (emptying the shadow, looking for sets that are not
//! complete, bringing the shadow up to date after a commit) is left to [`Apply::work`], and no message is to be given while
//! [`Apply::is_busy`].
//!
//! Order within a change: a row after those it refers to; removals the other way round, and before a put that takes over
//! something unique (an address, a port) from the removed row.
//!
//! A row that is refused is left out, and noted for the host in a buffer of one message: who gives messages sends that
//! ([`Apply::refusals`]) before it gives the next.

mod rows;

use crate::tables::Tables;
use heapless::Vec;
use sluice_contract::report::{Field, Reject, RejectReason};
use sluice_contract::{Generation, Key, Row, limits};

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Taken, nothing to say.
    Noted,
    /// The row is left out of the change.
    LeftOut(Reject),
    /// In force, without so many rows that were refused.
    Committed {
        generation: Generation,
        refused: u32,
    },
    /// The change is not in force, and what was put so far is forgotten.
    Refused(Generation, Reject),
}

impl Outcome {
    /// Whether the change is in force, and nothing was left out of it.
    pub const fn is_whole(&self) -> bool {
        matches!(self, Self::Committed { refused: 0, .. })
    }
}

/// Refused rows of one change, as many as one message holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    pub generation: Generation,
    pub rows: Vec<Reject, { limits::REFUSED_BATCH }>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Open,
    /// The rest of a refused change is ignored.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Nothing,
    /// The shadow is made ready for rows: empty, if the change starts afresh.
    Prepare,
    /// Sets are looked at from this one on, for those that are not complete; then the change is in force.
    Inspect(usize),
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
    /// Rows that the host has not heard of yet, with the generation of the change that is or was in progress.
    refusals: Refusals,
    /// How many rows of that change were refused.
    refused: u32,
    /// The outcome of a commit that had to look at sets first.
    outcome: Option<Outcome>,
}

/// Which field of a row is wrong, and how.
pub(crate) type Fault = (Field, RejectReason);

impl Default for Apply {
    fn default() -> Self {
        Self {
            phase: Phase::Idle,
            work: Work::Nothing,
            opening: None,
            refusals: Refusals::default(),
            refused: 0,
            outcome: None,
        }
    }
}

impl Apply {
    /// Whether [`Self::work`] has to finish before the next message.
    pub fn is_busy(&self) -> bool {
        self.work != Work::Nothing
    }

    /// Does a slice of what is left to do: at most `budget` rows, give or take a block. `true` when nothing is left, or
    /// nothing more can be done before the refusals are taken.
    pub fn work(&mut self, tables: &mut Tables<'_>, mut budget: usize) -> bool {
        loop {
            let done = match self.work {
                Work::Nothing => return true,
                Work::Prepare => tables.prepare_slice(&mut budget),
                Work::Inspect(_) if self.refusals.rows.is_full() => return true,
                Work::Inspect(from) => self.inspect(tables, from, &mut budget),
                Work::Sync => tables.sync_slice(&mut budget),
            };
            if !done {
                return false;
            }
            if let Work::Inspect(_) = self.work {
                // The rest comes in a slice of its own: the caller sees this first.
                self.outcome = Some(self.exchange(tables));
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

    /// Names sets that are not complete. `true`: there are no more.
    fn inspect(&mut self, tables: &mut Tables<'_>, mut from: usize, budget: &mut usize) -> bool {
        while !self.refusals.rows.is_full() {
            let found = tables.incomplete_from(&mut from, budget);
            self.work = Work::Inspect(from);
            match found {
                Some((key, fault)) => self.leave_out(key, fault),
                None => return *budget > 0,
            };
        }
        false
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
        self.phase = Phase::Open;
        self.refusals.generation = generation;
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
        match self.phase {
            Phase::Refused => Outcome::Noted,
            Phase::Idle => {
                let reject = reject(Some(key), Field::Whole, RejectReason::OutOfOrder);
                self.refuse(tables, Generation(0), reject)
            }
            Phase::Open => match change(tables) {
                Ok(()) => Outcome::Noted,
                Err(fault) => self.leave_out(key, fault),
            },
        }
    }

    fn leave_out(&mut self, key: Key, (field, reason): Fault) -> Outcome {
        let reject = reject(Some(key), field, reason);
        self.refused = self.refused.saturating_add(1);
        // Who gives messages takes the refusals before there are too many; who does not care misses some.
        let _ = self.refusals.rows.push(reject);
        Outcome::LeftOut(reject)
    }

    /// Puts the change in force; if sets have to be looked at first, [`Self::work`] does, and [`Self::take_outcome`] has it.
    pub fn commit(&mut self, tables: &mut Tables<'_>, generation: Generation) -> Outcome {
        match self.phase {
            Phase::Refused => Outcome::Noted,
            Phase::Open if self.refusals.generation == generation => {
                if tables.is_incomplete() {
                    self.phase = Phase::Idle;
                    self.work = Work::Inspect(0);
                    return Outcome::Noted;
                }
                self.exchange(tables)
            }
            Phase::Open | Phase::Idle => {
                let reject = reject(None, Field::Generation, RejectReason::OutOfOrder);
                self.refuse(tables, generation, reject)
            }
        }
    }

    fn exchange(&mut self, tables: &mut Tables<'_>) -> Outcome {
        let generation = self.refusals.generation;
        tables.exchange(generation);
        self.phase = Phase::Idle;
        self.work = Work::Sync;
        Outcome::Committed {
            generation,
            refused: self.refused,
        }
    }

    /// Whether a commit that had to look at sets first is in force, and its outcome still to be taken.
    pub const fn has_outcome(&self) -> bool {
        self.outcome.is_some()
    }

    /// The outcome of a commit that came with the work, once.
    pub const fn take_outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }

    /// Refused rows that are to be sent before the next message: a message full of them, or the rest of a change that is
    /// closed.
    pub fn refusals(&self) -> Option<&Refusals> {
        let is_closed = self.phase != Phase::Open && !matches!(self.work, Work::Inspect(_));
        let rows = &self.refusals.rows;
        (rows.is_full() || is_closed && !rows.is_empty()).then_some(&self.refusals)
    }

    /// They are sent.
    pub fn clear_refusals(&mut self) {
        self.refusals.rows.clear();
    }

    /// Forgets a change in progress: its session is over, or a part of it was lost.
    pub fn abort(&mut self, tables: &mut Tables<'_>) {
        let is_open = self.phase == Phase::Open || matches!(self.work, Work::Inspect(_));
        if is_open && self.opening.take().is_none() {
            tables.abort();
            self.work = Work::Sync;
        }
        self.phase = Phase::Idle;
        self.refusals.rows.clear();
        self.refused = 0;
        self.outcome = None;
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

const fn reject(object: Option<Key>, field: Field, reason: RejectReason) -> Reject {
    Reject {
        object,
        field,
        reason,
    }
}
