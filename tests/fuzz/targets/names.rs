//! Any DNS message: read within its bounds, and through a pipeline that learns of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sluice_appliance::testing::fuzz_names(bytes));
