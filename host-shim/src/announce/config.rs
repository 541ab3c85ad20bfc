//! What the operator wants others to be told.

use serde::{Deserialize, Serialize};
use sluice_announce::bgp::config::BgpConfig;

/// What is announced, and to whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnounceConfig {
    /// The ranges of this node's pods: for routers that are to send to pods as they are, where nodes do so too
    /// (`uplink.direct`).
    #[serde(default)]
    pub pods: bool,
    /// Addresses of Services within `uplink.service_addresses`.
    #[serde(default = "yes")]
    pub services: bool,
    /// Neighbors on the uplink's link are answered (ARP, neighbor discovery) when they look for addresses of Services: for
    /// each of them by one node of those that answer each other's probes.
    #[serde(default)]
    pub l2: bool,
    /// Routers that are told by BGP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bgp: Option<BgpConfig>,
}

fn yes() -> bool {
    true
}

impl AnnounceConfig {
    /// Checks what can be checked without asking anybody.
    ///
    /// # Errors
    /// The field that cannot be, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if self.bgp.is_none() && !self.l2 {
            return Err((
                "announce",
                "names nobody to be told: give `bgp` or `l2`".into(),
            ));
        }
        self.bgp.as_ref().map_or(Ok(()), BgpConfig::check)
    }
}
