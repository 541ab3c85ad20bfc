//! Packet buffers: pages of guest memory with exactly one owner each.
//!
//! A [`Buffer`] is the right to touch one page. It is made once, when the pool is, and then only
//! moves: from the pool's free list into a ring (where the device has it) and back. Nothing copies
//! or drops it on the way, so the number of buffers in all places together never changes; the tests
//! of `net` count them.

use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use core::marker::PhantomData;
use core::ptr::NonNull;

/// Bytes of a buffer.
pub const BUFFER: usize = 4096;

/// The memory of one buffer, aligned so that it never crosses a page.
#[repr(C, align(4096))]
#[derive(Clone, Copy, Debug)]
pub struct Page(pub [u8; BUFFER]);

/// The exclusive right to one page, while it is not with a device.
#[derive(Debug)]
#[must_use = "a buffer that is dropped is lost to the pool"]
pub struct Buffer<'m> {
    page: NonNull<Page>,
    memory: PhantomData<&'m mut Page>,
}

impl Buffer<'_> {
    /// Its guest-physical address; memory is identity-mapped.
    pub fn address(&self) -> u64 {
        self.page.expose_provenance().get() as u64
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the page outlives 'm; this is its only owner (see `bytes_mut`), borrowed shared.
        unsafe { &self.page.as_ref().0 }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the page outlives 'm, any bytes are a valid page, and there is one `Buffer` per
        // page (`Pool::new` splits an exclusive slice, nothing clones). A ring keeps the buffer
        // while the device may write, so nobody holds this reference then. A device that writes at
        // another time breaks the contract; it belongs to the host, which can write guest memory in
        // any case, and every length and offset read from a page is read once and checked.
        unsafe { &mut self.page.as_mut().0 }
    }

    /// Starts loading the cache line at `offset`, without waiting for it.
    pub fn prefetch(&self, offset: usize) {
        if offset < BUFFER {
            let line = self.page.as_ptr().cast::<i8>().wrapping_add(offset);
            // SAFETY: a prefetch has no effect but on the cache, whatever the address; SSE is in
            // every x86-64.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(line);
            }
        }
    }
}

/// Free buffers, last in first out: the one used last is the one still in the cache.
#[derive(Debug)]
pub struct Pool<'m, const N: usize> {
    free: heapless::Vec<Buffer<'m>, N>,
}

impl<'m, const N: usize> Pool<'m, N> {
    /// Takes up to `N` pages for good.
    pub fn new(pages: &'m mut [Page]) -> Self {
        let mut free = heapless::Vec::new();
        for page in pages.iter_mut().take(N) {
            let buffer = Buffer {
                page: NonNull::from(page),
                memory: PhantomData,
            };
            // There are at most N.
            let _ = free.push(buffer);
        }
        Self { free }
    }

    pub fn take(&mut self) -> Option<Buffer<'m>> {
        self.free.pop()
    }

    pub fn give(&mut self, buffer: Buffer<'m>) {
        let full = self.free.push(buffer).is_err();
        debug_assert!(!full, "more buffers than pages");
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::boxed::Box;
    use std::vec;

    pub(crate) fn pages(count: usize) -> &'static mut [Page] {
        Box::leak(vec![Page([0; BUFFER]); count].into_boxed_slice())
    }

    #[test]
    fn every_page_is_handed_out_once_and_the_last_given_is_the_next_taken() {
        let mut pool = Pool::<4>::new(pages(6));
        let mut held = std::vec::Vec::new();
        while let Some(buffer) = pool.take() {
            assert_eq!(buffer.address() % BUFFER as u64, 0);
            held.push(buffer);
        }
        let mut addresses: vec::Vec<u64> = held.iter().map(Buffer::address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), 4);
        let last = held.pop().unwrap();
        let address = last.address();
        pool.give(last);
        assert_eq!(pool.take().unwrap().address(), address);
    }

    #[test]
    fn what_is_written_to_a_buffer_is_read_from_it() {
        let mut pool = Pool::<2>::new(pages(2));
        let (mut a, mut b) = (pool.take().unwrap(), pool.take().unwrap());
        a.bytes_mut().fill(1);
        b.bytes_mut().fill(2);
        a.prefetch(0);
        a.prefetch(BUFFER);
        assert!(a.bytes().iter().all(|x| *x == 1) && b.bytes().iter().all(|x| *x == 2));
        pool.give(a);
        pool.give(b);
        assert_eq!(pool.free(), 2);
    }
}
