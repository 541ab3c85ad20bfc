//! Says to others what this node serves: to routers by BGP, to neighbors on its link by ARP and neighbor discovery.
//!
//! Nothing is learned from anybody. Routes of others belong into the host's own tables, which the uplink follows.

pub mod bgp;
pub mod elect;
pub mod l2;

use std::collections::BTreeSet;
use std::sync::Arc;

use sluice_contract::Prefix;

/// What is announced: ranges of pods, addresses of Services.
pub type Routes = Arc<BTreeSet<Prefix>>;
