//! Guest memory as the backend sees it: the regions the VMM shared, and lists of pieces of them for `readv`/`writev`.
//!
//! Everything the guest says (addresses, lengths) is checked here against the mapped regions, once; a `Scatter`
//! owns the mapping its pieces point into, so a piece can never outlive the memory. The guest may write to that memory
//! at any time: values are read once into host memory and judged there.
//!
//! One of the crate's two unsafe files of the data path (with `ring.rs`).
#![expect(
    unsafe_code,
    reason = "payload moves by readv/writev on guest memory; nothing safe can name it"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use vm_memory::{FileOffset, MmapRegion};

use super::vnet;

/// What the VMM says about one region (vhost-user `SET_MEM_TABLE`).
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// The VMM's own virtual address of the first byte: ring addresses come in this space.
    pub user: u64,
    /// Where the region begins in the shared file.
    pub offset: u64,
}

/// Why a memory table is refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("Region at {guest:#x} of {len:#x} bytes cannot be mapped")]
    Map {
        guest: u64,
        len: u64,
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("Region at {guest:#x} of {len:#x} bytes is empty, wraps around or overlaps another")]
    Shape { guest: u64, len: u64 },
    #[error(
        "Region at {guest:#x} lies in a file that may shrink under us: a memfd sealed against it is required"
    )]
    Unsealed { guest: u64 },
    #[error("Region at {guest:#x} reaches beyond the {file_len} bytes of its file")]
    Short { guest: u64, file_len: u64 },
    #[error("{regions} memory regions came with {files} files")]
    Files { regions: usize, files: usize },
}

#[derive(Debug)]
struct Region {
    spec: RegionSpec,
    map: MmapRegion,
    /// What is mapped, unless it is a file.
    #[cfg(test)]
    _own: Option<own::Pages>,
}

/// The mapped guest memory.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Maps every region of a memory table.
    ///
    /// # Errors
    /// When a region is malformed, overlaps another, or its file is too short to be mapped.
    pub fn map(table: &[RegionSpec], files: Vec<File>) -> Result<Self, MemoryError> {
        if table.len() != files.len() {
            return Err(MemoryError::Files {
                regions: table.len(),
                files: files.len(),
            });
        }
        let mut regions: Vec<Region> = Vec::with_capacity(table.len());
        for (spec, file) in table.iter().zip(files) {
            let RegionSpec {
                guest,
                len,
                user,
                offset,
            } = *spec;
            let shape = MemoryError::Shape { guest, len };
            let ends = (
                guest.checked_add(len),
                user.checked_add(len),
                usize::try_from(len),
            );
            let (Some(end), Some(_), Ok(size)) = ends else {
                return Err(shape);
            };
            let apart = |r: &Region| end <= r.spec.guest || guest >= r.spec.guest + r.spec.len;
            if len == 0 || !regions.iter().all(apart) {
                return Err(shape);
            }
            // Touching a page that its owner took away would end the daemon (SIGBUS).
            let seals = rustix::fs::fcntl_get_seals(&file);
            if !seals.is_ok_and(|s| s.contains(rustix::fs::SealFlags::SHRINK)) {
                return Err(MemoryError::Unsealed { guest });
            }
            // A page beyond the end of the file would do the same; the mapping itself does not mind.
            let file_len = file.metadata().map_or(0, |m| m.len());
            if offset.checked_add(len).is_none_or(|end| end > file_len) {
                return Err(MemoryError::Short { guest, file_len });
            }
            let map = MmapRegion::from_file(FileOffset::new(file, offset), size)
                .map_err(|source| MemoryError::Map { guest, len, source })?;
            regions.push(Region {
                spec: *spec,
                map,
                #[cfg(test)]
                _own: None,
            });
        }
        Ok(Self { regions })
    }

    /// Host address of `len` bytes at a guest-physical address, if they lie inside one region.
    fn at_guest(&self, guest: u64, len: u64) -> Option<*mut u8> {
        self.regions
            .iter()
            .find_map(|r| r.at(guest.checked_sub(r.spec.guest)?, len))
    }

    /// Host address of `len` bytes at a VMM-virtual address, if they lie inside one region.
    pub(super) fn at_user(&self, user: u64, len: u64) -> Option<*mut u8> {
        self.regions
            .iter()
            .find_map(|r| r.at(user.checked_sub(r.spec.user)?, len))
    }

    /// Copies `to.len()` bytes out of guest memory; false when they are not all inside one region.
    pub(super) fn read(&self, guest: u64, to: &mut [u8]) -> bool {
        let Some(from) = self.at_guest(guest, to.len() as u64) else {
            return false;
        };
        // SAFETY: `at_guest` proved that `to.len()` bytes at `from` are mapped for as long as `self` lives; `to` is
        // host memory, so the two do not overlap. A concurrent guest write can only change the bytes copied.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        true
    }
}

