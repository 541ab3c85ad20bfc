//! A map of fixed capacity that holds two views of itself: the one in force, and the next one, which a change prepares.
//!
//! A slot carries one bit for each view, so a row that both views share is kept once, a commit is one assignment, and
//! what the former view alone needed is given back afterwards, in slices.
//!
//! Every key has two buckets of eight slots. A row goes to its first bucket while that one has room to spare, else to the emptier of
//! the two. So a lookup compares at most sixteen keys, mostly in one bucket, whatever the table holds.
//!
//! Where both are full, rows move to their other buckets until there is room (cuckoo hashing): a table takes all rows for which
//! it was carved, also while they are all replaced by others. Which buckets a key has is a secret of this boot: whoever writes
//! the objects that keys are made of cannot choose keys that meet.

use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use heapless::Vec;

/// Slots of a bucket.
const BUCKET: usize = 8;
/// Rows in a bucket from which on the second bucket is considered.
const SPARE: usize = 6;
/// Bits of the first word: the slot's views …
const VIEWS: u64 = 0b11;
/// … and, in the first slot of a bucket, that some row of this bucket may lie in its second one.
const SPILLED: u64 = 0b100;
/// Buckets that are looked at for one row, at most, before it is refused.
const REACH: usize = 256;
/// Changes that are remembered one by one. After more, settling walks the whole table.
const JOURNAL: usize = 16_384;

/// There is no room for the row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// `SLOT` words: views and the low key, then `KEY` words of key, then the value.
#[derive(Debug)]
pub(super) struct Table<'m, const SLOT: usize, const KEY: usize> {
    slots: &'m mut [[u64; SLOT]],
    hasher: Hasher,
    /// Rows that one view may have.
    capacity: u32,
    /// Which view is in force: its bit.
    live: u64,
    /// Rows in the view in force, and in the next.
    rows: [u32; 2],
    journal: &'m mut [u32],
    journaled: usize,
    /// Slots from here on are still to be walked.
    cursor: usize,
    task: Task,
}

/// What has to be done before the next change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    /// Nothing, or just the journal.
    Journal,
    /// Nothing: a change is being made.
    Open,
    /// Take every row out of the next view. Once that is done, the same as `Open`.
    Clear,
    /// Make the next view equal to the one in force, everywhere.
    Level,
}

impl<'m, const SLOT: usize, const KEY: usize> Table<'m, SLOT, KEY> {
    /// A table that holds `rows` rows in each view.
    pub(super) fn new(
        arena: &mut Arena<'m>,
        rows: usize,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        let slots = slots_for(rows);
        Ok(Self {
            slots: arena.slice(slots)?,
            hasher,
            capacity: u32::try_from(rows).unwrap_or(u32::MAX),
            live: 0b01,
            rows: [0; 2],
            journal: arena.slice(JOURNAL.min(slots))?,
            journaled: 0,
            cursor: 0,
            task: Task::Journal,
        })
    }

    /// Rows in force.
    pub(super) fn rows(&self) -> u32 {
        self.rows[view(self.live)]
    }

    /// Rows that fit.
    pub(super) const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The value in force under the key.
    ///
    /// # Cost
    /// At most sixteen comparisons in two places of memory.
    #[inline]
    pub(super) fn find(&self, low: u32, key: &[u64; KEY]) -> Option<&[u64]> {
        let at = self.locate(low, key, self.live)?;
        self.slots.get(at)?.get(1 + KEY..)
    }

    fn locate(&self, low: u32, key: &[u64; KEY], views: u64) -> Option<usize> {
        let (first, second) = self.buckets(low, key);
        if let Some(at) = self.locate_in(first, low, key, views) {
            return Some(at);
        }
        if self.slots.get(first)?.first()? & SPILLED == 0 {
            return None;
        }
        self.locate_in(second, low, key, views)
    }

    #[inline]
    fn locate_in(&self, bucket: usize, low: u32, key: &[u64; KEY], views: u64) -> Option<usize> {
        let slots = self.slots.get(bucket..bucket + BUCKET)?;
        slots
            .iter()
            .position(|slot| {
                slot.first()
                    .is_some_and(|meta| meta & views != 0 && (meta >> 32) as u32 == low)
                    && slot.get(1..=KEY) == Some(key.as_slice())
            })
            .map(|offset| bucket + offset)
    }

