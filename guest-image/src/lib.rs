//! What binds the appliance to its machine, as far as it can run and be tested on a host.
//!
//! `main.rs` is the image itself: entry from ring 0, panic handler, hand-off. Everything that
//! touches the machine is in few named files: `platform.rs` (calls to ring 0, clock, device
//! registers) and the `.s` files; the rest is generic over small traits.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod boot;
pub mod console;
pub mod control;
pub mod features;
pub mod idle;
pub mod memory;
pub mod net;
pub mod packet;
pub mod pool;
pub mod report;
pub mod run;
pub mod transport;
pub mod virtqueue;
pub mod vnet;
