//! VXLAN (RFC 7348) and its group policy extension (draft-smith-vxlan-group-policy-05).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of [`Header`].
pub const LENGTH: usize = 8;
/// In `flags`: the network number is valid.
pub const HAS_VNI: u8 = 0x08;
/// In `flags`: the group policy id is valid.
pub const HAS_GROUP: u8 = 0x80;

/// Bits that have no name are sent as zero and ignored on receipt.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub flags: u8,
    /// Of the group policy extension: "don't learn" and "policy applied", unused here.
    pub policy_flags: u8,
    pub group: U16,
    /// The network in the upper 24 bits.
    pub vni_reserved: U32,
}

impl Header {
    /// A header for `vni`, with a group if there is one to tell.
    pub const fn new(vni: u32, group: Option<u16>) -> Self {
        let (flags, group) = match group {
            Some(group) => (HAS_VNI | HAS_GROUP, group),
            None => (HAS_VNI, 0),
        };
        Self {
            flags,
            policy_flags: 0,
            group: U16::new(group),
            vni_reserved: U32::new(vni << 8),
        }
    }

    /// The network, if the header names one.
    pub const fn vni(&self) -> Option<u32> {
        if self.flags & HAS_VNI == 0 {
            None
        } else {
            Some(self.vni_reserved.get() >> 8)
        }
    }

    /// The group, if the header names one.
    pub const fn group(&self) -> Option<u16> {
        if self.flags & HAS_GROUP == 0 {
            None
        } else {
            Some(self.group.get())
        }
    }
}
