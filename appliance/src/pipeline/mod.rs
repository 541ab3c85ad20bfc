//! The stage list: the only room that names every stage. A frame goes through it once, to its end.
//!
//! ```text
//! process_batch ─ parse ─ touch ─ classify ─┬ ARP, ND, echo to the gateway → reply
//!                                           ├ fragments that came too early → held
//!                                           ├ ICMP errors → related
//!                                           └ transit ─┬ belonging: the connection knows
//!                                                      └ beginning: service → policy → nat → commit
//!                              to a backend elsewhere, answered from there → direct
//!                              what pods ask of names and are told is noted on the way
//!                              too large and may be cut → each piece as a fragment
//! ```
//!
//! A batch is parsed as a whole first, so that the cache misses of its connections, and of the rows that new ones will ask for,
//! overlap.

mod agree;
mod answer;
mod batch;
mod begin;
mod cut;
mod direct;
mod hide;
mod names;
mod refusal;
mod related;
mod state;
mod transit;
mod tunnel;

use crate::address::Address;
use crate::apply::{Apply, Outcome, Refusals};
use crate::arena::{Arena, OutOfMemory};
use crate::conntrack::Conntrack;
use crate::frame::Frame;
use crate::hash::Hasher;
use crate::observe::{Record, Silent};
use crate::recent::Recent;
use crate::stats::Stats;
use crate::tables::{Capacity, Tables};
use crate::time::{Duration, Instant};
use crate::verdict::{Originate, Verdict};
use batch::{BATCH, Core, Ready};
use sluice_contract::ToGuest;
use sluice_contract::message::Room;
use sluice_contract::policy::WouldDeny;
use sluice_contract::service::ConnectionsRow;
use state::State;

/// How often connections are looked at while nothing is going on.
const IDLE_SWEEP: Duration = Duration::from_secs(1);
/// The dataplane of one node.
#[derive(Debug)]
pub struct Pipeline<'m> {
    tables: Tables<'m>,
    apply: Apply,
    stats: Stats<'m>,
    state: State<'m>,
    /// The frames of a batch, before their turn comes.
    ready: [Ready; BATCH],
    /// The latest moment that anybody has named.
    now: Instant,
    room: Room,
}

