//! The other nodes out of what the operator lists and what the cluster's Node objects say.
//!
//! Who gets what: this node first, then the peers of the configuration, then nodes that have it already, then the others by
//! name. So no new object takes traffic from a node that is there. An object that cannot be used is left out as a whole and said
//! why; the others do not feel it. Nothing here asks the host: it is a function of configuration, objects and own addresses.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use sluice_contract::overlay::TunnelProtocol;
use sluice_contract::{Mac, Prefix};
use sluice_model::compile::{Member, Members};

use super::config::{Direct, PeerConfig, Underlay, UplinkConfig, parse_prefix};
use super::flannel::{self, Backend, Lease};
use super::taken::Taken;
use crate::config::parse_mac;

/// A range that is wider is nobody's pods.
const WIDEST: u8 = 8;

/// Where a peer is known from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Configuration,
    Cluster,
}

/// How packets go to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Tunnel,
    Direct,
    /// Without a tunnel where the host has a route to it that leads by no router.
    DirectOnLink,
}

/// Another node, by one of its underlay addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) name: Arc<str>,
    pub(super) origin: Origin,
    pub(super) address: IpAddr,
    pub(super) mac: Mac,
    pub(super) pods: Vec<Prefix>,
    /// Its other addresses.
    pub(super) node_addresses: Vec<IpAddr>,
    pub(super) way: Way,
    /// Known to be a node of ours, which answers probes.
    pub(super) is_ours: bool,
}

/// A Node object that is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unused {
    pub(super) name: Arc<str>,
    pub(super) reason: String,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Roster {
    pub(super) peers: Vec<Peer>,
    pub(super) unused: Vec<Unused>,
    /// This node's MAC inside the tunnel, if it is not the card's.
    pub(super) mac: Option<Mac>,
    /// This node's pods.
    pub(super) pods: Vec<Prefix>,
    /// This node and another may have an end of the tunnel in each family.
    pub(super) two_ends: bool,
    /// What is wrong with what is said of this node.
    pub(super) own: Option<String>,
}

/// Makes rosters, and remembers who has what.
#[derive(Debug)]
pub(super) struct Enroller {
    config: UplinkConfig,
    /// The ranges of all pods, if the operator says them.
    cluster: Vec<Prefix>,
    /// This node's name in the cluster.
    name: String,
    held: BTreeMap<Arc<str>, Claim>,
    last: Option<(Arc<Members>, Vec<IpAddr>, Roster)>,
}

#[derive(Debug, PartialEq, Eq)]
struct Claim {
    addresses: Vec<IpAddr>,
    ranges: Vec<Prefix>,
}

/// What peers are judged by.
struct Ground<'a> {
    own: &'a [IpAddr],
    /// This node has said that it has an end of each family.
    two_ends: bool,
}

impl Enroller {
    pub(super) fn new(config: UplinkConfig, cluster: Vec<Prefix>, name: String) -> Self {
        Self {
            config,
            cluster,
            name,
            held: BTreeMap::new(),
            last: None,
        }
    }

    /// Who is to be reached. `own`: this node's addresses on the uplink.
    pub(super) fn roster(&mut self, own: &[IpAddr], members: Option<&Arc<Members>>) -> Roster {
        let Some(members) = members else {
            return self.listed();
        };
        if let Some((then, addresses, roster)) = &self.last
            && Arc::ptr_eq(then, members)
            && addresses == own
        {
            return roster.clone();
        }
        let roster = self.enroll(own, members);
        self.last = Some((members.clone(), own.to_vec(), roster.clone()));
        roster
    }

    /// Those of the configuration.
    fn listed(&self) -> Roster {
        Roster {
            peers: self.config.peers.iter().map(listed).collect(),
            mac: self.config.tunnel.mac.as_deref().and_then(parse_mac),
            pods: ranges(&self.config.pods),
            ..Roster::default()
        }
    }

    fn enroll(&mut self, own: &[IpAddr], members: &Members) -> Roster {
        let mut roster = self.listed();
        let this = members.own.as_ref();
        let lease = this.map_or(Ok(None), |it| Lease::read(&it.annotations));
        let said = this.map_or(Ok(None), |it| flannel::tunnel_mac(&it.annotations));
        let said = said.map(|mac| mac.or(lease.as_ref().ok().and_then(vtep)));
        let configured = roster.mac;
        roster.own = match (&lease, &said) {
            (Err(why), _) | (_, Err(why)) => Some(why.clone()),
            (_, Ok(Some(said))) if configured.is_some_and(|mac| mac != *said) => Some(format!(
                "its annotations say that its MAC in the tunnel is {said}, the configuration says another"
            )),
            _ if this.is_none() && !members.others.is_empty() => {
                Some("no Node object has this name, which is node_name in the configuration".into())
            }
            _ => None,
        };
        roster.mac = configured
            .or(said.unwrap_or_default())
            .or_else(|| Some(mac_of(&self.name)));
        if roster.pods.is_empty() {
            roster.pods = this.map_or_else(Vec::new, |it| contract(&it.pods).unwrap_or_default());
        }
        let ground = Ground {
            own,
            two_ends: own.iter().any(IpAddr::is_ipv4)
                && own.iter().any(IpAddr::is_ipv6)
                && lease.ok().flatten().is_some_and(|it| it.v6.mac.is_some()),
        };
        roster.two_ends = ground.two_ends;
        let mut taken = Taken::default();
        for peer in &self.config.peers {
            let own: Vec<IpAddr> = peer.own_addresses().collect();
            // Checked with the configuration.
            let _ = taken.take("a peer of the configuration", &own, &ranges(&peer.pods));
        }
        let mut addresses = own.to_vec();
        for address in this.into_iter().flat_map(|it| &it.addresses) {
            if !addresses.contains(address) {
                addresses.push(*address);
            }
        }
        if let Err(why) = taken.take("this node", &addresses, &roster.pods) {
            roster.own.get_or_insert(why);
            // Its addresses at least are nobody else's.
            let _ = taken.take("this node", &addresses, &[]);
        }
        self.add(&ground, members, &mut taken, &mut roster);
        roster
    }

