//! What the fuzz targets run: whole pipelines, fed with any bytes.

extern crate std;

mod fixture;
mod frames;
mod input;
mod tunnel;

pub use frames::fuzz_frames;
pub(crate) use input::Input;

use super::{BenchIn, Builder, node};
use crate::time::Duration;
use fixture::on_node;

/// Fuzz entry: the bytes are a DNS message, read by itself, and sent as the answer to a question that a pod has asked.
/// Holds: no panic, no more than the budget of addresses, and only names that rules can name.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_names(bytes: &[u8]) {
    use crate::names::message::{self, RECORDS};
    let Some(question) = message::question(bytes) else {
        return;
    };
    let text = question.name.text();
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    assert!(!text.is_empty() && text.iter().all(is_plain));
    assert!(!text.iter().any(u8::is_ascii_uppercase));
    let mut count = 0;
    message::addresses(bytes, &question, &mut { RECORDS }, |_, _| count += 1);
    assert!(count <= RECORDS);
    on_node(0, |bench| answer_through(bench, bytes));
}

/// A pod asks what the message answers, and gets it.
fn answer_through(bench: &mut BenchIn<'_>, bytes: &[u8]) {
    let mut asked = bytes.to_vec();
    if let Some(flags) = asked.get_mut(2) {
        *flags &= 0x7f;
    }
    let room = bytes.len().min(1400);
    let (pod, resolver) = (node::V4.pods[0], node::V4.pods[1]);
    let ask = Builder::from(16, pod, resolver).udp(5000, 53);
    bench.send(16, &ask.payload(&asked[..room]).build());
    let answer = Builder::from(17, resolver, pod).udp(53, 5000);
    bench.send(17, &answer.payload(&bytes[..room]).build());
    bench.now = bench.now + Duration::from_millis(10);
}

/// Fuzz entry: the bytes are a control stream. Holds: no panic, and the dataplane still takes packets.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_control(bytes: &[u8]) {
    on_node(0, |bench| control_stream(bench, bytes));
}

fn control_stream(bench: &mut BenchIn<'_>, bytes: &[u8]) {
    use crate::session::{Facts, Session};
    use sluice_contract::frame::{Decoder, decode};
    let mut session = Session::new(Facts::default());
    let mut decoder = Decoder::default();
    let mut input = bytes;
    while let Some(payload) = decoder.next(&mut input) {
        let Some(envelope) = decode(payload) else {
            continue;
        };
        while !session.is_ready(&bench.pipeline) {
            bench.pipeline.work(64);
            while session.poll(&mut bench.pipeline).is_some() {}
        }
        session.receive(&envelope, &mut bench.pipeline, 0);
        while session.poll(&mut bench.pipeline).is_some() {}
    }
    bench.send(16, &Builder::from(16, "10.0.0.1", "10.0.0.2").build());
}
