//! The rows of a pod's host ports: each port a Service of its own, with the pod as its only backend.
//!
//! Their ids are the link's, above those that the cluster model gives: a model numbers from 0 and never comes so far.

use sluice_cni::capability;
use sluice_contract::service::{
    AddressRole, AddressRow, BackendRow, FrontendKind, FrontendRow, NatRow, PortId, PortRow,
    ServiceRow, SetId, SetRow,
};
use sluice_contract::types::Family;
use sluice_contract::{LinkId, Protocol, Row};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::PodConfig;
use crate::uplink::ports::PortRange;

/// The first id that is a host port's.
const FIRST: u32 = 1 << 31;
/// Host ports of one pod and family.
pub(crate) const MOST: usize = 1 << 15;

/// The rows of all host ports of a pod.
pub(super) fn rows(link: LinkId, pod: &PodConfig) -> Vec<Row> {
    let mut rows = Vec::new();
    for (index, port) in (0u32..).zip(&pod.host_ports) {
        for address in &pod.addresses {
            let (family, bit, everywhere) = match address {
                IpAddr::V4(_) => (Family::V4, 0, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
                IpAddr::V6(_) => (Family::V6, 1, Ipv6Addr::UNSPECIFIED.into()),
            };
            let frontend = port.host_ip.unwrap_or(everywhere);
            if frontend.is_ipv4() != address.is_ipv4() {
                continue;
            }
            let id = FIRST | u32::from(link.raw()) << 16 | index << 1 | bit;
            let protocol = protocol(port.protocol);
            let (set, service) = (SetId(id), PortId(id));
            let services = [
                ServiceRow::Set(SetRow {
                    id: set,
                    family,
                    count: 1,
                    slots: 0,
                }),
                ServiceRow::Backend(BackendRow {
                    set,
                    index: 0,
                    address: *address,
                    port: port.container_port,
                }),
                ServiceRow::Port(PortRow {
                    id: service,
                    family,
                    cluster: Some(set),
                    local: Some(set),
                    serving: Some(set),
                    endpoints: true,
                    internal_local: false,
                    external_local: false,
                    direct_return: false,
                    affinity: 0,
                    source_lengths: Default::default(),
                }),
                ServiceRow::Frontend(FrontendRow {
                    address: frontend,
                    protocol,
                    port: port.host_port,
                    service,
                    kind: FrontendKind::HostPort,
                }),
            ];
            rows.extend(services.map(Row::Service));
        }
    }
    rows
}

/// The protocol as the appliance calls it.
pub(super) const fn protocol(named: capability::Protocol) -> Protocol {
    match named {
        capability::Protocol::Tcp => Protocol::Tcp,
        capability::Protocol::Udp => Protocol::Udp,
        capability::Protocol::Sctp => Protocol::Sctp,
    }
}

/// The rows that say which addresses are this node's: where host ports are served, and what pods look like from outside.
pub(super) fn node_rows(addresses: &[IpAddr], snat: Option<PortRange>) -> Vec<Row> {
    if addresses.is_empty() {
        return Vec::new();
    }
    let mut nat = NatRow::default();
    if let Some(range) = snat {
        (nat.first_port, nat.last_port) = (range.first(), range.last());
    }
    for address in addresses.iter().rev() {
        match address {
            IpAddr::V4(ip) => nat.node4 = Some(*ip),
            IpAddr::V6(ip) => nat.node6 = Some(*ip),
        }
    }
    let role = AddressRole::Node;
    let of_node = |address: &IpAddr| {
        ServiceRow::Address(AddressRow {
            address: *address,
            role,
        })
    };
    let mut rows = vec![Row::Service(ServiceRow::Nat(nat))];
    rows.extend(addresses.iter().map(of_node).map(Row::Service));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_contract::Key;
    use std::collections::BTreeSet;

    fn pod(ports: &str) -> PodConfig {
        let text = format!(
            r#"{{"name": "a", "netns": "/n", "addresses": ["10.0.0.1", "fd00::1"], "host_ports": {ports}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn b01_a_port_without_address_is_served_in_both_families_and_one_with_only_in_its_own() {
        let link = LinkId::new(16).unwrap();
        let ports = r#"[{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"},
                        {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "192.0.2.1"}]"#;
        let rows = rows(link, &pod(ports));
        let frontends: Vec<String> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Service(ServiceRow::Frontend(f)) => {
                    Some(format!("{}:{}/{:?}", f.address, f.port, f.protocol))
                }
                _ => None,
            })
            .collect();
        assert_eq!(
            frontends,
            ["0.0.0.0:80/Tcp", ":::80/Tcp", "192.0.2.1:53/Udp"]
        );
        let keys: BTreeSet<Key> = rows.iter().map(Row::key).collect();
        assert_eq!(keys.len(), rows.len(), "no two rows have one key");
    }
}
