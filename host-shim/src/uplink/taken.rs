//! Who has which address and which range of pods: each belongs to one node, and no node's address lies among pods.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sluice_contract::Prefix;

/// What is somebody's already. Ranges do not overlap.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// By their first address.
    ranges: BTreeMap<IpAddr, (Prefix, String)>,
    addresses: BTreeMap<IpAddr, String>,
}

impl Taken {
    /// Gives a node its addresses and ranges: all of them or none.
    ///
    /// # Errors
    /// What of it another one has.
    pub(super) fn take(
        &mut self,
        name: &str,
        addresses: &[IpAddr],
        ranges: &[Prefix],
    ) -> Result<(), String> {
        for address in addresses {
            if let Some(owner) = self.addresses.get(address) {
                return Err(format!("{address} is an address of {owner}"));
            }
            if let Some((range, owner)) = self.range_of(*address) {
                return Err(format!("{address} lies in {range}, the pods of {owner}"));
            }
        }
        for (index, range) in ranges.iter().enumerate() {
            let others = ranges.iter().take(index);
            if let Some(other) = others.into_iter().find(|other| overlap(**other, *range)) {
                return Err(format!("{range} overlaps {other}"));
            }
            if let Some((other, owner)) = self.overlapping(*range) {
                return Err(format!("{range} overlaps {other}, the pods of {owner}"));
            }
            let known = self.addresses.range(range.address()..=last(*range));
            let known = known.map(|(address, owner)| (*address, owner.as_str()));
            let own = addresses.iter().map(|address| (*address, name));
            let inside = |(address, _): &(IpAddr, &str)| range.contains(*address);
            if let Some((address, owner)) = known.chain(own).find(inside) {
                return Err(format!(
                    "{range} has {address} in it, an address of {owner}"
                ));
            }
        }
        let named = |address: &IpAddr| (*address, name.to_owned());
        self.addresses.extend(addresses.iter().map(named));
        let named = |range: &Prefix| (range.address(), (*range, name.to_owned()));
        self.ranges.extend(ranges.iter().map(named));
        Ok(())
    }

    fn range_of(&self, address: IpAddr) -> Option<&(Prefix, String)> {
        let (_, before) = self.ranges.range(..=address).next_back()?;
        before.0.contains(address).then_some(before)
    }

    fn overlapping(&self, range: Prefix) -> Option<&(Prefix, String)> {
        let around = self.range_of(range.address());
        around.or_else(|| {
            let mut inside = self.ranges.range(range.address()..=last(range));
            inside.next().map(|(_, taken)| taken)
        })
    }
}

fn overlap(one: Prefix, other: Prefix) -> bool {
    one.contains(other.address()) || other.contains(one.address())
}

/// The last address of a range.
fn last(range: Prefix) -> IpAddr {
    let length = u32::from(range.length());
    match range.address() {
        IpAddr::V4(v4) => {
            let rest = u32::MAX.checked_shr(length).unwrap_or(0);
            IpAddr::V4((v4.to_bits() | rest).into())
        }
        IpAddr::V6(v6) => {
            let rest = u128::MAX.checked_shr(length).unwrap_or(0);
            IpAddr::V6((v6.to_bits() | rest).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::parse_prefix;
    use super::*;

    #[test]
    fn every_address_and_range_has_one_owner_and_a_refusal_takes_nothing() {
        let mut taken = Taken::default();
        let mut take = |name: &str, addresses: &[&str], ranges: &[&str]| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            let ranges: Vec<Prefix> = ranges.iter().map(|r| parse_prefix(r).unwrap()).collect();
            taken
                .take(name, &addresses, &ranges)
                .err()
                .unwrap_or_default()
        };
        assert_eq!(
            take(
                "a",
                &["192.0.2.1", "2001:db8::1"],
                &["10.1.0.0/16", "fd00:1::/64"]
            ),
            ""
        );
        for (addresses, ranges, why) in [
            (&["192.0.2.1"][..], &[][..], "192.0.2.1 is an address of a"),
            (
                &["10.1.2.3"],
                &[],
                "10.1.2.3 lies in 10.1.0.0/16, the pods of a",
            ),
            (
                &[],
                &["10.1.7.0/24"],
                "10.1.7.0/24 overlaps 10.1.0.0/16, the pods of a",
            ),
            (
                &[],
                &["10.0.0.0/8"],
                "10.0.0.0/8 overlaps 10.1.0.0/16, the pods of a",
            ),
            (
                &[],
                &["fd00::/16"],
                "fd00::/16 overlaps fd00:1::/64, the pods of a",
            ),
            (
                &[],
                &["192.0.2.0/24"],
                "192.0.2.0/24 has 192.0.2.1 in it, an address of a",
            ),
            (
                &["192.0.3.1"],
                &["192.0.3.0/24"],
                "192.0.3.0/24 has 192.0.3.1 in it, an address of b",
            ),
            (
                &[],
                &["10.2.0.0/16", "10.2.3.0/24"],
                "10.2.3.0/24 overlaps 10.2.0.0/16",
            ),
        ] {
            assert_eq!(take("b", addresses, ranges), why);
        }
        assert_eq!(
            take(
                "b",
                &["192.0.3.1"],
                &["10.2.0.0/16", "10.0.0.0/16", "fd00:1:0:1::/64"]
            ),
            ""
        );
        assert_eq!(
            take("c", &[], &["0.0.0.0/0"]),
            "0.0.0.0/0 overlaps 10.0.0.0/16, the pods of b"
        );
    }
}
