//! The device side of a split virtqueue over shared guest memory (virtio 1.2 §2.7).
//!
//! The ring's three areas are translated once, when the VMM configures it; afterwards every access is one volatile or
//! atomic load or store. What the guest wrote is a claim: an available index that runs away stops the ring, a
//! descriptor number is bounded, and everything else is judged by `chain.rs`.
//!
//! One of the crate's two unsafe files of the data path (with `memory.rs`).
#![expect(unsafe_code, reason = "rings live in memory shared with the guest")]

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use thiserror::Error;

use super::memory::GuestMemory;

/// Largest ring served: QEMU's largest, and what bounds the chains of one phase. (Virtio 1.2 §2.7 allows 32768.)
const MAX_SIZE: u16 = 1024;

/// The descriptor is followed by another.
pub const DESC_NEXT: u16 = 1;
/// The device writes to the buffer.
pub const DESC_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// `DESC_*`.
    pub flags: u16,
    /// Next descriptor, when `DESC_NEXT` is set.
    pub next: u16,
}

impl Descriptor {
    /// Size of a descriptor in memory.
    pub const SIZE: u32 = 16;

    /// Reads a descriptor from its bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Self {
            addr: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}

/// Where a ring is and how it is spoken to.
#[derive(Clone, Copy, Debug)]
pub struct RingSpec {
    /// Number of descriptors: a power of two.
    pub size: u16,
    /// Descriptor table, available ring and used ring, in the VMM's address space.
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
}

/// Why a ring cannot be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RingError {
    #[error("Ring size {0} is not a power of two up to {MAX_SIZE}")]
    Size(u16),
    #[error("The {area} at {at:#x} is not inside guest memory or not aligned")]
    Area { area: &'static str, at: u64 },
    #[error("The available index {available} is more than the ring size ahead of {next}")]
    RunAway { available: u16, next: u16 },
}

/// A ring in use.
///
/// Invariants: the pointers are inside `memory`, aligned, and their areas hold `size` entries plus the event fields.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    size: u16,
    event_idx: bool,
    descriptors: *const Descriptor,
    available: *mut u16,
    used: *mut u16,
    /// Next entry of the available ring to take.
    next: u16,
    /// Entries of the used ring written, whether published or not.
    written: u16,
    /// The used index last published.
    published: u16,
}

// SAFETY: the pointers are into `memory`, which is Send and kept alive by the Arc; nothing else holds them.
unsafe impl Send for Ring {}

