//! A change of the tables: rows go into the shadow copies, checked one by one; the commit exchanges the copies.
//!
//! Nothing here takes longer than a row or a slice: what is long (emptying the shadow, bringing it up to date after a
//! commit) is left to [`Apply::work`], and no message is to be given while [`Apply::is_busy`].
//!
//! Order within a change: a row after those it refers to; removals the other way round, and before a put that takes over
//! something unique (an address, a port) from the removed row.

mod rows;

use crate::tables::Tables;
use sluice_contract::report::{Field, Reject, RejectReason};
use sluice_contract::{Generation, Key, Row};

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
                if let Some((key, (field, reason))) = tables.incomplete() {
                    return self.refuse(tables, generation, reject(Some(key), field, reason));
                }
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

const fn reject(object: Option<Key>, field: Field, reason: RejectReason) -> Reject {
    Reject {
        object,
        field,
        reason,
    }
}
