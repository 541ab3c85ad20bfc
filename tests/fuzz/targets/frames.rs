//! Any frames from any link, with any offload words, through a whole pipeline: no panic, and each ends in one counter.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sluice_appliance::testing::fuzz_frames(bytes));
