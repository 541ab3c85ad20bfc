//! The queue against a device that follows the rules, and against one that does not.

use super::*;
use proptest::prelude::*;
use std::boxed::Box;
use std::collections::BTreeSet;
use std::vec::Vec;

/// A chain as the device sees it: (address, length, device writes) per descriptor.
pub(crate) type Chain = Vec<(u64, u32, bool)>;

/// The device's side, written from the specification and independent of the driver's code.
pub(crate) struct Device {
    ring: &'static Ring,
    size: u16,
    event_index: bool,
    next_available: u16,
    used: u16,
    signalled: u16,
}

impl Device {
    pub(crate) fn new(ring: &'static Ring, size: u16, event_index: bool) -> Self {
        Self {
            ring,
            size,
            event_index,
            next_available: 0,
            used: 0,
            signalled: 0,
        }
    }

    /// The next chain the driver made available: its head and its descriptors.
    pub(crate) fn take(&mut self) -> Option<(u16, Chain)> {
        if self.ring.available_index.load(Ordering::Acquire) == self.next_available {
            return None;
        }
        let at = usize::from(self.next_available % self.size);
        let head = self.ring.available[at].load(Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        let mut chain = Chain::new();
        let mut id = head;
        loop {
            let descriptor = &self.ring.descriptors[usize::from(id)];
            let flags = descriptor.flags.load(Ordering::Relaxed);
            chain.push((
                descriptor.address.load(Ordering::Relaxed),
                descriptor.length.load(Ordering::Relaxed),
                flags & FLAG_DEVICE_WRITES != 0,
            ));
            assert!(chain.len() <= usize::from(self.size), "the chain is a loop");
            if flags & FLAG_NEXT == 0 {
                return Some((head, chain));
            }
            id = descriptor.next.load(Ordering::Relaxed);
        }
    }

    /// Says that every available chain is wanted to be announced.
    pub(crate) fn want_kicks(&mut self) {
        let event = &self.ring.device.used[usize::from(self.size)].id;
        event.store(u32::from(self.next_available), Ordering::Relaxed);
    }

    pub(crate) fn put(&mut self, id: u32, length: u32) {
        let used = &self.ring.device.used[usize::from(self.used % self.size)];
        used.id.store(id, Ordering::Relaxed);
        used.length.store(length, Ordering::Relaxed);
        self.used = self.used.wrapping_add(1);
    }

    /// Publishes completions; whether the driver wants an interrupt for them.
    pub(crate) fn signal(&mut self) -> bool {
        self.ring.device.index.store(self.used, Ordering::Release);
        let (old, new) = (self.signalled, self.used);
        self.signalled = new;
        if old == new {
            return false;
        }
        if self.event_index {
            let event = self.ring.available[usize::from(self.size)].load(Ordering::Relaxed);
            needs_event(event, new, old)
        } else {
            self.ring.available_flags.load(Ordering::Relaxed) & FLAG_QUIET == 0
        }
    }
}

pub(crate) fn ring() -> &'static Ring {
    Box::leak(Box::new(Ring::default()))
}

fn part(token: u32, length: u32, device_writes: bool) -> Part<u32> {
    Part {
        address: u64::from(token) << 12,
        length,
        device_writes,
        token,
    }
}

fn pop(queue: &mut Queue<'_, u32>) -> Option<(Vec<u32>, u32)> {
    let mut tokens = Vec::new();
    let length = queue.pop(|t| tokens.push(t))?;
    Some((tokens, length))
}

#[test]
fn the_areas_lie_as_the_specification_wants() {
    let areas = ring().areas();
    assert_eq!(areas.descriptors % 4096, 0);
    let descriptors = 16 * QUEUE_SIZE as u64;
    assert_eq!(
        (areas.available - areas.descriptors, areas.available % 2),
        (descriptors, 0)
    );
    assert_eq!(areas.used % 64, 0);
    assert!(areas.used >= areas.available + 6 + 2 * QUEUE_SIZE as u64);
    assert!(size_of::<Ring>() <= 4 * 4096);
}

