//! A guest for tests: the driver's side of both rings, in a memory file that the backend maps.
//!
//! It reads and writes the file, so it needs no unsafe code, and it can write any nonsense anywhere: that is its purpose.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use super::engine::{Engine, RECEIVE, TRANSMIT, TrunkCounters};
use super::links::LinkCounters;
use super::memory::{GuestMemory, RegionSpec};
use super::ring::{DESC_NEXT, DESC_WRITE, Descriptor, Ring, RingSpec};

/// Where guest memory begins: not at zero, so that a zero address is a wrong one.
pub const BASE: u64 = 0x10_0000;
/// Where the VMM has it mapped: anywhere else.
pub const USER: u64 = 0x7f00_0000_0000;
/// Guest memory: two ring areas of 64 KiB, then buffers.
pub const LEN: u64 = 4 << 20;
pub(super) const RING_AREA: u64 = 0x1_0000;
/// First byte free for buffers.
pub const BUFFERS: u64 = BASE + 2 * RING_AREA;

/// The guest's side of the trunk.
#[derive(Debug)]
pub struct FakeGuest {
    file: File,
    size: u16,
    event_idx: bool,
    memory: Arc<GuestMemory>,
    available: [u16; 2],
    seen: [u16; 2],
}

impl FakeGuest {
    /// Memory with two empty rings of `size` entries.
    ///
    /// # Errors
    /// When the kernel gives no memory file.
    pub fn new(size: u16, event_idx: bool) -> io::Result<Self> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("fake-guest", flags)?);
        file.set_len(LEN)?;
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK)?;
        let spec = RegionSpec {
            guest: BASE,
            len: LEN,
            user: USER,
            offset: 0,
        };
        let memory =
            GuestMemory::map(&[spec], vec![file.try_clone()?]).map_err(io::Error::other)?;
        let memory = Arc::new(memory);
        Ok(Self {
            file,
            size,
            event_idx,
            memory,
            available: [0; 2],
            seen: [0; 2],
        })
    }

    /// The memory as the backend sees it.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The file behind the memory.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Guest-physical addresses of descriptor table, available ring and used ring.
    pub fn areas(&self, queue: usize) -> [u64; 3] {
        let table = BASE + RING_AREA * queue as u64;
        let available = table + 16 * u64::from(self.size);
        let used = (available + 6 + 2 * u64::from(self.size)).next_multiple_of(4);
        [table, available, used]
    }

    /// A ring as the backend is told of it.
    pub fn spec(&self, queue: usize) -> RingSpec {
        let [descriptors, available, used] = self.areas(queue).map(|a| a - BASE + USER);
        RingSpec {
            size: self.size,
            descriptors,
            available,
            used,
            event_idx: self.event_idx,
        }
    }

    /// The backend's side of a ring.
    ///
    /// # Errors
    /// Never with this memory, but the ring says it.
    pub fn ring(&self, queue: usize) -> io::Result<Ring> {
        Ring::new(self.memory.clone(), &self.spec(queue)).map_err(io::Error::other)
    }

    /// Writes bytes at a guest-physical address; what falls outside memory is lost.
    pub fn write(&self, guest: u64, bytes: &[u8]) {
        let offset = guest.wrapping_sub(BASE);
        if offset.saturating_add(bytes.len() as u64) <= LEN {
            self.file
                .write_all_at(bytes, offset)
                .expect("memory files take all bytes");
        }
    }

    /// Reads bytes at a guest-physical address.
    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, guest - BASE)
            .expect("inside guest memory");
        bytes
    }

    fn word(&self, guest: u64) -> u16 {
        let bytes = self.read(guest, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Writes a descriptor.
    pub fn describe(&self, queue: usize, index: u16, d: Descriptor) {
        let at = self.areas(queue)[0] + 16 * u64::from(index);
        self.write(at, &encode(d));
    }

    /// Makes a chain available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let available = self.areas(queue)[1];
        let slot = self.available[queue] % self.size;
        self.write(available + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.write(available + 2, &self.available[queue].to_le_bytes());
    }

    /// Claims any available index.
    pub fn claim(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        self.write(self.areas(queue)[1] + 2, &index.to_le_bytes());
    }

    /// Offers receive buffers `first..first + count` of `len` bytes each, one descriptor per buffer.
    pub fn offer_buffers(&mut self, first: u16, count: u16, len: u32) {
        for index in first..first + count {
            let d = Descriptor {
                addr: buffer(index, len),
                len,
                flags: DESC_WRITE,
                next: 0,
            };
            self.describe(RECEIVE, index, d);
            self.offer(RECEIVE, index);
        }
    }

    /// Sends a trunk frame (header, tag and all), cut into descriptors of at most `cut` bytes from `first` on.
    pub fn send(&mut self, first: u16, frame: &[u8], cut: usize) {
        let at = BASE + LEN / 2 + u64::from(first) * 0x400;
        self.write(at, frame);
        let pieces = frame.len().div_ceil(cut);
        for (i, piece) in frame.chunks(cut).enumerate() {
            let index = first + i as u16;
            let more = i + 1 < pieces;
            let d = Descriptor {
                addr: at + (i * cut) as u64,
                len: piece.len() as u32,
                flags: if more { DESC_NEXT } else { 0 },
                next: index + 1,
            };
            self.describe(TRANSMIT, index, d);
        }
        self.offer(TRANSMIT, first);
    }

    /// The used index the device has published.
    pub fn used_index(&self, queue: usize) -> u16 {
        self.word(self.areas(queue)[2] + 2)
    }

    /// Used entries (head, length) that came since the last look.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let used = self.areas(queue)[2];
        let mut entries = Vec::new();
        while self.seen[queue] != self.used_index(queue) {
            let slot = u64::from(self.seen[queue] % self.size);
            let raw = self.read(used + 4 + 8 * slot, 8);
            let half = |i: usize| u32::from_le_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
            entries.push((half(0), half(4)));
            self.seen[queue] = self.seen[queue].wrapping_add(1);
        }
        entries
    }

    /// Asks to be called when used entry `event` is written.
    pub fn ask_for_call(&self, queue: usize, event: u16) {
        let [_, available, _] = self.areas(queue);
        self.write(
            available + 4 + 2 * u64::from(self.size),
            &event.to_le_bytes(),
        );
    }

    /// The available index at which the device wants a kick.
    pub fn kick_wanted_at(&self, queue: usize) -> u16 {
        self.word(self.areas(queue)[2] + 4 + 8 * u64::from(self.size))
    }
}

