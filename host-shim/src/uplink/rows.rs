//! Rows and filters out of what the operator says and what the host knows.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use sluice_contract::overlay::{OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow};
use sluice_contract::row::{LinkRow, RouteRow};
use sluice_contract::service::{AddressRole, AddressRow, ServiceRow};
use sluice_contract::{Identity, Key, LinkId, Mac, Prefix, Row, limits};
use sluice_model::compile::Members;

use super::config::{Direct, UplinkConfig, parse_prefix};
use super::filter::Claims;
use super::flannel;
use super::members::{Enroller, Origin, Peer, Roster, Unused, Way};
use super::mirror::{self, Route, TableRow};
use super::mtu;
use super::neighbors::{Asked, Hops, Present};
use super::numbers::Numbers;
use super::probe::{self, Target};
use super::report::{
    NetworkReport, ORIGIN_CLUSTER, ORIGIN_CONFIGURATION, PeerReport, ProbeReport, TunnelReport,
};
use crate::config::MTU_MIN;
use crate::hostlink::config::HostLinkConfig;
use crate::wiring::netlink::{Interface, Netlink};

/// Makes the rows again and again, and keeps what must not change meanwhile.
#[derive(Debug)]
pub(super) struct Follower {
    ground: Ground,
    enroller: Enroller,
    hops: Hops,
    numbers: Numbers,
}

/// What the operator says.
#[derive(Clone, Debug)]
pub struct Ground {
    pub config: UplinkConfig,
    /// The ranges of all pods and Services.
    pub cluster: Vec<Prefix>,
    /// This node's name in the cluster.
    pub node: String,
    /// Nodes of the cluster are told of; what their addresses mean is said elsewhere.
    pub has_source: bool,
    /// The host link, if its MTU is that of pods.
    pub host_link: Option<HostLinkConfig>,
    /// The MTU of pods, where the operator says it.
    pub mtu: Option<u16>,
}

/// One look at the host.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) rows: BTreeMap<Key, Row>,
    pub(super) claims: Claims,
    pub(super) card: Interface,
    /// The addresses of all peers.
    pub(super) peers: BTreeSet<IpAddr>,
    /// Whom of them to probe.
    pub(super) targets: Vec<Target>,
    /// What is not as it should be, one sentence each.
    pub(super) problems: Vec<String>,
    pub(super) report: NetworkReport,
}

impl Follower {
    pub(super) fn new(ground: &Ground) -> Self {
        let (config, cluster) = (ground.config.clone(), ground.cluster.clone());
        Self {
            enroller: Enroller::new(config, cluster, ground.node.clone()),
            ground: ground.clone(),
            hops: Hops::default(),
            numbers: Numbers::default(),
        }
    }

    /// The host link, if its MTU is that of pods.
    pub(super) const fn host_link(&self) -> Option<&HostLinkConfig> {
        self.ground.host_link.as_ref()
    }

    /// Neighbors that packets waited for.
    pub(super) fn asked(&self) -> Asked {
        self.hops.asked.clone()
    }

    /// What was looked at is on its way as `revision`.
    pub(super) fn settle(&mut self, look: &Look, revision: u64, is_in_force: impl Fn(u64) -> bool) {
        self.numbers.settle(&look.peers, revision, is_in_force);
    }

