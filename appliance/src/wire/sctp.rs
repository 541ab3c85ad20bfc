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
