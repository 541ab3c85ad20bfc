//! The self-test's second half: a ring and the tables, used once in the memory and at the privilege
//! of the real thing.

use core::ptr;

use sluice_appliance::frame::{Frame, Offload};
use sluice_appliance::time::Instant;
use sluice_appliance::verdict::{Originate, Verdict};
use sluice_appliance::{Arena, Capacity, Pipeline};
use sluice_contract::row::LinkRow;
use sluice_contract::{DropReason, Generation, Identity, LinkId, Mac, Row, ToGuest};
use sluice_guest::memory::Memory;
use sluice_guest::virtqueue::{Areas, Part, Queue};

use super::entropy;

/// Nothing is originated here.
struct Nowhere;

impl Originate for Nowhere {
    fn originate(&mut self, _: LinkId, _: &[u8], _: Offload) -> bool {
        false
    }
}

/// A chain goes out through a ring and comes back as a device would give it back, more often than
/// the ring is long.
pub(crate) fn ring_carries_chains(memory: &mut Memory) -> bool {
    const SIZE: u16 = 16;
    let Some(ring) = memory.ring() else {
        return false;
    };
    let Some(mut queue) = Queue::<u32>::new(ring, SIZE, true) else {
        return false;
    };
    let areas = ring.areas();
    (0..3 * u32::from(SIZE)).all(|round| {
        let parts = [0u32, 1].map(|n| {
            let token = round * 2 + n;
            Part {
                address: u64::from(token),
                length: 100,
                device_writes: true,
                token,
            }
        });
        if queue.add(parts.into_iter()).is_err() {
            return false;
        }
        queue.publish();
        use_next(areas, SIZE, round as u16, 150);
        let mut sum = 0;
        let length = queue.pop(|token| sum += token);
        length == Some(150) && sum == round * 4 + 1 && queue.errors() == 0
    })
}

/// What a device does: the `n`th available chain becomes the `n`th used one.
fn use_next(areas: Areas, size: u16, n: u16, written: u32) {
    let slot = u64::from(n % size);
    let head = ptr::with_exposed_provenance::<u16>((areas.available + 4 + slot * 2) as usize);
    let used = ptr::with_exposed_provenance_mut::<u32>((areas.used + 4 + slot * 8) as usize);
    let index = ptr::with_exposed_provenance_mut::<u16>((areas.used + 2) as usize);
    // SAFETY: the areas of a ring of `size`, alive for good; all its fields are atomics, so a
    // second writer is allowed.
    unsafe {
        used.write_volatile(u32::from(head.read_volatile()));
        used.add(1).write_volatile(written);
        index.write_volatile(n.wrapping_add(1));
    }
}

/// The tables are built in packet memory, take a change, and answer a pod's question for its
/// gateway; a frame of a link that they do not know ends in its counter.
pub(crate) fn tables_answer_for_the_gateway(memory: Memory) -> bool {
    let mut arena = Arena::new(memory.rest());
    let capacity = Capacity::fitting(arena.left());
    let Ok(mut pipeline) = Pipeline::new(&mut arena, capacity, entropy::seed(None)) else {
        return false;
    };
    let (Some(pod), Some(stranger)) = (LinkId::new(16), LinkId::new(17)) else {
        return false;
    };
    let generation = Generation(1);
    let change = [
        ToGuest::Begin {
            generation,
            fresh: true,
        },
        ToGuest::Put(Row::Link(link_row(pod))),
        ToGuest::Commit { generation },
    ];
    for message in &change {
        pipeline.configure(message);
        while !pipeline.work(64) {}
    }
    let expected = [Verdict::Reply, Verdict::Drop(DropReason::UnknownLink)];
    let answered = [pod, stranger]
        .into_iter()
        .zip(expected)
        .all(|(link, expected)| {
            let mut buffer = question(pod);
            let length = buffer.len();
            let frame = Frame::new(&mut buffer, 0, length, 0, link, Offload::default());
            let Some(frame) = frame else { return false };
            let mut verdicts = [Verdict::Held];
            pipeline.process_batch(&mut [frame], &mut verdicts, Instant::ZERO, &mut Nowhere);
            verdicts == [expected]
        });
    answered && pipeline.tables().generation() == generation && pipeline.stats().is_balanced()
}

fn link_row(id: LinkId) -> LinkRow {
    let mut addresses = heapless::Vec::new();
    // One of several places.
    let _ = addresses.push([10, 0, 0, 1].into());
    let (mac, identity) = (Mac::of_pod(id), Identity(1));
    LinkRow {
        id,
        mac,
        addresses,
        mtu: 1500,
        identity,
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    }
}

/// The pod asks by ARP who has 169.254.1.1.
fn question(pod: LinkId) -> [u8; 42] {
    let mut frame = [0; 42];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&Mac::of_pod(pod).0);
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&Mac::of_pod(pod).0);
    frame[28..32].copy_from_slice(&[10, 0, 0, 1]);
    frame[38..42].copy_from_slice(&[169, 254, 1, 1]);
    frame
}
