//! What probes say of the way to one peer: whether it answers, what is lost, and the largest packet that comes through.
//!
//! Rounds of a small and a full packet go at intervals; a round is judged when its answers are there or late. A full packet that
//! does not come through while small ones do is looked into: sizes are tried by halves, several packets each, so that a
//! lossy path is not taken for a narrow one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::echo::SMALL;
use crate::uplink::report::{ProbeReport, ProbeState, SizeReport};

/// An answer that has not come by then is late, and lost until it comes.
const LATE: Duration = Duration::from_secs(1);
/// Rounds that are remembered: loss is counted over them.
const ROUNDS: usize = 20;
/// So many rounds in a row decide.
const DECIDING: usize = 3;
/// After a round without answer the next comes sooner, until it is decided.
const AGAIN: Duration = Duration::from_millis(1200);
/// Packets of each size that is tried; of the full size, on whose word the others depend.
const TRIES: usize = 3;
const FULL_TRIES: usize = 6;

/// One packet.
#[derive(Clone, Copy, Debug)]
struct Probe {
    sequence: u16,
    size: u16,
    took: Option<Duration>,
}

#[derive(Clone, Debug)]
struct Round {
    at: Instant,
    small: Probe,
    full: Probe,
    /// Of the largest size that came through, where that is less than the full one.
    limit: Option<Probe>,
}

impl Round {
    fn probes(&mut self) -> impl Iterator<Item = &mut Probe> {
        [&mut self.small, &mut self.full]
            .into_iter()
            .chain(&mut self.limit)
    }

    fn is_answered(&self) -> bool {
        self.small.took.or(self.full.took).is_some()
    }

    /// Small packets come through, full ones do not.
    fn is_narrow(&self) -> bool {
        let largest = self.limit.as_ref().unwrap_or(&self.full);
        self.small.took.is_some() && largest.took.is_none()
    }
}

/// The largest size is looked for.
#[derive(Clone, Debug)]
struct Search {
    /// Comes through.
    low: u16,
    /// Does not, as far as is known.
    high: u16,
    trying: Vec<Probe>,
    /// Small packets beside them: where they are lost as well, size is not why.
    beside: Vec<Probe>,
    at: Instant,
}

/// The way to one peer.
#[derive(Debug)]
pub(super) struct Path {
    full: u16,
    limit: Option<u16>,
    rounds: VecDeque<Round>,
    search: Option<Search>,
    /// Earlier rounds say nothing more of size: they were looked into.
    looked: Instant,
    sequence: u16,
    last_answer: Option<Instant>,
    took: Option<Duration>,
    /// Before it nothing is to be sent.
    due: Instant,
    state: ProbeState,
}

impl Path {
    /// Nothing is known. `full`: the largest packet that should come through.
    pub(super) fn new(full: u16, due: Instant) -> Self {
        Self {
            full,
            limit: None,
            rounds: VecDeque::new(),
            search: None,
            looked: due,
            sequence: 0,
            last_answer: None,
            took: None,
            due,
            state: ProbeState::NoAnswerYet,
        }
    }

    pub(super) const fn due(&self) -> Instant {
        self.due
    }

    pub(super) const fn state(&self) -> ProbeState {
        self.state
    }

    /// The largest packet that comes through, where that is less than it should be.
    pub(super) const fn limit(&self) -> Option<u16> {
        self.limit
    }

    /// Another size should come through now.
    pub(super) fn set_full(&mut self, full: u16) {
        if self.full != full {
            self.full = full;
            self.limit = None;
            self.search = None;
            self.rounds.clear();
        }
    }

    /// This node could send nothing: what is not answered yet says nothing of the peer.
    pub(super) fn excuse(&mut self, due: Instant) {
        self.rounds.retain(Round::is_answered);
        self.search = None;
        self.due = due;
    }

    /// Judges what has been sent, and says what is to be sent now: numbers and sizes. `is_ours`: it must answer.
    pub(super) fn turn(
        &mut self,
        now: Instant,
        interval: Duration,
        is_ours: bool,
    ) -> Vec<(u16, u16)> {
        self.judge(now, is_ours);
        if let Some(sent) = self.look_further(now) {
            return sent;
        }
        self.due = now + self.pause(now, interval);
        self.begin(now)
    }

    fn begin(&mut self, now: Instant) -> Vec<(u16, u16)> {
        let round = Round {
            at: now,
            small: self.probe(SMALL),
            full: self.probe(self.full),
            limit: self.limit.map(|limit| self.probe(limit)),
        };
        if self.rounds.len() >= ROUNDS {
            self.rounds.pop_front();
        }
        self.rounds.push_back(round.clone());
        let mut round = round;
        round.probes().map(|it| (it.sequence, it.size)).collect()
    }

    fn probe(&mut self, size: u16) -> Probe {
        self.sequence = self.sequence.wrapping_add(1);
        Probe {
            sequence: self.sequence,
            size,
            took: None,
        }
    }

