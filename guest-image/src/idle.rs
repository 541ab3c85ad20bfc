//! When to stop polling and sleep, decided from how the last sleeps went.
//!
//! Waking a sleeping machine costs tens of microseconds, polling costs a core. So the loop polls
//! for a while after the last work; the while grows when a sleep turned out to be so short that
//! polling would have bridged it, and shrinks when sleeps are long. The next housekeeping ends a
//! sleep, and so does [`LONGEST_SLEEP`] at the latest.

/// Polling never gets shorter than this: about what a batch takes to come back from the other core.
const SHORTEST_SPIN: u64 = 10_000;
/// Nor longer: a sleep and its end cost about 75 µs on a host with a software KVM.
const LONGEST_SPIN: u64 = 200_000;
/// A machine that sleeps for longer than two seconds is taken for dead.
const LONGEST_SLEEP: u64 = 1_000_000_000;

/// Times are in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Idle {
    spin: u64,
    last_work: u64,
}

impl Default for Idle {
    fn default() -> Self {
        Self {
            spin: LONGEST_SPIN / 4,
            last_work: 0,
        }
    }
}

impl Idle {
    /// There was work at `now`.
    pub fn worked(&mut self, now: u64) {
        self.last_work = now;
    }

    /// How long to sleep from `now`, or `None` to go on polling. `deadline` is when there will be
    /// work in any case.
    pub fn sleep(&self, now: u64, deadline: Option<u64>) -> Option<u64> {
        if now.saturating_sub(self.last_work) < self.spin {
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
