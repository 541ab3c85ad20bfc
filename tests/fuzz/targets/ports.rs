//! Any packets on the ports protocol, to either side: the daemon's reply is read or refused, and a server goes on with ports
//! and answers as they have to be. The first byte says which side the rest is for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_ports::testing::{fuzz_client, fuzz_server};

fuzz_target!(|bytes: &[u8]| match bytes.split_first() {
    Some((side, rest)) if side & 1 == 1 => fuzz_client(rest),
    Some((_, rest)) => fuzz_server(rest).expect("descriptors"),
    None => {}
});
