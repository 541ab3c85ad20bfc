//! Packets that do not say which connection they are of: ICMP errors quote a packet of it, later fragments share a
//! datagram with one that does.

use crate::address::Address;
use crate::arena::{Arena, OutOfMemory};
use crate::conntrack::state::State;
use crate::conntrack::{Conntrack, Hit};
use crate::flow::Flow;
use crate::hash::Hasher;
use crate::time::{Duration, Instant};
use crate::wire::protocol;

use sluice_contract::LinkId;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

impl Conntrack<'_> {
    /// The connection of the packet that an ICMP error quotes, and the direction in which *the error* travels.
    ///
    /// `quoted` is the flow as quoted. Whoever sends an error got the packet as it left here, so the error meets the
    /// connection like an answer to it: [`Conntrack::outgoing`] of the hit, reversed, is what the quotation has to be
    /// changed to, and its source and destination are those of the error itself. `sequence` is the quoted TCP sequence
    /// number, if it was quoted: one that cannot be under way is a guess (RFC 5927 §4.1), and finds nothing.
    ///
    /// An error does not count as use of the connection.
    pub fn related(&self, quoted: &Flow, sequence: Option<u32>, now: Instant) -> Option<Hit> {
        let back = quoted.reversed();
        let hit = self.lookup(&back, self.hash(&back), now)?;
        let row = self.region.rows.get(hit.id.0 as usize)?;
        if row.protocol == protocol::TCP
            && hit.state != State::TcpMidflow
            && let Some(sequence) = sequence
        {
            let tcp = self.region.details.get(hit.id.0 as usize)?.tcp(hit.state);
            if !tcp.is_in_flight(hit.direction.opposite(), sequence) {
                return None;
            }
        }
        Some(hit)
    }
}

/// What the fragments of one datagram have in common (RFC 791 §3.2, RFC 8200 §4.5), and the link they come from, so that
/// nobody slips a fragment into another's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentKey {
    link: LinkId,
    /// Addresses and protocol; ports are 0.
    flow: Flow,
    identification: u32,
}

impl FragmentKey {
    /// The key of a fragment whose addresses and protocol are those of `flow`; its ports are not looked at.
    pub fn new(link: LinkId, flow: &Flow, identification: u32) -> Self {
        Self {
            link,
            flow: Flow::new(flow.source(), flow.destination(), flow.protocol(), 0, 0),
            identification,
        }
    }
}

/// What the first fragment said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// The datagram is of this flow: judge the fragment as a packet of it.
    Of(Flow),
    /// The first fragment was dropped; the others go the same way.
    Refused,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
struct Datagram {
    source: Address,
    destination: Address,
    identification: u32,
    source_port: u16,
    destination_port: u16,
    /// In microseconds; 0: the place is empty.
    expires: u64,
    link: u16,
    protocol: u8,
    flags: u8,
    reserved: [u8; 12],
}

const REFUSED: u8 = 1;
const PLACES: usize = 4;

/// Datagrams whose first fragment has passed. Small, bounded, and not worth handing over.
#[derive(Debug)]
pub struct Fragments<'m> {
    sets: &'m mut [[Datagram; PLACES]],
    hasher: Hasher,
    lifetime: Duration,
}

impl<'m> Fragments<'m> {
    /// Room for at least `datagrams` at once. Each is remembered for `lifetime` after its first fragment: RFC 8200 §4.5 has
    /// receivers wait 60 s, Linux waits 30.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(
        arena: &mut Arena<'m>,
        datagrams: usize,
        lifetime: Duration,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        Ok(Self {
            sets: arena.slice(datagrams.div_ceil(PLACES).max(1))?,
            hasher,
            lifetime,
        })
    }

    /// Remembers what becomes of a datagram, at its first fragment.
    ///
    /// # Cost
    /// Four lines. If all four are in use the one that would end first is overwritten.
    pub fn remember(&mut self, key: &FragmentKey, fragment: Fragment, now: Instant) {
        let expires = (now + self.lifetime).micros().max(1);
        let at = self.set_of(key);
        let Some(set) = self.sets.get_mut(at) else {
            return;
        };
        let place = match set.iter().position(|d| d.is_of(key, now)) {
            Some(same) => same,
            None => {
                let first = set.iter().enumerate().min_by_key(|(_, d)| d.expires);
                first.map_or(0, |(place, _)| place)
            }
        };
        let (ports, refused) = match fragment {
            Fragment::Of(flow) => ([flow.source_port(), flow.destination_port()], 0),
            Fragment::Refused => ([0; 2], REFUSED),
        };
        set[place] = Datagram {
            source: key.flow.source(),
            destination: key.flow.destination(),
            identification: key.identification,
            source_port: ports[0],
            destination_port: ports[1],
            expires,
            link: key.link.raw(),
            protocol: key.flow.protocol(),
            flags: refused,
            reserved: [0; 12],
        };
    }

    /// What the first fragment of a later one's datagram said; `None` if it has not been seen.
    pub fn recall(&self, key: &FragmentKey, now: Instant) -> Option<Fragment> {
        let set = self.sets.get(self.set_of(key))?;
        let found = set.iter().find(|d| d.is_of(key, now))?;
        if found.flags & REFUSED != 0 {
            return Some(Fragment::Refused);
        }
        Some(Fragment::Of(Flow::new(
            found.source,
            found.destination,
            found.protocol,
            found.source_port,
            found.destination_port,
        )))
    }

    fn set_of(&self, key: &FragmentKey) -> usize {
        let flow = key.flow.hash(&self.hasher).get();
        let rest = u64::from(key.identification) | (u64::from(key.link.raw()) << 32);
        let hash = self.hasher.hash([flow, rest]) >> 32;
        ((hash * self.sets.len() as u64) >> 32) as usize
    }
}

