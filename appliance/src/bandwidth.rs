//! How much a link may carry: a token bucket for each direction, of bytes (row B-07), packets and new connections (row B-09).
//!
//! Counted as the generic cell rate algorithm does: one number per bucket, the time at which it will be full again. A frame
//! that finds anything in the bucket goes, whole, and may leave a debt; so a frame for many segments passes a bucket that is
//! smaller than itself, and the rate holds all the same. What is counted are the bytes that the segments have on the wire.
//!
//! What comes too fast is dropped, not queued: the appliance keeps no frames, and so adds no delay.

use crate::arena::{Arena, OutOfMemory};
use crate::frame::Frame;
use crate::time::Instant;
use core::num::NonZeroU32;
use sluice_contract::LinkId;
use sluice_contract::row::Rate;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Ticks of a microsecond: a frame of 64 bytes at 100 Gbit/s costs 82 of them.
const TICKS_PER_MICRO: u64 = 16_000;
/// Bits that go by in a tick at one bit per second, the other way round.
const TICKS_PER_SECOND: u64 = TICKS_PER_MICRO * 1_000_000;

/// A direction, as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

/// What is counted one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Packets,
    Connections,
}

impl Kind {
    /// How many may go at once: a tenth of a second's packets, as many connections as in a second.
    fn burst(self, rate: NonZeroU32) -> u64 {
        let rate = u64::from(rate.get());
        match self {
            Self::Packets => (rate / 10).max(LEAST_PACKETS),
            Self::Connections => rate,
        }
    }
}

/// Packets that may go at once however low the rate.
const LEAST_PACKETS: u64 = 64;

/// A rate in the form in which it is counted.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Limit {
    /// Bits per second; 0: no limit.
    rate: u64,
    /// How many ticks it takes to fill the bucket.
    depth: u64,
}

impl Limit {
    pub(crate) fn new(rate: Option<Rate>) -> Self {
        let Some(rate) = rate else {
            return Self::default();
        };
        let bits = u128::from(rate.burst) * 8;
        let ticks = bits * u128::from(TICKS_PER_SECOND) / u128::from(rate.bits_per_second.max(1));
        Self {
            rate: rate.bits_per_second.max(1),
            depth: u64::try_from(ticks).unwrap_or(u64::MAX),
        }
    }

    pub(crate) const fn is_none(&self) -> bool {
        self.rate == 0
    }

    /// Ticks in which so many bytes go by.
    fn cost(&self, bytes: u64) -> u64 {
        let ticks = u128::from(bytes) * 8 * u128::from(TICKS_PER_SECOND);
        u64::try_from(ticks / u128::from(self.rate.max(1))).unwrap_or(u64::MAX)
    }
}

/// The buckets of one link.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Meter {
    /// When each is full again, in ticks: two of bytes, two of packets, two of connections.
    full_at: [u64; 6],
    /// Whose buckets these are: the next pod of the link begins with full ones.
    incarnation: u32,
    pad: u32,
}

/// The buckets of all links.
#[derive(Debug)]
pub struct Meters<'m> {
    links: &'m mut [Meter],
}

impl<'m> Meters<'m> {
    /// All buckets full.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>) -> Result<Self, OutOfMemory> {
        Ok(Self {
            links: arena.slice(usize::from(LinkId::LAST) + 1)?,
        })
    }

    /// Whether so many bytes may go now; if so, and unless it is only asked, they are charged.
    pub fn allows(
        &mut self,
        (link, incarnation): (LinkId, u32),
        direction: Direction,
        limit: &Limit,
        bytes: u64,
        (now, only_asked): (Instant, bool),
    ) -> bool {
        let cost = limit.cost(bytes);
        let bucket = direction as usize;
        self.take(
            (link, incarnation),
            bucket,
            (limit.depth, cost),
            (now, only_asked),
        )
    }

    /// Whether `count` packets or connections may go now, of `rate` in a second; if so, and unless it is only asked, they are
    /// charged.
    pub fn allows_count(
        &mut self,
        whose: (LinkId, u32),
        (kind, direction): (Kind, Direction),
        rate: NonZeroU32,
        count: u64,
        when: (Instant, bool),
    ) -> bool {
        let each = TICKS_PER_SECOND / u64::from(rate.get());
        // Something is in the bucket as long as the last one is not taken.
        let depth = each.saturating_mul(kind.burst(rate) - 1);
        let bucket = match kind {
            Kind::Packets => 2 + direction as usize,
            Kind::Connections => 4 + direction as usize,
        };
        self.take(whose, bucket, (depth, each.saturating_mul(count)), when)
    }

    fn take(
        &mut self,
        (link, incarnation): (LinkId, u32),
        bucket: usize,
        (depth, cost): (u64, u64),
        (now, only_asked): (Instant, bool),
    ) -> bool {
        let Some(meter) = self.links.get_mut(link.index()) else {
            return false;
        };
        let now = now.micros().saturating_mul(TICKS_PER_MICRO);
        let mine = meter.incarnation == incarnation;
        let full_at = if mine {
            meter.full_at.get(bucket).copied().unwrap_or(now).max(now)
        } else {
            now
        };
        if full_at - now > depth {
            return false;
        }
        if !only_asked {
            if !mine {
                *meter = Meter {
                    incarnation,
                    ..Meter::default()
                };
            }
            if let Some(slot) = meter.full_at.get_mut(bucket) {
                *slot = full_at.saturating_add(cost);
            }
        }
        true
    }
}

