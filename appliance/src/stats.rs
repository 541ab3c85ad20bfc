//! Every packet ends in exactly one counter: received = forwarded + replied + dropped + held, always.

use crate::arena::{Arena, OutOfMemory};
use crate::frame::Gso;
use crate::twin::Slot;
use crate::verdict::Verdict;
use sluice_contract::message::Counter;
use sluice_contract::report::CounterId;
use sluice_contract::{DropReason, LinkId};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What is counted of one link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct LinkCounters {
    pub received: u64,
    pub received_bytes: u64,
    pub sent: u64,
    pub sent_bytes: u64,
}

impl Slot for LinkCounters {}

/// What the machine around the dataplane counts; it writes these itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    pub control_garbage: u64,
    pub control_stale: u64,
    pub ring_errors: u64,
    pub parks: u64,
    pub parked_micros: u64,
    pub longest_slice_nanos: u64,
    pub slices: u64,
    pub long_slices: u64,
}

/// All counters since boot.
#[derive(Debug)]
pub struct Stats<'m> {
    received: u64,
    forwarded: u64,
    replied: u64,
    held: u64,
    originated: u64,
    gso_forwarded: u64,
    gso_forwarded_bytes: u64,
    pub(crate) would_deny: u64,
    pub(crate) names: crate::names::Counts,
    dropped: [u64; DropReason::COUNT],
    links: &'m mut [LinkCounters],
    pub machine: Machine,
}

/// Counters that are not of a reason or a link.
const SCALARS: usize = 19;
const PER_LINK: usize = 4;

