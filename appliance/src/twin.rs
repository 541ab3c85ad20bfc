//! A table in two copies: packets read the live one, a change is written into the shadow, a commit exchanges them.
//!
//! Fixed capacity, open addressing, linear probing, at most half full, deletion without tombstones. Blocks of rows that
//! differ between the copies are marked, and only those are copied back afterwards, a slice at a time: a commit costs the
//! exchange of two pointers, whatever the size of the change, and no packet waits for the rest.
//!
//! When full, a put is refused and nothing changes.

use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What lies in a slot; all zero is an empty one.
pub trait Slot: FromBytes + IntoBytes + Immutable + Copy {
    /// The empty slot.
    fn empty() -> Self {
        Self::new_zeroed()
    }
}

/// A slot that is found by a key.
pub trait Keyed: Slot {
    type Key: Copy + Eq;

    /// The key, unless the slot is empty.
    fn key(&self) -> Option<Self::Key>;

    fn hash(key: &Self::Key, hasher: &Hasher) -> u64;
}

/// The table has no room for another row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    pub capacity: u32,
}

/// Rows of which a change is tracked together, and copied together.
const BLOCK: usize = 64;

/// A table of `R` in two copies.
pub struct Twin<'m, R> {
    live: &'m mut [R],
    shadow: &'m mut [R],
    /// One bit per block in which the copies may differ.
    dirty: &'m mut [u64],
    /// Rows in the shadow, of a keyed table.
    shadow_length: u32,
    live_length: u32,
    capacity: u32,
    hasher: Hasher,
    /// The next block of the shadow to be zeroed, if it is being cleared.
    clearing: Option<usize>,
}

impl<R> core::fmt::Debug for Twin<'_, R> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Twin({} of {})", self.live_length, self.capacity)
    }
}

impl<'m, R: Slot> Twin<'m, R> {
    /// A table of `slots` slots that are addressed by number.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn direct(arena: &mut Arena<'m>, slots: usize) -> Result<Self, OutOfMemory> {
        Ok(Self {
            live: arena.slice(slots)?,
            shadow: arena.slice(slots)?,
            dirty: arena.slice(slots.div_ceil(BLOCK * 64))?,
            shadow_length: 0,
            live_length: 0,
            capacity: u32::try_from(slots).unwrap_or(u32::MAX),
            hasher: Hasher::new([0; 16]),
            clearing: None,
        })
    }

    /// The live row of that number; `None` beyond the table.
    #[inline]
    pub fn live_at(&self, index: usize) -> Option<&R> {
        self.live.get(index)
    }

    /// The row of that number in the shadow; `None` beyond the table.
    pub fn shadow_at(&self, index: usize) -> Option<&R> {
        self.shadow.get(index)
    }

    /// Writes a row of the shadow; nothing happens beyond the table.
    pub fn write(&mut self, index: usize, row: R) {
        let block = index / BLOCK;
        if let (Some(slot), Some(word)) =
            (self.shadow.get_mut(index), self.dirty.get_mut(block / 64))
        {
            *slot = row;
            *word |= 1 << (block % 64);
        }
    }

    /// Rows the table can hold.
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Rows in the live copy of a keyed table.
    pub const fn length(&self) -> u32 {
        self.live_length
    }

    /// All slots of the live copy, the empty ones too.
    pub fn live(&self) -> &[R] {
        self.live
    }

    /// All slots of the shadow.
    pub fn shadow(&self) -> &[R] {
        self.shadow
    }

    /// Begins to empty the shadow; done when `work` says so.
    pub fn clear(&mut self) {
        self.clearing = Some(0);
        self.shadow_length = 0;
    }

    /// Exchanges the copies. The caller has finished `work` before.
    pub fn exchange(&mut self) {
        core::mem::swap(&mut self.live, &mut self.shadow);
        core::mem::swap(&mut self.live_length, &mut self.shadow_length);
    }

    /// Empties a few blocks of a shadow that is being cleared. `budget` is in rows and is used up by what was done;
    /// `true` when nothing is left to do.
    pub fn clear_slice(&mut self, budget: &mut usize) -> bool {
        while let Some(block) = self.clearing {
            if *budget == 0 {
                return false;
            }
            let from = block * BLOCK;
            if from >= self.shadow.len() {
                self.clearing = None;
                break;
            }
            let to = self.shadow.len().min(from + BLOCK);
            if let Some(rows) = self.shadow.get_mut(from..to) {
                rows.fill(R::empty());
            }
            if let Some(word) = self.dirty.get_mut(block / 64) {
                *word |= 1 << (block % 64);
            }
            self.clearing = Some(block + 1);
            *budget = budget.saturating_sub(BLOCK);
        }
        true
    }

    /// Makes a few blocks of the shadow equal to the live copy. `budget` as in [`Self::clear_slice`].
    pub fn sync_slice(&mut self, budget: &mut usize) -> bool {
        self.shadow_length = self.live_length;
        self.clearing = None;
        for (index, word) in self.dirty.iter_mut().enumerate() {
            while *word != 0 {
                if *budget == 0 {
                    return false;
                }
                let bit = word.trailing_zeros() as usize;
                *word &= *word - 1;
                let from = (index * 64 + bit) * BLOCK;
                let to = self.live.len().min(from + BLOCK);
                if let (Some(shadow), Some(live)) =
                    (self.shadow.get_mut(from..to), self.live.get(from..to))
                {
                    shadow.copy_from_slice(live);
                }
                *budget = budget.saturating_sub(BLOCK);
            }
        }
        true
    }
}