#[test]
fn a_chain_goes_out_and_its_tokens_come_back_in_order() {
    let ring = ring();
    let mut queue = Queue::new(ring, 8, true).unwrap();
    let mut device = Device::new(ring, 8, true);
    let chain = [part(1, 100, false), part(2, 200, true), part(3, 300, true)];
    assert!(queue.add(chain.into_iter()).is_ok());
    assert!(device.take().is_none(), "not yet published");
    assert!(queue.publish(), "the device asked for the first");
    let (head, seen) = device.take().unwrap();
    assert_eq!(
        seen,
        [
            (0x1000, 100, false),
            (0x2000, 200, true),
            (0x3000, 300, true)
        ]
    );
    device.put(u32::from(head), 450);
    device.signal();
    assert_eq!(pop(&mut queue), Some(([1, 2, 3].to_vec(), 450)));
    assert_eq!(
        (pop(&mut queue), queue.room(), queue.errors()),
        (None, 8, 0)
    );
}

#[test]
fn a_chain_that_does_not_fit_is_given_back_whole() {
    let mut queue = Queue::new(ring(), 2, true).unwrap();
    let parts = (0..3).map(|i| part(i, 1, false)).collect::<Vec<_>>();
    let back = queue.add(parts.into_iter()).unwrap_err();
    assert_eq!((back.len(), queue.room()), (3, 2));
    assert!(queue.add(Vec::new().into_iter()).is_err());
}

#[test]
fn sizes_that_are_no_rings_are_refused() {
    for size in [0, 3, 100, QUEUE_SIZE as u16 + 1, 2 * QUEUE_SIZE as u16] {
        assert!(Queue::<u32>::new(ring(), size, true).is_none(), "{size}");
    }
}

#[test]
fn an_armed_queue_is_signalled_and_a_disarmed_one_is_not() {
    for event_index in [false, true] {
        let ring = ring();
        let mut queue = Queue::new(ring, 4, event_index).unwrap();
        let mut device = Device::new(ring, 4, event_index);
        for round in 0..70_000u32 {
            let armed = round % 3 == 0;
            queue.add([part(round, 8, true)].into_iter()).unwrap();
            queue.publish();
            let (head, _) = device.take().unwrap();
            if armed {
                assert!(!queue.arm(), "nothing is there yet");
            } else {
                queue.disarm();
            }
            device.put(u32::from(head), 8);
            assert_eq!(device.signal(), armed, "round {round}");
            assert_eq!(pop(&mut queue), Some(([round].to_vec(), 8)));
        }
    }
}

#[test]
fn arming_finds_what_came_just_before() {
    let ring = ring();
    let mut queue = Queue::new(ring, 4, true).unwrap();
    let mut device = Device::new(ring, 4, true);
    queue.add([part(7, 8, true)].into_iter()).unwrap();
    queue.publish();
    let (head, _) = device.take().unwrap();
    device.put(u32::from(head), 8);
    assert!(!device.signal(), "it was disarmed");
    assert!(queue.arm());
}

#[test]
fn an_armed_queue_hears_of_what_comes_after_what_it_left_waiting() {
    let ring = ring();
    let mut queue = Queue::new(ring, 4, true).unwrap();
    let mut device = Device::new(ring, 4, true);
    for token in 0..2 {
        queue.add([part(token, 8, true)].into_iter()).unwrap();
    }
    queue.publish();
    let (first, _) = device.take().unwrap();
    device.put(u32::from(first), 8);
    assert!(!device.signal(), "it was disarmed");
    assert!(queue.arm(), "one waits and is left waiting");
    let (second, _) = device.take().unwrap();
    device.put(u32::from(second), 8);
    assert!(device.signal());
}

#[test]
fn a_device_that_sleeps_is_kicked_once_per_batch_and_a_busy_one_never() {
    let ring = ring();
    let mut queue = Queue::new(ring, 8, true).unwrap();
    let mut device = Device::new(ring, 8, true);
    device.want_kicks();
    for i in 0..3 {
        queue.add([part(i, 8, false)].into_iter()).unwrap();
    }
    assert!(queue.publish());
    assert!(!queue.publish(), "nothing new");
    queue.add([part(3, 8, false)].into_iter()).unwrap();
    assert!(!queue.publish(), "the device has not asked again");
}