    /// Everything of the uplink, as of now. `limits`: the largest packets that come through to peers to whom larger ones should.
    pub(super) fn look(
        &mut self,
        netlink: &mut Netlink,
        host_ports: &BTreeSet<(u8, u16)>,
        members: Option<&Arc<Members>>,
        limits: &BTreeMap<IpAddr, u16>,
    ) -> io::Result<Look> {
        let config = &self.ground.config;
        let card = netlink
            .interface(&config.interface)?
            .ok_or(io::ErrorKind::NotFound)?;
        let addresses = if config.addresses.is_empty() {
            own_addresses(netlink, &card, members)?
        } else {
            config.addresses.clone()
        };
        let roster = self.enroller.roster(&addresses, members);
        let tunnel = tunnel(config, roster.mac.unwrap_or(card.mac), &addresses);
        let neighbors = mirror::neighbors(netlink, card.index)?;
        let table = mirror::table(netlink)?;
        let mut problems = Vec::new();
        let mut rows = vec![link(&card), Row::Overlay(OverlayRow::Tunnel(tunnel))];
        let mut present = self.hops.present(neighbors);
        let pod_mtu = mtu::of_pods(&self.ground, &roster, &addresses, card.mtu);
        let pod_mtu = pod_mtu.unwrap_or_else(|why| {
            problems.push(why);
            MTU_MIN
        });
        let probed = probed(config, &roster);
        rows.extend((!probed.is_empty()).then(|| probe::link(probed.iter().copied(), card.mtu)));
        let (mut reports, mut targets) = (Vec::new(), Vec::new());
        for peer in &roster.peers {
            let mut report = described(peer);
            let number = self.numbers.of(peer.address);
            let found = number.ok_or_else(|| "there are no more numbers for peers".into());
            match found.and_then(|id| peer_row(netlink, &card, id, peer, &mut present)) {
                Ok(mut row) => {
                    let overhead = overhead(&row, &tunnel);
                    let full = row.mtu.saturating_sub(overhead);
                    let most = self.ground.mtu.unwrap_or(pod_mtu);
                    targets.extend(target(peer, &probed, full.min(most)));
                    if let Some(limit) = limits.get(&peer.address) {
                        row.mtu = row.mtu.min(overhead + (*limit).max(MTU_MIN));
                    }
                    rows.extend(peer_rows(&row, peer, self.ground.has_source));
                    reached(&mut report, &row, &tunnel);
                }
                Err(why) => {
                    if peer.origin == Origin::Configuration {
                        problems.push(format!("Peer {}: {why}", peer.address));
                    }
                    report.problem = Some(why);
                }
            }
            reports.push(report);
        }
        reports.extend(roster.unused.iter().map(not_used));
        rows.extend(routes(&table, &card, &mut present, &mut problems));
        let (hops, doubtful) = present.finish();
        for address in doubtful {
            // A neighbor that cannot be asked for is one that does not answer.
            let _ = mirror::resolve(netlink, card.index, address);
        }
        rows.extend(
            hops.into_iter()
                .map(|hop| Row::Overlay(OverlayRow::NextHop(hop))),
        );
        Ok(Look {
            rows: rows.into_iter().map(|row| (row.key(), row)).collect(),
            claims: self.claims(addresses.clone(), &roster, host_ports),
            peers: roster.peers.iter().map(|peer| peer.address).collect(),
            targets,
            report: NetworkReport {
                node: self.ground.node.clone(),
                interface: config.interface.clone(),
                mtu: card.mtu,
                pod_mtu,
                addresses,
                pods: roster.pods.iter().map(ToString::to_string).collect(),
                tunnel: TunnelReport {
                    protocol: tunnel.protocol.word().into(),
                    port: tunnel.port,
                    vni: tunnel.vni,
                    mac: tunnel.mac.to_string(),
                },
                annotations: flannel::of_tunnel(
                    &tunnel,
                    config.direct == Direct::Always,
                    roster.pods.iter().any(|range| range.address().is_ipv6()),
                ),
                wrong: roster.own,
                peers: reports,
            },
            card,
            problems,
        })
    }

    fn claims(
        &self,
        node: Vec<IpAddr>,
        roster: &Roster,
        host_ports: &BTreeSet<(u8, u16)>,
    ) -> Claims {
        let config = &self.ground.config;
        let prefixes = |texts: &[String]| texts.iter().filter_map(|t| parse_prefix(t)).collect();
        // A node that moves to this one's subnet sends without a tunnel before this one has heard of it.
        let is_direct = |peer: &Peer| peer.way == Way::Direct;
        let some_direct = config.direct != Direct::Never || roster.peers.iter().any(is_direct);
        Claims {
            protocol: config.tunnel.protocol.into(),
            port: config.tunnel.port,
            node,
            direct: if some_direct {
                roster.pods.clone()
            } else {
                Vec::new()
            },
            cluster: if some_direct {
                self.ground.cluster.clone()
            } else {
                Vec::new()
            },
            ports: vec![config.node_ports],
            translated: Some(config.snat_ports()),
            host_ports: host_ports.clone(),
            services: prefixes(&config.service_addresses),
        }
    }
}

