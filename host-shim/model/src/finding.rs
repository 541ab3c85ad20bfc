//! What is wrong with an object, said so that its author finds the place.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object is used, but hardly as meant.
    Warning,
    /// The object is not used. If there was a good one of this name before, that one stays in force.
    Error,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Finding {
    /// `None`: from the API server.
    pub file: Option<PathBuf>,
    /// From 1. 0: not from a file.
    pub line: u32,
    pub severity: Severity,
    /// Kind and name, as far as they are known.
    pub object: String,
    /// `spec.ingress[0].ports[1].endPort`; empty: the object as a whole.
    pub field: String,
    pub reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:{}: ", file.display(), self.line)?;
        }
        f.write_str(match self.severity {
            Severity::Warning => "warning: ",
            Severity::Error => "error: ",
        })?;
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(&self.reason)
    }
}