impl<'m> Stats<'m> {
    /// All zero.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>) -> Result<Self, OutOfMemory> {
        Ok(Self {
            received: 0,
            forwarded: 0,
            replied: 0,
            held: 0,
            originated: 0,
            gso_forwarded: 0,
            gso_forwarded_bytes: 0,
            would_deny: 0,
            names: Default::default(),
            dropped: [0; DropReason::COUNT],
            links: arena.slice(usize::from(LinkId::LAST) + 1)?,
            machine: Machine::default(),
        })
    }

    pub const fn received(&self) -> u64 {
        self.received
    }

    pub const fn forwarded(&self) -> u64 {
        self.forwarded
    }

    pub const fn replied(&self) -> u64 {
        self.replied
    }

    pub const fn held(&self) -> u64 {
        self.held
    }

    pub const fn originated(&self) -> u64 {
        self.originated
    }

    /// Packets dropped for that reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped.get(reason.index()).copied().unwrap_or(0)
    }

    /// Packets dropped for any reason.
    pub fn dropped_in_all(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// What is counted of a link.
    pub fn link(&self, link: LinkId) -> LinkCounters {
        self.links.get(link.index()).copied().unwrap_or_default()
    }

    /// Whether every packet received so far has ended in exactly one counter.
    pub fn is_balanced(&self) -> bool {
        self.received == self.forwarded + self.replied + self.held + self.dropped_in_all()
    }

    #[inline]
    pub(crate) fn count_received(&mut self, link: LinkId, bytes: usize) {
        self.received += 1;
        if let Some(counters) = self.links.get_mut(link.index()) {
            counters.received += 1;
            counters.received_bytes += bytes as u64;
        }
    }

    /// Counts how a packet ended; `bytes` and `gso` are of the frame that leaves.
    #[inline]
    pub(crate) fn count_verdict(
        &mut self,
        verdict: Verdict,
        ingress: LinkId,
        bytes: usize,
        gso: Option<Gso>,
    ) {
        match verdict {
            Verdict::Forward(link) => {
                self.forwarded += 1;
                if gso.is_some() {
                    self.gso_forwarded += 1;
                    self.gso_forwarded_bytes += bytes as u64;
                }
                self.count_sent(link, bytes);
            }
            Verdict::Reply => {
                self.replied += 1;
                self.count_sent(ingress, bytes);
            }
            Verdict::Drop(reason) => self.count_drop(reason),
            Verdict::Held => self.held += 1,
        }
    }

    /// Counts how a frame ended that was held.
    pub(crate) fn count_released(&mut self, verdict: Verdict, ingress: LinkId, bytes: usize) {
        self.held = self.held.saturating_sub(1);
        self.count_verdict(verdict, ingress, bytes, None);
    }

    /// Counts a frame that the appliance made by itself.
    pub fn count_originated(&mut self, link: LinkId, bytes: usize) {
        self.originated += 1;
        self.count_sent(link, bytes);
    }

    /// The driver had no room for a frame whose verdict was `verdict`: it was dropped after all.
    pub fn transmit_failed(&mut self, verdict: Verdict, ingress: LinkId, bytes: usize) {
        let link = match verdict {
            Verdict::Forward(link) => {
                self.forwarded = self.forwarded.saturating_sub(1);
                link
            }
            Verdict::Reply => {
                self.replied = self.replied.saturating_sub(1);
                ingress
            }
            Verdict::Drop(_) | Verdict::Held => return,
        };
        self.count_drop(DropReason::TxFull);
        if let Some(counters) = self.links.get_mut(link.index()) {
            counters.sent = counters.sent.saturating_sub(1);
            counters.sent_bytes = counters.sent_bytes.saturating_sub(bytes as u64);
        }
    }

    #[inline]
    fn count_sent(&mut self, link: LinkId, bytes: usize) {
        if let Some(counters) = self.links.get_mut(link.index()) {
            counters.sent += 1;
            counters.sent_bytes += bytes as u64;
        }
    }

    #[inline]
    fn count_drop(&mut self, reason: DropReason) {
        if let Some(counter) = self.dropped.get_mut(reason.index()) {
            *counter += 1;
        }
    }

    /// The first counter that is not zero at or behind `cursor`, and the cursor behind it. Begin with 0.
    pub fn next_from(&self, cursor: usize) -> Option<(Counter, usize)> {
        let end = SCALARS + DropReason::ALL.len() + self.links.len() * PER_LINK;
        (cursor..end)
            .filter_map(|at| self.at(at).map(|counter| (counter, at + 1)))
            .find(|(counter, _)| counter.value != 0)
    }

    fn at(&self, index: usize) -> Option<Counter> {
        let Some(index) = index.checked_sub(SCALARS) else {
            return self.scalar(index);
        };
        if let Some(reason) = DropReason::ALL.get(index) {
            return Some(Counter {
                id: CounterId::Dropped(*reason),
                value: self.dropped(*reason),
            });
        }
        let index = index - DropReason::ALL.len();
        let link = LinkId::new(u16::try_from(index / PER_LINK).ok()?)?;
        let counters = self.links.get(link.index())?;
        let (id, value) = match index % PER_LINK {
            0 => (CounterId::LinkReceived(link), counters.received),
            1 => (CounterId::LinkReceivedBytes(link), counters.received_bytes),
            2 => (CounterId::LinkSent(link), counters.sent),
            _ => (CounterId::LinkSentBytes(link), counters.sent_bytes),
        };
        Some(Counter { id, value })
    }

    fn scalar(&self, index: usize) -> Option<Counter> {
        let Machine {
            control_garbage,
            control_stale,
            ring_errors,
            parks,
            parked_micros,
            longest_slice_nanos,
            slices,
            long_slices,
        } = self.machine;
        let all: [(CounterId, u64); SCALARS] = [
            (CounterId::Received, self.received),
            (CounterId::Forwarded, self.forwarded),
            (CounterId::Replied, self.replied),
            (CounterId::Held, self.held),
            (CounterId::Originated, self.originated),
            (CounterId::GsoForwarded, self.gso_forwarded),
            (CounterId::GsoForwardedBytes, self.gso_forwarded_bytes),
            (CounterId::ControlGarbage, control_garbage),
            (CounterId::ControlStale, control_stale),
            (CounterId::RingErrors, ring_errors),
            (CounterId::Parks, parks),
            (CounterId::ParkedMicros, parked_micros),
            (CounterId::LongestSliceNanos, longest_slice_nanos),
            (CounterId::Slices, slices),
            (CounterId::LongSlices, long_slices),
            (CounterId::WouldDeny, self.would_deny),
            (CounterId::NamesLearnt, self.names.learnt),
            (CounterId::NamesEvicted, self.names.evicted),
            (CounterId::NamesCut, self.names.cut),
        ];
        all.get(index).map(|&(id, value)| Counter { id, value })
    }
}