/// The card's addresses. Other nodes know those of this node's object: they come first.
fn own_addresses(
    netlink: &mut Netlink,
    card: &Interface,
    members: Option<&Arc<Members>>,
) -> io::Result<Vec<IpAddr>> {
    let mut all = netlink.addresses(card.index)?;
    all.retain(|address| match address {
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    });
    let own = members.and_then(|it| it.own.as_ref());
    let known = own.map_or(&[][..], |it| &it.addresses);
    all.sort_by_key(|address| {
        known
            .iter()
            .position(|it| it == address)
            .unwrap_or(known.len())
    });
    Ok(all)
}

/// How a peer is reached, or why it cannot be.
fn peer_row(
    netlink: &mut Netlink,
    card: &Interface,
    id: PeerId,
    peer: &Peer,
    present: &mut Present<'_>,
) -> Result<PeerRow, String> {
    let route = mirror::route(netlink, peer.address).map_err(|e| format!("no route: {e}"))?;
    if route.interface != card.index {
        return Err(
            "the host reaches it by another interface than the uplink; a node has one uplink"
                .into(),
        );
    }
    Ok(PeerRow {
        id,
        address: peer.address,
        mac: peer.mac,
        next_hop: present.need(route.next_hop),
        mtu: path_mtu(card, &route),
        direct: match peer.way {
            Way::Tunnel => false,
            Way::Direct => true,
            Way::DirectOnLink => route.next_hop == peer.address,
        },
    })
}

/// The rows of a peer that is reached. `has_source`: the cluster's model says which addresses are nodes'.
fn peer_rows(row: &PeerRow, peer: &Peer, has_source: bool) -> Vec<Row> {
    let mut rows = vec![Row::Overlay(OverlayRow::Peer(*row))];
    let own = || std::iter::once(&peer.address).chain(&peer.node_addresses);
    if !has_source {
        rows.extend(own().map(|address| {
            Row::Service(ServiceRow::Address(AddressRow {
                address: *address,
                role: AddressRole::Peer,
            }))
        }));
    }
    let alone = |address: &IpAddr| Prefix::new(*address, if address.is_ipv4() { 32 } else { 128 });
    let (ranges, peer) = (peer.pods.iter().copied(), row.id);
    let remote = |prefix| Row::Overlay(OverlayRow::Remote(RemoteRow { prefix, peer }));
    rows.extend(ranges.chain(own().filter_map(alone)).map(remote));
    rows
}

fn described(peer: &Peer) -> PeerReport {
    PeerReport {
        name: peer.name.to_string(),
        origin: match peer.origin {
            Origin::Configuration => ORIGIN_CONFIGURATION.into(),
            Origin::Cluster => ORIGIN_CLUSTER.into(),
        },
        address: Some(peer.address),
        node_addresses: peer.node_addresses.clone(),
        pods: peer.pods.iter().map(ToString::to_string).collect(),
        way: None,
        mac: Some(peer.mac.to_string()),
        mtu: None,
        problem: None,
        probe: ProbeReport::not_probed(),
    }
}

fn reached(report: &mut PeerReport, row: &PeerRow, tunnel: &TunnelRow) {
    let way = match row.direct {
        true => "direct",
        false => tunnel.protocol.word(),
    };
    report.way = Some(way.into());
    report.mtu = Some(row.mtu.saturating_sub(overhead(row, tunnel)));
}

/// What packets to a peer grow by.
fn overhead(row: &PeerRow, tunnel: &TunnelRow) -> u16 {
    match row.direct {
        true => 0,
        false => tunnel.protocol.overhead(row.address.is_ipv6()),
    }
}

