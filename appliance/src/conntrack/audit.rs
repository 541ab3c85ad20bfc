//! The whole table, checked for everything that has to hold between its parts. For tests and the self-test: it reads all.

use crate::conntrack::region::{NONE, WHEEL, unpack};
use crate::conntrack::row::is_listed;
use crate::conntrack::state::{EXTENSION, FREE, Standing, State};
use crate::conntrack::{ConnId, Conntrack, index};
use crate::flow::Direction;

/// What does not hold, and the slot or place where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A connection is not found by one of its flows.
    Lost(u32),
    /// The index has more or fewer entries than connections have flows.
    IndexCount { entries: u32, flows: u32 },
    /// There are more displaced entries than are counted.
    Displaced,
    /// A checksum is wrong.
    Checksum(u32),
    /// An extension does not belong to its connection.
    Extension(u32),
    /// A list's links disagree, or a row is on a list where it does not belong.
    List(u32),
    /// Slots are counted wrong.
    SlotCount,
    /// An owner's share is counted wrong.
    OwnerCount(u32),
}

impl Conntrack<'_> {
    /// Checks everything.
    ///
    /// # Errors
    /// The first [`Fault`].
    ///
    /// # Cost
    /// Reads the whole table several times.
    pub fn audit(&self) -> Result<(), Fault> {
        let flows = self.audit_rows()?;
        self.audit_index(flows)?;
        self.audit_lists()?;
        self.audit_owners()
    }

    /// Every connection is found by both flows and carries its checksums. Returns the number of index entries there are.
    fn audit_rows(&self) -> Result<u32, Fault> {
        let region = &self.region;
        let (mut flows, mut used, mut extensions) = (0, 0, 0);
        for slot in 0..region.header.watermark {
            let row = &region.rows[slot as usize];
            let detail = &region.details[slot as usize];
            match row.state {
                FREE => continue,
                EXTENSION => {
                    used += 1;
                    extensions += 1;
                    continue;
                }
                _ => used += 1,
            }
            flows += 1 + u32::from(row.is_translated());
            if row.check != row.expected_check(&detail.attached, &self.hasher)
                || detail.seal != detail.expected_seal(row.state)
            {
                return Err(Fault::Checksum(slot));
            }
            if row.is_v6() && row.is_translated() {
                extensions -= 1;
                let wide = &region.rows[unpack(row.extension) as usize];
                if wide.state != EXTENSION || unpack(wide.extension) != slot {
                    return Err(Fault::Extension(slot));
                }
            }
            let (original, reply) = (row.original(), region.reply_of(row));
            let by_original = self.find(&original, self.hash(&original));
            let by_reply = self.find(&reply, self.hash(&reply));
            let own = original == reply;
            let found = |hit: Option<crate::conntrack::Hit>, direction| {
                hit.is_some_and(|hit| hit.id == ConnId(slot) && hit.direction == direction)
            };
            if !found(by_original, Direction::Original)
                || !(own || found(by_reply, Direction::Reply))
            {
                return Err(Fault::Lost(slot));
            }
        }
        let mut free = 0;
        let mut next = region.header.free;
        while next != NONE {
            free += 1;
            let row = &region.rows[next as usize];
            if row.state != FREE || free > region.header.capacity {
                return Err(Fault::SlotCount);
            }
            next = unpack(row.next);
        }
        if used != region.header.used || used + free != region.header.watermark || extensions != 0 {
            return Err(Fault::SlotCount);
        }
        Ok(flows)
    }

    fn audit_index(&self, flows: u32) -> Result<(), Fault> {
        let buckets = &*self.region.buckets;
        let (mut entries, mut displaced) = (0, 0_i64);
        for (at, bucket) in buckets.iter().enumerate() {
            displaced += i64::from(bucket.displaced);
            for (_, packed) in bucket
                .tags
                .iter()
                .zip(&bucket.slots)
                .filter(|(tag, _)| **tag != 0)
            {
                entries += 1;
                let slot = unpack(*packed);
                if !self.region.is_connection(slot) {
                    return Err(Fault::Lost(slot));
                }
                let row = &self.region.rows[slot as usize];
                let places = [row.original(), self.region.reply_of(row)]
                    .map(|flow| index::Places::of(self.hash(&flow), buckets.len()));
                if places.iter().all(|places| places.first != at) {
                    displaced -= 1;
                    if places.iter().all(|places| places.second != at) {
                        return Err(Fault::Lost(slot));
                    }
                }
            }
        }
        if entries != flows {
            return Err(Fault::IndexCount { entries, flows });
        }
        // Fewer would hide entries. More only cost time, and come from connections whose two flows share tag and bucket.
        if displaced < 0 {
            return Err(Fault::Displaced);
        }
        Ok(())
    }

    fn audit_lists(&self) -> Result<(), Fault> {
        let region = &self.region;
        let mut armed = 0;
        for place in 0..WHEEL {
            let (mut previous, mut next) = (NONE, region.heads[place].first);
            while next != NONE {
                armed += 1;
                let row = &region.rows[next as usize];
                if usize::from(row.armed) != place
                    || unpack(row.previous) != previous
                    || !region.is_connection(next)
                    || armed > region.header.used
                {
                    return Err(Fault::List(next));
                }
                previous = next;
                next = unpack(row.next);
            }
            if region.heads[place].last != previous {
                return Err(Fault::List(previous));
            }
        }
        let (mut connections, mut listed) = (0, 0);
        for slot in 0..region.header.watermark {
            if let Some(state) = State::from_raw(region.rows[slot as usize].state) {
                connections += 1;
                listed += u32::from(is_listed(state));
            }
        }
        for standing in [Standing::Unreplied, Standing::Spent] {
            let (mut previous, mut next) = (NONE, region.oldest(standing));
            while let Some(slot) = next {
                listed = listed.checked_sub(1).ok_or(Fault::List(slot))?;
                let state = State::from_raw(region.rows[slot as usize].state);
                if state.is_none_or(|state| state.standing() != standing)
                    || region.details[slot as usize].max_end[0] != previous
                {
                    return Err(Fault::List(slot));
                }
                previous = slot;
                next = region.after(slot);
            }
        }
        match (armed == connections, listed) {
            (true, 0) => Ok(()),
            _ => Err(Fault::List(NONE)),
        }
    }

    fn audit_owners(&self) -> Result<(), Fault> {
        let region = &self.region;
        for (link, owner) in region.owners.iter().enumerate() {
            if owner.slots == 0 && owner.unreplied == 0 {
                continue;
            }
            let (mut slots, mut unreplied) = (0, 0);
            for slot in 0..region.header.watermark {
                let row = &region.rows[slot as usize];
                if row.state == FREE || usize::from(row.owner) != link {
                    continue;
                }
                slots += 1;
                let state = State::from_raw(row.state);
                unreplied += u32::from(state.is_some_and(|s| s.standing() == Standing::Unreplied));
            }
            if (owner.slots, owner.unreplied) != (slots, unreplied) {
                return Err(Fault::OwnerCount(link as u32));
            }
        }
        let total: u32 = region.owners.iter().map(|owner| owner.slots).sum();
        if total == region.header.used {
            Ok(())
        } else {
            Err(Fault::SlotCount)
        }
    }
}
