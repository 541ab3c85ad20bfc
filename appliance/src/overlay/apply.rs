//! Rows into the shadow copies, each checked against what is there already.

use super::{Hop, Numbered, Overlay, Peer, Tunnel, cookie};
use crate::address::{Address, Family};
use crate::twin::{Full, Slot};
use sluice_contract::Mac;
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayKey, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol,
    TunnelRow,
};
use sluice_contract::report::{Field, RejectReason};

type Fault = (Field, RejectReason);

/// The number of no neighbor: there is room for fewer.
const NO_HOP: u16 = u16::MAX;
const _: () = assert!(super::Limits::LARGE.next_hops < NO_HOP);

impl Overlay<'_> {
    /// Puts a row into the shadow.
    pub(crate) fn put(&mut self, row: &OverlayRow) -> Result<(), Fault> {
        match row {
            OverlayRow::Tunnel(row) => self.put_tunnel(row),
            OverlayRow::NextHop(row) => self.put_hop(row),
            OverlayRow::Peer(row) => self.put_peer(row),
            OverlayRow::Remote(row) => self.put_remote(row),
        }
    }

    fn put_tunnel(&mut self, row: &TunnelRow) -> Result<(), Fault> {
        let udp = row.protocol != TunnelProtocol::IpIp;
        if udp && row.port == 0 {
            return Err((Field::Port, RejectReason::Invalid));
        }
        if row.vni >> 24 != 0 {
            return Err((Field::Id, RejectReason::Invalid));
        }
        check_mac(row.mac)?;
        let tunnel = Tunnel::from(row);
        for source in [tunnel.source4, tunnel.source6].into_iter().flatten() {
            check_node_address(source)?;
        }
        self.tunnel.shadow = Some(tunnel);
        Ok(())
    }

    fn put_hop(&mut self, row: &NextHopRow) -> Result<(), Fault> {
        let index = usize::from(row.id.0);
        let old = self.hops.shadow_at(index).copied();
        let old = old.ok_or((Field::Id, RejectReason::Full(self.hops.capacity())))?;
        if let Some(mac) = row.mac {
            check_mac(mac)?;
        }
        let address = Address::from(row.address);
        check_node_address(address)?;
        let taken = self.neighbors.find_shadow(address);
        if taken.is_some_and(|other| other.number != row.id.0) {
            return Err((Field::Address, RejectReason::Taken));
        }
        if old.present != 0 {
            self.neighbors.remove(old.address);
        }
        // There are as many as neighbors.
        self.neighbors
            .put(numbered(address, row.id.0))
            .map_err(full_of(Field::Address))?;
        let hop = Hop {
            address,
            mac: row.mac.unwrap_or_default().0,
            present: 1,
            answers: u8::from(row.mac.is_some()),
            users: old.users,
        };
        self.hops.write(index, hop);
        Ok(())
    }

    fn put_peer(&mut self, row: &PeerRow) -> Result<(), Fault> {
        let index = usize::from(row.id.0);
        let full = (Field::Id, RejectReason::Full(self.peers.capacity()));
        let old = self.peers.shadow_at(index).copied().ok_or(full)?;
        check_mac(row.mac)?;
        let address = Address::from(row.address);
        check_node_address(address)?;
        // RFC 791 asks for 68, RFC 8200 for 1280; below 576 no overlay is of use.
        let least = match address.family() {
            Family::V4 => 576,
            Family::V6 => 1280,
        };
        if row.mtu < least {
            return Err((Field::Mtu, RejectReason::Invalid));
        }
        let taken = self.sources.find_shadow(address);
        if taken.is_some_and(|source| source.number != row.id.0) {
            return Err((Field::Address, RejectReason::Taken));
        }
        let hop = self.hops.shadow_at(usize::from(row.next_hop.0));
        if hop.is_none_or(|hop| hop.present == 0) {
            return Err((Field::NextHop, RejectReason::Missing));
        }
        if old.present != 0 {
            self.sources.remove(old.address);
            self.count_hop(NextHopId(old.next_hop), -1);
        }
        // There are as many as peers.
        self.sources
            .put(numbered(address, row.id.0))
            .map_err(full_of(Field::Address))?;
        self.count_hop(row.next_hop, 1);
        let peer = Peer {
            address,
            mac: row.mac.0,
            mtu: row.mtu,
            next_hop: row.next_hop.0,
            present: 1,
            direct: u8::from(row.direct),
            users: old.users,
            cookie: cookie(address, &self.hasher),
            rest: [0; 28],
        };
        self.peers.write(index, peer);
        Ok(())
    }

    fn put_remote(&mut self, row: &RemoteRow) -> Result<(), Fault> {
        let address = Address::from(row.prefix.address());
        let mapped = row.prefix.address().is_ipv6() && address.family() == Family::V4;
        if mapped || address.is_multicast() || (address.is_link_local6()) {
            return Err((Field::Prefix, RejectReason::Invalid));
        }
        let peer = self.peers.shadow_at(usize::from(row.peer.0));
        if peer.is_none_or(|peer| peer.present == 0) {
            return Err((Field::Peer, RejectReason::Missing));
        }
        let old = self
            .remotes
            .put(row.prefix, row.peer.0)
            .map_err(full_of(Field::Prefix))?;
        self.count_peer(row.peer, 1);
        if let Some(old) = old {
            self.count_peer(PeerId(old), -1);
        }
        Ok(())
    }

    /// Takes a row out of the shadow.
    pub(crate) fn remove(&mut self, key: OverlayKey) -> Result<(), Fault> {
        let missing = (Field::Id, RejectReason::Missing);
        match key {
            OverlayKey::Tunnel => self.tunnel.shadow = None,
            OverlayKey::NextHop(id) => {
                let index = usize::from(id.0);
                let hop = self.hops.shadow_at(index).filter(|hop| hop.present != 0);
                let hop = *hop.ok_or(missing)?;
                if hop.users != 0 {
                    return Err((Field::NextHop, RejectReason::InUse(hop.users)));
                }
                self.neighbors.remove(hop.address);
                self.hops.write(index, Slot::empty());
            }
            OverlayKey::Peer(id) => {
                let index = usize::from(id.0);
                let peer = self.peers.shadow_at(index).filter(|peer| peer.present != 0);
                let peer = *peer.ok_or(missing)?;
                if peer.users != 0 {
                    return Err((Field::Peer, RejectReason::InUse(peer.users)));
                }
                self.sources.remove(peer.address);
                self.count_hop(NextHopId(peer.next_hop), -1);
                self.peers.write(index, Slot::empty());
            }
            OverlayKey::Remote(prefix) => {
                let old = self.remotes.remove(prefix);
                let old = old.ok_or((Field::Prefix, RejectReason::Missing))?;
                self.count_peer(PeerId(old), -1);
            }
        }
        Ok(())
    }

    /// A neighbor whose new row was refused, and to which peers or routes refer: it does not answer, and has no address.
    pub(crate) fn silence_hop(&mut self, id: NextHopId) {
        let index = usize::from(id.0);
        if let Some(old) = self.hops.shadow_at(index).copied()
            && old.present != 0
        {
            self.neighbors.remove(old.address);
            let hop = Hop {
                present: 1,
                users: old.users,
                ..Slot::empty()
            };
            self.hops.write(index, hop);
        }
    }

    /// A peer whose new row was refused, and behind which ranges lie: nothing leads to it, and nothing comes from it.
    pub(crate) fn silence_peer(&mut self, id: PeerId) {
        let index = usize::from(id.0);
        if let Some(old) = self.peers.shadow_at(index).copied()
            && old.present != 0
        {
            self.sources.remove(old.address);
            self.count_hop(NextHopId(old.next_hop), -1);
            let peer = Peer {
                present: 1,
                next_hop: NO_HOP,
                users: old.users,
                ..Slot::empty()
            };
            self.peers.write(index, peer);
        }
    }

    /// A route uses the neighbor, or no longer.
    ///
    /// # Errors
    /// If there is no such neighbor.
    pub(crate) fn use_hop(&mut self, id: NextHopId, change: i32) -> Result<(), Fault> {
        let hop = self.hops.shadow_at(usize::from(id.0));
        if hop.is_none_or(|hop| hop.present == 0) {
            return Err((Field::NextHop, RejectReason::Missing));
        }
        self.count_hop(id, change);
        Ok(())
    }

    fn count_hop(&mut self, id: NextHopId, change: i32) {
        let index = usize::from(id.0);
        if let Some(mut hop) = self.hops.shadow_at(index).copied() {
            hop.users = hop.users.saturating_add_signed(change);
            self.hops.write(index, hop);
        }
    }

    fn count_peer(&mut self, id: PeerId, change: i32) {
        let index = usize::from(id.0);
        if let Some(mut peer) = self.peers.shadow_at(index).copied() {
            peer.users = peer.users.saturating_add_signed(change);
            self.peers.write(index, peer);
        }
    }
}

const fn numbered(address: Address, number: u16) -> Numbered {
    Numbered {
        address,
        number,
        present: 1,
        pad: 0,
    }
}

fn check_mac(mac: Mac) -> Result<(), Fault> {
    if mac.is_group() || mac.0 == [0; 6] {
        Err((Field::Mac, RejectReason::Invalid))
    } else {
        Ok(())
    }
}

fn check_node_address(address: Address) -> Result<(), Fault> {
    let nonsense = address.is_unspecified()
        || address.is_martian_in(address.family())
        || address.is_multicast()
        || address.is_broadcast4();
    if nonsense {
        Err((Field::Address, RejectReason::Invalid))
    } else {
        Ok(())
    }
}

fn full_of(field: Field) -> impl Fn(Full) -> Fault {
    move |full| (field, RejectReason::Full(full.capacity))
}
