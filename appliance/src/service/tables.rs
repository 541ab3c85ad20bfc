//! The tables of Services in the form in which a packet needs them: each found by its key in constant time, none larger than
//! its capacity.

use crate::address::{Address, Family};
use crate::arena::{Arena, OutOfMemory};
use crate::flow::Flow;
use crate::hash::Hasher;
use crate::tables::{Place, Single};
use crate::twin::{Keyed, Slot, Twin};
use sluice_contract::service::{FrontendKind, PortId, SetId};
use sluice_contract::{Prefix, Protocol, limits};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How many rows of each kind there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub frontends: u32,
    pub ports: u32,
    pub sets: u32,
    pub backends: u32,
    /// Pieces of Maglev tables, each of [`limits::SLOT_CHUNK`] slots.
    pub chunks: u32,
    pub sources: u32,
    /// Clients whose backend is remembered.
    pub affinities: u32,
}

impl Limits {
    /// Some thousand Services, in about 8 MiB.
    pub const SMALL: Self = Self {
        frontends: 8_192,
        ports: 4_096,
        sets: 8_192,
        backends: 16_384,
        chunks: 1_024,
        sources: 1_024,
        affinities: 16_384,
    };
    /// 50 000 Services with 100 000 endpoints and room to change them, in about 110 MiB.
    pub const LARGE: Self = Self {
        frontends: 262_144,
        ports: 131_072,
        sets: 262_144,
        backends: 262_144,
        chunks: 8_192,
        sources: 16_384,
        affinities: 131_072,
    };
}

/// An address and port at which a Service is reached. The unspecified address stands for all addresses of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendKey {
    pub address: Address,
    pub port: u16,
    pub protocol: u8,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Frontend {
    address: Address,
    port: u16,
    protocol: u8,
    /// One more than the kind; 0: empty.
    kind: u8,
    service: u32,
}

impl FrontendKey {
    /// Where a flow to that place most probably finds its Service, if it can have one.
    #[inline]
    pub(super) fn of(flow: &Flow, place: Place) -> Option<Self> {
        Protocol::from_number(flow.protocol())?;
        let address = match place {
            Place::Cluster | Place::External => flow.destination(),
            Place::Node { ports: true } => Address::any(flow.destination().family()),
            _ => return None,
        };
        Some(Self {
            address,
            port: flow.destination_port(),
            protocol: flow.protocol(),
        })
    }
}

impl Frontend {
    pub const fn new(key: FrontendKey, kind: FrontendKind, service: PortId) -> Self {
        Self {
            address: key.address,
            port: key.port,
            protocol: key.protocol,
            kind: kind as u8 + 1,
            service: service.0,
        }
    }

    pub const fn service(&self) -> PortId {
        PortId(self.service)
    }

    pub const fn kind(&self) -> FrontendKind {
        match self.kind {
            1 => FrontendKind::ClusterIp,
            2 => FrontendKind::NodePort,
            3 => FrontendKind::ExternalIp,
            4 => FrontendKind::LoadBalancer,
            _ => FrontendKind::HostPort,
        }
    }
}

impl Slot for Frontend {}

impl Keyed for Frontend {
    type Key = FrontendKey;

    #[inline]
    fn key(&self) -> Option<FrontendKey> {
        (self.kind != 0).then_some(FrontendKey {
            address: self.address,
            port: self.port,
            protocol: self.protocol,
        })
    }

    #[inline]
    fn hash(key: &FrontendKey, hasher: &Hasher) -> u64 {
        let port = u64::from(key.port) | (u64::from(key.protocol) << 16);
        hasher.hash([key.address.high(), key.address.low(), port])
    }
}

/// One port of one Service.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Port {
    id: u32,
    /// Set ids plus one; 0: none.
    pub(super) sets: [u32; 3],
    /// In seconds; 0: none.
    pub affinity: u32,
    /// Frontends and source ranges that refer to this row.
    pub(super) references: u32,
    pub(super) flags: u8,
    pub(super) lengths: u8,
    pub(super) source_lengths: [u8; limits::SOURCE_LENGTHS],
    pad: [u8; 6],
}

