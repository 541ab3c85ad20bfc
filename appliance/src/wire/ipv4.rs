//! IPv4 (RFC 791).

use super::checksum;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

/// Bytes of [`Header`], options not counted.
pub const LENGTH: usize = 20;
/// In `fragment`: do not fragment.
pub const DF: u16 = 0x4000;
/// In `fragment`: more fragments follow.
pub const MF: u16 = 0x2000;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_length: U16,
    pub identification: U16,
    pub fragment: U16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: U16,
    pub source: [u8; 4],
    pub destination: [u8; 4],
}

impl Header {
    /// The header of a packet that the appliance makes itself; the checksum is in place.
    pub fn new(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: u16) -> Self {
        let mut header = Self {
            version_ihl: 0x45,
            tos: 0,
            total_length: U16::new(payload.saturating_add(LENGTH as u16)),
            identification: U16::new(0),
            fragment: U16::new(DF),
            ttl: 64,
            protocol,
            checksum: U16::new(0),
            source,
            destination,
        };
        header.checksum = U16::new(checksum::finish(checksum::sum(header.as_bytes(), 0)));
        header
    }

    /// The same with another identification.
    #[must_use]
    pub fn identified(mut self, id: u16) -> Self {
        let delta = checksum::Delta::default().word(self.identification.get(), id);
        self.identification = U16::new(id);
        self.checksum = U16::new(delta.patch(self.checksum.get()));
        self
    }

    pub const fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// Length of the header with its options, in bytes; below 20 if the field is nonsense.
    pub const fn header_length(&self) -> usize {
        (self.version_ihl & 0xf) as usize * 4
    }

    pub const fn dont_fragment(&self) -> bool {
        self.fragment.get() & DF != 0
    }

    pub const fn more_fragments(&self) -> bool {
        self.fragment.get() & MF != 0
    }

    /// Where this fragment's payload belongs, in bytes.
    pub const fn fragment_offset(&self) -> u16 {
        (self.fragment.get() & 0x1fff) << 3
    }

    /// One hop less, checksum patched (RFC 1624).
    pub fn decrement_ttl(&mut self) {
        let old = u16::from_be_bytes([self.ttl, self.protocol]);
        self.ttl = self.ttl.saturating_sub(1);
        let new = u16::from_be_bytes([self.ttl, self.protocol]);
        self.checksum = U16::new(
            checksum::Delta::default()
                .word(old, new)
                .patch(self.checksum.get()),
        );
    }
}

/// Whether the options ask for a route of the sender's choosing (loose or strict), which RFC 1812 §5.2.4.1 lets us refuse.
/// Broken options count as asking: nobody honest sends them.
pub fn options_route(mut options: &[u8]) -> bool {
    loop {
        match options {
            [] | [0, ..] => return false,
            [1, rest @ ..] => options = rest,
            [131 | 137, ..] => return true,
            [_, length, ..] => match options.get(usize::from(*length).max(2)..) {
                Some(rest) => options = rest,
                None => return true,
            },
            [_] => return true,
        }
    }
}
