//! Rings and chains in memory that they share with a guest, without a file or a system call: `make miri` runs these where each
//! access to memory is checked.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::Bytes as _;

use super::chain::{Access, MAX_PIECES, collect};
use super::drops::HostDrop;
use super::memory::{GuestMemory, Scatter};
use super::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Ring, RingError, RingSpec};

const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const PAGES: usize = 4;
const LEN: u64 = 4096 * PAGES as u64;
const SIZE: u16 = 8;
/// Of the areas: table, available ring, used ring, which lies as far behind as it may.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x800;
const USED: u64 = LEN - (4 + 8 * SIZE as u64 + 4);
/// Free for buffers and tables.
const BUFFERS: u64 = 0x1000;

/// The guest's side.
#[derive(Clone)]
struct Guest(Arc<GuestMemory>);

impl Guest {
    fn new() -> Self {
        Self(Arc::new(GuestMemory::of_own_pages(GUEST, USER, PAGES)))
    }

    fn ring(&self, event_idx: bool) -> Ring {
        let spec = RingSpec {
            size: SIZE,
            descriptors: USER + TABLE,
            available: USER + AVAILABLE,
            used: USER + USED,
            event_idx,
        };
        Ring::new(self.0.clone(), &spec).unwrap()
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.0.slice().write_slice(bytes, at as usize).unwrap();
    }

    fn store(&self, at: u64, word: u16) {
        let slice = self.0.slice();
        slice.store(word, at as usize, Ordering::Release).unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        self.0.slice().load(at as usize, Ordering::Acquire).unwrap()
    }

    fn describe(&self, at: u64, descriptor: Descriptor) {
        self.write(at, &descriptor.addr.to_le_bytes());
        self.write(at + 8, &descriptor.len.to_le_bytes());
        self.write(at + 12, &descriptor.flags.to_le_bytes());
        self.write(at + 14, &descriptor.next.to_le_bytes());
    }

    /// Makes the chain at `head` available as the `index`-th.
    fn offer(&self, index: u16, head: u16) {
        self.store(AVAILABLE + 4 + 2 * u64::from(index % SIZE), head);
        self.store(AVAILABLE + 2, index.wrapping_add(1));
    }

    /// The `index`-th used entry.
    fn used(&self, index: u16) -> [u32; 2] {
        let mut bytes = [0; 8];
        let at = USED + 4 + 8 * u64::from(index % SIZE);
        self.0.slice().read_slice(&mut bytes, at as usize).unwrap();
        let [a, b, c, d, e, f, g, h] = bytes;
        [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes)
    }
}

