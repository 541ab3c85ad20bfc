//! Rings and chains hold for any bytes of a guest, and are what the virtio-queue crate takes them for.

use proptest::prelude::*;

use super::chain::{self, Access};
use super::engine::{RECEIVE, TRANSMIT};
use super::fuzzing::run_on_hostile_memory;
use super::memory::Scatter;
use super::ring::Descriptor;
use super::testing::{BASE, FakeGuest, LEN, engine_for, socket_link};

/// Random descriptor tables: mostly plausible, so that chains get somewhere.
fn descriptors() -> impl Strategy<Value = Vec<Descriptor>> {
    let addr = prop_oneof![
        8 => (0..LEN).prop_map(|o| BASE + o),
        1 => any::<u64>(),
        1 => BASE + LEN - 64..BASE + LEN + 64,
    ];
    let len = prop_oneof![8 => 1u32..3000, 1 => Just(0), 1 => any::<u32>()];
    let flags =
        prop_oneof![6 => Just(1u16), 6 => Just(0), 2 => Just(2), 2 => Just(3), 1 => 4u16..8];
    let next = prop_oneof![9 => 0u16..16, 1 => any::<u16>()];
    let one = (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Descriptor {
        addr,
        len,
        flags,
        next,
    });
    proptest::collection::vec(one, 16)
}

proptest! {
    #[test]
    fn every_chain_is_accepted_as_virtio_queue_reads_it_or_refused(table in descriptors()) {
        use virtio_queue::{Queue, QueueOwnedT, QueueT};
        use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

        let mut guest = FakeGuest::new(16, false).unwrap();
        for (i, d) in table.iter().enumerate() {
            guest.describe(TRANSMIT, i as u16, *d);
        }
        (0..16).for_each(|head| guest.offer(TRANSMIT, head));
        let file = FileOffset::new(guest.file().try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(BASE), LEN as usize, Some(file))];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let mut queue = Queue::new(16).unwrap();
        let [desc, avail, used] = guest.areas(TRANSMIT);
        queue.set_size(16);
        queue.set_desc_table_address(Some(desc as u32), Some((desc >> 32) as u32));
        queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
        queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
        queue.set_ready(true);

        let ring = guest.ring(TRANSMIT).unwrap();
        for theirs in queue.iter(&memory).unwrap() {
            let head = theirs.head_index();
            for access in [Access::Read, Access::Write] {
                let mut ours = Scatter::new(guest.memory().clone(), 16);
                match chain::collect(&ring, head, access, &mut ours) {
                    Ok(total) => {
                        let expected: Vec<_> =
                            theirs.clone().map(|d| (d.addr().0, d.len() as usize)).collect();
                        prop_assert_eq!(total as usize, expected.iter().map(|p| p.1).sum::<usize>());
                        prop_assert_eq!(ours.guest_pieces(), expected);
                    }
                    Err(_) => prop_assert_eq!(ours.guest_pieces(), []),
                }
            }
        }
    }

    #[test]
    fn used_ring_and_calls_are_as_virtio_queue_writes_them(
        batches in proptest::collection::vec((1u16..10, any::<u16>()), 1..40),
    ) {
        use virtio_queue::{Queue, QueueT};
        use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

        let ours = FakeGuest::new(16, true).unwrap();
        let theirs = FakeGuest::new(16, true).unwrap();
        let file = FileOffset::new(theirs.file().try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(BASE), LEN as usize, Some(file))];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let mut queue = Queue::new(16).unwrap();
        let [desc, avail, used] = theirs.areas(RECEIVE);
        queue.set_size(16);
        queue.set_desc_table_address(Some(desc as u32), Some((desc >> 32) as u32));
        queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
        queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
        queue.set_event_idx(true);
        queue.set_ready(true);

        let mut ring = ours.ring(RECEIVE).unwrap();
        // virtio-queue always calls on its first question; ours knows that nothing was used before.
        queue.needs_notification(&memory).unwrap();
        for (count, event) in batches {
            let event = ours.used_index(RECEIVE).wrapping_add(event % 24).wrapping_sub(8);
            ours.ask_for_call(RECEIVE, event);
            theirs.ask_for_call(RECEIVE, event);
            for i in 0..count {
                ring.put_used(i, u32::from(i) * 7);
                queue.add_used(&memory, i, u32::from(i) * 7).unwrap();
            }
            prop_assert_eq!(ring.publish(), queue.needs_notification(&memory).unwrap());
            prop_assert_eq!(ours.read(used, 4 + 8 * 16), theirs.read(used, 4 + 8 * 16));
        }
    }

    #[test]
    fn any_bytes_as_guest_memory_end_in_time_and_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..9000),
    ) {
        run_on_hostile_memory(&bytes).unwrap();
    }

    #[test]
    fn any_descriptor_table_ends_in_counted_frames_or_drops(
        table in descriptors(), heads in proptest::collection::vec(any::<u16>(), 1..16),
    ) {
        let mut guest = FakeGuest::new(16, true).unwrap();
        for (i, d) in table.iter().enumerate() {
            guest.describe(TRANSMIT, i as u16, *d);
        }
        heads.iter().for_each(|head| guest.offer(TRANSMIT, *head));
        let (mut engine, trunk) = engine_for(&guest).unwrap();
        let (_pod, link) = socket_link(&mut engine, 16).unwrap();
        engine.step();
        let ended = trunk.drops.total() + link.drops.total() + link.from_guest.frames.value();
        prop_assert_eq!(ended, heads.len() as u64);
        let expected: Vec<_> = heads.iter().map(|h| (u32::from(*h), 0)).collect();
        prop_assert_eq!(guest.used(TRANSMIT), expected);
    }
}
