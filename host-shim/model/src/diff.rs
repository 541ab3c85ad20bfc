//! The rows that should be in force, and what has to be said to get there from what is in force.
//!
//! Rows are kept by kind, small. For every row that has changed since the last [`Tables::take_delta`] it is remembered whether the
//! other side has one of that key, so a delta costs what has changed and never removes what is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use sluice_contract::name::{NameId, NameRow};
use sluice_contract::policy::{
    BindingRow, ClassRow, IdentityRow, LayerId, NamedRow, PolicyKey, PolicyRow, RulesetId,
    RulesetRow, SettingsRow, SpanId, SpanRow,
};
use sluice_contract::service::{ServiceKey, ServiceRow};
use sluice_contract::{Identity, Key, LinkId, Row};

use crate::compile::span::Spans;

/// One step of a change.
#[expect(
    clippy::large_enum_variant,
    reason = "steps are made one at a time and handed on"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Put(Row),
    Remove(Key),
}

impl Step {
    pub fn key(&self) -> Key {
        match self {
            Self::Put(row) => row.key(),
            Self::Remove(key) => *key,
        }
    }
}

/// Rows of policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub identities: usize,
    pub bindings: usize,
    pub rulesets: usize,
    pub classes: usize,
    pub spans: usize,
    pub names: usize,
    pub named: usize,
}

/// All rows of policy and Services.
#[derive(Debug, Default)]
pub struct Tables {
    settings: Option<SettingsRow>,
    identities: BTreeMap<IpAddr, Identity>,
    bindings: BTreeMap<LinkId, BindingRow>,
    rulesets: BTreeMap<RulesetId, RulesetRow>,
    classes: BTreeMap<(LayerId, Identity), SpanId>,
    spans: Spans,
    /// Names, and in how many rows they are used.
    names: BTreeMap<NameId, (Arc<NameRow>, usize)>,
    named: BTreeMap<(LayerId, NameId), SpanId>,
    resolvers: BTreeSet<IpAddr>,
    services: BTreeMap<ServiceKey, Box<ServiceRow>>,
    /// Keys that have changed, and whether the other side has a row there.
    dirty: BTreeMap<Place, bool>,
}

/// Keys in the order in which rows depend on each other: what is referred to comes first.
type Place = (u8, Key);

fn place(key: Key) -> Place {
    let rank = match key {
        Key::Service(key) => match key {
            ServiceKey::Nat | ServiceKey::Connections => 0,
            ServiceKey::Prefix(_) => 1,
            ServiceKey::Address(_) => 2,
            ServiceKey::Set(_) => 3,
            ServiceKey::Backend { .. } => 4,
            ServiceKey::Slots { .. } => 5,
            ServiceKey::Port(_) => 6,
            ServiceKey::Source { .. } => 7,
            ServiceKey::Frontend { .. } => 8,
        },
        Key::Policy(key) => match key {
            PolicyKey::Span(_) | PolicyKey::Name(_) => 10,
            PolicyKey::Class(..) | PolicyKey::Named(..) | PolicyKey::Resolver(_) => 11,
            PolicyKey::Ruleset(_) => 12,
            PolicyKey::Identity(_) => 13,
            PolicyKey::Binding(_) => 14,
            PolicyKey::Settings => 15,
        },
        _ => 9,
    };
    (rank, key)
}

/// Puts or takes out; whether that changed something, and whether there was a row before.
fn change<K: Ord, V: PartialEq>(
    map: &mut BTreeMap<K, V>,
    key: K,
    value: Option<V>,
) -> Option<bool> {
    match value {
        Some(value) if map.get(&key) == Some(&value) => None,
        Some(value) => Some(map.insert(key, value).is_some()),
        None => map.remove(&key).map(|_| true),
    }
}

impl Tables {
    pub(crate) fn set_settings(&mut self, settings: SettingsRow) {
        let before = self.settings.replace(settings);
        if before != Some(settings) {
            self.note(Key::Policy(PolicyKey::Settings), Some(before.is_some()));
        }
    }

    /// Whether some pods have no row although they have addresses.
    pub(crate) fn leave_pods_out(&mut self, unlisted_pods: bool) {
        if let Some(settings) = self.settings {
            self.set_settings(SettingsRow {
                unlisted_pods,
                ..settings
            });
        }
    }

    pub(crate) fn set_identity(&mut self, address: IpAddr, identity: Option<Identity>) {
        let was = change(&mut self.identities, address, identity);
        self.note(Key::Policy(PolicyKey::Identity(address)), was);
    }

