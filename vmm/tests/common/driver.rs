//! The guest's half of a split ring, over the same memory the device sees.

use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use sluice_vmm::virtio::QueueLayout;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A buffer of a chain: address, length, whether the device writes it.
pub type Part = (u64, u32, bool);

#[derive(Debug)]
pub struct Ring {
    memory: GuestMemoryMmap,
    pub layout: QueueLayout,
    next_descriptor: u16,
    pub available: u16,
}

impl Ring {
    /// A ring of `size` at `base`; its parts need less than 64 KiB.
    pub fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Ring {
        let layout = QueueLayout {
            size,
            descriptors: base,
            driver: base + 0x6000,
            device: base + 0x8000,
        };
        Ring {
            memory: memory.clone(),
            layout,
            next_descriptor: 0,
            available: 0,
        }
    }

    fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn read<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Makes a chain available; returns its head.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        let size = self.layout.size;
        let head = self.next_descriptor % size;
        for (index, (address, length, device_writes)) in parts.iter().enumerate() {
            let descriptor = self.next_descriptor % size;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            let more = index + 1 < parts.len();
            let flags = (u16::from(more) * NEXT) | (u16::from(*device_writes) * WRITE);
            let at = self.layout.descriptors + 16 * u64::from(descriptor);
            self.write(at, *address);
            self.write(at + 8, *length);
            self.write(at + 12, flags);
            self.write(at + 14, self.next_descriptor % size);
        }
        self.offer(head);
        head
    }

    /// Puts any descriptor number into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = self.layout.driver + 4 + 2 * u64::from(self.available % self.layout.size);
        self.write(slot, head);
        fence(Ordering::SeqCst);
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Writes any available index.
    pub fn set_available(&self, index: u16) {
        self.write(self.layout.driver + 2, index);
    }

    pub fn used(&self) -> u16 {
        let index = self.read(self.layout.device + 2);
        fence(Ordering::SeqCst);
        index
    }

    /// Head and length of the used element number `index`.
    pub fn used_element(&self, index: u16) -> (u32, u32) {
        let at = self.layout.device + 4 + 8 * u64::from(index % self.layout.size);
        (self.read(at), self.read(at + 4))
    }

    /// Asks for a notification only after the used index has passed `index` (event index negotiated).
    pub fn call_me_after(&self, index: u16) {
        self.write(
            self.layout.driver + 4 + 2 * u64::from(self.layout.size),
            index,
        );
    }
}
