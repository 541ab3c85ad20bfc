//! Captures: the part of pcapng (draft-ietf-opsawg-pcapng) that a replay reads and writes.
//!
//! The reader trusts nothing: every length is checked against its block, a block against [`BLOCK_MAX`], and no input makes it
//! panic or allocate more than one block. What it cannot replay faithfully it refuses, naming the packet. The writer writes one
//! section in little endian, so that equal packets are equal files on every machine.

mod read;
mod write;

pub use read::{Fault, Interface, Packet, ReadError, Reader};
pub use write::{Traffic, Writer};

/// Longest block that is read: a whole GSO frame with its options has room, a made-up length does not.
pub const BLOCK_MAX: u32 = 1 << 20;
/// Longest frame: 64 KiB of IP and an Ethernet header.
pub const FRAME_MAX: usize = 65_535 + 14;
/// Interfaces of one section, at most.
pub const INTERFACES_MAX: usize = 4_096;

/// LINKTYPE_ETHERNET, the only one.
const ETHERNET: u16 = 1;

/// Types of blocks.
mod block {
    pub(super) const SECTION: u32 = 0x0a0d_0d0a;
    pub(super) const INTERFACE: u32 = 1;
    pub(super) const PACKET: u32 = 2;
    pub(super) const SIMPLE: u32 = 3;
    pub(super) const ENHANCED: u32 = 6;
}

/// Codes of options; their meaning depends on the block.
mod option {
    pub(super) const END: u16 = 0;
    pub(super) const COMMENT: u16 = 1;
    pub(super) const NAME: u16 = 2;
    pub(super) const FLAGS: u16 = 2;
    pub(super) const APPLICATION: u16 = 4;
    pub(super) const RESOLUTION: u16 = 9;
    pub(super) const OFFSET: u16 = 14;
}

/// As it stands in a section's header, read in the section's own byte order.
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
