//! Flannel's annotations of Node objects: what another node says there of its end of the tunnel, and what ours says of its own.
//!
//! Flannel has a tunnel per family: IPv4 pods are reached over IPv4, IPv6 pods over IPv6, each with a MAC of its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Deserialize;
use sluice_contract::Mac;
use sluice_contract::overlay::{TunnelProtocol, TunnelRow};

use crate::config::parse_mac;

/// Flannel's `--kube-annotation-prefix`, as everybody leaves it.
const PREFIX: &str = "flannel.alpha.coreos.com/";
/// What a node of ours says of its MAC in tunnels of any format.
const TUNNEL_MAC: &str = "sluice.dev/tunnel-mac";

/// Those of flannel's that a node of ours says.
const ALL: [&str; 6] = [
    "backend-data",
    "backend-type",
    "backend-v6-data",
    "kube-subnet-manager",
    "public-ip",
    "public-ipv6",
];

pub(super) type Annotations = BTreeMap<String, String>;

/// How a flannel reaches the pods of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Backend {
    Vxlan,
    HostGw,
    /// One that only flannel speaks.
    Other(String),
}

/// One end of a tunnel, in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) address: Option<IpAddr>,
    pub(super) mac: Option<Mac>,
    pub(super) vni: u32,
}

/// What a node's annotations say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) backend: Backend,
    pub(super) v4: End,
    pub(super) v6: End,
}

/// `backend-data` of the vxlan backend.
#[derive(Deserialize)]
struct Vxlan {
    /// Flannels before 0.12 do not say it, and use this one.
    #[serde(rename = "VNI", default = "usual_vni")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    mac: String,
}

const fn usual_vni() -> u32 {
    1
}

impl Lease {
    /// Reads it; `None` if flannel does not look after that node.
    ///
    /// # Errors
    /// The annotation that is not understood, and why.
    pub(super) fn read(annotations: &Annotations) -> Result<Option<Self>, String> {
        let at = |name: &str| annotations.get(&format!("{PREFIX}{name}"));
        let Some(backend) = at("backend-type") else {
            return Ok(None);
        };
        if at("kube-subnet-manager").is_some_and(|managed| managed != "true") {
            return Ok(None);
        }
        let backend = match backend.as_str() {
            "vxlan" => Backend::Vxlan,
            "host-gw" => Backend::HostGw,
            other => Backend::Other(other.to_owned()),
        };
        let end = |data: &str, address: &str, v4: bool| -> Result<End, String> {
            let wrong = |name: &str, text: &str, reason: &str| {
                let text: String = text.chars().take(80).collect();
                format!("{PREFIX}{name}: {text:?} {reason}")
            };
            let mut end = End {
                address: None,
                mac: None,
                vni: usual_vni(),
            };
            if let Some(text) = at(address).filter(|text| !text.is_empty()) {
                let read = text
                    .parse()
                    .ok()
                    .filter(|read: &IpAddr| read.is_ipv4() == v4);
                end.address = Some(read.ok_or_else(|| wrong(address, text, "is no such address"))?);
            }
            if let (Backend::Vxlan, Some(text)) = (&backend, at(data)) {
                let read: Option<Vxlan> = serde_json::from_str(text)
                    .map_err(|error| wrong(data, text, &format!("is not understood: {error}")))?;
                if let Some(read) = read {
                    let mac = parse_mac(&read.mac);
                    end.mac = Some(mac.ok_or_else(|| wrong(data, text, "has no MAC of a node"))?);
                    end.vni = read.vni;
                }
            }
            Ok(end)
        };
        Ok(Some(Self {
            v4: end("backend-data", "public-ip", true)?,
            v6: end("backend-v6-data", "public-ipv6", false)?,
            backend,
        }))
    }

    /// The end in the family of an underlay.
    pub(super) const fn end(&self, v4: bool) -> &End {
        if v4 { &self.v4 } else { &self.v6 }
    }
}

/// What a node of ours says of its MAC in the tunnel.
///
/// # Errors
/// It is none.
pub(super) fn tunnel_mac(annotations: &Annotations) -> Result<Option<Mac>, String> {
    let Some(text) = annotations.get(TUNNEL_MAC) else {
        return Ok(None);
    };
    let refused = || format!("{TUNNEL_MAC}: no MAC of a node");
    parse_mac(text).map(Some).ok_or_else(refused)
}

/// Whether a node says what only nodes of ours say.
pub(super) fn is_ours(annotations: &Annotations) -> bool {
    annotations.contains_key(TUNNEL_MAC)
}

