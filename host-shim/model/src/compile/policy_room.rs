//! Policies that do not fit into the appliance: their pods are denied everything in the direction that the policies govern,
//! and everybody else's policies are in force.
//!
//! Each namespace has its share of every table ([`super::shares`]). What is divided are rulesets, each with everything that
//! its policies say to its pods. One that does not fit is kept aside: compiled as the others are, so that what it needs is
//! known, but the appliance has none of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use sluice_contract::LinkId;
use sluice_contract::message::Room;
use sluice_contract::policy::{
    Action, BindingRow, Layer, LayerId, RuleId, RulesetId, RulesetRow, SPAN_ENTRIES, SpanId,
};

use super::Attached;
use super::policy::Engine;
use super::policy_left_out::explain;
use super::policy_shares::{SPANS, TABLES, Weight, decide};
use super::publish::{publish, retract};
use super::rules::TierName;
use super::ruleset::Ruleset;
use super::shares::{Division, Lack, Rows, of_objects};
use super::span::Spans;
use crate::diff::Tables;
use crate::store::Store;

/// What does and does not fit.
#[derive(Debug, Default)]
pub(super) struct Fit {
    room: Option<Fitting>,
    /// Spans of what is kept aside.
    pub(super) aside: Spans,
    out: BTreeMap<RulesetId, Lack>,
    /// In place of a node's ruleset that is kept aside: the ports that no policy closes, and nothing else.
    substitutes: BTreeMap<RulesetId, Ruleset>,
    /// Pods of this node without a binding, which are denied everything.
    unbound: BTreeMap<LinkId, Lack>,
    /// So many rulesets there were when it was decided.
    decided: usize,
    released: bool,
    /// There is room for more or less than before.
    remeasure: bool,
    /// Pods that have a binding again.
    rebind: BTreeSet<LinkId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fitting {
    rows: Rows<TABLES>,
    bindings: u64,
}

impl Fit {
    pub(super) fn set_room(&mut self, room: &Room) {
        // The appliance's tables hold what is in force and what takes its place side by side.
        let twice = |rows: u32| u64::from(rows) * 3 / 4;
        let one_denied = twice(room.rulesets).saturating_sub(1);
        let rows = [
            twice(room.spans),
            one_denied,
            twice(room.classes),
            twice(room.named),
            twice(room.names),
        ];
        self.room = Some(Fitting {
            rows,
            bindings: of_objects(room.bindings),
        });
        self.released = true;
    }

    /// Pieces of a map that there can be room for.
    pub(super) fn pieces(&self) -> usize {
        let spans = self.room.map_or(u64::MAX, |it| it.rows[SPANS]);
        usize::try_from(spans).map_or(usize::MAX, |it| it.saturating_mul(SPAN_ENTRIES))
    }
}

impl Engine {
    pub(super) fn set_room(&mut self, room: &Room) {
        let before = self.fit.room;
        self.fit.set_room(room);
        self.pod_room.set_room(room);
        if before != self.fit.room {
            // How large a map may be is another one now.
            self.fit.remeasure = true;
        }
    }

    /// The ruleset that the appliance has in place of this one.
    pub(super) fn in_force(&self, id: RulesetId) -> RulesetId {
        let entry = self.rulesets.get(&id).filter(|it| it.is_aside);
        match entry {
            Some(entry) if entry.applied.node.is_empty() => RulesetId::NO_ROOM,
            _ => id,
        }
    }

    /// Decides anew what fits.
    pub(super) fn make_room(
        &mut self,
        store: &Store,
        links: &BTreeMap<LinkId, Attached>,
        tables: &mut Tables,
    ) {
        let Some(room) = self.fit.room else {
            return;
        };
        if std::mem::take(&mut self.fit.remeasure) {
            let all: Vec<(RulesetId, bool)> = (self.rulesets.iter())
                .map(|(id, it)| (*id, it.is_aside))
                .collect();
            for (id, is_aside) in all {
                self.recompile(id, is_aside, store, tables);
            }
        }
        let moved = self.choose(&room.rows, store, tables);
        self.limit_bindings(room.bindings, links);
        if moved.is_empty() && self.fit.unbound.is_empty() && self.fit.rebind.is_empty() {
            return;
        }
        for (link, ids) in self.bound.clone() {
            let concerned = ids.iter().any(|it| moved.contains(it));
            if concerned || self.fit.unbound.contains_key(&link) || self.fit.rebind.contains(&link)
            {
                let row = (!self.fit.unbound.contains_key(&link)).then(|| BindingRow {
                    link,
                    ingress: self.in_force(ids[0]),
                    egress: self.in_force(ids[1]),
                });
                tables.set_binding(link, row);
            }
        }
        self.fit.rebind.clear();
    }

