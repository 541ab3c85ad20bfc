//! ARP for IPv4 over Ethernet (RFC 826).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

pub const REQUEST: u16 = 1;
pub const REPLY: u16 = 2;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Packet {
    pub hardware: U16,
    pub protocol: U16,
    pub hardware_length: u8,
    pub protocol_length: u8,
    pub operation: U16,
    pub sender_mac: [u8; 6],
    pub sender: [u8; 4],
    pub target_mac: [u8; 6],
    pub target: [u8; 4],
}

impl Packet {
    /// Whether it speaks of IPv4 over Ethernet at all.
    pub fn is_ipv4_over_ethernet(&self) -> bool {
        self.hardware == 1
            && self.protocol == super::ethernet::IPV4
            && self.hardware_length == 6
            && self.protocol_length == 4
    }
}
