//! Rows as words: how addresses, layers and rulesets lie in their slots.

use core::net::IpAddr;

use sluice_contract::policy::{Action, LAYERS, Layer, LayerId, RuleId, RulesetRow, SpanId};

/// Words of a layer in its ruleset's slot: id, pods, others, v4, v6, and flags with the rule of the miss.
pub(super) const LAYER_WORDS: usize = 6;
/// Views and key come first.
pub(super) const RULESET_SLOT: usize = 2 + LAYERS * LAYER_WORDS;

pub(super) fn address_words(address: IpAddr) -> [u64; 2] {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    [(bits >> 64) as u64, bits as u64]
}

pub(super) fn pack_ruleset(row: &RulesetRow) -> [u64; RULESET_SLOT - 2] {
    let mut words = [0; RULESET_SLOT - 2];
    for (slot, layer) in words.chunks_exact_mut(LAYER_WORDS).zip(&row.layers) {
        let flags = (1 + layer.miss as u64) | (u64::from(layer.classes) << 2);
        let packed = [
            layer.id.0,
            layer.pods.0,
            layer.others.0,
            layer.v4.0,
            layer.v6.0,
            u64::from(layer.miss_rule.0) << 32 | flags,
        ];
        slot.copy_from_slice(&packed);
    }
    words
}

/// `None` behind the last layer.
pub(super) fn unpack_layer(words: &[u64]) -> Option<Layer> {
    let [id, pods, others, v4, v6, last] = *words else {
        return None;
    };
    let miss = match last & 0b11 {
        1 => Action::Accept,
        2 => Action::Deny,
        3 => Action::Pass,
        _ => return None,
    };
    Some(Layer {
        id: LayerId(id),
        classes: last & 0b100 != 0,
        pods: SpanId(pods),
        others: SpanId(others),
        v4: SpanId(v4),
        v6: SpanId(v6),
        miss,
        miss_rule: RuleId((last >> 32) as u32),
    })
}
