//! The rules of one set of policies, compiled: layers, default classes, address maps, and the class of each identity that the
//! rules single out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use sluice_contract::Identity;
use sluice_contract::name::NameRow;
use sluice_contract::policy::{
    Action, Direction, Layer, LayerId, RuleId, RulesetId, SpanId, Target,
};

use super::identity::Identities;
use super::matching::{CompiledRule, Side};
use super::paint::{Canvas, sweep};
use super::rules::{
    Applied, EVERYTHING, PeerMatch, PortMatch, Rule, RuleNames, TierName, TierRules,
};
use super::selector::{SelectorId, Selectors, Wanted};
use super::span::{Holds, PIECES, Spans};
use crate::object::{Labels, NamedPort};

/// Rules of one tier, at most: their order has to fit into a span's entry. More than that deny everything.
const RULES: usize = u16::MAX as usize;

/// What the compiler works with.
pub(crate) struct Ground<'a> {
    pub(crate) identities: &'a Identities,
    pub(crate) selectors: &'a mut Selectors,
    pub(crate) spans: &'a mut Spans,
    pub(crate) names: &'a mut RuleNames,
    /// Who has which address.
    pub(crate) addresses: &'a BTreeMap<IpAddr, Identity>,
    pub(crate) namespace: &'a dyn Fn(&str) -> Arc<Labels>,
    /// Pieces of a map of addresses that there can be room for.
    pub(crate) pieces: usize,
}

/// A compiled set of policies.
#[derive(Debug)]
pub(crate) struct Ruleset {
    pub(crate) layers: Vec<CompiledLayer>,
    /// What is held of others.
    selectors: Vec<SelectorId>,
    names: Vec<RuleId>,
    /// Its address maps follow the addresses of pods.
    pub(crate) follows_addresses: bool,
    /// Ranges of addresses, if they are more than there can be room for; everything is denied instead.
    pub(crate) too_large: Option<usize>,
}

/// One layer.
#[derive(Debug)]
pub(crate) struct CompiledLayer {
    tiers: Vec<CompiledTier>,
    /// Several tiers in one: nobody is left to be passed on to.
    folded: bool,
    /// Everything but `classes` is final.
    pub(crate) row: Layer,
    pub(crate) classes: BTreeMap<Identity, (SpanId, Holds)>,
    /// What the rules say to addresses that a name has.
    pub(crate) named: BTreeMap<Arc<NameRow>, SpanId>,
    /// Its rules are the cluster's: no namespace made them.
    pub(crate) of_cluster: bool,
    /// Spans, but those of classes.
    pub(crate) holds: Holds,
}

#[derive(Debug)]
struct CompiledTier {
    rules: Vec<CompiledRule>,
}

impl Ruleset {
    pub(crate) fn compile(
        id: RulesetId,
        applied: &Applied,
        tiers: Vec<TierRules>,
        ground: &mut Ground<'_>,
    ) -> Self {
        let mut ruleset = Self {
            layers: Vec::new(),
            selectors: Vec::new(),
            names: Vec::new(),
            follows_addresses: false,
            too_large: None,
        };
        let by_address = tiers
            .iter()
            .flat_map(|it| &it.rules)
            .flat_map(|it| &it.peers);
        let by_address = by_address
            .clone()
            .any(|it| matches!(it, PeerMatch::Block(_) | PeerMatch::Name(_)));
        let misses: Vec<_> = tiers
            .iter()
            .map(|it| (it.miss, it.miss_rule.clone(), is_of_cluster(it.name)))
            .collect();
        let compiled: Vec<CompiledTier> = tiers
            .into_iter()
            .map(|tier| ruleset.tier(tier, applied, ground))
            .collect();
        let groups: Vec<(Vec<CompiledTier>, _)> = if by_address {
            compiled
                .into_iter()
                .map(|it| vec![it])
                .zip(misses)
                .collect()
        } else {
            let of_cluster = misses.iter().all(|(.., it)| *it);
            let last = misses.into_iter().next_back();
            let last = last.map(|(miss, rule, _)| (miss, rule, of_cluster));
            last.map(|last| (compiled, last)).into_iter().collect()
        };
        for (index, (tiers, (miss, miss_rule, of_cluster))) in groups.into_iter().enumerate() {
            let layer = LayerId((id.0 & !0b11) | index as u64);
            let miss_rule = miss_rule.map(|name| ground.names.acquire(&name));
            ruleset.names.extend(miss_rule);
            let folded = tiers.len() > 1;
            let row = Layer {
                id: layer,
                classes: false,
                pods: SpanId::NOTHING,
                others: SpanId::NOTHING,
                v4: SpanId::NOTHING,
                v6: SpanId::NOTHING,
                miss,
                miss_rule: miss_rule.unwrap_or_default(),
            };
            let layer = CompiledLayer {
                tiers,
                folded,
                row,
                classes: BTreeMap::new(),
                named: BTreeMap::new(),
                of_cluster,
                holds: Vec::new(),
            };
            ruleset.finish(layer, ground);
        }
        ruleset
    }

