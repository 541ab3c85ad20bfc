//! Numbers for what has a long name: the same ones on every node and after every restart, as long as no two meet.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use super::hash;

/// Numbers that follow from what they stand for; where two meet, the later one steps aside.
#[derive(Debug)]
pub(super) struct Numbers<K> {
    numbers: HashMap<K, u32>,
    taken: HashSet<u32>,
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self {
            numbers: HashMap::new(),
            taken: HashSet::new(),
        }
    }
}

impl<K: Clone + Eq + Hash> Numbers<K> {
    pub(super) fn number(&mut self, key: &K) -> u32 {
        if let Some(number) = self.numbers.get(key) {
            return *number;
        }
        let mut number = u32::try_from(hash::of(key) >> 32).unwrap_or_default();
        while !self.taken.insert(number) {
            number = number.wrapping_add(1);
        }
        self.numbers.insert(key.clone(), number);
        number
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        let taken = &mut self.taken;
        self.numbers
            .retain(|key, number| keep(key) || !taken.remove(number));
    }
}
