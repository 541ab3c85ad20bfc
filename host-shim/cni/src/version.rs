//! The versions of the CNI specification that the plugin speaks, and what each can do.

use crate::error::{CniError, Code};
use std::fmt;

/// A version of the specification. Ordered: later versions are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    /// All that the plugin answers in, oldest first.
    pub const SUPPORTED: [Self; 7] = [
        Self::V0_1_0,
        Self::V0_2_0,
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];
    /// What is spoken where the caller's version is not known yet.
    pub const CURRENT: Self = Self::V1_1_0;

    /// As it stands in `cniVersion`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Whether CHECK exists (0.4.0).
    pub fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// Whether GC and STATUS exist, and interfaces and routes have an MTU (1.1.0).
    pub fn has_gc_and_status(self) -> bool {
        self >= Self::V1_1_0
    }

    /// Whether a result lists interfaces (0.3.0) instead of one address per family.
    pub fn has_interfaces(self) -> bool {
        self >= Self::V0_3_0
    }

    /// Whether each address says its family (gone in 1.0.0).
    pub fn has_address_family(self) -> bool {
        self < Self::V1_0_0
    }

    /// The version named by `cniVersion`.
    ///
    /// # Errors
    /// Code 6 if `text` is no version at all, code 1 if it is one that is not spoken here.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        if let Some(version) = Self::SUPPORTED.into_iter().find(|v| v.as_str() == text) {
            return Ok(version);
        }
        if !is_semantic_version(text) {
            return Err(CniError::new(
                Code::Decode,
                format!("cniVersion {text:?} is not a version"),
            ));
        }
        let spoken = Self::SUPPORTED.map(Self::as_str).join(", ");
        Err(CniError::new(
            Code::IncompatibleVersion,
            format!("cniVersion {text} is not supported"),
        )
        .details(&format!("supported: {spoken}")))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Three numbers with dots, and perhaps a pre-release or build suffix.
fn is_semantic_version(text: &str) -> bool {
    let (core, suffix) = match text.find(['-', '+']) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let numbers: Vec<&str> = core.split('.').collect();
    let is_number = |n: &&str| (1..=9).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit());
    numbers.len() == 3 && numbers.iter().all(is_number) && (suffix.is_empty() || suffix.len() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_is_none_is_code_6_and_a_foreign_one_is_code_1() {
        for text in [
            "", "banana", "1", "1.0", "1.0.0.0", "1.0.x", "1.0.0-", "v1.0.0",
        ] {
            assert_eq!(
                Version::parse(text).unwrap_err().code,
                Code::Decode,
                "{text}"
            );
        }
        for text in ["0.0.9", "0.5.0", "1.2.0", "2.0.0", "1.0.0-rc1"] {
            assert_eq!(
                Version::parse(text).unwrap_err().code,
                Code::IncompatibleVersion,
                "{text}"
            );
        }
        for version in Version::SUPPORTED {
            assert_eq!(Version::parse(version.as_str()).unwrap(), version);
        }
    }
}
