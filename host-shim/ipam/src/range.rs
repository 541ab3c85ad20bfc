//! Which addresses may be given: ranges of subnets, in sets; an attachment gets one address from each set.

use crate::IpamError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address with the prefix length of its subnet and the gateway beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
    pub gateway: Option<IpAddr>,
}

/// What one attachment gets: an address of every set, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    sets: Vec<RangeSet>,
}

/// Ranges of one family that do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<Range>,
}

/// Neighbouring addresses of one subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    first: IpAddr,
    last: IpAddr,
    network: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
}

/// A range as `host-local`'s configuration has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangeConfig {
    pub subnet: String,
    #[serde(default, alias = "rangestart", skip_serializing_if = "Option::is_none")]
    pub range_start: Option<IpAddr>,
    #[serde(default, alias = "rangeend", skip_serializing_if = "Option::is_none")]
    pub range_end: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

fn fault(text: String) -> IpamError {
    IpamError::Range(text)
}

/// An address as a number; a family's numbers are ordered as its addresses are.
fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

/// The address of `number` in the family of `like`. IPv4 numbers are made from IPv4 addresses and stay in 32 bits.
fn address(number: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => u32::try_from(number)
            .map_or(Ipv4Addr::BROADCAST, Ipv4Addr::from)
            .into(),
        IpAddr::V6(_) => Ipv6Addr::from(number).into(),
    }
}

fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// Reads `10.1.0.0/24`; host bits must be zero.
///
/// # Errors
/// If it is no subnet.
pub fn parse_subnet(text: &str) -> Result<(IpAddr, u8), IpamError> {
    let invalid = || fault(format!("{text:?} is not a subnet"));
    let (ip, prefix) = text.split_once('/').ok_or_else(invalid)?;
    let ip: IpAddr = ip.parse().map_err(|_| invalid())?;
    let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
    if prefix > bits(ip) {
        return Err(invalid());
    }
    if number(ip) & host_mask(ip, prefix) != 0 {
        return Err(fault(format!("subnet {text} has host bits set")));
    }
    Ok((ip, prefix))
}

fn host_mask(ip: IpAddr, prefix: u8) -> u128 {
    match bits(ip) - prefix {
        128 => u128::MAX,
        host_bits => (1 << host_bits) - 1,
    }
}

impl Range {
    /// Checks one range of a configuration. The network address, the broadcast address and the gateway (the subnet's first
    /// address unless another is named) are never given.
    ///
    /// # Errors
    /// If the subnet holds no two pods, or what is named lies outside of it.
    pub fn new(config: &RangeConfig) -> Result<Self, IpamError> {
        let (network, prefix) = parse_subnet(&config.subnet)?;
        let subnet = &config.subnet;
        if prefix > bits(network) - 2 {
            return Err(fault(format!(
                "subnet {subnet} is too small to allocate from"
            )));
        }
        let lowest = number(network) + 1;
        let all_ones = number(network) | host_mask(network, prefix);
        let highest = if network.is_ipv4() {
            all_ones - 1
        } else {
            all_ones
        };
        let inside = |what: &str, ip: IpAddr| {
            let is_inside = bits(ip) == bits(network) && (lowest..=highest).contains(&number(ip));
            if is_inside {
                Ok(number(ip))
            } else {
                Err(fault(format!(
                    "{what} {ip} is no address for a host in {subnet}"
                )))
            }
        };
        let first = config
            .range_start
            .map_or(Ok(lowest), |ip| inside("rangeStart", ip))?;
        let last = config
            .range_end
            .map_or(Ok(highest), |ip| inside("rangeEnd", ip))?;
        if first > last {
            return Err(fault(format!("rangeStart is after rangeEnd in {subnet}")));
        }
        if let Some(gateway) = config.gateway {
            inside("gateway", gateway)?;
        }
        Ok(Self {
            first: address(first, network),
            last: address(last, network),
            network,
            prefix,
            gateway: Some(config.gateway.unwrap_or_else(|| address(lowest, network))),
        })
    }

