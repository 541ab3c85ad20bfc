//! The guest-physical map, and the RAM behind it.
//!
//! ```text
//! 0x0000_0000  RAM (one region, one memfd)       0x6000 start info, 0x7000 memory map, 0x8000 command line, 0x9000 advice
//! 0x0010_0000  lowest address an image may use   (the appliance is linked at 2 MiB)
//! RAM size     end of RAM, at most 3 GiB
//! 0xd000_0000  park page
//! 0xd000_1000  virtio-mmio transports, one page each
//! ```
//!
//! The memfd is sealed against resizing, so that whoever maps it (the trunk's backend) cannot take pages away from this
//! process. Contents are shared with the guest: nothing here hands out a reference into them.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
use rustix::mm::Advice;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestRegionMmap;
use vm_memory::MmapRegion;

/// Largest RAM: everything from here to 4 GiB is for devices.
pub const RAM_MAX: u64 = 0xc000_0000;
/// Smallest RAM: the first MiB is the boot area, and an image needs some.
pub const RAM_MIN: u64 = 4 << 20;
/// RAM comes in whole huge pages.
pub const RAM_GRANULE: u64 = 2 << 20;
/// PVH start info.
pub const START_INFO: u64 = 0x6000;
/// PVH memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// Command line, zero-terminated.
pub const COMMAND_LINE: u64 = 0x8000;
/// One word that the VMM changes while the guest runs: whether frames move meanwhile.
pub const ADVICE: u64 = 0x9000;
/// Room for the command line with its zero; the same bound Linux has on x86.
pub const COMMAND_LINE_MAX: usize = 2048;
/// Below this, RAM belongs to the boot area.
pub const IMAGE_MIN: u64 = 0x10_0000;
/// The park page of the machine contract.
pub const PARK_PAGE: u64 = 0xd000_0000;
/// Length of the park page.
pub const PARK_PAGE_SIZE: u64 = 0x1000;
/// The first virtio-mmio transport.
pub const VIRTIO: u64 = 0xd000_1000;
/// Distance between transports: a page each, so that a guest can map them apart.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Bytes of registers and configuration space per transport.
pub const VIRTIO_SIZE: u64 = 0x200;

/// How much is faulted in with one call: the guest already runs, and may need the same locks in between.
const PREFAULT_CHUNK: u64 = 256 << 10;

/// Guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot create a memory file of {mib} MiB")]
    Create { mib: u64, source: io::Error },
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        mib: u64,
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("guest memory of {mib} MiB does not fit into the address space")]
    Layout { mib: u64 },
    #[error("KVM refused the guest memory")]
    Register { source: kvm_ioctls::Error },
    #[error("no guest memory at {address:#x}+{length:#x}")]
    OutOfRange { address: u64, length: u64 },
}

/// What stands behind guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Reserved 2 MiB pages.
    HugePages,
    /// Ordinary pages; the kernel may join them where its settings allow that for shared memory.
    Pages,
}

/// The guest's RAM: one region from physical address zero, shareable by descriptor.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    region: Arc<GuestRegionMmap>,
    size: u64,
    backing: Backing,
}

impl GuestRam {
    /// Creates and maps `size` bytes. With `want_huge_pages`, falls back to ordinary pages when none are reserved.
    ///
    /// # Errors
    /// The host has no memory, descriptors or address space for it.
    pub fn create(size: u64, want_huge_pages: bool) -> Result<GuestRam, MemoryError> {
        if want_huge_pages {
            match GuestRam::create_with(size, Backing::HugePages) {
                Ok(ram) => return Ok(ram),
                Err(error) => {
                    tracing::warn!(%error, "no huge pages reserved, using ordinary pages");
                }
            }
        }
        GuestRam::create_with(size, Backing::Pages)
    }

