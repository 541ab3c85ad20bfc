//! The console against a device that moves bytes at its own pace.

use super::*;
use crate::pool::tests::pages;
use crate::virtqueue::tests::{Device, ring};
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

/// The host's end.
pub(crate) struct Host {
    receive: Device,
    transmit: Device,
}

fn memory(address: u64, length: u32) -> &'static mut [u8] {
    let start = core::ptr::with_exposed_provenance_mut::<u8>(address as usize);
    // SAFETY: the driver gave this range to the device, which is this thread, and the pages are
    // leaked.
    unsafe { core::slice::from_raw_parts_mut(start, length as usize) }
}

impl Host {
    /// Writes as much as the guest has buffers for and returns how much that was.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            let Some((head, chain)) = self.receive.take() else {
                break;
            };
            let (address, length, writes) = chain[0];
            assert!(writes && chain.len() == 1);
            let piece = &bytes[written..bytes.len().min(written + length as usize)];
            memory(address, length)[..piece.len()].copy_from_slice(piece);
            self.receive.put(u32::from(head), piece.len() as u32);
            written += piece.len();
        }
        self.receive.signal();
        written
    }

    pub(crate) fn read(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some((head, chain)) = self.transmit.take() {
            for (address, length, writes) in chain {
                assert!(!writes);
                bytes.extend_from_slice(memory(address, length));
            }
            self.transmit.put(u32::from(head), 0);
        }
        self.transmit.signal();
        bytes
    }
}

pub(crate) fn console() -> (Console<'static>, Host) {
    let rings = [ring(), ring()];
    let sizes = [64, 64];
    let mut console = Console::new(rings, sizes, F_EVENT_IDX, pages(BUFFERS)).unwrap();
    console.refill();
    let host = Host {
        receive: Device::new(rings[0], 64, true),
        transmit: Device::new(rings[1], 64, true),
    };
    (console, host)
}

fn read_all(console: &mut Console<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let piece = console.received().to_vec();
        if piece.is_empty() {
            return bytes;
        }
        console.consume(piece.len());
        bytes.extend(piece);
    }
}

#[test]
fn bytes_cross_both_ways_in_order() {
    let (mut console, mut host) = console();
    assert_eq!(host.write(b"hello"), 5);
    assert!(console.arm(false));
    assert_eq!(console.received(), b"hello");
    console.consume(2);
    assert_eq!(console.received(), b"llo");
    console.consume(3);
    assert!(console.received().is_empty());
    let long = vec![7; 10_000];
    assert!(console.send(b"answer") && console.send(&long));
    console.flush();
    assert_eq!(host.read(), [b"answer".to_vec(), long].concat());
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_from_sending_and_nothing_else() {
    let (mut console, mut host) = console();
    let message = [1u8; 4106];
    let mut sent = 0;
    while console.send(&message) {
        sent += 1;
    }
    assert_eq!(sent, TRANSMIT_BUFFERS / 2);
    console.flush();
    assert_eq!(host.write(b"still heard"), 11);
    assert_eq!(console.received(), b"still heard");
    assert_eq!(host.read().len(), sent * message.len());
    assert!(console.arm(true), "room again");
    assert!(console.send(&message));
}

proptest! {
    /// Both streams come out as they went in, whatever the pieces; no buffer is lost.
    #[test]
    fn streams_are_exact_at_any_pace(steps in proptest::collection::vec((0u8..5, 0usize..9000), 1..80)) {
        let (mut console, mut host) = console();
        let (mut down, mut down_seen) = (Vec::<u8>::new(), Vec::<u8>::new());
        let (mut up, mut up_seen) = (Vec::<u8>::new(), Vec::<u8>::new());
        for (i, (action, length)) in steps.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..length).map(|n| (n + i) as u8).collect();
            match action {
                0 => {
                    let written = host.write(&bytes);
                    down.extend(&bytes[..written]);
                }
                1 => {
                    let piece = console.received().to_vec();
                    let taken = piece.len().min(length);
                    console.consume(taken);
                    down_seen.extend(&piece[..taken]);
                }
                2 => {
                    let room = console.room();
                    let sent = console.send(&bytes);
                    prop_assert_eq!(sent, length <= room);
                    if sent {
                        up.extend(bytes);
                    }
                }
                3 => up_seen.extend(host.read()),
                _ => {
                    console.flush();
                    console.refill();
                }
            }
            let held = usize::from(console.current.is_some());
            let rings = console.receive.in_flight() + console.transmit.in_flight();
            prop_assert_eq!(console.pool.free() + held + rings, BUFFERS);
        }
        console.flush();
        up_seen.extend(host.read());
        down_seen.extend(read_all(&mut console));
        prop_assert_eq!(down, down_seen);
        prop_assert_eq!(up, up_seen);
        prop_assert_eq!(console.errors(), 0);
    }
}
