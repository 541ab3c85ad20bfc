//! Domain names that rules name, and who may say which addresses they have.
//!
//! A name is one name, or with a wildcard every name below it, one or more labels deep. Names are compared in lower case and
//! without the dot at their end. What addresses a name has the guest learns from the answers that pods get.

use crate::limits;
use crate::types::LinkId;
use core::net::IpAddr;
use heapless::String;
use serde::{Deserialize, Serialize};

/// The longest name in text, without the dot at its end (RFC 1035 §2.3.4).
pub const NAME_TEXT: usize = 253;
/// The longest label.
const LABEL: usize = 63;

/// A name by a number that follows from its text. It is for finding; what was found is compared.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct NameId(pub u64);

/// One name that rules name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NameRow {
    pub id: NameId,
    /// All names below it, and not itself.
    pub wildcard: bool,
    pub text: String<NAME_TEXT>,
}

/// An address that a pod was told a name has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learnt {
    pub link: LinkId,
    pub name: NameId,
    pub address: IpAddr,
    /// Seconds for which that holds; not above 0: since it does not.
    pub left: i32,
}

impl Learnt {
    pub const fn holds(&self) -> bool {
        self.left > 0
    }
}

impl NameRow {
    /// From text such as `example.com` or `*.example.com`; `None` if it is no such name.
    pub fn parse(text: &str) -> Option<Self> {
        let (wildcard, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let rest = rest.strip_suffix('.').unwrap_or(rest);
        let mut text = String::try_from(rest).ok()?;
        text.make_ascii_lowercase();
        let row = Self {
            id: NameId(number(&text, wildcard)),
            wildcard,
            text,
        };
        row.is_valid().then_some(row)
    }

    /// Whether its parts agree with each other.
    pub fn is_valid(&self) -> bool {
        self.text.contains('.')
            && self.text.split('.').all(is_label)
            && self.id.0 == number(&self.text, self.wildcard)
    }
}

/// As it is written in rules.
impl core::fmt::Display for NameRow {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let below = if self.wildcard { "*." } else { "" };
        write!(f, "{below}{}", self.text)
    }
}

fn is_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    let is_plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    bytes.len() <= LABEL
        && bytes.first().is_some_and(is_plain)
        && bytes.last().is_some_and(is_plain)
        && bytes
            .iter()
            .all(|it| is_plain(it) || matches!(it, b'-' | b'_'))
}

fn number(text: &str, wildcard: bool) -> u64 {
    let mut numbers = Numbers::default();
    for byte in text.bytes().rev() {
        numbers.push(byte);
    }
    numbers.number(wildcard)
}

/// The numbers of all ends of a name, one after the other: bytes are pushed from the last to the first.
#[derive(Clone, Copy, Debug)]
pub struct Numbers(u64);

impl Default for Numbers {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Numbers {
    pub const fn push(&mut self, byte: u8) {
        self.0 = (self.0 ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3);
    }

    /// The number of the name that was pushed so far.
    pub const fn number(self, wildcard: bool) -> u64 {
        let mut number = self;
        number.push(if wildcard { b'*' } else { b'=' });
        number.0
    }
}

const _: () = assert!(NAME_TEXT + 64 < limits::FRAME_PAYLOAD);
const _: () = assert!(limits::NAMES_BATCH * 40 + 64 < limits::FRAME_PAYLOAD);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n14_names_are_what_the_api_allows_in_one_form() {
        for (text, name, wildcard) in [
            ("example.com", "example.com", false),
            ("Example.COM.", "example.com", false),
            ("*.example.com", "example.com", true),
            ("_dns.a-b.x1", "", false),
            ("a_b.c-d.x1", "a_b.c-d.x1", false),
            ("com", "", false),
            ("*.com", "", true),
            ("*", "", false),
            ("*.", "", false),
            ("", "", false),
            (".", "", false),
            ("a..b", "", false),
            (".a.b", "", false),
            ("a.*.b", "", false),
            ("**.a.b", "", false),
            ("*a.b.c", "", false),
            ("-a.b", "", false),
            ("a.b-", "", false),
            ("a b.c", "", false),
            ("ä.b", "", false),
        ] {
            let row = NameRow::parse(text);
            let seen = row.as_ref().map(|it| (it.text.as_str(), it.wildcard));
            let wanted = (!name.is_empty()).then_some((name, wildcard));
            assert_eq!(seen, wanted, "{text:?}");
            assert!(row.is_none_or(|it| it.is_valid()));
        }
        let label = "a".repeat(63);
        assert!(NameRow::parse(&[label.as_str(); 3].join(".")).is_some());
        assert!(NameRow::parse(&[label.as_str(); 4].join(".")).is_none());
        assert!(NameRow::parse(&("a".repeat(64) + ".com")).is_none());
        let of = |text| NameRow::parse(text).map(|it| it.id);
        assert_eq!(of("a.b"), of("A.b."));
        assert_ne!(of("a.b"), of("*.a.b"));
    }
}