impl<'m, R: Keyed> Twin<'m, R> {
    /// A table that holds `capacity` rows, found by their keys.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn keyed(
        arena: &mut Arena<'m>,
        capacity: u32,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        let slots = (capacity as usize)
            .max(8)
            .saturating_mul(2)
            .next_power_of_two();
        let mut twin = Self::direct(arena, slots)?;
        twin.capacity = capacity;
        twin.hasher = hasher;
        Ok(twin)
    }

    /// The live row of that key.
    ///
    /// # Cost
    /// One hash and, at most half full with a keyed hash, two probes on average.
    #[inline]
    pub fn find(&self, key: R::Key) -> Option<&R> {
        let start = R::hash(&key, &self.hasher) as usize;
        match probe(self.live, start, key) {
            Probe::Found(index) => self.live.get(index),
            Probe::Empty(_) | Probe::Nowhere => None,
        }
    }

    /// Where a lookup of that key begins: for [`Self::touch`] and [`Self::find_from`].
    #[inline]
    pub(crate) fn start(&self, key: R::Key) -> usize {
        R::hash(&key, &self.hasher) as usize & (self.live.len() - 1)
    }

    /// Reads from where a lookup begins, so that its memory is on its way; of a loop of these all at once. What is returned
    /// means nothing and keeps the compiler from leaving it out.
    #[inline]
    pub(crate) fn touch(&self, start: usize) -> u8 {
        let ends = |row: &R| {
            let bytes = row.as_bytes();
            // Rows may lie in two lines.
            Some(bytes.first()? ^ bytes.last()?)
        };
        self.live.get(start).and_then(ends).unwrap_or(0)
    }

    /// The same as [`Self::find`], where the start is known.
    #[inline]
    pub(crate) fn find_from(&self, start: usize, key: R::Key) -> Option<&R> {
        match probe(self.live, start, key) {
            Probe::Found(index) => self.live.get(index),
            Probe::Empty(_) | Probe::Nowhere => None,
        }
    }

    /// The row of that key in the shadow.
    pub fn find_shadow(&self, key: R::Key) -> Option<&R> {
        match self.probe_shadow(key) {
            Probe::Found(index) => self.shadow.get(index),
            Probe::Empty(_) | Probe::Nowhere => None,
        }
    }

    /// Puts a row into the shadow, in the place of one with the same key; yields that one.
    ///
    /// # Errors
    /// [`Full`]; nothing has changed then.
    pub fn put(&mut self, row: R) -> Result<Option<R>, Full> {
        let full = Full {
            capacity: self.capacity,
        };
        let key = row.key().ok_or(full)?;
        match self.probe_shadow(key) {
            Probe::Found(index) => {
                let old = self.shadow.get(index).copied();
                self.write(index, row);
                Ok(old)
            }
            Probe::Empty(index) if self.shadow_length < self.capacity => {
                self.write(index, row);
                self.shadow_length += 1;
                Ok(None)
            }
            Probe::Empty(_) | Probe::Nowhere => Err(full),
        }
    }

    /// Takes a row out of the shadow.
    pub fn remove(&mut self, key: R::Key) -> Option<R> {
        let Probe::Found(mut hole) = self.probe_shadow(key) else {
            return None;
        };
        let removed = self.shadow.get(hole).copied();
        let mask = self.shadow.len() - 1;
        let mut next = hole;
        // Rows behind the hole move up unless they already stand at or behind their own start.
        for _ in 0..self.shadow.len() {
            next = (next + 1) & mask;
            let Some(row) = self.shadow.get(next).copied() else {
                break;
            };
            let Some(key) = row.key() else { break };
            let start = R::hash(&key, &self.hasher) as usize & mask;
            if next.wrapping_sub(start) & mask >= next.wrapping_sub(hole) & mask {
                self.write(hole, row);
                hole = next;
            }
        }
        self.write(hole, R::empty());
        self.shadow_length -= 1;
        removed
    }

    fn probe_shadow(&self, key: R::Key) -> Probe {
        probe(self.shadow, R::hash(&key, &self.hasher) as usize, key)
    }
}

