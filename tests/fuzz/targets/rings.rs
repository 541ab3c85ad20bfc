//! Any guest memory under the trunk's rings: loops, wild addresses, false lengths; the backend returns from each.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    sluice_trunk::fuzzing::run_on_hostile_memory(bytes).expect("memory and sockets");
});
