//! How single values are written: addresses, prefixes and MACs as everybody writes them, kinds in lower case.

use std::net::{IpAddr, SocketAddr};

use serde::de::{Deserialize, Deserializer, Error};
use sluice_contract::overlay::TunnelProtocol;
use sluice_contract::policy::{Action, Established, port_key};
use sluice_contract::service::{AddressRole, FrontendKind, PrefixUse};
use sluice_contract::{Family, Mac, Prefix, Protocol};

/// Declares a wrapper that reads a contract's kind from its word.
macro_rules! words {
    ($($name:ident: $kind:ident { $($word:literal => $value:path,)+ })+) => {$(
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) struct $name(pub(super) $kind);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                match text.as_str() {
                    $($word => Ok(Self($value)),)+
                    _ => Err(D::Error::unknown_variant(&text, &[$($word),+])),
                }
            }
        }
    )+};
}

words! {
    FamilyWord: Family { "v4" => Family::V4, "v6" => Family::V6, }
    ProtocolWord: Protocol {
        "tcp" => Protocol::Tcp, "udp" => Protocol::Udp, "sctp" => Protocol::Sctp,
    }
    RoleWord: AddressRole {
        "node" => AddressRole::Node,
        "node-without-ports" => AddressRole::NodeWithoutPorts,
        "peer" => AddressRole::Peer,
        "cluster" => AddressRole::Cluster,
        "external" => AddressRole::External,
    }
    UseWord: PrefixUse {
        "pods" => PrefixUse::Pods, "services" => PrefixUse::Services, "keep" => PrefixUse::Keep,
    }
    KindWord: FrontendKind {
        "cluster-ip" => FrontendKind::ClusterIp,
        "node-port" => FrontendKind::NodePort,
        "external-ip" => FrontendKind::ExternalIp,
        "load-balancer" => FrontendKind::LoadBalancer,
        "host-port" => FrontendKind::HostPort,
    }
    ActionWord: Action {
        "accept" => Action::Accept, "deny" => Action::Deny, "pass" => Action::Pass,
    }
    EstablishedWord: Established {
        "judged" => Established::Judged, "kept" => Established::Kept,
    }
    TunnelWord: TunnelProtocol {
        "vxlan" => TunnelProtocol::Vxlan,
        "vxlan-gbp" => TunnelProtocol::VxlanGbp,
        "geneve" => TunnelProtocol::Geneve,
        "geneve-ip" => TunnelProtocol::GeneveIp,
        "ipip" => TunnelProtocol::IpIp,
    }
}

/// `02:53:4c:00:00:01`.
pub(super) fn mac(text: &str) -> Option<Mac> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next()?;
        let digits = part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits)?;
    }
    parts.next().is_none().then_some(Mac(bytes))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MacText(pub(super) Mac);

impl<'de> Deserialize<'de> for MacText {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let wrong = || D::Error::custom(format!("{text:?} is no MAC, such as 02:53:4c:00:00:01"));
        mac(&text).map(Self).ok_or_else(wrong)
    }
}

/// `10.0.0.0/16`, no bit set behind the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrefixText(pub(super) Prefix);

impl<'de> Deserialize<'de> for PrefixText {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let read = || {
            let (address, length) = text.split_once('/')?;
            Prefix::new(address.parse().ok()?, length.parse().ok()?)
        };
        let wrong = || {
            D::Error::custom(format!(
                "{text:?} is no prefix, such as 10.0.0.0/16 with all bits behind it zero"
            ))
        };
        read().map(Self).ok_or_else(wrong)
    }
}

/// `10.0.0.2:8080`, `[fd00::2]:8080`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EndpointText(pub(super) SocketAddr);

impl<'de> Deserialize<'de> for EndpointText {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let wrong = |_| {
            D::Error::custom(format!(
                "{text:?} is no endpoint, such as 10.0.0.2:8080 or [fd00::2]:8080"
            ))
        };
        text.parse().map(Self).map_err(wrong)
    }
}

/// Where an entry of a span starts: a number, a port as `tcp/80` (`other` for the class without ports), or 32 bits of an
/// address as `10.0.0.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StartText(pub(super) u32);

impl<'de> Deserialize<'de> for StartText {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(from)? {
            serde_json::Value::Number(number) => number
                .as_u64()
                .and_then(|number| u32::try_from(number).ok())
                .ok_or_else(|| D::Error::custom(format!("{number} is no number of 32 bits"))),
            serde_json::Value::String(text) => start(&text).ok_or_else(|| {
                D::Error::custom(format!(
                    "{text:?} is neither a port, such as tcp/80, nor IPv4"
                ))
            }),
            _ => Err(D::Error::custom("Neither a number nor text")),
        }
        .map(Self)
    }
}

fn start(text: &str) -> Option<u32> {
    if let Ok(IpAddr::V4(word)) = text.parse() {
        return Some(word.to_bits());
    }
    let (protocol, port) = text.split_once('/').unwrap_or((text, "0"));
    let protocol = match protocol {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        "sctp" => Some(Protocol::Sctp),
        "other" => None,
        _ => return None,
    };
    Some(port_key(protocol, port.parse().ok()?))
}
