//! Which thread moves the frames: the one decision, from what leaving the guest costs here and from how frames come.
//!
//! *Inline*, the thread that runs the guest moves them while the guest rests: no hand-off, no second thread, and every turn costs one
//! exit. *Apart*, a second thread moves them while the guest polls: no exit, but two cores that spin.
//!
//! Where an exit is cheap, inline is better in every way. Where it is dear it is better all the same when frames come by the dozen
//! (one exit for all of them), when they are rare (one sleeper less to wake), and when others want the cores. What is left is
//! frames one by one in close order while cores are free: a round trip between two pods.

use std::time::{Duration, Instant};

use sluice_ports::message::{Drive, Reason};

/// Exits up to this cost are cheap. Hardware that virtualises takes 1-2 µs; a software KVM 24 µs.
const CHEAP: Duration = Duration::from_micros(6);
/// Frames a turn, on average, from which they come by the dozen, and below which they come one by one.
const MANY: f32 = 6.0;
const FEW: f32 = 3.0;
/// Turns further apart than this, on average, are rare; closer than half of it, they are not.
const RARE: Duration = Duration::from_micros(400);
/// What one turn counts for in the averages.
const WEIGHT: f32 = 1.0 / 64.0;
/// Between two decisions.
const REVIEW: Duration = Duration::from_millis(2);
/// For how long the cores count as wanted by others: at first, and at most, doubled as long as they are found so again.
const CROWDED: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(640)];

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    #[default]
    Auto,
    Always(Drive),
}

/// The decision and what it rests on.
#[derive(Debug)]
pub struct Policy {
    wish: Wish,
    cores: usize,
    exit: Option<Duration>,
    frames_a_turn: f32,
    gap_micros: f32,
    last_turn: Option<Instant>,
    decided: Option<Instant>,
    crowded_until: Option<Instant>,
    crowded_for: Duration,
    present: (Drive, Reason),
}

impl Policy {
    /// Before anything is known, with so many cores at hand: inline, which never wastes a core.
    pub fn new(wish: Wish, cores: usize) -> Self {
        let mut policy = Self {
            wish,
            cores,
            exit: None,
            frames_a_turn: 0.0,
            gap_micros: 2.0 * micros(RARE),
            last_turn: None,
            decided: None,
            crowded_until: None,
            crowded_for: CROWDED[0],
            present: (Drive::Inline, Reason::CheapExit),
        };
        policy.present = policy.judge(Instant::now());
        policy
    }

    /// The cost of an exit was measured.
    pub fn exit_costs(&mut self, exit: Duration) {
        if self.exit != Some(exit) {
            self.exit = Some(exit);
            self.decided = None;
        }
    }

    /// What holds now.
    pub fn present(&self) -> (Drive, Reason) {
        self.present
    }

    /// A turn moved so many frames.
    pub fn moved(&mut self, frames: u32, now: Instant) {
        self.frames_a_turn += (frames as f32 - self.frames_a_turn) * WEIGHT;
        if let Some(last) = self.last_turn {
            // One long pause says that it was quiet, and no more than that.
            let gap = micros(now.saturating_duration_since(last)).min(8.0 * micros(RARE));
            self.gap_micros += (gap - self.gap_micros) * WEIGHT;
        }
        self.last_turn = Some(now);
    }

    /// The thread that polls found that others want its core.
    pub fn crowded(&mut self, now: Instant) {
        if self.crowded_until.is_some_and(|until| now < until) {
            return;
        }
        // Found so again soon after the last time.
        let again = self
            .crowded_until
            .is_some_and(|until| now < until + self.crowded_for);
        self.crowded_for = if again {
            (self.crowded_for * 2).min(CROWDED[1])
        } else {
            CROWDED[0]
        };
        self.crowded_until = Some(now + self.crowded_for);
        self.decided = None;
    }

    /// Decides anew, if it is time for that. True when another thread is to move the frames.
    pub fn review(&mut self, now: Instant) -> bool {
        if self
            .decided
            .is_some_and(|at| now.saturating_duration_since(at) < REVIEW)
        {
            return false;
        }
        self.decided = Some(now);
        let (before, _) = self.present;
        self.present = self.judge(now);
        self.present.0 != before
    }

