//! When to stop polling and sleep, decided from how the last sleeps went.
//!
//! Waking a sleeping machine costs tens of microseconds, polling costs a core. So the loop polls
//! for a while after the last work; the while grows when a sleep turned out to be so short that
//! polling would have bridged it, and shrinks when sleeps are long. The next housekeeping ends a
//! sleep, and so does [`LONGEST_SLEEP`] at the latest.
//!
//! Where cores are scarce, polling takes time from those whose frames are waited for. A loop that loses a good part of its
//! time awake shares its core with somebody, and for a while after that it hardly polls. Being held up now and then is no sign of
//! it: to stop for that made a round trip seven times as long.

/// Polling never gets shorter than this: about what a batch takes to come back from the other core.
const SHORTEST_SPIN: u64 = 10_000;
/// Nor longer: a sleep and its end cost about 75 µs on a host with a software KVM.
const LONGEST_SPIN: u64 = 200_000;
/// No turn takes this long; a thread that was preempted is away for longer.
const HELD_UP: u64 = 100_000;
/// After so much time awake it is judged anew.
const WINDOW: u64 = 5_000_000;
/// The host is crowded where one part in so many of the time awake, or more, was spent held up.
const CROWDED_SHARE: u64 = 3;
/// For how long it is taken for crowded: at first, and at most, doubled as long as it is found so again.
const CROWDED: [u64; 2] = [20_000_000, 320_000_000];
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
    /// Time awake since the last judgement, and how much of it was spent held up.
    awake: u64,
    held_up: u64,
    crowded_until: u64,
    crowded_for: u64,
}

impl Default for Idle {
    fn default() -> Self {
        Self {
            spin: LONGEST_SPIN / 4,
            last_work: 0,
            last_turn: 0,
            awake: 0,
            held_up: 0,
            crowded_until: 0,
            crowded_for: CROWDED[0],
        }
    }
}

impl Idle {
    /// A turn begins at `now`.
    pub fn turn(&mut self, now: u64) {
        let last = core::mem::replace(&mut self.last_turn, now);
        if last == 0 {
            return;
        }
        let gap = now.saturating_sub(last);
        self.awake += gap;
        if gap > HELD_UP {
            self.held_up += gap;
        }
        if self.awake >= WINDOW {
            self.judge(now);
        }
    }

    fn judge(&mut self, now: u64) {
        let is_crowded = self.held_up >= self.awake / CROWDED_SHARE;
        (self.awake, self.held_up) = (0, 0);
        if is_crowded {
            self.crowded_until = now + self.crowded_for;
            self.crowded_for = (self.crowded_for * 2).min(CROWDED[1]);
        } else if now >= self.crowded_until {
            self.crowded_for = CROWDED[0];
        }
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

    /// How long to sleep from `now`, or `None` to go on polling, which makes sense where something can arrive meanwhile (`polls`).
    /// `deadline` is when there will be work in any case.
    pub fn sleep(&self, now: u64, deadline: Option<u64>, polls: bool) -> Option<u64> {
        if polls && now.saturating_sub(self.last_work) < self.limit(now) {
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
        assert_eq!(idle.sleep(1_000_000 + idle.spin - 1, None, true), None);
        assert_eq!(
            idle.sleep(1_000_000 + idle.spin, None, true),
            Some(LONGEST_SLEEP)
        );
    }

    #[test]
    fn where_nothing_arrives_meanwhile_it_sleeps_at_once() {
        let mut idle = Idle::default();
        idle.worked(1_000_000);
        assert_eq!(idle.sleep(1_000_000, None, false), Some(LONGEST_SLEEP));
        assert_eq!(idle.sleep(1_000_000, None, true), None);
    }

    /// Turns of a microsecond for `length`; every so many of them takes `gap`. Returns when they ended.
    fn turns(idle: &mut Idle, begin: u64, length: u64, every: u64, gap: u64) -> u64 {
        let mut now = begin;
        for turn in 1.. {
            now += if turn % every == 0 { gap } else { 1000 };
            idle.turn(now);
            idle.worked(now);
            if now - begin > length {
                break;
            }
        }
        now
    }

    fn is_polling(idle: &Idle, now: u64) -> bool {
        idle.sleep(now + CROWDED_SPIN, None, true).is_none()
    }

    #[test]
    fn a_loop_that_is_held_up_now_and_then_polls_on() {
        let mut idle = Idle::default();
        let end = turns(&mut idle, 1, 100_000_000, 5000, 1_000_000);
        assert!(is_polling(&idle, end));
    }

    #[test]
    fn a_loop_that_is_held_up_half_of_its_time_hardly_polls_for_a_while() {
        let mut idle = Idle::default();
        let end = turns(&mut idle, 1, 8_000_000, 1000, 1_000_000);
        assert!(!is_polling(&idle, end));
        idle.worked(end + CROWDED[0]);
        assert!(is_polling(&idle, end + CROWDED[0]));
    }

    #[test]
    fn the_more_often_the_host_is_crowded_the_longer_it_is_taken_for_it_and_a_good_time_ends_that()
    {
        let mut idle = Idle::default();
        let mut now = 1;
        for _ in 0..10 {
            now = turns(&mut idle, now, 2 * WINDOW, 1000, 1_000_000);
        }
        idle.worked(now + CROWDED[1] - 2 * WINDOW);
        assert!(!is_polling(&idle, now + CROWDED[1] - 2 * WINDOW));
        // The first may begin in a bad window.
        for _ in 0..2 {
            now += CROWDED[1];
            idle.woke(now, CROWDED[1], false);
            now = turns(&mut idle, now, 2 * WINDOW, u64::MAX, 0);
        }
        now = turns(&mut idle, now, WINDOW, 1000, 1_000_000);
        assert!(!is_polling(&idle, now));
        idle.worked(now + CROWDED[0]);
        assert!(is_polling(&idle, now + CROWDED[0]));
    }

    #[test]
    fn a_sleep_is_not_taken_for_being_held_up() {
        let mut idle = Idle::default();
        idle.turn(1_000_000);
        for sleep in 1..100 {
            let now = sleep * 900_000_000;
            idle.woke(now, 899_000_000, true);
            idle.turn(now + 1000);
            assert!(is_polling(&idle, now + 1000));
        }
    }

    #[test]
    fn a_sleep_ends_before_the_next_deadline_and_never_lasts_nothing() {
        let idle = Idle::default();
        let now = 5_000_000_000;
        assert_eq!(idle.sleep(now, Some(now + 3000), true), Some(3000));
        assert_eq!(
            idle.sleep(now, Some(now + 3_000_000_000), true),
            Some(LONGEST_SLEEP)
        );
        assert_eq!(idle.sleep(now, Some(now - 1), true), None);
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
