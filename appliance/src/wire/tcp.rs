//! TCP (RFC 9293).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of [`Header`], options not counted.
pub const LENGTH: usize = 20;
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: u16 = 16;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub source: U16,
    pub destination: U16,
    pub sequence: U32,
    pub acknowledgment: U32,
    pub data_offset: u8,
    pub flags: u8,
    pub window: U16,
    pub checksum: U16,
    pub urgent: U16,
}

impl Header {
    /// Length of the header with its options, in bytes; below 20 if the field is nonsense.
    pub const fn header_length(&self) -> usize {
        (self.data_offset >> 4) as usize * 4
    }

    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

/// The shift of the window scale option among `options`, if it is there (RFC 7323 §2.2).
pub fn window_scale(mut options: &[u8]) -> Option<u8> {
    loop {
        options = match options {
            [] | [0, ..] => return None,
            [1, rest @ ..] => rest,
            [3, 3, shift, ..] => return Some(*shift),
            [_, length, ..] => options.get(usize::from(*length).max(2)..)?,
            [_] => return None,
        };
    }
}
