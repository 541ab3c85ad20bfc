//! How long a thread polls before it sleeps.
//!
//! It adapts as a halt-polling hypervisor does: a sleep that ended sooner than the longest allowed poll says that polling would have
//! caught it, so the poll grows; a long sleep says it was wasted, so it shrinks, down to zero. On two cores a spinning thread takes
//! time from the pods, on many it saves a wake of 20-70 µs per burst. Where others want the core (`crowd`) no thread polls.

use std::time::{Duration, Instant};

use crate::crowd::Crowd;

/// The poll that a short sleep starts with.
const SHORTEST: Duration = Duration::from_micros(5);

/// How long to poll now.
#[derive(Debug)]
pub(crate) struct Poll {
    longest: Duration,
    present: Duration,
    crowd: Crowd,
    idle_since: Option<Instant>,
}

impl Poll {
    pub(crate) fn new(longest: Duration) -> Self {
        Self {
            longest,
            present: longest,
            crowd: Crowd::default(),
            idle_since: None,
        }
    }

    /// There was work.
    pub(crate) fn worked(&mut self) {
        self.idle_since = None;
    }

    /// There was none at `now`: whether to look again at once instead of sleeping.
    pub(crate) fn goes_on(&mut self, now: Instant) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        self.crowd.look(now, since);
        now.duration_since(since) < self.present && !self.crowd.is_there(now)
    }

    /// Others want the core.
    pub(crate) fn is_crowded(&self, now: Instant) -> bool {
        self.crowd.is_there(now)
    }

    /// A sleep has ended.
    pub(crate) fn slept(&mut self, slept: Duration) {
        self.idle_since = None;
        self.present = if slept < self.longest {
            (self.present * 2).clamp(SHORTEST, self.longest)
        } else if self.present > SHORTEST {
            self.present / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_make_it_poll_longer_and_long_ones_end_that() {
        let longest = Duration::from_micros(100);
        let mut poll = Poll::new(longest);
        for _ in 0..10 {
            poll.slept(Duration::from_millis(1));
        }
        let now = Instant::now();
        assert!(!poll.goes_on(now), "sleeps were long");
        for _ in 0..10 {
            poll.slept(Duration::from_micros(20));
        }
        assert!(poll.goes_on(now));
        assert!(poll.goes_on(now + longest / 2));
        assert!(!poll.goes_on(now + longest));
        poll.worked();
        assert!(poll.goes_on(now + longest));
    }

    #[test]
    fn a_thread_that_may_not_poll_never_does() {
        let mut poll = Poll::new(Duration::ZERO);
        poll.slept(Duration::from_micros(1));
        assert!(!poll.goes_on(Instant::now()));
    }
}
