//! What the host is to be told of once: neighbors that packets wanted and of whom nothing is known, connections that a rule
//! would deny.
//!
//! When a pod tries address after address, the host hears of eight a second and no more.

use crate::time::{Duration, Instant};

/// Items remembered: as many are told of in a [`PAUSE`].
const REMEMBERED: usize = 8;
/// The same is told once in this time, as Linux retransmits its own questions for neighbors.
const PAUSE: Duration = Duration::from_secs(1);

/// The last of what happened.
#[derive(Debug)]
pub struct Recent<T> {
    last: [Option<(T, Instant)>; REMEMBERED],
    /// How many there were.
    count: usize,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self {
            last: [const { None }; REMEMBERED],
            count: 0,
        }
    }
}

impl<T: Copy + PartialEq> Recent<T> {
    /// It happened.
    pub fn note(&mut self, what: T, now: Instant) {
        let recent = |(_, at): &(T, Instant)| now < *at + PAUSE;
        let told = |entry: &&(T, Instant)| entry.0 == what && recent(entry);
        if self.last.iter().flatten().any(|entry| told(&entry)) {
            return;
        }
        if let Some(oldest) = self.last.get_mut(self.count % REMEMBERED)
            && !oldest.as_ref().is_some_and(recent)
        {
            *oldest = Some((what, now));
            self.count = self.count.wrapping_add(1);
        }
    }

    /// The first after `cursor` others, and the cursor behind it. What was overwritten meanwhile is left out.
    pub fn after(&self, cursor: usize) -> Option<(T, usize)> {
        let cursor = cursor.max(self.count.saturating_sub(REMEMBERED));
        if cursor >= self.count {
            return None;
        }
        let (what, _) = (*self.last.get(cursor % REMEMBERED)?)?;
        Some((what, cursor + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;

    fn address(last: u8) -> Address {
        Address::v4([192, 0, 2, last])
    }

    #[test]
    fn o17_each_address_is_asked_for_once_a_second_and_eight_at_most() {
        let mut wanted = Recent::default();
        let second = |n| Instant::ZERO + Duration::from_secs(n);
        for last in 0..20 {
            wanted.note(address(last), second(1));
            wanted.note(address(last), second(1));
        }
        let mut cursor = 0;
        let mut seen = std::vec::Vec::new();
        while let Some((address, next)) = wanted.after(cursor) {
            seen.push(address);
            cursor = next;
        }
        assert_eq!(seen, (0..8).map(address).collect::<std::vec::Vec<_>>());
        wanted.note(address(3), second(2));
        assert_eq!(wanted.after(cursor), Some((address(3), cursor + 1)));
        assert_eq!(wanted.after(cursor + 1), None);
    }
}
