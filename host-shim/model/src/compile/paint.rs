//! Which rule is the first to match, for every port and for every address: ordered rules as maps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sluice_contract::policy::{Action, PORT_KEYS, RuleId, Target};

use super::span::{Map, PIECES};
use crate::object::Prefix;

/// A rule as far as ports go: what it says, and on which keys (first and last).
#[derive(Clone, Debug)]
pub(crate) struct Stroke {
    pub(crate) action: Action,
    pub(crate) order: u16,
    pub(crate) rule: RuleId,
    pub(crate) keys: Vec<(u32, u32)>,
}

impl Stroke {
    fn target(&self) -> Target {
        Target::Rule {
            action: self.action,
            order: self.order,
            rule: self.rule,
        }
    }
}

/// The canvas: what is painted stays, so rules come in the order in which they are asked.
#[derive(Debug)]
pub(crate) struct Canvas {
    /// Unpainted keys, first to last.
    open: BTreeMap<u32, u32>,
    painted: Vec<(u32, u32, Target)>,
    /// Keys that a `Pass` has taken out of this tier; open again in the next.
    passed: Vec<(u32, u32)>,
}

impl Canvas {
    pub(crate) fn new() -> Self {
        Self {
            open: BTreeMap::from([(0, PORT_KEYS - 1)]),
            painted: Vec::new(),
            passed: Vec::new(),
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.open.is_empty()
    }

    /// Paints what is open under a rule. `fold`: a `Pass` is not painted, it leaves the keys to [`Self::next_tier`].
    pub(crate) fn paint(&mut self, stroke: &Stroke, fold: bool) {
        for (first, last) in &stroke.keys {
            for (from, to) in self.take(*first, *last) {
                if fold && stroke.action == Action::Pass {
                    self.passed.push((from, to));
                } else {
                    self.painted.push((from, to, stroke.target()));
                }
            }
        }
    }

    /// Opens what was passed on.
    pub(crate) fn next_tier(&mut self) {
        self.open.extend(self.passed.drain(..));
    }

    /// Takes the open part of a range out.
    fn take(&mut self, first: u32, last: u32) -> Vec<(u32, u32)> {
        let touched: Vec<(u32, u32)> = self
            .open
            .range(..=last)
            .rev()
            .map_while(|(from, to)| (*to >= first).then_some((*from, *to)))
            .collect();
        let mut taken = Vec::with_capacity(touched.len());
        for (from, to) in touched {
            self.open.remove(&from);
            if from < first {
                self.open.insert(from, first - 1);
            }
            if to > last {
                self.open.insert(last + 1, to);
            }
            taken.push((from.max(first), to.min(last)));
        }
        taken
    }

    /// The map of everything painted.
    pub(crate) fn finish(mut self) -> Map<u32> {
        self.painted.sort_unstable();
        let mut map: Map<u32> = Vec::new();
        let mut next = 0;
        for (from, to, target) in self.painted {
            if from > next {
                push(&mut map, next, Target::Nothing);
            }
            push(&mut map, from, target);
            next = to + 1;
        }
        if next < PORT_KEYS {
            push(&mut map, next, Target::Nothing);
        }
        if map.len() > PIECES {
            let deny = Target::Rule {
                action: Action::Deny,
                order: 0,
                rule: RuleId::BROKEN,
            };
            return vec![(0, deny)];
        }
        map
    }
}

fn push<K>(map: &mut Map<K>, start: K, target: Target) {
    if map.last().is_none_or(|(_, last)| *last != target) {
        map.push((start, target));
    }
}

/// A rule as far as addresses go: its place among the rules, and one range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) rule: usize,
    pub(crate) first: u128,
    pub(crate) last: u128,
}

/// The range of addresses of a prefix, as numbers of its family.
pub(crate) fn bounds(prefix: &Prefix) -> (u128, u128) {
    let (first, bits) = match prefix.address() {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    };
    let hosts = u128::MAX
        .checked_shr(128 - bits + u32::from(prefix.length()))
        .unwrap_or(0);
    (first, first | hosts)
}

/// A block without its excepts.
pub(crate) fn without(cidr: &Prefix, except: &[Prefix]) -> Vec<(u128, u128)> {
    let (first, last) = bounds(cidr);
    let mut holes: Vec<_> = except.iter().map(bounds).collect();
    holes.sort_unstable();
    let mut ranges = Vec::new();
    let mut next = Some(first);
    for (from, to) in holes {
        let Some(start) = next.filter(|start| *start <= last) else {
            break;
        };
        if from > start {
            ranges.push((start, from - 1));
        }
        next = if to >= start { to.checked_add(1) } else { next };
    }
    if let Some(start) = next.filter(|start| *start <= last) {
        ranges.push((start, last));
    }
    ranges
}

