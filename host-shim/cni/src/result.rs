//! The result of an ADD, held in the newest shape and written in the version that was asked for.
//!
//! What a plugin before us in the chain said and we do not know is kept and handed on.

use crate::error::{CniError, Code};
use crate::version::Version;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// What an ADD made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CniResult {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// An interface, of the pod (with a sandbox) or of the node (without).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// An address with its prefix length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ip {
    pub address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Ip {
    /// The address without its prefix length.
    pub fn ip(&self) -> Option<IpAddr> {
        self.address.split('/').next()?.parse().ok()
    }
}

/// A route of the pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Route {
    pub dst: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Name servers for the pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Dns {
    #[serde(
        default,
        alias = "servers",
        alias = "Servers",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    #[serde(
        default,
        alias = "searches",
        alias = "Searches",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub search: Vec<String>,
    #[serde(default, alias = "Options", skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Keys of a route that 1.1.0 brought.
const ROUTE_1_1: [&str; 5] = ["mtu", "advmss", "priority", "table", "scope"];
/// Keys of an interface that 1.1.0 brought.
const INTERFACE_1_1: [&str; 2] = ["socketPath", "pciID"];

impl CniResult {
    /// Reads a result written in `version`.
    ///
    /// # Errors
    /// Code 6 if it cannot be read.
    pub fn from_json(value: &Value, version: Version) -> Result<Self, CniError> {
        let unreadable = |error: &dyn ToString| {
            CniError::new(Code::Decode, "the result cannot be read").details(&error.to_string())
        };
        let mut result = if version.has_interfaces() {
            Self::deserialize(value).map_err(|error| unreadable(&error))?
        } else {
            from_legacy(value).map_err(|error| unreadable(&error))?
        };
        result.extra.remove("cniVersion");
        for ip in &mut result.ips {
            ip.extra.remove("version");
            if ip.ip().is_none() {
                return Err(unreadable(&format!("{:?} is no address", ip.address)));
            }
        }
        Ok(result)
    }

    /// Writes it as `version` wants it.
    ///
    /// # Errors
    /// Internal (code 5) if it cannot be said in that version.
    pub fn to_json(&self, version: Version) -> Result<Value, CniError> {
        if !version.has_interfaces() {
            return self.to_legacy(version);
        }
        let mut written = self.clone();
        for interface in &mut written.interfaces {
            if !version.has_gc_and_status() {
                interface.mtu = None;
                interface
                    .extra
                    .retain(|key, _| !INTERFACE_1_1.contains(&key.as_str()));
            }
        }
        for route in &mut written.routes {
            if !version.has_gc_and_status() {
                route
                    .extra
                    .retain(|key, _| !ROUTE_1_1.contains(&key.as_str()));
            }
        }
        for ip in &mut written.ips {
            if version.has_address_family() {
                let family = if ip.ip().is_some_and(|ip| ip.is_ipv6()) {
                    "6"
                } else {
                    "4"
                };
                ip.extra.insert("version".into(), family.into());
            }
        }
        written
            .extra
            .insert("cniVersion".into(), version.as_str().into());
        serde_json::to_value(&written).map_err(|error| {
            CniError::new(Code::Io, "the result cannot be written").details(&error)
        })
    }

    /// The first address of each family, as 0.1.0 and 0.2.0 had it.
    fn to_legacy(&self, version: Version) -> Result<Value, CniError> {
        let mut object = Map::new();
        object.insert("cniVersion".into(), version.as_str().into());
        for (key, is_ipv6) in [("ip4", false), ("ip6", true)] {
            let of_family = |ip: &&Ip| ip.ip().is_some_and(|address| address.is_ipv6() == is_ipv6);
            let Some(ip) = self.ips.iter().find(of_family) else {
                continue;
            };
            let mut family = json!({"ip": ip.address});
            if let Some(gateway) = ip.gateway {
                family["gateway"] = gateway.to_string().into();
            }
            let routes: Vec<Value> = self
                .routes
                .iter()
                .filter(|route| route.dst.contains(':') == is_ipv6)
                .map(|route| match route.gw {
                    Some(gw) => json!({"dst": route.dst, "gw": gw}),
                    None => json!({"dst": route.dst}),
                })
                .collect();
            if !routes.is_empty() {
                family["routes"] = routes.into();
            }
            object.insert(key.into(), family);
        }
        if object.len() == 1 {
            return Err(CniError::new(
                Code::Io,
                format!("cannot convert: no valid IP addresses for a result of {version}"),
            ));
        }
        if !self.dns.is_empty() {
            object.insert("dns".into(), json!(self.dns));
        }
        Ok(Value::Object(object))
    }

    /// The index of the pod's interface `ifname`.
    pub fn pod_interface(&self, ifname: &str) -> Option<usize> {
        self.interfaces
            .iter()
            .position(|i| i.name == ifname && !i.sandbox.is_empty())
    }
}

#[derive(Deserialize)]
struct Legacy {
    ip4: Option<LegacyFamily>,
    ip6: Option<LegacyFamily>,
    #[serde(default)]
    dns: Dns,
}

#[derive(Deserialize)]
struct LegacyFamily {
    ip: String,
    gateway: Option<IpAddr>,
    #[serde(default)]
    routes: Vec<Route>,
}

fn from_legacy(value: &Value) -> Result<CniResult, serde_json::Error> {
    let legacy = Legacy::deserialize(value)?;
    let mut result = CniResult {
        dns: legacy.dns,
        ..CniResult::default()
    };
    for family in [legacy.ip4, legacy.ip6].into_iter().flatten() {
        result.ips.push(Ip {
            address: family.ip,
            gateway: family.gateway,
            ..Ip::default()
        });
        result.routes.extend(family.routes);
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dual() -> CniResult {
        let value = json!({
            "interfaces": [
                {"name": "eth0", "mac": "02:00:00:00:00:10", "mtu": 1450, "sandbox": "/run/netns/a"},
                {"name": "sl0010", "socketPath": "/run/s"},
            ],
            "ips": [
                {"address": "10.1.0.5/32", "gateway": "169.254.1.1", "interface": 0},
                {"address": "fd00::5/128", "gateway": "fe80::1", "interface": 0},
            ],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1", "mtu": 1400}, {"dst": "::/0"}],
            "another": {"plugin's": "word"},
        });
        CniResult::from_json(&value, Version::V1_1_0).unwrap()
    }

    #[test]
    fn every_version_reads_back_what_it_wrote() {
        for version in Version::SUPPORTED {
            let written = dual().to_json(version).unwrap();
            assert_eq!(written["cniVersion"], version.as_str());
            let read = CniResult::from_json(&written, version).unwrap();
            assert_eq!(read.to_json(version).unwrap(), written, "{version}");
            assert_eq!(read.ips.len(), 2);
        }
    }

    #[test]
    fn what_an_older_version_does_not_know_is_left_out() {
        let old = dual().to_json(Version::V1_0_0).unwrap();
        assert!(old["interfaces"][0].get("mtu").is_none());
        assert!(old["interfaces"][1].get("socketPath").is_none());
        assert!(old["routes"][0].get("mtu").is_none());
        assert_eq!(old["another"], json!({"plugin's": "word"}));
    }

    #[test]
    fn a_result_without_addresses_has_no_legacy_form() {
        assert!(CniResult::default().to_json(Version::V0_2_0).is_err());
    }

    proptest! {
        #[test]
        fn any_value_is_read_or_refused(text in r#"\{("(interfaces|ips|routes|dns|ip4)":(\[\]|\[\{\}\]|5|null|\{"ip":"x"\})),?\}"#) {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                for version in Version::SUPPORTED {
                    let _read_or_refused = CniResult::from_json(&value, version);
                }
            }
        }
    }
}