/// Bits of [`Port::flags`].
pub(super) const PRESENT: u8 = 1;
pub(super) const V6: u8 = 2;
pub(super) const ENDPOINTS: u8 = 4;
pub(super) const INTERNAL_LOCAL: u8 = 8;
pub(super) const EXTERNAL_LOCAL: u8 = 16;
pub(super) const DIRECT_RETURN: u8 = 32;
/// Bit of [`Set::flags`], besides `PRESENT` and `V6`: its last row was refused, so it is not used.
pub(super) const REFUSED: u8 = 4;
/// Places in [`Port::sets`].
pub(super) const CLUSTER: usize = 0;
pub(super) const LOCAL: usize = 1;
pub(super) const SERVING: usize = 2;

impl Port {
    pub(super) fn empty_of(id: PortId) -> Self {
        Self {
            id: id.0,
            ..Self::empty()
        }
    }

    pub const fn family(&self) -> Family {
        family(self.flags)
    }

    pub const fn has_endpoints(&self) -> bool {
        self.flags & ENDPOINTS != 0
    }

    pub const fn internal_local(&self) -> bool {
        self.flags & INTERNAL_LOCAL != 0
    }

    pub const fn external_local(&self) -> bool {
        self.flags & EXTERNAL_LOCAL != 0
    }

    /// Whether clients outside are to be answered by the backend's node.
    pub const fn direct_return(&self) -> bool {
        self.flags & DIRECT_RETURN != 0
    }

    /// Where traffic may go that may go anywhere.
    pub fn cluster(&self) -> Option<SetId> {
        self.set(CLUSTER)
    }

    /// Where traffic may go that has to stay on this node.
    pub fn local(&self) -> Option<SetId> {
        self.set(LOCAL)
    }

    /// Who still serves.
    pub fn serving(&self) -> Option<SetId> {
        self.set(SERVING)
    }

    fn set(&self, which: usize) -> Option<SetId> {
        let raw = self.sets.get(which).copied().unwrap_or(0);
        raw.checked_sub(1).map(SetId)
    }

    /// Lengths of the source ranges.
    pub fn source_lengths(&self) -> impl Iterator<Item = u8> {
        self.source_lengths
            .into_iter()
            .take(usize::from(self.lengths))
    }
}

impl Slot for Port {}

impl Keyed for Port {
    type Key = u32;

    #[inline]
    fn key(&self) -> Option<u32> {
        (self.flags & PRESENT != 0).then_some(self.id)
    }

    #[inline]
    fn hash(key: &u32, hasher: &Hasher) -> u64 {
        hasher.hash_id(u64::from(*key))
    }
}

const fn family(flags: u8) -> Family {
    if flags & V6 != 0 {
        Family::V6
    } else {
        Family::V4
    }
}

/// A set of backends, and how much of it is there.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Set {
    id: u32,
    pub(super) references: u32,
    /// Sum of the indexes of the backends that are there.
    pub(super) index_sum: u32,
    /// The same of the pieces of the Maglev table.
    pub(super) chunk_sum: u32,
    pub(crate) count: u16,
    pub(super) backends: u16,
    pub(crate) slots: u16,
    pub(super) chunks: u16,
    /// Places that name an address and port which an earlier one names already.
    pub(super) repeats: u16,
    /// Of the Maglev table: another one when it changes its size. Never 0.
    pub(super) edition: u16,
    /// Pieces of earlier editions that are still there.
    pub(super) stale: u16,
    pub(super) flags: u8,
    pad: u8,
}

impl Set {
    pub(super) fn empty_of(id: SetId) -> Self {
        Self {
            id: id.0,
            edition: 1,
            ..Self::empty()
        }
    }