enum Probe {
    Found(usize),
    Empty(usize),
    Nowhere,
}

#[inline]
fn probe<R: Keyed>(slots: &[R], start: usize, key: R::Key) -> Probe {
    let mask = slots.len().wrapping_sub(1);
    for step in 0..slots.len() {
        let index = start.wrapping_add(step) & mask;
        match slots.get(index).map(R::key) {
            Some(Some(found)) if found == key => return Probe::Found(index),
            Some(Some(_)) => {}
            Some(None) => return Probe::Empty(index),
            None => return Probe::Nowhere,
        }
    }
    Probe::Nowhere
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec;

    #[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable)]
    #[repr(C)]
    struct Pair {
        key: u32,
        value: u32,
    }

    impl Slot for Pair {}

    impl Keyed for Pair {
        type Key = u32;
        fn key(&self) -> Option<u32> {
            (self.key != 0).then_some(self.key)
        }
        fn hash(key: &u32, _: &Hasher) -> u64 {
            // Poor on purpose: long runs of neighbours are what deletion must survive.
            u64::from(*key % 7)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u32, u32),
        Remove(u32),
        Commit,
        Abort,
        Fresh,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (1..40u32, any::<u32>()).prop_map(|(k, v)| Step::Put(k, v)),
            4 => (1..40u32).prop_map(Step::Remove),
            1 => Just(Step::Commit),
            1 => Just(Step::Abort),
            1 => Just(Step::Fresh),
        ]
    }

    proptest! {
        #[test]
        fn twin_behaves_like_two_maps(steps in proptest::collection::vec(step(), 0..200), budget in 1..200usize) {
            let mut memory = vec![0u8; 8192];
            let mut twin: Twin<'_, Pair> =
                Twin::keyed(&mut Arena::new(&mut memory), 20, Hasher::new([1; 16])).unwrap();
            let (mut live, mut shadow) = (BTreeMap::new(), BTreeMap::new());
            for step in steps {
                match step {
                    Step::Put(key, value) => {
                        let result = twin.put(Pair { key, value });
                        if shadow.contains_key(&key) || shadow.len() < 20 {
                            prop_assert_eq!(result.unwrap().map(|p| p.value), shadow.insert(key, value));
                        } else {
                            prop_assert_eq!(result, Err(Full { capacity: 20 }));
                        }
                    }
                    Step::Remove(key) => prop_assert_eq!(twin.remove(key).map(|p| p.value), shadow.remove(&key)),
                    Step::Commit => {
                        twin.exchange();
                        live = shadow.clone();
                        while !twin.sync_slice(&mut budget.clone()) {}
                    }
                    Step::Abort => {
                        shadow = live.clone();
                        while !twin.sync_slice(&mut budget.clone()) {}
                    }
                    Step::Fresh => {
                        shadow.clear();
                        twin.clear();
                        while !twin.clear_slice(&mut budget.clone()) {}
                    }
                }
                for key in 1..40 {
                    prop_assert_eq!(twin.find(key).map(|p| p.value), live.get(&key).copied());
                    prop_assert_eq!(twin.find_shadow(key).map(|p| p.value), shadow.get(&key).copied());
                }
                prop_assert_eq!(twin.length() as usize, live.len());
            }
        }
    }
}
