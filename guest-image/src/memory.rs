//! Guest memory, carved once at boot: rings, packet buffers, and all the rest for the appliance's
//! tables.

use core::ptr;

use crate::pool::{BUFFER, Page};
use crate::virtqueue::Ring;

/// A range of zeroed memory that nobody else uses, given out from the front and never taken back.
#[derive(Debug)]
pub struct Memory {
    next: usize,
    end: usize,
}

impl Memory {
    /// # Safety
    /// From `start` to `end` there is memory: mapped, writable, zeroed, in use by nobody else, for
    /// good.
    pub unsafe fn new(start: usize, end: usize) -> Self {
        Self {
            next: start.next_multiple_of(BUFFER),
            end,
        }
    }

    /// An empty ring.
    pub fn ring(&mut self) -> Option<&'static Ring> {
        let start = self.take(size_of::<Ring>())?;
        // SAFETY: the range is ours (`new`) and given out once; a page's alignment is a ring's;
        // zeroed memory is an empty ring, all of whose fields are atomics, so that the device may
        // change them.
        Some(unsafe { &*ptr::with_exposed_provenance::<Ring>(start) })
    }

    /// Packet buffers.
    pub fn pages(&mut self, count: usize) -> Option<&'static mut [Page]> {
        let start = self.take(count.checked_mul(BUFFER)?)?;
        let first = ptr::with_exposed_provenance_mut::<Page>(start);
        // SAFETY: the range is ours (`new`), given out once, page-aligned, and any bytes are pages.
        Some(unsafe { core::slice::from_raw_parts_mut(first, count) })
    }

    /// All that is left.
    pub fn rest(self) -> &'static mut [u8] {
        let first = ptr::with_exposed_provenance_mut::<u8>(self.next);
        let length = self.end.saturating_sub(self.next);
        // SAFETY: the range is ours (`new`) and given out once: `self` ends here.
        unsafe { core::slice::from_raw_parts_mut(first, length) }
    }

    /// Whole pages from the front.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let next = self.next.checked_add(bytes.next_multiple_of(BUFFER))?;
        if next > self.end {
            return None;
        }
        Some(core::mem::replace(&mut self.next, next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::tests::pages;

    fn memory(count: usize) -> Memory {
        let range = pages(count).as_mut_ptr_range();
        let (start, end) = (
            range.start.expose_provenance(),
            range.end.expose_provenance(),
        );
        // SAFETY: the pages are zeroed, leaked, and used by this test alone.
        unsafe { Memory::new(start, end) }
    }

    #[test]
    fn pieces_do_not_overlap_and_the_rest_is_all_that_is_left() {
        let ring_pages = size_of::<Ring>() / BUFFER;
        let mut memory = memory(ring_pages + 8);
        let ring = memory.ring().unwrap();
        let buffers = memory.pages(3).unwrap();
        buffers.fill(Page([0xff; BUFFER]));
        let end = buffers.as_ptr_range().end as usize;
        let rest = memory.rest();
        assert_eq!((rest.as_ptr() as usize, rest.len()), (end, 5 * BUFFER));
        assert!(rest.iter().all(|byte| *byte == 0));
        let areas = ring.areas();
        assert_eq!(
            (areas.descriptors as usize + ring_pages * BUFFER),
            buffers.as_ptr() as usize
        );
    }

    #[test]
    fn what_is_not_there_is_not_given() {
        let ring_pages = size_of::<Ring>() / BUFFER;
        let mut memory = memory(ring_pages);
        assert!(memory.pages(ring_pages + 1).is_none());
        assert!(memory.pages(usize::MAX).is_none());
        assert!(memory.ring().is_some());
        assert!(memory.pages(1).is_none());
        assert!(memory.rest().is_empty());
    }
}
