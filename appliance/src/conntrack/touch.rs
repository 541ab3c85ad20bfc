//! What a batch of lookups will read, brought into the cache at once: on a table that does not fit there, memory is nearly
//! all that a lookup costs.

use crate::conntrack::region::unpack;
use crate::conntrack::{Conntrack, index};
use crate::flow::FlowHash;

/// Hashes that are touched at once.
const TOUCHED: usize = 64;

impl Conntrack<'_> {
    /// Brings what lookups of these hashes will read into the cache, all at once. For batches; changes nothing. Yields which of
    /// the first 64 are certainly not in the table, a bit for each.
    #[inline]
    pub fn touch(&self, hashes: &[FlowHash]) -> u64 {
        let mut batches = hashes.chunks(TOUCHED);
        let (sum, unknown) = batches.next().map_or((0, 0), |b| self.touch_batch(b));
        core::hint::black_box(sum);
        for batch in batches {
            core::hint::black_box(self.touch_batch(batch).0);
        }
        unknown
    }

    /// The same for hashes of which only the buckets will be read: those of answers that nobody has asked for yet.
    #[inline]
    pub(crate) fn touch_buckets(&self, hashes: &[FlowHash]) {
        let buckets = &*self.region.buckets;
        let first =
            |hash: &FlowHash| buckets[index::Places::of(*hash, buckets.len()).first].displaced;
        core::hint::black_box(hashes.iter().fold(0, |sum, hash| sum ^ first(hash)));
    }

    /// The loops that load are as short as can be: the shorter, the more loads are under way at once (measured: half the
    /// time of doing all for one hash after the other). What is loaded is folded into a number, so that nothing waits for it
    /// and the compiler keeps it.
    #[inline]
    fn touch_batch(&self, hashes: &[FlowHash]) -> (u32, u64) {
        let (buckets, rows, details) = (
            &*self.region.buckets,
            &*self.region.rows,
            &*self.region.details,
        );
        let places = |hash: &FlowHash| index::Places::of(*hash, buckets.len());
        let mut sum = 0;
        for places in hashes.iter().map(places) {
            sum |= u32::from(buckets[places.first].displaced);
        }
        let mut at = [0; TOUCHED];
        for (at, places) in at.iter_mut().zip(hashes.iter().map(places)) {
            let on = buckets[places.first].leads_on(places.tag);
            *at = if on { places.second } else { places.first };
        }
        if sum != 0 {
            for at in at.iter().take(hashes.len()) {
                sum ^= u32::from(buckets[*at].displaced);
            }
        }
        let last = self.region.header.capacity - 1;
        let mut slots = [0; TOUCHED];
        let mut unknown = 0;
        for (n, ((slot, at), hash)) in slots.iter_mut().zip(at).zip(hashes).enumerate() {
            let (guess, absent) = buckets[at].guess(places(hash).tag);
            *slot = guess.min(last) as usize;
            unknown |= u64::from(absent) << n;
        }
        for slot in slots.iter().take(hashes.len()) {
            sum ^= rows[*slot].seen;
        }
        for slot in slots.iter().take(hashes.len()) {
            sum ^= details[*slot].attached[0] ^ u32::from(details[*slot].seal);
        }
        for slot in slots.iter().take(hashes.len()) {
            // The reply addresses of a translated connection of IPv6; of all others slot 0.
            let extension = unpack(rows[*slot].extension).min(last);
            sum ^= rows[extension as usize].seen;
        }
        (sum, unknown)
    }
}
