//! Rows and filters out of what the operator says and what the host knows.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_contract::overlay::{OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow};
use sluice_contract::row::{LinkRow, RouteRow};
use sluice_contract::service::{AddressRole, AddressRow, ServiceRow};
use sluice_contract::{Identity, Key, LinkId, Prefix, Row, limits};

use super::config::{PeerConfig, UplinkConfig, parse_prefix};
use super::filter::Claims;
use super::mirror::{self, Route, TableRow};
use super::neighbors::{Asked, Hops, Present};
use crate::config::parse_mac;
use crate::wiring::netlink::{Interface, Netlink};

/// Makes the rows again and again, and keeps what must not change meanwhile.
#[derive(Debug)]
pub(super) struct Follower {
    config: UplinkConfig,
    /// The ranges of all pods and Services.
    cluster: Vec<Prefix>,
    hops: Hops,
}

/// One look at the host.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) rows: BTreeMap<Key, Row>,
    pub(super) claims: Claims,
    pub(super) card: Interface,
    /// What is not as it should be, one sentence each.
    pub(super) problems: Vec<String>,
}

impl Follower {
    pub(super) fn new(config: UplinkConfig, cluster: Vec<Prefix>) -> Self {
        Self {
            config,
            cluster,
            hops: Hops::default(),
        }
    }

    /// Neighbors that packets waited for.
    pub(super) fn asked(&self) -> Asked {
        self.hops.asked.clone()
    }

    /// Everything of the uplink, as of now.
    pub(super) fn look(
        &mut self,
        netlink: &mut Netlink,
        host_ports: &BTreeSet<(u8, u16)>,
    ) -> io::Result<Look> {
        let card = netlink
            .interface(&self.config.interface)?
            .ok_or(io::ErrorKind::NotFound)?;
        let addresses = if self.config.addresses.is_empty() {
            own_addresses(netlink, &card)?
        } else {
            self.config.addresses.clone()
        };
        let neighbors = mirror::neighbors(netlink, card.index)?;
        let table = mirror::table(netlink)?;
        let mut problems = Vec::new();
        let mut rows = vec![link(&card), tunnel(&self.config, &card, &addresses)];
        let mut present = self.hops.present(neighbors);
        for (number, peer) in (0u16..).zip(&self.config.peers) {
            match peer_rows(netlink, &card, PeerId(number), peer, &mut present) {
                Ok(of_peer) => rows.extend(of_peer),
                Err(why) => problems.push(format!("Peer {}: {why}", peer.address)),
            }
        }
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
            claims: self.claims(addresses, host_ports),
            card,
            problems,
        })
    }

    fn claims(&self, node: Vec<IpAddr>, host_ports: &BTreeSet<(u8, u16)>) -> Claims {
        let config = &self.config;
        let prefixes = |texts: &[String]| texts.iter().filter_map(|t| parse_prefix(t)).collect();
        let some_direct = config.peers.iter().any(|peer| peer.direct);
        Claims {
            protocol: config.tunnel.protocol.into(),
            port: config.tunnel.port,
            node,
            direct: if some_direct {
                prefixes(&config.pods)
            } else {
                Vec::new()
            },
            cluster: if some_direct {
                self.cluster.clone()
            } else {
                Vec::new()
            },
            ports: vec![config.node_ports],
            translated: Some(config.snat_ports),
            host_ports: host_ports.clone(),
            services: prefixes(&config.service_addresses),
        }
    }
}

fn own_addresses(netlink: &mut Netlink, card: &Interface) -> io::Result<Vec<IpAddr>> {
    let mut all = netlink.addresses(card.index)?;
    all.retain(|address| match address {
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    });
    Ok(all)
}

/// The rows of a peer, or why it cannot be reached.
fn peer_rows(
    netlink: &mut Netlink,
    card: &Interface,
    id: PeerId,
    peer: &PeerConfig,
    present: &mut Present<'_>,
) -> Result<Vec<Row>, String> {
    let route = mirror::route(netlink, peer.address).map_err(|e| format!("no route: {e}"))?;
    if route.interface != card.index {
        return Err(
            "the host reaches it by another interface than the uplink; a node has one uplink"
                .into(),
        );
    }
    let row = PeerRow {
        id,
        address: peer.address,
        mac: parse_mac(&peer.mac).unwrap_or_default(),
        next_hop: present.need(route.next_hop),
        mtu: path_mtu(card, &route),
        direct: peer.direct,
    };
    let mut rows = vec![Row::Overlay(OverlayRow::Peer(row))];
    let own = || std::iter::once(&peer.address).chain(&peer.node_addresses);
    rows.extend(own().map(|address| {
        Row::Service(ServiceRow::Address(AddressRow {
            address: *address,
            role: AddressRole::Peer,
        }))
    }));
    let alone = |address: &IpAddr| Prefix::new(*address, if address.is_ipv4() { 32 } else { 128 });
    let ranges = peer.pods.iter().filter_map(|range| parse_prefix(range));
    let remote = |prefix| Row::Overlay(OverlayRow::Remote(RemoteRow { prefix, peer: id }));
    rows.extend(ranges.chain(own().filter_map(alone)).map(remote));
    Ok(rows)
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

fn tunnel(config: &UplinkConfig, card: &Interface, addresses: &[IpAddr]) -> Row {
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
    Row::Overlay(OverlayRow::Tunnel(TunnelRow {
        protocol: tunnel.protocol.into(),
        port: tunnel.port,
        vni: tunnel.vni,
        mac: tunnel
            .mac
            .as_deref()
            .and_then(parse_mac)
            .unwrap_or(card.mac),
        source4,
        source6,
        zero_checksum6: tunnel.zero_checksum6,
        copy_dscp: tunnel.copy_dscp,
        clamp_mss: tunnel.clamp_mss,
    }))
}

fn link(card: &Interface) -> Row {
    Row::Link(LinkRow {
        id: LinkId::UPLINK,
        mac: card.mac,
        addresses: heapless::Vec::new(),
        mtu: card.mtu,
        identity: Identity::WORLD,
        incarnation: 1,
    })
}

fn path_mtu(card: &Interface, route: &Route) -> u16 {
    let route = route.mtu.and_then(|mtu| u16::try_from(mtu).ok());
    route.map_or(card.mtu, |mtu| mtu.min(card.mtu))
}
