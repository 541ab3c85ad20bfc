//! The network configuration on standard input: what this plugin reads of it, checked.
//!
//! Unknown keys are somebody else's (the delegate's, a later version's) and stay in [`Config::raw`] untouched.

use crate::capability::{self, Capabilities};
use crate::env::{Verb, is_identifier};
use crate::error::{CniError, Code};
use crate::result::{CniResult, Dns};
use crate::version::Version;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The longest configuration that is read. A GC of 10 000 attachments is about one MiB.
pub const LIMIT: usize = 4 << 20;

/// How the pod's end is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wiring {
    /// A veth pair whose host end is glued to a tap.
    #[default]
    Veth,
    /// The tap itself is the pod's interface.
    Tap,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub version: Version,
    pub name: String,
    /// The `type` under which the plugin was called.
    pub plugin: String,
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
    /// `None`: the node's default.
    pub wiring: Option<Wiring>,
    pub mtu: Option<u16>,
    pub ip_masq: Option<bool>,
    pub sysctl: BTreeMap<String, String>,
    pub dns: Dns,
    /// The `ipam` object, `None` where there is none: then the node's pod CIDRs are used.
    pub ipam: Option<Value>,
    pub capabilities: Capabilities,
    /// Addresses asked for by `args.cni.ips`.
    pub args_ips: Vec<String>,
    /// All of it, as it came.
    pub raw: Value,
}

/// One attachment in a GC's list of those that live.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    cni_version: Option<String>,
    #[serde(default)]
    name: String,
    #[serde(default, rename = "type")]
    plugin: String,
    run_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    wiring: Option<String>,
    mtu: Option<u64>,
    ip_masq: Option<bool>,
    #[serde(default)]
    sysctl: BTreeMap<String, Value>,
    #[serde(default)]
    dns: Dns,
    ipam: Option<Value>,
    #[serde(default)]
    args: Option<Value>,
}

/// The version a configuration asks for, as far as it can be read: errors are reported in it.
pub fn version_of(input: &[u8]) -> Option<Version> {
    let value: Value = serde_json::from_slice(input).ok()?;
    Version::parse(value.get("cniVersion")?.as_str()?).ok()
}

impl Config {
    /// Where the node listens unless the configuration says otherwise.
    pub const RUN_DIR: &'static str = "/run/sluice";
    /// Where what must survive a restart lies.
    pub const STATE_DIR: &'static str = "/var/lib/sluice";

    /// Reads and checks `input`.
    ///
    /// # Errors
    /// Code 6 for what is no configuration, 1 for a foreign version, 7 for one that cannot be, 2 for a field whose value
    /// is not supported.
    pub fn parse(input: &[u8]) -> Result<Self, CniError> {
        Self::from_value(json(input)?)
    }

    /// The same for `verb`: a DEL goes on with whatever can be read.
    ///
    /// # Errors
    /// As [`Config::parse`]; for DEL only if it is no JSON, has no name, or a foreign version.
    pub fn for_verb(verb: Verb, raw: Value) -> Result<Self, CniError> {
        match Self::from_value(raw.clone()) {
            Err(error) if verb == Verb::Del => {
                let kept = ["cniVersion", "name", "type", "runDir", "stateDir", "ipam"];
                let mut less = raw;
                if let Some(object) = less.as_object_mut() {
                    object.retain(|key, _| kept.contains(&key.as_str()));
                }
                // What is wrong with what is left is wrong indeed; else the first fault is no concern of DEL.
                Self::from_value(less).map_err(|_| error)
            }
            outcome => outcome,
        }
    }

    /// The same as [`Config::parse`] for a value that is JSON already.
    ///
    /// # Errors
    /// As [`Config::parse`].
    pub fn from_value(raw: Value) -> Result<Self, CniError> {
        if raw.get("plugins").is_some_and(Value::is_array) && raw.get("type").is_none() {
            let what = "this is a list of plugins, not the configuration of one";
            let advice =
                "a runtime takes one of `plugins` and adds the list's `cniVersion` and `name`";
            return Err(CniError::new(Code::Config, what).details(&advice));
        }
        let fields: Raw = serde_path_to_error::deserialize(&raw).map_err(|error| {
            CniError::new(Code::Decode, "the configuration cannot be read").details(&error)
        })?;
        if fields.name.is_empty() {
            return Err(CniError::new(Code::Config, "the configuration has no name"));
        }
        if !is_identifier(&fields.name) {
            let name = &fields.name;
            return Err(CniError::new(
                Code::Config,
                format!("network name {name:?} is not valid"),
            ));
        }
        if fields.plugin.contains('/') {
            let plugin = &fields.plugin;
            return Err(CniError::new(
                Code::Config,
                format!("type {plugin:?} is a path"),
            ));
        }
        let version = match &fields.cni_version {
            Some(text) => Version::parse(text)?,
            None => Version::V0_1_0,
        };
        Ok(Self {
            version,
            name: fields.name,
            plugin: fields.plugin,
            run_dir: fields.run_dir.unwrap_or_else(|| Self::RUN_DIR.into()),
            state_dir: fields.state_dir.unwrap_or_else(|| Self::STATE_DIR.into()),
            wiring: fields.wiring.as_deref().map(wiring).transpose()?,
            mtu: fields.mtu.map(mtu).transpose()?,
            ip_masq: fields.ip_masq,
            sysctl: sysctls(&fields.sysctl)?,
            dns: fields.dns,
            ipam: fields
                .ipam
                .filter(|ipam| ipam.as_object().is_some_and(|o| !o.is_empty())),
            capabilities: capability::read(&raw)?,
            args_ips: args_ips(fields.args.as_ref())?,
            raw,
        })
    }

