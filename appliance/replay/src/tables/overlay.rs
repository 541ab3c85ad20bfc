//! The way to other nodes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Deserialize;
use sluice_contract::Row;
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow,
};

use super::Rows;
use super::text::{MacText, PrefixText, TunnelWord};

/// See [`TunnelRow`].
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Tunnel {
    protocol: TunnelWord,
    port: u16,
    vni: u32,
    mac: MacText,
    source4: Option<Ipv4Addr>,
    source6: Option<Ipv6Addr>,
    zero_checksum6: bool,
    copy_dscp: bool,
    clamp_mss: bool,
}

impl Default for Tunnel {
    fn default() -> Self {
        let row = TunnelRow::default();
        Self {
            protocol: TunnelWord(row.protocol),
            port: row.port,
            vni: row.vni,
            mac: MacText(row.mac),
            source4: row.source4,
            source6: row.source6,
            zero_checksum6: row.zero_checksum6,
            copy_dscp: row.copy_dscp,
            clamp_mss: row.clamp_mss,
        }
    }
}

impl Tunnel {
    const fn row(&self) -> TunnelRow {
        TunnelRow {
            protocol: self.protocol.0,
            port: self.port,
            vni: self.vni,
            mac: self.mac.0,
            source4: self.source4,
            source6: self.source6,
            zero_checksum6: self.zero_checksum6,
            copy_dscp: self.copy_dscp,
            clamp_mss: self.clamp_mss,
        }
    }
}

/// See [`NextHopRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NextHop {
    id: u16,
    address: IpAddr,
    mac: Option<MacText>,
}

/// See [`PeerRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    id: u16,
    address: IpAddr,
    mac: MacText,
    next_hop: u16,
    mtu: u16,
    #[serde(default)]
    direct: bool,
}

/// See [`RemoteRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remote {
    prefix: PrefixText,
    peer: u16,
}

/// Everything about other nodes.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Overlay {
    tunnel: Option<Tunnel>,
    next_hops: Vec<NextHop>,
    peers: Vec<Peer>,
    remotes: Vec<Remote>,
}

impl Overlay {
    /// All rows, each behind those it refers to.
    pub(super) fn put(&self, rows: &mut Rows) {
        let mut put = |place: String, row| rows.put(place, Row::Overlay(row));
        if let Some(tunnel) = &self.tunnel {
            put("overlay.tunnel".into(), OverlayRow::Tunnel(tunnel.row()));
        }
        for (at, hop) in self.next_hops.iter().enumerate() {
            let row = NextHopRow {
                id: NextHopId(hop.id),
                address: hop.address,
                mac: hop.mac.map(|mac| mac.0),
            };
            put(format!("overlay.next_hops[{at}]"), OverlayRow::NextHop(row));
        }
        for (at, peer) in self.peers.iter().enumerate() {
            let row = PeerRow {
                id: PeerId(peer.id),
                address: peer.address,
                mac: peer.mac.0,
                next_hop: NextHopId(peer.next_hop),
                mtu: peer.mtu,
                direct: peer.direct,
            };
            put(format!("overlay.peers[{at}]"), OverlayRow::Peer(row));
        }
        for (at, remote) in self.remotes.iter().enumerate() {
            let row = RemoteRow {
                prefix: remote.prefix.0,
                peer: PeerId(remote.peer),
            };
            put(format!("overlay.remotes[{at}]"), OverlayRow::Remote(row));
        }
    }
}
