//! Any bytes that a router may send on its session: cut into messages, and what is read of them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sluice_announce::bgp::fuzz_router(bytes));