    /// The result of the plugin before this one in the chain.
    ///
    /// # Errors
    /// Code 6 if it cannot be read.
    pub fn previous(&self) -> Result<Option<CniResult>, CniError> {
        match self.raw.get("prevResult") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(o)) if o.is_empty() => Ok(None),
            Some(value) => CniResult::from_json(value, self.version).map(Some),
        }
    }

    /// The attachments that live, of a GC.
    ///
    /// # Errors
    /// Code 7 if the list is absent: nothing may be taken for stale then.
    pub fn valid_attachments(&self) -> Result<Vec<Attachment>, CniError> {
        let key = ["cni.dev/valid-attachments", "cni.dev/attachments"]
            .into_iter()
            .find(|key| self.raw.get(key).is_some_and(|list| !list.is_null()));
        let Some(list) = key.and_then(|key| self.raw.get(key)) else {
            return Err(CniError::new(
                Code::Config,
                "GC without cni.dev/valid-attachments: nothing is removed",
            ));
        };
        Vec::<Attachment>::deserialize(list).map_err(|error| {
            CniError::new(Code::Decode, "the valid attachments cannot be read").details(&error)
        })
    }

    /// The delegate that allocates addresses, unless the node does it itself.
    pub fn ipam_type(&self) -> Option<&str> {
        self.ipam
            .as_ref()?
            .get("type")?
            .as_str()
            .filter(|t| !t.is_empty() && *t != "sluice")
    }
}

/// The JSON of `input`.
///
/// # Errors
/// Code 6 if it is none.
pub fn json(input: &[u8]) -> Result<Value, CniError> {
    serde_json::from_slice(input)
        .map_err(|e| CniError::new(Code::Decode, "the configuration is not JSON").details(&e))
}

fn wiring(word: &str) -> Result<Wiring, CniError> {
    match word {
        "veth" => Ok(Wiring::Veth),
        "tap" => Ok(Wiring::Tap),
        other => Err(unsupported("wiring", &Value::from(other))),
    }
}

/// IPv4's minimum, and what an Ethernet frame of the trunk holds.
fn mtu(bytes: u64) -> Result<u16, CniError> {
    match u16::try_from(bytes) {
        Ok(mtu @ 576..=65_520) => Ok(mtu),
        _ => Err(CniError::new(
            Code::Config,
            format!("mtu {bytes} is not between 576 and 65520"),
        )),
    }
}

fn sysctls(raw: &BTreeMap<String, Value>) -> Result<BTreeMap<String, String>, CniError> {
    let mut sysctls = BTreeMap::new();
    for (key, value) in raw {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            other => return Err(unsupported(&format!("sysctl {key}"), other)),
        };
        let path = key.replace('.', "/");
        if !path.starts_with("net/") || path.split('/').any(|part| part.is_empty() || part == "..")
        {
            let fault = format!("sysctl {key:?} is not below net");
            return Err(CniError::new(Code::Config, fault));
        }
        sysctls.insert(key.clone(), text);
    }
    Ok(sysctls)
}

fn args_ips(args: Option<&Value>) -> Result<Vec<String>, CniError> {
    match args
        .and_then(|args| args.get("cni"))
        .and_then(|cni| cni.get("ips"))
    {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(list) => Vec::<String>::deserialize(list).map_err(|error| {
            CniError::new(Code::Decode, "args.cni.ips cannot be read").details(&error)
        }),
    }
}

/// Code 2, with key and value as the specification wants.
pub(crate) fn unsupported(key: &str, value: &Value) -> CniError {
    CniError::new(
        Code::UnsupportedField,
        format!("unsupported field {key} = {value}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn refused(value: Value) -> Code {
        Config::from_value(value).unwrap_err().code
    }

    #[test]
    fn values_that_cannot_be_are_code_7_and_those_of_the_wrong_kind_code_6() {
        let base = |key: &str, value: Value| {
            let mut config = json!({"cniVersion": "1.0.0", "name": "n", "type": "sluice-cni"});
            config[key] = value;
            config
        };
        assert_eq!(refused(base("name", json!(""))), Code::Config);
        assert_eq!(refused(base("name", json!("a/b"))), Code::Config);
        assert_eq!(refused(base("name", json!(5))), Code::Decode);
        assert_eq!(refused(base("mtu", json!(70_000))), Code::Config);
        assert_eq!(refused(base("mtu", json!("big"))), Code::Decode);
        assert_eq!(refused(base("type", json!("../sluice"))), Code::Config);
        assert_eq!(
            refused(base("wiring", json!("ipvlan"))),
            Code::UnsupportedField
        );
        assert_eq!(
            refused(base("sysctl", json!({"kernel.panic": "1"}))),
            Code::Config
        );
        assert_eq!(
            refused(base("sysctl", json!({"net.../x": "1"}))),
            Code::Config
        );
        assert_eq!(
            refused(base("args", json!({"cni": {"ips": 5}}))),
            Code::Decode
        );
    }

    proptest! {
        #[test]
        fn any_input_is_read_or_refused(input in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _read_or_refused = Config::parse(&input);
            let _read_or_none = version_of(&input);
        }

        #[test]
        fn any_value_of_any_key_is_read_or_refused(
            key in "(name|type|mtu|wiring|sysctl|args|ipam|dns|runtimeConfig|capabilities|prevResult)",
            value in "(null|5|-1|\"x\"|\\[\\]|\\{\\}|\\[5\\]|\\{\"cni\":5\\}|true|1e99)",
        ) {
            let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","{key}":{value}}}"#);
            if let Ok(config) = Config::parse(text.as_bytes()) {
                let _read_or_refused = config.previous();
                let _read_or_refused = config.valid_attachments();
            }
        }
    }
}
