//! Maps over 32-bit keys and over addresses, cut into spans that the guest can hold; equal spans are kept once.

use std::collections::HashMap;

use sluice_contract::policy::{SPAN_ENTRIES, SpanEntry, SpanId, Target};

use super::hash;

/// Pieces of one map, at most: with fifteen a span, five levels. A map of more is not sent.
pub(crate) const PIECES: usize = 60_000;

/// A map: from each start up to the next one. The first start is 0.
pub(crate) type Map<K> = Vec<(K, Target)>;

/// Spans that somebody uses, each as often as it was made. To be given back with [`Spans::release`].
pub(crate) type Holds = Vec<SpanId>;

type Entries = heapless::Vec<SpanEntry, SPAN_ENTRIES>;

/// All spans in use.
#[derive(Debug, Default)]
pub(crate) struct Spans {
    spans: HashMap<SpanId, (Entries, u32)>,
    ids: HashMap<Entries, SpanId>,
    /// What has come or gone since this was taken last, and whether it was there before.
    changed: Vec<(SpanId, bool)>,
}

impl Spans {
    pub(crate) fn get(&self, id: SpanId) -> Option<&Entries> {
        self.spans.get(&id).map(|(entries, _)| entries)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (SpanId, &Entries)> {
        self.spans.iter().map(|(id, (entries, _))| (*id, entries))
    }

    pub(crate) fn len(&self) -> usize {
        self.spans.len()
    }

    pub(crate) fn take_changed(&mut self) -> Vec<(SpanId, bool)> {
        std::mem::take(&mut self.changed)
    }

    /// A map of protocols and ports, or of IPv4 addresses.
    pub(crate) fn map(&mut self, map: &[(u32, Target)], holds: &mut Holds) -> SpanId {
        if let [(_, Target::Nothing)] | [] = map {
            return SpanId::NOTHING;
        }
        if map.len() <= SPAN_ENTRIES {
            return self.intern(map, holds);
        }
        let mut upper = Vec::new();
        for piece in map.chunks(SPAN_ENTRIES) {
            let mut piece = piece.to_vec();
            if let Some(first) = piece.first_mut() {
                // Below the piece's start nobody comes here; a span begins at 0.
                let start = std::mem::take(&mut first.0);
                upper.push((start, Target::Finer(self.intern(&piece, holds))));
            }
        }
        self.map(&upper, holds)
    }

    /// A map of IPv6 addresses.
    pub(crate) fn v6(&mut self, map: &[(u128, Target)], holds: &mut Holds) -> SpanId {
        self.words(map, 96, holds)
    }

    /// One level of an address: the 32 bits from `shift` up. `map` starts at 0 and has no bits above these.
    fn words(&mut self, map: &[(u128, Target)], shift: u32, holds: &mut Holds) -> SpanId {
        let below = |start: u128| start & ((1 << shift) - 1);
        let mut level: Map<u32> = Vec::new();
        let mut before = Target::Nothing;
        let mut rest = map;
        while let Some((start, _)) = rest.first() {
            let word = start >> shift;
            let count = rest
                .iter()
                .take_while(|(it, _)| it >> shift == word)
                .count();
            let (here, after) = rest.split_at(count);
            let key = u32::try_from(word).unwrap_or(u32::MAX);
            let last = here.last().map_or(before, |(_, target)| *target);
            if here.iter().all(|(it, _)| below(*it) == 0) {
                push(&mut level, key, last);
            } else {
                let mut inner: Map<u128> = Vec::new();
                if here.first().is_some_and(|(it, _)| below(*it) != 0) {
                    inner.push((0, before));
                }
                inner.extend(here.iter().map(|(it, target)| (below(*it), *target)));
                let id = self.words(&inner, shift.saturating_sub(32), holds);
                push(&mut level, key, Target::Word(id));
                let follows = after.first().is_some_and(|(it, _)| it >> shift == word + 1);
                if let Some(next) = key.checked_add(1).filter(|_| !follows) {
                    push(&mut level, next, last);
                }
            }
            before = last;
            rest = after;
        }
        self.map(&level, holds)
    }

    fn intern(&mut self, map: &[(u32, Target)], holds: &mut Holds) -> SpanId {
        let entries: Entries = map
            .iter()
            .map(|(start, target)| SpanEntry {
                start: *start,
                target: *target,
            })
            .collect();
        if let Some(id) = self.ids.get(&entries) {
            if let Some((_, users)) = self.spans.get_mut(id) {
                *users += 1;
            }
            holds.push(*id);
            return *id;
        }
        let mut id = SpanId(hash::of(&entries.as_slice()));
        while id == SpanId::NOTHING || self.spans.contains_key(&id) {
            id = SpanId(id.0.wrapping_add(1));
        }
        self.ids.insert(entries.clone(), id);
        self.spans.insert(id, (entries, 1));
        self.changed.push((id, false));
        holds.push(id);
        id
    }

    pub(crate) fn release(&mut self, holds: &[SpanId]) {
        for id in holds {
            let Some((_, users)) = self.spans.get_mut(id) else {
                continue;
            };
            *users -= 1;
            if *users == 0
                && let Some((entries, _)) = self.spans.remove(id)
            {
                self.ids.remove(&entries);
                self.changed.push((*id, true));
            }
        }
    }
}

fn push(map: &mut Map<u32>, start: u32, target: Target) {
    if map.last().is_none_or(|(_, last)| *last != target) {
        map.push((start, target));
    }
}