    pub(crate) fn set_binding(&mut self, link: LinkId, row: Option<BindingRow>) {
        let was = change(&mut self.bindings, link, row);
        self.note(Key::Policy(PolicyKey::Binding(link)), was);
    }

    pub(crate) fn set_ruleset(&mut self, id: RulesetId, row: Option<RulesetRow>) {
        let was = change(&mut self.rulesets, id, row);
        self.note(Key::Policy(PolicyKey::Ruleset(id)), was);
    }

    pub(crate) fn set_class(&mut self, layer: LayerId, identity: Identity, span: Option<SpanId>) {
        let was = change(&mut self.classes, (layer, identity), span);
        self.note(Key::Policy(PolicyKey::Class(layer, identity)), was);
    }

    /// The classes of a layer that have a row.
    pub(crate) fn classes_of(&self, layer: LayerId) -> Vec<Identity> {
        let all = (layer, Identity(0))..=(layer, Identity(u32::MAX));
        self.classes
            .range(all)
            .map(|((_, identity), _)| *identity)
            .collect()
    }

    /// What a layer says to addresses that a name has. A name is there as long as a layer names it.
    pub(crate) fn set_named(&mut self, layer: LayerId, name: &Arc<NameRow>, span: Option<SpanId>) {
        let (id, is_there) = (name.id, span.is_some());
        let Some(was) = change(&mut self.named, (layer, id), span) else {
            return;
        };
        self.note(Key::Policy(PolicyKey::Named(layer, id)), Some(was));
        if was == is_there {
            return;
        }
        let (_, users) = self.names.entry(id).or_insert_with(|| (name.clone(), 0));
        let used = *users > 0;
        *users = if is_there { *users + 1 } else { *users - 1 };
        if *users == 0 {
            self.names.remove(&id);
        }
        if used != self.names.contains_key(&id) {
            self.note(Key::Policy(PolicyKey::Name(id)), Some(used));
        }
    }

    /// The names that a layer names.
    pub(crate) fn names_of(&self, layer: LayerId) -> Vec<Arc<NameRow>> {
        let all = (layer, NameId(0))..=(layer, NameId(u64::MAX));
        let named = self.named.range(all).map(|((_, id), _)| id);
        named
            .filter_map(|id| self.names.get(id).map(|(name, _)| name.clone()))
            .collect()
    }

    /// A name by its number.
    pub fn name(&self, id: NameId) -> Option<&NameRow> {
        self.names.get(&id).map(|(name, _)| &**name)
    }

    /// Whether any rule names a domain.
    pub(crate) fn has_names(&self) -> bool {
        !self.names.is_empty()
    }

    /// Who is believed about names.
    pub(crate) fn set_resolvers(&mut self, addresses: BTreeSet<IpAddr>) {
        let former = std::mem::replace(&mut self.resolvers, addresses);
        for address in former.symmetric_difference(&self.resolvers.clone()) {
            let key = Key::Policy(PolicyKey::Resolver(*address));
            self.note(key, Some(former.contains(address)));
        }
    }

    pub(crate) fn set_service(&mut self, key: ServiceKey, row: Option<ServiceRow>) {
        let was = change(&mut self.services, key, row.map(Box::new));
        self.note(Key::Service(key), was);
    }

    /// What the compiler reads and where it keeps spans.
    pub(crate) fn for_compiler(&mut self) -> (&BTreeMap<IpAddr, Identity>, &mut Spans) {
        (&self.identities, &mut self.spans)
    }

    fn note(&mut self, key: Key, was: Option<bool>) {
        if let Some(was) = was {
            self.dirty.entry(place(key)).or_insert(was);
        }
    }

    /// Spans tell of their changes themselves.
    fn note_spans(&mut self) {
        for (id, was) in self.spans.take_changed() {
            let key = Key::Policy(PolicyKey::Span(id));
            self.dirty.entry(place(key)).or_insert(was);
        }
    }

    /// The row of a key.
    pub fn row(&self, key: &Key) -> Option<Row> {
        match key {
            Key::Policy(key) => self.policy_row(key).map(Row::Policy),
            Key::Service(key) => self
                .services
                .get(key)
                .map(|row| Row::Service((**row).clone())),
            _ => None,
        }
    }

