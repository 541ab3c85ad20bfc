//! UDP (RFC 768, RFC 8200 §8.1).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

/// Bytes of [`Header`].
pub const LENGTH: usize = 8;
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: u16 = 6;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub source: U16,
    pub destination: U16,
    pub length: U16,
    pub checksum: U16,
}
