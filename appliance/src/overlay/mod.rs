//! The way to other nodes: the tunnel's format, the peers, which addresses lie behind each, the next hops of the uplink.
//!
//! Rows come from [`crate::apply`]; packets only read. Peers and next hops are found by number, so a change of a MAC or of a
//! peer's path is one row, whatever number of ranges lies behind it. What refers to what is counted, so a row that is
//! referred to is never taken away.

mod apply;
pub mod target;

pub use target::Target;

use crate::address::{Address, Family};
use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use crate::lpm::Lpm;
use crate::mtu::{self, Learned};
use crate::tables::{Single, slots};
use crate::twin::{Keyed, Slot, Twin};
use sluice_contract::overlay::{NextHopId, PeerId, TunnelProtocol, TunnelRow};
use sluice_contract::{DropReason, Mac};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How many rows of each kind there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub peers: u16,
    pub next_hops: u16,
    pub prefixes: u32,
}

impl Limits {
    pub const SMALL: Self = Self {
        peers: 256,
        next_hops: 1024,
        prefixes: 4096,
    };
    /// Row O-04: 5 000 nodes, 500 000 ranges.
    pub const LARGE: Self = Self {
        peers: 5120,
        next_hops: 6144,
        prefixes: 500_000,
    };

    /// Bytes of all tables, at most.
    pub fn bytes(&self) -> usize {
        let twin = |slots: usize, size: usize| 2 * slots * size + slots / 64 + 192;
        let peers = usize::from(self.peers);
        twin(usize::from(self.next_hops), size_of::<Hop>())
            + twin(peers, size_of::<Peer>())
            + twin(slots(self.peers.into()), size_of::<Numbered>())
            + twin(slots(self.next_hops.into()), size_of::<Numbered>())
            + Lpm::bytes(self.prefixes)
            + Learned::bytes(peers)
    }
}

/// How packets are wrapped.
#[derive(Clone, Copy, Debug)]
pub struct Tunnel {
    pub protocol: TunnelProtocol,
    pub port: u16,
    pub vni: u32,
    pub mac: Mac,
    pub source4: Option<Address>,
    pub source6: Option<Address>,
    pub zero_checksum6: bool,
    pub copy_dscp: bool,
    pub clamp_mss: bool,
}

impl Tunnel {
    /// The outer source address of a family.
    pub const fn source(&self, family: Family) -> Option<Address> {
        match family {
            Family::V4 => self.source4,
            Family::V6 => self.source6,
        }
    }
}

impl From<&TunnelRow> for Tunnel {
    fn from(row: &TunnelRow) -> Self {
        Self {
            protocol: row.protocol,
            port: row.port,
            vni: row.vni,
            mac: row.mac,
            source4: row.source4.map(Address::from),
            source6: row.source6.map(Address::from),
            zero_checksum6: row.zero_checksum6,
            copy_dscp: row.copy_dscp,
            clamp_mss: row.clamp_mss,
        }
    }
}

/// A neighbor on the uplink.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Hop {
    address: Address,
    mac: [u8; 6],
    present: u8,
    answers: u8,
    /// Peers and routes that use it.
    users: u32,
}

impl Slot for Hop {}

/// Another node, in one cache line.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Peer {
    pub address: Address,
    mac: [u8; 6],
    /// The largest packet that the underlay takes.
    pub mtu: u16,
    next_hop: u16,
    present: u8,
    direct: u8,
    /// Ranges behind it.
    users: u32,
    /// Secret: see [`Peer::mark`].
    cookie: u32,
    rest: [u8; 28],
}

impl Slot for Peer {}

impl Peer {
    /// Its MAC inside the tunnel.
    pub const fn mac(&self) -> Mac {
        Mac(self.mac)
    }

    /// Whether packets go to it as they are.
    pub const fn is_direct(&self) -> bool {
        self.direct != 0
    }

    /// What the outer header of a packet to it carries in the IPv4 identification, whose value is free
    /// where DF is set (RFC 6864 §4.1), or the IPv6 flow label: the same for all packets of an outer
    /// source port. Without seeing such a packet nobody can quote it in an ICMP error.
    #[inline]
    pub const fn mark(&self, source_port: u16) -> u32 {
        self.cookie ^ source_port as u32
    }
}

/// The secret of a peer, which changes with each start of the appliance.
fn cookie(address: Address, hasher: &Hasher) -> u32 {
    const TAG: u64 = u64::from_be_bytes(*b"path-mtu");
    hasher.hash([TAG, address.high(), address.low()]) as u32
}

/// Which peer, or which neighbor, has an underlay address.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Numbered {
    address: Address,
    number: u16,
    present: u8,
    pad: u8,
}

impl Slot for Numbered {}

impl Keyed for Numbered {
    type Key = Address;

    #[inline]
    fn key(&self) -> Option<Address> {
        (self.present != 0).then_some(self.address)
    }

    #[inline]
    fn hash(key: &Address, hasher: &Hasher) -> u64 {
        hasher.hash([key.high(), key.low()])
    }
}

/// How packets leave for a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    pub peer: PeerId,
    /// The largest packet that fits, before it is wrapped.
    pub mtu: u16,
    pub next_hop: Mac,
    /// As they are, not wrapped.
    pub direct: bool,
}

