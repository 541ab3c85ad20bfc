//! Ring 0 of the appliance VM: what must be true before and around the dataplane in ring 3.
//!
//! Everything that can be decided before boot is a constant: [`paging`] and [`descriptors`] build
//! the page tables, GDT and IDT at compile time over the fixed addresses of [`layout`], so ring 0
//! runs a few dozen instructions at boot and none per packet. The instructions themselves are
//! `entry.s` (PVH entry to ring 3) and `traps.s` (fault report, calls from ring 3); [`ring0!`]
//! places code and tables in the image that owns the linker script. [`pvh`] reads the boot
//! protocol's structures for ring 3.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod descriptors;
pub mod layout;
pub mod paging;
pub mod pvh;
pub mod ring0;
