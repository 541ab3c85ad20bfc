//! The trunk: the path of every frame between the links' taps and the guest's virtio-net rings.
//!
//! `vhost` hears from the VMM where guest memory and rings are, `ring` and `chain` read them with
//! suspicion, `tap` speaks to the tun driver, `links` knows the taps, `turns` which of them is
//! served next, `receive` and `send` move frames without touching payload, `engine` is one step of
//! both, `driver` the thread that keeps stepping, `mailbox` how others reach it, `crowd` and `place`
//! when it polls and where. `segment` cuts what a tap cannot. `ports` is how a daemon gives the
//! engine its ports.
#![deny(unsafe_code)]

#[cfg(test)]
mod bounds_tests;
pub mod chain;
mod crowd;
pub mod driver;
pub mod drops;
pub mod engine;
pub mod features;
#[cfg(any(test, feature = "testing"))]
pub mod fuzzing;
pub mod links;
mod mailbox;
pub mod memory;
pub mod place;
pub mod ports;
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
pub mod tap;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod turns;
pub mod vhost;
pub mod vnet;
