//! Who of several answers for an address: all of them find the same one, by themselves.

use std::net::IpAddr;

/// The one of `candidates` that answers for `address`; with each address another, and the others keep theirs when one
/// comes or goes.
pub fn elected<'a>(
    address: IpAddr,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .into_iter()
        .max_by_key(|name| (weight(address, name), *name))
}

/// Highest random weight. Nodes of all versions must find the same numbers: this is never to change.
fn weight(address: IpAddr, name: &str) -> u64 {
    let address = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    // FNV-1a, whose last octets would decide alone without what splitmix64 does at its end.
    let octets = name.bytes().chain([0]).chain(address);
    let hash = octets.fold(0xcbf2_9ce4_8422_2325_u64, |hash, octet| {
        (hash ^ u64::from(octet)).wrapping_mul(0x0100_0000_01b3)
    });
    let mixed = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;

    fn addresses() -> impl Iterator<Item = IpAddr> {
        (0..1000u32).map(|it| Ipv4Addr::from(0xc633_6400 + it).into())
    }

    #[test]
    fn o20_addresses_are_spread_and_stay_when_another_goes() {
        let all = ["node-1", "node-2", "node-3", "node-4"];
        let mut shares = BTreeMap::new();
        for address in addresses() {
            let owner = elected(address, all).unwrap();
            *shares.entry(owner).or_insert(0) += 1;
            assert_eq!(elected(address, all.into_iter().rev()), Some(owner));
            for gone in all {
                let left = all.into_iter().filter(|it| *it != gone);
                let next = elected(address, left).unwrap();
                assert!(
                    next == owner || gone == owner,
                    "{address} moved from {owner} to {next}"
                );
            }
        }
        assert!(
            shares.values().all(|share| (180..330).contains(share)),
            "{shares:?}"
        );
        assert_eq!(elected(Ipv4Addr::LOCALHOST.into(), []), None);
    }

    /// Two versions of the product in one cluster must agree.
    #[test]
    fn o20_the_weights_are_these() {
        let vip = "198.51.100.80".parse().unwrap();
        assert_eq!(weight(vip, "node-1"), 3_929_068_229_575_365_519);
        let vip = "2001:db8::80".parse().unwrap();
        assert_eq!(weight(vip, "node-1"), 18_157_818_396_318_483_948);
    }
}
