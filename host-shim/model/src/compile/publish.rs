//! A compiled ruleset's rows, put into the tables and taken out of them.

use sluice_contract::policy::{LAYERS, LayerId, RulesetId, RulesetRow};

use super::ruleset::Ruleset;
use crate::diff::Tables;

/// Puts a ruleset's rows in place of those it had.
pub(super) fn publish(id: RulesetId, ruleset: &Ruleset, tables: &mut Tables) {
    for index in 0..LAYERS as u64 {
        let layer = LayerId(id.0 | index);
        let now = ruleset
            .layers
            .iter()
            .find(|it| it.row.id == layer)
            .map(|it| &it.classes);
        for identity in tables.classes_of(layer) {
            if now.is_none_or(|it| !it.contains_key(&identity)) {
                tables.set_class(layer, identity, None);
            }
        }
        for (identity, (span, _)) in now.into_iter().flatten() {
            tables.set_class(layer, *identity, Some(*span));
        }
        let named = ruleset.layers.iter().find(|it| it.row.id == layer);
        let named = named.map(|it| &it.named);
        for name in tables.names_of(layer) {
            if named.is_none_or(|it| !it.contains_key(&name)) {
                tables.set_named(layer, &name, None);
            }
        }
        for (name, span) in named.into_iter().flatten() {
            tables.set_named(layer, name, Some(*span));
        }
    }
    publish_row(id, ruleset, tables);
}

pub(super) fn publish_row(id: RulesetId, ruleset: &Ruleset, tables: &mut Tables) {
    let layers = ruleset.layers.iter().map(|layer| {
        let mut row = layer.row;
        row.classes = !layer.classes.is_empty();
        row
    });
    let row = RulesetRow {
        id,
        layers: layers.collect(),
    };
    tables.set_ruleset(id, Some(row));
}

pub(super) fn retract(id: RulesetId, ruleset: &Ruleset, tables: &mut Tables) {
    tables.set_ruleset(id, None);
    for layer in &ruleset.layers {
        for identity in layer.classes.keys() {
            tables.set_class(layer.row.id, *identity, None);
        }
        for name in layer.named.keys() {
            tables.set_named(layer.row.id, name, None);
        }
    }
}