    /// Whether `ip` lies between the ends.
    pub fn contains(&self, ip: IpAddr) -> bool {
        bits(ip) == bits(self.first)
            && (number(self.first)..=number(self.last)).contains(&number(ip))
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.first) || other.contains(self.first)
    }

    /// How many addresses can be given.
    fn size(&self) -> u128 {
        let all = number(self.last) - number(self.first);
        let gateway = self.gateway.is_some_and(|gateway| self.contains(gateway));
        all.saturating_add(1).saturating_sub(u128::from(gateway))
    }

    fn with(&self, ip: IpAddr) -> Address {
        Address {
            ip,
            prefix: self.prefix,
            gateway: self.gateway,
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl RangeSet {
    /// Checks the ranges of one set.
    ///
    /// # Errors
    /// If one cannot be, the families differ, or two overlap.
    pub fn new(configs: &[RangeConfig]) -> Result<Self, IpamError> {
        let ranges: Vec<Range> = configs.iter().map(Range::new).collect::<Result<_, _>>()?;
        let Some(first) = ranges.first() else {
            return Err(fault("a range set is empty".into()));
        };
        if ranges
            .iter()
            .any(|range| bits(range.first) != bits(first.first))
        {
            return Err(fault("a range set mixes address families".into()));
        }
        no_overlap(&ranges)?;
        Ok(Self { ranges })
    }

    /// The addresses that can be given, each once, beginning after `last`. Lazy: a /64 is never walked to its end unless
    /// it is full.
    pub fn after(&self, last: Option<IpAddr>) -> impl Iterator<Item = Address> + '_ {
        let at = last.and_then(|ip| {
            let range = self.ranges.iter().position(|range| range.contains(ip))?;
            Some((range, number(ip)))
        });
        let count = self.ranges.len();
        // The range of `last` comes twice: its rest first, its beginning at the end.
        let rounds = match at {
            Some((range, _)) => (0..=count).map(|step| (range + step) % count).collect(),
            None => (0..count).collect::<Vec<_>>(),
        };
        let final_round = rounds.len().saturating_sub(1);
        rounds
            .into_iter()
            .enumerate()
            .flat_map(move |(round, index)| {
                let range = self.ranges.get(index);
                let (mut from, mut to) =
                    range.map_or((1, 0), |r| (number(r.first), number(r.last)));
                match at {
                    Some((_, last)) if round == 0 => from = last.saturating_add(1),
                    Some((_, last)) if round == final_round => to = last,
                    _ => {}
                }
                (from..=to).filter_map(move |n| {
                    let range = range?;
                    let ip = address(n, range.first);
                    (range.gateway != Some(ip)).then(|| range.with(ip))
                })
            })
    }

    /// The address `ip` of this set, if it lies in it.
    ///
    /// # Errors
    /// If it lies in it and may not be given.
    pub fn fixed(&self, ip: IpAddr) -> Result<Option<Address>, IpamError> {
        let Some(range) = self.ranges.iter().find(|range| range.contains(ip)) else {
            return Ok(None);
        };
        if range.gateway == Some(ip) {
            return Err(IpamError::NotAllowed {
                address: ip,
                why: "is the gateway's".into(),
            });
        }
        Ok(Some(range.with(ip)))
    }

    /// Whether `ip` lies in one of the ranges.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.contains(ip))
    }

    /// How many addresses can be given.
    pub fn size(&self) -> u128 {
        self.ranges
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.size()))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, set) in self.sets.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{set}")?;
        }
        Ok(())
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.ranges.iter().enumerate() {
            write!(f, "{}{range}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl Plan {
    /// Checks the sets of a configuration.
    ///
    /// # Errors
    /// If there is none, one cannot be, or two overlap.
    pub fn new(sets: &[Vec<RangeConfig>]) -> Result<Self, IpamError> {
        if sets.is_empty() {
            let why = "no ranges are configured: the network names none, and the node knows no pod CIDRs \
                       (cni.pod_cidrs of its configuration, or spec.podCIDRs of its Node)";
            return Err(fault(why.into()));
        }
        let sets: Vec<RangeSet> = sets
            .iter()
            .map(|set| RangeSet::new(set))
            .collect::<Result<_, _>>()?;
        let all: Vec<Range> = sets
            .iter()
            .flat_map(|set| set.ranges.iter().copied())
            .collect();
        no_overlap(&all)?;
        Ok(Self { sets })
    }

    /// One set per subnet: a node's pod CIDRs.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn of_subnets<'a>(subnets: impl IntoIterator<Item = &'a str>) -> Result<Self, IpamError> {
        let sets: Vec<Vec<RangeConfig>> = subnets
            .into_iter()
            .map(|subnet| {
                vec![RangeConfig {
                    subnet: subnet.into(),
                    ..RangeConfig::default()
                }]
            })
            .collect();
        Self::new(&sets)
    }

    /// The sets, in the order of the results.
    pub fn sets(&self) -> &[RangeSet] {
        &self.sets
    }
}

fn no_overlap(ranges: &[Range]) -> Result<(), IpamError> {
    for (index, range) in ranges.iter().enumerate() {
        if let Some(other) = ranges
            .iter()
            .skip(index + 1)
            .find(|other| range.overlaps(other))
        {
            return Err(fault(format!("{range} and {other} overlap")));
        }
    }
    Ok(())
}

