//! Which rulesets fit: each namespace has its share of every table of policy.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use sluice_contract::name::NameId;
use sluice_contract::policy::{RulesetId, SpanId};

use super::policy::Entry;
use super::rules::Applied;
use super::ruleset::Ruleset;
use super::shares::{CLUSTER, Division, Lack, Rows};

pub(super) const SPANS: usize = 0;
pub(super) const RULESETS: usize = 1;
pub(super) const CLASSES: usize = 2;
pub(super) const NAMED: usize = 3;
pub(super) const NAMES: usize = 4;
pub(super) const TABLES: usize = 5;

/// What a ruleset needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Weight {
    /// Spans, each once: of its namespace's policies, and of the cluster's.
    own: Vec<SpanId>,
    cluster: Vec<SpanId>,
    names: Vec<NameId>,
    /// Rows that no other ruleset has. Nothing where they are counted above.
    rows: Rows<TABLES>,
}

impl Weight {
    pub(super) fn of(ruleset: &Ruleset) -> Self {
        let (mut own, mut cluster) = (BTreeSet::new(), BTreeSet::new());
        let mut names = BTreeSet::new();
        let mut rows = [0; TABLES];
        rows[RULESETS] = 1;
        for layer in &ruleset.layers {
            let spans = if layer.of_cluster {
                &mut cluster
            } else {
                &mut own
            };
            spans.extend(&layer.holds);
            for (_, holds) in layer.classes.values() {
                spans.extend(holds);
            }
            names.extend(layer.named.keys().map(|it| it.id));
            rows[CLASSES] += layer.classes.len() as u64;
            rows[NAMED] += layer.named.len() as u64;
        }
        Self {
            own: own.into_iter().collect(),
            cluster: cluster.into_iter().collect(),
            names: names.into_iter().collect(),
            rows,
        }
    }
}

/// Whose rows a ruleset's are: of the namespace whose policies it is made of.
fn owner(applied: &Applied) -> Arc<str> {
    let first = applied.network.first();
    first.map_or_else(|| CLUSTER.into(), |it| it.namespace.clone())
}

/// What is taken so far, by owner.
#[derive(Default)]
struct Taken<'a> {
    spans: HashMap<&'a str, HashSet<SpanId>>,
    names: HashSet<NameId>,
    rows: HashMap<&'a str, Rows<TABLES>>,
}

impl<'a> Taken<'a> {
    /// What a ruleset needs beyond that, of its owner's share and of the cluster's.
    fn more(&self, owner: &str, weight: &Weight) -> [Rows<TABLES>; 2] {
        let new = |owner: &str, all: &[SpanId]| {
            let there = self.spans.get(owner);
            let is_new = |it: &&SpanId| there.is_none_or(|there| !there.contains(it));
            all.iter().filter(is_new).count() as u64
        };
        let mut own = weight.rows;
        own[SPANS] = new(owner, &weight.own);
        let mut cluster = [0; TABLES];
        cluster[SPANS] = new(CLUSTER, &weight.cluster);
        let names = weight.names.iter();
        cluster[NAMES] = names.filter(|it| !self.names.contains(it)).count() as u64;
        [own, cluster]
    }

    fn add(&mut self, owner: &'a str, weight: &Weight) {
        let rows = self.rows.entry(owner).or_default();
        rows.iter_mut().zip(weight.rows).for_each(|(a, b)| *a += b);
        self.spans.entry(owner).or_default().extend(&weight.own);
        self.spans
            .entry(CLUSTER)
            .or_default()
            .extend(&weight.cluster);
        self.names.extend(&weight.names);
    }

    fn of(&self, owner: &str) -> Rows<TABLES> {
        let mut rows = self.rows.get(owner).copied().unwrap_or_default();
        rows[SPANS] = self.spans.get(owner).map_or(0, |it| it.len() as u64);
        if owner == CLUSTER {
            rows[NAMES] = self.names.len() as u64;
        }
        rows
    }