    /// The first slots of a key's two buckets.
    fn buckets(&self, low: u32, key: &[u64; KEY]) -> (usize, usize) {
        let hash = self.hasher.hash_after(u64::from(low), key);
        let buckets = self.slots.len() / BUCKET;
        let first = hash as usize & (buckets - 1);
        let second = (hash >> 32) as usize & (buckets - 1);
        let second = if first == second { first ^ 1 } else { second };
        (first * BUCKET, second * BUCKET)
    }

    /// Puts a row into the next view, replacing the one of the same key.
    pub(super) fn put(&mut self, low: u32, key: &[u64; KEY], value: &[u64]) -> Result<(), Full> {
        let next = self.next();
        if let Some(at) = self.locate(low, key, next) {
            if self.value(at) == value {
                return Ok(());
            }
            self.leave(at);
        }
        if self.rows[view(next)] >= self.capacity {
            return Err(Full);
        }
        // The row of the view in force comes back unchanged.
        if let Some(at) = self.locate(low, key, self.live)
            && self.value(at) == value
        {
            self.set(at, next);
            return Ok(());
        }
        self.insert(low, key, value)
    }

    fn insert(&mut self, low: u32, key: &[u64; KEY], value: &[u64]) -> Result<(), Full> {
        let next = self.next();
        let (first, second) = self.buckets(low, key);
        let (in_first, in_second) = (self.load(first), self.load(second));
        let bucket = if in_first < SPARE || in_first <= in_second {
            first
        } else {
            second
        };
        let free = self.free_in(bucket);
        let at = free.or_else(|| self.make_room(first, second)).ok_or(Full)?;
        if !(first..first + BUCKET).contains(&at) {
            self.spill(first);
        }
        if let Some(slot) = self.slots.get_mut(at) {
            slot[0] = slot[0] & SPILLED | u64::from(low) << 32;
            for (word, new) in slot.iter_mut().skip(1).zip(key.iter().chain(value)) {
                *word = *new;
            }
        }
        self.set(at, next);
        Ok(())
    }

    /// A slot of the bucket that is in neither view.
    fn free_in(&self, bucket: usize) -> Option<usize> {
        let slots = self.slots.get(bucket..bucket + BUCKET)?;
        let free = slots.iter().position(|slot| slot[0] & VIEWS == 0)?;
        Some(bucket + free)
    }

    /// Rows of this bucket may lie in their second one.
    fn spill(&mut self, bucket: usize) {
        if let Some(slot) = self.slots.get_mut(bucket) {
            slot[0] |= SPILLED;
        }
    }

    /// Moves rows to their other buckets so that one of two full buckets has a free slot, which is returned. The shortest way
    /// there is, found breadth first; packets see nothing of it, since a row is found wherever it lies.
    ///
    /// # Cost
    /// A hash for each slot of [`REACH`] buckets, at most.
    fn make_room(&mut self, first: usize, second: usize) -> Option<usize> {
        let mut ways: Vec<Way, REACH> = Vec::new();
        let mut seen = Seen([0; 64]);
        for bucket in [first, second] {
            seen.is_new(bucket);
            // There is room for two.
            let _ = ways.push(Way {
                bucket,
                before: None,
            });
        }
        let mut at = 0;
        while let Some(bucket) = ways.get(at).map(|way| way.bucket) {
            for from in bucket..bucket + BUCKET {
                let other = self.other_bucket(from)?;
                if let Some(free) = self.free_in(other) {
                    return Some(self.shift(&ways, at, from, free));
                }
                if seen.is_new(other) {
                    // Where there is no room, the search goes no further.
                    let _ = ways.push(Way {
                        bucket: other,
                        before: Some((at, from)),
                    });
                }
            }
            at += 1;
        }
        None
    }

