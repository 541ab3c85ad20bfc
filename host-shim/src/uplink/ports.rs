//! Ranges of ports, and the values under masks that make them up: a classifier knows no ranges.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// From the first port to the last. Written `30000-32767`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// A text that is no range of ports.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no range of ports like 30000-32767")]
pub struct NoRange(String);

impl PortRange {
    /// The ports that Kubernetes gives Services unless told otherwise.
    pub const ALL_NODE_PORTS: Self = Self {
        first: 30000,
        last: 32767,
    };
    /// 49152 to 65535: the dynamic ports of RFC 6335.
    pub const LAST_QUARTER: Self = Self {
        first: 0xc000,
        last: 0xffff,
    };
    /// 57344 to 65535.
    pub const LAST_EIGHTH: Self = Self {
        first: 0xe000,
        last: 0xffff,
    };
    /// 61440 to 65535.
    pub const LAST_SIXTEENTH: Self = Self {
        first: 0xf000,
        last: 0xffff,
    };

    /// The range, if it has a port and 0 is none of them.
    pub const fn new(first: u16, last: u16) -> Option<Self> {
        if first == 0 || first > last {
            return None;
        }
        Some(Self { first, last })
    }

    pub const fn first(self) -> u16 {
        self.first
    }

    pub const fn last(self) -> u16 {
        self.last
    }

    /// Whether the two have a port in common.
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Values and masks that together match the ports of the range and no others.
    pub fn masks(self) -> Vec<(u16, u16)> {
        let (mut at, last) = (u32::from(self.first), u32::from(self.last));
        let mut all = Vec::new();
        while at <= last {
            // The largest aligned block that begins here and does not go beyond the end.
            let aligned = at.trailing_zeros().min(16);
            let fits = (last - at + 1).ilog2();
            let bits = aligned.min(fits);
            let mask = !((1u32 << bits) - 1);
            all.push((at as u16, mask as u16));
            at += 1 << bits;
        }
        all
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> Self {
        range.to_string()
    }
}

impl FromStr for PortRange {
    type Err = NoRange;

    fn from_str(text: &str) -> Result<Self, NoRange> {
        let refused = || NoRange(text.into());
        let (first, last) = text.split_once('-').ok_or_else(refused)?;
        let number = |text: &str| text.parse().map_err(|_| refused());
        Self::new(number(first)?, number(last)?).ok_or_else(refused)
    }
}

impl TryFrom<String> for PortRange {
    type Error = NoRange;

    fn try_from(text: String) -> Result<Self, NoRange> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kubernetes_range_takes_few_masks() {
        let range: PortRange = "30000-32767".parse().unwrap();
        assert_eq!(range.masks().len(), 5);
        assert_eq!(range.to_string(), "30000-32767");
        let top: PortRange = "61440-65535".parse().unwrap();
        assert_eq!(top.masks(), [(61440, 0xf000)]);
        for bad in ["", "1", "0-5", "9-8", "1-65536", "a-b"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn masks_match_the_range_and_nothing_else(first in 1u16.., span: u16, port: u16) {
            let range = PortRange::new(first, first.saturating_add(span)).unwrap();
            let masks = range.masks();
            prop_assert!(masks.len() <= 30);
            for port in [port, first, range.last(), first - 1, range.last().wrapping_add(1)] {
                let inside = (first..=range.last()).contains(&port);
                let matching = masks.iter().filter(|(value, mask)| port & mask == *value).count();
                prop_assert_eq!(matching, usize::from(inside));
            }
        }
    }
}
