//! Any bytes on the control channel: no panic, and the framing always finds its way back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_contract::frame::{Decoder, decode};
use sluice_contract::message::Envelope;
use sluice_contract::{ToGuest, ToHost};

fuzz_target!(|bytes: &[u8]| {
    let mut decoder = Decoder::default();
    let mut stream = bytes;
    while let Some(payload) = decoder.next(&mut stream) {
        let _any = decode::<Envelope<ToGuest>>(payload);
        let _any = decode::<Envelope<ToHost>>(payload);
    }
    let _any = decode::<Envelope<ToGuest>>(bytes);
    let _any = decode::<Envelope<ToHost>>(bytes);
});
