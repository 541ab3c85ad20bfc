//! The trunk against a backend that puts frames into its rings and takes them out.

use super::*;
use crate::packet::Outcome;
use crate::pool::tests::pages;
use crate::virtqueue::tests::{Device, ring};
use proptest::prelude::*;
use sluice_appliance::frame::{Gso, GsoKind, Partial};
use std::vec;
use std::vec::Vec;

/// What the backend sees: link, virtio-net header without the buffer count, frame without the tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wire {
    pub(crate) link: u16,
    pub(crate) header: [u8; vnet::HEADER - 2],
    pub(crate) frame: Vec<u8>,
}

impl Wire {
    pub(crate) fn plain(link: u16, frame: Vec<u8>) -> Self {
        Self {
            link,
            header: [0; vnet::HEADER - 2],
            frame,
        }
    }

    fn tagged(&self, buffers: u16) -> Vec<u8> {
        let mut bytes = self.header.to_vec();
        bytes.extend(buffers.to_le_bytes());
        bytes.extend(&self.frame[..12]);
        bytes.extend([0x81, 0x00]);
        bytes.extend(self.link.to_be_bytes());
        bytes.extend(&self.frame[12..]);
        bytes
    }
}

/// A backend over the two rings.
pub(crate) struct Backend {
    receive: Device,
    transmit: Device,
    held: Vec<u16>,
}

fn memory(address: u64, length: u32) -> &'static mut [u8] {
    let start = core::ptr::with_exposed_provenance_mut::<u8>(address as usize);
    // SAFETY: the driver gave this range to the device, which is this thread, and the pages are
    // leaked.
    unsafe { core::slice::from_raw_parts_mut(start, length as usize) }
}

impl Backend {
    /// Puts the bytes into as many receive buffers as they take; `false` if there are too few.
    pub(crate) fn put_raw(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let Some((head, chain)) = self.receive.take() else {
                return false;
            };
            assert_eq!(chain.len(), 1);
            let (address, length, writes) = chain[0];
            assert!(writes);
            let n = bytes.len().min(length as usize);
            memory(address, length)[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            self.receive.put(u32::from(head), n as u32);
        }
        true
    }

    pub(crate) fn put(&mut self, wire: &Wire) -> bool {
        let length = wire.tagged(1).len();
        let sent = self.put_raw(&wire.tagged(length.div_ceil(ROOM) as u16));
        self.receive.signal();
        sent
    }

    /// Takes a frame from the transmit ring; its buffers go back with [`Self::complete`].
    pub(crate) fn take(&mut self) -> Option<Wire> {
        let (head, chain) = self.transmit.take()?;
        let mut bytes = Vec::new();
        for (address, length, writes) in chain {
            assert!(!writes && length > 0);
            bytes.extend_from_slice(memory(address, length));
        }
        self.held.push(head);
        let header = bytes[..10].try_into().unwrap();
        assert_eq!(bytes[10..12], [0, 0], "the driver sends no buffer count");
        assert_eq!(bytes[24..26], [0x81, 0x00]);
        let link = u16::from_be_bytes([bytes[26], bytes[27]]);
        let frame = [&bytes[12..24], &bytes[28..]].concat();
        Some(Wire {
            link,
            header,
            frame,
        })
    }

    pub(crate) fn complete(&mut self) {
        for head in self.held.drain(..) {
            self.transmit.put(u32::from(head), 0);
        }
        self.transmit.signal();
    }
}

pub(crate) fn trunk() -> (Trunk<'static>, Backend) {
    trunk_of([256, 256])
}

fn trunk_of(sizes: [u16; 2]) -> (Trunk<'static>, Backend) {
    let rings = [ring(), ring()];
    let mut trunk = Trunk::new(rings, sizes, F_EVENT_IDX, pages(BUFFERS)).unwrap();
    trunk.refill();
    let backend = Backend {
        receive: Device::new(rings[0], sizes[0], true),
        transmit: Device::new(rings[1], sizes[1], true),
        held: Vec::new(),
    };
    (trunk, backend)
}

impl Trunk<'_> {
    /// Buffers in all places but a batch.
    pub(crate) fn buffers(&self, sizes: [u16; 2]) -> usize {
        self.pool.free() + usize::from(sizes[0]) - self.receive.room() + usize::from(sizes[1])
            - self.transmit.room()
    }
}

/// Sends everything that waits back by the link after the one it came from.
fn echo(trunk: &mut Trunk<'static>) -> usize {
    let mut batch = Batch::default();
    trunk.receive(&mut batch);
    let count = batch.packets.len();
    while let Some(packet) = batch.packets.pop_front() {
        let link = LinkId::new(packet.ingress().raw() + 1).unwrap();
        assert!(trunk.send(packet, link, &mut batch));
    }
    trunk.flush();
    trunk.refill();
    count
}

