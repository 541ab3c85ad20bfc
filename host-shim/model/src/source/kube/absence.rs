//! When an answer that a kind is not to be had is taken for "there are no such objects".
//!
//! A server that has just opened its port answers 403 to every client until its own caches are
//! full. That takes a moment, and a node that took it for an answer would be open. So of kinds that
//! need not be there (those of custom resource definitions):
//!
//! | answer | nothing was read before | objects were read before |
//! |---|---|---|
//! | 404 | counts at once: a server that does not know its definitions yet answers 503 | counts once it has lasted |
//! | 403 | counts once it has lasted | never counts: what is known stays |
//!
//! It has lasted when there was no other answer for [`Patience::lasting`]. What counted once,
//! counts until the kind is there. Of the kinds that every server has neither answer counts.

use std::time::{Duration, Instant};

use super::Patience;
use crate::object::Kind;

/// What is known of one kind's absence.
#[derive(Debug, Default)]
pub(super) struct Absence {
    /// Which answer has been given since when.
    answer: Option<(bool, Instant)>,
    /// It is taken for absent.
    counts: bool,
}

/// What an answer means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There are no such objects.
    Absent,
    /// That is not known yet; if at all, then after this time.
    Open(Option<Duration>),
}

/// Whether a server may lack a kind.
pub(super) fn is_optional(kind: Kind) -> bool {
    matches!(kind, Kind::ClusterNetworkPolicy | Kind::NodePolicy)
}

impl Absence {
    /// Another answer came, or none.
    pub(super) fn interrupted(&mut self) {
        self.answer = None;
    }

    /// The kind is there.
    pub(super) fn over(&mut self) {
        *self = Self::default();
    }

    /// The server answers 404 or, if `forbidden`, 403.
    pub(super) fn judge(
        &mut self,
        kind: Kind,
        forbidden: bool,
        has_objects: bool,
        patience: Patience,
        now: Instant,
    ) -> Verdict {
        if self.counts {
            return Verdict::Absent;
        }
        if !is_optional(kind) || (forbidden && has_objects) {
            return Verdict::Open(None);
        }
        let since = match self.answer {
            Some((answer, since)) if answer == forbidden => since,
            _ => now,
        };
        self.answer = Some((forbidden, since));
        let lasted = now.saturating_duration_since(since);
        self.counts = lasted >= patience.lasting || !(forbidden || has_objects);
        match patience.lasting.checked_sub(lasted) {
            _ if self.counts => Verdict::Absent,
            left => Verdict::Open(left),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind::NodePolicy;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn forbidden_counts_only_after_ten_seconds_without_another_answer() {
        let (start, patience) = (Instant::now(), Patience::default());
        let mut absence = Absence::default();
        let judge = |absence: &mut Absence, seconds| {
            absence.judge(KIND, true, false, patience, at(start, seconds))
        };
        let open = |seconds| Verdict::Open(Some(Duration::from_secs(seconds)));
        assert_eq!(judge(&mut absence, 0), open(10));
        assert_eq!(judge(&mut absence, 9), open(1));
        absence.interrupted();
        assert_eq!(judge(&mut absence, 10), open(10));
        assert_eq!(judge(&mut absence, 20), Verdict::Absent);
        // What counted goes on to count, whatever happens to the server, until the kind is there.
        absence.interrupted();
        assert_eq!(judge(&mut absence, 21), Verdict::Absent);
        absence.over();
        assert_eq!(judge(&mut absence, 22), open(10));
    }

    #[test]
    fn unknown_counts_at_once_unless_objects_would_be_lost_by_it() {
        let (start, patience) = (Instant::now(), Patience::default());
        let mut absence = Absence::default();
        let judge = |absence: &mut Absence, has_objects, seconds| {
            absence.judge(KIND, false, has_objects, patience, at(start, seconds))
        };
        assert_eq!(judge(&mut absence, false, 0), Verdict::Absent);
        absence.over();
        let open = |seconds| Verdict::Open(Some(Duration::from_secs(seconds)));
        assert_eq!(judge(&mut absence, true, 1), open(10));
        assert_eq!(judge(&mut absence, true, 11), Verdict::Absent);
    }

    #[test]
    fn what_was_read_is_not_lost_by_a_missing_right_nor_a_kind_of_every_server_by_anything() {
        let (start, patience) = (Instant::now(), Patience::default());
        let mut absence = Absence::default();
        for seconds in [0, 100] {
            let now = at(start, seconds);
            let read_before = absence.judge(KIND, true, true, patience, now);
            assert_eq!(read_before, Verdict::Open(None));
            for forbidden in [true, false] {
                let pods = absence.judge(Kind::Pod, forbidden, false, patience, now);
                assert_eq!(pods, Verdict::Open(None));
            }
        }
    }
}