/// All of it.
#[derive(Debug)]
pub struct Overlay<'m> {
    tunnel: Single<Option<Tunnel>>,
    hops: Twin<'m, Hop>,
    peers: Twin<'m, Peer>,
    sources: Twin<'m, Numbered>,
    neighbors: Twin<'m, Numbered>,
    remotes: Lpm<'m>,
    hasher: Hasher,
}

impl<'m> Overlay<'m> {
    /// No tunnel, no peers.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(
        arena: &mut Arena<'m>,
        limits: &Limits,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        Ok(Self {
            tunnel: Single::default(),
            hops: Twin::direct(arena, usize::from(limits.next_hops))?,
            peers: Twin::direct(arena, usize::from(limits.peers))?,
            sources: Twin::keyed(arena, u32::from(limits.peers), hasher)?,
            neighbors: Twin::keyed(arena, u32::from(limits.next_hops), hasher)?,
            remotes: Lpm::new(arena, limits.prefixes, hasher)?,
            hasher,
        })
    }

    /// How packets are wrapped, if they are.
    #[inline]
    pub const fn tunnel(&self) -> Option<&Tunnel> {
        self.tunnel.live.as_ref()
    }

    #[inline]
    pub fn peer(&self, id: PeerId) -> Option<&Peer> {
        self.peers
            .live_at(usize::from(id.0))
            .filter(|peer| peer.present != 0)
    }

    /// The peer behind which `address` lies.
    #[inline]
    pub fn remote(&self, address: Address) -> Option<PeerId> {
        self.remotes.find(address).map(PeerId)
    }

    /// The peer with this underlay address.
    #[inline]
    pub fn peer_at(&self, address: Address) -> Option<PeerId> {
        self.sources
            .find(address)
            .map(|source| PeerId(source.number))
    }

    /// The neighbor with this address.
    #[inline]
    pub fn neighbor_at(&self, address: Address) -> Option<NextHopId> {
        self.neighbors
            .find(address)
            .map(|neighbor| NextHopId(neighbor.number))
    }

    /// The MAC of a neighbor; `None` if it does not answer.
    #[inline]
    pub fn neighbor(&self, id: NextHopId) -> Option<Mac> {
        self.hops
            .live_at(usize::from(id.0))
            .filter(|hop| hop.answers != 0)
            .map(|hop| Mac(hop.mac))
    }

    /// Whether `peer` may send packets that come from `source`: from behind it, or from the node itself.
    #[inline]
    pub fn may_speak_for(&self, peer: PeerId, source: Address) -> bool {
        self.remote(source) == Some(peer)
            || self.peer(peer).is_some_and(|peer| peer.address == source)
    }

    /// The MAC of the next hop on the way to `peer`; `None` if it does not answer.
    #[inline]
    pub fn next_hop(&self, peer: &Peer) -> Option<Mac> {
        self.neighbor(NextHopId(peer.next_hop))
    }

    /// How packets leave for `peer`, by an uplink that takes packets of `uplink_mtu`.
    ///
    /// # Errors
    /// [`DropReason::NoRoute`], [`DropReason::NoNeighbor`].
    #[inline]
    pub fn exit(
        &self,
        id: PeerId,
        uplink_mtu: u16,
        learned: &Learned<'_>,
    ) -> Result<Exit, DropReason> {
        let peer = self.peer(id).ok_or(DropReason::NoRoute)?;
        let next_hop = self.next_hop(peer).ok_or(DropReason::NoNeighbor)?;
        let configured = peer.mtu.min(uplink_mtu);
        let path = learned.path(id, peer.address, configured);
        let overhead = if peer.is_direct() {
            0
        } else {
            let tunnel = self.tunnel().ok_or(DropReason::NoRoute)?;
            // Seventy-eight bytes of at least 576.
            mtu::overhead(tunnel.protocol, peer.address.family()) as u16
        };
        Ok(Exit {
            peer: id,
            mtu: path.saturating_sub(overhead),
            next_hop,
            direct: peer.is_direct(),
        })
    }

    /// Spreads flows over outer source ports and flow labels.
    pub(crate) const fn hasher(&self) -> &Hasher {
        &self.hasher
    }

    /// Begins to empty the shadow; goes on in [`Self::clear_slice`].
    pub(crate) fn clear(&mut self) {
        self.tunnel.shadow = None;
        self.hops.clear();
        self.peers.clear();
        self.sources.clear();
        self.neighbors.clear();
        self.remotes.clear();
    }

    pub(crate) fn clear_slice(&mut self, budget: &mut usize) -> bool {
        self.hops.clear_slice(budget)
            && self.peers.clear_slice(budget)
            && self.sources.clear_slice(budget)
            && self.neighbors.clear_slice(budget)
            && self.remotes.clear_slice(budget)
    }

    pub(crate) fn sync_slice(&mut self, budget: &mut usize) -> bool {
        self.tunnel.shadow = self.tunnel.live;
        self.hops.sync_slice(budget)
            && self.peers.sync_slice(budget)
            && self.sources.sync_slice(budget)
            && self.neighbors.sync_slice(budget)
            && self.remotes.sync_slice(budget)
    }

    pub(crate) fn exchange(&mut self) {
        core::mem::swap(&mut self.tunnel.live, &mut self.tunnel.shadow);
        self.hops.exchange();
        self.peers.exchange();
        self.sources.exchange();
        self.neighbors.exchange();
        self.remotes.exchange();
    }
}
