//! When connections end: the table's clock, and a timer wheel that is only told about the future.
//!
//! A packet writes the time into its row and nothing else. The wheel looks at a row when the row was last known to be due;
//! if packets came meanwhile it puts it where it is due now. One turn of the wheel is 268 s, and a row is looked at once a
//! turn at least; so a timeout that was shortened takes effect within a turn, and a million idle connections cost 4 000
//! looks a second. A connection ends neither before its time nor later than one place (131 ms) after it, given that
//! `sweep` keeps up; and no packet sees one that should have ended, because lookups compare the time themselves.

use crate::conntrack::Conntrack;
use crate::conntrack::region::{NONE, WHEEL};
use crate::conntrack::state::{State, TICK_SHIFT, TIMEOUT_MAX};
use crate::time::{Duration, Instant};

/// Ticks of a place of the wheel: 2⁷ · 1.024 ms.
const PLACE_SHIFT: u32 = 7;
/// Empty places that cost as much as looking at one row.
const EMPTY_PER_LOOK: u32 = 16;

/// Time as the table counts it. It stands still while nobody looks for longer than `step`: a machine that was
/// suspended, or moved, wakes up with its connections as old as they were (K-11).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    last: Instant,
    micros: u64,
    step: Duration,
}

const _: () = assert!(TIMEOUT_MAX.micros() < 1 << 42);

impl Clock {
    /// Begins so late (51 days) that even an adopted connection was last seen after the beginning.
    pub(crate) const fn new(now: Instant, step: Duration) -> Self {
        Self {
            last: now,
            micros: 1 << 42,
            step,
        }
    }

    pub(crate) const fn set_step(&mut self, step: Duration) {
        self.step = step;
    }

    #[inline]
    fn micros_at(&self, now: Instant) -> u64 {
        self.micros + now.since(self.last).min(self.step).micros()
    }

    /// The tick it is at `now`.
    #[inline]
    pub(crate) fn tick_at(&self, now: Instant) -> u64 {
        self.micros_at(now) >> TICK_SHIFT
    }

    /// Goes on to `now`; `true` if that was a leap and only a step was made.
    #[inline]
    pub(crate) fn advance(&mut self, now: Instant) -> bool {
        let leap = now.since(self.last) > self.step;
        self.micros = self.micros_at(now);
        self.last = self.last.max(now);
        leap
    }
}

/// What a call of [`Conntrack::sweep`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Swept {
    /// Rows looked at.
    pub examined: u32,
    /// Connections that ended.
    pub expired: u32,
    /// The budget was not enough: more is due.
    pub behind: bool,
}

impl Conntrack<'_> {
    /// Ends connections whose time is over, looking at no more than `budget` rows.
    ///
    /// Call it once per batch, and while idle at least once per [`Settings::clock_step`](super::Settings), because this is
    /// also what lets the table's clock go on.
    ///
    /// # Cost
    /// A comparison if no place of the wheel is due (they are 131 ms apart); else about 0.1 µs per row looked at.
    pub fn sweep(&mut self, now: Instant, budget: u32) -> Swept {
        let tick = self.advance_clock(now);
        let due = tick >> PLACE_SHIFT;
        let mut swept = Swept::default();
        let mut left = budget.saturating_mul(EMPTY_PER_LOOK);
        while self.cursor < due {
            let place = place_of(self.cursor + 1);
            let first = self.region.heads[usize::from(place)].first;
            let cost = if first == NONE { 1 } else { EMPTY_PER_LOOK };
            if left < cost {
                swept.behind = true;
                break;
            }
            left -= cost;
            if first == NONE {
                self.cursor += 1;
                continue;
            }
            swept.examined += 1;
            match self.deadline(first, tick) {
                Some(deadline) if deadline > tick => {
                    self.region.wheel_remove(first);
                    self.arm(first, deadline);
                }
                _ => {
                    self.discard(first);
                    self.counters.expired += 1;
                    swept.expired += 1;
                }
            }
        }
        swept
    }

    /// The tick at which a connection ends if nothing comes; `None` if there is none.
    fn deadline(&self, slot: u32, tick: u64) -> Option<u64> {
        let row = self.region.rows.get(slot as usize)?;
        let timeout = self.settings.timeouts.ticks(State::from_raw(row.state)?);
        let age = (tick as u32).wrapping_sub(row.seen);
        Some(tick + u64::from(timeout.saturating_sub(age)))
    }

    /// Puts a connection where it is due, at most one turn ahead.
    pub(crate) fn arm(&mut self, slot: u32, deadline: u64) {
        let place = self.place_for(deadline);
        self.region.wheel_push(slot, place_of(place));
    }

    fn place_for(&self, deadline: u64) -> u64 {
        // The place after the deadline's own: all of it lies behind when it is looked at.
        let due = (deadline >> PLACE_SHIFT) + 1;
        due.clamp(self.cursor + 1, self.cursor + WHEEL as u64 - 1)
    }

    /// Moves a connection forward in the wheel if its new deadline is before the one it waits for.
    pub(crate) fn hasten(&mut self, slot: u32, deadline: u64) {
        let wanted = self.place_for(deadline);
        let armed = u64::from(self.region.rows[slot as usize].armed);
        let ahead = armed.wrapping_sub(self.cursor) % WHEEL as u64;
        if wanted - self.cursor < ahead {
            self.region.wheel_remove(slot);
            self.region.wheel_push(slot, place_of(wanted));
        }
    }

    /// The last place of the wheel that lies wholly behind `now`.
    pub(crate) const fn first_cursor(tick: u64) -> u64 {
        tick >> PLACE_SHIFT
    }

    pub(crate) fn advance_clock(&mut self, now: Instant) -> u64 {
        if self.clock.advance(now) {
            self.counters.clock_leaps += 1;
        }
        let tick = self.clock.tick_at(now);
        self.region.header.tick = tick;
        tick
    }
}

const fn place_of(turn: u64) -> u16 {
    (turn % WHEEL as u64) as u16
}
