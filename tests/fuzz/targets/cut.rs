//! Any frame to be cut into segments: none of its payload is lost or sent twice, and there is an end to it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sluice_trunk::fuzzing::cut_any_frame(bytes));