    /// Moves the row at `from`, in the bucket of the way `at`, to a free slot, and then along the way one row after the other to
    /// the place of the one before. Returns the place that is free in the end.
    fn shift(&mut self, ways: &[Way], mut at: usize, mut from: usize, mut free: usize) -> usize {
        loop {
            self.relocate(from, free);
            free = from;
            let Some((before, slot)) = ways.get(at).and_then(|way| way.before) else {
                return free;
            };
            (at, from) = (before, slot);
        }
    }

    /// The other bucket of the row at that slot.
    fn other_bucket(&self, at: usize) -> Option<usize> {
        let slot = self.slots.get(at)?;
        let key: &[u64; KEY] = slot.get(1..=KEY)?.try_into().ok()?;
        let (first, second) = self.buckets((slot[0] >> 32) as u32, key);
        let is_first = (first..first + BUCKET).contains(&at);
        Some(if is_first { second } else { first })
    }

    /// Moves a row, in all its views.
    fn relocate(&mut self, from: usize, to: usize) {
        let Some(row) = self.slots.get(from).copied() else {
            return;
        };
        if let Some(slot) = self.slots.get_mut(to) {
            let spilled = slot[0] & SPILLED;
            *slot = row;
            slot[0] = row[0] & !SPILLED | spilled;
        }
        if let Some(slot) = self.slots.get_mut(from) {
            slot[0] &= SPILLED;
        }
        let mut key = [0; KEY];
        key.iter_mut()
            .zip(row.iter().skip(1))
            .for_each(|(to, from)| *to = *from);
        let (first, _) = self.buckets((row[0] >> 32) as u32, &key);
        if !(first..first + BUCKET).contains(&to) {
            self.spill(first);
        }
        if row[0] & VIEWS != VIEWS {
            self.note(to);
        }
    }

    /// Takes a row out of the next view. `false` if it is not in it.
    pub(super) fn remove(&mut self, low: u32, key: &[u64; KEY]) -> bool {
        match self.locate(low, key, self.next()) {
            Some(at) => {
                self.leave(at);
                true
            }
            None => false,
        }
    }

    /// Starts a change, from an empty next view if it is `fresh`; [`Self::settle`] then has to finish before rows are put.
    pub(super) fn begin(&mut self, fresh: bool) {
        self.task = if fresh { Task::Clear } else { Task::Open };
        self.cursor = 0;
    }

    /// Whether [`Self::settle`] has nothing to do.
    pub(super) fn is_settled(&self) -> bool {
        match self.task {
            Task::Journal => self.journaled == 0,
            Task::Open => true,
            Task::Clear => self.cursor == self.slots.len(),
            Task::Level => false,
        }
    }

    /// The next view is in force. [`Self::settle`] has to finish before the next change.
    pub(super) fn commit(&mut self) {
        self.live = self.next();
        self.level();
    }

    /// The next view is given up. [`Self::settle`] has to finish before the next change.
    pub(super) fn abort(&mut self) {
        self.level();
    }

    fn level(&mut self) {
        self.rows[view(self.next())] = self.rows[view(self.live)];
        let whole = self.task == Task::Clear || self.journaled > self.journal.len();
        self.task = if whole { Task::Level } else { Task::Journal };
        self.cursor = 0;
    }

    /// Does what is left of the last change, at most `budget` slots of it, and takes what it used off the budget.
    /// `true`: nothing is left.
    pub(super) fn settle(&mut self, budget: &mut u32) -> bool {
        match self.task {
            Task::Clear => self.walk(budget, Self::clear_one, Task::Clear),
            Task::Level => self.walk(budget, Self::level_one, Task::Journal),
            Task::Journal => self.replay(budget),
            Task::Open => true,
        }
    }

    fn walk(&mut self, budget: &mut u32, one: fn(&mut Self, usize), then: Task) -> bool {
        while self.cursor < self.slots.len() {
            if *budget == 0 {
                return false;
            }
            *budget -= 1;
            one(self, self.cursor);
            self.cursor += 1;
        }
        if self.task == Task::Level {
            self.journaled = 0;
        }
        self.task = then;
        true
    }

