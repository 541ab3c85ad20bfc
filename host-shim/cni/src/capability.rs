//! What a runtime may ask for per pod: `runtimeConfig`, and the same things said in other places.
//!
//! Keys of `runtimeConfig` are read whatever their case, as the reference library does: containerd sends `HostPort`.
//!
//! A capability counts only if it is declared. A runtime that follows the specification has dropped the declaration and
//! sends only what was declared; one that left `capabilities` in place is held to it.

use crate::error::{CniError, Code};
use crate::result::Dns;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// A transport protocol of a port mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// A port of the node that leads to a port of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: Protocol,
    /// `None`: every address of the node.
    #[serde(default, rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

impl PortMapping {
    /// Whether both want the same packets.
    pub fn clashes_with(&self, other: &Self) -> bool {
        self.host_port == other.host_port
            && self.protocol == other.protocol
            && match (self.host_ip, other.host_ip) {
                (Some(a), Some(b)) => a == b,
                // Every address includes the one.
                _ => true,
            }
    }
}

/// A token bucket: bits per second, and bits that may go at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    pub bits_per_second: u64,
    pub burst_bits: u64,
}

/// Limits of a pod; the directions are the pod's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Rate>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Rate>,
}

/// All that was declared and supplied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Capabilities {
    pub port_mappings: Vec<PortMapping>,
    pub bandwidth: Bandwidth,
    pub mac: Option<[u8; 6]>,
    /// Addresses asked for, perhaps with a prefix length.
    pub ips: Vec<String>,
    pub dns: Option<Dns>,
    pub aliases: Vec<String>,
    /// host-local's `ranges`, for this attachment only.
    pub ip_ranges: Option<Value>,
}

/// Reads `runtimeConfig`, and the flat keys of the bandwidth plugin.
///
/// # Errors
/// Code 7 naming the value that cannot be, code 6 for one of the wrong kind.
pub fn read(config: &Value) -> Result<Capabilities, CniError> {
    let runtime = config
        .get("runtimeConfig")
        .map(in_lower_case)
        .unwrap_or_default();
    let supplied = |name: &str| -> Option<&Value> {
        let declared = match config.get("capabilities") {
            None | Some(Value::Null) => true,
            Some(declared) => declared.get(name).and_then(Value::as_bool).unwrap_or(false),
        };
        let value = runtime.get(name.to_ascii_lowercase())?;
        (declared && !value.is_null()).then_some(value)
    };
    let bandwidth = match supplied("bandwidth") {
        Some(value) => bandwidth(value)?,
        None => bandwidth(&in_lower_case(config))?,
    };
    Ok(Capabilities {
        port_mappings: supplied("portMappings").map_or_else(|| Ok(Vec::new()), port_mappings)?,
        bandwidth,
        mac: supplied("mac").map(mac).transpose()?.flatten(),
        ips: supplied("ips").map_or_else(|| Ok(Vec::new()), |v| decode("ips", v))?,
        dns: supplied("dns").map(|v| decode("dns", v)).transpose()?,
        aliases: supplied("aliases").map_or_else(|| Ok(Vec::new()), aliases)?,
        ip_ranges: supplied("ipRanges").cloned(),
    })
}

/// The same with all keys in lower case.
fn in_lower_case(value: &Value) -> Value {
    match value {
        Value::Object(object) => object
            .iter()
            .map(|(key, value)| (key.to_ascii_lowercase(), in_lower_case(value)))
            .collect(),
        Value::Array(list) => list.iter().map(in_lower_case).collect(),
        other => other.clone(),
    }
}

fn decode<T: for<'a> Deserialize<'a>>(name: &str, value: &Value) -> Result<T, CniError> {
    T::deserialize(value).map_err(|error| {
        CniError::new(Code::Decode, format!("runtimeConfig {name} cannot be read")).details(&error)
    })
}

fn fault(msg: impl Into<String>) -> CniError {
    CniError::new(Code::Config, msg)
}

#[derive(Deserialize)]
struct RawMapping {
    #[serde(rename = "hostport")]
    host_port: i64,
    #[serde(rename = "containerport")]
    container_port: i64,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostip")]
    host_ip: String,
}

fn port_mappings(value: &Value) -> Result<Vec<PortMapping>, CniError> {
    let raw: Vec<RawMapping> = decode("portMappings", value)?;
    let mut mappings: Vec<PortMapping> = Vec::with_capacity(raw.len());
    for entry in &raw {
        let mapping = port_mapping(entry)?;
        if mappings.iter().any(|other| other.clashes_with(&mapping)) {
            let (port, protocol) = (mapping.host_port, entry.protocol.to_ascii_lowercase());
            return Err(CniError::new(
                Code::PortClash,
                format!("host port {port}/{protocol} is mapped twice by the same pod"),
            ));
        }
        mappings.push(mapping);
    }
    Ok(mappings)
}

