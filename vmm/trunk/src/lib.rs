//! The trunk: the path of every frame between the ports' taps and the guest's virtio-net rings.
//!
//! `ring` and `chain` read guest memory with suspicion, `links` knows the taps, `turns` which of them is
//! served next, `receive` and `send` move frames without touching payload, `segment` cuts what a tap cannot, `engine` is one
//! step of all that. `core` is the engine with its commands (`mailbox`), kicks and sleep. `driver` is a thread for it; `pair` lets the
//! thread that runs the guest take turns with one, as `policy` decides. `poll` and `crowd` say how long to poll.
//! `ports` is what the ports protocol (crate `sluice-ports`) governs, `vhost` hears from a VMM in another process where guest
//! memory and rings are.
#![deny(unsafe_code)]

#[cfg(test)]
mod bounds_tests;
pub mod chain;
pub mod core;
mod crowd;
pub mod driver;
pub mod engine;
pub mod features;
#[cfg(any(test, feature = "testing"))]
pub mod fuzzing;
pub mod links;
mod mailbox;
pub mod memory;
pub mod pair;
#[cfg(test)]
mod pair_tests;
pub mod policy;
mod poll;
pub mod ports;
#[cfg(test)]
mod ports_tests;
#[cfg(test)]
mod property_tests;
mod receive;
pub mod ring;
mod segment;
#[cfg(test)]
mod segment_tests;
mod send;
#[cfg(test)]
mod shared_tests;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod turns;
pub mod vhost;
pub mod vnet;