/// Bytes that the frame has on the wire, each segment with its own headers.
#[must_use]
pub fn wire_bytes(frame: &Frame<'_>) -> u64 {
    let header = frame.offload.gso.map_or(0, |gso| u64::from(gso.header));
    frame.length() as u64 + (wire_packets(frame) - 1) * header
}

/// Packets that the frame is on the wire; at least one.
#[must_use]
pub fn wire_packets(frame: &Frame<'_>) -> u64 {
    let Some(gso) = frame.offload.gso else {
        return 1;
    };
    let payload = (frame.length() as u64).saturating_sub(u64::from(gso.header));
    payload.div_ceil(u64::from(gso.size.max(1))).max(1)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::time::Duration;
    use std::vec;

    const LINK: (LinkId, u32) = (LinkId::HOST, 1);

    fn limit(bits_per_second: u64, burst: u32) -> Limit {
        Limit::new(Some(Rate {
            bits_per_second,
            burst,
        }))
    }

    /// Bytes that pass of frames of `bytes` offered every `gap` for a minute.
    fn passes(meters: &mut Meters<'_>, limit: &Limit, bytes: u64, gap: Duration) -> u64 {
        let (start, mut at, mut passed) = (Instant::from_micros(7), Duration::default(), 0);
        while at < Duration::from_secs(60) {
            let now = (start + at, false);
            if meters.allows(LINK, Direction::Egress, limit, bytes, now) {
                passed += bytes;
            }
            at = Duration::from_micros(at.micros() + gap.micros());
        }
        passed
    }

    #[test]
    fn b07_a_minute_of_too_much_is_the_rate_and_the_burst_whatever_the_frames() {
        for (rate, burst, bytes, gap) in [
            (8_000_000, 10_000, 1_514, 500),
            (1_000_000_000, 100_000, 65_000, 100),
            (100_000_000_000, 1_000_000, 65_000, 1),
            (8_000, 1, 100, 1_000),
        ] {
            let mut memory = vec![0u8; 1 << 20];
            let mut meters = Meters::new(&mut Arena::new(&mut memory)).unwrap();
            let limit = limit(rate, burst);
            let passed = passes(&mut meters, &limit, bytes, Duration::from_micros(gap));
            let least = rate / 8 * 60;
            let most = least + u64::from(burst) + 2 * bytes;
            let slack = least / 1000 + bytes;
            assert!(
                (least - slack..=most + slack).contains(&passed),
                "{rate} bit/s: {passed} of {least}"
            );
        }
    }

    #[test]
    fn a_bucket_is_one_links_one_directions_and_one_pods() {
        let mut memory = vec![0u8; 1 << 20];
        let mut meters = Meters::new(&mut Arena::new(&mut memory)).unwrap();
        let limit = limit(8_000, 1_000);
        let now = Instant::from_micros(1_000_000);
        let mut ask = |link, direction, only_asked| {
            meters.allows(link, direction, &limit, 1_500, (now, only_asked))
        };
        for _ in 0..3 {
            assert!(ask(LINK, Direction::Egress, true), "asking costs nothing");
        }
        assert!(ask(LINK, Direction::Egress, false));
        assert!(!ask(LINK, Direction::Egress, false), "it is in debt");
        assert!(ask(LINK, Direction::Ingress, false));
        assert!(ask((LinkId::UPLINK, 1), Direction::Egress, false));
        assert!(
            ask((LinkId::HOST, 2), Direction::Egress, false),
            "a new pod"
        );
    }

    #[test]
    fn b09_a_minute_of_too_many_is_the_rate_and_the_burst() {
        for (kind, rate, burst) in [
            (Kind::Packets, 1_000u32, 100),
            (Kind::Packets, 10, 64),
            (Kind::Connections, 50, 50),
            (Kind::Connections, 1, 1),
        ] {
            let mut memory = vec![0u8; 1 << 20];
            let mut meters = Meters::new(&mut Arena::new(&mut memory)).unwrap();
            let rate = NonZeroU32::new(rate).unwrap();
            let mut passed = 0;
            for micros in (0..60_000_000).step_by(500) {
                let when = (Instant::from_micros(micros + 7), false);
                let what = (kind, Direction::Egress);
                passed += u32::from(meters.allows_count(LINK, what, rate, 1, when));
            }
            let wanted = rate.get() * 60 + burst;
            assert!(
                passed.abs_diff(wanted) <= 1,
                "{kind:?} {rate}: {passed} of {wanted}"
            );
            // The other buckets are full.
            let when = (Instant::from_micros(60_000_000), false);
            assert!(meters.allows_count(LINK, (kind, Direction::Ingress), rate, 1, when));
            let (bytes, bandwidth) = (100, limit(8_000, 1_000));
            assert!(meters.allows(LINK, Direction::Egress, &bandwidth, bytes, when));
        }
    }

    #[test]
    fn numbers_that_cannot_be_counted_are_the_largest_that_can() {
        let mut memory = vec![0u8; 1 << 20];
        let mut meters = Meters::new(&mut Arena::new(&mut memory)).unwrap();
        for limit in [limit(1, u32::MAX), limit(u64::MAX, u32::MAX), limit(0, 0)] {
            let late = Instant::from_micros(u64::MAX);
            meters.allows(LINK, Direction::Egress, &limit, u64::MAX, (late, false));
            meters.allows(LINK, Direction::Egress, &limit, u64::MAX, (late, false));
        }
    }
}
