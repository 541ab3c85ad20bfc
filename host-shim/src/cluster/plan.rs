//! What the configuration says of addresses, for the model: which are the cluster's own, and which Services may have.

use sluice_contract::service::{PrefixRow, PrefixUse};
use sluice_model::compile::{AddressPlan, ServiceMatch};
use sluice_model::object::Prefix;

use crate::config::Config;
use crate::hostlink::config::HostLinkConfig;
use crate::uplink::config::parse_prefix;

/// All of it. The texts were checked when the configuration was read.
pub(super) fn plan(config: &Config) -> AddressPlan {
    let services = &config.services;
    let cni = config.cni.pod_cidrs.iter();
    let pools = config.cni.pools.values().flatten();
    let uplink = config.uplink.iter();
    let peers = uplink.clone().flat_map(|it| &it.peers);
    let pods = cni
        .chain(pools)
        .chain(uplink.clone().flat_map(|it| &it.pods))
        .chain(peers.flat_map(|it| &it.pods));
    let cluster = config.host_link.as_ref().map(HostLinkConfig::ranges);
    AddressPlan {
        external: prefixes(services.external_addresses.iter()),
        pods: prefixes(pods),
        services: prefixes(services.cidrs.iter()),
        cluster: cluster
            .unwrap_or_default()
            .iter()
            .filter_map(|range| Prefix::new(range.address(), range.length()))
            .collect(),
        local: uplink.flat_map(|it| &it.addresses).copied().collect(),
        node_endpoints: (services.node_endpoints.iter())
            .filter_map(|it| ServiceMatch::parse(it))
            .collect(),
    }
}

/// The ranges of which the appliance drops what no Service has.
pub(super) fn service_ranges(config: &Config) -> Vec<PrefixRow> {
    let ranges = config.services.cidrs.iter();
    let row = |prefix| PrefixRow {
        prefix,
        purpose: PrefixUse::Services,
    };
    ranges.filter_map(|it| parse_prefix(it)).map(row).collect()
}

fn prefixes<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<Prefix> {
    let parsed = texts.filter_map(|text| parse_prefix(text));
    let ranges = parsed.filter_map(|range| Prefix::new(range.address(), range.length()));
    ranges.collect()
}