impl Range {
    /// The subnet, as it was configured.
    pub fn subnet(&self) -> (IpAddr, u8) {
        (self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn config(subnet: &str, start: &str, end: &str, gateway: &str) -> RangeConfig {
        RangeConfig {
            subnet: subnet.into(),
            range_start: start.parse().ok(),
            range_end: end.parse().ok(),
            gateway: gateway.parse().ok(),
        }
    }

    fn walk(set: &RangeSet, last: Option<&str>) -> Vec<String> {
        set.after(last.map(|ip| ip.parse().unwrap()))
            .map(|a| a.ip.to_string())
            .collect()
    }

    #[test]
    fn i03_network_broadcast_and_gateway_are_never_given() {
        let plan = Plan::of_subnets(["10.1.0.0/24"]).unwrap();
        let given = walk(&plan.sets()[0], None);
        assert_eq!(given.len(), 253);
        assert_eq!(plan.sets()[0].size(), 253);
        assert_eq!(
            (given[0].as_str(), given[252].as_str()),
            ("10.1.0.2", "10.1.0.254")
        );
        let v6 = Plan::of_subnets(["fd00::/120"]).unwrap();
        let given = walk(&v6.sets()[0], None);
        assert_eq!((given[0].as_str(), given.len()), ("fd00::2", 254));
    }

    #[test]
    fn i03_subnets_without_room_and_ranges_that_cannot_be_are_refused() {
        for (subnet, start, end, gateway) in [
            ("10.1.0.0/31", "", "", ""),
            ("10.1.0.0/32", "", "", ""),
            ("fd00::/127", "", "", ""),
            ("10.1.0.1/24", "", "", ""),
            ("10.1.0.0/33", "", "", ""),
            ("10.1.0.0", "", "", ""),
            ("", "", "", ""),
            ("10.1.0.0/24", "10.1.0.0", "", ""),
            ("10.1.0.0/24", "", "10.1.0.255", ""),
            ("10.1.0.0/24", "10.2.0.1", "", ""),
            ("10.1.0.0/24", "fd00::1", "", ""),
            ("10.1.0.0/24", "10.1.0.9", "10.1.0.8", ""),
            ("10.1.0.0/24", "", "", "10.2.0.1"),
        ] {
            assert!(
                Range::new(&config(subnet, start, end, gateway)).is_err(),
                "{subnet} {start}"
            );
        }
        let overlap = [
            vec![config("10.1.0.0/24", "", "", "")],
            vec![config("10.1.0.0/25", "", "", "")],
        ];
        assert!(Plan::new(&overlap).is_err());
        assert!(Plan::new(&[]).is_err() && Plan::new(&[vec![]]).is_err());
        let mixed = [vec![
            config("10.1.0.0/24", "", "", ""),
            config("fd00::/64", "", "", ""),
        ]];
        assert!(Plan::new(&mixed).is_err());
    }

    #[test]
    fn i02_the_walk_begins_after_the_last_and_comes_round() {
        let set = RangeSet::new(&[
            config("10.1.0.0/29", "10.1.0.2", "10.1.0.4", "10.1.0.3"),
            config("10.2.0.0/29", "10.2.0.5", "10.2.0.6", ""),
        ])
        .unwrap();
        assert_eq!(
            walk(&set, None),
            ["10.1.0.2", "10.1.0.4", "10.2.0.5", "10.2.0.6"]
        );
        assert_eq!(
            walk(&set, Some("10.2.0.5")),
            ["10.2.0.6", "10.1.0.2", "10.1.0.4", "10.2.0.5"]
        );
        assert_eq!(walk(&set, Some("192.0.2.1")), walk(&set, None));
    }

    #[test]
    fn a_large_range_is_not_walked_to_its_end() {
        let plan = Plan::of_subnets(["fd00::/64", "0.0.0.0/0"]).unwrap();
        assert_eq!(plan.sets()[0].after(None).take(3).count(), 3);
        let all = Plan::of_subnets(["::/0"]).unwrap();
        assert_eq!(all.sets()[0].size(), u128::MAX - 1);
    }

    proptest! {
        #[test]
        fn any_subnet_is_read_or_refused(text in "[0-9a-f:./]{0,24}") {
            let _read_or_refused = Range::new(&config(&text, "", "", ""));
        }

        #[test]
        fn i02_every_address_comes_once_wherever_the_walk_begins(
            prefix in 24u8..=30, start in 0u8..=255, last in 0u8..=255,
        ) {
            let subnet = format!("10.0.0.0/{prefix}");
            let range = config(&subnet, &format!("10.0.0.{start}"), "", "");
            if let Ok(set) = RangeSet::new(&[range]) {
                let given: Vec<String> = walk(&set, Some(&format!("10.0.0.{last}")));
                let once: BTreeSet<&String> = given.iter().collect();
                prop_assert_eq!(once.len(), given.len());
                prop_assert_eq!(u128::try_from(given.len()).unwrap(), set.size());
            }
        }
    }
}
