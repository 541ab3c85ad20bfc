//! Whose turn it is: all peers are probed at one interval, or as often as the budget of packets a second allows. Nothing here
//! reads a clock or sends anything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::path::Path;
use crate::uplink::config::ProbeConfig;
use crate::uplink::report::{ProbeReport, ProbeState};

/// Packets of a round, at most.
const ROUND: u32 = 3;
/// Words on peers in a minute; more are counted.
const WORDS: u32 = 10;
const MINUTE: Duration = Duration::from_secs(60);
/// Unless the appliance serves, this is how long everything waits.
const EXCUSED: Duration = Duration::from_secs(1);

/// A peer that is to be probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::uplink) struct Target {
    /// Where it is reached, by which it is known.
    pub(in crate::uplink) address: IpAddr,
    pub(in crate::uplink) name: Arc<str>,
    /// A node of ours, which must answer.
    pub(in crate::uplink) is_ours: bool,
    /// This node's address among its pods, and the peer's.
    pub(in crate::uplink) ends: (IpAddr, IpAddr),
    /// The largest packet that should come through.
    pub(in crate::uplink) full: u16,
}

/// A probe to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Send {
    pub(super) ends: (IpAddr, IpAddr),
    pub(super) sequence: u16,
    pub(super) size: u16,
}

/// A line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Good(Arc<str>, &'static str),
    Bad(Arc<str>, String),
    /// And so many that were not said.
    More(u32),
}

/// All of them.
#[derive(Debug)]
pub(super) struct Paths {
    config: ProbeConfig,
    paths: BTreeMap<IpAddr, (Target, Path)>,
    by_end: BTreeMap<IpAddr, IpAddr>,
    queue: BTreeSet<(Instant, IpAddr)>,
    /// Packets that may go now, in thousandths.
    tokens: u64,
    filled: Option<Instant>,
    words: Words,
}

#[derive(Debug, Default)]
struct Words {
    minute: Option<Instant>,
    said: u32,
    unsaid: u32,
}

impl Paths {
    pub(super) fn new(config: ProbeConfig) -> Self {
        Self {
            config,
            paths: BTreeMap::new(),
            by_end: BTreeMap::new(),
            queue: BTreeSet::new(),
            tokens: 0,
            filled: None,
            words: Words::default(),
        }
    }

    /// These are to be probed and no others. Of one that stays what is known stays.
    pub(super) fn retarget(&mut self, targets: &[Target], now: Instant) {
        let mut former = std::mem::take(&mut self.paths);
        for target in targets {
            let known = former
                .remove(&target.address)
                .filter(|(was, _)| was.ends == target.ends && was.name == target.name);
            let mut path = known.map_or_else(|| Path::new(target.full, now), |(_, path)| path);
            path.set_full(target.full);
            self.paths.insert(target.address, (target.clone(), path));
        }
        let all = self.paths.iter();
        self.by_end = all.map(|(at, (target, _))| (target.ends.1, *at)).collect();
        let all = self.paths.iter();
        self.queue = all.map(|(at, (_, path))| (path.due(), *at)).collect();
    }

    /// Whether somebody at that address may ask.
    pub(super) fn is_peer(&self, end: IpAddr) -> bool {
        self.by_end.contains_key(&end)
    }

    /// An answer has come from there.
    pub(super) fn answered(&mut self, end: IpAddr, sequence: u16, size: u16, now: Instant) {
        let Some(at) = self.by_end.get(&end).copied() else {
            return;
        };
        if let Some((_, path)) = self.paths.get_mut(&at) {
            let due = path.due();
            path.answered(sequence, size, now);
            if path.due() != due {
                self.queue.remove(&(due, at));
                self.queue.insert((path.due(), at));
            }
        }
    }

    /// This node can send nothing.
    pub(super) fn excuse(&mut self, now: Instant) {
        for (_, path) in self.paths.values_mut() {
            path.excuse(now + EXCUSED);
        }
        let all = self.paths.iter();
        self.queue = all.map(|(at, (_, path))| (path.due(), *at)).collect();
    }

