//! Any bytes on the control channel, up to the tables: no panic, and the dataplane still takes packets.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sluice_appliance::testing::fuzz_control(bytes));