impl Datagram {
    fn is_of(&self, key: &FragmentKey, now: Instant) -> bool {
        self.expires > now.micros()
            && self.identification == key.identification
            && self.link == key.link.raw()
            && self.protocol == key.flow.protocol()
            && self.source == key.flow.source()
            && self.destination == key.flow.destination()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    fn flow(n: u8, port: u16) -> Flow {
        Flow::new(
            Address::v4([10, 0, 0, n]),
            Address::v4([10, 0, 1, n]),
            protocol::UDP,
            port,
            53,
        )
    }

    fn link(n: u16) -> LinkId {
        LinkId::new(16 + n).unwrap()
    }

    fn table(memory: &mut [u8]) -> Fragments<'_> {
        let lifetime = Duration::from_secs(30);
        Fragments::new(&mut Arena::new(memory), 64, lifetime, Hasher::new([1; 16])).unwrap()
    }

    #[test]
    fn later_fragments_find_the_flow_of_the_first() {
        let mut memory = vec![0; 64 * 65];
        let mut fragments = table(&mut memory);
        let now = Instant::from_micros(5);
        let key = FragmentKey::new(link(0), &flow(1, 0), 77);
        assert_eq!(fragments.recall(&key, now), None);
        fragments.remember(&key, Fragment::Of(flow(1, 4_000)), now);
        assert_eq!(
            fragments.recall(&key, now),
            Some(Fragment::Of(flow(1, 4_000)))
        );
        // Not those of another datagram, another link, another pair of addresses.
        for other in [
            FragmentKey::new(link(0), &flow(1, 0), 78),
            FragmentKey::new(link(1), &flow(1, 0), 77),
            FragmentKey::new(link(0), &flow(2, 0), 77),
        ] {
            assert_eq!(fragments.recall(&other, now), None);
        }
        let later = now + Duration::from_secs(30);
        assert_eq!(fragments.recall(&key, later), None);
        fragments.remember(&key, Fragment::Refused, later);
        assert_eq!(fragments.recall(&key, later), Some(Fragment::Refused));
    }

    proptest! {
        #[test]
        fn what_is_recalled_was_remembered(
            steps in prop::collection::vec((0u8..20, 0u32..20, 0u64..40), 1..200)
        ) {
            let mut memory = vec![0; 64 * 65];
            let mut fragments = table(&mut memory);
            let mut now = Instant::ZERO;
            let mut said: Vec<(FragmentKey, Flow, Instant)> = Vec::new();
            for (n, identification, seconds) in steps {
                now = now + Duration::from_secs(seconds / 8);
                let key = FragmentKey::new(link(3), &flow(n, 0), identification);
                if let Some(found) = fragments.recall(&key, now) {
                    let (_, flow, at) = said.iter().rev().find(|(k, ..)| *k == key).unwrap();
                    prop_assert_eq!(found, Fragment::Of(*flow));
                    prop_assert!(now.since(*at) < Duration::from_secs(30));
                }
                let first = flow(n, identification as u16 ^ seconds as u16);
                fragments.remember(&key, Fragment::Of(first), now);
                prop_assert_eq!(fragments.recall(&key, now), Some(Fragment::Of(first)));
                said.push((key, first, now));
            }
        }
    }
}
