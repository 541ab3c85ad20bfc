//! Errors as the specification numbers them, and the object that carries one to the runtime.

use crate::version::Version;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Why a call failed. Below 100 the numbers are the specification's, from 100 they are this plugin's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "u32", into = "u32")]
pub enum Code {
    IncompatibleVersion,
    UnsupportedField,
    UnknownContainer,
    Environment,
    Io,
    Decode,
    Config,
    /// The library's "the namespace is the plugin's own".
    Netns,
    /// Try again later.
    Later,
    /// The plugin cannot serve an ADD now.
    Unavailable,
    /// The same, and pods that are there already may be cut off.
    Degraded,
    /// No address is left.
    Exhausted,
    /// A fixed address is in use by somebody else.
    AddressTaken,
    /// The attachment, or the interface in its namespace, is there already.
    Exists,
    /// A host port is claimed by another pod.
    PortClash,
    /// The wiring of the pod failed.
    Wiring,
    /// CHECK found that something is missing.
    CheckFailed,
    /// Some of the stale state could not be removed.
    GcIncomplete,
    /// A delegated plugin failed in a way of its own.
    Other(u32),
}

impl From<Code> for u32 {
    fn from(code: Code) -> Self {
        match code {
            Code::IncompatibleVersion => 1,
            Code::UnsupportedField => 2,
            Code::UnknownContainer => 3,
            Code::Environment => 4,
            Code::Io => 5,
            Code::Decode => 6,
            Code::Config => 7,
            Code::Netns => 8,
            Code::Later => 11,
            Code::Unavailable => 50,
            Code::Degraded => 51,
            Code::Exhausted => 101,
            Code::AddressTaken => 102,
            Code::Exists => 103,
            Code::PortClash => 104,
            Code::Wiring => 105,
            Code::CheckFailed => 106,
            Code::GcIncomplete => 107,
            Code::Other(number) => number,
        }
    }
}

impl From<u32> for Code {
    fn from(number: u32) -> Self {
        match number {
            1 => Self::IncompatibleVersion,
            2 => Self::UnsupportedField,
            3 => Self::UnknownContainer,
            4 => Self::Environment,
            5 => Self::Io,
            6 => Self::Decode,
            7 => Self::Config,
            8 => Self::Netns,
            11 => Self::Later,
            50 => Self::Unavailable,
            51 => Self::Degraded,
            101 => Self::Exhausted,
            102 => Self::AddressTaken,
            103 => Self::Exists,
            104 => Self::PortClash,
            105 => Self::Wiring,
            106 => Self::CheckFailed,
            107 => Self::GcIncomplete,
            other => Self::Other(other),
        }
    }
}

/// A failed call: a code, one sentence, and perhaps more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{msg}{}{details}", if details.is_empty() { "" } else { ": " })]
pub struct CniError {
    pub code: Code,
    pub msg: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    /// An error of `code` that says `msg`.
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// The same with more to say.
    #[must_use]
    pub fn details(mut self, details: &dyn std::fmt::Display) -> Self {
        self.details = details.to_string();
        self
    }

    /// The object for standard output.
    pub fn to_json(&self, version: Version) -> Value {
        let mut object = Map::new();
        object.insert("cniVersion".into(), version.as_str().into());
        object.insert("code".into(), u32::from(self.code).into());
        object.insert("msg".into(), self.msg.clone().into());
        if !self.details.is_empty() {
            object.insert("details".into(), self.details.clone().into());
        }
        Value::Object(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_its_number() {
        for number in 0..200 {
            assert_eq!(u32::from(Code::from(number)), number);
        }
    }
}
