//! How large a packet may be: what a tunnel adds, what routers on the way said, and the MSS that follows.
//!
//! A router's word only lowers (RFC 8201 §4), and is believed only if the packet it quotes is one that this node really sent to
//! that peer, which takes the secret in its outer header ([`crate::overlay::Peer::mark`]) to make up. Who tries secrets gets
//! sixteen tries in ten minutes; after that routers are not heard, and probes alone find narrow paths. It never
//! lowers what travels inside below 1280, the least that IPv6 may count on; narrower paths are found by probes. Where
//! the node probes its peers the word only bridges the time until probes have measured the path: they are
//! not bound by it, and what they find is in the peer's own row. Without probes it is forgotten after ten minutes,
//! so that a path that has grown is found again.

use crate::address::{Address, Family};
use crate::arena::{Arena, OutOfMemory};
use crate::frame::Frame;
use crate::parse::{Fragment, Packet, Transport};
use crate::time::{Duration, Instant};
use crate::twin::Slot;
use crate::wire::{checksum, ipv4, ipv6, tcp};
use sluice_contract::overlay::{PeerId, TunnelProtocol};
use zerocopy::{FromBytes, Immutable, IntoBytes, big_endian::U16};

/// How long a router's word holds where nothing else measures the path (RFC 1191 §6.3, checklist P4).
pub const MEMORY: Duration = Duration::from_secs(600);
/// How long it holds where the node's probes measure it.
pub const BRIDGED: Duration = Duration::from_secs(60);
/// The least MTU inside a tunnel, whatever routers say (RFC 8200 §5): below it an attacker gains and nobody else.
const LEAST_INSIDE: u16 = 1280;
/// Wrong guesses of the secret in [`PATIENCE`] after which routers are not heard.
const GUESSES: u32 = 16;
const PATIENCE: Duration = Duration::from_secs(600);

/// Bytes that the tunnel adds to an IP packet of any family, on an underlay of this one.
pub const fn overhead(protocol: TunnelProtocol, underlay: Family) -> usize {
    protocol.overhead(matches!(underlay, Family::V6)) as usize
}

/// What a router said about the path to a peer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Word {
    /// The peer's address then: a peer of the same number that has moved is another path.
    address: Address,
    until: u64,
    /// 0: nothing.
    mtu: u16,
    pad: [u8; 6],
}

impl Slot for Word {}

/// What routers said, by peer.
#[derive(Debug)]
pub struct Learned<'m> {
    words: &'m mut [Word],
    /// How many there are.
    count: usize,
    /// Where the next search for old ones begins.
    cursor: usize,
    /// Complaints about packets that were never sent, since when they are counted.
    guesses: u32,
    counted: Instant,
}

impl<'m> Learned<'m> {
    /// Nothing was said.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>, peers: usize) -> Result<Self, OutOfMemory> {
        Ok(Self {
            words: arena.slice(peers)?,
            count: 0,
            cursor: 0,
            guesses: 0,
            counted: Instant::default(),
        })
    }

    /// Whether a complaint is to be believed: it is `genuine`, and nobody has been guessing.
    pub fn trusts(&mut self, genuine: bool, now: Instant) -> bool {
        if self.guesses == 0 || now >= self.counted + PATIENCE {
            (self.guesses, self.counted) = (0, now);
        }
        if !genuine {
            self.guesses = self.guesses.saturating_add(1);
        }
        genuine && self.guesses <= GUESSES
    }

    /// Bytes for so many peers.
    pub const fn bytes(peers: usize) -> usize {
        peers * size_of::<Word>() + 64
    }

    /// What the path to the peer takes, if a router said so and it is less than `configured`.
    #[inline]
    pub fn path(&self, peer: PeerId, address: Address, configured: u16) -> u16 {
        if self.count == 0 {
            return configured;
        }
        match self.words.get(usize::from(peer.0)) {
            Some(word) if word.mtu != 0 && word.address == address => word.mtu.min(configured),
            _ => configured,
        }
    }

    /// Believes a router until `until` that the path takes only `mtu`; `false` if that is nothing new. `overhead`: of the
    /// tunnel.
    pub fn lower(
        &mut self,
        (peer, address): (PeerId, Address),
        (configured, overhead): (u16, u16),
        mtu: u16,
        until: Instant,
    ) -> bool {
        let mtu = mtu.max(LEAST_INSIDE.saturating_add(overhead));
        if mtu >= self.path(peer, address, configured) {
            return false;
        }
        let Some(word) = self.words.get_mut(usize::from(peer.0)) else {
            return false;
        };
        self.count += usize::from(word.mtu == 0);
        *word = Word {
            address,
            until: until.micros(),
            mtu,
            pad: [0; 6],
        };
        true
    }

    /// Forgets what is too old, looking at no more than `budget` peers.
    pub fn age(&mut self, now: Instant, budget: usize) {
        if self.count == 0 {
            return;
        }
        for _ in 0..budget.min(self.words.len()) {
            self.cursor = (self.cursor + 1) % self.words.len().max(1);
            if let Some(word) = self.words.get_mut(self.cursor)
                && word.mtu != 0
                && word.until <= now.micros()
            {
                *word = Word::empty();
                self.count -= 1;
            }
        }
    }
}

/// Lowers the MSS that a SYN announces to what a path of `mtu` takes (row M-08); never raises it, never adds the option.
/// Whether the packet was changed.
#[inline]
pub fn clamp_mss(frame: &mut Frame<'_>, packet: &Packet, mtu: u16) -> bool {
    match packet.transport {
        Transport::Tcp { flags, .. } if flags & tcp::SYN != 0 => {
            packet.fragment == Fragment::Whole && clamp_syn(frame, packet, mtu).is_some()
        }
        _ => false,
    }
}

fn clamp_syn(frame: &mut Frame<'_>, packet: &Packet, mtu: u16) -> Option<()> {
    let headers = tcp::LENGTH
        + match packet.family {
            Family::V4 => ipv4::LENGTH,
            Family::V6 => ipv6::LENGTH,
        };
    let most = u16::try_from(usize::from(mtu).checked_sub(headers)?).ok()?;
    let partial = frame.offload.partial.is_some();
    let segment = frame.bytes_mut().get_mut(usize::from(packet.payload)..)?;
    let (header, rest) = tcp::Header::mut_from_prefix(segment).ok()?;
    let options = rest.get_mut(..header.header_length().checked_sub(tcp::LENGTH)?)?;
    let at = find_mss(options)?;
    let field = options.get_mut(at..at + 2)?;
    let old = u16::from_be_bytes([*field.first()?, *field.last()?]);
    if old <= most {
        return None;
    }
    field.copy_from_slice(&most.to_be_bytes());
    if !partial {
        // The option may stand at an odd place: then its bytes count the other way round (RFC 1071 §2 B).
        let (old, new) = if at % 2 == 0 {
            (old, most)
        } else {
            (old.swap_bytes(), most.swap_bytes())
        };
        let delta = checksum::Delta::default().word(old, new);
        header.checksum = U16::new(delta.patch(header.checksum.get()));
    }
    Some(())
}

/// Where the value of the MSS option stands; the options may be anything.
fn find_mss(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match options.get(at..)? {
            [2, 4, _, _, ..] => return Some(at + 2),
            [1, ..] => at += 1,
            [] | [0, ..] => return None,
            [_, length, ..] => at += usize::from(*length).max(2),
            [_] => return None,
        }
    }
}
