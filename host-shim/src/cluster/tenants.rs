//! What the appliance has to know of a link besides policy: whose pod it is, as far as shares go, and how many packets and
//! connections it may carry.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sluice_contract::row::RatesRow;
use sluice_contract::{LinkId, Tenant};
use sluice_model::object::rates::{Rate, Rates};

/// Limits of pods whose annotations say nothing; none unless given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RatesConfig {
    pub ingress_packets_per_second: Option<NonZeroU32>,
    pub egress_packets_per_second: Option<NonZeroU32>,
    pub ingress_connections_per_second: Option<NonZeroU32>,
    pub egress_connections_per_second: Option<NonZeroU32>,
}

impl RatesConfig {
    /// The row of a link whose pod has these annotations, if anything is limited.
    pub(crate) fn row(&self, link: LinkId, own: &Rates) -> Option<RatesRow> {
        let row = RatesRow {
            link,
            ingress_packets: Rate::or_default(own.ingress_packets, self.ingress_packets_per_second),
            egress_packets: Rate::or_default(own.egress_packets, self.egress_packets_per_second),
            ingress_connections: Rate::or_default(
                own.ingress_connections,
                self.ingress_connections_per_second,
            ),
            egress_connections: Rate::or_default(
                own.egress_connections,
                self.egress_connections_per_second,
            ),
        };
        let all = [
            row.ingress_packets,
            row.egress_packets,
            row.ingress_connections,
            row.egress_connections,
        ];
        all.into_iter().any(|rate| rate.is_some()).then_some(row)
    }
}

/// The numbers of namespaces that have pods on this node.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    numbers: BTreeMap<Arc<str>, Tenant>,
}

impl Tenants {
    /// The number of a namespace: the one it has, else the lowest that no link of `in_use` has.
    pub(super) fn number(
        &mut self,
        namespace: &Arc<str>,
        in_use: impl Iterator<Item = Tenant>,
    ) -> Tenant {
        let in_use: BTreeSet<Tenant> = in_use.collect();
        self.numbers.retain(|_, tenant| in_use.contains(tenant));
        if let Some(tenant) = self.numbers.get(namespace) {
            return *tenant;
        }
        let free = (1..=Tenant::LAST).filter_map(Tenant::new);
        let free = free.into_iter().find(|tenant| !in_use.contains(tenant));
        // There are no more namespaces than links, and this one has none yet.
        let tenant = free.unwrap_or(Tenant::NONE);
        self.numbers.insert(namespace.clone(), tenant);
        tenant
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn k04_a_namespace_keeps_its_number_as_long_as_it_has_a_link() {
        let mut tenants = Tenants::default();
        let tenant = |n| Tenant::new(n).unwrap();
        let mut number = |namespace: &str, in_use: &[u16]| {
            let in_use = in_use.iter().map(|n| tenant(*n));
            tenants.number(&namespace.into(), in_use).raw()
        };
        assert_eq!(number("a", &[]), 1);
        assert_eq!(number("b", &[1]), 2);
        assert_eq!(number("a", &[1, 2]), 1);
        assert_eq!(number("c", &[2]), 1, "a has no link any more");
        assert_eq!(number("a", &[1, 2]), 3);
    }
}