fn port_mapping(raw: &RawMapping) -> Result<PortMapping, CniError> {
    let port = |which: &str, number: i64| {
        u16::try_from(number)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| fault(format!("invalid {which} port number {number}")))
    };
    let protocol = match raw.protocol.to_ascii_lowercase().as_str() {
        "" | "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(fault(format!("unknown port mapping protocol {other:?}"))),
    };
    let host_ip = match raw.host_ip.as_str() {
        "" => None,
        text => {
            let ip: IpAddr = text
                .parse()
                .map_err(|_| fault(format!("invalid host IP {text:?}")))?;
            if ip.is_loopback() {
                return Err(fault(format!(
                    "host IP {ip}: host ports are not served at the node's loopback; name one of its other addresses, or none"
                )));
            }
            (!ip.is_unspecified()).then_some(ip)
        }
    };
    Ok(PortMapping {
        host_port: port("host", raw.host_port)?,
        container_port: port("container", raw.container_port)?,
        protocol,
        host_ip,
    })
}

#[derive(Deserialize)]
struct RawBandwidth {
    #[serde(default, rename = "ingressrate")]
    ingress_rate: u64,
    #[serde(default, rename = "ingressburst")]
    ingress_burst: u64,
    #[serde(default, rename = "egressrate")]
    egress_rate: u64,
    #[serde(default, rename = "egressburst")]
    egress_burst: u64,
}

fn bandwidth(value: &Value) -> Result<Bandwidth, CniError> {
    let raw: RawBandwidth = decode("bandwidth", value)?;
    Ok(Bandwidth {
        ingress: rate("ingress", raw.ingress_rate, raw.ingress_burst)?,
        egress: rate("egress", raw.egress_rate, raw.egress_burst)?,
    })
}

/// The rules of the reference bandwidth plugin.
fn rate(direction: &str, bits_per_second: u64, burst_bits: u64) -> Result<Option<Rate>, CniError> {
    match (bits_per_second, burst_bits) {
        (0, 0) => Ok(None),
        (0, _) => Err(fault(format!(
            "{direction}: if burst is set, rate must also be set"
        ))),
        (_, 0) => Err(fault(format!(
            "{direction}: if rate is set, burst must also be set"
        ))),
        (_, burst) if burst / 8 >= u64::from(u32::MAX) => {
            Err(fault(format!("{direction}: burst cannot be more than 4GB")))
        }
        (bits_per_second, burst_bits) => Ok(Some(Rate {
            bits_per_second,
            burst_bits,
        })),
    }
}

fn mac(value: &Value) -> Result<Option<[u8; 6]>, CniError> {
    let text: String = decode("mac", value)?;
    if text.is_empty() {
        return Ok(None);
    }
    parse_mac(&text).map(Some)
}

/// A MAC address that an interface can carry.
///
/// # Errors
/// Code 7 if it is none, a group address, or zero.
pub fn parse_mac(text: &str) -> Result<[u8; 6], CniError> {
    let invalid = || fault(format!("invalid MAC address {text:?}"));
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|part| part.len() == 2)
            .ok_or_else(invalid)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
    }
    if parts.next().is_some() || mac[0] & 1 == 1 || mac == [0; 6] {
        return Err(invalid());
    }
    Ok(mac)
}