impl Ring {
    /// Translates and checks a ring.
    ///
    /// # Errors
    /// When an area is outside guest memory or misaligned, or the size is not allowed.
    pub fn new(memory: Arc<GuestMemory>, spec: &RingSpec) -> Result<Self, RingError> {
        let size = spec.size;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(RingError::Size(size));
        }
        let n = u64::from(size);
        let area = |area, at: u64, len, align: usize| {
            memory
                .at_user(at, len)
                .filter(|p| p.addr().is_multiple_of(align))
                .ok_or(RingError::Area { area, at })
        };
        // Two or six bytes beyond the entries: flags, index and, with EVENT_IDX, the event field.
        let descriptors = area("descriptor table", spec.descriptors, 16 * n, 16)?;
        let available = area("available ring", spec.available, 6 + 2 * n, 2)?.cast::<u16>();
        let used = area("used ring", spec.used, 6 + 8 * n, 4)?.cast::<u16>();
        let mut ring = Self {
            memory,
            size,
            event_idx: spec.event_idx,
            descriptors: descriptors.cast_const().cast(),
            available,
            used,
            next: 0,
            written: 0,
            published: 0,
        };
        // The ring resumes at the used index in guest memory: it is what the guest has seen, and after a crash of
        // the backend it alone is right (docs/machine.md, "Sockets"). Chains are used in order, so it is also the next
        // one to take.
        let seen = ring.used_word(1).load(Ordering::Acquire);
        ring.next = seen;
        ring.written = seen;
        ring.published = seen;
        Ok(ring)
    }

    /// The memory the ring lives in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where another backend has to continue.
    pub fn base(&self) -> u16 {
        self.published
    }

    /// A 16-bit word of the available ring. `word` is 0 (flags), 1 (index), 2.. (entries) or `2 + size` (used_event).
    fn available_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + usize::from(self.size));
        // SAFETY: the area holds `3 + size` aligned words (invariant); the guest shares them, hence atomic.
        unsafe { AtomicU16::from_ptr(self.available.add(word)) }
    }

    /// A 16-bit word of the used ring. `word` is 0 (flags), 1 (index) or `2 + 4 * size` (avail_event).
    fn used_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + 4 * usize::from(self.size));
        // SAFETY: the area holds `3 + 4 * size` aligned words (invariant); the guest shares them, hence atomic.
        unsafe { AtomicU16::from_ptr(self.used.add(word)) }
    }

    /// Number of chains the guest has made available and the device has not taken.
    ///
    /// # Errors
    /// [`RingError::RunAway`] when the guest claims more than fit.
    pub fn pending(&self) -> Result<u16, RingError> {
        let available = self.available_word(1).load(Ordering::Acquire);
        let pending = available.wrapping_sub(self.next);
        if pending > self.size {
            return Err(RingError::RunAway {
                available,
                next: self.next,
            });
        }
        Ok(pending)
    }

    /// Takes the next available chain: its head. Only after [`pending`](Self::pending) said there is one.
    pub fn take(&mut self) -> u16 {
        let slot = usize::from(self.next & (self.size - 1));
        self.next = self.next.wrapping_add(1);
        self.available_word(2 + slot).load(Ordering::Relaxed)
    }

    /// Reads a descriptor of the ring's own table, if there is one of that number.
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: `index < size`, and the table holds `size` aligned descriptors (invariant). The guest may change
        // it at any time, hence one volatile read into a local.
        let raw = unsafe { ptr::read_volatile(self.descriptors.add(usize::from(index))) };
        Some(Descriptor {
            addr: u64::from_le(raw.addr),
            len: u32::from_le(raw.len),
            flags: u16::from_le(raw.flags),
            next: u16::from_le(raw.next),
        })
    }

    /// Writes a used entry. The guest sees it after [`publish`](Self::publish).
    pub fn put_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.written & (self.size - 1));
        self.written = self.written.wrapping_add(1);
        let entry = [u32::from(head).to_le(), len.to_le()];
        // SAFETY: `slot < size`; entries begin 4 bytes into the area, which is 4-aligned (invariant).
        unsafe { ptr::write_volatile(self.used.add(2 + 4 * slot).cast::<[u32; 2]>(), entry) };
    }

    /// Used entries written and not yet published.
    pub fn unpublished(&self) -> u16 {
        self.written.wrapping_sub(self.published)
    }

    /// Shows the guest all used entries written so far; true when it asked to be called.
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        let new = self.written;
        if new == old {
            return false;
        }
        // Release: the entries before the index.
        self.used_word(1).store(new, Ordering::Release);
        self.published = new;
        // The index must be visible before the guest's wish is read; it does the reverse before it sleeps.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.available_word(0).load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0;
        }
        let event = self
            .available_word(2 + usize::from(self.size))
            .load(Ordering::Relaxed);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Asks the guest for a kick when it makes the next chain available; true when there is one already.
    ///
    /// # Errors
    /// As [`pending`](Self::pending).
    pub fn ask_for_kick(&mut self) -> Result<bool, RingError> {
        self.used_word(0).store(0, Ordering::Relaxed);
        if self.event_idx {
            self.avail_event().store(self.next, Ordering::Relaxed);
        }
        // The wish before the second look: see `publish`.
        fence(Ordering::SeqCst);
        Ok(self.pending()? != 0)
    }

    /// Tells the guest that kicks are not needed. With EVENT_IDX the event stays behind the index: one needless kick
    /// in 65536 chains.
    pub fn refuse_kicks(&mut self) {
        self.used_word(0).store(USED_NO_NOTIFY, Ordering::Relaxed);
        if self.event_idx {
            self.avail_event()
                .store(self.next.wrapping_sub(1), Ordering::Relaxed);
        }
    }

    fn avail_event(&self) -> &AtomicU16 {
        self.used_word(2 + 4 * usize::from(self.size))
    }
}