    fn create_with(size: u64, backing: Backing) -> Result<GuestRam, MemoryError> {
        let mib = size >> 20;
        let file = memory_file(size, backing).map_err(|error| MemoryError::Create {
            mib,
            source: error.into(),
        })?;
        let length = usize::try_from(size).map_err(|_| MemoryError::Layout { mib })?;
        let flags = match backing {
            // Mapping claims the pages from the pool: a failure is told here, not as a SIGBUS later.
            Backing::HugePages => libc::MAP_SHARED,
            Backing::Pages => libc::MAP_SHARED | libc::MAP_NORESERVE,
        };
        let mapping = MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
        )
        .map_err(|source| MemoryError::Map { mib, source })?;
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or(MemoryError::Layout { mib })?;
        let region = Arc::new(region);
        let memory = GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&region)])
            .map_err(|_| MemoryError::Layout { mib })?;
        let ram = GuestRam {
            memory,
            region,
            size,
            backing,
        };
        if backing == Backing::Pages {
            // Where the host forbids huge pages for shared memory this changes nothing, and that is fine.
            let _ = ram.advise(0, size, Advice::LinuxHugepage);
        }
        Ok(ram)
    }

    /// The memory as the rust-vmm crates want it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The memory file.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.region.file_offset().map(FileOffset::file)
    }

    /// Bytes of RAM; addresses are `0..size`.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What kind of pages came out.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The single region, with its descriptor.
    #[must_use]
    pub fn region(&self) -> &GuestRegionMmap {
        &self.region
    }

    /// This process's address of `length` bytes of guest memory at `address`: a number to tell a backend, not a pointer.
    ///
    /// # Errors
    /// The range is not inside RAM.
    pub fn host_address(&self, address: u64, length: u64) -> Result<u64, MemoryError> {
        let out_of_range = || MemoryError::OutOfRange { address, length };
        let bytes = usize::try_from(length).map_err(|_| out_of_range())?;
        let slice = self
            .memory
            .get_slice(GuestAddress(address), bytes)
            .map_err(|_| out_of_range())?;
        Ok(slice.ptr_guard().as_ptr() as u64)
    }

    /// Gives the RAM to a virtual machine as slot 0.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        let userspace_addr = self.host_address(0, self.size)?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.size,
            userspace_addr,
        };
        // SAFETY: the range is the whole mapping, which lives as long as `self`; `Vm` keeps `self` until the vCPU thread, the
        // only one that enters the guest, is gone. Guest writes alias no Rust reference: RAM is only accessed as volatile.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(|source| MemoryError::Register { source })
    }

    /// Faults in all pages that nobody has touched yet.
    ///
    /// # Errors
    /// The kernel is older than 5.14, or the host is out of memory.
    pub fn prefault(&self) -> io::Result<()> {
        let chunk = match self.backing {
            Backing::HugePages => RAM_GRANULE,
            Backing::Pages => PREFAULT_CHUNK,
        };
        let mut start = 0;
        while start < self.size {
            let length = chunk.min(self.size - start);
            self.advise(start, length, Advice::LinuxPopulateWrite)?;
            start += length;
        }
        Ok(())
    }

    fn advise(&self, start: u64, length: u64, advice: Advice) -> io::Result<()> {
        let address = self.host_address(start, length).map_err(io::Error::other)?;
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let pointer = std::ptr::with_exposed_provenance_mut(
            usize::try_from(address).map_err(io::Error::other)?,
        );
        // SAFETY: the range was just checked to lie inside the mapping; the two kinds of advice used here (huge page,
        // populate) never change contents.
        unsafe { rustix::mm::madvise(pointer, length, advice) }?;
        Ok(())
    }
}

/// Faults the RAM in while the guest already boots. The thread ends by itself.
///
/// # Errors
/// The process is out of threads.
pub fn prefault_in_background(ram: &Arc<GuestRam>) -> io::Result<()> {
    let ram = Arc::clone(ram);
    thread::Builder::new()
        .name("prefault".into())
        .spawn(move || {
            let begin = Instant::now();
            match ram.prefault() {
                Ok(()) => tracing::debug!(ms = begin.elapsed().as_millis(), "memory pre-faulted"),
                Err(error) => tracing::warn!(%error, "memory is not pre-faulted"),
            }
        })?;
    Ok(())
}

fn memory_file(size: u64, backing: Backing) -> rustix::io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if backing == Backing::HugePages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = rustix::fs::memfd_create("sluice-ram", flags)?;
    rustix::fs::ftruncate(&file, size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(file))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const SIZE: u64 = 8 << 20;

    #[test]
    fn ram_starts_at_zero_and_has_no_hole() {
        let ram = GuestRam::create(SIZE, false).unwrap();
        assert_eq!(ram.backing(), Backing::Pages);
        ram.memory().write_obj(7_u8, GuestAddress(0)).unwrap();
        ram.memory()
            .write_obj(9_u8, GuestAddress(SIZE - 1))
            .unwrap();
        assert!(ram.memory().write_obj(1_u8, GuestAddress(SIZE)).is_err());
        assert!(ram.host_address(0, SIZE).is_ok());
        assert!(ram.host_address(1, SIZE).is_err());
        assert!(ram.host_address(u64::MAX, 2).is_err());
    }

    #[test]
    fn prefaulting_keeps_what_is_there() {
        let ram = GuestRam::create(SIZE, false).unwrap();
        ram.memory()
            .write_obj(0x1234_5678_u32, GuestAddress(0x10_0000))
            .unwrap();
        match ram.prefault() {
            Ok(()) => {}
            Err(error) => println!("SKIP: this kernel cannot pre-fault: {error}"),
        }
        assert_eq!(
            ram.memory()
                .read_obj::<u32>(GuestAddress(0x10_0000))
                .unwrap(),
            0x1234_5678
        );
    }

    #[test]
    fn whoever_maps_the_memory_cannot_resize_it() {
        let ram = GuestRam::create(SIZE, false).unwrap();
        let file = ram.region().get_mmap();
        let file = file.file_offset().unwrap().file();
        assert!(file.set_len(SIZE / 2).is_err());
        assert!(file.set_len(SIZE * 2).is_err());
    }

    #[test]
    fn asking_for_huge_pages_always_gives_memory() {
        let ram = GuestRam::create(SIZE, true).unwrap();
        ram.memory()
            .write_obj(1_u8, GuestAddress(SIZE - 1))
            .unwrap();
    }

    #[test]
    fn the_boot_area_lies_below_the_image_and_devices_above_ram() {
        const {
            assert!(START_INFO + 56 <= MEMORY_MAP);
            assert!(MEMORY_MAP + 24 <= COMMAND_LINE);
            assert!(COMMAND_LINE + (COMMAND_LINE_MAX as u64) <= IMAGE_MIN);
            assert!(RAM_MAX <= PARK_PAGE);
            assert!(PARK_PAGE + PARK_PAGE_SIZE <= VIRTIO);
            assert!(VIRTIO_SIZE <= VIRTIO_STRIDE);
        }
    }
}