/// A list of names, or podman's lists per network.
fn aliases(value: &Value) -> Result<Vec<String>, CniError> {
    let lists: Vec<Vec<String>> = match value {
        Value::Object(networks) => networks
            .values()
            .map(|list| decode("aliases", list))
            .collect::<Result<_, _>>()?,
        list => vec![decode("aliases", list)?],
    };
    let names: BTreeSet<String> = lists.into_iter().flatten().collect();
    Ok(names.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn asked(name: &str, value: &Value) -> Result<Capabilities, CniError> {
        read(&json!({"runtimeConfig": {name: value}}))
    }

    #[test]
    fn b08_rate_and_burst_come_together_and_burst_is_below_four_gigabytes() {
        let said = |value: Value| asked("bandwidth", &value).unwrap_err();
        let rate_only = said(json!({"ingressRate": 1000}));
        assert_eq!(rate_only.code, Code::Config);
        assert!(
            rate_only
                .msg
                .contains("if rate is set, burst must also be set")
        );
        let burst_only = said(json!({"egressBurst": 1000}));
        assert!(
            burst_only
                .msg
                .contains("if burst is set, rate must also be set")
        );
        let large = said(json!({"ingressRate": 1000, "ingressBurst": 8 * (u64::from(u32::MAX))}));
        assert!(large.msg.contains("burst cannot be more than 4GB"));
        let most = 8 * u64::from(u32::MAX) - 1;
        let limits = asked(
            "bandwidth",
            &json!({"ingressRate": 1, "ingressBurst": most}),
        )
        .unwrap()
        .bandwidth;
        assert_eq!(
            limits.ingress,
            Some(Rate {
                bits_per_second: 1,
                burst_bits: most
            })
        );
        assert_eq!(limits.egress, None);
    }

    #[test]
    fn b08_the_flat_keys_of_the_bandwidth_plugin_count_where_no_capability_is_sent() {
        let flat = read(&json!({"egressRate": 8, "egressBurst": 9}))
            .unwrap()
            .bandwidth;
        assert_eq!(
            flat.egress,
            Some(Rate {
                bits_per_second: 8,
                burst_bits: 9
            })
        );
    }

    #[test]
    fn c12_what_is_not_declared_is_ignored() {
        let config = json!({
            "capabilities": {"portMappings": true, "mac": false},
            "runtimeConfig": {
                "portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "TCP"}],
                "mac": "02:00:00:00:00:05",
                "ips": ["10.0.0.5"],
            },
        });
        let read = read(&config).unwrap();
        assert_eq!(read.port_mappings.len(), 1);
        assert_eq!((read.mac, read.ips.len()), (None, 0));
    }

    #[test]
    fn c12_containerds_spelling_is_understood() {
        let config = json!({"runtimeConfig": {
            "portMappings": [
                {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""},
            ],
            "bandwidth": {"IngressRate": 1, "IngressBurst": 2, "EgressRate": 3, "EgressBurst": 4},
            "dns": {"Servers": ["10.0.0.1"], "Searches": ["svc"], "Options": ["ndots:5"]},
            "ipRanges": [[{"Subnet": "10.0.0.0/24", "RangeStart": "10.0.0.9"}]],
        }});
        let read = read(&config).unwrap();
        assert_eq!(
            (
                read.port_mappings[0].host_port,
                read.port_mappings[0].host_ip
            ),
            (8080, None)
        );
        assert_eq!(
            read.bandwidth.egress,
            Some(Rate {
                bits_per_second: 3,
                burst_bits: 4
            })
        );
        let dns = read.dns.unwrap();
        assert_eq!(
            (dns.nameservers, dns.search),
            (vec!["10.0.0.1".into()], vec!["svc".into()])
        );
        assert_eq!(read.ip_ranges.unwrap()[0][0]["rangestart"], "10.0.0.9");
    }

    #[test]
    fn b03_a_port_claimed_twice_by_one_pod_clashes() {
        let twice = json!([
            {"hostPort": 80, "containerPort": 1, "protocol": "udp", "hostIP": "192.0.2.1"},
            {"hostPort": 80, "containerPort": 2, "protocol": "udp"},
        ]);
        assert_eq!(
            asked("portMappings", &twice).unwrap_err().code,
            Code::PortClash
        );
    }

    #[test]
    fn b02_another_address_or_protocol_is_another_port() {
        let three = json!([
            {"hostPort": 80, "containerPort": 1, "protocol": "tcp", "hostIP": "192.0.2.1"},
            {"hostPort": 80, "containerPort": 1, "protocol": "tcp", "hostIP": "192.0.2.2"},
            {"hostPort": 80, "containerPort": 1, "protocol": "udp", "hostIP": "192.0.2.2"},
        ]);
        assert_eq!(
            asked("portMappings", &three).unwrap().port_mappings.len(),
            3
        );
    }

    #[test]
    fn b08_ports_protocols_addresses_and_macs_that_cannot_be_are_code_7() {
        let mapping = |key: &str, value: Value| {
            let mut m = json!({"hostPort": 1, "containerPort": 1, "protocol": "tcp"});
            m[key] = value;
            asked("portMappings", &json!([m])).unwrap_err().code
        };
        assert_eq!(mapping("hostPort", json!(0)), Code::Config);
        assert_eq!(mapping("containerPort", json!(65_536)), Code::Config);
        assert_eq!(mapping("protocol", json!("icmp")), Code::Config);
        for address in ["nowhere", "127.0.0.1", "::1"] {
            assert_eq!(mapping("hostIP", json!(address)), Code::Config);
        }
        for bad in [
            "02:00:00:00:00",
            "02:00:00:00:00:00:01",
            "xx:00:00:00:00:01",
            "01:00:00:00:00:01",
        ] {
            assert_eq!(
                asked("mac", &json!(bad)).unwrap_err().code,
                Code::Config,
                "{bad}"
            );
        }
    }

    #[test]
    fn aliases_are_a_list_or_lists_per_network() {
        let list = asked("aliases", &json!(["b", "a"])).unwrap().aliases;
        let map = asked("aliases", &json!({"net": ["a"], "other": ["b", "a"]}))
            .unwrap()
            .aliases;
        assert_eq!(
            (list.as_slice(), map.as_slice()),
            (&["a".into(), "b".into()][..], &list[..])
        );
    }
}
