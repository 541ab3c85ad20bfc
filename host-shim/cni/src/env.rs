//! What the runtime says in the environment: the verb and its attachment, checked before anything else happens.

use crate::error::{CniError, Code};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the runtime asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    /// All of them, with their names in counters.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Add, "add"),
        (Self::Del, "del"),
        (Self::Check, "check"),
        (Self::Gc, "gc"),
        (Self::Status, "status"),
        (Self::Version, "version"),
    ];

    /// The verb in `CNI_COMMAND`.
    ///
    /// # Errors
    /// Code 4 for any other word.
    pub fn parse(word: &str) -> Result<Self, CniError> {
        Ok(match word {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            other => {
                return Err(CniError::new(
                    Code::Environment,
                    format!("CNI_COMMAND {other:?} is unknown"),
                ));
            }
        })
    }

    /// The variables without which the verb means nothing.
    const fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Self::Gc => &["CNI_PATH"],
            Self::Status | Self::Version => &[],
        }
    }

    /// Whether the verb is about one attachment.
    pub const fn has_attachment(self) -> bool {
        matches!(self, Self::Add | Self::Del | Self::Check)
    }
}

/// The environment of one call. Fields that the verb does not use are empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    pub verb: Verb,
    #[serde(default)]
    pub container_id: String,
    /// The namespace's path; may be empty for DEL.
    #[serde(default)]
    pub netns: String,
    #[serde(default)]
    pub ifname: String,
    #[serde(default)]
    pub args: String,
    /// Where delegates are looked for, separated by colons.
    #[serde(default)]
    pub path: String,
    /// The namespace may be the caller's own.
    #[serde(default)]
    pub netns_override: bool,
}

impl Environment {
    /// Reads and checks the variables that `lookup` finds.
    ///
    /// # Errors
    /// Code 4 for an unknown verb, absent variables (all named in one error) or values that cannot be what they say.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let verb = Verb::parse(&lookup("CNI_COMMAND").unwrap_or_default())?;
        let of = |name: &str| lookup(name).unwrap_or_default();
        let missing: Vec<&str> = verb
            .required()
            .iter()
            .copied()
            .filter(|name| of(name).is_empty())
            .collect();
        if !missing.is_empty() {
            return Err(CniError::new(
                Code::Environment,
                format!("required variables are missing: {}", missing.join(", ")),
            ));
        }
        let environment = Self {
            verb,
            container_id: of("CNI_CONTAINERID"),
            netns: of("CNI_NETNS"),
            ifname: of("CNI_IFNAME"),
            args: of("CNI_ARGS"),
            path: of("CNI_PATH"),
            netns_override: is_yes(&of("CNI_NETNS_OVERRIDE")),
        };
        environment.check()?;
        Ok(environment)
    }

    /// Whether the values can be what they say. The node asks again: it does not trust the caller's check.
    ///
    /// # Errors
    /// Code 4, naming the value.
    pub fn check(&self) -> Result<(), CniError> {
        if !self.verb.has_attachment() {
            return Ok(());
        }
        if !is_identifier(&self.container_id) {
            return Err(CniError::new(
                Code::Environment,
                format!(
                    "CNI_CONTAINERID {:?} is not a valid container id",
                    self.container_id
                ),
            ));
        }
        if let Some(why) = ifname_fault(&self.ifname) {
            return Err(CniError::new(
                Code::Environment,
                format!("CNI_IFNAME {:?} {why}", self.ifname),
            ));
        }
        Ok(())
    }
}

/// Whether `text` is an identifier of the specification: a letter or digit, then letters, digits, `_`, `.`, `-`.
pub fn is_identifier(text: &str) -> bool {
    let bytes = text.as_bytes();
    // A file name must hold it (NAME_MAX less what the store adds).
    bytes.len() <= 200
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Why no interface can have this name, if so (IFNAMSIZ and the kernel's `dev_valid_name`).
fn ifname_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() || name.len() > 15 {
        Some("is not 1 to 15 bytes long")
    } else if name == "." || name == ".." {
        Some("is a directory's name")
    } else if name
        .chars()
        .any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
    {
        Some("contains `/`, `:`, a space or a control character")
    } else {
        None
    }
}

fn is_yes(text: &str) -> bool {
    text == "1" || text.eq_ignore_ascii_case("true")
}

/// What `CNI_ARGS` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    pairs: BTreeMap<String, String>,
}

/// The pod behind an attachment, as Kubernetes names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    /// Empty where the runtime does not send it.
    #[serde(default)]
    pub uid: String,
}

impl Args {
    const KNOWN: [&str; 8] = [
        "IgnoreUnknown",
        "K8S_POD_NAMESPACE",
        "K8S_POD_NAME",
        "K8S_POD_UID",
        "K8S_POD_INFRA_CONTAINER_ID",
        "IP",
        "MAC",
        "GATEWAY",
    ];

    /// Reads `K=V;K=V`.
    ///
    /// # Errors
    /// Code 4 for a part without `=`, or for an unknown key where `IgnoreUnknown` does not say to ignore it.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let fault = |msg: String| CniError::new(Code::Environment, msg);
        let mut pairs = BTreeMap::new();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| fault(format!("CNI_ARGS part {part:?} is not KEY=VALUE")))?;
            pairs.insert(key.to_owned(), value.to_owned());
        }
        let ignore = pairs
            .get("IgnoreUnknown")
            .is_some_and(|value| is_yes(value));
        let unknown: Vec<&str> = pairs
            .keys()
            .map(String::as_str)
            .filter(|k| !Self::KNOWN.contains(k))
            .collect();
        if !ignore && !unknown.is_empty() {
            return Err(fault(format!(
                "CNI_ARGS keys are unknown: {}",
                unknown.join(", ")
            )));
        }
        Ok(Self { pairs })
    }

    /// What can be read of a text that need not be right: for DEL, which must not fail on it.
    pub fn lenient(text: &str) -> Self {
        Self {
            pairs: text
                .split(';')
                .filter_map(|part| part.split_once('='))
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        }
    }

    /// The value of `key`, unless it is absent or empty.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.pairs
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// The pod, if the runtime named one.
    pub fn pod(&self) -> Option<PodName> {
        Some(PodName {
            namespace: self.value("K8S_POD_NAMESPACE")?.to_owned(),
            name: self.value("K8S_POD_NAME")?.to_owned(),
            uid: self.value("K8S_POD_UID").unwrap_or_default().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a:b",
            "a b",
            "sixteen-bytes-ab",
            "tab\t",
        ] {
            assert!(ifname_fault(name).is_some(), "{name:?}");
        }
        for name in ["e", "eth0", "fifteen-bytes-a", "net1", "..."] {
            assert!(ifname_fault(name).is_none(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn any_arguments_are_read_or_refused(text in ".{0,200}") {
            let _read_or_refused = Args::parse(&text);
            let _read = Args::lenient(&text);
        }

        #[test]
        fn an_identifier_is_a_safe_file_name(text in ".{0,40}") {
            if is_identifier(&text) {
                prop_assert!(!text.contains('/') && !text.starts_with('.') && !text.is_empty());
            }
        }
    }
}
