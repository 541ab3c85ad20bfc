//! How the packed form of a rule map is walked: spans of fifteen pairs of words, found by id.
//!
//! # Cost
//! At most [`SPAN_DEPTH`] spans, each one lookup and at most fifteen comparisons. A rule map without CIDRs takes one.

use super::table::{Full, Table};
use sluice_contract::policy::{
    Action, RuleId, SPAN_DEPTH, SPAN_ENTRIES, SpanEntry, SpanId, SpanRow, Target,
};

/// Two words an entry, after views and id.
pub(super) const SPAN_SLOT: usize = 2 + 2 * SPAN_ENTRIES;
/// The kind of entries that a span does not use.
const UNUSED: u64 = 0xff;

/// What one side of a layer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Rule {
        action: Action,
        order: u16,
        rule: RuleId,
    },
    /// A span is missing, or the way is too long.
    Broken,
}

impl Found {
    /// What two sides of a layer say together: of two rules the one with the lower order.
    #[inline]
    pub(super) fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Broken, _) | (_, Self::Broken) => Self::Broken,
            (Self::Nothing, it) | (it, Self::Nothing) => it,
            (Self::Rule { order: i, .. }, Self::Rule { order: j, .. }) if j < i => other,
            _ => self,
        }
    }
}

/// All spans.
#[derive(Debug)]
pub(super) struct Spans<'m> {
    pub(super) table: Table<'m, SPAN_SLOT, 1>,
}

impl Spans<'_> {
    /// Follows `words` (of an address; may be empty) and then `port` from the span `root`.
    pub(super) fn walk(&self, root: SpanId, words: &[u32], port: u32) -> Found {
        if root == SpanId::NOTHING {
            return Found::Nothing;
        }
        let mut words = words.iter();
        let mut key = *words.next().unwrap_or(&port);
        let mut span = root;
        for _ in 0..SPAN_DEPTH {
            let Some(entries) = self.table.find(0, &[span.0]) else {
                return Found::Broken;
            };
            match entry_for(entries, key) {
                Some(Target::Nothing) => return Found::Nothing,
                Some(Target::Rule {
                    action,
                    order,
                    rule,
                }) => {
                    return Found::Rule {
                        action,
                        order,
                        rule,
                    };
                }
                Some(Target::Finer(finer)) => span = finer,
                Some(Target::Word(next)) => {
                    let Some(word) = words.next() else {
                        return Found::Broken;
                    };
                    (span, key) = (next, *word);
                }
                Some(Target::Ports(next)) => (span, key) = (next, port),
                None => return Found::Broken,
            }
            if span == SpanId::NOTHING {
                return Found::Nothing;
            }
        }
        Found::Broken
    }

    pub(super) fn put(&mut self, row: &SpanRow) -> Result<(), Full> {
        let mut words = [UNUSED; 2 * SPAN_ENTRIES];
        for (pair, entry) in words.chunks_exact_mut(2).zip(&row.entries) {
            if let [head, target] = pair {
                (*head, *target) = pack(entry);
            }
        }
        self.table.put(0, &[row.id.0], &words)
    }
}

/// Whether a span is one that can be walked: it begins at 0 and its starts grow.
pub(super) fn is_well_formed(row: &SpanRow) -> bool {
    row.id != SpanId::NOTHING
        && row.entries.first().is_some_and(|entry| entry.start == 0)
        && row
            .entries
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.start < b.start))
}

/// `start << 32 | order << 8 | kind`, and the id or the rule.
fn pack(entry: &SpanEntry) -> (u64, u64) {
    let start = u64::from(entry.start) << 32;
    match entry.target {
        Target::Nothing => (start, 0),
        Target::Rule {
            action,
            order,
            rule,
        } => (
            start | (u64::from(order) << 8) | (1 + action as u64),
            u64::from(rule.0),
        ),
        Target::Finer(span) => (start | 4, span.0),
        Target::Word(span) => (start | 5, span.0),
        Target::Ports(span) => (start | 6, span.0),
    }
}

fn unpack(head: u64, target: u64) -> Option<Target> {
    let action = match head & 0xff {
        0 => return Some(Target::Nothing),
        1 => Action::Accept,
        2 => Action::Deny,
        3 => Action::Pass,
        4 => return Some(Target::Finer(SpanId(target))),
        5 => return Some(Target::Word(SpanId(target))),
        6 => return Some(Target::Ports(SpanId(target))),
        _ => return None,
    };
    Some(Target::Rule {
        action,
        order: (head >> 8) as u16,
        rule: RuleId(target as u32),
    })
}

/// The last entry in use whose start is not above `key`.
#[inline]
fn entry_for(words: &[u64], key: u32) -> Option<Target> {
    let mut found = None;
    for pair in words.chunks_exact(2) {
        let [head, target] = pair else { break };
        if *head & 0xff == UNUSED || (*head >> 32) as u32 > key {
            break;
        }
        found = Some((*head, *target));
    }
    let (head, target) = found?;
    unpack(head, target)
}
