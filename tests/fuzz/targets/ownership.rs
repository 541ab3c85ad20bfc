//! Any objects of two namespaces, compiled and put into the appliance's tables: those of one change nothing for packets to the
//! other one's addresses, to pods, nodes and the Service range, and no row is refused.
#![no_main]
#![allow(dead_code, reason = "shared with the property test of the model")]

#[path = "../../../host-shim/model/tests/ownership/world.rs"]
mod world;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| world::holds(bytes));