    /// Those of the cluster: who has had what it has comes first.
    fn add(
        &mut self,
        ground: &Ground<'_>,
        members: &Members,
        taken: &mut Taken,
        roster: &mut Roster,
    ) {
        let (mut holding, mut others) = (Vec::new(), Vec::new());
        for member in &members.others {
            match self.peers_of(member, ground) {
                Ok((peers, claim)) => {
                    let holds = self.held.get(&member.name) == Some(&claim);
                    let list = if holds { &mut holding } else { &mut others };
                    list.push((member, peers, claim));
                }
                Err(reason) => roster.unused.push(unused(member, reason)),
            }
        }
        self.held.clear();
        for (member, peers, claim) in holding.into_iter().chain(others) {
            match taken.take(&member.name, &claim.addresses, &claim.ranges) {
                Ok(()) => {
                    roster.peers.extend(peers);
                    self.held.insert(member.name.clone(), claim);
                }
                Err(reason) => roster.unused.push(unused(member, reason)),
            }
        }
        roster.unused.sort_by(|a, b| a.name.cmp(&b.name));
    }

    /// What one of them is reached by: one underlay address, or two if both ends are flannel's of both families.
    fn peers_of(&self, member: &Member, ground: &Ground<'_>) -> Result<(Vec<Peer>, Claim), String> {
        let pods = contract(&member.pods)?;
        if pods.is_empty() {
            return Err("spec.podCIDRs: it has no range of pods".into());
        }
        self.check_ranges(&pods)?;
        let lease = Lease::read(&member.annotations)?;
        let way = self.way(lease.as_ref())?;
        let of_family = |v4: bool| {
            let public = lease.as_ref().and_then(|it| it.end(v4).address);
            let internal = member.addresses.iter().copied();
            public.or_else(|| internal.clone().find(|it| it.is_ipv4() == v4))
        };
        let (v4, v6) = (of_family(true), of_family(false));
        if v4.or(v6).is_none() {
            return Err("status.addresses: it has no InternalIP".into());
        }
        let both_say = lease.as_ref().is_some_and(|it| it.v6.mac.is_some());
        let mut addresses: Vec<IpAddr> = v4.into_iter().chain(v6).collect();
        for address in &member.addresses {
            if !addresses.contains(address) {
                addresses.push(*address);
            }
        }
        if let Some(odd) = addresses.iter().find(|it| !is_routable(**it)) {
            return Err(format!("status.addresses: {odd} is no address of a node"));
        }
        let peer =
            |address: IpAddr, pods: Vec<Prefix>, nodes: Vec<IpAddr>| -> Result<Peer, String> {
                Ok(Peer {
                    name: member.name.clone(),
                    origin: Origin::Cluster,
                    address,
                    mac: self.mac(member, lease.as_ref(), address.is_ipv4(), way)?,
                    pods,
                    node_addresses: nodes.into_iter().filter(|it| *it != address).collect(),
                    way,
                    is_ours: lease.is_none() || flannel::is_ours(&member.annotations),
                })
            };
        let peers = match (v4, v6) {
            (Some(v4), Some(v6)) if ground.two_ends && both_say => {
                let mut peers = Vec::new();
                for address in [v4, v6] {
                    let same = |it: IpAddr| it.is_ipv4() == address.is_ipv4();
                    let pods: Vec<_> = pods
                        .iter()
                        .copied()
                        .filter(|it| same(it.address()))
                        .collect();
                    let nodes = addresses.iter().copied().filter(|it| same(*it)).collect();
                    if !pods.is_empty() {
                        peers.push(peer(address, pods, nodes)?);
                    }
                }
                peers
            }
            _ => {
                let address = self.underlay(v4, v6, ground.own)?;
                vec![peer(address, pods.clone(), addresses.clone())?]
            }
        };
        let ranges = pods;
        Ok((peers, Claim { addresses, ranges }))
    }

