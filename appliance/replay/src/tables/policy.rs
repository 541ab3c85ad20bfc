//! Policy in its compiled form, row by row.

use std::net::IpAddr;

use serde::Deserialize;
use sluice_contract::policy::{
    BindingRow, ClassRow, IdentityRow, Layer, LayerId, PolicyRow, RuleId, RulesetId, RulesetRow,
    SettingsRow, SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::{Identity, Row};

use super::links::Links;
use super::text::{ActionWord, EstablishedWord, StartText};
use super::{Rows, TablesError};

/// See [`SettingsRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    unbound: ActionWord,
    #[serde(default)]
    host_reaches_pods: bool,
    established: EstablishedWord,
    #[serde(default)]
    audit: bool,
    #[serde(default)]
    audit_node: bool,
    unlisted_pods: bool,
}

/// See [`IdentityRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    address: IpAddr,
    identity: u32,
}

/// See [`BindingRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Binding {
    link: String,
    #[serde(default)]
    ingress: u64,
    #[serde(default)]
    egress: u64,
}

/// See [`RulesetRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ruleset {
    id: u64,
    layers: Vec<LayerFields>,
}

/// See [`Layer`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerFields {
    id: u64,
    #[serde(default)]
    classes: bool,
    #[serde(default)]
    pods: u64,
    #[serde(default)]
    others: u64,
    #[serde(default)]
    v4: u64,
    #[serde(default)]
    v6: u64,
    miss: ActionWord,
    #[serde(default)]
    miss_rule: u32,
}

/// See [`ClassRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Class {
    layer: u64,
    identity: u32,
    ports: u64,
}

/// See [`SpanRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Span {
    id: u64,
    entries: Vec<Entry>,
}

/// See [`SpanEntry`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    start: StartText,
    target: TargetFields,
}

/// See [`Target`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum TargetFields {
    Nothing,
    Rule {
        action: ActionWord,
        #[serde(default)]
        order: u16,
        rule: u32,
    },
    Finer(u64),
    Word(u64),
    Ports(u64),
}

/// Everything about policy.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Policy {
    settings: Option<Settings>,
    identities: Vec<Known>,
    spans: Vec<Span>,
    classes: Vec<Class>,
    rulesets: Vec<Ruleset>,
    bindings: Vec<Binding>,
}

impl Policy {
    /// All rows, each behind those it refers to.
    pub(super) fn put(&self, links: &Links, rows: &mut Rows) -> Result<(), TablesError> {
        let mut put = |place: String, row| rows.put(place, Row::Policy(row));
        if let Some(settings) = &self.settings {
            let row = SettingsRow {
                unbound: settings.unbound.0,
                host_reaches_pods: settings.host_reaches_pods,
                established: settings.established.0,
                audit: settings.audit,
                audit_node: settings.audit_node,
                unlisted_pods: settings.unlisted_pods,
            };
            put("policy.settings".into(), PolicyRow::Settings(row));
        }
        for (at, known) in self.identities.iter().enumerate() {
            let row = IdentityRow {
                address: known.address,
                identity: Identity(known.identity),
            };
            put(format!("policy.identities[{at}]"), PolicyRow::Identity(row));
        }
        for (at, span) in self.spans.iter().enumerate() {
            let place = format!("policy.spans[{at}]");
            let entries: Vec<SpanEntry> = span.entries.iter().map(Entry::row).collect();
            let entries = heapless::Vec::from_slice(&entries).map_err(|_| {
                TablesError::value(format!("{place}.entries: More than a span can have"))
            })?;
            let id = SpanId(span.id);
            put(place, PolicyRow::Span(SpanRow { id, entries }));
        }
        for (at, class) in self.classes.iter().enumerate() {
            let row = ClassRow {
                layer: LayerId(class.layer),
                identity: Identity(class.identity),
                ports: SpanId(class.ports),
            };
            put(format!("policy.classes[{at}]"), PolicyRow::Class(row));
        }
        for (at, ruleset) in self.rulesets.iter().enumerate() {
            let place = format!("policy.rulesets[{at}]");
            let layers: Vec<Layer> = ruleset.layers.iter().map(LayerFields::row).collect();
            let layers = heapless::Vec::from_slice(&layers).map_err(|_| {
                TablesError::value(format!("{place}.layers: More than a ruleset can have"))
            })?;
            let id = RulesetId(ruleset.id);
            put(place, PolicyRow::Ruleset(RulesetRow { id, layers }));
        }
        for (at, binding) in self.bindings.iter().enumerate() {
            let place = format!("policy.bindings[{at}]");
            let link = links.id(&binding.link).ok_or_else(|| {
                TablesError::value(format!("{place}.link: There is no {:?}", binding.link))
            })?;
            let row = BindingRow {
                link,
                ingress: RulesetId(binding.ingress),
                egress: RulesetId(binding.egress),
            };
            put(place, PolicyRow::Binding(row));
        }
        Ok(())
    }
}

impl LayerFields {
    fn row(&self) -> Layer {
        Layer {
            id: LayerId(self.id),
            classes: self.classes,
            pods: SpanId(self.pods),
            others: SpanId(self.others),
            v4: SpanId(self.v4),
            v6: SpanId(self.v6),
            miss: self.miss.0,
            miss_rule: RuleId(self.miss_rule),
        }
    }
}

impl Entry {
    fn row(&self) -> SpanEntry {
        let target = match &self.target {
            TargetFields::Nothing => Target::Nothing,
            TargetFields::Rule {
                action,
                order,
                rule,
            } => Target::Rule {
                action: action.0,
                order: *order,
                rule: RuleId(*rule),
            },
            TargetFields::Finer(id) => Target::Finer(SpanId(*id)),
            TargetFields::Word(id) => Target::Word(SpanId(*id)),
            TargetFields::Ports(id) => Target::Ports(SpanId(*id)),
        };
        SpanEntry {
            start: self.start.0,
            target,
        }
    }
}
