//! Neighbors that packets wanted and of whom nothing is known: the host finds out where they are.
//!
//! When a pod tries address after address, eight a second are asked for and no more.

use crate::address::Address;
use crate::time::{Duration, Instant};

/// Addresses remembered: as many are asked for in a [`PAUSE`].
const REMEMBERED: usize = 8;
/// An address is asked for once in this time, as Linux retransmits its own questions.
const PAUSE: Duration = Duration::from_secs(1);

/// The last addresses that were wanted.
#[derive(Debug, Default)]
pub struct Wanted {
    last: [Option<(Address, Instant)>; REMEMBERED],
    /// How many there were.
    count: usize,
}

impl Wanted {
    /// A packet was for `address`.
    pub fn note(&mut self, address: Address, now: Instant) {
        let recent = |(_, at): &(Address, Instant)| now < *at + PAUSE;
        let asked = |entry: &&(Address, Instant)| entry.0 == address && recent(entry);
        if self.last.iter().flatten().any(|entry| asked(&entry)) {
            return;
        }
        if let Some(oldest) = self.last.get_mut(self.count % REMEMBERED)
            && !oldest.as_ref().is_some_and(recent)
        {
            *oldest = Some((address, now));
            self.count = self.count.wrapping_add(1);
        }
    }

    /// The first address after `cursor` others, and the cursor behind it. What was overwritten meanwhile is left out.
    pub fn after(&self, cursor: usize) -> Option<(Address, usize)> {
        let cursor = cursor.max(self.count.saturating_sub(REMEMBERED));
        if cursor >= self.count {
            return None;
        }
        let (address, _) = (*self.last.get(cursor % REMEMBERED)?)?;
        Some((address, cursor + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> Address {
        Address::v4([192, 0, 2, last])
    }

    #[test]
    fn o17_each_address_is_asked_for_once_a_second_and_eight_at_most() {
        let mut wanted = Wanted::default();
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
