//! Between a ring's chains and a byte stream: one chain one way, one read the other way, and nothing in between.
//!
//! Chains come from the guest: loops, bad addresses and absurd lengths are the queue crate's to detect and ours to return
//! unused. What this process holds per direction is bounded by [`CHAIN_MAX`] and [`READ_MAX`].

use std::io;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Write;

use virtio_queue::DescriptorChain;
use virtio_queue::Queue;
use virtio_queue::QueueOwnedT;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::event;

/// Larger than any control frame; what one chain may make this process hold.
pub const CHAIN_MAX: usize = 256 << 10;
/// One read of the stream.
pub const READ_MAX: usize = 16 << 10;

/// Bytes of one guest chain on their way to the socket.
#[derive(Debug, Default)]
pub struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
}

/// Bytes of one socket read on their way to the guest.
#[derive(Debug, Default)]
pub struct Incoming {
    bytes: Vec<u8>,
    taken: usize,
}

/// The socket is no longer usable.
#[derive(Debug)]
pub struct Broken(pub io::Error);

impl Outgoing {
    /// Writes what is left. Returns whether all is gone.
    pub fn write_to(&mut self, sink: &mut impl Write) -> Result<bool, Broken> {
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match sink.write(rest) {
                Ok(0) => return Err(Broken(ErrorKind::WriteZero.into())),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken(error)),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(true)
    }

    /// The next stream gets the current chain from its first byte.
    pub fn start_over(&mut self) {
        self.sent = 0;
    }

    /// Copies the readable part of a chain. Returns false, with nothing taken, if the chain is bad or too large.
    pub fn take(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        memory: &GuestMemoryMmap,
    ) -> bool {
        let Ok(mut reader) = chain.reader(memory) else {
            return false;
        };
        if reader.available_bytes() > CHAIN_MAX {
            return false;
        }
        if reader.read_to_end(&mut self.bytes).is_err() {
            self.bytes.clear();
            return false;
        }
        true
    }
}

impl Incoming {
    pub fn is_empty(&self) -> bool {
        self.taken >= self.bytes.len()
    }

