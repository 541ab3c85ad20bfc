//! Who talks to whom: the five-tuple of a packet, its reversal, and the keyed hash under which tables find it.
//!
//! The hash is SipHash-1-3 with a secret 128-bit key, so nobody outside can choose flows that meet in one bucket. It is
//! symmetric: a flow and its reversal hash alike, so one hash per packet serves both directions.
//!
//! Ports of protocols without ports: an ICMP query has the identifier on the asking side and 0 on the answering side, so
//! that the answer's flow is exactly the reversal of the question's. Everything else without ports has 0 on both sides.

use crate::address::{Address, Family};
use crate::hash::Hasher;
use crate::wire::protocol;

/// The five-tuple of a packet, as it travels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    source: Address,
    destination: Address,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
    v6: bool,
}

impl Flow {
    /// Nobody's.
    pub(crate) const NONE: Self = Self {
        source: Address::UNSPECIFIED,
        destination: Address::UNSPECIFIED,
        source_port: 0,
        destination_port: 0,
        protocol: 0,
        v6: true,
    };

    /// A flow between two addresses of one family.
    #[inline]
    pub fn new(
        source: Address,
        destination: Address,
        protocol: u8,
        source_port: u16,
        destination_port: u16,
    ) -> Self {
        Self {
            source,
            destination,
            source_port,
            destination_port,
            protocol,
            v6: source.family() == Family::V6 || destination.family() == Family::V6,
        }
    }

    /// What an answer's flow is.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }

    /// The same flow from another source of the same family.
    #[must_use]
    pub fn with_source(self, source: Address, source_port: u16) -> Self {
        Self::new(
            source,
            self.destination,
            self.protocol,
            source_port,
            self.destination_port,
        )
    }

    /// The same flow to another destination of the same family.
    #[must_use]
    pub fn with_destination(self, destination: Address, destination_port: u16) -> Self {
        Self::new(
            self.source,
            destination,
            self.protocol,
            self.source_port,
            destination_port,
        )
    }

    pub const fn source(&self) -> Address {
        self.source
    }

    pub const fn destination(&self) -> Address {
        self.destination
    }

    pub const fn source_port(&self) -> u16 {
        self.source_port
    }

    pub const fn destination_port(&self) -> u16 {
        self.destination_port
    }

    pub const fn protocol(&self) -> u8 {
        self.protocol
    }

    pub const fn is_v6(&self) -> bool {
        self.v6
    }

    /// The family of its addresses.
    pub const fn family(&self) -> Family {
        if self.v6 { Family::V6 } else { Family::V4 }
    }

    /// Whether this is an ICMP query or its answer, of either family.
    pub const fn is_icmp(&self) -> bool {
        matches!(self.protocol, protocol::ICMP | protocol::ICMP6)
    }

    /// The hash of this flow and of its reversal.
    ///
    /// # Cost
    /// Two SipHash words for IPv4, five for IPv6; no branch depends on the addresses' order.
    #[inline]
    pub fn hash(&self, hasher: &Hasher) -> FlowHash {
        FlowHash(if self.v6 {
            self.hash6(hasher)
        } else {
            self.hash4(hasher)
        })
    }

    #[inline]
    fn hash4(&self, hasher: &Hasher) -> u64 {
        let end = |address: Address, port| ((address.low() & 0xffff_ffff) << 16) | u64::from(port);
        let from = end(self.source, self.source_port);
        let to = end(self.destination, self.destination_port);
        let (low, high) = (from.min(to), from.max(to));
        let ports = (low & 0xffff) | ((high & 0xffff) << 16);
        let rest = ports | (u64::from(self.protocol) << 32);
        hasher.hash([(low >> 16) | ((high >> 16) << 32), rest])
    }

    #[inline]
    fn hash6(&self, hasher: &Hasher) -> u64 {
        let from = u128::from_le_bytes(self.source.0);
        let to = u128::from_le_bytes(self.destination.0);
        let swap = (from, self.source_port) > (to, self.destination_port);
        let mask = u128::from(swap).wrapping_neg();
        let mix = (from ^ to) & mask;
        let (low, high) = (from ^ mix, to ^ mix);
        let mix = (self.source_port ^ self.destination_port) & (mask as u16);
        let ports =
            u64::from(self.source_port ^ mix) | (u64::from(self.destination_port ^ mix) << 16);
        let rest = ports | (u64::from(self.protocol) << 32);
        hasher.hash([
            low as u64,
            (low >> 64) as u64,
            high as u64,
            (high >> 64) as u64,
            rest,
        ])
    }
}

impl core::fmt::Display for Flow {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (open, close) = if self.v6 { ("[", "]") } else { ("", "") };
        write!(
            f,
            "{} {open}{}{close}:{} > {open}{}{close}:{}",
            self.protocol,
            self.source(),
            self.source_port,
            self.destination(),
            self.destination_port
        )
    }
}

impl core::fmt::Debug for Flow {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// Which way a packet of a connection travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// As the packet that opened the connection.
    Original,
    /// Back.
    Reply,
}

impl Direction {
    /// The other one.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Original => Self::Reply,
            Self::Reply => Self::Original,
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

/// A flow's hash under one key; the reversed flow has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowHash(pub(crate) u64);

impl FlowHash {
    /// The number itself: for spreading flows over queues, source ports of tunnels and the like.
    pub const fn get(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flow(p: u16, q: u16) -> Flow {
        Flow::new(
            Address::v4([10, 0, 0, 1]),
            Address::v4([10, 0, 0, 2]),
            6,
            p,
            q,
        )
    }

    proptest! {
        #[test]
        fn a_flow_and_its_reversal_hash_alike(
            a: [u8; 16], b: [u8; 16], p: u16, q: u16, protocol: u8, key: [u8; 16], v6: bool
        ) {
            let address = |x: [u8; 16]| if v6 {
                Address(x)
            } else {
                Address::v4([x[0], x[1], x[2], x[3]])
            };
            let flow = Flow::new(address(a), address(b), protocol, p, q);
            let hasher = Hasher::new(key);
            prop_assert_eq!(flow.hash(&hasher), flow.reversed().hash(&hasher));
            prop_assert_eq!(flow.reversed().reversed(), flow);
        }
    }

    #[test]
    fn ports_stay_with_their_addresses() {
        let hasher = Hasher::new([7; 16]);
        assert_ne!(flow(1, 2).hash(&hasher), flow(2, 1).hash(&hasher));
    }
}