fn buffer(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

fn at(index: u16) -> u64 {
    TABLE + 16 * u64::from(index)
}

#[test]
fn ring_at_the_end_of_memory_is_served_as_any_other() {
    for event_idx in [false, true] {
        let guest = Guest::new();
        let mut ring = guest.ring(event_idx);
        for index in 0..20u16 {
            let head = index % SIZE;
            guest.describe(at(head), buffer(GUEST + BUFFERS, 64, DESC_WRITE, 0));
            guest.offer(index, head);
            assert_eq!(ring.pending(), Ok(1));
            assert_eq!(ring.take(), head);
            ring.put_used(head, 64 + u32::from(index));
            assert!(ring.publish() || event_idx);
            assert_eq!(guest.load(USED + 2), index + 1);
            assert_eq!(guest.used(index), [u32::from(head), 64 + u32::from(index)]);
            assert_eq!(ring.ask_for_kick(), Ok(false));
            ring.refuse_kicks();
        }
        // Behind the entries, and the last word that the ring has.
        let event = guest.load(USED + 4 + 8 * u64::from(SIZE));
        assert_eq!(event, if event_idx { 19 } else { 0 });
        guest.store(AVAILABLE + 2, 20 + SIZE + 1);
        assert!(matches!(ring.pending(), Err(RingError::RunAway { .. })));
    }
}

#[test]
fn area_that_reaches_one_byte_beyond_the_memory_is_refused() {
    let guest = Guest::new();
    let right = RingSpec {
        size: SIZE,
        descriptors: USER + TABLE,
        available: USER + AVAILABLE,
        used: USER + USED,
        event_idx: true,
    };
    let end = USER + LEN;
    for wrong in [
        RingSpec {
            descriptors: end - 16 * u64::from(SIZE) + 16,
            ..right
        },
        RingSpec {
            available: end - (6 + 2 * u64::from(SIZE)) + 2,
            ..right
        },
        RingSpec {
            used: USER + USED + 4,
            ..right
        },
        RingSpec {
            used: u64::MAX - 3,
            ..right
        },
        RingSpec {
            descriptors: USER - 16,
            ..right
        },
    ] {
        let refused = Ring::new(guest.0.clone(), &wrong);
        assert!(matches!(refused, Err(RingError::Area { .. })), "{wrong:?}");
    }
}

#[test]
fn chain_is_collected_or_leaves_no_piece() {
    let guest = Guest::new();
    let ring = guest.ring(true);
    let last = GUEST + LEN - 1;
    let table = GUEST + BUFFERS;
    let long = 16 * u32::from(SIZE);
    let cases = [
        // A chain of two, the second of which is the last byte there is.
        (
            vec![buffer(table, 64, DESC_NEXT, 1), buffer(last, 1, 0, 0)],
            Ok(65),
        ),
        (vec![buffer(last, 2, 0, 0)], Err(HostDrop::ChainOutOfRange)),
        (
            vec![buffer(u64::MAX, 2, 0, 0)],
            Err(HostDrop::ChainOutOfRange),
        ),
        (vec![buffer(table, 0, 0, 0)], Err(HostDrop::ChainZeroLength)),
        (
            vec![buffer(table, 1, DESC_WRITE, 0)],
            Err(HostDrop::ChainDirection),
        ),
        (
            vec![buffer(table, 1, DESC_NEXT, SIZE)],
            Err(HostDrop::ChainOutOfRange),
        ),
        (
            vec![buffer(table, 1, DESC_NEXT, 0)],
            Err(HostDrop::ChainLoop),
        ),
        // A table of descriptors, one that is none, and one that ends with the memory.
        (vec![buffer(table, 32, DESC_INDIRECT, 0)], Ok(7)),
        (
            vec![buffer(table, 31, DESC_INDIRECT, 0)],
            Err(HostDrop::ChainIndirect),
        ),
        (
            vec![buffer(last, long, DESC_INDIRECT, 0)],
            Err(HostDrop::ChainOutOfRange),
        ),
    ];
    guest.describe(BUFFERS, buffer(table, 3, DESC_NEXT, 1));
    guest.describe(BUFFERS + 16, buffer(table, 4, 0, 0));
    for (chain, expected) in cases {
        for (index, descriptor) in (0..).zip(&chain) {
            guest.describe(at(index), *descriptor);
        }
        let mut pieces = Scatter::new(guest.0.clone(), MAX_PIECES);
        let seen = collect(&ring, 0, Access::Read, &mut pieces);
        assert_eq!(seen, expected, "{chain:?}");
        let lengths: usize = (0..pieces.len())
            .filter_map(|it| pieces.piece_len(it))
            .sum();
        assert_eq!(lengths, expected.map_or(0, |it| it as usize), "{chain:?}");
    }
}

#[test]
fn memory_is_read_to_its_end_and_not_beyond() {
    let guest = Guest::new();
    guest.write(LEN - 4, &[1, 2, 3, 4]);
    let mut bytes = [0; 4];
    assert!(guest.0.read(GUEST + LEN - 4, &mut bytes));
    assert_eq!(bytes, [1, 2, 3, 4]);
    for wrong in [GUEST + LEN - 3, GUEST - 1, 0, u64::MAX - 2] {
        assert!(!guest.0.read(wrong, &mut bytes), "{wrong:#x}");
    }
}

#[test]
fn device_and_guest_on_two_threads_see_what_the_other_wrote_before_its_index() {
    const CHAINS: u16 = 100;
    let guest = Guest::new();
    let mut ring = guest.ring(true);
    let driver = guest.clone();
    let seen = std::thread::spawn(move || {
        let mut seen = Vec::new();
        for index in 0..CHAINS {
            let head = index % SIZE;
            driver.describe(
                at(head),
                buffer(GUEST + BUFFERS, u32::from(index) + 1, DESC_WRITE, 0),
            );
            driver.offer(index, head);
            while driver.load(USED + 2) != index + 1 {
                std::hint::spin_loop();
            }
            seen.push(driver.used(index)[1]);
        }
        seen
    });
    for _ in 0..CHAINS {
        while ring.pending().unwrap() == 0 {
            std::hint::spin_loop();
        }
        let head = ring.take();
        let length = ring.descriptor(head).unwrap().len;
        ring.put_used(head, length);
        ring.publish();
    }
    let expected: Vec<u32> = (1..=u32::from(CHAINS)).collect();
    assert_eq!(seen.join().unwrap(), expected);
}
