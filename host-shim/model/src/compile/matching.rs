//! Which rules match whom: a rule of one set of policies, with its selectors and ports looked up.

use std::net::IpAddr;
use std::sync::Arc;

use sluice_contract::Identity;
use sluice_contract::name::NameRow;
use sluice_contract::policy::RuleId;

use super::identity::Group;
use super::paint::{self, Range, Stroke};
use super::rules::{PeerMatch, PortMatch, Rule};
use super::ruleset::Ground;
use super::selector::{SelectorId, Selectors};

#[derive(Debug)]
pub(super) struct CompiledRule {
    pub(super) rule: Rule,
    pub(super) id: RuleId,
    /// Of the peers that are pods.
    pub(super) selectors: Vec<SelectorId>,
    /// For incoming traffic, keys of all ports; for outgoing, those that need no look-up.
    pub(super) keys: Vec<(u32, u32)>,
    /// For outgoing traffic: ports to be looked up at the destination.
    pub(super) named: Vec<PortMatch>,
}

/// Whom a class is for.
pub(super) enum Side<'a> {
    Pod(Identity, &'a Group),
    /// A pod that no selector singles out.
    AnyPod,
    Other,
}

impl CompiledRule {
    pub(super) fn matches(&self, side: &Side<'_>, selectors: &Selectors) -> bool {
        let everybody = self.rule.peers.iter().any(|it| match it {
            PeerMatch::Everybody => true,
            PeerMatch::Pods(wanted) => wanted.is_everything() && !matches!(side, Side::Other),
            PeerMatch::Block(_) | PeerMatch::Name(_) => false,
        });
        everybody
            || matches!(side, Side::Pod(identity, _)
                if self.selectors.iter().any(|it| selectors.contains(*it, *identity)))
    }

    /// The names that the rule names.
    pub(super) fn names(&self) -> impl Iterator<Item = &Arc<NameRow>> {
        self.rule.peers.iter().filter_map(|it| match it {
            PeerMatch::Name(name) => Some(name),
            _ => None,
        })
    }

    pub(super) fn keys_for(&self, side: &Side<'_>) -> Vec<(u32, u32)> {
        let mut keys = self.keys.clone();
        if let Side::Pod(_, group) = side {
            keys.extend(self.named.iter().flat_map(|it| it.keys(&group.ports)));
        }
        keys
    }

    pub(super) fn stroke(&self, order: usize, keys: Vec<(u32, u32)>) -> Stroke {
        Stroke {
            action: self.rule.action,
            order: u16::try_from(order).unwrap_or(u16::MAX),
            rule: self.id,
            keys,
        }
    }

    /// Adds what the rule says to addresses.
    pub(super) fn block_ranges(
        &self,
        order: usize,
        v6: bool,
        ground: &Ground<'_>,
        strokes: &mut Vec<Stroke>,
        ranges: &mut Vec<Range>,
    ) {
        let mut own: Vec<(u128, u128)> = Vec::new();
        for peer in &self.rule.peers {
            if let PeerMatch::Block(block) = peer
                && block.cidr.address().is_ipv6() == v6
            {
                own.extend(paint::without(&block.cidr, &block.except));
            }
        }
        let mut add = |keys: Vec<(u32, u32)>, covers: &[(u128, u128)]| {
            let rule = strokes.len();
            strokes.push(self.stroke(order, keys));
            ranges.extend(covers.iter().map(|(first, last)| Range {
                rule,
                first: *first,
                last: *last,
            }));
        };
        if !self.keys.is_empty() && !own.is_empty() {
            add(self.keys.clone(), &own);
        }
        if self.named.is_empty() || own.is_empty() {
            return;
        }
        own.sort_unstable();
        let own = paint::joined(own);
        for (address, identity) in ground.addresses {
            let Some(group) = ground.identities.group(*identity) else {
                continue;
            };
            let number = match address {
                IpAddr::V4(v4) => u128::from(v4.to_bits()),
                IpAddr::V6(v6) => v6.to_bits(),
            };
            let before = own.partition_point(|(first, _)| *first <= number);
            let nearest = before.checked_sub(1).and_then(|it| own.get(it));
            let inside =
                address.is_ipv6() == v6 && nearest.is_some_and(|(_, last)| number <= *last);
            let keys: Vec<_> = self
                .named
                .iter()
                .flat_map(|it| it.keys(&group.ports))
                .collect();
            if inside && !keys.is_empty() {
                add(keys, &[(number, number)]);
            }
        }
    }
}
