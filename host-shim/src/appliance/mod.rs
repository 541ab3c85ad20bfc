//! The appliance's process as the daemon sees it from outside: the ports that it serves, and which image it runs.
//!
//! The process reads and writes all frames (docs/ports.md). The daemon gives it descriptors and asks how it is.

pub mod build_id;
pub mod ports;
#[cfg(test)]
pub(crate) mod testing;