    /// A Maglev table of another size is another table: the pieces of the old one are to be replaced or removed.
    pub(super) fn resize(&mut self, slots: u16) {
        if self.slots == slots {
            return;
        }
        self.slots = slots;
        self.edition = self.edition.checked_add(1).unwrap_or(1);
        self.stale = self.stale.saturating_add(self.chunks);
        (self.chunks, self.chunk_sum) = (0, 0);
    }

    pub(crate) const fn id(&self) -> SetId {
        SetId(self.id)
    }

    pub(crate) const fn family(&self) -> Family {
        family(self.flags)
    }

    /// Whether the set may be used: everything is there that it consists of, and its row was taken. Of all sets of n different indexes only 0…n−1 has the least sum, so
    /// number and sum tell.
    pub(super) const fn is_complete(&self) -> bool {
        let chunks = self.slots.div_ceil(limits::SLOT_CHUNK as u16);
        self.backends == self.count
            && self.index_sum == least_sum(self.count)
            && self.chunks == chunks
            && self.chunk_sum == least_sum(chunks)
            && self.stale == 0
            && self.repeats == 0
            && self.flags & REFUSED == 0
    }

    /// How many parts are missing or too many, at least one if it is not complete.
    pub(super) const fn missing(&self) -> u32 {
        let chunks = self.slots.div_ceil(limits::SLOT_CHUNK as u16);
        let missing = self.count.abs_diff(self.backends) as u32
            + self.chunks.abs_diff(chunks) as u32
            + self.stale as u32;
        if missing == 0 { 1 } else { missing }
    }
}

const fn least_sum(count: u16) -> u32 {
    let count = count as u32;
    count * count.saturating_sub(1) / 2
}

impl Slot for Set {}

impl Keyed for Set {
    type Key = u32;

    #[inline]
    fn key(&self) -> Option<u32> {
        (self.flags & PRESENT != 0).then_some(self.id)
    }

    #[inline]
    fn hash(key: &u32, hasher: &Hasher) -> u64 {
        hasher.hash_id(u64::from(*key) | 1 << 32)
    }
}

/// A backend, by its place in its set.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Backend {
    pub(crate) address: Address,
    set: u32,
    index: u16,
    pub(crate) port: u16,
    present: u32,
    pad: u32,
}

impl Backend {
    pub(crate) const fn new(set: SetId, index: u16, address: Address, port: u16) -> Self {
        Self {
            address,
            set: set.0,
            index,
            port,
            present: 1,
            pad: 0,
        }
    }
}

impl Slot for Backend {}

impl Keyed for Backend {
    type Key = (u32, u16);

    #[inline]
    fn key(&self) -> Option<(u32, u16)> {
        (self.present != 0).then_some((self.set, self.index))
    }

    #[inline]
    fn hash(key: &(u32, u16), hasher: &Hasher) -> u64 {
        hasher.hash_id(u64::from(key.0) << 16 | u64::from(key.1))
    }
}

/// A backend, by its address: whether it is in the set at all.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Member {
    address: Address,
    set: u32,
    port: u16,
    /// Places in the set that name it. More than one only in the course of a change, when backends trade places.
    pub(super) places: u16,
}

impl Member {
    pub(super) const fn new(set: SetId, address: Address, port: u16, places: u16) -> Self {
        Self {
            address,
            set: set.0,
            port,
            places,
        }
    }
}

impl Slot for Member {}

impl Keyed for Member {
    type Key = (u32, Address, u16);

    #[inline]
    fn key(&self) -> Option<Self::Key> {
        (self.places != 0).then_some((self.set, self.address, self.port))
    }

    #[inline]
    fn hash((set, address, port): &Self::Key, hasher: &Hasher) -> u64 {
        let rest = u64::from(*set) << 16 | u64::from(*port);
        hasher.hash([address.high(), address.low(), rest])
    }
}

/// A piece of a Maglev table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Chunk {
    set: u32,
    chunk: u16,
    /// Of the Maglev table that it is a piece of, from [`Set::edition`]; 0: empty.
    pub(super) edition: u16,
    slots: [u16; limits::SLOT_CHUNK],
}