impl<'m> Pipeline<'m> {
    /// A dataplane without any link, in memory from `arena`. `seed` must be secret and random.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(
        arena: &mut Arena<'m>,
        capacity: Capacity,
        seed: [u8; 16],
    ) -> Result<Self, OutOfMemory> {
        let hasher = Hasher::new(seed);
        Ok(Self {
            tables: Tables::new(arena, &capacity, hasher)?,
            apply: Apply::default(),
            stats: Stats::new(arena)?,
            state: State::new(arena, &capacity, hasher)?,
            ready: [Ready::NOTHING; BATCH],
            now: Instant::ZERO,
            room: capacity.room(),
        })
    }

    /// How many rows there is room for.
    pub fn room(&self) -> Room {
        self.room
    }

    /// Sends each frame to its end and writes how it ended into `verdicts`, which is at least as long as `frames`.
    /// Frames without a verdict to write to are left alone.
    pub fn process_batch(
        &mut self,
        frames: &mut [Frame<'_>],
        verdicts: &mut [Verdict],
        now: Instant,
        out: &mut impl Originate,
    ) {
        self.now = self.now.max(now);
        let (mut core, ready) = self.core();
        for (frames, verdicts) in frames.chunks_mut(BATCH).zip(verdicts.chunks_mut(BATCH)) {
            core.look_ahead(frames, ready);
            for ((frame, verdict), ready) in frames.iter_mut().zip(verdicts).zip(&*ready) {
                *verdict = core.process(frame, ready, out, &mut Silent);
            }
        }
        core.stats.names = core.state.names.counts();
    }

    /// One frame, with somebody who listens. Everything else is as in [`Self::process_batch`].
    pub fn process_observed(
        &mut self,
        frame: &mut Frame<'_>,
        now: Instant,
        out: &mut impl Originate,
        record: &mut Record<false>,
    ) -> Verdict {
        self.now = self.now.max(now);
        let (mut core, _) = self.core();
        let mut ready = Ready::NOTHING;
        core.prepare(frame, &mut ready);
        core.process(frame, &ready, out, record)
    }

    /// What would become of `frame` now, and why. Only the frame is changed.
    pub fn trace(&mut self, frame: &mut Frame<'_>, now: Instant) -> (Verdict, Record<true>) {
        let mut record = Record::default();
        self.now = self.now.max(now);
        let (mut core, _) = self.core();
        let verdict = core.trace(frame, &mut record);
        (verdict, record)
    }

    fn core(&mut self) -> (Core<'_, 'm>, &mut [Ready; BATCH]) {
        let core = Core {
            tables: &self.tables,
            stats: &mut self.stats,
            state: &mut self.state,
            now: self.now,
        };
        (core, &mut self.ready)
    }

    /// Housekeeping that time asks for, at most `budget` steps of it; yields when it wants to be called again.
    pub fn sweep(
        &mut self,
        now: Instant,
        budget: usize,
        out: &mut impl Originate,
    ) -> Option<Instant> {
        self.now = self.now.max(now);
        self.state.learned.age(self.now, budget);
        let rows = u32::try_from(budget).unwrap_or(u32::MAX);
        let swept = self.state.conntrack.sweep(self.now, rows);
        let mut budget = budget.min(crate::fragments::SWEEP);
        while self.state.fragments.waiting() > 0 {
            let Some(released) = self.state.fragments.sweep(self.now, &mut budget) else {
                break;
            };
            self.core().0.set_free(Some(released), out);
        }
        if swept.behind {
            return Some(self.now);
        }
        let busy = self.state.conntrack.used() > 0 || self.state.fragments.waiting() > 0;
        let clock_step = self.state.conntrack.settings().clock_step;
        let span = if busy {
            IDLE_SWEEP
        } else {
            Duration::from_micros(clock_step.micros() / 2)
        };
        Some(self.now + span)
    }

    /// One message of a change: `Begin`, `Put`, `Remove` or `Commit`; any other is noted and does nothing.
    /// Not to be called while [`Self::is_applying`].
    pub fn configure(&mut self, message: &ToGuest) -> Outcome {
        let (apply, tables) = (&mut self.apply, &mut self.tables);
        let outcome = match message {
            ToGuest::Begin { generation, fresh } => apply.begin(tables, *generation, *fresh),
            ToGuest::Put(row) => apply.put(tables, row),
            ToGuest::Remove(key) => apply.remove(tables, *key),
            ToGuest::Commit { generation } => apply.commit(tables, *generation),
            _ => Outcome::Noted,
        };
        if let Outcome::Committed { .. } = outcome {
            self.settle_connections();
        }
        outcome
    }

    /// How connections are kept may have changed: the shadow still holds what held before.
    fn settle_connections(&mut self) {
        let (row, former): (ConnectionsRow, ConnectionsRow) =
            (self.tables.connections.live, self.tables.connections.shadow);
        if row == former {
            return;
        }
        self.state.conntrack.set(state::settings(&row));
        if row.adopt_midflow > 0 {
            let span = Duration::from_secs(u64::from(row.adopt_midflow));
            self.state.conntrack.adopt_midflow(self.now + span);
        }
    }

    /// Forgets a change in progress.
    pub fn abort(&mut self) {
        self.apply.abort(&mut self.tables);
    }

    /// Whether [`Self::work`] has something to do, before which no message of a change may come.
    pub fn is_applying(&self) -> bool {
        self.apply.is_busy()
    }

    /// A slice of the work that a change left behind, at most `budget` rows of it; `true` when nothing is left, or nothing
    /// can be done before [`Self::refusals`] are sent.
    pub fn work(&mut self, budget: usize) -> bool {
        let done = self.apply.work(&mut self.tables, budget);
        if self.apply.has_outcome() {
            self.settle_connections();
        }
        done
    }

    /// The outcome of a commit that [`Self::work`] finished, once.
    pub const fn take_outcome(&mut self) -> Option<Outcome> {
        self.apply.take_outcome()
    }

    /// Rows that were refused, and that the host is to hear of before the next message is taken.
    pub fn refusals(&self) -> Option<&Refusals> {
        self.apply.refusals()
    }

    /// The host hears of them.
    pub fn clear_refusals(&mut self) {
        self.apply.clear_refusals();
    }

    pub const fn tables(&self) -> &Tables<'m> {
        &self.tables
    }

    pub const fn conntrack(&self) -> &Conntrack<'m> {
        &self.state.conntrack
    }

    pub const fn conntrack_mut(&mut self) -> &mut Conntrack<'m> {
        &mut self.state.conntrack
    }

    /// Neighbors that packets wanted and that the host is to find.
    pub const fn wanted(&self) -> &Recent<Address> {
        &self.state.wanted
    }

    /// Connections that began although a rule denies them, because policy is only audited.
    pub const fn audited(&self) -> &Recent<WouldDeny> {
        &self.state.audited
    }

    pub const fn stats(&self) -> &Stats<'m> {
        &self.stats
    }

    pub const fn stats_mut(&mut self) -> &mut Stats<'m> {
        &mut self.stats
    }
}
