//! The driver's side of a split ring (virtio 1.2, 2.7), with event indexes.
//!
//! The ring is shared with a device that is not trusted: every field is an atomic, read once and
//! checked. What the driver has to remember (which buffers a chain has, how much may be written) is
//! in private slots, never read back from shared memory. A completion that makes no sense is
//! counted and ignored; its buffers stay with the device, so a lying device can starve the queue
//! but corrupt nothing.
//!
//! A token per descriptor (the buffer's owner) goes in with [`Queue::add`] and comes out at
//! completion: between the two nobody can touch the buffer.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Most descriptors of a queue: 30 frames of 64 KiB, so that a sleeping guest is woken half as often under bulk as with 256.
/// Twice as many would win nothing more: their pages no longer stay in any near cache.
pub const QUEUE_SIZE: usize = 512;

/// How often arming follows a device that goes on completing.
const ARM_ATTEMPTS: u32 = 8;

const FLAG_NEXT: u16 = 1;
const FLAG_DEVICE_WRITES: u16 = 2;
/// In the available ring: "do not interrupt"; in the used ring: "do not notify".
const FLAG_QUIET: u16 = 1;

#[derive(Debug, Default)]
#[repr(C)]
struct Descriptor {
    address: AtomicU64,
    length: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[derive(Debug, Default)]
#[repr(C)]
struct Used {
    id: AtomicU32,
    length: AtomicU32,
}

/// The three areas of a ring, as they lie in memory. Zeroed memory is an empty ring.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Ring {
    descriptors: [Descriptor; QUEUE_SIZE],
    available_flags: AtomicU16,
    available_index: AtomicU16,
    /// One more than the largest ring: the used event follows the last entry of the ring's actual
    /// size.
    available: [AtomicU16; QUEUE_SIZE + 1],
    device: DeviceArea,
}

/// What the device writes: on cache lines of its own.
#[repr(C, align(64))]
#[derive(Debug)]
struct DeviceArea {
    flags: AtomicU16,
    index: AtomicU16,
    /// One more, for the available event.
    used: [Used; QUEUE_SIZE + 1],
}

impl Default for Ring {
    fn default() -> Self {
        Self {
            descriptors: core::array::from_fn(|_| Descriptor::default()),
            available_flags: AtomicU16::new(0),
            available_index: AtomicU16::new(0),
            available: core::array::from_fn(|_| AtomicU16::new(0)),
            device: DeviceArea {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                used: core::array::from_fn(|_| Used::default()),
            },
        }
    }
}

/// Where the device finds the areas.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Areas {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl Ring {
    /// Guest-physical addresses; memory is identity-mapped.
    pub fn areas(&self) -> Areas {
        Areas {
            descriptors: (&raw const self.descriptors).expose_provenance() as u64,
            available: (&raw const self.available_flags).expose_provenance() as u64,
            used: (&raw const self.device).expose_provenance() as u64,
        }
    }
}

/// One buffer of a chain and the token of its owner.
#[derive(Debug)]
pub struct Part<T> {
    pub address: u64,
    pub length: u32,
    pub device_writes: bool,
    pub token: T,
}

/// What the driver remembers of a descriptor.
#[derive(Debug)]
struct Slot<T> {
    token: Option<T>,
    next: u16,
    /// Bytes the device may have written, summed over the chain; kept with the head.
    writable: u32,
    /// Descriptors in the chain; zero unless this is the head of a chain that is with the device.
    chain: u16,
}

/// A queue. `T` is what owns a descriptor's buffer.
#[derive(Debug)]
pub struct Queue<'m, T> {
    ring: &'m Ring,
    size: u16,
    event_index: bool,
    slots: [Slot<T>; QUEUE_SIZE],
    first_free: u16,
    free: u16,
    /// Chains with the device: no more completions than this can be true.
    in_flight: u16,
    next_available: u16,
    published: u16,
    next_used: u16,
    /// The device's used index as last read; read again when all up to it is consumed.
    seen_used: u16,
    errors: u64,
}

