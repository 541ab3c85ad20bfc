//! The ports protocol: how a daemon gives an appliance's process its ports and asks how they are (docs/ports.md, byte by byte).
//!
//! `message` is what is said, `packet` its bytes, `wire` the socket and the descriptors that travel with a packet. `server` is the
//! engine's side without any I/O, `engine` what it governs, `serve` the thread behind the socket. `client` is the daemon's side.
//!
//! The listening end is inherited by the process, so the next daemon connects to a running appliance. Losing a daemon changes
//! nothing: ports, frames and a running hold stay as they are.

pub mod client;
pub mod engine;
pub mod message;
pub mod packet;
#[cfg(test)]
mod property_tests;
pub mod serve;
pub mod server;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod wire;

/// Version of the protocol: both ends refuse any other by name. The header of a packet is the same in all versions.
pub const VERSION: u16 = 1;
/// Longest packet, header included.
pub const PACKET_MAX: usize = 4096;
/// Largest id of a port: ids are VLAN ids on the trunk (0 and 4095 name no VLAN, IEEE 802.1Q §9.6).
pub const ID_MAX: u16 = 4094;
/// Longest hold. Connectivity must not hang on a daemon that died in between.
pub const HOLD_MAX_MILLIS: u32 = 60_000;