    fn policy_row(&self, key: &PolicyKey) -> Option<PolicyRow> {
        Some(match key {
            PolicyKey::Settings => PolicyRow::Settings(self.settings?),
            PolicyKey::Identity(address) => PolicyRow::Identity(IdentityRow {
                address: *address,
                identity: *self.identities.get(address)?,
            }),
            PolicyKey::Binding(link) => PolicyRow::Binding(*self.bindings.get(link)?),
            PolicyKey::Ruleset(id) => PolicyRow::Ruleset(self.rulesets.get(id)?.clone()),
            PolicyKey::Class(layer, identity) => PolicyRow::Class(ClassRow {
                layer: *layer,
                identity: *identity,
                ports: *self.classes.get(&(*layer, *identity))?,
            }),
            PolicyKey::Span(id) => PolicyRow::Span(SpanRow {
                id: *id,
                entries: self.spans.get(*id)?.clone(),
            }),
            PolicyKey::Name(id) => PolicyRow::Name((*self.names.get(id)?.0).clone()),
            PolicyKey::Named(layer, name) => PolicyRow::Named(NamedRow {
                layer: *layer,
                name: *name,
                ports: *self.named.get(&(*layer, *name))?,
            }),
            PolicyKey::Resolver(address) => PolicyRow::Resolver(*self.resolvers.get(address)?),
        })
    }

    /// Every row, each after those it refers to. For a guest that has nothing.
    pub fn all(&self) -> impl Iterator<Item = Row> {
        let mut spans: Vec<SpanId> = self.spans.iter().map(|(id, _)| id).collect();
        spans.sort_unstable();
        let services = self.services.keys().map(|key| place(Key::Service(*key)));
        let mut services: Vec<Place> = services.collect();
        services.sort_unstable();
        let keys = services
            .into_iter()
            .map(|(_, key)| key)
            .chain(spans.into_iter().map(PolicyKey::Span).map(Key::Policy))
            .chain(
                self.names
                    .keys()
                    .map(|id| Key::Policy(PolicyKey::Name(*id))),
            )
            .chain(
                self.named
                    .keys()
                    .map(|(layer, name)| Key::Policy(PolicyKey::Named(*layer, *name))),
            )
            .chain(
                self.resolvers
                    .iter()
                    .map(|it| Key::Policy(PolicyKey::Resolver(*it))),
            )
            .chain(
                self.classes
                    .keys()
                    .map(|(layer, it)| Key::Policy(PolicyKey::Class(*layer, *it))),
            )
            .chain(
                self.rulesets
                    .keys()
                    .map(|id| Key::Policy(PolicyKey::Ruleset(*id))),
            )
            .chain(
                self.identities
                    .keys()
                    .map(|it| Key::Policy(PolicyKey::Identity(*it))),
            )
            .chain(
                self.bindings
                    .keys()
                    .map(|it| Key::Policy(PolicyKey::Binding(*it))),
            )
            .chain(
                self.settings
                    .iter()
                    .map(|_| Key::Policy(PolicyKey::Settings)),
            );
        keys.filter_map(|key| self.row(&key))
    }

    /// How many rows of policy there are, by kind.
    pub fn counts(&self) -> Counts {
        Counts {
            identities: self.identities.len(),
            bindings: self.bindings.len(),
            rulesets: self.rulesets.len(),
            classes: self.classes.len(),
            spans: self.spans.len(),
            names: self.names.len(),
            named: self.named.len(),
        }
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        usize::from(self.settings.is_some())
            + self.identities.len()
            + self.bindings.len()
            + self.rulesets.len()
            + self.classes.len()
            + self.spans.len()
            + self.names.len()
            + self.named.len()
            + self.resolvers.len()
            + self.services.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What has changed since the last delta, or since [`Self::forget_changes`]: new and changed rows, each after those it
    /// refers to; then rows that are gone, each before those it referred to.
    pub fn take_delta(&mut self) -> Vec<Step> {
        self.note_spans();
        let dirty = std::mem::take(&mut self.dirty);
        let mut steps = Vec::with_capacity(dirty.len());
        let mut gone = Vec::new();
        for ((_, key), was) in dirty {
            match self.row(&key) {
                Some(row) => steps.push(Step::Put(row)),
                None if was => gone.push(Step::Remove(key)),
                None => {}
            }
        }
        steps.extend(gone.into_iter().rev());
        steps
    }

    /// Whether there is anything to be said.
    pub fn has_changes(&mut self) -> bool {
        self.note_spans();
        !self.dirty.is_empty()
    }

    /// The other side is about to get [`Self::all`].
    pub fn forget_changes(&mut self) {
        self.note_spans();
        self.dirty.clear();
    }
}