/// Sorted ranges without overlaps.
pub(crate) fn joined(sorted: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    let mut joined: Vec<(u128, u128)> = Vec::new();
    for (first, last) in sorted {
        match joined.last_mut() {
            Some((_, end)) if first <= *end => *end = last.max(*end),
            _ => joined.push((first, last)),
        }
    }
    joined
}

/// Rules that are looked at for one map, each as often as another set of rules holds from some address on. Rules that
/// overlap at very many addresses would keep all other changes waiting.
const LOOKS: usize = 2_000_000;

/// A map would have more pieces than there can be room for, or takes too long to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLarge;

/// Walks over all addresses: for each stretch on which the same rules match, `leaf` is asked for what they lead to.
///
/// # Errors
/// [`TooLarge`]: more than `pieces`, or than [`LOOKS`].
pub(crate) fn sweep(
    ranges: &[Range],
    last: u128,
    pieces: usize,
    mut leaf: impl FnMut(&[usize]) -> Target,
) -> Result<Map<u128>, TooLarge> {
    // At an address: rules that begin, rules that end before it.
    let mut edges: BTreeMap<u128, Vec<(usize, bool)>> = BTreeMap::new();
    edges.entry(0).or_default();
    for range in ranges {
        edges
            .entry(range.first)
            .or_default()
            .push((range.rule, true));
        if range.last < last {
            edges
                .entry(range.last + 1)
                .or_default()
                .push((range.rule, false));
        }
    }
    let mut active: BTreeMap<usize, u32> = BTreeMap::new();
    let mut map = Vec::new();
    let mut looks = 0;
    for (start, changes) in edges {
        for (rule, begins) in changes {
            let count = active.entry(rule).or_default();
            *count = if begins {
                *count + 1
            } else {
                count.saturating_sub(1)
            };
        }
        active.retain(|_, count| *count > 0);
        looks += active.len();
        if map.len() > pieces || looks > LOOKS {
            return Err(TooLarge);
        }
        let rules: Vec<usize> = active.keys().copied().collect();
        push(&mut map, start, leaf(&rules));
    }
    if map.len() > pieces {
        return Err(TooLarge);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        let (address, length) = text.split_once('/').unwrap();
        Prefix::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
    }

    #[test]
    fn excepts_are_cut_out() {
        let range = |a: u128, b: u128| (0x0a00_0000 + a, 0x0a00_0000 + b);
        let of = |except: &[&str]| {
            let except: Vec<_> = except.iter().map(|it| prefix(it)).collect();
            without(&prefix("10.0.0.0/24"), &except)
        };
        assert_eq!(of(&[]), [range(0, 255)]);
        assert_eq!(of(&["10.0.0.0/25"]), [range(128, 255)]);
        assert_eq!(
            of(&["10.0.0.255/32", "10.0.0.4/31", "10.0.0.4/32"]),
            [range(0, 3), range(6, 254)]
        );
        let all = prefix("::/0");
        assert_eq!(without(&all, &[prefix("8000::/1")]), [(0, u128::MAX >> 1)]);
    }

    proptest! {
        #[test]
        fn the_first_rule_that_names_a_port_decides_it(
            strokes in proptest::collection::vec((proptest::collection::vec((0..40u32, 0..40u32), 0..3), 0..3usize), 0..8)
        ) {
            let actions = [Action::Accept, Action::Deny, Action::Pass];
            let strokes: Vec<Stroke> = strokes.into_iter().enumerate().map(|(order, (keys, action))| Stroke {
                action: actions[action],
                order: order as u16,
                rule: RuleId(order as u32),
                keys: keys.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect(),
            }).collect();
            let mut canvas = Canvas::new();
            for stroke in &strokes {
                canvas.paint(stroke, false);
            }
            let map = canvas.finish();
            prop_assert!(map.windows(2).all(|it| it[0].0 < it[1].0 && it[0].1 != it[1].1));
            for key in 0..50 {
                let expected = strokes.iter().find(|it| it.keys.iter().any(|(a, b)| (*a..=*b).contains(&key)));
                let found = map.iter().rev().find(|(start, _)| *start <= key).map(|(_, it)| *it);
                prop_assert_eq!(found, Some(expected.map_or(Target::Nothing, Stroke::target)));
            }
        }
    }
}