/// The annotations by which flannels and nodes of ours learn of this end. `direct`: without a tunnel. `six`: this node has
/// pods with IPv6 addresses.
pub(super) fn of_tunnel(tunnel: &TunnelRow, direct: bool, six: bool) -> Annotations {
    let mut all = Annotations::new();
    let mut say = |name: &str, text: String| all.insert(format!("{PREFIX}{name}"), text);
    let backend = match tunnel.protocol {
        _ if direct => Some("host-gw"),
        TunnelProtocol::Vxlan => Some("vxlan"),
        // Flannel speaks no other that we do.
        _ => None,
    };
    if let Some(backend) = backend {
        let data = if direct {
            "null".to_owned()
        } else {
            format!(r#"{{"VNI":{},"VtepMAC":"{}"}}"#, tunnel.vni, tunnel.mac)
        };
        say("backend-type", backend.into());
        say("kube-subnet-manager", "true".into());
        if let Some(own) = tunnel.source4 {
            say("backend-data", data.clone());
            say("public-ip", Ipv4Addr::to_string(&own));
        }
        if let Some(own) = tunnel.source6.filter(|_| six) {
            say("backend-v6-data", data);
            say("public-ipv6", Ipv6Addr::to_string(&own));
        }
    }
    all.insert(TUNNEL_MAC.into(), tunnel.mac.to_string());
    all
}

/// The same as what is to be written: what is not said is taken away.
pub(super) fn to_write(said: &Annotations) -> BTreeMap<String, Option<String>> {
    let ours = ALL.map(|name| format!("{PREFIX}{name}"));
    let names = ours.into_iter().chain([TUNNEL_MAC.to_owned()]);
    names
        .map(|name| (name.clone(), said.get(&name).cloned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        let one = |(name, value): &(&str, &str)| (format!("{PREFIX}{name}"), (*value).to_owned());
        pairs.iter().map(one).collect()
    }

    #[test]
    fn o03_flannels_annotations_are_read_in_both_families() {
        let both = annotations(&[
            ("backend-data", r#"{"VNI":1,"VtepMAC":"0a:58:00:00:00:01"}"#),
            ("backend-type", "vxlan"),
            (
                "backend-v6-data",
                r#"{"VNI":7,"VtepMAC":"0a:58:00:00:00:06"}"#,
            ),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.0.2.1"),
            ("public-ipv6", "2001:db8::1"),
        ]);
        let lease = Lease::read(&both).unwrap().unwrap();
        assert_eq!(lease.backend, Backend::Vxlan);
        assert_eq!(
            lease.v4,
            End {
                address: Some([192, 0, 2, 1].into()),
                mac: Some(Mac([0x0a, 0x58, 0, 0, 0, 1])),
                vni: 1
            }
        );
        assert_eq!(
            (lease.v6.mac, lease.v6.vni),
            (Some(Mac([0x0a, 0x58, 0, 0, 0, 6])), 7)
        );
        let old = annotations(&[
            ("backend-type", "vxlan"),
            ("backend-data", r#"{"VtepMAC":"0a:58:00:00:00:01"}"#),
            ("backend-v6-data", "null"),
        ]);
        let lease = Lease::read(&old).unwrap().unwrap();
        assert_eq!((lease.v4.vni, lease.v6.mac), (1, None));
        assert_eq!(
            Lease::read(&annotations(&[("public-ip", "192.0.2.1")])),
            Ok(None)
        );
        let unmanaged = annotations(&[("backend-type", "vxlan"), ("kube-subnet-manager", "false")]);
        assert_eq!(Lease::read(&unmanaged), Ok(None));
        let gateway = annotations(&[("backend-type", "host-gw"), ("backend-data", "null")]);
        assert_eq!(
            Lease::read(&gateway).unwrap().unwrap().backend,
            Backend::HostGw
        );
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (name, value) in [
            ("backend-data", "{"),
            ("backend-data", r#"{"VNI":1}"#),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#),
            (
                "backend-data",
                r#"{"VNI":-1,"VtepMAC":"0a:58:00:00:00:01"}"#,
            ),
            ("public-ip", "2001:db8::1"),
            ("public-ipv6", "nonsense"),
        ] {
            let said = annotations(&[("backend-type", "vxlan"), (name, value)]);
            let why = Lease::read(&said).unwrap_err();
            assert!(why.starts_with(&format!("{PREFIX}{name}: ")), "{why}");
        }
        let said = Annotations::from([(TUNNEL_MAC.into(), "x".into())]);
        assert!(tunnel_mac(&said).unwrap_err().contains(TUNNEL_MAC));
    }

    #[test]
    fn o03_what_we_say_of_ourselves_is_what_flannel_reads() {
        let tunnel = TunnelRow {
            mac: Mac([2, 0, 0, 0, 0, 1]),
            source4: Some([192, 0, 2, 1].into()),
            source6: Some("2001:db8::1".parse().unwrap()),
            ..TunnelRow::default()
        };
        let said = of_tunnel(&tunnel, false, true);
        let data = r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#;
        let mut expected = annotations(&[
            ("backend-data", data),
            ("backend-type", "vxlan"),
            ("backend-v6-data", data),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.0.2.1"),
            ("public-ipv6", "2001:db8::1"),
        ]);
        expected.insert(TUNNEL_MAC.into(), "02:00:00:00:00:01".into());
        assert_eq!(said, expected);
        let written = to_write(&said);
        assert!(written.values().all(Option::is_some));
        assert_eq!(written.len(), said.len());
        let lease = Lease::read(&said).unwrap().unwrap();
        assert_eq!(lease.end(true).mac, Some(tunnel.mac));
        assert_eq!(tunnel_mac(&said), Ok(Some(tunnel.mac)));
        let direct = of_tunnel(&tunnel, true, false);
        assert_eq!(
            Lease::read(&direct).unwrap().unwrap().backend,
            Backend::HostGw
        );
        let geneve = TunnelRow {
            protocol: TunnelProtocol::Geneve,
            ..tunnel
        };
        let only = of_tunnel(&geneve, false, true);
        assert_eq!(only.len(), 1);
        // What was flannel's before is taken away.
        let written = to_write(&only);
        assert_eq!(written.values().filter(|value| value.is_none()).count(), 6);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(data: String, address: String) {
            let said = annotations(&[("backend-type", "vxlan"), ("backend-data", &data), ("public-ip", &address)]);
            if let Ok(Some(lease)) = Lease::read(&said) {
                prop_assert!(lease.v4.address.is_none_or(|it| it.is_ipv4()));
            }
        }
    }
}
