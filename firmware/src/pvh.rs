//! The boot protocol's structures, read as untrusted bytes: what memory there is, what was asked
//! for.
//!
//! Magic, version, counts and bounds are checked before an address is followed, and an address is
//! only ever an offset into the low memory that the page tables let ring 3 read.

use crate::layout::{LOW_END, PAGE};

const MAGIC: u32 = 0x336e_c578;
/// Version 1 is the first with a memory map.
const VERSION: u32 = 1;
const START_INFO_SIZE: usize = 56;
const ENTRY_SIZE: usize = 24;
const TYPE_RAM: u32 = 1;
/// More ranges than any machine of this contract has.
const MAX_ENTRIES: usize = 128;
pub const MAX_COMMAND_LINE: usize = 2048;

/// Why the machine's description is not believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    Magic(u32),
    Version(u32),
    /// Neither in low memory nor complete there.
    StartInfoAddress(u64),
    MemoryMapAddress(u64),
    MemoryMapCount(u32),
    CommandLineAddress(u64),
    CommandLineTooLong,
    CommandLineNotText,
}

/// Physical memory from the second page to the start of the image, as ring 3 sees it.
#[derive(Clone, Copy, Debug)]
pub struct LowMemory<'a>(&'a [u8]);

impl<'a> LowMemory<'a> {
    pub const START: u64 = PAGE;
    pub const SIZE: usize = (LOW_END - PAGE) as usize;

    /// `bytes[0]` is the byte at [`Self::START`].
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn from(&self, address: u64) -> Option<&'a [u8]> {
        let offset = usize::try_from(address.checked_sub(Self::START)?).ok()?;
        self.0.get(offset..)
    }

    fn at(&self, address: u64, length: usize) -> Option<&'a [u8]> {
        self.from(address)?.get(..length)
    }
}

/// A range of RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ram {
    pub start: u64,
    pub end: u64,
}

/// What the VMM handed over, bounds proven.
#[derive(Clone, Copy, Debug)]
pub struct StartInfo<'a> {
    command_line: &'a str,
    memory_map: &'a [u8],
}

impl<'a> StartInfo<'a> {
    /// Reads the structure at `address` and what it points to.
    ///
    /// # Errors
    /// The first thing that cannot be believed.
    pub fn read(low: LowMemory<'a>, address: u64) -> Result<Self, Refusal> {
        let info = low
            .at(address, START_INFO_SIZE)
            .ok_or(Refusal::StartInfoAddress(address))?;
        let magic = u32_at(info, 0);
        if magic != MAGIC {
            return Err(Refusal::Magic(magic));
        }
        let version = u32_at(info, 4);
        if version < VERSION {
            return Err(Refusal::Version(version));
        }
        Ok(Self {
            command_line: command_line(low, u64_at(info, 24))?,
            memory_map: memory_map(low, u64_at(info, 40), u32_at(info, 48))?,
        })
    }

    pub fn command_line(&self) -> &'a str {
        self.command_line
    }

    /// The RAM ranges in the VMM's order, empty and wrapping ones left out.
    pub fn ram(&self) -> impl Iterator<Item = Ram> + use<'a> {
        self.memory_map
            .chunks_exact(ENTRY_SIZE)
            .filter_map(|entry| {
                let start = u64_at(entry, 0);
                let end = start.checked_add(u64_at(entry, 8))?;
                (u32_at(entry, 16) == TYPE_RAM && end > start).then_some(Ram { start, end })
            })
    }

    /// How far RAM reaches from `address` without a hole; `None` if `address` is not RAM.
    /// Ranges may come in any order, touch and overlap.
    pub fn ram_end_from(&self, address: u64) -> Option<u64> {
        let mut end = address;
        for _ in 0..=MAX_ENTRIES {
            let reach = self
                .ram()
                .filter(|r| r.start <= end && r.end > end)
                .map(|r| r.end)
                .max();
            match reach {
                Some(further) => end = further,
                None => break,
            }
        }
        (end > address).then_some(end)
    }
}

fn command_line(low: LowMemory<'_>, address: u64) -> Result<&str, Refusal> {
    if address == 0 {
        return Ok("");
    }
    let rest = low
        .from(address)
        .ok_or(Refusal::CommandLineAddress(address))?;
    let window = rest.get(..MAX_COMMAND_LINE + 1).unwrap_or(rest);
    let length = window
        .iter()
        .position(|b| *b == 0)
        .ok_or(Refusal::CommandLineTooLong)?;
    let bytes = window.get(..length).unwrap_or_default();
    core::str::from_utf8(bytes).map_err(|_| Refusal::CommandLineNotText)
}

fn memory_map(low: LowMemory<'_>, address: u64, count: u32) -> Result<&[u8], Refusal> {
    let entries = count as usize;
    if entries == 0 || entries > MAX_ENTRIES {
        return Err(Refusal::MemoryMapCount(count));
    }
    low.at(address, entries * ENTRY_SIZE)
        .ok_or(Refusal::MemoryMapAddress(address))
}

