//! What the operator says of the node's own policy: whether NodePolicies hold here, and which ports none of them closes.

use std::num::NonZero;

use serde::{Deserialize, Serialize};
use sluice_contract::Protocol;
use sluice_model::compile::{FAILSAFE_EGRESS, FAILSAFE_INGRESS, HostPolicy, HostPolicyMode};
use sluice_model::object::{PolicyPort, Port};

use crate::cluster::config::PortProtocol;

/// Ports of one direction, at most.
const PORTS: usize = 64;

/// How NodePolicies are applied to this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostPolicyConfig {
    pub mode: Mode,
    pub failsafe: Failsafe,
}

/// What becomes of what NodePolicies deny.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// They are not asked.
    Off,
    /// It passes, and is logged and counted.
    Audit,
    /// It is dropped.
    #[default]
    Enforce,
}

/// Ports that pass whatever policies say. A list that is given stands in place of the usual one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Failsafe {
    /// Of the node, for everybody.
    pub ingress: Vec<FailsafePort>,
    /// Of everybody, for the node.
    pub egress: Vec<FailsafePort>,
}

impl Default for Failsafe {
    fn default() -> Self {
        let ports = |all: [(Protocol, u16); 3]| {
            let port = |(protocol, number)| {
                Some(FailsafePort {
                    port: NonZero::new(number)?,
                    protocol: match protocol {
                        Protocol::Tcp => PortProtocol::Tcp,
                        Protocol::Udp => PortProtocol::Udp,
                        Protocol::Sctp => PortProtocol::Sctp,
                    },
                })
            };
            all.into_iter().filter_map(port).collect()
        };
        Self {
            ingress: ports(FAILSAFE_INGRESS),
            egress: ports(FAILSAFE_EGRESS),
        }
    }
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailsafePort {
    pub port: NonZero<u16>,
    #[serde(default)]
    pub protocol: PortProtocol,
}

impl HostPolicyConfig {
    /// What is wrong with it.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for (field, ports) in [
            ("host_policy.failsafe.ingress", &self.failsafe.ingress),
            ("host_policy.failsafe.egress", &self.failsafe.egress),
        ] {
            if ports.len() > PORTS {
                return Err((field, format!("names more than {PORTS} ports")));
            }
        }
        Ok(())
    }
}

impl From<&HostPolicyConfig> for HostPolicy {
    fn from(config: &HostPolicyConfig) -> Self {
        let ports = |all: &[FailsafePort]| {
            let port = |it: &FailsafePort| PolicyPort {
                protocol: it.protocol.into(),
                port: Port::Range(it.port.get(), it.port.get()),
            };
            all.iter().map(port).collect()
        };
        Self {
            mode: match config.mode {
                Mode::Off => HostPolicyMode::Off,
                Mode::Audit => HostPolicyMode::Audit,
                Mode::Enforce => HostPolicyMode::Enforce,
            },
            failsafe_ingress: ports(&config.failsafe.ingress),
            failsafe_egress: ports(&config.failsafe.egress),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n21_what_is_not_said_is_the_models_default_and_what_cannot_be_is_refused() {
        let read = |text: &str| serde_json::from_str::<HostPolicyConfig>(text);
        let usual = read("{}").unwrap();
        assert_eq!(HostPolicy::from(&usual), HostPolicy::default());
        let ports = |config: &HostPolicyConfig| HostPolicy::from(config).failsafe_ingress.len();
        let given =
            read(r#"{"mode": "audit", "failsafe": {"ingress": [{"port": 2222}]}}"#).unwrap();
        assert_eq!((given.mode, ports(&given)), (Mode::Audit, 1));
        assert_eq!(given.failsafe.egress, usual.failsafe.egress);
        let none = read(r#"{"failsafe": {"ingress": []}}"#).unwrap();
        assert_eq!((ports(&none), none.check()), (0, Ok(())));
        for wrong in [
            r#"{"mode": "on"}"#,
            r#"{"failsafes": {}}"#,
            r#"{"failsafe": {"ingress": [{"port": 0}]}}"#,
            r#"{"failsafe": {"ingress": [{"port": 22, "cidr": "0.0.0.0/0"}]}}"#,
            r#"{"failsafe": {"egress": [{"port": 53, "protocol": "ICMP"}]}}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        let many = vec![usual.failsafe.ingress[0].clone(); PORTS + 1];
        let config = HostPolicyConfig {
            failsafe: Failsafe {
                egress: many,
                ..Failsafe::default()
            },
            ..HostPolicyConfig::default()
        };
        assert_eq!(config.check().unwrap_err().0, "host_policy.failsafe.egress");
    }
}