    /// An answer has come.
    pub(super) fn answered(&mut self, sequence: u16, size: u16, now: Instant) {
        let is_it = |probe: &Probe| probe.sequence == sequence && probe.size == size;
        for round in self.rounds.iter_mut().rev() {
            let at = round.at;
            if let Some(probe) = round.probes().find(|it| is_it(it)) {
                let took = now.saturating_duration_since(at);
                probe.took.get_or_insert(took);
                if probe.size == SMALL {
                    self.took = Some(took);
                }
                self.last_answer = Some(now);
                return;
            }
        }
        if let Some(search) = &mut self.search
            && let Some(probe) = (search.trying.iter_mut())
                .chain(&mut search.beside)
                .find(|it| is_it(it))
        {
            probe.took = Some(now.saturating_duration_since(search.at));
            self.last_answer = Some(now);
            if size != SMALL {
                // What is known need not be waited for.
                self.due = self.due.min(now);
            }
        }
    }

    fn settled(&self, now: Instant) -> impl DoubleEndedIterator<Item = &Round> {
        self.rounds.iter().filter(move |round| {
            let probes = [Some(&round.small), Some(&round.full), round.limit.as_ref()];
            let all = probes.into_iter().flatten().all(|it| it.took.is_some());
            all || now.saturating_duration_since(round.at) >= LATE
        })
    }

    fn judge(&mut self, now: Instant, is_ours: bool) {
        let last = self.settled(now).rev().take(DECIDING);
        let seen: Vec<bool> = last.map(Round::is_answered).collect();
        if seen.first() == Some(&true) {
            self.state = ProbeState::Reachable;
        } else if seen.len() == DECIDING && !seen.contains(&true) {
            let expected = is_ours || self.last_answer.is_some();
            if expected {
                self.state = ProbeState::Unreachable;
            }
        }
        let wide = |it: &Round| it.full.took.is_some();
        if self.limit.is_some() && self.all_of_the_last(now, wide) {
            self.limit = None;
        }
        if self.search.is_none() && self.all_of_the_last(now, Round::is_narrow) {
            self.search = Some(Search {
                low: SMALL,
                high: self.full.saturating_add(1),
                trying: Vec::new(),
                beside: Vec::new(),
                at: now,
            });
        }
    }

    /// Of rounds that say something: those of which the small packet was answered.
    fn all_of_the_last(&self, now: Instant, are: impl Fn(&Round) -> bool) -> bool {
        let telling = |it: &&Round| it.small.took.is_some() && it.at >= self.looked;
        let telling = self.settled(now).filter(telling);
        let seen: Vec<bool> = telling.rev().take(DECIDING).map(are).collect();
        seen.len() == DECIDING && !seen.contains(&false)
    }

    /// The next size of a search, if there is one.
    fn look_further(&mut self, now: Instant) -> Option<Vec<(u16, u16)>> {
        let mut search = self.search.take()?;
        if let Some(size) = search.trying.first().map(|it| it.size) {
            let any = |probes: &[Probe]| probes.iter().any(|it| it.took.is_some());
            let passes = any(&search.trying);
            let waits = now.saturating_duration_since(search.at) < LATE;
            if passes {
                search.low = size;
            } else if waits {
                self.due = search.at + LATE;
                self.search = Some(search);
                return Some(Vec::new());
            } else if any(&search.beside) {
                search.high = size;
            } else {
                self.looked = now;
                return None;
            }
        }
        if search.low + 1 >= search.high {
            self.limit = (search.low < self.full).then_some(search.low);
            self.looked = now;
            return None;
        }
        let is_first = search.high > self.full;
        let (size, tries) = if is_first {
            (self.full, FULL_TRIES)
        } else {
            (search.low + (search.high - search.low) / 2, TRIES)
        };
        search.trying = (0..tries).map(|_| self.probe(size)).collect();
        search.beside = (0..tries).map(|_| self.probe(SMALL)).collect();
        search.at = now;
        let sent = search.trying.iter().chain(&search.beside);
        let sent = sent.map(|it| (it.sequence, it.size)).collect();
        self.search = Some(search);
        self.due = now + LATE;
        Some(sent)
    }

    fn pause(&self, now: Instant, interval: Duration) -> Duration {
        let last = self.settled(now).next_back();
        let decided = match self.state {
            ProbeState::Reachable => last.is_none_or(Round::is_answered),
            _ => true,
        };
        let narrow = last.is_some_and(Round::is_narrow) && self.search.is_none();
        if decided && !narrow {
            interval
        } else {
            interval.min(AGAIN)
        }
    }

    /// What is known as of now.
    pub(super) fn report(&self, now: Instant) -> ProbeReport {
        let of_size = |size: u16, probe: fn(&Round) -> &Probe| {
            let took: Vec<_> = self.settled(now).map(|it| probe(it).took).collect();
            SizeReport {
                size,
                sent: took.len(),
                lost: took.iter().filter(|it| it.is_none()).count(),
            }
        };
        let millis = |it: Duration| u64::try_from(it.as_millis()).unwrap_or(u64::MAX);
        let micros = |it: Duration| u64::try_from(it.as_micros()).unwrap_or(u64::MAX);
        let age = |at: Instant| millis(now.saturating_duration_since(at));
        let passed = self.rounds.iter().any(|it| it.full.took.is_some());
        let report = ProbeReport {
            state: self.state,
            last_answer_ms: self.last_answer.map(age),
            rtt_us: self.took.map(micros),
            small: of_size(SMALL, |round| &round.small),
            full: of_size(self.full, |round| &round.full),
            largest: self.limit.or_else(|| passed.then_some(self.full)),
            finding: None,
        };
        ProbeReport {
            finding: report.judged(),
            ..report
        }
    }
}

#[cfg(test)]
#[path = "path_tests.rs"]
mod tests;