    fn replay(&mut self, budget: &mut u32) -> bool {
        while let Some(last) = self.journaled.checked_sub(1) {
            if *budget == 0 {
                return false;
            }
            *budget -= 1;
            self.journaled = last;
            if let Some(at) = self.journal.get(last) {
                self.level_one(*at as usize);
            }
        }
        true
    }

    fn clear_one(&mut self, at: usize) {
        let next = self.next();
        if let Some(slot) = self.slots.get_mut(at)
            && slot[0] & next != 0
        {
            slot[0] &= !next;
            self.rows[view(next)] -= 1;
        }
    }

    fn level_one(&mut self, at: usize) {
        let live = self.live;
        if let Some(slot) = self.slots.get_mut(at) {
            let both = if slot[0] & live == 0 { 0 } else { VIEWS };
            slot[0] = slot[0] & !VIEWS | both;
        }
    }

    const fn next(&self) -> u64 {
        self.live ^ VIEWS
    }

    fn value(&self, at: usize) -> &[u64] {
        self.slots
            .get(at)
            .and_then(|slot| slot.get(1 + KEY..))
            .unwrap_or_default()
    }

    fn load(&self, bucket: usize) -> usize {
        self.slots
            .iter()
            .skip(bucket)
            .take(BUCKET)
            .filter(|slot| slot[0] & VIEWS != 0)
            .count()
    }

    /// Adds a slot to the next view.
    fn set(&mut self, at: usize, next: u64) {
        if let Some(slot) = self.slots.get_mut(at) {
            slot[0] |= next;
            self.rows[view(next)] += 1;
            self.note(at);
        }
    }

    /// Takes a slot out of the next view.
    fn leave(&mut self, at: usize) {
        let next = self.next();
        if let Some(slot) = self.slots.get_mut(at) {
            slot[0] &= !next;
            self.rows[view(next)] -= 1;
            self.note(at);
        }
    }

    fn note(&mut self, at: usize) {
        if let Some(entry) = self.journal.get_mut(self.journaled) {
            *entry = at as u32;
            self.journaled += 1;
        } else {
            // One more than fits: the journal is no longer complete.
            self.journaled = self.journal.len() + 1;
        }
    }
}

/// A bucket that is reached by moving the row of a slot of an earlier one, if it is not the first.
#[derive(Clone, Copy, Debug)]
struct Way {
    bucket: usize,
    before: Option<(usize, usize)>,
}

/// Buckets that were seen, some of which only seem to have been.
#[derive(Debug)]
struct Seen([u64; 64]);

impl Seen {
    /// Whether the bucket was not seen before.
    fn is_new(&mut self, bucket: usize) -> bool {
        let number = bucket / BUCKET;
        let bit = 1 << (number % 64);
        match self.0.get_mut(number / 64 % 64) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }
}

/// Slots for so many rows in each of two views that share none, and a few more: a power of two.
const fn slots_for(rows: usize) -> usize {
    let wanted = rows.saturating_mul(2).saturating_add(rows / 32);
    let wanted = if wanted < 2 * BUCKET {
        2 * BUCKET
    } else {
        wanted
    };
    match wanted.checked_next_power_of_two() {
        Some(slots) => slots,
        None => usize::MAX,
    }
}

/// Bytes that a table takes from an arena, at most.
pub(super) const fn bytes(rows: usize, slot_words: usize) -> usize {
    let slots = slots_for(rows);
    let journal = if slots < JOURNAL { slots } else { JOURNAL };
    slots.saturating_mul(8 * slot_words) + 4 * journal + 128
}