    /// Moves rulesets aside and back; those that moved.
    fn choose(
        &mut self,
        room: &Rows<TABLES>,
        store: &Store,
        tables: &mut Tables,
    ) -> BTreeSet<RulesetId> {
        let counts = tables.counts();
        let there = [
            counts.spans,
            counts.rulesets,
            counts.classes,
            counts.named,
            counts.names,
        ];
        let fits = there.iter().zip(room).all(|(it, room)| *it as u64 <= *room);
        let mut rulesets = self.rulesets.values();
        let is_aside = !self.fit.out.is_empty();
        if !is_aside && fits && rulesets.all(|it| it.ruleset.too_large.is_none()) {
            tables.set_ruleset(RulesetId::NO_ROOM, None);
            return BTreeSet::new();
        }
        let mut rulesets = self.rulesets.values();
        let is_changed = std::mem::take(&mut self.fit.released)
            || rulesets.any(|it| it.weight.is_none())
            || self.fit.decided != self.rulesets.len();
        if !is_changed {
            return BTreeSet::new();
        }
        self.fit.decided = self.rulesets.len();
        for entry in self.rulesets.values_mut().filter(|it| it.weight.is_none()) {
            entry.weight = Some(Weight::of(&entry.ruleset));
        }
        let out = decide(&self.rulesets, room);
        let moved: BTreeSet<RulesetId> = (self.rulesets.iter())
            .filter(|(id, entry)| entry.is_aside != out.contains_key(id))
            .map(|(id, _)| *id)
            .collect();
        self.fit.out = out;
        // What goes makes room first.
        let (out, back): (Vec<RulesetId>, Vec<RulesetId>) =
            moved.iter().partition(|it| self.fit.out.contains_key(*it));
        for id in out {
            self.shift(id, true, store, tables);
            self.substitute(id, store, tables);
        }
        for id in back {
            self.drop_substitute(id, store, tables);
            self.shift(id, false, store, tables);
        }
        let is_used = self
            .rulesets
            .values()
            .any(|it| it.is_aside && it.applied.node.is_empty());
        tables.set_ruleset(RulesetId::NO_ROOM, is_used.then(denied));
        moved
    }

    fn shift(&mut self, id: RulesetId, is_aside: bool, store: &Store, tables: &mut Tables) {
        let weight = self.rulesets.get_mut(&id).and_then(|it| it.weight.take());
        self.recompile(id, is_aside, store, tables);
        if let Some(entry) = self.rulesets.get_mut(&id) {
            entry.weight = weight;
        }
    }

    /// Where a node's own policies do not fit it keeps the ports that no policy closes.
    fn substitute(&mut self, id: RulesetId, store: &Store, tables: &mut Tables) {
        let applied = self.rulesets.get(&id).map(|it| it.applied.clone());
        let Some(applied) = applied.filter(|it| !it.node.is_empty()) else {
            return;
        };
        let mut tiers = applied.tiers(store);
        let policies = tiers
            .iter_mut()
            .filter(|it| it.name == TierName::NodePolicy);
        policies.for_each(|it| it.rules.clear());
        let ruleset = self.ground(false, store, tables, |ground| {
            Ruleset::compile(id, &applied, tiers, ground)
        });
        publish(id, &ruleset, tables);
        self.fit.substitutes.insert(id, ruleset);
    }

    /// Takes out what stood in place of a ruleset.
    pub(super) fn drop_substitute(&mut self, id: RulesetId, store: &Store, tables: &mut Tables) {
        if let Some(ruleset) = self.fit.substitutes.remove(&id) {
            retract(id, &ruleset, tables);
            self.ground(false, store, tables, |ground| ruleset.dissolve(ground));
        }
    }

    /// A ruleset is there no more.
    pub(super) fn forget(&mut self, id: RulesetId) {
        self.fit.out.remove(&id);
        self.fit.released = true;
    }

    /// Decides which pods of this node have a binding.
    fn limit_bindings(&mut self, room: u64, links: &BTreeMap<LinkId, Attached>) {
        let former = std::mem::take(&mut self.fit.unbound);
        let of = |link: &LinkId| links.get(link).map(|it| it.pod.namespace.clone());
        // One is the node's own.
        let room = room.saturating_sub(1);
        if self.bound.len() as u64 > room {
            let mut demands: HashMap<Arc<str>, u64> = HashMap::new();
            for namespace in self.bound.keys().filter_map(of) {
                *demands.entry(namespace).or_default() += 1;
            }
            let division = Division::new(room, demands);
            let mut used: HashMap<Arc<str>, u64> = HashMap::new();
            for link in self.bound.keys() {
                let Some(namespace) = of(link) else { continue };
                let share = division.share(&namespace);
                let used = used.entry(namespace).or_default();
                if *used < share {
                    *used += 1;
                    continue;
                }
                let lack = Lack {
                    table: TABLES,
                    needs: 1,
                    room,
                    share,
                };
                self.fit.unbound.insert(*link, lack);
            }
        }
        let back = former
            .into_keys()
            .filter(|it| !self.fit.unbound.contains_key(it));
        self.fit.rebind = back.collect();
    }

    /// Objects that do not fit, and what that means.
    pub(super) fn left_out(
        &self,
        store: &Store,
        links: &BTreeMap<LinkId, Attached>,
    ) -> Vec<(String, String)> {
        let rulesets = self.fit.out.iter().filter_map(|(id, lack)| {
            let entry = self.rulesets.get(id)?;
            Some(explain(entry, lack, store))
        });
        let pods = self.fit.unbound.iter().filter_map(|(link, lack)| {
            let pod = &links.get(link)?.pod;
            let Lack { share, room, .. } = lack;
            let reason = format!(
                "It is denied everything on this node: namespace {} has {share} of the {room} pods with \
                 policies that the appliance has room for",
                pod.namespace
            );
            Some((format!("Pod {pod}"), reason))
        });
        let unknown = self.pod_room.left_out();
        let all: BTreeSet<(String, String)> = rulesets.chain(pods).chain(unknown).collect();
        all.into_iter().collect()
    }
}

/// What everything is denied by.
fn denied() -> RulesetRow {
    let layer = Layer {
        id: LayerId(RulesetId::NO_ROOM.0),
        classes: false,
        pods: SpanId::NOTHING,
        others: SpanId::NOTHING,
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Deny,
        miss_rule: RuleId::NO_ROOM,
    };
    RulesetRow {
        id: RulesetId::NO_ROOM,
        layers: [layer].into_iter().collect(),
    }
}
