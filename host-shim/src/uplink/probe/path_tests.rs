use super::*;

const INTERVAL: Duration = Duration::from_secs(5);
const FULL: u16 = 1450;

/// A way on which answers take a while, if they come.
struct Way {
    path: Path,
    now: Instant,
    began: Instant,
    is_ours: bool,
    sent: usize,
}

impl Way {
    fn new(is_ours: bool) -> Self {
        let now = Instant::now();
        Self {
            path: Path::new(FULL, now),
            now,
            began: now,
            is_ours,
            sent: 0,
        }
    }

    /// Goes on for so long; `passes` says of each packet, by its number and size, whether it is answered.
    fn go(&mut self, seconds: u64, mut passes: impl FnMut(u16, u16) -> bool) -> ProbeReport {
        let end = self.now + Duration::from_secs(seconds);
        let mut coming: VecDeque<(Instant, u16, u16)> = VecDeque::new();
        while self.now < end {
            while let Some((at, sequence, size)) = coming.front().copied()
                && at <= self.now
            {
                coming.pop_front();
                self.path.answered(sequence, size, at);
            }
            if self.path.due() <= self.now {
                for (sequence, size) in self.path.turn(self.now, INTERVAL, self.is_ours) {
                    self.sent += 1;
                    if passes(sequence, size) {
                        coming.push_back((self.now + Duration::from_millis(3), sequence, size));
                    }
                }
            }
            self.now += Duration::from_millis(1);
        }
        // Judged once more, as by the next turn.
        self.path.judge(self.now, self.is_ours);
        self.path.report(self.now)
    }
}

#[test]
fn o22_a_way_without_loss_is_reachable_and_nothing_is_found() {
    let mut way = Way::new(true);
    let report = way.go(300, |_, _| true);
    assert_eq!(report.state, ProbeState::Reachable);
    assert_eq!((report.largest, report.finding), (Some(FULL), None));
    assert_eq!((report.small.sent, report.small.lost), (20, 0));
    assert_eq!((report.full.size, report.full.lost), (FULL, 0));
    assert_eq!(report.rtt_us, Some(3000));
    assert!(report.last_answer_ms.unwrap() <= 5000);
    assert_eq!(
        way.sent,
        2 * 60,
        "a small and a full packet every five seconds"
    );
}

#[test]
fn o22_one_lost_round_is_no_matter_and_three_are() {
    let mut way = Way::new(true);
    way.go(100, |_, _| true);
    let mut lost = 0;
    // A round of two.
    let report = way.go(30, |_, _| {
        lost += 1;
        lost > 2
    });
    assert_eq!(report.state, ProbeState::Reachable);
    assert_eq!((report.small.lost, report.finding), (1, None));
    let report = way.go(12, |_, _| false);
    assert_eq!(report.state, ProbeState::Unreachable);
    let finding = report.finding.unwrap();
    assert!(
        finding.starts_with("does not answer any more, for 1"),
        "{finding}"
    );
    // It is asked no more often for that, and is back with its first answer.
    way.sent = 0;
    way.go(100, |_, _| false);
    assert!(way.sent <= 42, "{} packets in 100 s", way.sent);
    let report = way.go(6, |_, _| true);
    assert_eq!(report.state, ProbeState::Reachable);
}

#[test]
fn o22_who_never_answered_is_missed_only_if_it_must_answer() {
    for (is_ours, state) in [
        (true, ProbeState::Unreachable),
        (false, ProbeState::NoAnswerYet),
    ] {
        let report = Way::new(is_ours).go(60, |_, _| false);
        assert_eq!(report.state, state);
        assert_eq!(report.finding.is_some(), is_ours);
        assert_eq!((report.last_answer_ms, report.largest), (None, None));
    }
}

#[test]
fn m03_the_largest_size_is_found_to_the_byte_and_a_wider_way_is_noticed() {
    for mtu in [1280, 1281, 1400, 1449] {
        let mut way = Way::new(true);
        way.go(60, |_, _| true);
        let report = way.go(60, |_, size| size <= mtu);
        assert_eq!(report.largest, Some(mtu));
        assert_eq!(way.path.limit(), Some(mtu));
        let finding = report.finding.unwrap();
        let words = format!("packets of {FULL} bytes do not arrive, of {mtu} do");
        assert!(finding.starts_with(&words), "{finding}");
        // It stays so, without a search each time.
        way.sent = 0;
        way.go(100, |_, size| size <= mtu);
        assert_eq!(way.sent, 3 * 20);
        let report = way.go(20, |_, _| true);
        assert_eq!((report.largest, report.finding), (Some(FULL), None));
        // Narrower than it was already.
        way.go(60, |_, size| size <= 1350);
        let report = way.go(60, |_, size| size <= 1300);
        assert_eq!(report.largest, Some(1300));
    }
}

/// Pseudo-random, the same each time.
fn lossy(percent: u64) -> impl FnMut(u16, u16) -> bool {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    move |_, _| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % 100 >= percent
    }
}

#[test]
fn m03_a_lossy_way_is_not_taken_for_a_narrow_one() {
    for percent in [1, 10, 30] {
        let mut way = Way::new(true);
        let mut passes = lossy(percent);
        for _ in 0..200 {
            let report = way.go(50, &mut passes);
            assert_eq!(way.path.limit(), None, "{percent} %, {report:?}");
            assert_ne!(report.state, ProbeState::NoAnswerYet);
        }
    }
    let mut way = Way::new(true);
    let report = way.go(300, lossy(30));
    let finding = report.finding.unwrap();
    assert!(finding.ends_with("of 20 probes were lost"), "{finding}");
}

#[test]
fn m03_a_peer_that_goes_while_its_size_is_looked_for_leaves_no_limit() {
    for seconds in 1..20 {
        let mut way = Way::new(true);
        way.go(30, |_, _| true);
        way.go(seconds, |_, size| size <= 1300);
        let report = way.go(60, |_, _| false);
        assert_eq!(report.state, ProbeState::Unreachable);
        assert!(
            matches!(way.path.limit(), None | Some(1300)),
            "{:?} after {seconds} s",
            way.path.limit()
        );
    }
}

#[test]
fn what_this_node_could_not_send_says_nothing_of_the_peer() {
    let mut way = Way::new(true);
    way.go(30, |_, _| true);
    for _ in 0..10 {
        way.go(2, |_, _| false);
        way.path.excuse(way.now + Duration::from_secs(1));
    }
    let report = way.go(10, |_, _| true);
    assert_eq!(
        (report.state, report.small.lost),
        (ProbeState::Reachable, 0)
    );
    assert!(way.now > way.began);
}
