//! The appliance's memory: one sealed file, mapped where the appliance works in it and once more where the engine reads rings.
#![expect(
    unsafe_code,
    reason = "a mapping becomes the memory that the appliance carves up"
)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use sluice_guest::memory::Memory;
use sluice_trunk::memory::{GuestMemory, MemoryError, RegionSpec};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionError,
};

/// There is no memory for the appliance.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoMemory {
    #[error("a memory file of {bytes} bytes cannot be made")]
    File { bytes: u64, source: io::Error },
    #[error("{bytes} bytes of memory cannot be mapped")]
    Map { bytes: u64, source: MmapRegionError },
    #[error("the memory cannot be mapped for the engine")]
    Engine(#[from] MemoryError),
    #[error("{bytes} bytes of memory do not fit into the address space")]
    Layout { bytes: u64 },
}

/// The memory of an appliance that lives as long as this process.
#[derive(Debug)]
pub(crate) struct Room {
    /// For the appliance itself, once.
    pub memory: Memory,
    /// For the engine: addresses are those that the appliance uses.
    pub engine: Arc<GuestMemory>,
    /// For the console's device, likewise.
    pub devices: GuestMemoryMmap,
}

impl Room {
    /// Takes `bytes` of zeroed memory.
    ///
    /// # Errors
    /// The host has no memory, descriptors or address space for it.
    pub(crate) fn take(bytes: u64) -> Result<Self, NoMemory> {
        let layout = || NoMemory::Layout { bytes };
        let file = file(bytes).map_err(|error| NoMemory::File {
            bytes,
            source: error.into(),
        })?;
        let size = usize::try_from(bytes).map_err(|_| layout())?;
        let map = |file: &File| {
            let file = file
                .try_clone()
                .map_err(|source| NoMemory::File { bytes, source })?;
            MmapRegion::from_file(FileOffset::new(file, 0), size)
                .map_err(|source| NoMemory::Map { bytes, source })
        };
        // The appliance has it for good: there is no moment at which it could be given back.
        let own: &'static MmapRegion = Box::leak(Box::new(map(&file)?));
        let start = own.as_ptr().expose_provenance();
        // SAFETY: the whole mapping is writable, zeroed (a new file), never unmapped (leaked above) and given to no other owner. The
        // engine and the console's device reach the same pages by mappings of their own, and only where the rings allow it.
        let memory = unsafe { Memory::new(start, start + size) };
        let spec = RegionSpec {
            guest: start as u64,
            len: bytes,
            user: start as u64,
            offset: 0,
        };
        let copy = file.try_clone();
        let copy = copy.map_err(|source| NoMemory::File { bytes, source })?;
        let engine = Arc::new(GuestMemory::map(&[spec], vec![copy])?);
        let region = GuestRegionMmap::new(map(&file)?, GuestAddress(start as u64));
        let devices = GuestMemoryMmap::from_regions(vec![region.ok_or_else(layout)?]);
        Ok(Self {
            memory,
            engine,
            devices: devices.map_err(|_| layout())?,
        })
    }
}

fn file(bytes: u64) -> rustix::io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("sluice-process", flags)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}