    /// Reads once. Returns whether there is something now; the end of the stream is an error.
    pub fn read_from(&mut self, source: &mut impl Read) -> Result<bool, Broken> {
        self.taken = 0;
        self.bytes.resize(READ_MAX, 0);
        let result = loop {
            match source.read(&mut self.bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.bytes.truncate(*result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => Err(Broken(ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(Broken(error)),
        }
    }

    /// Copies into the writable part of a chain as much as fits; returns how much. Zero: the chain is bad.
    pub fn fill(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        memory: &GuestMemoryMmap,
    ) -> u32 {
        let Ok(mut writer) = chain.writer(memory) else {
            return 0;
        };
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let written = writer.write(rest).unwrap_or(0);
        self.taken += written;
        u32::try_from(written).unwrap_or(0)
    }
}

/// The next chain; notifications are on when there is none.
pub fn next_chain<'a>(
    queue: &mut Queue,
    memory: &'a GuestMemoryMmap,
) -> Option<DescriptorChain<&'a GuestMemoryMmap>> {
    // Twice, because the driver may add a chain between the look and the switching on of notifications. Not more often: a
    // driver that writes nonsense into its ring's index would keep this thread here.
    for _ in 0..2 {
        if let Some(chain) = queue.iter(memory).ok().and_then(|mut chains| chains.next()) {
            return Some(chain);
        }
        if !queue.enable_notification(memory).unwrap_or(false) {
            return None;
        }
    }
    None
}

pub fn give_back(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    head: u16,
    length: u32,
    call: &EventFd,
) {
    if queue.add_used(memory, head, length).is_ok()
        && queue.needs_notification(memory).unwrap_or(true)
    {
        event::signal(call);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::Bytes;
    use vm_memory::GuestAddress;

    use super::*;

    const RAM: usize = 1 << 20;
    const BUFFER: u64 = 0x1_0000;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()
    }

    /// A ring with these descriptors, each chain head of them available.
    fn ring<'a>(
        memory: &'a GuestMemoryMmap,
        descriptors: &[(u64, u32, u16)],
    ) -> (MockSplitQueue<'a, GuestMemoryMmap>, Queue) {
        let mock = MockSplitQueue::create(memory, GuestAddress(0x100), 16);
        let raw: Vec<RawDescriptor> = descriptors
            .iter()
            .zip(1..)
            .map(|((address, length, flags), next)| {
                RawDescriptor::from(Descriptor::new(*address, *length, *flags, next))
            })
            .collect();
        mock.add_desc_chains(&raw, 0).unwrap();
        let queue = mock.create_queue().unwrap();
        (mock, queue)
    }

    #[test]
    fn a_chain_of_parts_becomes_one_run_of_bytes() {
        let memory = memory();
        memory.write_slice(b"onetwo", GuestAddress(BUFFER)).unwrap();
        let parts = [(BUFFER, 3, NEXT), (BUFFER + 3, 3, 0)];
        let (mock, mut queue) = ring(&memory, &parts);
        let chain = next_chain(&mut queue, &memory).unwrap();
        let head = chain.head_index();
        let mut outgoing = Outgoing::default();
        assert!(outgoing.take(chain, &memory));
        let call = event::eventfd().unwrap();
        give_back(&mut queue, &memory, head, 0, &call);
        assert!(event::drain(&call));
        assert_eq!(u16::from_le(mock.used().idx().load()), 1);
        assert!(next_chain(&mut queue, &memory).is_none());
        let mut sink = Vec::new();
        assert!(outgoing.write_to(&mut sink).unwrap());
        assert_eq!(sink, b"onetwo");
    }

    #[test]
    fn bytes_are_spread_over_the_writable_parts_and_the_rest_is_kept() {
        let memory = memory();
        let parts = [(BUFFER, 2, NEXT | WRITE), (BUFFER + 0x100, 3, WRITE)];
        let (_mock, mut queue) = ring(&memory, &parts);
        let mut incoming = Incoming::default();
        assert!(incoming.read_from(&mut &b"abcdefg"[..]).unwrap());
        let chain = next_chain(&mut queue, &memory).unwrap();
        assert_eq!(incoming.fill(chain, &memory), 5);
        assert!(!incoming.is_empty());
        let mut second = [0; 3];
        memory
            .read_slice(&mut second, GuestAddress(BUFFER + 0x100))
            .unwrap();
        assert_eq!(&second, b"cde");
    }

    #[test]
    fn the_end_of_a_stream_and_a_full_one_are_told_apart() {
        let mut incoming = Incoming::default();
        assert!(incoming.read_from(&mut io::empty()).is_err());
        let mut outgoing = Outgoing {
            bytes: vec![1; 10],
            sent: 0,
        };
        let mut full: &mut [u8] = &mut [0; 4];
        assert!(
            outgoing.write_to(&mut full).is_err(),
            "a sink that takes nothing is broken"
        );
        outgoing.start_over();
        let mut sink = Vec::new();
        assert!(outgoing.write_to(&mut sink).unwrap());
        assert_eq!(sink, [1; 10]);
    }

    proptest! {
        #[test]
        fn any_descriptor_table_is_walked_without_panic_and_within_bounds(
            table in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), 0_u16..20), 1..16),
            near in any::<bool>(),
            heads in prop::collection::vec(any::<u16>(), 0..20),
        ) {
            let memory = memory();
            let mock = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
            for (index, (address, length, flags, next)) in (0..).zip(&table) {
                // Half of the time near the valid range, where walking gets furthest.
                let (address, length) = if near {
                    (address % (2 * RAM as u64), length % 0x1000)
                } else {
                    (*address, *length)
                };
                let descriptor = Descriptor::new(address, length, *flags, *next);
                mock.desc_table().store(index, RawDescriptor::from(descriptor)).unwrap();
            }
            let available = mock.avail_addr().0;
            for (index, head) in (0_u64..).zip(&heads) {
                let slot = GuestAddress(available + 4 + 2 * (index % 16));
                memory.write_obj(head % 32, slot).unwrap();
            }
            memory.write_obj(heads.len() as u16, GuestAddress(available + 2)).unwrap();
            let mut queue: Queue = mock.create_queue().unwrap();
            let call = event::eventfd().unwrap();
            let (mut outgoing, mut incoming) = (Outgoing::default(), Incoming::default());
            prop_assert!(incoming.read_from(&mut &[7; 100][..]).unwrap());
            let mut chains = 0;
            while let Some(chain) = next_chain(&mut queue, &memory) {
                chains += 1;
                prop_assert!(chains <= heads.len());
                let head = chain.head_index();
                let length = incoming.fill(chain.clone(), &memory);
                prop_assert!(length <= 100);
                let taken = outgoing.take(chain, &memory);
                prop_assert!(outgoing.bytes.len() <= CHAIN_MAX);
                prop_assert!(taken || outgoing.bytes.is_empty());
                prop_assert!(outgoing.write_to(&mut io::sink()).unwrap());
                give_back(&mut queue, &memory, head, length, &call);
            }
        }
    }
}