    fn judge(&self, now: Instant) -> (Drive, Reason) {
        if let Wish::Always(drive) = self.wish {
            return (drive, Reason::Asked);
        }
        if self.cores < 2 {
            return (Drive::Inline, Reason::OneCore);
        }
        let Some(exit) = self.exit else {
            return self.present;
        };
        if exit <= CHEAP {
            return (Drive::Inline, Reason::CheapExit);
        }
        let is_apart = self.present.0 == Drive::Apart;
        let many = if is_apart { MANY } else { FEW };
        let rare = micros(RARE) * if is_apart { 1.0 } else { 0.5 };
        if self.frames_a_turn >= many {
            (Drive::Inline, Reason::ManyFrames)
        } else if self.gap_micros > rare {
            (Drive::Inline, Reason::RareFrames)
        } else if self.crowded_until.is_some_and(|until| now < until) {
            (Drive::Inline, Reason::Crowded)
        } else {
            (Drive::Apart, Reason::FewFrames)
        }
    }
}

fn micros(time: Duration) -> f32 {
    time.as_secs_f32() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAR: Duration = Duration::from_micros(24);

    /// A node under a load that can be changed as it goes.
    struct Node {
        policy: Policy,
        now: Instant,
        changes: u32,
    }

    impl Node {
        fn new(cores: usize, exit: Duration) -> Self {
            let mut policy = Policy::new(Wish::Auto, cores);
            policy.exit_costs(exit);
            Self {
                policy,
                now: Instant::now(),
                changes: 0,
            }
        }

        fn load(&mut self, frames: u32, every: Duration, for_: Duration) -> (Drive, Reason) {
            let end = self.now + for_;
            while self.now < end {
                self.now += every;
                self.policy.moved(frames, self.now);
                self.changes += u32::from(self.policy.review(self.now));
            }
            self.policy.present()
        }
    }

    const MICROS: fn(u64) -> Duration = Duration::from_micros;
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn where_an_exit_is_cheap_the_guests_thread_does_it_all() {
        let mut node = Node::new(8, MICROS(2));
        for frames in [1, 4, 60] {
            let found = node.load(frames, MICROS(30), SECOND);
            assert_eq!(found, (Drive::Inline, Reason::CheapExit));
        }
        assert_eq!(node.changes, 0);
    }

    #[test]
    fn where_it_is_dear_the_load_decides() {
        let mut node = Node::new(2, DEAR);
        let table = [
            // A ping a millisecond, a round trip, bulk, a trickle, a round trip again.
            (1, MICROS(1000), Drive::Inline, Reason::RareFrames),
            (1, MICROS(40), Drive::Apart, Reason::FewFrames),
            (40, MICROS(100), Drive::Inline, Reason::ManyFrames),
            (1, MICROS(5000), Drive::Inline, Reason::RareFrames),
            (2, MICROS(50), Drive::Apart, Reason::FewFrames),
        ];
        for (frames, every, drive, reason) in table {
            let found = node.load(frames, every, SECOND);
            assert_eq!(found, (drive, reason), "{frames} every {every:?}");
        }
        assert!(node.changes <= 4, "{} changes", node.changes);
    }

    #[test]
    fn a_load_between_the_thresholds_changes_nothing() {
        let mut node = Node::new(2, DEAR);
        node.load(1, MICROS(40), SECOND);
        let before = node.changes;
        let found = node.load(4, MICROS(60), SECOND);
        assert_eq!(found, (Drive::Apart, Reason::FewFrames));
        node.load(40, MICROS(100), SECOND);
        let found = node.load(4, MICROS(60), SECOND);
        assert_eq!(found, (Drive::Inline, Reason::ManyFrames));
        assert_eq!(node.changes, before + 1);
    }

    #[test]
    fn crowded_cores_end_polling_for_ever_longer() {
        let mut node = Node::new(2, DEAR);
        node.load(1, MICROS(40), SECOND);
        let mut times = Vec::new();
        for _ in 0..7 {
            node.policy.crowded(node.now);
            let begin = node.now;
            while node.load(1, MICROS(40), MICROS(40)) != (Drive::Apart, Reason::FewFrames) {}
            times.push((node.now - begin).as_millis());
        }
        assert!(times.is_sorted(), "{times:?}");
        assert!(
            (20..30).contains(&times[0]) && (640..700).contains(&times[6]),
            "{times:?}"
        );
        node.load(1, MICROS(40), SECOND * 2);
        node.policy.crowded(node.now);
        let found = node.load(1, MICROS(40), MICROS(30_000));
        assert_eq!(
            found,
            (Drive::Apart, Reason::FewFrames),
            "that was long ago"
        );
    }

    #[test]
    fn one_core_and_a_wish_are_respected() {
        let mut node = Node::new(1, DEAR);
        let found = node.load(1, MICROS(40), SECOND);
        assert_eq!(found, (Drive::Inline, Reason::OneCore));
        let policy = Policy::new(Wish::Always(Drive::Apart), 1);
        assert_eq!(policy.present(), (Drive::Apart, Reason::Asked));
    }
}