impl Region {
    fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        if offset.checked_add(len)? > self.spec.len {
            return None;
        }
        Some(
            self.map
                .as_ptr()
                .wrapping_add(usize::try_from(offset).ok()?),
        )
    }
}

/// Entries kept free in front of the pieces, so that a local header can be put before any piece.
const FRONT: usize = 2;
/// On the trunk: vnet header, the two MAC addresses, the tag.
pub(super) const TRUNK_HEAD: usize = vnet::HEADER + vnet::MACS + vnet::TAG;
/// On the tap: vnet header and the two MAC addresses.
pub(super) const TAP_HEAD: usize = vnet::HEADER + vnet::MACS;

/// A list of pieces of guest memory, in the form that `readv` and `writev` take.
pub(super) struct Scatter {
    memory: Arc<GuestMemory>,
    /// Invariant: entries from `FRONT` on point into `memory`, which this struct keeps mapped.
    iovs: Vec<libc::iovec>,
    /// Invariant: empty but during [`write_part`](Self::write_part).
    part: Vec<libc::iovec>,
}

impl std::fmt::Debug for Scatter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scatter")
            .field("pieces", &self.len())
            .finish_non_exhaustive()
    }
}

// SAFETY: the raw pointers inside point into `memory`, which is itself Send and kept alive by the Arc.
unsafe impl Send for Scatter {}

const NOTHING: libc::iovec = libc::iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

impl Scatter {
    pub(super) fn new(memory: Arc<GuestMemory>, capacity: usize) -> Self {
        let mut iovs = Vec::with_capacity(capacity + FRONT);
        iovs.resize(FRONT, NOTHING);
        let part = Vec::with_capacity(capacity + 1);
        Self { memory, iovs, part }
    }

    /// Number of pieces.
    pub(super) fn len(&self) -> usize {
        self.iovs.len() - FRONT
    }

