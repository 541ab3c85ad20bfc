//! The common header of SCTP (RFC 9260). Its CRC32c covers no address, so translation leaves it alone unless a port changes.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of [`Header`].
pub const LENGTH: usize = 12;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub source: U16,
    pub destination: U16,
    pub tag: U32,
    pub checksum: U32,
}

/// The header of a chunk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    pub kind: u8,
    pub flags: u8,
    pub length: U16,
}

/// Chunks that are walked before the rest of a packet is taken for data.
const CHUNKS: usize = 16;

/// The chunks in `bytes`, as far as they are at hand: header and value.
pub fn chunks(mut bytes: &[u8]) -> impl Iterator<Item = (ChunkHeader, &[u8])> {
    core::iter::from_fn(move || {
        let (header, _) = ChunkHeader::read_from_prefix(bytes).ok()?;
        let length = usize::from(header.length.get());
        let value = bytes.get(4..length.min(bytes.len()))?;
        // Chunks are padded to four bytes.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((header, value))
    })
    .take(CHUNKS)
}