/// The index of a view by its bit.
const fn view(bit: u64) -> usize {
    (bit >> 1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec;

    type Small<'m> = Table<'m, 4, 2>;

    const HASHER: Hasher = Hasher::new([7; 16]);

    #[derive(Clone, Debug)]
    enum Step {
        Put(u8, u8),
        Remove(u8),
        End { commit: bool, fresh_next: bool },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (any::<u8>(), 0..4u8).prop_map(|(k, v)| Step::Put(k, v)),
            3 => any::<u8>().prop_map(Step::Remove),
            2 => any::<(bool, bool)>().prop_map(|(commit, fresh_next)| Step::End { commit, fresh_next }),
        ]
    }

    fn settle(table: &mut Small<'_>) {
        while !table.settle(&mut 7) {}
    }

    fn check(table: &Small<'_>, model: &BTreeMap<u8, u8>) {
        for key in 0..=255u8 {
            let found = table
                .find(0, &[u64::from(key), 0])
                .map(|value| value[0] as u8);
            assert_eq!(found, model.get(&key).copied());
        }
        assert_eq!(table.rows() as usize, model.len());
    }

    proptest! {
        #[test]
        fn a_change_is_invisible_until_its_commit_and_then_whole(steps in proptest::collection::vec(step(), 1..300)) {
            let mut region = vec![0u8; 1 << 18];
            let mut arena = Arena::new(&mut region);
            let mut table = Small::new(&mut arena, 512, HASHER).unwrap();
            let (mut live, mut next) = (BTreeMap::new(), BTreeMap::new());
            table.begin(false);
            for step in steps {
                match step {
                    Step::Put(key, value) => {
                        table.put(0, &[u64::from(key), 0], &[u64::from(value)]).unwrap();
                        next.insert(key, value);
                    }
                    Step::Remove(key) => {
                        prop_assert_eq!(table.remove(0, &[u64::from(key), 0]), next.remove(&key).is_some());
                    }
                    Step::End { commit, fresh_next } => {
                        check(&table, &live);
                        if commit { table.commit(); live = next.clone(); } else { table.abort(); next = live.clone(); }
                        check(&table, &live);
                        settle(&mut table);
                        check(&table, &live);
                        table.begin(fresh_next);
                        settle(&mut table);
                        check(&table, &live);
                        if fresh_next { next.clear(); }
                    }
                }
            }
            table.commit();
            check(&table, &next);
        }
    }

    #[test]
    fn the_promised_number_of_rows_fits() {
        let mut region = vec![0u8; 1 << 25];
        let mut arena = Arena::new(&mut region);
        let mut table = Small::new(&mut arena, 1 << 17, HASHER).unwrap();
        table.begin(false);
        for key in 0..1u64 << 17 {
            table.put(0, &[key, 0x0a00_0000], &[key]).unwrap();
        }
        table.commit();
        settle(&mut table);
        assert!((0..1u64 << 17).all(|key| table.find(0, &[key, 0x0a00_0000]) == Some(&[key])));
        assert_eq!(table.find(0, &[1 << 17, 0x0a00_0000]), None);
    }

    #[test]
    fn a_full_table_refuses_and_keeps_what_it_has() {
        let mut region = vec![0u8; 1 << 12];
        let mut arena = Arena::new(&mut region);
        let mut table = Small::new(&mut arena, 10, HASHER).unwrap();
        table.begin(false);
        let taken = (0..40u64)
            .take_while(|key| table.put(0, &[*key, 0], &[*key]).is_ok())
            .count() as u64;
        assert_eq!(taken, 10);
        assert_eq!(table.put(0, &[3, 0], &[33]), Ok(()), "one for another");
        table.commit();
        settle(&mut table);
        let value = |key| if key == 3 { 33 } else { key };
        assert!((0..taken).all(|key| table.find(0, &[key, 0]) == Some(&[value(key)])));
    }

    /// What chose the buckets of a key when everybody knew it: which keys meet could be found at leisure.
    fn known_to_all(low: u32, key: &[u64; 2]) -> u64 {
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        let mut state = fold(
            u64::from(low) ^ 0x9e37_79b9_7f4a_7c15,
            0xd6e8_feb8_6659_fd93,
        );
        for word in key {
            state = fold(state ^ word, 0xa076_1d64_78bd_642f);
        }
        state
    }

    #[test]
    fn keys_that_somebody_chose_do_not_fill_an_almost_empty_table() {
        // In a table of 128 buckets.
        let pair = |key: u64| {
            let hash = known_to_all(0, &[key, 0]);
            let (first, second) = (hash as usize & 127, (hash >> 32) as usize & 127);
            (first.min(second), first.max(second))
        };
        let wanted = pair(0);
        let chosen: std::vec::Vec<u64> = (0..u64::MAX)
            .filter(|key| pair(*key) == wanted)
            .take(64)
            .collect();
        let mut region = vec![0u8; 1 << 18];
        let mut arena = Arena::new(&mut region);
        let mut table = Small::new(&mut arena, 500, HASHER).unwrap();
        assert_eq!(table.slots.len(), 128 * BUCKET);
        table.begin(false);
        for key in &chosen {
            assert_eq!(table.put(0, &[*key, 0], &[*key]), Ok(()));
        }
        table.commit();
        settle(&mut table);
        assert!(
            chosen
                .iter()
                .all(|key| table.find(0, &[*key, 0]) == Some(&[*key]))
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// All rows are replaced by others at once, again and again: the fullest that a table can be.
        #[test]
        fn as_many_rows_as_were_promised_fit_beside_as_many_others(
            seed: [u8; 16], first: u64, rows in prop_oneof![Just(4_000usize), Just(504), Just(2_000), Just(1_000)],
        ) {
            let mut region = vec![0u8; 1 << 19];
            let mut arena = Arena::new(&mut region);
            let mut table = Small::new(&mut arena, rows, Hasher::new(seed)).unwrap();
            let key = |round: u64, n: u64| [first.wrapping_add(round << 32 | n), n % 3];
            let rows = rows as u64;
            let put = |table: &mut Small<'_>, round, n: u64| table.put(n as u32, &key(round, n), &[round ^ n]);
            let find = |table: &Small<'_>, round, n: u64| table.find(n as u32, &key(round, n)).map(|it| it[0]);
            for round in 0..4 {
                table.begin(round % 2 == 1);
                settle(&mut table);
                if round % 2 == 0 && round > 0 {
                    for n in 0..rows {
                        prop_assert!(table.remove(n as u32, &key(round - 1, n)));
                    }
                }
                for n in 0..rows {
                    prop_assert_eq!(put(&mut table, round, n), Ok(()), "row {} of {}, round {}", n, rows, round);
                }
                prop_assert_eq!(put(&mut table, round, rows), Err(Full));
                if round > 0 {
                    prop_assert!((0..rows).all(|n| find(&table, round - 1, n) == Some((round - 1) ^ n)));
                }
                prop_assert!((0..rows).all(|n| find(&table, round, n).is_none()));
                table.commit();
                settle(&mut table);
                prop_assert!((0..rows).all(|n| find(&table, round, n) == Some(round ^ n)));
                prop_assert_eq!(u64::from(table.rows()), rows);
                if round > 0 {
                    prop_assert!((0..rows).all(|n| find(&table, round - 1, n).is_none()));
                }
            }
        }

        /// Any changes of a table that is nearly full, kept or given up, against a map.
        #[test]
        fn a_crowded_table_is_a_map(
            seed: [u8; 16],
            changes in proptest::collection::vec((proptest::collection::vec((0..900u64, 0..3u64), 0..400), any::<bool>(), any::<bool>()), 1..8),
        ) {
            let mut region = vec![0u8; 1 << 16];
            let mut arena = Arena::new(&mut region);
            let mut table = Small::new(&mut arena, 500, Hasher::new(seed)).unwrap();
            let mut live = BTreeMap::new();
            for (steps, fresh, commit) in changes {
                table.begin(fresh);
                settle(&mut table);
                let mut next = if fresh { BTreeMap::new() } else { live.clone() };
                for (key, value) in steps {
                    if value == 0 {
                        prop_assert_eq!(table.remove(0, &[key, 0]), next.remove(&key).is_some());
                    } else if next.len() < 500 || next.contains_key(&key) {
                        prop_assert_eq!(table.put(0, &[key, 0], &[value]), Ok(()));
                        next.insert(key, value);
                    } else {
                        prop_assert_eq!(table.put(0, &[key, 0], &[value]), Err(Full));
                    }
                }
                if commit { table.commit(); live = next; } else { table.abort(); }
                settle(&mut table);
                for key in 0..900 {
                    prop_assert_eq!(table.find(0, &[key, 0]).map(|it| it[0]), live.get(&key).copied());
                }
                prop_assert_eq!(table.rows() as usize, live.len());
            }
        }
    }
}