impl Chunk {
    pub(super) fn new(set: &Set, chunk: u16, slots: &[u16]) -> Self {
        let mut row = Self {
            set: set.id,
            chunk,
            edition: set.edition,
            slots: [0; limits::SLOT_CHUNK],
        };
        row.slots
            .iter_mut()
            .zip(slots)
            .for_each(|(to, from)| *to = *from);
        row
    }

    /// The backend's index in that slot.
    pub(crate) fn slot(&self, at: usize) -> Option<u16> {
        self.slots.get(at).copied()
    }
}

impl Slot for Chunk {}

impl Keyed for Chunk {
    type Key = (u32, u16);

    #[inline]
    fn key(&self) -> Option<(u32, u16)> {
        (self.edition != 0).then_some((self.set, self.chunk))
    }

    #[inline]
    fn hash(key: &(u32, u16), hasher: &Hasher) -> u64 {
        hasher.hash_id(u64::from(key.0) << 16 | u64::from(key.1) | 1 << 48)
    }
}

/// A range of sources that may use a Service.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Source {
    address: Address,
    service: u32,
    length: u8,
    present: u8,
    pad: [u8; 2],
}

impl Source {
    pub(crate) fn new(service: PortId, prefix: Prefix) -> Self {
        Self {
            address: prefix.address().into(),
            service: service.0,
            length: prefix.length(),
            present: 1,
            pad: [0; 2],
        }
    }
}

impl Slot for Source {}

impl Keyed for Source {
    type Key = (u32, u8, Address);

    #[inline]
    fn key(&self) -> Option<Self::Key> {
        (self.present != 0).then_some((self.service, self.length, self.address))
    }

    #[inline]
    fn hash((service, length, address): &Self::Key, hasher: &Hasher) -> u64 {
        let rest = u64::from(*service) << 8 | u64::from(*length);
        hasher.hash([address.high(), address.low(), rest])
    }
}

/// All tables of Services.
#[derive(Debug)]
pub struct Services<'m> {
    pub(crate) frontends: Twin<'m, Frontend>,
    pub(crate) ports: Twin<'m, Port>,
    pub(crate) sets: Twin<'m, Set>,
    pub(crate) backends: Twin<'m, Backend>,
    pub(crate) members: Twin<'m, Member>,
    pub(crate) chunks: Twin<'m, Chunk>,
    pub(crate) sources: Twin<'m, Source>,
    /// Sets that may not be used.
    pub(super) incomplete: Single<u32>,
    pub(crate) hasher: Hasher,
}

impl<'m> Services<'m> {
    /// Empty tables.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(
        arena: &mut Arena<'m>,
        limits: &Limits,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        Ok(Self {
            frontends: Twin::keyed(arena, limits.frontends, hasher)?,
            ports: Twin::keyed(arena, limits.ports, hasher)?,
            sets: Twin::keyed(arena, limits.sets, hasher)?,
            backends: Twin::keyed(arena, limits.backends, hasher)?,
            members: Twin::keyed(arena, limits.backends, hasher)?,
            chunks: Twin::keyed(arena, limits.chunks, hasher)?,
            sources: Twin::keyed(arena, limits.sources, hasher)?,
            incomplete: Single::default(),
            hasher,
        })
    }

    /// The frontend at an address, or at any address of the node.
    #[inline]
    pub fn frontend(&self, address: Address, protocol: Protocol, port: u16) -> Option<&Frontend> {
        self.frontends.find(FrontendKey {
            address,
            port,
            protocol: protocol.number(),
        })
    }

    #[inline]
    pub fn port(&self, id: PortId) -> Option<&Port> {
        self.ports.find(id.0)
    }

    /// Whether the set may be used.
    #[inline]
    pub fn is_usable(&self, set: SetId) -> bool {
        self.sets.find(set.0).is_some_and(Set::is_complete)
    }

    /// Whether the set has that backend.
    #[inline]
    pub fn has(&self, set: SetId, address: Address, port: u16) -> bool {
        self.members.find((set.0, address, port)).is_some()
    }
}
