//! What a Service asks for and does not get, for its author.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sluice_contract::service::ServiceKey;

use super::ownership::Ownership;
use crate::finding::{Finding, Severity};
use crate::object::{Name, Service};

/// Findings of one Service; it may claim thousands of addresses.
const MOST: usize = 8;

/// All that is wrong with a Service's addresses, ports and endpoints.
pub(super) fn of(
    service: &Service,
    owners: &Ownership,
    banned: &BTreeSet<IpAddr>,
    lost: &[(ServiceKey, Name)],
) -> Vec<Finding> {
    let refused = owners.refused(&service.name);
    let addresses = refused.iter().map(|(address, kind, refusal)| {
        let reason = format!("{kind} {address} is not used: {refusal}");
        (field_of(service, *address), reason)
    });
    let ports = lost.iter().filter_map(|(key, winner)| {
        let ServiceKey::Frontend {
            address,
            protocol,
            port,
        } = key
        else {
            return None;
        };
        let protocol = format!("{protocol:?}").to_uppercase();
        let what = match address.is_unspecified() {
            true => format!("Node port {port}/{protocol}"),
            false => format!("Port {port}/{protocol} of {address}"),
        };
        let reason = format!(
            "{what} is not used: Service {winner}, which comes first, has it. Choose another port"
        );
        Some(("spec.ports".to_owned(), reason))
    });
    let endpoints = banned.iter().map(|address| {
        let namespace = &service.name.namespace;
        let reason = format!(
            "Endpoint {address} is not used: it is an address of a node, and no Pod of namespace {namespace} with hostNetwork has it. \
             Name the Service in services.node_endpoints if it is meant"
        );
        (String::new(), reason)
    });
    let count = refused.len() + lost.len() + banned.len();
    let all = addresses.chain(ports).chain(endpoints);
    let mut found: Vec<Finding> = all
        .take(MOST)
        .map(|(field, reason)| finding(service, field, reason))
        .collect();
    if count > MOST {
        let reason = format!(
            "{} more addresses, ports or endpoints are not used",
            count - MOST
        );
        found.push(finding(service, String::new(), reason));
    }
    found
}

fn finding(service: &Service, field: String, reason: String) -> Finding {
    Finding {
        file: None,
        line: 0,
        severity: Severity::Warning,
        object: format!("Service {}", service.name),
        field,
        reason,
    }
}

/// Where the Service names an address.
fn field_of(service: &Service, address: IpAddr) -> String {
    let at = |mut all: Box<dyn Iterator<Item = IpAddr> + '_>| all.position(|it| it == address);
    let own = at(Box::new(service.cluster_ips.iter().copied()));
    let balanced = || at(Box::new(service.load_balancer.iter().map(|it| it.address)));
    let external = || at(Box::new(service.external_ips.iter().copied()));
    if let Some(index) = own {
        format!("spec.clusterIPs[{index}]")
    } else if let Some(index) = balanced() {
        format!("status.loadBalancer.ingress[{index}].ip")
    } else if let Some(index) = external() {
        format!("spec.externalIPs[{index}]")
    } else {
        String::new()
    }
}
