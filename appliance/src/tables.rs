//! What the stages read: the committed rows, in the form in which a packet needs them. Only [`crate::apply`] writes.

mod known;
mod link;
mod rates;

use crate::address::{Address, Family};
use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use crate::names;
use crate::overlay::{self, Overlay};
use crate::policy::{self, Policy};
use crate::service::{self, Services};
use crate::twin::Twin;
use heapless::Vec;
use sluice_contract::message::Room;
use sluice_contract::overlay::NextHopId;
use sluice_contract::row::NodeRow;
use sluice_contract::service::{ConnectionsRow, NatRow, PrefixUse};
use sluice_contract::{DropReason, Generation, LinkId, Mac, Prefix, limits};

pub use known::{Known, Place};
pub use link::Link;
pub use rates::Rates;

/// How many rows of each kind there is room for. The guest computes it from its RAM, once, at boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Links of pods; the uplink and the host come on top.
    pub pods: u32,
    /// Addresses with a meaning that are not a pod's: of nodes and of Services.
    pub addresses: u32,
    pub services: service::Limits,
    pub policy: policy::Limits,
    pub connections: u32,
    /// Fragments that wait for the first one of their datagram, each up to 2 KiB.
    pub fragments: u32,
    pub overlay: overlay::Limits,
    pub learned: names::Limits,
}

impl Default for Capacity {
    /// A node of a small cluster, in about 48 MiB.
    fn default() -> Self {
        Self {
            pods: 512,
            addresses: 8_192,
            services: service::Limits::SMALL,
            policy: policy::Limits::SMALL,
            connections: 131_072,
            fragments: 1_024,
            overlay: overlay::Limits::SMALL,
            learned: names::Limits::SMALL,
        }
    }
}

impl Capacity {
    /// As little as tests need, in about 4 MiB.
    pub const TINY: Self = Self {
        pods: 256,
        addresses: 256,
        services: service::Limits {
            frontends: 256,
            ports: 128,
            sets: 256,
            backends: 1_024,
            chunks: 128,
            sources: 64,
            affinities: 256,
        },
        policy: policy::Limits {
            identities: 256,
            bindings: 300,
            rulesets: 64,
            classes: 256,
            spans: 256,
            names: 32,
            named: 64,
        },
        connections: 4_096,
        fragments: 64,
        overlay: overlay::Limits {
            peers: 64,
            next_hops: 512,
            prefixes: 256,
        },
        learned: names::Limits {
            pods: 8,
            addresses: 128,
        },
    };

    /// A node of a large cluster: a million connections, 50 000 Services, 500 000 pods to tell apart. In about 450 MiB.
    pub const LARGE: Self = Self {
        pods: 1_024,
        addresses: 131_072,
        services: service::Limits::LARGE,
        policy: policy::Limits::LARGE,
        connections: 1_048_576,
        fragments: 2_048,
        overlay: overlay::Limits::LARGE,
        learned: names::Limits::LARGE,
    };
}

/// Bytes of what does not depend on the capacity: links, their counters and buckets, maps of fragments. Generous.
const FIXED: usize = 3 << 20;

impl Capacity {
    /// The largest of the capacities that this memory holds; the smallest if it holds none, which then says so.
    pub fn fitting(bytes: usize) -> Self {
        [Self::LARGE, Self::default()]
            .into_iter()
            .find(|capacity| capacity.bytes() <= bytes)
            .unwrap_or(Self::TINY)
    }

    /// What of it objects of the cluster fill.
    pub fn room(&self) -> Room {
        let Self {
            services, policy, ..
        } = self;
        let rows = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Room {
            addresses: self.addresses,
            frontends: services.frontends,
            ports: services.ports,
            sets: services.sets,
            backends: services.backends,
            chunks: services.chunks,
            sources: services.sources,
            identities: rows(policy.identities),
            bindings: rows(policy.bindings),
            rulesets: rows(policy.rulesets),
            classes: rows(policy.classes),
            spans: rows(policy.spans),
            names: rows(policy.names),
            named: rows(policy.named),
        }
    }

