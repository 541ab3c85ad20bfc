//! Any region of connections, as a predecessor may leave it: the table that adopts it stays whole.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sluice_appliance::testing::fuzz_adoption(bytes));
