//! Who may hold how much of the table, and who gives way when it is full.
//!
//! Slots are counted by [`Group`]: the pods of a namespace, a pod without one, the uplink, the node. The uplink and the node
//! have a sixteenth of the table each for certain, and all others together three eighths, in equal parts; the rest is whoever's
//! comes. Nothing is set aside for that. When the table is full and a group needs its part, a connection of a group beyond its own
//! part ends: the oldest that is not answered, else the oldest that has served, else an established one, the longest idle of
//! those of a sample of [`SAMPLE`] slots. At least half of a full table is then held by groups beyond their part, so a sample
//! hardly ever has none; an exact order would cost every packet a write.

use sluice_contract::LinkId;

use super::region::{OWNERS, Row};
use super::state::{Standing, State};
use super::{Conntrack, commit::CommitError};
use crate::arena::{Arena, OutOfMemory};
use crate::group::{GROUPS, Group};

/// Slots of which one is chosen to give way.
const SAMPLE: usize = 32;
/// Connections of an eviction list that are looked at for one of a group that has to give way.
const LOOKS: usize = 8;

/// What groups hold.
#[derive(Debug)]
pub struct Groups<'m> {
    /// The group of each link, as it was when that last opened a connection.
    of_link: &'m mut [u16],
    slots: &'m mut [u32],
    /// Groups of pods that hold something.
    active: u32,
    random: u64,
}

impl<'m> Groups<'m> {
    /// Each link has one of its own.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>) -> Result<Self, OutOfMemory> {
        let of_link: &mut [u16] = arena.slice(OWNERS)?;
        for (own, group) in of_link.iter_mut().zip(0..) {
            *own = group;
        }
        Ok(Self {
            of_link,
            slots: arena.slice(GROUPS)?,
            active: 0,
            random: 0x9e37_79b9_7f4a_7c15,
        })
    }

    /// Nobody is counted, and nobody has anything for certain.
    pub(super) fn none() -> Self {
        Self {
            of_link: &mut [],
            slots: &mut [],
            active: 0,
            random: 1,
        }
    }

    fn group(&self, link: usize) -> Option<Group> {
        self.of_link.get(link).copied().map(Group::at)
    }

    fn held(&self, group: Group) -> u32 {
        self.slots.get(group.index()).copied().unwrap_or(0)
    }

    fn add(&mut self, group: Group, step: i32) {
        let Some(slots) = self.slots.get_mut(group.index()) else {
            return;
        };
        let before = *slots;
        *slots = before.saturating_add_signed(step);
        match (before, *slots) {
            _ if group.is_of_the_node() => {}
            (0, 1..) => self.active += 1,
            (1.., 0) => self.active = self.active.saturating_sub(1),
            _ => {}
        }
    }

    /// A link holds so many slots more, or less.
    pub(super) fn count(&mut self, link: usize, step: i32) {
        if let Some(group) = self.group(link) {
            self.add(group, step);
        }
    }

    /// What a group has for certain of a table of `capacity`.
    fn certain(&self, group: Group, capacity: u32) -> u32 {
        if group.is_of_the_node() {
            return capacity / 16;
        }
        (u64::from(capacity) * 3 / 8 / u64::from(self.active + 1)) as u32
    }

    fn has_enough(&self, group: Group, capacity: u32) -> bool {
        self.held(group) >= self.certain(group, capacity)
    }

    fn has_too_much(&self, group: Group, capacity: u32) -> bool {
        self.held(group) > self.certain(group, capacity)
    }

    fn random(&mut self, below: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (((self.random >> 32) * u64::from(below)) >> 32) as u32
    }
}

impl Conntrack<'_> {
    /// Link `owner` belongs to `group`; what it holds counts there.
    pub fn belongs_to(&mut self, owner: LinkId, group: Group) {
        let Some(former) = self.groups.group(owner.index()) else {
            return;
        };
        if former == group {
            return;
        }
        let held = self.region.owners[owner.index()].slots;
        let held = i32::try_from(held).unwrap_or(i32::MAX);
        self.groups.add(former, -held);
        if let Some(own) = self.groups.of_link.get_mut(owner.index()) {
            *own = group.raw();
        }
        self.groups.add(group, held);
    }

    /// Slots that a group holds.
    pub fn held_by(&self, group: Group) -> u32 {
        self.groups.held(group)
    }

    /// Whether the namespace of `owner` may have so many more slots.
    pub(super) fn admit_group(&self, owner: LinkId, slots: u32) -> Result<(), CommitError> {
        let group = self.groups.group(owner.index());
        let Some(group) = group.filter(|group| group.is_tenant()) else {
            return Ok(());
        };
        let share = u32::from(self.settings.tenant_share);
        let quota = u64::from(self.capacity()) * u64::from(share) / 100;
        if share < 100 && u64::from(self.groups.held(group) + slots) > quota {
            return Err(CommitError::Quota);
        }
        Ok(())
    }

    /// The connection that gives way to a new one of `owner`.
    pub(super) fn victim(&mut self, owner: LinkId) -> Option<(u32, Standing)> {
        let group = self.groups.group(owner.index());
        for standing in [Standing::Unreplied, Standing::Spent] {
            if let Some(slot) = self.oldest_for(group, standing) {
                return Some((slot, standing));
            }
        }
        let capacity = self.capacity();
        if self.groups.has_enough(group?, capacity) {
            return None;
        }
        let slot = self.longest_idle()?;
        Some((slot, Standing::Established))
    }

    /// The oldest of a standing that may give way to one of `group`.
    fn oldest_for(&self, group: Option<Group>, standing: Standing) -> Option<u32> {
        let mut next = self.region.oldest(standing);
        let Some(group) = group else {
            return next;
        };
        for _ in 0..LOOKS {
            let slot = next?;
            let of = self.groups.group(usize::from(self.row(slot)?.owner))?;
            if of == group || self.groups.has_too_much(of, self.capacity()) {
                return Some(slot);
            }
            next = self.region.after(slot);
        }
        None
    }

    /// Of a sample, the established connection that is idle for longest and of a group that has too much.
    fn longest_idle(&mut self) -> Option<u32> {
        let (capacity, tick) = (self.capacity(), self.region.header.tick as u32);
        let mut longest: Option<(u32, u32)> = None;
        for _ in 0..SAMPLE {
            let slot = self.groups.random(self.region.header.watermark);
            let Some(row) = self.row(slot) else { continue };
            let state = State::from_raw(row.state);
            let of = self.groups.group(usize::from(row.owner));
            let may_end = state.is_some_and(|state| state.standing() == Standing::Established)
                && of.is_some_and(|of| self.groups.has_too_much(of, capacity));
            let idle = tick.wrapping_sub(row.seen);
            if may_end && longest.is_none_or(|(most, _)| idle > most) {
                longest = Some((idle, slot));
            }
        }
        longest.map(|(_, slot)| slot)
    }

    fn row(&self, slot: u32) -> Option<&Row> {
        self.region.rows.get(slot as usize)
    }
}
