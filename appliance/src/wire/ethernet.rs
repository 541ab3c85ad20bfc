//! Ethernet II.

use sluice_contract::Mac;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

/// Bytes of [`Header`].
pub const LENGTH: usize = 14;
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;
/// 802.1Q and 802.1ad tags, which no link may send inside its frames.
pub const VLAN: u16 = 0x8100;
pub const VLAN_SERVICE: u16 = 0x88a8;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: U16,
}

impl Header {
    pub const fn new(destination: Mac, source: Mac, ethertype: u16) -> Self {
        Self {
            destination: destination.0,
            source: source.0,
            ethertype: U16::new(ethertype),
        }
    }

    pub const fn destination(&self) -> Mac {
        Mac(self.destination)
    }

    pub const fn source(&self) -> Mac {
        Mac(self.source)
    }
}