    /// All of it. Equal spans are one row, whoever has them.
    fn total(&self) -> Rows<TABLES> {
        let mut total = [0; TABLES];
        for rows in self.rows.values() {
            total.iter_mut().zip(rows).for_each(|(a, b)| *a += b);
        }
        let all: HashSet<&SpanId> = self.spans.values().flatten().collect();
        total[SPANS] = all.len() as u64;
        total[NAMES] = self.names.len() as u64;
        total
    }
}

/// What does not fit of rulesets that have been weighed.
pub(super) fn decide(
    rulesets: &BTreeMap<RulesetId, Entry>,
    room: &Rows<TABLES>,
) -> BTreeMap<RulesetId, Lack> {
    let mut out = BTreeMap::new();
    let mut order = Vec::new();
    let owners: Vec<Arc<str>> = rulesets.values().map(|it| owner(&it.applied)).collect();
    for ((id, entry), owner) in rulesets.iter().zip(&owners) {
        if let (None, Some(weight)) = (entry.ruleset.too_large, &entry.weight) {
            let key = (&**owner != CLUSTER, &entry.applied);
            order.push((key, *id, &**owner, weight));
        }
    }
    order.sort_by(|a, b| a.0.cmp(&b.0));
    let mut wanted = Taken::default();
    for (_, _, owner, weight) in &order {
        wanted.add(owner, weight);
    }
    let divisions = divisions(&wanted, &owners, room);
    let limits = |owner: &str, table: usize| divisions.get(table).map_or(0, |it| it.limit(owner));
    for (id, entry) in rulesets {
        if let Some(ranges) = entry.ruleset.too_large {
            let lack = Lack {
                table: SPANS,
                needs: ranges as u64,
                room: room[SPANS],
                share: limits(&owner(&entry.applied), SPANS),
            };
            out.insert(*id, lack);
        }
    }
    let total = wanted.total();
    if total.iter().zip(room).all(|(it, room)| it <= room) {
        return out;
    }
    let mut taken = Taken::default();
    let mut late = Vec::new();
    // Shares first: they always fit side by side.
    for (_, id, owner, weight) in &order {
        let mut over = None;
        for (who, more) in [*owner, CLUSTER].into_iter().zip(taken.more(owner, weight)) {
            let has = taken.of(who);
            let share = |table: usize| divisions.get(table).map_or(0, |it| it.share(who));
            over = over.or((0..TABLES)
                .find(|it| has[*it] + more[*it] > share(*it))
                .map(|it| (who, it)));
        }
        let Some((who, table)) = over else {
            taken.add(owner, weight);
            continue;
        };
        let needs = match table {
            SPANS if who == CLUSTER => weight.cluster.len() as u64,
            SPANS => weight.own.len() as u64,
            NAMES => weight.names.len() as u64,
            _ => weight.rows[table],
        };
        let (room, share) = (room[table], limits(who, table));
        out.insert(
            *id,
            Lack {
                table,
                needs,
                room,
                share,
            },
        );
        late.push((*id, *owner, *weight));
    }
    // What is left over, to whoever was there first.
    let mut has = taken.total();
    for (id, owner, weight) in late {
        let [own, cluster] = taken.more(owner, weight);
        let with = |it: usize| has[it] + own[it] + cluster[it];
        let then: Rows<TABLES> = std::array::from_fn(with);
        if then.iter().zip(room).all(|(it, room)| it <= room) {
            has = then;
            taken.add(owner, weight);
            out.remove(&id);
        }
    }
    out
}

fn divisions(wanted: &Taken<'_>, owners: &[Arc<str>], room: &Rows<TABLES>) -> Vec<Division> {
    let mut all: BTreeSet<Arc<str>> = owners.iter().cloned().collect();
    all.insert(CLUSTER.into());
    let rows: Vec<(Arc<str>, Rows<TABLES>)> = all
        .into_iter()
        .map(|owner| (owner.clone(), wanted.of(&owner)))
        .collect();
    let one = |table: usize| {
        let demands = rows
            .iter()
            .map(|(owner, rows)| (owner.clone(), rows[table]));
        Division::new(room[table], demands.collect())
    };
    (0..TABLES).map(one).collect()
}