    /// Adds a piece; false when it is not inside guest memory.
    pub(super) fn push(&mut self, guest: u64, len: u32) -> bool {
        let Some(base) = self.memory.at_guest(guest, u64::from(len)) else {
            return false;
        };
        self.iovs.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: len as usize,
        });
        true
    }

    /// Length of one piece.
    pub(super) fn piece_len(&self, piece: usize) -> Option<usize> {
        self.iovs.get(piece + FRONT).map(|p| p.iov_len)
    }

    /// The pieces as the guest named them.
    #[cfg(test)]
    pub(super) fn guest_pieces(&self) -> Vec<(u64, usize)> {
        let regions = &self.memory.regions;
        let name = |p: &libc::iovec| {
            regions.iter().find_map(|r| {
                let offset = p.iov_base.addr().checked_sub(r.map.as_ptr().addr())? as u64;
                (offset < r.spec.len).then_some((r.spec.guest + offset, p.iov_len))
            })
        };
        self.iovs[FRONT..].iter().filter_map(name).collect()
    }

    pub(super) fn truncate(&mut self, pieces: usize) {
        self.iovs.truncate(pieces + FRONT);
    }

    /// Forgets the first `pieces` pieces.
    pub(super) fn discard(&mut self, pieces: usize) {
        let pieces = pieces.min(self.len());
        self.iovs.drain(FRONT..FRONT + pieces);
    }

    /// Reads one tap frame into the pieces from `first` on: the vnet header (of the tap's size) into `header`, the rest as it
    /// will stand on the trunk, with a gap of four bytes for the tag after the MAC addresses. Returns the length on the tap.
    ///
    /// # Errors
    /// `InvalidInput` when piece `first` is missing or shorter than the trunk's headers; else as `readv`.
    pub(super) fn read_frame(
        &mut self,
        tap: BorrowedFd<'_>,
        first: usize,
        header: &mut [u8],
    ) -> io::Result<usize> {
        let at = first + FRONT;
        let whole = *self.iovs.get(at).ok_or(io::ErrorKind::InvalidInput)?;
        if whole.iov_len < TRUNK_HEAD {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let base = whole.iov_base.cast::<u8>();
        // Pieces before `first` were consumed by earlier frames, or are the reserved front: free to be overwritten.
        self.iovs[at - 2] = libc::iovec {
            iov_base: header.as_mut_ptr().cast(),
            iov_len: header.len(),
        };
        self.iovs[at - 1] = libc::iovec {
            iov_base: base.wrapping_add(vnet::HEADER).cast(),
            iov_len: vnet::MACS,
        };
        self.iovs[at] = libc::iovec {
            iov_base: base.wrapping_add(TRUNK_HEAD).cast(),
            iov_len: whole.iov_len - TRUNK_HEAD,
        };
        let entries = &self.iovs[at - 2..];
        let count = entries.len().min(MAX_ENTRIES) as i32;
        // SAFETY: entry 0 is `header`, borrowed mutably for this call; all others lie inside guest memory that
        // `self.memory` keeps mapped writable (`push`, and the length check above).
        let n = unsafe { libc::readv(tap.as_raw_fd(), entries.as_ptr(), count) };
        self.iovs[at] = whole;
        self.iovs[at - 1] = NOTHING;
        self.iovs[at - 2] = NOTHING;
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Completes a frame read by [`read_frame`](Self::read_frame): puts the header and the tag in front of it.
    pub(super) fn put_head(
        &mut self,
        first: usize,
        header: &[u8; vnet::HEADER],
        tag: [u8; vnet::TAG],
    ) {
        let Some(piece) = self
            .iovs
            .get(first + FRONT)
            .filter(|p| p.iov_len >= TRUNK_HEAD)
        else {
            return;
        };
        let base = piece.iov_base.cast::<u8>();
        // SAFETY: the piece is at least TRUNK_HEAD bytes of mapped guest memory; both types have alignment 1.
        unsafe {
            ptr::write_volatile(base.cast::<[u8; vnet::HEADER]>(), *header);
            ptr::write_volatile(base.add(TAP_HEAD).cast::<[u8; vnet::TAG]>(), tag);
        }
    }

    /// Copies the first bytes of the pieces into `to`; false when there are fewer.
    pub(super) fn copy_front(&self, to: &mut [u8]) -> bool {
        let mut done = 0;
        for piece in &self.iovs[FRONT..] {
            let n = piece.iov_len.min(to.len() - done);
            // SAFETY: the piece is `iov_len` bytes of mapped guest memory, `to` has `n` bytes left from `done` on,
            // and host and guest memory do not overlap.
            unsafe {
                let target = to.as_mut_ptr().add(done);
                ptr::copy_nonoverlapping(piece.iov_base.cast::<u8>(), target, n);
            }
            done += n;
            if done == to.len() {
                return true;
            }
        }
        false
    }

    /// Writes one frame to a tap: `head` (vnet header and MAC addresses) in place of the first [`TRUNK_HEAD`] bytes of the
    /// pieces, then the rest.
    /// The pieces are consumed: call [`truncate`](Self::truncate) before the next use.
    ///
    /// # Errors
    /// `InvalidInput` when the pieces are shorter than the trunk's headers; else as `writev`.
    pub(super) fn write_frame(&mut self, tap: BorrowedFd<'_>, head: &[u8]) -> io::Result<usize> {
        let mut skip = TRUNK_HEAD;
        let mut at = FRONT;
        loop {
            let piece = self.iovs.get_mut(at).ok_or(io::ErrorKind::InvalidInput)?;
            if piece.iov_len > skip {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(skip).cast();
                piece.iov_len -= skip;
                break;
            }
            skip -= piece.iov_len;
            at += 1;
        }
        let local = head.as_ptr().cast_mut().cast();
        self.iovs[at - 1] = libc::iovec {
            iov_base: local,
            iov_len: head.len(),
        };
        let entries = &self.iovs[at - 1..];
        let count = i32::try_from(entries.len()).unwrap_or(i32::MAX);
        // SAFETY: entry 0 is `head`, borrowed for this call and only read by writev; all others lie inside mapped
        // guest memory: a piece moved forward above keeps its end.
        let n = unsafe { libc::writev(tap.as_raw_fd(), entries.as_ptr(), count) };
        self.iovs[at - 1] = NOTHING;
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

impl Scatter {
    /// Writes a frame of `head` and `length` bytes of the pieces from byte `from` on. The pieces stay as they are.
    ///
    /// # Errors
    /// `InvalidInput` when the pieces do not have so many bytes; else as `writev`.
    pub(super) fn write_part(
        &mut self,
        tap: BorrowedFd<'_>,
        head: &[u8],
        from: usize,
        length: usize,
    ) -> io::Result<usize> {
        self.part.push(libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        });
        let (mut skip, mut left) = (from, length);
        for piece in &self.iovs[FRONT..] {
            if left == 0 {
                break;
            }
            let here = piece.iov_len.saturating_sub(skip).min(left);
            if here != 0 {
                self.part.push(libc::iovec {
                    iov_base: piece.iov_base.cast::<u8>().wrapping_add(skip).cast(),
                    iov_len: here,
                });
            }
            skip = skip.saturating_sub(piece.iov_len);
            left -= here;
        }
        let count = i32::try_from(self.part.len()).unwrap_or(i32::MAX);
        let written = if left == 0 {
            // SAFETY: entry 0 is `head`, borrowed for this call and only read by writev; all others are parts of pieces, which
            // lie inside mapped guest memory: `here` is at most what a piece has behind `skip`.
            let n = unsafe { libc::writev(tap.as_raw_fd(), self.part.as_ptr(), count) };
            usize::try_from(n).map_err(|_| io::Error::last_os_error())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        };
        self.part.clear();
        written
    }
}

/// Most entries of one `readv` (UIO_MAXIOV).
pub(super) const MAX_ENTRIES: usize = 1024;

/// Memory of this process in place of a file's: whoever checks each access (Miri, AddressSanitizer) knows where it ends.
#[cfg(test)]
mod own {
    use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
    use std::ptr::NonNull;

    use vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

    use super::{GuestMemory, Region, RegionSpec};

    /// As `MmapRegion` wants it.
    const PAGE: usize = 4096;

    #[derive(Debug)]
    pub(super) struct Pages {
        at: NonNull<u8>,
        layout: Layout,
    }

    // SAFETY: it is memory and nothing else; whoever accesses it does so through `MmapRegion`, which is Send and Sync.
    unsafe impl Send for Pages {}
    // SAFETY: as above.
    unsafe impl Sync for Pages {}

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: `at` came from `alloc_zeroed` with this layout, and the region that points there goes with this.
            unsafe { dealloc(self.at.as_ptr(), self.layout) };
        }
    }

    impl GuestMemory {
        /// One region of whole pages at these addresses, of this process's own memory.
        pub(in super::super) fn of_own_pages(guest: u64, user: u64, pages: usize) -> Self {
            let size = pages * PAGE;
            let layout = Layout::from_size_align(size, PAGE).unwrap();
            // SAFETY: the layout is not empty.
            let at = unsafe { alloc_zeroed(layout) };
            let at = NonNull::new(at).unwrap_or_else(|| handle_alloc_error(layout));
            // SAFETY: `size` bytes at `at` are allocated until `Pages` is dropped, which the region itself owns.
            let map = unsafe {
                MmapRegion::build_raw(at.as_ptr(), size, libc::PROT_READ | libc::PROT_WRITE, 0)
            };
            let spec = RegionSpec {
                guest,
                len: size as u64,
                user,
                offset: 0,
            };
            let region = Region {
                spec,
                map: map.unwrap(),
                _own: Some(Pages { at, layout }),
            };
            Self {
                regions: vec![region],
            }
        }

        /// The guest's own view of it.
        pub(in super::super) fn slice(&self) -> VolatileSlice<'_> {
            self.regions[0].map.as_volatile_slice()
        }
    }
}
