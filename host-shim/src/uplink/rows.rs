//! Rows out of what the operator says and what the host knows.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow,
};
use sluice_contract::row::LinkRow;
use sluice_contract::{Identity, Key, LinkId, Mac, Row};

use super::config::{UplinkConfig, parse_prefix};
use super::mirror::{self, Neighbor, Route};
use crate::config::parse_mac;
use crate::wiring::netlink::{Interface, Netlink};

/// Makes the rows again and again, and keeps what must not change meanwhile.
#[derive(Debug)]
pub(super) struct Follower {
    config: UplinkConfig,
    addresses: Vec<IpAddr>,
    /// Next hops that have been in use: ids stay.
    hops: BTreeMap<IpAddr, (NextHopId, Option<Mac>)>,
}

impl Follower {
    pub(super) fn new(config: UplinkConfig) -> Self {
        Self {
            addresses: config.addresses.clone(),
            config,
            hops: BTreeMap::new(),
        }
    }

    /// The outer addresses, once rows have been made.
    pub(super) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// All rows of the uplink, as of now.
    pub(super) fn rows(&mut self, netlink: &mut Netlink) -> io::Result<BTreeMap<Key, Row>> {
        let card = netlink
            .interface(&self.config.interface)?
            .ok_or(io::ErrorKind::NotFound)?;
        if self.config.addresses.is_empty() {
            let mut all = netlink.addresses(card.index)?;
            all.retain(|address| match address {
                IpAddr::V4(v4) => !v4.is_link_local(),
                IpAddr::V6(v6) => !v6.is_unicast_link_local(),
            });
            self.addresses = all;
        }
        let neighbors = mirror::neighbors(netlink, card.index)?;
        let mut rows = vec![link(&card), self.tunnel(&card)];
        let config = self.config.clone();
        for (number, peer) in (0u16..).zip(&config.peers) {
            let route = match mirror::route(netlink, peer.address) {
                Ok(route) if route.interface == card.index => route,
                Ok(_) => {
                    tracing::warn!(peer = %peer.address, "peer is not behind the uplink");
                    continue;
                }
                Err(error) => {
                    tracing::warn!(peer = %peer.address, %error, "no route to the peer");
                    continue;
                }
            };
            let known = neighbors.get(&route.next_hop).copied();
            if known.is_none_or(|neighbor| !neighbor.fresh) {
                // A neighbor that cannot be asked for is one that does not answer.
                let _ = mirror::resolve(netlink, card.index, route.next_hop);
            }
            let hop = self.hop(route.next_hop, known);
            rows.push(Row::Overlay(OverlayRow::NextHop(hop)));
            let id = PeerId(number);
            rows.push(Row::Overlay(OverlayRow::Peer(PeerRow {
                id,
                address: peer.address,
                mac: parse_mac(&peer.mac).unwrap_or_default(),
                next_hop: hop.id,
                mtu: path_mtu(&card, &route),
                direct: peer.direct,
            })));
            let ranges = peer.pods.iter().filter_map(|range| parse_prefix(range));
            rows.extend(
                ranges
                    .map(|prefix| Row::Overlay(OverlayRow::Remote(RemoteRow { prefix, peer: id }))),
            );
        }
        Ok(rows.into_iter().map(|row| (row.key(), row)).collect())
    }

    /// A neighbor in the middle of being asked for keeps the MAC it had.
    fn hop(&mut self, address: IpAddr, known: Option<Neighbor>) -> NextHopRow {
        let next = NextHopId(self.hops.len() as u16);
        let (id, mac) = self.hops.entry(address).or_insert((next, None));
        match known {
            Some(Neighbor { mac: Some(new), .. }) => *mac = Some(new),
            Some(Neighbor { failed: true, .. }) => *mac = None,
            _ => {}
        }
        NextHopRow { id: *id, mac: *mac }
    }

    fn tunnel(&self, card: &Interface) -> Row {
        let tunnel = &self.config.tunnel;
        let own = |v6: bool| self.addresses.iter().find(|a| a.is_ipv6() == v6).copied();
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
