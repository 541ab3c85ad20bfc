//! What the table says of itself: its connections one after another, its counters, and who fills it.

use sluice_contract::LinkId;

use crate::conntrack::state::{State, TICK_SHIFT};
use crate::conntrack::{Attached, ConnId, Conntrack, Invalid};
use crate::flow::Flow;
use crate::time::{Duration, Instant};

/// What has happened since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counters {
    pub committed: u64,
    /// Commits that found the flow's connection already there (K-06).
    pub conflicts: u64,
    /// Commits whose translation was in use.
    pub reply_taken: u64,
    pub expired: u64,
    pub removed: u64,
    /// Connections that gave way to a new one with the same flow.
    pub reopened: u64,
    pub evicted_unreplied: u64,
    pub evicted_spent: u64,
    /// Established ones that gave way to a group that had less than is its for certain.
    pub evicted_established: u64,
    /// Refused because everything was established.
    pub refused_full: u64,
    /// Times that both buckets of a flow were full, so that another entry had to move.
    pub crowded: u64,
    pub refused_quota: u64,
    /// Packets that were judged invalid.
    pub invalid: u64,
    /// Times the clock went on by more than was believed.
    pub clock_leaps: u64,
}

impl Counters {
    pub(crate) fn count_invalid(&mut self, invalid: Invalid) -> Invalid {
        self.invalid += 1;
        invalid
    }
}

/// A connection, as a person wants to see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: ConnId,
    pub original: Flow,
    pub reply: Flow,
    pub state: State,
    pub owner: u16,
    pub attached: Attached,
    /// Since its last packet.
    pub idle: Duration,
    /// Until it ends if no packet comes.
    pub remaining: Duration,
}

/// What is to become of a visited connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visit {
    Keep,
    Remove,
    /// Keep it, and come back here: the visitor has no room for it.
    Pause,
}

/// Who holds how much of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Talker {
    /// The link; 0 in places of a report that were not filled.
    pub link: u16,
    /// Connections it opened that are in the table (those that take two slots count twice).
    pub connections: u32,
    /// Of these, not answered.
    pub unreplied: u32,
    /// Connections that were refused to it, and that were ended before their time, since the start.
    pub refused: u32,
    pub evicted: u32,
}

impl Conntrack<'_> {
    /// What has happened since the start.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Shows up to `budget` slots from `cursor` on to `visitor`, who says what becomes of each connection: listing,
    /// filtering and flushing are all this (K-10). Returns where to go on, `None` after the last. Connections that come
    /// and go between calls may be missed; one that stays is seen exactly once.
    pub fn visit(
        &mut self,
        cursor: u32,
        budget: u32,
        now: Instant,
        mut visitor: impl FnMut(&Entry) -> Visit,
    ) -> Option<u32> {
        let tick = self.clock.tick_at(now) as u32;
        let watermark = self.region.header.watermark;
        let end = cursor.saturating_add(budget).min(watermark);
        for slot in cursor..end {
            let Some(entry) = self.entry(slot, tick) else {
                continue;
            };
            match visitor(&entry) {
                Visit::Keep => {}
                Visit::Remove => self.remove(entry.id),
                Visit::Pause => return Some(slot),
            }
        }
        (end < watermark).then_some(end)
    }

    fn entry(&self, slot: u32, tick: u32) -> Option<Entry> {
        if !self.region.is_connection(slot) {
            return None;
        }
        let row = self.region.rows.get(slot as usize)?;
        let state = State::from_raw(row.state)?;
        let age = tick.wrapping_sub(row.seen);
        let timeout = self.settings.timeouts.ticks(state);
        let left = timeout.checked_sub(age).filter(|left| *left > 0)?;
        let span = |ticks: u32| Duration::from_micros(u64::from(ticks) << TICK_SHIFT);
        Some(Entry {
            id: ConnId(slot),
            original: row.original(),
            reply: self.region.reply_of(row),
            state,
            owner: row.owner,
            attached: self.attached(ConnId(slot)),
            idle: span(age),
            remaining: span(left),
        })
    }

    /// The links that hold the most, most first; returns how many there were room for (K-03).
    ///
    /// # Cost
    /// One pass over the 4 095 possible links: some microseconds. For reports, not for packets.
    pub fn top_talkers(&self, top: &mut [Talker]) -> usize {
        let mut filled = 0;
        for (link, owner) in self.region.owners.iter().enumerate() {
            if owner.slots == 0 && owner.refused == 0 {
                continue;
            }
            let talker = Talker {
                link: link as u16,
                connections: owner.slots,
                unreplied: owner.unreplied,
                refused: owner.refused,
                evicted: owner.evicted,
            };
            let before = top[..filled].partition_point(|other| other.connections >= owner.slots);
            if before == top.len() {
                continue;
            }
            filled = (filled + 1).min(top.len());
            top[before..filled].rotate_right(1);
            top[before] = talker;
        }
        filled
    }

    /// What one link holds.
    pub fn talker(&self, link: LinkId) -> Talker {
        let owner = self.region.owners.get(link.index());
        let owner = owner.copied().unwrap_or_default();
        Talker {
            link: link.raw(),
            connections: owner.slots,
            unreplied: owner.unreplied,
            refused: owner.refused,
            evicted: owner.evicted,
        }
    }
}
