//! The pods' addresses.
//!
//! * [`range`]: which addresses may be given: sets of ranges, one address from each set.
//! * [`store`]: who has which, on disk, in the layout of the reference plugin `host-local`, so that a node can be taken
//!   over with its allocations and given back.
//! * [`pool`]: choosing, releasing, collecting what was leaked.
//! * [`disk`]: the few file operations the store is made of; tests cut the power between any two.
//! * [`delegate`]: the same questions to any other IPAM plugin, by its standard input and output.
//!
//! Nothing here reads a clock: `now` is an argument.

pub mod delegate;
pub mod disk;
pub mod pool;
pub mod range;
pub mod store;

pub use pool::{Ask, Pool};
pub use range::{Address, Plan, Range, RangeSet};
pub use store::{Lease, Owner};

use std::io;
use std::net::IpAddr;

/// Why an address was not given, kept or freed.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// The configuration names ranges that cannot be.
    #[error("invalid range: {0}")]
    Range(String),
    /// Nothing is left of one set.
    #[error(
        "no addresses available in range set {ranges}: {used} of {total} used, {leaked} of them leaked"
    )]
    Exhausted {
        ranges: String,
        total: u128,
        used: usize,
        leaked: usize,
    },
    /// A fixed address belongs to somebody else.
    #[error("requested address {address} is allocated to {owner}")]
    Taken { address: IpAddr, owner: String },
    /// A fixed address that no pod may have.
    #[error("requested address {address} {why}")]
    NotAllowed { address: IpAddr, why: String },
    /// This attachment has addresses.
    #[error("{container_id} {ifname} already has {address}")]
    Duplicate {
        container_id: String,
        ifname: String,
        address: IpAddr,
    },
    /// The node's ranges are not those that its pods' addresses came from.
    #[error("the node's pod CIDRs changed: {count} addresses ({first}) are outside of {ranges}")]
    Moved {
        ranges: String,
        count: usize,
        first: IpAddr,
    },
    /// The disk refused.
    #[error("cannot {what}")]
    Disk {
        what: &'static str,
        source: io::Error,
    },
}
