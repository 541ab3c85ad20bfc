//! A link: who is behind it, and how what it carries is treated.

use crate::address::Address;
use crate::bandwidth::{Direction, Limit};
use crate::group::Group;
use crate::twin::Slot;
use sluice_contract::{Identity, LinkId, Mac, Tenant, limits};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bits of what is limited.
const BANDWIDTH: u8 = 1;
const PACKETS: u8 = 2;
const CONNECTIONS: u8 = 4;

/// A link, in two cache lines; most packets need only the first.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Link {
    mac: [u8; 6],
    pub mtu: u16,
    identity: u32,
    pub incarnation: u32,
    present: u8,
    count: u8,
    /// What is limited: a bit for each kind.
    limited: u8,
    /// One more than the DSCP of what comes from it; 0: as it came.
    mark: u8,
    tenant: u16,
    pad: [u8; 10],
    addresses: [Address; limits::LINK_ADDRESSES],
    /// To the pod and from it.
    limits: [Limit; 2],
}

impl Slot for Link {}

impl Link {
    /// A link of that description.
    pub fn new(row: &sluice_contract::row::LinkRow) -> Self {
        let mut addresses = [Address::UNSPECIFIED; limits::LINK_ADDRESSES];
        let mut count = 0;
        for (to, from) in addresses.iter_mut().zip(&row.addresses) {
            *to = (*from).into();
            count += 1;
        }
        Self {
            mac: row.mac.0,
            mtu: row.mtu,
            identity: row.identity.0,
            incarnation: row.incarnation,
            present: 1,
            count,
            limited: 0,
            mark: 0,
            tenant: row.tenant.raw(),
            pad: [0; 10],
            addresses,
            limits: [Limit::default(); 2],
        }
    }

    /// The same with the limits and the mark of `other`.
    #[must_use]
    pub fn treated_as(self, other: &Self) -> Self {
        Self {
            limited: other.limited,
            mark: other.mark,
            limits: other.limits,
            ..self
        }
    }

    /// The same with limits to the pod and from it.
    #[must_use]
    pub fn with_limits(self, ingress: Limit, egress: Limit) -> Self {
        Self {
            limited: self.limited & !BANDWIDTH
                | if ingress.is_none() && egress.is_none() {
                    0
                } else {
                    BANDWIDTH
                },
            limits: [ingress, egress],
            ..self
        }
    }

    /// The same with this DSCP for what comes from it, or none.
    #[must_use]
    pub const fn with_mark(self, dscp: Option<u8>) -> Self {
        let mark = match dscp {
            Some(dscp) => dscp.saturating_add(1),
            None => 0,
        };
        Self { mark, ..self }
    }

    /// The DSCP of what comes from it; `None`: whatever the pod chose.
    #[inline]
    pub const fn mark(&self) -> Option<u8> {
        self.mark.checked_sub(1)
    }

    /// How much it may carry in a direction; `None`: whatever comes.
    #[inline]
    pub fn limit(&self, direction: Direction) -> Option<&Limit> {
        if !self.has_bandwidth() {
            return None;
        }
        let limit = self.limits.get(direction as usize)?;
        (!limit.is_none()).then_some(limit)
    }

    /// The same with these kinds of rates limited, or not.
    #[must_use]
    pub const fn with_rates(self, packets: bool, connections: bool) -> Self {
        let packets = if packets { PACKETS } else { 0 };
        let connections = if connections { CONNECTIONS } else { 0 };
        Self {
            limited: self.limited & BANDWIDTH | packets | connections,
            ..self
        }
    }

    /// Whether there is a limit to its packets or their bytes in any direction.
    #[inline]
    pub const fn is_limited(&self) -> bool {
        self.limited & (BANDWIDTH | PACKETS) != 0
    }

    /// Whether there is a limit to its bytes in any direction.
    pub const fn has_bandwidth(&self) -> bool {
        self.limited & BANDWIDTH != 0
    }

    /// Whether there is a limit to its packets in any direction.
    pub const fn has_packet_rate(&self) -> bool {
        self.limited & PACKETS != 0
    }

    /// Whether there is a limit to new connections in any direction.
    pub const fn has_connection_rate(&self) -> bool {
        self.limited & CONNECTIONS != 0
    }

    pub const fn is_present(&self) -> bool {
        self.present != 0
    }

    pub const fn mac(&self) -> Mac {
        Mac(self.mac)
    }

    pub const fn identity(&self) -> Identity {
        Identity(self.identity)
    }

    /// With whom the link, whose id is `id`, shares room.
    #[inline]
    pub fn group(&self, id: LinkId) -> Group {
        Group::of(id, Tenant::new(self.tenant).unwrap_or_default())
    }

    /// The addresses behind the link.
    pub fn addresses(&self) -> impl Iterator<Item = Address> {
        self.addresses.into_iter().take(usize::from(self.count))
    }

    /// Whether a packet from this link may claim to come from `source`.
    #[inline]
    pub fn owns(&self, source: Address) -> bool {
        self.addresses().any(|own| own == source)
    }
}
