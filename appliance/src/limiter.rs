//! How often the appliance speaks on its own: per link and cause, and for "too big" also per flow.
//!
//! A generic cell rate algorithm: one number per bucket, the time at which the next packet would be due. Old buckets need no
//! refill and no scan.

use crate::address::Address;
use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use crate::time::{Duration, Instant};
use sluice_contract::LinkId;

/// Why a packet is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// ARP, neighbor discovery, echo: asked for, cheap.
    Answer,
    TooBig,
    TimeExceeded,
    /// Unreachable, of any code, and resets.
    Unreachable,
}

const CAUSES: usize = 4;
/// Packets that may follow one another at once. As Linux's `icmp_msgs_burst`.
const BURST: u64 = 50;
/// Buckets for flows; two flows in one bucket only silence each other for [`FLOW_GAP`].
const FLOWS: usize = 1024;
/// Between two "too big" of one flow (row M-05).
const FLOW_GAP: Duration = Duration::from_millis(10);

impl Cause {
    /// The time that one packet costs in the long run.
    const fn interval(self) -> Duration {
        match self {
            Self::Answer => Duration::from_micros(100),
            Self::TooBig | Self::TimeExceeded | Self::Unreachable => Duration::from_millis(1),
        }
    }
}

/// The buckets.
#[derive(Debug)]
pub struct Limiter<'m> {
    links: &'m mut [u64],
    flows: &'m mut [u64],
    hasher: Hasher,
}

impl<'m> Limiter<'m> {
    /// All buckets full.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>, hasher: Hasher) -> Result<Self, OutOfMemory> {
        Ok(Self {
            links: arena.slice((usize::from(LinkId::LAST) + 1) * CAUSES)?,
            flows: arena.slice(FLOWS)?,
            hasher,
        })
    }

    /// Whether a packet may be made for `link` now. Nothing is charged.
    pub fn would_allow(&self, link: LinkId, cause: Cause, now: Instant) -> bool {
        let due = self.links.get(link.index() * CAUSES + cause as usize);
        due.is_some_and(|due| due.saturating_sub(now.micros()) <= BURST * cause.interval().micros())
    }

    /// Whether a packet may be made for `link` now; if so, it is charged.
    pub fn allows(&mut self, link: LinkId, cause: Cause, now: Instant) -> bool {
        if !self.would_allow(link, cause, now) {
            return false;
        }
        if let Some(due) = self.links.get_mut(link.index() * CAUSES + cause as usize) {
            *due = (*due).max(now.micros()) + cause.interval().micros();
        }
        true
    }

    /// Whether the flow between these two may be told "too big" again now; if so, it is charged.
    pub fn allows_flow(&mut self, source: Address, destination: Address, now: Instant) -> bool {
        let words = [
            source.high(),
            source.low(),
            destination.high(),
            destination.low(),
        ];
        let index = self.hasher.hash(words) as usize % FLOWS;
        match self.flows.get_mut(index) {
            Some(due) if *due <= now.micros() => {
                *due = (now + FLOW_GAP).micros();
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;

    #[test]
    fn bursts_end_and_the_rate_holds() {
        let mut memory = vec![0u8; 1 << 20];
        let mut limiter = Limiter::new(&mut Arena::new(&mut memory), Hasher::new([3; 16])).unwrap();
        let start = Instant::from_micros(1_000_000);
        let ask = |limiter: &mut Limiter<'_>, now| {
            (0..1000)
                .filter(|_| limiter.allows(LinkId::HOST, Cause::TooBig, now))
                .count()
        };
        assert_eq!(ask(&mut limiter, start), 51);
        assert_eq!(ask(&mut limiter, start + Duration::from_millis(10)), 10);
        assert!(
            limiter.allows(LinkId::UPLINK, Cause::TooBig, start),
            "another link is free"
        );
        assert!(
            limiter.allows(LinkId::HOST, Cause::Answer, start),
            "another cause is free"
        );
    }
}