impl<'m, T> Queue<'m, T> {
    /// An empty queue of `size` descriptors over zeroed ring memory. `None` unless `size` is a
    /// power of two that fits.
    pub fn new(ring: &'m Ring, size: u16, event_index: bool) -> Option<Self> {
        if !size.is_power_of_two() || usize::from(size) > QUEUE_SIZE {
            return None;
        }
        let slot = |i: usize| Slot {
            token: None,
            next: i as u16 + 1,
            writable: 0,
            chain: 0,
        };
        let queue = Self {
            ring,
            size,
            event_index,
            slots: core::array::from_fn(slot),
            first_free: 0,
            free: size,
            in_flight: 0,
            next_available: 0,
            published: 0,
            next_used: 0,
            seen_used: 0,
            errors: 0,
        };
        queue.disarm();
        Some(queue)
    }

    /// Descriptors that can still be added.
    pub fn room(&self) -> usize {
        usize::from(self.free)
    }

    /// Chains that are with the device.
    pub fn in_flight(&self) -> usize {
        usize::from(self.in_flight)
    }

    /// Completions that made no sense, so far.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// Adds a chain of one or more parts; the device sees it after [`publish`](Self::publish).
    ///
    /// # Errors
    /// Gives the parts back if there is no room for all of them, or if there is none.
    pub fn add<I: ExactSizeIterator<Item = Part<T>>>(&mut self, parts: I) -> Result<(), I> {
        let count = parts.len();
        if count == 0 || count > self.room() {
            return Err(parts);
        }
        let head = self.first_free;
        let mut id = head;
        let mut writable = 0u32;
        for (i, part) in parts.take(count).enumerate() {
            let last = i + 1 == count;
            if part.device_writes {
                writable = writable.saturating_add(part.length);
            }
            let Some(slot) = self.slots.get_mut(usize::from(id)) else {
                break;
            };
            let flags = if last { 0 } else { FLAG_NEXT }
                | if part.device_writes {
                    FLAG_DEVICE_WRITES
                } else {
                    0
                };
            if let Some(descriptor) = self.ring.descriptors.get(usize::from(id)) {
                descriptor.address.store(part.address, Ordering::Relaxed);
                descriptor.length.store(part.length, Ordering::Relaxed);
                descriptor.flags.store(flags, Ordering::Relaxed);
                descriptor
                    .next
                    .store(if last { 0 } else { slot.next }, Ordering::Relaxed);
            }
            slot.token = Some(part.token);
            id = slot.next;
        }
        self.first_free = id;
        self.free -= count as u16;
        self.in_flight += 1;
        if let Some(slot) = self.slots.get_mut(usize::from(head)) {
            slot.writable = writable;
            slot.chain = count as u16;
        }
        if let Some(entry) = self.ring.available.get(self.wrap(self.next_available)) {
            entry.store(head, Ordering::Relaxed);
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(())
    }

    /// Shows the device everything added so far; `true` if it asks to be notified of that.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        // Release: descriptors and ring entries are visible before the index that announces them.
        self.ring.available_index.store(new, Ordering::Release);
        self.published = new;
        // The index must be visible before the device's wish is read, or both sides may go to
        // sleep.
        fence(Ordering::SeqCst);
        if self.event_index {
            needs_event(self.available_event(), new, old)
        } else {
            self.ring.device.flags.load(Ordering::Relaxed) & FLAG_QUIET == 0
        }
    }

    /// Completions that wait to be taken. Reads the shared index only when the known ones are
    /// consumed.
    pub fn pending(&mut self) -> u16 {
        if self.seen_used == self.next_used {
            // Acquire: what the device wrote before it moved the index is visible afterwards.
            self.seen_used = self.ring.device.index.load(Ordering::Acquire);
        }
        let pending = self.seen_used.wrapping_sub(self.next_used);
        if pending <= self.in_flight {
            return pending;
        }
        // More completions than chains: none of them can be believed.
        self.errors += 1;
        self.seen_used = self.next_used;
        0
    }