    fn check_ranges(&self, pods: &[Prefix]) -> Result<(), String> {
        for range in pods {
            if !is_routable(range.address()) {
                return Err(format!("spec.podCIDRs: {range} is no range for pods"));
            }
            if range.length() < WIDEST {
                return Err(format!(
                    "spec.podCIDRs: {range} is wider than any node's pods"
                ));
            }
            let within =
                |all: &Prefix| all.length() <= range.length() && all.contains(range.address());
            let v4 = range.address().is_ipv4();
            let mut known = self
                .cluster
                .iter()
                .filter(|it| it.address().is_ipv4() == v4);
            if known.clone().next().is_some() && !known.any(within) {
                return Err(format!(
                    "spec.podCIDRs: {range} lies in none of host_link.routes, the cluster's ranges"
                ));
            }
        }
        Ok(())
    }

    fn way(&self, lease: Option<&Lease>) -> Result<Way, String> {
        let ours = self.config.tunnel.protocol.into();
        match lease.map(|it| &it.backend) {
            Some(Backend::HostGw) => return Ok(Way::Direct),
            Some(Backend::Other(name)) => {
                let name: String = name.chars().take(40).collect();
                return Err(format!(
                    "its flannel's backend is {name:?}, which is not spoken here"
                ));
            }
            Some(Backend::Vxlan)
                if !matches!(ours, TunnelProtocol::Vxlan | TunnelProtocol::VxlanGbp) =>
            {
                return Err("its flannel's backend is vxlan, this node's tunnel is another".into());
            }
            Some(Backend::Vxlan) | None => {}
        }
        Ok(match self.config.direct {
            Direct::Never => Way::Tunnel,
            Direct::SameSubnet => Way::DirectOnLink,
            Direct::Always => Way::Direct,
        })
    }

    /// By which of its addresses a node is reached.
    fn underlay(
        &self,
        v4: Option<IpAddr>,
        v6: Option<IpAddr>,
        own: &[IpAddr],
    ) -> Result<IpAddr, String> {
        let shared = |address: Option<IpAddr>| {
            address.filter(|it| own.iter().any(|own| own.is_ipv4() == it.is_ipv4()))
        };
        let (v4, v6) = (shared(v4), shared(v6));
        match self.config.underlay {
            Underlay::Auto => v4.or(v6),
            Underlay::Ipv4 => v4,
            Underlay::Ipv6 => v6,
        }
        .ok_or_else(|| "status.addresses: none of a family that this node's uplink has".into())
    }

    fn mac(
        &self,
        member: &Member,
        lease: Option<&Lease>,
        v4: bool,
        way: Way,
    ) -> Result<Mac, String> {
        let end = lease.map(|it| it.end(v4)).filter(|it| it.mac.is_some());
        if let Some(end) = end
            && way != Way::Direct
            && end.vni != self.config.tunnel.vni
        {
            let (theirs, ours) = (end.vni, self.config.tunnel.vni);
            return Err(format!("its flannel's VNI is {theirs}, this node's {ours}"));
        }
        let said = flannel::tunnel_mac(&member.annotations)?;
        Ok(said
            .or(end.and_then(|it| it.mac))
            .unwrap_or_else(|| mac_of(&member.name)))
    }
}

/// A node of ours that says nothing of its MAC has the one that follows from its name, so that others know it. Part of what
/// nodes agree on: it must stay the same in all versions. FNV-1a.
fn mac_of(name: &str) -> Mac {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let [a, b, c, d] = hash.to_be_bytes();
    Mac([0x02, 0x53, a, b, c, d])
}

/// Whether somebody else can be there.
fn is_routable(address: IpAddr) -> bool {
    let nowhere = address.is_unspecified() || address.is_loopback() || address.is_multicast();
    !nowhere
        && match address {
            IpAddr::V4(v4) => !v4.is_broadcast() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && v6.to_ipv4_mapped().is_none(),
        }
}

fn vtep(lease: &Option<Lease>) -> Option<Mac> {
    let lease = lease.as_ref()?;
    lease.v4.mac.or(lease.v6.mac)
}

fn listed(peer: &PeerConfig) -> Peer {
    Peer {
        name: peer.address.to_string().into(),
        origin: Origin::Configuration,
        address: peer.address,
        mac: parse_mac(&peer.mac).unwrap_or_default(),
        pods: ranges(&peer.pods),
        node_addresses: peer.node_addresses.clone(),
        way: if peer.direct {
            Way::Direct
        } else {
            Way::Tunnel
        },
        is_ours: false,
    }
}

fn ranges(texts: &[String]) -> Vec<Prefix> {
    texts.iter().filter_map(|text| parse_prefix(text)).collect()
}

fn contract(pods: &[sluice_model::object::Prefix]) -> Result<Vec<Prefix>, String> {
    let one = |range: &sluice_model::object::Prefix| {
        let read = Prefix::new(range.address(), range.length());
        read.ok_or_else(|| format!("spec.podCIDRs: {range} is no range"))
    };
    pods.iter().map(one).collect()
}

fn unused(member: &Member, reason: String) -> Unused {
    Unused {
        name: member.name.clone(),
        reason,
    }
}

#[cfg(test)]
mod tests;
