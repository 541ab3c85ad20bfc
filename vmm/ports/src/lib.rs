//! The ports protocol: how a daemon gives an appliance's process its ports and asks how they are (docs/ports.md, byte by byte).
//!
//! `message` is what is said, `packet` its bytes, `wire` the socket and the descriptors that travel with a packet. `server` is the
//! process's side without any I/O, `serve` the thread behind the socket; what it governs is in the crate `sluice-trunk`. `client` is
//! the daemon's side. `tap` makes what most ports are, `offloads` and `drops` are the words for what a port takes and refuses.
//!
//! The listening end is inherited by the process, so the next daemon connects to a running appliance. Losing a daemon changes
//! nothing: ports, frames and a running hold stay as they are.
//!
//! A daemon links this crate and not `sluice-trunk`: it reads no ring and maps no guest memory.
#![deny(unsafe_code)]

#[cfg(feature = "args")]
pub mod args;
pub mod client;
pub mod drops;
pub mod inherit;
pub mod message;
pub mod offloads;
pub mod packet;
#[cfg(test)]
mod property_tests;
pub mod serve;
pub mod server;
pub mod tap;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod wire;

/// Version of the protocol: both ends refuse any other by name. The header of a packet is the same in all versions.
pub const VERSION: u16 = 2;
/// Longest packet, header included.
pub const PACKET_MAX: usize = 4096;
/// Largest id of a port: ids are VLAN ids on the trunk (0 and 4095 name no VLAN, IEEE 802.1Q §9.6).
pub const ID_MAX: u16 = 4094;
/// Longest hold. Connectivity must not hang on a daemon that died in between.
pub const HOLD_MAX_MILLIS: u32 = 60_000;
