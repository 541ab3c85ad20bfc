//! What frames between a tap and the guest may leave unfinished.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The unfinished frames a side can take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offloads {
    /// Frames without a finished checksum.
    pub checksum: bool,
    /// TCP over IPv4 longer than the MTU.
    pub tso4: bool,
    /// TCP over IPv6 longer than the MTU.
    pub tso6: bool,
    /// UDP longer than the MTU, both families.
    pub uso: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Self = Self {
        checksum: true,
        tso4: true,
        tso6: true,
        uso: true,
    };
    /// What both allow.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            checksum: self.checksum && other.checksum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            uso: self.uso && other.uso,
        }
    }

    /// Nothing.
    pub const NONE: Self = Self {
        checksum: false,
        tso4: false,
        tso6: false,
        uso: false,
    };
}

/// A list of offloads cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no offload: they are checksum, tso4, tso6 and uso, separated by commas, or none")]
pub struct NoOffload(String);

impl std::fmt::Display for Offloads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = [
            (self.checksum, "checksum"),
            (self.tso4, "tso4"),
            (self.tso6, "tso6"),
            (self.uso, "uso"),
        ];
        let names: Vec<&str> = all.iter().filter(|(on, _)| *on).map(|(_, n)| *n).collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(","))
    }
}

impl FromStr for Offloads {
    type Err = NoOffload;

    fn from_str(text: &str) -> Result<Self, NoOffload> {
        let mut offloads = Self::NONE;
        if text == "none" {
            return Ok(offloads);
        }
        for name in text.split(',') {
            match name {
                "checksum" => offloads.checksum = true,
                "tso4" => offloads.tso4 = true,
                "tso6" => offloads.tso6 = true,
                "uso" => offloads.uso = true,
                other => return Err(NoOffload(other.to_owned())),
            }
        }
        Ok(offloads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_written_as_it_is_read() {
        for bits in 0..16 {
            let offloads = Offloads {
                checksum: bits & 1 != 0,
                tso4: bits & 2 != 0,
                tso6: bits & 4 != 0,
                uso: bits & 8 != 0,
            };
            assert_eq!(offloads.to_string().parse(), Ok(offloads));
        }
        for wrong in ["", "tso", "checksum,", "none,uso"] {
            assert!(wrong.parse::<Offloads>().is_err(), "{wrong}");
        }
    }
}
