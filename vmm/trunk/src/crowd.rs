//! Whether others want the core of a thread that polls: seen by looks at the clock that lie too far apart.
//!
//! Being held up now and then is what a shared machine does, and polling still pays; only a thread that loses a good part of its
//! time has company that waits for it.

use std::time::{Duration, Instant};

/// No step without work takes this long; a thread that was preempted is away for longer.
const HELD_UP: Duration = Duration::from_micros(100);
/// After so much polling it is judged anew.
const WINDOW: Duration = Duration::from_millis(5);
/// It is crowded where one part in so many of the poll, or more, was spent held up.
const CROWDED_SHARE: u32 = 3;
/// For so long nobody polls then.
const CROWDED: Duration = Duration::from_millis(50);

/// What the polls of late were like.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    last_look: Option<Instant>,
    /// Time polled since the last judgement, and how much of it was spent held up.
    polled: Duration,
    held_up: Duration,
    until: Option<Instant>,
}

impl Crowd {
    /// A look at `now`, in a poll that has lasted since `since`.
    pub(super) fn look(&mut self, now: Instant, since: Instant) {
        if let Some(last) = self.last_look.filter(|last| *last >= since) {
            let gap = now.duration_since(last);
            self.polled += gap;
            if gap > HELD_UP {
                self.held_up += gap;
            }
        }
        self.last_look = Some(now);
        if self.polled >= WINDOW {
            if self.held_up >= self.polled / CROWDED_SHARE {
                self.until = Some(now + CROWDED);
            }
            (self.polled, self.held_up) = (Duration::ZERO, Duration::ZERO);
        }
    }

    pub(super) fn is_there(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_micros(1);

    /// Polls for `length`, held up for `gap` after every `every`. Returns when it ended.
    fn poll(
        crowd: &mut Crowd,
        begin: Instant,
        length: Duration,
        every: u32,
        gap: Duration,
    ) -> Instant {
        let mut now = begin;
        for look in 1_u32.. {
            now += if look.is_multiple_of(every) {
                gap
            } else {
                LOOK
            };
            crowd.look(now, begin);
            if now - begin > length {
                break;
            }
        }
        now
    }

    #[test]
    fn who_is_held_up_now_and_then_polls_on() {
        let mut crowd = Crowd::default();
        let begin = Instant::now();
        let gap = Duration::from_millis(1);
        let end = poll(&mut crowd, begin, Duration::from_millis(100), 5000, gap);
        assert!(!crowd.is_there(end));
    }

    #[test]
    fn who_is_held_up_half_of_the_time_does_not_poll_for_a_while() {
        let mut crowd = Crowd::default();
        let begin = Instant::now();
        let gap = Duration::from_millis(1);
        let end = poll(&mut crowd, begin, Duration::from_millis(20), 1000, gap);
        assert!(crowd.is_there(end));
        assert!(!crowd.is_there(end + CROWDED));
    }

    #[test]
    fn a_sleep_between_two_polls_is_not_taken_for_being_held_up() {
        let mut crowd = Crowd::default();
        let mut now = Instant::now();
        for _ in 0..100 {
            now = poll(&mut crowd, now, LOOK * 100, u32::MAX, LOOK);
            now += Duration::from_millis(5);
        }
        assert!(!crowd.is_there(now));
    }
}
