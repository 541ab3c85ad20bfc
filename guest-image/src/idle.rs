//! When to stop polling and sleep, decided from how the last sleeps went.
//!
//! Waking a sleeping machine costs tens of microseconds, polling costs a core. So the loop polls
//! for a while after the last work; the while grows when a sleep turned out to be so short that
//! polling would have bridged it, and shrinks when sleeps are long. The next housekeeping ends a
//! sleep, and so does [`LONGEST_SLEEP`] at the latest.
//!
//! Where cores are scarce, polling takes time from those whose frames are waited for. A loop that was held up for longer than
//! any of its own work takes shared its core with somebody; for a while after that it hardly polls.

/// Polling never gets shorter than this: about what a batch takes to come back from the other core.
const SHORTEST_SPIN: u64 = 10_000;
/// Nor longer: a sleep and its end cost about 75 µs on a host with a software KVM.
const LONGEST_SPIN: u64 = 200_000;
/// No turn takes this long; a thread that was preempted is away for a time slice, a millisecond or more.
const HELD_UP: u64 = 250_000;
/// For this long after it was held up the loop takes the host for crowded.
const CROWDED: u64 = 20_000_000;
/// On a crowded host, polling only bridges the time in which the other core publishes the rest of a phase.
const CROWDED_SPIN: u64 = 5_000;
/// A machine that sleeps for longer than two seconds is taken for dead.
const LONGEST_SLEEP: u64 = 1_000_000_000;

/// Times are in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Idle {
    spin: u64,
    last_work: u64,
    last_turn: u64,
    crowded_until: u64,
}

impl Default for Idle {
    fn default() -> Self {
        Self {
            spin: LONGEST_SPIN / 4,
            last_work: 0,
            last_turn: 0,
            crowded_until: 0,
        }
    }
}

impl Idle {
    /// A turn begins at `now`.
    pub fn turn(&mut self, now: u64) {
        if self.last_turn != 0 && now.saturating_sub(self.last_turn) > HELD_UP {
            self.crowded_until = now + CROWDED;
        }
        self.last_turn = now;
    }

    fn limit(&self, now: u64) -> u64 {
        if now < self.crowded_until {
            self.spin.min(CROWDED_SPIN)
        } else {
            self.spin
        }
    }

    /// There was work at `now`.
    pub fn worked(&mut self, now: u64) {
        self.last_work = now;
    }

    /// How long to sleep from `now`, or `None` to go on polling. `deadline` is when there will be
    /// work in any case.
    pub fn sleep(&self, now: u64, deadline: Option<u64>) -> Option<u64> {
        if now.saturating_sub(self.last_work) < self.limit(now) {
            return None;
        }
        let until = deadline.map_or(LONGEST_SLEEP, |at| at.saturating_sub(now));
        Some(until.min(LONGEST_SLEEP)).filter(|length| *length > 0)
    }

    /// A sleep took `slept`; `by_event` if something arrived.
    pub fn woke(&mut self, now: u64, slept: u64, by_event: bool) {
        if by_event && slept < LONGEST_SPIN {
            self.spin = (self.spin * 2).min(LONGEST_SPIN);
        } else {
            self.spin = (self.spin / 2).max(SHORTEST_SPIN);
        }
        if by_event {
            self.last_work = now;
        }
        self.last_turn = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_goes_on_for_a_while_after_work() {
        let mut idle = Idle::default();
        idle.worked(1_000_000);
        assert_eq!(idle.sleep(1_000_000 + idle.spin - 1, None), None);
        assert_eq!(idle.sleep(1_000_000 + idle.spin, None), Some(LONGEST_SLEEP));
    }

    #[test]
    fn a_loop_that_was_held_up_hardly_polls_for_a_while() {
        let mut idle = Idle::default();
        let work = |idle: &mut Idle, now| {
            idle.turn(now);
            idle.worked(now);
        };
        work(&mut idle, 1_000_000);
        work(&mut idle, 1_000_000 + HELD_UP);
        assert_eq!(idle.sleep(1_000_000 + HELD_UP + CROWDED_SPIN, None), None);
        let late = 1_000_001 + 2 * HELD_UP;
        work(&mut idle, late);
        assert!(idle.sleep(late + CROWDED_SPIN, None).is_some());
        idle.worked(late + CROWDED);
        assert_eq!(idle.sleep(late + CROWDED + CROWDED_SPIN, None), None);
    }

    #[test]
    fn a_sleep_is_not_taken_for_being_held_up() {
        let mut idle = Idle::default();
        idle.turn(1_000_000);
        idle.woke(900_000_000, 899_000_000, true);
        idle.turn(900_001_000);
        assert_eq!(idle.sleep(900_001_000 + CROWDED_SPIN, None), None);
    }

    #[test]
    fn a_sleep_ends_before_the_next_deadline_and_never_lasts_nothing() {
        let idle = Idle::default();
        let now = 5_000_000_000;
        assert_eq!(idle.sleep(now, Some(now + 3000)), Some(3000));
        assert_eq!(
            idle.sleep(now, Some(now + 3_000_000_000)),
            Some(LONGEST_SLEEP)
        );
        assert_eq!(idle.sleep(now, Some(now - 1)), None);
    }

    #[test]
    fn short_sleeps_lengthen_the_polling_and_long_ones_shorten_it() {
        let mut idle = Idle::default();
        for _ in 0..10 {
            idle.woke(0, 50_000, true);
        }
        assert_eq!(idle.spin, LONGEST_SPIN);
        for _ in 0..10 {
            idle.woke(0, 10_000_000, true);
        }
        assert_eq!(idle.spin, SHORTEST_SPIN);
        idle.woke(0, 50_000, false);
        assert_eq!(idle.spin, SHORTEST_SPIN, "a deadline is no reason to poll");
    }
}