    fn tier(
        &mut self,
        tier: TierRules,
        applied: &Applied,
        ground: &mut Ground<'_>,
    ) -> CompiledTier {
        let too_many = tier.rules.len() > RULES;
        let mut rules = tier.rules;
        if too_many {
            // Fails closed, under the name of the first rule.
            rules.truncate(1);
            for rule in &mut rules {
                rule.action = Action::Deny;
                rule.peers = vec![PeerMatch::Everybody];
                rule.ports.clear();
            }
        }
        let rules = rules
            .into_iter()
            .map(|rule| self.rule(rule, applied, ground))
            .collect();
        CompiledTier { rules }
    }

    fn rule(&mut self, rule: Rule, applied: &Applied, ground: &mut Ground<'_>) -> CompiledRule {
        let id = ground.names.acquire(&rule.name);
        self.names.push(id);
        let mut selectors = Vec::new();
        for peer in &rule.peers {
            if let PeerMatch::Pods(wanted) = peer
                && !wanted.is_everything()
            {
                selectors.push(ground.acquire(wanted));
            }
        }
        self.selectors.extend(&selectors);
        let no_ports: &[NamedPort] = &[];
        let own = applied.ports.as_deref().unwrap_or(no_ports);
        let mut keys: Vec<_> = rule.ports.iter().flat_map(|it| it.keys(own)).collect();
        if rule.ports.is_empty() {
            keys.push(EVERYTHING);
        }
        let mut named = Vec::new();
        if applied.direction == Direction::Egress {
            for port in &rule.ports {
                if let PortMatch::Named(name, _) = port {
                    // Pods that have such a port are classes of their own, whoever the peers are.
                    self.selectors
                        .push(ground.acquire(&Wanted::Port(name.clone())));
                    named.push(port.clone());
                    let blocks = rule
                        .peers
                        .iter()
                        .any(|it| matches!(it, PeerMatch::Block(_)));
                    self.follows_addresses |= blocks;
                }
            }
        }
        CompiledRule {
            rule,
            id,
            selectors,
            keys,
            named,
        }
    }

    /// Fills in a layer's maps and classes.
    fn finish(&mut self, mut layer: CompiledLayer, ground: &mut Ground<'_>) {
        let mut holds = Vec::new();
        layer.row.pods = layer.class(&Side::AnyPod, ground, &mut holds);
        layer.row.others = layer.class(&Side::Other, ground, &mut holds);
        for v6 in [false, true] {
            let (map, too_large) = layer.addresses(v6, ground, &mut holds);
            if v6 {
                layer.row.v6 = map;
            } else {
                layer.row.v4 = map;
            }
            self.too_large = self.too_large.max(too_large);
        }
        layer.named = layer.named(ground, &mut holds);
        layer.holds = holds;
        let singled: BTreeSet<Identity> = self
            .selectors
            .iter()
            .flat_map(|it| ground.selectors.members(*it))
            .collect();
        for identity in singled {
            layer.update_class(identity, ground);
        }
        self.layers.push(layer);
    }

    /// Which selectors decide about its classes.
    pub(crate) fn selectors(&self) -> impl Iterator<Item = SelectorId> {
        self.selectors.iter().copied()
    }

    /// Gives back what is held of others.
    pub(crate) fn dissolve(self, ground: &mut Ground<'_>) {
        for layer in self.layers {
            ground.spans.release(&layer.holds);
            for (_, holds) in layer.classes.into_values() {
                ground.spans.release(&holds);
            }
        }
        for selector in self.selectors {
            ground.selectors.release(selector);
        }
        for name in self.names {
            ground.names.release(name);
        }
    }
}

impl Ground<'_> {
    fn acquire(&mut self, wanted: &Wanted) -> SelectorId {
        self.selectors
            .acquire(wanted, self.identities, self.namespace)
    }
}

