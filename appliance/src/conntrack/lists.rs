//! Intrusive lists of rows: the places of the timer wheel, the two eviction lists, and the free slots.
//!
//! Invariants, all checked by the audit:
//! 1. A connection is in exactly one place of the wheel, the one its row names.
//! 2. A connection is on the eviction list of its standing, in order of arrival there; an established one is on none.
//! 3. A slot below the watermark is a connection, an extension of exactly one connection, or on the free list.

use crate::conntrack::region::{Head, NONE, Region, WHEEL, pack, unpack};
use crate::conntrack::state::{EXTENSION, FREE, Standing};

const PREVIOUS: usize = 0;
const NEXT: usize = 1;

const fn list_of(standing: Standing) -> Option<usize> {
    match standing {
        Standing::Unreplied => Some(WHEEL),
        Standing::Spent => Some(WHEEL + 1),
        Standing::Established => None,
    }
}

impl Region<'_> {
    /// Appends a row to a place of the wheel.
    pub(crate) fn wheel_push(&mut self, slot: u32, place: u16) {
        let last = self.heads[usize::from(place)].last;
        let row = &mut self.rows[slot as usize];
        row.armed = place;
        row.previous = pack(last);
        row.next = pack(NONE);
        match last {
            NONE => self.heads[usize::from(place)].first = slot,
            _ => self.rows[last as usize].next = pack(slot),
        }
        self.heads[usize::from(place)].last = slot;
    }

    /// Takes a row out of the wheel.
    pub(crate) fn wheel_remove(&mut self, slot: u32) {
        let row = &self.rows[slot as usize];
        let (place, previous, next) = (
            usize::from(row.armed),
            unpack(row.previous),
            unpack(row.next),
        );
        match previous {
            NONE => self.heads[place].first = next,
            _ => self.rows[previous as usize].next = pack(next),
        }
        match next {
            NONE => self.heads[place].last = previous,
            _ => self.rows[next as usize].previous = pack(previous),
        }
    }

    /// Appends a connection to the list of its standing, if that has one.
    pub(crate) fn list_push(&mut self, slot: u32, standing: Standing) {
        let Some(list) = list_of(standing) else {
            return;
        };
        let last = self.heads[list].last;
        self.details[slot as usize].max_end = [last, NONE];
        match last {
            NONE => self.heads[list].first = slot,
            _ => self.details[last as usize].max_end[NEXT] = slot,
        }
        self.heads[list].last = slot;
    }

    /// Takes a connection off the list of its standing, if that has one.
    pub(crate) fn list_remove(&mut self, slot: u32, standing: Standing) {
        let Some(list) = list_of(standing) else {
            return;
        };
        let [previous, next] = self.details[slot as usize].max_end;
        match previous {
            NONE => self.heads[list].first = next,
            _ => self.details[previous as usize].max_end[NEXT] = next,
        }
        match next {
            NONE => self.heads[list].last = previous,
            _ => self.details[next as usize].max_end[PREVIOUS] = previous,
        }
    }

    /// The oldest connection of a standing.
    pub(crate) fn oldest(&self, standing: Standing) -> Option<u32> {
        let Head { first, .. } = self.heads[list_of(standing)?];
        (first != NONE).then_some(first)
    }

    /// The one after it on the same eviction list.
    pub(crate) fn after(&self, slot: u32) -> Option<u32> {
        let next = self.details.get(slot as usize)?.max_end[NEXT];
        (next != NONE).then_some(next)
    }

    /// Slots that are free.
    pub(crate) fn free(&self) -> u32 {
        self.header.capacity - self.header.used
    }

    /// A free slot, now in use.
    pub(crate) fn acquire(&mut self) -> Option<u32> {
        let slot = if self.header.free != NONE {
            let slot = self.header.free;
            self.header.free = unpack(self.rows[slot as usize].next);
            slot
        } else if self.header.watermark < self.header.capacity {
            self.header.watermark += 1;
            self.header.watermark - 1
        } else {
            return None;
        };
        self.header.used += 1;
        Some(slot)
    }

    /// Gives a slot back.
    pub(crate) fn release(&mut self, slot: u32) {
        let next = pack(self.header.free);
        let row = &mut self.rows[slot as usize];
        row.state = FREE;
        row.next = next;
        self.header.free = slot;
        self.header.used -= 1;
    }

    /// Whether a connection is in `slot`.
    #[inline]
    pub(crate) fn is_connection(&self, slot: u32) -> bool {
        slot < self.header.watermark
            && self
                .rows
                .get(slot as usize)
                .is_some_and(|row| row.state > EXTENSION)
    }
}