    /// Like [`pending`](Self::pending), from the device's index as it is now.
    pub fn refresh(&mut self) -> u16 {
        self.seen_used = self.next_used;
        self.pending()
    }

    /// The first token of the `n`th waiting completion and the bytes written; `None` where there is
    /// none or it makes no sense.
    pub fn peek(&self, n: u16) -> Option<(&T, u32)> {
        if n >= self.seen_used.wrapping_sub(self.next_used) {
            return None;
        }
        let (id, length) = self.used_at(self.next_used.wrapping_add(n))?;
        let slot = self.slots.get(usize::from(id)).filter(|s| s.chain > 0)?;
        Some((slot.token.as_ref()?, length.min(slot.writable)))
    }

    /// Takes the next completion that makes sense: hands out the tokens of its chain in order and
    /// returns the bytes written.
    pub fn pop(&mut self, mut token: impl FnMut(T)) -> Option<u32> {
        while self.pending() > 0 {
            let used = self.used_at(self.next_used);
            self.next_used = self.next_used.wrapping_add(1);
            let Some((head, length)) = used else {
                self.errors += 1;
                continue;
            };
            let Some(slot) = self
                .slots
                .get_mut(usize::from(head))
                .filter(|s| s.chain > 0)
            else {
                self.errors += 1;
                continue;
            };
            let (count, writable) = (slot.chain, slot.writable);
            slot.chain = 0;
            let mut last = head;
            for i in 0..count {
                let Some(slot) = self.slots.get_mut(usize::from(last)) else {
                    break;
                };
                if let Some(owner) = slot.token.take() {
                    token(owner);
                }
                if i + 1 < count {
                    last = slot.next;
                }
            }
            if let Some(slot) = self.slots.get_mut(usize::from(last)) {
                slot.next = self.first_free;
            }
            self.first_free = head;
            self.free += count;
            self.in_flight -= 1;
            if length > writable {
                self.errors += 1;
            }
            return Some(length.min(writable));
        }
        None
    }

    /// Asks for a notification of the next completion after those that wait already; `true` if any
    /// wait.
    pub fn arm(&mut self) -> bool {
        if !self.event_index {
            self.ring.available_flags.store(0, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            return self.refresh() > 0;
        }
        let mut seen = self.ring.device.index.load(Ordering::Relaxed);
        // A device that completes in between makes this go round; one that never stops is polled,
        // not slept over.
        for _ in 0..ARM_ATTEMPTS {
            self.set_used_event(seen);
            // The wish must be visible before the index is read for the last time.
            fence(Ordering::SeqCst);
            let now = self.ring.device.index.load(Ordering::Relaxed);
            if now == seen {
                break;
            }
            seen = now;
        }
        self.refresh() > 0
    }

    /// Asks for none. With event indexes one may still come after 65535 completions.
    pub fn disarm(&self) {
        if self.event_index {
            self.set_used_event(self.next_used.wrapping_sub(1));
        } else {
            self.ring
                .available_flags
                .store(FLAG_QUIET, Ordering::Relaxed);
        }
    }

    fn wrap(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    fn used_at(&self, index: u16) -> Option<(u16, u32)> {
        let used = self.ring.device.used.get(self.wrap(index))?;
        let id = u16::try_from(used.id.load(Ordering::Relaxed))
            .ok()
            .filter(|id| *id < self.size)?;
        Some((id, used.length.load(Ordering::Relaxed)))
    }

    fn set_used_event(&self, index: u16) {
        if let Some(event) = self.ring.available.get(usize::from(self.size)) {
            event.store(index, Ordering::Relaxed);
        }
    }

    fn available_event(&self) -> u16 {
        let last = self.ring.device.used.get(usize::from(self.size));
        last.map_or(0, |event| {
            (event.id.load(Ordering::Relaxed) & 0xffff) as u16
        })
    }
}

/// Whether moving an index from `old` to `new` passes `event` (virtio 1.2, 2.7.10).
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "virtqueue_tests.rs"]
pub(crate) mod tests;
