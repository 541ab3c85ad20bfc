//! What is known of single addresses.

use crate::address::Address;
use crate::hash::Hasher;
use crate::twin::{Keyed, Slot};
use sluice_contract::LinkId;
use sluice_contract::service::AddressRole;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What is known of an address: which link it lies behind, or which part it plays.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Known {
    pub address: Address,
    /// 0: none.
    link: u16,
    /// One more than the role; 0: none.
    role: u8,
    pad: [u8; 5],
}

/// Where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A pod or whatever is behind this link.
    Link(LinkId),
    /// This node itself; `ports`: node ports are served there.
    Node { ports: bool },
    /// Another node.
    Peer,
    /// A Service's own address.
    Cluster,
    /// An address from outside that Services use.
    External,
    /// Nobody has said.
    Elsewhere,
}

impl Slot for Known {}

impl Known {
    /// Nothing is known of it yet.
    pub fn of(address: Address) -> Self {
        Self {
            address,
            ..Self::empty()
        }
    }

    pub const fn link(&self) -> Option<LinkId> {
        LinkId::new(self.link)
    }

    pub fn role(&self) -> Option<AddressRole> {
        Some(match self.role {
            1 => AddressRole::Node,
            2 => AddressRole::NodeWithoutPorts,
            3 => AddressRole::Peer,
            4 => AddressRole::Cluster,
            5 => AddressRole::External,
            _ => return None,
        })
    }

    #[must_use]
    pub fn with_link(self, link: Option<LinkId>) -> Self {
        Self {
            link: link.map_or(0, LinkId::raw),
            ..self
        }
    }

    #[must_use]
    pub fn with_role(self, role: Option<AddressRole>) -> Self {
        Self {
            role: role.map_or(0, |role| role as u8 + 1),
            ..self
        }
    }

    /// What it all amounts to. The node's addresses also stand at the host's link, and a link keeps its address whatever a
    /// Service claims.
    #[inline]
    pub fn place(&self) -> Place {
        match (self.role, self.link()) {
            (1, _) => Place::Node { ports: true },
            (2, _) | (0 | 5, Some(LinkId::HOST)) => Place::Node { ports: false },
            (0 | 5, Some(link)) => Place::Link(link),
            (3, _) => Place::Peer,
            (4, _) => Place::Cluster,
            (5, _) => Place::External,
            _ => Place::Elsewhere,
        }
    }
}

impl Keyed for Known {
    type Key = Address;

    #[inline]
    fn key(&self) -> Option<Address> {
        (self.link != 0 || self.role != 0).then_some(self.address)
    }

    #[inline]
    fn hash(key: &Address, hasher: &Hasher) -> u64 {
        hasher.hash([key.high(), key.low()])
    }
}