impl CompiledLayer {
    /// Computes the class of an identity again; whether it is another one now.
    pub(crate) fn update_class(&mut self, identity: Identity, ground: &mut Ground<'_>) -> bool {
        let mut holds = Vec::new();
        let singled = ground
            .identities
            .group(identity)
            .map(|group| self.class(&Side::Pod(identity, group), ground, &mut holds));
        let now = singled.filter(|span| *span != self.row.pods);
        if now.is_none() {
            ground.spans.release(&std::mem::take(&mut holds));
        }
        let before = match now {
            Some(span) => self.classes.insert(identity, (span, holds)),
            None => self.classes.remove(&identity),
        };
        let span_before = before.as_ref().map(|(span, _)| *span);
        if let Some((_, holds)) = before {
            ground.spans.release(&holds);
        }
        span_before != now
    }

    /// What the rules say to peers of one kind, as a map of ports.
    fn class(&self, side: &Side<'_>, ground: &mut Ground<'_>, holds: &mut Holds) -> SpanId {
        let mut canvas = Canvas::new();
        for tier in &self.tiers {
            for (order, rule) in tier.rules.iter().enumerate() {
                if canvas.is_full() {
                    break;
                }
                if rule.matches(side, ground.selectors) {
                    canvas.paint(&rule.stroke(order, rule.keys_for(side)), self.folded);
                }
            }
            canvas.next_tier();
        }
        ground.spans.map(&canvas.finish(), holds)
    }

    /// What the rules say to addresses that a name has.
    fn named(&self, ground: &mut Ground<'_>, holds: &mut Holds) -> BTreeMap<Arc<NameRow>, SpanId> {
        let rules = || self.tiers.iter().flat_map(|it| &it.rules).enumerate();
        let names: BTreeSet<_> = rules().flat_map(|(_, rule)| rule.names()).collect();
        let span = |name: &Arc<NameRow>| {
            let mut canvas = Canvas::new();
            for (order, rule) in rules().filter(|(_, rule)| rule.names().any(|it| it == name)) {
                canvas.paint(&rule.stroke(order, rule.keys.clone()), false);
            }
            (name.clone(), ground.spans.map(&canvas.finish(), holds))
        };
        names.into_iter().map(span).collect()
    }

    /// What the rules say to addresses; and how many ranges they name, if that is more than there can be room for.
    fn addresses(
        &self,
        v6: bool,
        ground: &mut Ground<'_>,
        holds: &mut Holds,
    ) -> (SpanId, Option<usize>) {
        let mut strokes = Vec::new();
        let mut ranges = Vec::new();
        for (order, rule) in self.tiers.iter().flat_map(|it| &it.rules).enumerate() {
            rule.block_ranges(order, v6, ground, &mut strokes, &mut ranges);
        }
        if ranges.is_empty() {
            return (SpanId::NOTHING, None);
        }
        let mut leaves: HashMap<Vec<usize>, Target> = HashMap::new();
        let last = if v6 { u128::MAX } else { u128::from(u32::MAX) };
        let pieces = PIECES.min(ground.pieces);
        let map = sweep(&ranges, last, pieces, |rules| {
            if let Some(target) = leaves.get(rules) {
                return *target;
            }
            let mut canvas = Canvas::new();
            for stroke in rules.iter().filter_map(|it| strokes.get(*it)) {
                canvas.paint(stroke, false);
            }
            let target = match ground.spans.map(&canvas.finish(), holds) {
                SpanId::NOTHING => Target::Nothing,
                span => Target::Ports(span),
            };
            leaves.insert(rules.to_vec(), target);
            target
        });
        let Ok(map) = map else {
            let deny = Target::Rule {
                action: Action::Deny,
                order: 0,
                rule: RuleId::BROKEN,
            };
            let denied = ground.spans.map(&[(0, deny)], holds);
            return (denied, Some(ranges.len()));
        };
        if v6 {
            return (ground.spans.v6(&map, holds), None);
        }
        let map: Vec<(u32, Target)> = map
            .iter()
            .map(|(start, target)| (u32::try_from(*start).unwrap_or(u32::MAX), *target))
            .collect();
        (ground.spans.map(&map, holds), None)
    }
}

/// Whether rules of a tier are made by those who run the cluster.
const fn is_of_cluster(tier: TierName) -> bool {
    !matches!(tier, TierName::NetworkPolicy)
}