    /// Bytes that a pipeline of this capacity takes from its arena, at most.
    pub fn bytes(&self) -> usize {
        let twin = |rows: u32, size: usize| 2 * slots(rows) * size + slots(rows) / 64;
        let services = &self.services;
        let policy = &self.policy;
        FIXED
            + twin(
                self.addresses + (self.pods + 2) * limits::LINK_ADDRESSES as u32,
                24,
            )
            + twin(services.frontends, 24)
            + twin(services.ports, 48)
            + twin(services.sets, 32)
            + twin(services.backends, 32)
            + twin(services.backends, 24)
            + twin(services.chunks, 488)
            + twin(services.sources, 24)
            + (services.affinities as usize).next_power_of_two() * 48
            + policy.bytes()
            + self.learned.bytes()
            + crate::Conntrack::region_bytes(self.connections).unwrap_or(usize::MAX / 2)
            + crate::conntrack::Sources::bytes(self.connections)
            + self.fragments as usize * 2112
            + self.overlay.bytes()
    }
}

/// Slots of a table that is at most half full.
pub(crate) fn slots(rows: u32) -> usize {
    (rows as usize).max(8).saturating_mul(2).next_power_of_two()
}

/// A value in two copies, like a [`Twin`] of one row.
#[derive(Clone, Debug, Default)]
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

/// A range of addresses, in the form in which it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range<T> {
    pub prefix: Prefix,
    pub meaning: T,
    bits: u128,
    /// Of the sixteen bytes.
    length: u32,
}

impl<T> Range<T> {
    pub fn new(prefix: Prefix, meaning: T) -> Self {
        let mapped = if prefix.address().is_ipv4() { 96 } else { 0 };
        Self {
            prefix,
            meaning,
            bits: u128::from_be_bytes(Address::from(prefix.address()).0),
            length: mapped + u32::from(prefix.length()),
        }
    }

    /// Whether `address` lies in it. `::/0` does not contain IPv4.
    #[inline]
    pub fn contains(&self, address: Address) -> bool {
        let differ = u128::from_be_bytes(address.0) ^ self.bits;
        differ.checked_shr(128 - self.length).unwrap_or(0) == 0
            && (self.length >= 96 || address.family() == Family::V6)
    }

    pub const fn length(&self) -> u32 {
        self.length
    }
}

/// How the node translates.
#[derive(Clone, Debug, Default)]
pub struct Nat {
    pub row: NatRow,
    /// Whether the host has said anything.
    pub present: bool,
}

impl Nat {
    /// The source of what is masqueraded.
    pub fn address(&self, family: Family) -> Option<Address> {
        match family {
            Family::V4 => self.row.node4.map(Address::from),
            Family::V6 => self.row.node6.map(Address::from),
        }
    }
}

