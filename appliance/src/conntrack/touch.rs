//! What a batch of lookups will read, brought into the cache at once: on a table that does not fit there, memory is nearly
//! all that a lookup costs.

use crate::conntrack::region::unpack;
use crate::conntrack::{Conntrack, index};
use crate::flow::FlowHash;

/// Hashes that are touched at once.
const TOUCHED: usize = 64;

impl Conntrack<'_> {
    /// Brings what lookups of these hashes will read into the cache, all at once. For batches; changes nothing.
    #[inline]
    pub fn touch(&self, hashes: &[FlowHash]) {
        for batch in hashes.chunks(TOUCHED) {
            core::hint::black_box(self.touch_batch(batch));
        }
    }

    /// The loops that load are as short as can be: the shorter, the more loads are under way at once (measured: half the
    /// time of doing all for one hash after the other). What is loaded is folded into a number, so that nothing waits for it
    /// and the compiler keeps it.
    #[inline]
    fn touch_batch(&self, hashes: &[FlowHash]) -> u32 {
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
        for ((slot, at), hash) in slots.iter_mut().zip(at).zip(hashes) {
            *slot = buckets[at].guess(places(hash).tag).min(last) as usize;
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
        sum
    }
}