    /// What is to be sent now, and what is to be said.
    pub(super) fn turn(&mut self, now: Instant) -> (Vec<Send>, Vec<Word>) {
        self.fill(now);
        let interval = self.interval();
        let (mut sends, mut words) = (Vec::new(), Vec::new());
        let round = u64::from(ROUND) * 1000;
        while self.tokens >= round
            && let Some((due, at)) = self.queue.first().copied()
            && due <= now
        {
            self.queue.pop_first();
            let Some((target, path)) = self.paths.get_mut(&at) else {
                continue;
            };
            let before = (path.state(), path.limit());
            let sent = path.turn(now, interval, target.is_ours);
            let after = (path.state(), path.limit());
            if before != after {
                words.extend(word(target, before, after, &path.report(now)));
            }
            self.tokens = self.tokens.saturating_sub(sent.len() as u64 * 1000);
            sends.extend(sent.into_iter().map(|(sequence, size)| Send {
                ends: target.ends,
                sequence,
                size,
            }));
            self.queue.insert((path.due(), at));
        }
        (sends, self.words.allowed(words, now))
    }

    /// A tenth of a second's packets may go at once.
    fn fill(&mut self, now: Instant) {
        let rate = u64::from(self.config.per_second);
        let since = now.saturating_duration_since(self.filled.unwrap_or(now));
        let grown = since.as_micros() as u64 * rate / 1000;
        let most = (rate * 100).max(u64::from(ROUND) * 1000);
        self.tokens = match self.filled {
            None => most,
            Some(_) => self.tokens.saturating_add(grown).min(most),
        };
        if grown > 0 || self.filled.is_none() {
            self.filled = Some(now);
        }
    }

    fn interval(&self) -> Duration {
        let asked = Duration::from_millis(self.config.interval_ms.into());
        let packets = self.paths.len() as u64 * 2 * 1000;
        asked.max(Duration::from_millis(
            packets / u64::from(self.config.per_second.max(1)),
        ))
    }

    /// When there is something to do.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let due = self.queue.first()?.0;
        let round = u64::from(ROUND) * 1000;
        let short = round.saturating_sub(self.tokens);
        let filled =
            now + Duration::from_micros(short * 1000 / u64::from(self.config.per_second.max(1)));
        Some(due.max(filled))
    }

    /// What is known of a peer.
    pub(super) fn report(&self, address: IpAddr, now: Instant) -> ProbeReport {
        let known = self.paths.get(&address);
        known.map_or_else(ProbeReport::not_probed, |(_, path)| path.report(now))
    }

    /// The peers to whom less comes through than should.
    pub(super) fn limits(&self) -> BTreeMap<IpAddr, u16> {
        let all = self.paths.iter();
        all.filter_map(|(at, (_, path))| Some((*at, path.limit()?)))
            .collect()
    }
}

type Known = (ProbeState, Option<u16>);

fn word(target: &Target, before: Known, after: Known, report: &ProbeReport) -> Option<Word> {
    let name = target.name.clone();
    match (before, after) {
        ((ProbeState::NoAnswerYet, _), (ProbeState::Reachable, None)) => None,
        ((_, _), (ProbeState::Unreachable, _)) | (_, (ProbeState::Reachable, Some(_))) => {
            Some(Word::Bad(name, report.finding.clone()?))
        }
        ((ProbeState::Unreachable, _), (ProbeState::Reachable, _)) => {
            Some(Word::Good(name, "it answers again"))
        }
        ((_, Some(_)), (_, None)) => Some(Word::Good(name, "full-size packets arrive again")),
        _ => None,
    }
}

impl Words {
    fn allowed(&mut self, words: Vec<Word>, now: Instant) -> Vec<Word> {
        let is_over = |began: Instant| now.saturating_duration_since(began) >= MINUTE;
        let mut said = Vec::new();
        if self.minute.is_none_or(is_over) {
            self.minute = Some(now);
            self.said = 0;
            let unsaid = std::mem::take(&mut self.unsaid);
            said.extend((unsaid > 0).then_some(Word::More(unsaid)));
        }
        for word in words {
            if self.said < WORDS {
                self.said += 1;
                said.push(word);
            } else {
                self.unsaid += 1;
            }
        }
        said
    }
}

#[cfg(test)]
#[path = "paths_tests.rs"]
mod tests;
