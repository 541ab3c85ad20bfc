//! Memory, carved once: tables take their slices from one zeroed region when they are built, and nothing is given back.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What is left of a region.
#[derive(Debug)]
pub struct Arena<'m> {
    rest: &'m mut [u8],
}

/// The region is too small for what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes that were asked for.
    pub wanted: usize,
    /// Bytes that were left.
    pub left: usize,
}

impl core::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "A table needs {} bytes, {} are left",
            self.wanted, self.left
        )
    }
}

impl core::error::Error for OutOfMemory {}

/// Slices begin at a cache line, so that a row of 64 bytes never lies in two.
const LINE: usize = 64;

impl<'m> Arena<'m> {
    /// All of `region`, which the caller has zeroed.
    pub fn new(region: &'m mut [u8]) -> Self {
        Self { rest: region }
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// A slice of `count` zeroed values.
    ///
    /// # Errors
    /// [`OutOfMemory`]; the arena is then as before.
    pub fn slice<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        count: usize,
    ) -> Result<&'m mut [T], OutOfMemory> {
        let bytes = count.saturating_mul(size_of::<T>());
        let pad = self.rest.as_ptr().align_offset(LINE.max(align_of::<T>()));
        let short = OutOfMemory {
            wanted: bytes,
            left: self.rest.len(),
        };
        let wanted = pad.checked_add(bytes).ok_or(short)?;
        if wanted > self.rest.len() {
            return Err(short);
        }
        let (_, aligned) = core::mem::take(&mut self.rest).split_at_mut(pad);
        let (slice, rest) = aligned.split_at_mut(bytes);
        self.rest = rest;
        <[T]>::mut_from_bytes_with_elems(slice, count).map_err(|_| short)
    }
}