/// All tables, with the generation that is in force.
#[derive(Debug)]
pub struct Tables<'m> {
    pub(crate) node: Single<Node>,
    pub(crate) links: Twin<'m, Link>,
    pub(crate) rates: Twin<'m, Rates>,
    pub(crate) known: Twin<'m, Known>,
    pub(crate) ranges: Single<Vec<Range<PrefixUse>, { limits::PREFIXES }>>,
    pub(crate) routes: Single<Vec<Range<Option<NextHopId>>, { limits::ROUTES }>>,
    pub(crate) nat: Single<Nat>,
    pub(crate) connections: Single<ConnectionsRow>,
    pub(crate) services: Services<'m>,
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
        let addresses = (capacity.pods + 2)
            .saturating_mul(limits::LINK_ADDRESSES as u32)
            .saturating_add(capacity.addresses);
        Ok(Self {
            node: Single::default(),
            links: Twin::direct(arena, usize::from(LinkId::LAST) + 1)?,
            rates: Twin::direct(arena, usize::from(LinkId::LAST) + 1)?,
            known: Twin::keyed(arena, addresses, hasher)?,
            ranges: Single::default(),
            routes: Single::default(),
            nat: Single::default(),
            connections: Single::default(),
            services: Services::new(arena, &capacity.services, hasher)?,
            policy: Policy::new(arena, &capacity.policy, hasher)?,
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

    /// How many packets and connections a link may carry in a second.
    pub fn rates(&self, id: LinkId) -> Option<&Rates> {
        self.rates.live_at(id.index())
    }

    /// The link of that id, if it is configured.
    #[inline]
    pub fn link(&self, id: LinkId) -> Option<&Link> {
        self.links
            .live_at(id.index())
            .filter(|link| link.is_present())
    }

    /// Where `address` is. An external address of a Service that lies behind a peer is the peer's.
    #[inline]
    pub fn place(&self, address: Address) -> Place {
        match self.known.find(address).map(Known::place) {
            Some(Place::External) if self.overlay.remote(address).is_some() => Place::Elsewhere,
            Some(place) => place,
            None => Place::Elsewhere,
        }
    }

    /// What the range is for in which `address` lies; the most special of all it lies in.
    ///
    /// # Cost
    /// A comparison per range: [`limits::PREFIXES`] at most.
    pub fn purpose(&self, address: Address) -> Option<PrefixUse> {
        longest(&self.ranges.live, address).map(|range| range.meaning)
    }

    /// Whether `address` belongs to the cluster or to one of its nodes: to a pod here or behind a peer, a Service, a node, or a
    /// range of pods or Services.
    ///
    /// # Cost
    /// Four lookups and a comparison per range.
    pub fn is_in_cluster(&self, address: Address) -> bool {
        self.place(address) != Place::Elsewhere
            || self.overlay.remote(address).is_some()
            || self.overlay.peer_at(address).is_some()
            || self.policy.identity_of(address.into()).is_pod()
            || matches!(
                self.purpose(address),
                Some(PrefixUse::Pods | PrefixUse::Services)
            )
    }

    /// Which neighbor on the uplink is next on the way to `address`.
    ///
    /// # Cost
    /// A comparison per route: [`limits::ROUTES`] at most.
    ///
    /// # Errors
    /// [`DropReason::NoRoute`]; [`DropReason::NoNeighbor`] if it is to be the destination itself, and nothing is known of it.
    pub fn route(&self, address: Address) -> Result<NextHopId, DropReason> {
        let range = longest(&self.routes.live, address).ok_or(DropReason::NoRoute)?;
        let on_link = || self.overlay.neighbor_at(address);
        range.meaning.or_else(on_link).ok_or(DropReason::NoNeighbor)
    }

    pub const fn services(&self) -> &Services<'m> {
        &self.services
    }

    pub const fn policy(&self) -> &Policy<'m> {
        &self.policy
    }

    /// How the node translates; `None`: not at all.
    pub fn nat(&self) -> Option<&Nat> {
        self.nat.live.present.then_some(&self.nat.live)
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

fn longest<T>(ranges: &[Range<T>], address: Address) -> Option<&Range<T>> {
    let mut found: Option<&Range<T>> = None;
    for range in ranges {
        let better = found.is_none_or(|best| range.length() > best.length());
        if better && range.contains(address) {
            found = Some(range);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pipeline;

    #[test]
    fn a_capacity_says_how_much_memory_it_takes() {
        for capacity in [Capacity::TINY, Capacity::default()] {
            let mut memory = std::vec![0u8; capacity.bytes()];
            let mut arena = Arena::new(&mut memory);
            Pipeline::new(&mut arena, capacity, [1; 16]).unwrap();
            let spare = arena.left();
            assert!(spare < FIXED, "{spare} of {}", capacity.bytes());
        }
        let small = Capacity::default().bytes();
        assert!(small < 48 << 20, "{small}");
        let large = Capacity::LARGE.bytes();
        assert!(large < 480 << 20, "{large}");
        assert_eq!(Capacity::fitting(small), Capacity::default());
        assert_eq!(Capacity::fitting(small - 1), Capacity::TINY);
        assert_eq!(Capacity::fitting(usize::MAX), Capacity::LARGE);
    }

    #[test]
    fn a_range_contains_what_its_prefix_contains() {
        for (text, length, inside, outside) in [
            ("10.0.0.0", 8, "10.255.1.2", "11.0.0.0"),
            ("0.0.0.0", 0, "9.9.9.9", "::1:0:0:1"),
            ("::", 0, "fd00::1", "10.0.0.1"),
            ("fd00::", 8, "fd12::1", "fe00::1"),
            ("10.1.2.3", 32, "10.1.2.3", "10.1.2.2"),
        ] {
            let prefix = Prefix::new(text.parse().unwrap(), length).unwrap();
            let range = Range::new(prefix, ());
            let address = |text: &str| Address::from(text.parse::<core::net::IpAddr>().unwrap());
            assert!(range.contains(address(inside)), "{text}/{length}");
            assert!(!range.contains(address(outside)), "{text}/{length}");
        }
    }
}