#[test]
fn lies_are_counted_and_cost_nothing_else() {
    let ring = ring();
    let mut queue = Queue::new(ring, 4, true).unwrap();
    let mut device = Device::new(ring, 4, true);
    queue.add([part(1, 8, true)].into_iter()).unwrap();
    queue.add([part(2, 8, true)].into_iter()).unwrap();
    queue.publish();
    let (head, _) = device.take().unwrap();
    // Not in flight, then not even a descriptor.
    device.put(3, 8);
    device.put(0xffff_0000, 8);
    device.signal();
    assert_eq!((pop(&mut queue), queue.errors()), (None, 2));
    // Longer than the buffer: the bytes there are, no more.
    device.put(u32::from(head), 4000);
    device.signal();
    assert_eq!(
        (pop(&mut queue), queue.errors()),
        (Some(([1].to_vec(), 8)), 3)
    );
    // The same again: it is no longer in flight.
    device.put(u32::from(head), 8);
    device.signal();
    assert_eq!((pop(&mut queue), queue.errors()), (None, 4));
    // More completions than there can be.
    device.used = device.used.wrapping_add(3);
    device.signal();
    assert_eq!((pop(&mut queue), queue.errors()), (None, 5));
    assert_eq!(queue.room(), 3, "the other chain is still with the device");
}

#[derive(Clone, Debug)]
enum Step {
    Add(usize),
    Publish,
    Complete { which: usize, length: u32 },
    Lie { id: u32, length: u32 },
    Jump(u16),
    Pop,
    Arm,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1usize..5).prop_map(Step::Add),
        3 => Just(Step::Publish),
        4 => (any::<usize>(), 0u32..400).prop_map(|(which, length)| Step::Complete { which, length }),
        1 => (prop_oneof![0u32..20, any::<u32>()], any::<u32>())
            .prop_map(|(id, length)| Step::Lie { id, length }),
        1 => any::<u16>().prop_map(Step::Jump),
        4 => Just(Step::Pop),
        1 => Just(Step::Arm),
    ]
}

proptest! {
    /// Whatever the device does, every token is in exactly one place, and comes back at most once.
    #[test]
    fn tokens_are_never_lost_or_doubled(
        steps in proptest::collection::vec(step(), 1..200),
        event_index in any::<bool>(),
        lies in any::<bool>(),
    ) {
        let ring = ring();
        let mut queue = Queue::new(ring, 16, event_index).unwrap();
        let mut device = Device::new(ring, 16, event_index);
        let mut out = BTreeSet::new();
        let mut with_device = Vec::new();
        let mut next = 0u32;
        let mut told = 0usize;
        for step in steps {
            match step {
                Step::Add(count) => {
                    let tokens: Vec<u32> = (next..next + count as u32).collect();
                    let parts: Vec<_> = tokens.iter().map(|t| part(*t, 100, true)).collect();
                    if queue.add(parts.into_iter()).is_ok() {
                        next += count as u32;
                        out.extend(tokens);
                    }
                }
                Step::Publish => {
                    queue.publish();
                    while let Some((head, chain)) = device.take() {
                        with_device.push((head, chain));
                    }
                }
                Step::Complete { which, length } if !with_device.is_empty() => {
                    let (head, _) = with_device.swap_remove(which % with_device.len());
                    device.put(u32::from(head), length);
                    device.signal();
                }
                Step::Lie { id, length } if lies => {
                    device.put(id, length);
                    device.signal();
                    told += 1;
                }
                Step::Jump(by) if lies => {
                    device.used = device.used.wrapping_add(by);
                    device.signal();
                    told += 1;
                }
                Step::Pop => {
                    while let Some((tokens, length)) = pop(&mut queue) {
                        prop_assert!(length as usize <= 100 * tokens.len());
                        for token in tokens {
                            prop_assert!(out.remove(&token), "{token} came back twice");
                        }
                    }
                }
                Step::Arm => {
                    queue.arm();
                }
                _ => {}
            }
            prop_assert_eq!(queue.room() + out.len(), 16);
        }
        if told == 0 {
            let honest: usize = queue.errors() as usize;
            // Lengths up to 400 for chains of one part are the only untruth an honest run tells.
            prop_assert!(honest <= next as usize);
        }
    }
}