/// Zero where the bytes are not there; callers pass slices whose size they have checked.
fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes
        .get(offset..offset + 4)
        .and_then(|b| b.try_into().ok());
    u32::from_le_bytes(field.unwrap_or_default())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    const INFO: u64 = 0x6000;
    const MAP: u64 = 0x7000;
    const LINE: u64 = 0x2_0000;

    struct Machine(Vec<u8>);

    impl Machine {
        fn new(ram: &[(u64, u64, u32)], line: &[u8]) -> Self {
            let mut machine = Self(vec![0; LowMemory::SIZE]);
            machine.put(INFO, &MAGIC.to_le_bytes());
            machine.put(INFO + 4, &1u32.to_le_bytes());
            machine.put(INFO + 24, &LINE.to_le_bytes());
            machine.put(INFO + 40, &MAP.to_le_bytes());
            machine.put(INFO + 48, &(ram.len() as u32).to_le_bytes());
            for (i, (start, size, kind)) in ram.iter().enumerate() {
                let at = MAP + (i * ENTRY_SIZE) as u64;
                machine.put(at, &start.to_le_bytes());
                machine.put(at + 8, &size.to_le_bytes());
                machine.put(at + 16, &kind.to_le_bytes());
            }
            machine.put(LINE, line);
            machine
        }

        fn put(&mut self, address: u64, bytes: &[u8]) {
            let at = (address - LowMemory::START) as usize;
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn read(&self) -> Result<StartInfo<'_>, Refusal> {
            StartInfo::read(LowMemory::new(&self.0), INFO)
        }
    }

    fn usual() -> Machine {
        Machine::new(
            &[(0, 0x9_fc00, 1), (0x10_0000, 0x3f0_0000, 1)],
            b"sluice.selftest\0",
        )
    }

    #[test]
    fn an_ordinary_machine_is_understood() {
        let machine = usual();
        let info = machine.read().unwrap();
        assert_eq!(info.command_line(), "sluice.selftest");
        assert_eq!(info.ram_end_from(0x20_0000), Some(0x400_0000));
        assert_eq!(info.ram_end_from(0x500_0000), None);
    }

    #[test]
    fn ranges_join_in_any_order_and_only_ram_counts() {
        let machine = Machine::new(
            &[
                (0x80_0000, 0x10_0000, 1),
                (0, 0x80_0000, 1),
                (0x90_0000, 0x1000, 2),
            ],
            b"\0",
        );
        assert_eq!(
            machine.read().unwrap().ram_end_from(0x20_0000),
            Some(0x90_0000)
        );
    }

    #[test]
    fn a_range_that_wraps_is_left_out() {
        let machine = Machine::new(&[(u64::MAX - 10, 100, 1), (0x20_0000, 0, 1)], b"\0");
        assert_eq!(machine.read().unwrap().ram().count(), 0);
    }

    #[test]
    fn every_lie_is_refused_by_name() {
        let refusal = |edit: &dyn Fn(&mut Machine)| {
            let mut machine = usual();
            edit(&mut machine);
            machine.read().err()
        };
        let put = |at: u64, v: u64| refusal(&|m| m.put(INFO + at, &v.to_le_bytes()));
        assert_eq!(refusal(&|m| m.put(INFO, &[0; 4])), Some(Refusal::Magic(0)));
        assert_eq!(
            refusal(&|m| m.put(INFO + 4, &[0; 4])),
            Some(Refusal::Version(0))
        );
        assert_eq!(put(24, 0xfff), Some(Refusal::CommandLineAddress(0xfff)));
        assert_eq!(
            put(24, u64::MAX),
            Some(Refusal::CommandLineAddress(u64::MAX))
        );
        assert_eq!(put(40, 0), Some(Refusal::MemoryMapAddress(0)));
        assert_eq!(
            put(40, LOW_END - 24),
            Some(Refusal::MemoryMapAddress(LOW_END - 24))
        );
        assert_eq!(put(48, 0), Some(Refusal::MemoryMapCount(0)));
        assert_eq!(
            put(48, 0xffff_ffff),
            Some(Refusal::MemoryMapCount(u32::MAX))
        );
        let long = |m: &mut Machine| m.put(LINE, &[b'a'; MAX_COMMAND_LINE + 1]);
        assert_eq!(refusal(&long), Some(Refusal::CommandLineTooLong));
        let noise = |m: &mut Machine| m.put(LINE, &[0xff, 0]);
        assert_eq!(refusal(&noise), Some(Refusal::CommandLineNotText));
    }

    #[test]
    fn a_start_info_outside_low_memory_is_refused() {
        let machine = usual();
        for address in [0, 0xfff, LOW_END - 8, LOW_END, u64::MAX] {
            let read = StartInfo::read(LowMemory::new(&machine.0), address);
            assert_eq!(read.err(), Some(Refusal::StartInfoAddress(address)));
        }
    }

    proptest! {
        #[test]
        fn noise_never_panics(
            noise in proptest::collection::vec(any::<u8>(), 0..400),
            address in 0x1000u64..0x1200,
            honest in any::<bool>(),
        ) {
            let mut bytes = noise;
            if honest && bytes.len() > 8 {
                bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[4..8].copy_from_slice(&1u32.to_le_bytes());
            }
            if let Ok(info) = StartInfo::read(LowMemory::new(&bytes), address) {
                prop_assert!(info.ram().all(|r| r.start < r.end));
                let _ = info.ram_end_from(0x20_0000);
            }
        }
    }
}