/// This node's own addresses among its pods: one of each family, where there is one.
fn probed(config: &UplinkConfig, roster: &Roster) -> Vec<IpAddr> {
    if config.probes.interval_ms == 0 {
        return Vec::new();
    }
    let of = |v4: bool| {
        let mut ends = roster.pods.iter().copied().filter_map(probe::end_of);
        ends.find(|it| it.is_ipv4() == v4)
    };
    of(true).into_iter().chain(of(false)).collect()
}

/// How a peer is probed, if it can be.
fn target(peer: &Peer, own: &[IpAddr], full: u16) -> Option<Target> {
    let mut theirs = peer.pods.iter().copied().filter_map(probe::end_of);
    let ends = theirs.find_map(|end| {
        let own = own.iter().find(|own| own.is_ipv4() == end.is_ipv4())?;
        Some((*own, end))
    })?;
    Some(Target {
        address: peer.address,
        name: peer.name.clone(),
        is_ours: peer.is_ours,
        ends,
        full,
    })
}

fn not_used(unused: &Unused) -> PeerReport {
    PeerReport {
        name: unused.name.to_string(),
        origin: ORIGIN_CLUSTER.into(),
        address: None,
        node_addresses: Vec::new(),
        pods: Vec::new(),
        way: None,
        mac: None,
        mtu: None,
        problem: Some(unused.reason.clone()),
        probe: ProbeReport::not_probed(),
    }
}

/// The host's routes by the card.
fn routes(
    table: &[TableRow],
    card: &Interface,
    present: &mut Present<'_>,
    problems: &mut Vec<String>,
) -> Vec<Row> {
    let mut by_card: Vec<&TableRow> = table
        .iter()
        .filter(|row| row.interface == card.index && is_routed(row.range))
        .collect();
    if by_card.len() > limits::ROUTES {
        problems.push(format!(
            "{} routes by the uplink; the appliance has the {} widest of them",
            by_card.len(),
            limits::ROUTES
        ));
        by_card.sort_by_key(|row| row.range.length());
        by_card.truncate(limits::ROUTES);
    }
    by_card
        .into_iter()
        .map(|row| {
            Row::Route(RouteRow {
                prefix: row.range,
                next_hop: row.gateway.map(|gateway| present.need(gateway)),
            })
        })
        .collect()
}

/// Link-local and multicast packets are routed nowhere.
fn is_routed(range: Prefix) -> bool {
    match range.address() {
        IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_multicast(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local() && !v6.is_multicast(),
    }
}

fn tunnel(config: &UplinkConfig, mac: Mac, addresses: &[IpAddr]) -> TunnelRow {
    let tunnel = &config.tunnel;
    let own = |v6: bool| addresses.iter().find(|a| a.is_ipv6() == v6).copied();
    let source4 = own(false).and_then(|a| match a {
        IpAddr::V4(v4) => Some::<Ipv4Addr>(v4),
        IpAddr::V6(_) => None,
    });
    let source6 = own(true).and_then(|a| match a {
        IpAddr::V6(v6) => Some::<Ipv6Addr>(v6),
        IpAddr::V4(_) => None,
    });
    TunnelRow {
        protocol: tunnel.protocol.into(),
        port: tunnel.port,
        vni: tunnel.vni,
        mac,
        source4,
        source6,
        zero_checksum6: tunnel.zero_checksum6,
        copy_dscp: tunnel.copy_dscp,
        clamp_mss: tunnel.clamp_mss,
    }
}

fn link(card: &Interface) -> Row {
    Row::Link(LinkRow {
        id: LinkId::UPLINK,
        mac: card.mac,
        addresses: heapless::Vec::new(),
        mtu: card.mtu,
        identity: Identity::WORLD,
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    })
}

fn path_mtu(card: &Interface, route: &Route) -> u16 {
    let route = route.mtu.and_then(|mtu| u16::try_from(mtu).ok());
    route.map_or(card.mtu, |mtu| mtu.min(card.mtu))
}
