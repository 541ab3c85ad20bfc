//! Newtypes that cannot hold nonsense: a value of one of these has been checked where it was made.

use core::fmt;
use core::net::IpAddr;
use serde::{Deserialize, Serialize};

/// A link of the trunk: the VLAN id that its frames carry there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct LinkId(u16);

impl LinkId {
    /// The node's network card.
    pub const UPLINK: Self = Self(1);
    /// The node itself (`sluice0`).
    pub const HOST: Self = Self(2);
    /// The node's probes of other nodes: trusted, like the node itself, and with addresses of its own among the pods'.
    pub const PROBES: Self = Self(3);
    /// Pods have ids from here…
    pub const FIRST_POD: u16 = 16;
    /// …to here: 4095 is reserved by 802.1Q.
    pub const LAST: u16 = 4094;

    /// A link id, if `raw` can be one (0 and 4095 are no VLAN ids).
    pub const fn new(raw: u16) -> Option<Self> {
        if raw == 0 || raw > Self::LAST {
            None
        } else {
            Some(Self(raw))
        }
    }

    /// The number as it stands in the 802.1Q tag.
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// As an index into a table of `LinkId::LAST + 1` entries.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether a pod is behind this link.
    pub const fn is_pod(self) -> bool {
        self.0 >= Self::FIRST_POD
    }
}

/// Whose a pod is, as far as shares go: a number that the host gives to a namespace with pods on this node.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(try_from = "u16", into = "u16")]
pub struct Tenant(u16);

impl Tenant {
    /// The link has a share of its own.
    pub const NONE: Self = Self(0);
    /// There are no more tenants than pods.
    pub const LAST: u16 = LinkId::LAST;

    /// A tenant's number, or [`Self::NONE`], if `raw` can be one.
    pub const fn new(raw: u16) -> Option<Self> {
        if raw > Self::LAST {
            None
        } else {
            Some(Self(raw))
        }
    }

    pub const fn raw(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for Tenant {
    type Error = OutOfRange;
    fn try_from(raw: u16) -> Result<Self, OutOfRange> {
        Self::new(raw).ok_or(OutOfRange)
    }
}

impl From<Tenant> for u16 {
    fn from(tenant: Tenant) -> u16 {
        tenant.0
    }
}

impl TryFrom<u16> for LinkId {
    type Error = OutOfRange;
    fn try_from(raw: u16) -> Result<Self, OutOfRange> {
        Self::new(raw).ok_or(OutOfRange)
    }
}

impl From<LinkId> for u16 {
    fn from(id: LinkId) -> u16 {
        id.0
    }
}

impl fmt::Debug for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}", self.0)
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A number that the type cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange;

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Number out of range")
    }
}

impl core::error::Error for OutOfRange {}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The one address behind which every pod finds its gateway, on every node: locally administered, unicast.
    pub const GATEWAY: Self = Self([0x02, 0x53, 0x4c, 0x00, 0x00, 0x01]);
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// The address of the pod behind `link`: what the pod's `eth0` carries unless it was asked for another.
    pub const fn of_pod(link: LinkId) -> Self {
        let [hi, lo] = link.raw().to_be_bytes();
        Self([0x02, 0x53, 0x4c, 0x01, hi, lo])
    }

    /// Whether the group bit is set (multicast or broadcast).
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One consistent set of tables. Grows by one with each commit of a session; 0 means "nothing committed yet".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

/// What policy sees of an endpoint: all pods with equal labels in equal namespaces share one. 0 is "unknown, outside".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Identity(pub u32);

impl Identity {
    /// No pod that this cluster knows.
    pub const WORLD: Self = Self(0);
    /// The node itself.
    pub const HOST: Self = Self(1);
    /// A pod elsewhere of which there are no rows. It may what everybody may, unless a denial might be about it.
    pub const UNLISTED: Self = Self(2);
    /// Pods have identities from here on.
    pub const FIRST_POD: u32 = 256;

    /// Whether a pod is meant.
    pub const fn is_pod(self) -> bool {
        self.0 >= Self::FIRST_POD
    }
}

/// A transport protocol that Services and policies can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The number in the IP header.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol of that number, if Services can name it.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: &IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Bytes of an address on the wire.
    pub const fn address_length(self) -> usize {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }
}

/// A range of addresses that begin with the same bits; the other bits are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(IpAddr, u8)", into = "(IpAddr, u8)")]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// The range, if `length` is not longer than the address and no bit behind it is set.
    pub const fn new(address: IpAddr, length: u8) -> Option<Self> {
        let (bits, rest) = match address {
            IpAddr::V4(v4) => (32, v4.to_bits() as u128),
            IpAddr::V6(v6) => (128, v6.to_bits()),
        };
        if length > bits {
            return None;
        }
        let behind = bits - length;
        let mask = if behind == 128 {
            u128::MAX
        } else {
            (1 << behind) - 1
        };
        if rest & mask == 0 {
            Some(Self { address, length })
        } else {
            None
        }
    }

    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// Bits that the addresses have in common.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` lies in it.
    pub const fn contains(self, address: IpAddr) -> bool {
        let (one, other, bits) = match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() as u128, b.to_bits() as u128, 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
            _ => return false,
        };
        let behind = bits - self.length as u32;
        behind == 128 || (one ^ other) >> behind == 0
    }
}

impl TryFrom<(IpAddr, u8)> for Prefix {
    type Error = OutOfRange;
    fn try_from((address, length): (IpAddr, u8)) -> Result<Self, OutOfRange> {
        Self::new(address, length).ok_or(OutOfRange)
    }
}

impl From<Prefix> for (IpAddr, u8) {
    fn from(prefix: Prefix) -> Self {
        (prefix.address, prefix.length)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
