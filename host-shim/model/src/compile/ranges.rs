//! Ranges of addresses that are found by an address.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::object::Prefix;

/// Ranges, each as often as it was added.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    counts: BTreeMap<Prefix, usize>,
    /// How many different ranges there are of a family and length.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Ranges {
    pub(super) fn of(ranges: &[Prefix]) -> Self {
        let mut all = Self::default();
        for range in ranges {
            all.add(*range);
        }
        all
    }

    pub(super) fn add(&mut self, range: Prefix) {
        let count = self.counts.entry(range).or_default();
        *count += 1;
        if *count == 1 {
            *self.lengths.entry(kind(&range)).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, range: Prefix) {
        let Some(count) = self.counts.get_mut(&range) else {
            return;
        };
        *count -= 1;
        if *count > 0 {
            return;
        }
        self.counts.remove(&range);
        if let Some(left) = self.lengths.get_mut(&kind(&range)) {
            *left -= 1;
            if *left == 0 {
                self.lengths.remove(&kind(&range));
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The longest range that has the address in it.
    ///
    /// # Cost
    /// A lookup per different length, of which a cluster has a few.
    pub(super) fn find(&self, address: IpAddr) -> Option<Prefix> {
        let v6 = address.is_ipv6();
        let lengths = self.lengths.range((v6, 0)..=(v6, u8::MAX)).rev();
        let mut around = lengths.filter_map(|((_, length), _)| Prefix::new(address, *length));
        around.find(|range| self.counts.contains_key(range))
    }
}

fn kind(range: &Prefix) -> (bool, u8) {
    (range.address().is_ipv6(), range.length())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Prefix {
        let (address, length) = text.split_once('/').unwrap();
        Prefix::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
    }

    #[test]
    fn the_longest_range_is_found_until_it_was_removed_as_often_as_added() {
        let mut ranges = Ranges::of(&["10.0.0.0/8", "10.1.0.0/16", "fd00::/8"].map(range));
        ranges.add(range("10.1.0.0/16"));
        let find = |ranges: &Ranges, text: &str| ranges.find(text.parse().unwrap());
        assert_eq!(find(&ranges, "10.1.2.3"), Some(range("10.1.0.0/16")));
        assert_eq!(find(&ranges, "10.2.2.3"), Some(range("10.0.0.0/8")));
        assert_eq!(find(&ranges, "fd01::1"), Some(range("fd00::/8")));
        assert_eq!(find(&ranges, "192.0.2.1"), None);
        assert_eq!(find(&ranges, "::a01:203"), None);
        ranges.remove(range("10.1.0.0/16"));
        assert_eq!(find(&ranges, "10.1.2.3"), Some(range("10.1.0.0/16")));
        ranges.remove(range("10.1.0.0/16"));
        assert_eq!(find(&ranges, "10.1.2.3"), Some(range("10.0.0.0/8")));
        ranges.remove(range("10.9.0.0/16"));
        ranges.remove(range("10.0.0.0/8"));
        ranges.remove(range("fd00::/8"));
        assert!(ranges.is_empty());
    }
}
