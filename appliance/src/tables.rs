//! What the stages read: the committed rows, in the form in which a packet needs them. Only [`crate::apply`] writes.

use crate::address::{Address, Family};
use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use crate::overlay::{self, Overlay};
use crate::policy::{self, Policy};
use crate::twin::{Keyed, Slot, Twin};
use sluice_contract::row::NodeRow;
use sluice_contract::{Generation, Identity, LinkId, Mac, limits};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How many rows of each kind there is room for. The guest computes it from its RAM, once, at boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Links of pods; the uplink and the host come on top.
    pub pods: u32,
    pub policy: policy::Limits,
    pub overlay: overlay::Limits,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            pods: 512,
            policy: policy::Limits::SMALL,
            overlay: overlay::Limits::SMALL,
        }
    }
}

/// A value in two copies, like a [`Twin`] of one row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single<T> {
    pub live: T,
    pub shadow: T,
}

/// What holds for the whole node.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    pub gateway4: Address,
    pub gateway6: Address,
    pub gateway_mac: Mac,
}

impl From<&NodeRow> for Node {
    fn from(row: &NodeRow) -> Self {
        Self {
            gateway4: row.gateway4.into(),
            gateway6: row.gateway6.into(),
            gateway_mac: row.gateway_mac,
        }
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::from(&NodeRow::default())
    }
}

impl Node {
    /// The gateway's address of a family.
    pub const fn gateway(&self, family: Family) -> Address {
        match family {
            Family::V4 => self.gateway4,
            Family::V6 => self.gateway6,
        }
    }
}

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
    pad: [u8; 14],
    addresses: [Address; limits::LINK_ADDRESSES],
    rest: [u8; 32],
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
            pad: [0; 14],
            addresses,
            rest: [0; 32],
        }
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

/// Which link leads to an address.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Local {
    pub address: Address,
    link: u16,
    pad: [u8; 6],
}

impl Slot for Local {}

impl Local {
    pub const fn new(address: Address, link: LinkId) -> Self {
        Self {
            address,
            link: link.raw(),
            pad: [0; 6],
        }
    }

    pub const fn link(&self) -> Option<LinkId> {
        LinkId::new(self.link)
    }
}

impl Keyed for Local {
    type Key = Address;

    #[inline]
    fn key(&self) -> Option<Address> {
        (self.link != 0).then_some(self.address)
    }

    #[inline]
    fn hash(key: &Address, hasher: &Hasher) -> u64 {
        hasher.hash([key.high(), key.low()])
    }
}

/// All tables, with the generation that is in force.
#[derive(Debug)]
pub struct Tables<'m> {
    pub(crate) node: Single<Node>,
    pub(crate) links: Twin<'m, Link>,
    pub(crate) locals: Twin<'m, Local>,
    pub(crate) policy: Policy<'m>,
    pub(crate) overlay: Overlay<'m>,
    pub(crate) generation: Generation,
    /// Grows with every commit, whatever generation the host calls it.
    pub(crate) epoch: u32,
}

impl<'m> Tables<'m> {
    /// Empty tables.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(
        arena: &mut Arena<'m>,
        capacity: &Capacity,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        // Two more: the uplink and the host have addresses as well.
        let addresses = (capacity.pods + 2).saturating_mul(limits::LINK_ADDRESSES as u32);
        Ok(Self {
            node: Single::default(),
            links: Twin::direct(arena, usize::from(LinkId::LAST) + 1)?,
            locals: Twin::keyed(arena, addresses, hasher)?,
            policy: Policy::new(arena, &capacity.policy)?,
            overlay: Overlay::new(arena, &capacity.overlay, hasher)?,
            generation: Generation::default(),
            epoch: 0,
        })
    }

    /// What holds for the whole node.
    #[inline]
    pub const fn node(&self) -> &Node {
        &self.node.live
    }

    /// The link of that id, if it is configured.
    #[inline]
    pub fn link(&self, id: LinkId) -> Option<&Link> {
        self.links
            .live_at(id.index())
            .filter(|link| link.is_present())
    }

    /// The link behind which `address` lies on this node.
    #[inline]
    pub fn local(&self, address: Address) -> Option<LinkId> {
        self.locals.find(address).and_then(Local::link)
    }

    /// The way to other nodes.
    #[inline]
    pub const fn overlay(&self) -> &Overlay<'m> {
        &self.overlay
    }

    /// The generation in force; 0 before the first commit.
    pub const fn generation(&self) -> Generation {
        self.generation
    }
}
