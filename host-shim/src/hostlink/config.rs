//! What the operator says of the host link.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sluice_contract::{Prefix, limits};

use crate::uplink::config::parse_prefix;

/// The way from the node itself to pods and Services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostLinkConfig {
    /// The node's own addresses: the source of what it sends to pods. The first of each family is used, all are taken.
    pub addresses: Vec<IpAddr>,
    /// The ranges of all pods and Services of the cluster.
    pub routes: Vec<String>,
}

impl HostLinkConfig {
    /// What is wrong with it: the field and why.
    ///
    /// # Errors
    /// The first thing found.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let count = self.addresses.len();
        if count == 0 || count > limits::LINK_ADDRESSES {
            let most = limits::LINK_ADDRESSES;
            return Err((
                "host_link.addresses",
                format!("{count} addresses; a node has 1 to {most} here"),
            ));
        }
        for text in &self.routes {
            let Some(range) = parse_prefix(text) else {
                return Err((
                    "host_link.routes",
                    format!("{text} is no range of addresses"),
                ));
            };
            let v4 = range.address().is_ipv4();
            if !self.addresses.iter().any(|own| own.is_ipv4() == v4) {
                return Err((
                    "host_link.routes",
                    format!("{text}: the node has no address of that family"),
                ));
            }
            let own = self.addresses.iter().find(|own| range.contains(**own));
            if let Some(own) = own {
                return Err((
                    "host_link.routes",
                    format!("{text} has the node's own address {own} in it"),
                ));
            }
        }
        Ok(())
    }

    /// The ranges, each once.
    pub fn ranges(&self) -> Vec<Prefix> {
        let mut all: Vec<_> = self.routes.iter().filter_map(|r| parse_prefix(r)).collect();
        all.sort();
        all.dedup();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let config = |addresses: &[&str], routes: &[&str]| HostLinkConfig {
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            routes: routes.iter().map(|r| (*r).into()).collect(),
        };
        let good = config(&["192.168.0.1", "fd99::1"], &["10.0.0.0/8", "fd00::/12"]);
        assert_eq!(good.check(), Ok(()));
        for (bad, part) in [
            (config(&[], &[]), "0 addresses"),
            (config(&["192.168.0.1"], &["10.0.0.0"]), "no range"),
            (config(&["192.168.0.1"], &["fd00::/12"]), "that family"),
            (config(&["192.168.0.1"], &["192.168.0.0/16"]), "own address"),
        ] {
            let (field, reason) = bad.check().unwrap_err();
            assert!(field.starts_with("host_link"));
            assert!(reason.contains(part), "{reason:?} does not say {part:?}");
        }
    }
}
