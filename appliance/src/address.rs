//! An address of either family in sixteen bytes, so that tables have one key and one shape. IPv4 lies mapped
//! (`::ffff:a.b.c.d`): an IPv6 packet that carries such an address is dropped as a martian before any table is asked, so the
//! two families never meet.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
pub use sluice_contract::Family;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// IPv4 or IPv6, as a table key.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Address(pub [u8; 16]);

impl Address {
    /// `::`, which is also what an empty table row holds.
    pub const UNSPECIFIED: Self = Self([0; 16]);

    /// The unspecified address of a family.
    pub const fn any(family: Family) -> Self {
        match family {
            Family::V4 => Self::v4([0; 4]),
            Family::V6 => Self::UNSPECIFIED,
        }
    }

    /// An IPv4 address in its mapped form.
    #[inline]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self((0xffff << 32 | u32::from_be_bytes(octets) as u128).to_be_bytes())
    }

    /// The family, told by the mapped prefix.
    #[inline]
    pub fn family(self) -> Family {
        if self.high() == 0 && (self.low() >> 32) == 0xffff {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// The last four bytes: the whole address when it is IPv4.
    pub const fn v4_octets(self) -> [u8; 4] {
        let [.., a, b, c, d] = self.0;
        [a, b, c, d]
    }

    /// The first eight bytes as a number.
    #[inline]
    pub const fn high(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// The last eight bytes as a number.
    #[inline]
    pub const fn low(self) -> u64 {
        let [.., a, b, c, d, e, f, g, h] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// `fe80::/10`.
    #[inline]
    pub const fn is_link_local6(self) -> bool {
        self.high() >> 54 == 0xfe80 >> 6
    }

    /// 224.0.0.0/4 or ff00::/8.
    #[inline]
    pub fn is_multicast(self) -> bool {
        match self.family() {
            Family::V4 => (self.low() as u32) >> 28 == 0xe,
            Family::V6 => self.high() >> 56 == 0xff,
        }
    }

    /// 255.255.255.255.
    #[inline]
    pub fn is_broadcast4(self) -> bool {
        self == Self::v4([255; 4])
    }

    /// `::` or 0.0.0.0.
    pub fn is_unspecified(self) -> bool {
        self == Self::UNSPECIFIED || self == Self::v4([0; 4])
    }

    /// What may stand neither as source nor as destination of a packet on a wire (RFC 1812 §5.3.7, RFC 4291 §2.5):
    /// 0/8, 127/8, 240/4 without the broadcast address, `::1`, and IPv4-mapped addresses inside IPv6 (`packet` says which).
    #[inline]
    pub fn is_martian_in(self, packet: Family) -> bool {
        match (packet, self.family()) {
            (Family::V4, _) => {
                let [first, ..] = self.v4_octets();
                first == 0 || first == 127 || (first >= 240 && !self.is_broadcast4())
            }
            (Family::V6, Family::V4) => true,
            (Family::V6, Family::V6) => self.high() == 0 && self.low() <= 1,
        }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::v4(v4.octets()),
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(address.octets())
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        Self(address.octets())
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        match address.family() {
            Family::V4 => Self::V4(address.v4_octets().into()),
            Family::V6 => Self::V6(address.0.into()),
        }
    }
}

impl core::fmt::Debug for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

impl core::fmt::Display for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}