/// Where receive buffer `index` is.
pub fn buffer(index: u16, len: u32) -> u64 {
    BUFFERS + u64::from(index) * u64::from(len)
}

/// The bytes of a descriptor.
pub fn encode(d: Descriptor) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&d.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&d.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&d.flags.to_le_bytes());
    bytes[14..].copy_from_slice(&d.next.to_le_bytes());
    bytes
}

/// An engine with the guest's two rings started.
///
/// # Errors
/// When the kernel gives no epoll instance.
pub fn engine_for(guest: &FakeGuest) -> io::Result<(Engine, Arc<TrunkCounters>)> {
    let counters = Arc::new(TrunkCounters::default());
    let mut engine = Engine::new(counters.clone())?;
    engine.start_ring(RECEIVE, guest.ring(RECEIVE)?, None);
    engine.start_ring(TRANSMIT, guest.ring(TRANSMIT)?, None);
    Ok((engine, counters))
}

/// A stand-in for a tap: a datagram socket whose other end is the pod.
///
/// # Errors
/// When the kernel gives no sockets.
pub fn socket_link(engine: &mut Engine, id: u16) -> io::Result<(UnixDatagram, Arc<LinkCounters>)> {
    let (pod, tap) = UnixDatagram::pair()?;
    pod.set_nonblocking(true)?;
    tap.set_nonblocking(true)?;
    let counters = Arc::new(LinkCounters::default());
    engine.add_link(id, OwnedFd::from(tap), counters.clone())?;
    Ok((pod, counters))
}