fn frame(length: usize, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

#[test]
fn a_frame_crosses_in_its_buffer_with_only_the_tag_changed() {
    let (mut trunk, mut backend) = trunk();
    for length in [14, 60, 1514, ROOM - 16, ROOM - 15, 2 * ROOM, 65_549] {
        let wire = Wire::plain(16, frame(length, 3));
        assert!(backend.put(&wire));
        assert_eq!(echo(&mut trunk), 1, "{length}");
        assert_eq!(backend.take(), Some(Wire { link: 17, ..wire }), "{length}");
        backend.complete();
    }
    assert_eq!(trunk.errors(), 0);
    trunk.reclaim();
    assert_eq!(trunk.buffers([256, 256]), BUFFERS);
}

#[test]
fn w12_a_64_kib_gso_frame_crosses_whole_with_its_offloads() {
    let (mut trunk, mut backend) = trunk();
    let offload = Offload {
        partial: Some(Partial {
            start: 34,
            offset: 16,
        }),
        verified: false,
        gso: Some(Gso {
            kind: GsoKind::Tcp4,
            size: 1448,
            header: 66,
            ecn: false,
        }),
        tunnel: None,
    };
    let header = vnet::write(&offload)[..10].try_into().unwrap();
    let wire = Wire {
        link: 20,
        header,
        frame: frame(65_000, 9),
    };
    assert!(backend.put(&wire));
    let mut batch = Batch::default();
    trunk.receive(&mut batch);
    let mut packet = batch.packets.pop_front().unwrap();
    let seen = packet.frame().unwrap();
    assert_eq!((seen.length(), seen.offload), (65_000, offload));
    assert_eq!(seen.bytes(), &wire.frame[..seen.bytes().len()]);
    assert!(trunk.send(packet, LinkId::new(21).unwrap(), &mut batch));
    trunk.flush();
    assert_eq!(backend.take(), Some(Wire { link: 21, ..wire }));
}

#[test]
fn pushed_headers_go_out_and_all_headroom_may_be_used() {
    let (mut trunk, mut backend) = trunk();
    backend.put(&Wire::plain(16, frame(5000, 1)));
    let mut batch = Batch::default();
    trunk.receive(&mut batch);
    let mut packet = batch.packets.pop_front().unwrap();
    let mut seen = packet.frame().unwrap();
    let room = seen.headroom();
    assert_eq!(room, HEADROOM);
    seen.push(room).unwrap().fill(0xee);
    assert!(seen.push(1).is_none());
    let outcome = Outcome::from(&seen);
    packet.adopt(&outcome);
    assert!(trunk.send(packet, LinkId::UPLINK, &mut batch));
    trunk.flush();
    let sent = backend.take().unwrap();
    assert_eq!(sent.frame, [vec![0xee; HEADROOM], frame(5000, 1)].concat());
}

#[test]
fn a_frame_that_became_a_short_answer_returns_its_tails() {
    let (mut trunk, mut backend) = trunk();
    backend.put(&Wire::plain(16, frame(20_000, 1)));
    backend.put(&Wire::plain(16, frame(9_000, 2)));
    let mut batch = Batch::default();
    trunk.receive(&mut batch);
    let mut first = true;
    while let Some(mut packet) = batch.packets.pop_front() {
        if first {
            let mut seen = packet.frame().unwrap();
            assert!(seen.resize(100));
            let outcome = Outcome::from(&seen);
            packet.adopt(&outcome);
        }
        first = false;
        assert!(trunk.send(packet, LinkId::HOST, &mut batch));
    }
    trunk.flush();
    assert_eq!(backend.take().unwrap().frame, frame(20_000, 1)[..100]);
    assert_eq!(backend.take().unwrap().frame, frame(9_000, 2));
    backend.complete();
    trunk.reclaim();
    assert_eq!(trunk.buffers([256, 256]), BUFFERS);
}

#[test]
fn a_malformed_frame_is_counted_and_its_payload_never_taken_for_a_frame() {
    let (mut trunk, mut backend) = trunk();
    let inner = Wire::plain(99, frame(100, 5)).tagged(1);
    // Bytes of a pod that look like a frame of another link, at the start of the second buffer.
    let mut outer = Wire::plain(16, frame(ROOM * 2 - 100, 1)).tagged(2);
    outer[ROOM..ROOM + inner.len()].copy_from_slice(&inner);
    let mut bad_gso = outer.clone();
    bad_gso[1] = 0x33;
    let mut bad_tag = outer.clone();
    bad_tag[24] = 0;
    let mut too_long = outer.clone();
    too_long.resize(ROOM * 18, 7);
    too_long[10] = 18;
    for bad in [bad_gso, bad_tag, too_long, vec![0; 12], vec![0; 5]] {
        assert!(backend.put_raw(&bad));
        backend.receive.signal();
    }
    let wire = Wire::plain(30, frame(60, 1));
    backend.put(&wire);
    assert_eq!(echo(&mut trunk), 1);
    assert_eq!(backend.take(), Some(Wire { link: 31, ..wire }));
    assert_eq!(backend.take(), None);
    assert_eq!(trunk.errors(), 5);
    assert_eq!(trunk.buffers([256, 256]), BUFFERS);
}

#[test]
fn frames_wait_in_the_receive_ring_while_nothing_can_be_sent() {
    let (mut trunk, mut backend) = trunk_of([256, 16]);
    let mut put = 0;
    for i in 0..40u8 {
        put += usize::from(backend.put(&Wire::plain(16, frame(60, i))));
    }
    assert_eq!((put, echo(&mut trunk), echo(&mut trunk)), (40, 16, 0));
    assert!(!trunk.arm(), "nothing to do before a transmission is done");
    let mut seen = Vec::new();
    for _ in 0..3 {
        while let Some(wire) = backend.take() {
            seen.push(wire.frame);
        }
        backend.complete();
        trunk.arm();
        echo(&mut trunk);
    }
    assert_eq!(seen, (0..40).map(|i| frame(60, i)).collect::<Vec<_>>());
}

#[test]
fn originated_frames_never_take_the_room_of_the_batch() {
    let (mut trunk, mut backend) = trunk_of([256, 8]);
    for i in 0..7 {
        backend.put(&Wire::plain(16, frame(60, i)));
    }
    let mut batch = Batch::default();
    trunk.receive(&mut batch);
    let link = LinkId::new(40).unwrap();
    assert!(trunk.originate(link, &frame(70, 9), Offload::default()));
    assert!(
        !trunk.originate(link, &frame(70, 9), Offload::default()),
        "the rest is reserved"
    );
    while let Some(packet) = batch.packets.pop_front() {
        assert!(trunk.send(packet, LinkId::HOST, &mut batch));
    }
    trunk.flush();
    assert_eq!(backend.take(), Some(Wire::plain(40, frame(70, 9))));
    assert!(
        !trunk.originate(link, &vec![0; 5000], Offload::default()),
        "longer than a buffer"
    );
}

proptest! {
    /// Any traffic, any order of completions, any pace: what comes out is what went in, and no
    /// buffer is lost.
    #[test]
    fn nothing_is_lost_reordered_or_leaked(
        steps in proptest::collection::vec((0u8..5, 14usize..20_000), 1..60),
    ) {
        let sizes = [64, 32];
        let (mut trunk, mut backend) = trunk_of(sizes);
        let (mut sent, mut seen) = (Vec::new(), Vec::new());
        for (i, (action, length)) in steps.into_iter().enumerate() {
            match action {
                0 | 1 => {
                    let free = usize::from(sizes[0]) - trunk.receive.room();
                    let waiting = usize::from(trunk.receive.refresh());
                    let wire = Wire::plain(16, frame(length, i as u8));
                    if (length + 16).div_ceil(ROOM) + waiting < free.saturating_sub(waiting) {
                        prop_assert!(backend.put(&wire));
                        sent.push(wire.frame);
                    }
                }
                2 => {
                    echo(&mut trunk);
                }
                3 => seen.extend(backend.take().map(|wire| wire.frame)),
                _ => backend.complete(),
            }
            prop_assert_eq!(trunk.buffers(sizes), BUFFERS);
        }
        for _ in 0..sent.len() + 1 {
            echo(&mut trunk);
            while let Some(wire) = backend.take() {
                seen.push(wire.frame);
            }
            backend.complete();
        }
        trunk.reclaim();
        trunk.refill();
        prop_assert_eq!(seen, sent);
        prop_assert_eq!(trunk.errors(), 0);
        prop_assert_eq!(trunk.buffers(sizes), BUFFERS);
    }

    /// A device that writes noise into the buffers and lies about lengths leaks and breaks nothing.
    #[test]
    fn noise_from_the_device_is_survived(
        frames in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..60), any::<u32>(), any::<bool>()), 1..60),
    ) {
        let sizes = [16, 16];
        let (mut trunk, mut backend) = trunk_of(sizes);
        for (noise, lie, honest) in frames {
            if let Some((head, chain)) = backend.receive.take() {
                memory(chain[0].0, chain[0].1)[..noise.len()].copy_from_slice(&noise);
                let length = if honest { noise.len() as u32 } else { lie };
                backend.receive.put(u32::from(head), length);
                backend.receive.signal();
            }
            let mut batch = Batch::default();
            trunk.receive(&mut batch);
            while let Some(mut packet) = batch.packets.pop_front() {
                prop_assert!(packet.frame().is_some());
                trunk.send(packet, LinkId::HOST, &mut batch);
            }
            prop_assert!(batch.tails.is_empty());
            trunk.flush();
            while backend.take().is_some() {}
            backend.complete();
            trunk.arm();
            trunk.disarm();
            trunk.refill();
            prop_assert_eq!(trunk.buffers(sizes), BUFFERS);
        }
    }
}
