//! Each row into its shadow table, checked against what is there already.
//!
//! A row that is refused takes the former row of its key with it: what comes into force never depends on what was before.

use super::Fault;
use crate::address::{Address, Family};
use crate::bandwidth::Limit;
use crate::policy::Refusal;
use crate::tables::{Known, Link, Nat, Node, Range, Rates, Tables};
use crate::twin::{Full, Slot};
use heapless::Vec;
use sluice_contract::overlay::OverlayKey;
use sluice_contract::report::{Field, RejectReason};
use sluice_contract::row::{BandwidthRow, LinkRow, MarkingRow, NodeRow, RatesRow, RouteRow};
use sluice_contract::service::{
    AddressRole, AddressRow, ConnectionsRow, NatRow, PrefixRow, ServiceKey, ServiceRow,
};
use sluice_contract::{Generation, Key, LinkId, Prefix, Row};

const INVALID: RejectReason = RejectReason::Invalid;
const MISSING: RejectReason = RejectReason::Missing;

fn refused_policy(refusal: Refusal) -> Fault {
    let reason = match refusal {
        Refusal::Full(capacity) => RejectReason::Full(capacity),
        Refusal::Invalid => RejectReason::Invalid,
        Refusal::Missing => RejectReason::Missing,
        Refusal::Busy => RejectReason::OutOfOrder,
    };
    (Field::Whole, reason)
}

/// What belongs to the whole change.
impl Tables<'_> {
    /// Puts the row, or takes out what its key had before.
    pub(super) fn put(&mut self, row: &Row) -> Result<(), Fault> {
        let done = self.try_put(row);
        if done.is_err() {
            self.withdraw(row.key());
        }
        done
    }

    /// Ends the row of that key, if there is one. Rows to which others refer stay as shells that serve nothing.
    fn withdraw(&mut self, key: Key) {
        if self.remove(key).is_ok() {
            return;
        }
        match key {
            Key::Service(ServiceKey::Set(id)) => self.services.silence_set(id),
            Key::Service(ServiceKey::Port(id)) => self.services.silence_port(id),
            Key::Overlay(OverlayKey::NextHop(id)) => self.overlay.silence_hop(id),
            Key::Overlay(OverlayKey::Peer(id)) => self.overlay.silence_peer(id),
            // There was none.
            _ => {}
        }
    }

    fn try_put(&mut self, row: &Row) -> Result<(), Fault> {
        match row {
            Row::Node(row) => self.put_node(row),
            Row::Link(row) => self.put_link(row),
            Row::Policy(row) => self.policy.put(row).map_err(refused_policy),
            Row::Route(row) => self.put_route(row),
            Row::Service(row) => self.put_service(row),
            Row::Overlay(row) => self.overlay.put(row),
            Row::Bandwidth(row) => self.put_bandwidth(row),
            Row::Marking(row) => self.put_marking(row),
            Row::Rates(row) => self.put_rates(row),
        }
    }

    fn put_service(&mut self, row: &ServiceRow) -> Result<(), Fault> {
        match row {
            ServiceRow::Nat(row) => self.put_nat(row),
            ServiceRow::Connections(row) => self.put_connections(row),
            ServiceRow::Prefix(row) => self.put_range(row),
            ServiceRow::Address(row) => self.put_address(row),
            ServiceRow::Set(row) => self.services.put_set(row),
            ServiceRow::Backend(row) => self.services.put_backend(row),
            ServiceRow::Slots(row) => self.services.put_slots(row),
            ServiceRow::Port(row) => self.services.put_port(row),
            ServiceRow::Source(row) => self.services.put_source(row),
            ServiceRow::Frontend(row) => {
                let address = Address::from(row.address);
                // The pipeline asks for frontends only at addresses of which it knows that they may have some.
                let known = self.known.find_shadow(address).and_then(Known::role);
                if address.is_unspecified() || known.is_some() {
                    self.services.put_frontend(row)
                } else {
                    Err((Field::Address, MISSING))
                }
            }
        }
    }

    pub(super) fn remove(&mut self, key: Key) -> Result<(), Fault> {
        match key {
            Key::Node => {
                self.node.shadow = Node::default();
                Ok(())
            }
            Key::Link(id) => self.remove_link(id),
            Key::Policy(key) => self.policy.remove(&key).map_err(refused_policy),
            Key::Route(prefix) => match remove_range(&mut self.routes.shadow, prefix)? {
                Some(id) => self.overlay.use_hop(id, -1),
                None => Ok(()),
            },
            Key::Service(key) => self.remove_service(key),
            Key::Overlay(key) => self.overlay.remove(key),
            Key::Bandwidth(link) => self.remove_bandwidth(link),
            Key::Marking(link) => self.remove_marking(link),
            Key::Rates(link) => self.remove_rates(link),
        }
    }

    fn remove_service(&mut self, key: ServiceKey) -> Result<(), Fault> {
        match key {
            ServiceKey::Nat => {
                self.nat.shadow = Nat::default();
                Ok(())
            }
            ServiceKey::Connections => {
                self.connections.shadow = ConnectionsRow::default();
                Ok(())
            }
            ServiceKey::Prefix(prefix) => remove_range(&mut self.ranges.shadow, prefix).map(|_| ()),
            ServiceKey::Address(address) => self.remove_address(address.into()),
            ServiceKey::Set(id) => self.services.remove_set(id),
            ServiceKey::Backend { set, index } => self.services.remove_backend(set, index),
            ServiceKey::Slots { set, chunk } => self.services.remove_slots(set, chunk),
            ServiceKey::Port(id) => self.services.remove_port(id),
            ServiceKey::Source { port, prefix } => self.services.remove_source(port, prefix),
            ServiceKey::Frontend {
                address,
                protocol,
                port,
            } => self
                .services
                .remove_frontend(address.into(), protocol, port),
        }
    }

    pub(super) fn begin(&mut self, fresh: bool) {
        if fresh {
            self.node.shadow = Node::default();
            self.ranges.shadow.clear();
            self.routes.shadow.clear();
            self.nat.shadow = Nat::default();
            self.connections.shadow = ConnectionsRow::default();
            self.links.clear();
            self.rates.clear();
            self.known.clear();
            self.services.clear();
            self.overlay.clear();
        }
        // Busy is the only refusal, and `Apply` comes here settled.
        let _ = self.policy.begin(fresh);
    }

    pub(super) fn prepare_slice(&mut self, budget: &mut usize) -> bool {
        self.links.clear_slice(budget)
            && self.rates.clear_slice(budget)
            && self.known.clear_slice(budget)
            && self.services.clear_slice(budget)
            && self.overlay.clear_slice(budget)
            && self.policy.settle(clamp(*budget))
    }

    pub(super) fn abort(&mut self) {
        self.policy.abort();
    }

    pub(super) fn sync_slice(&mut self, budget: &mut usize) -> bool {
        self.node.shadow = self.node.live;
        self.ranges.shadow.clone_from(&self.ranges.live);
        self.routes.shadow.clone_from(&self.routes.live);
        self.nat.shadow.clone_from(&self.nat.live);
        self.connections.shadow = self.connections.live;
        self.links.sync_slice(budget)
            && self.rates.sync_slice(budget)
            && self.known.sync_slice(budget)
            && self.services.sync_slice(budget)
            && self.overlay.sync_slice(budget)
            && self.policy.settle(clamp(*budget))
    }

    /// Whether there are sets of which parts are missing.
    pub(super) const fn is_incomplete(&self) -> bool {
        self.services.is_incomplete()
    }

    /// The next set of which parts are missing, from that slot on; `None` at the end, or when the budget is used up.
    pub(super) fn incomplete_from(
        &self,
        from: &mut usize,
        budget: &mut usize,
    ) -> Option<(Key, Fault)> {
        let (set, fault) = self.services.incomplete_from(from, budget)?;
        Some((Key::Service(ServiceKey::Set(set)), fault))
    }

    pub(super) fn exchange(&mut self, generation: Generation) {
        core::mem::swap(&mut self.node.live, &mut self.node.shadow);
        core::mem::swap(&mut self.ranges.live, &mut self.ranges.shadow);
        core::mem::swap(&mut self.routes.live, &mut self.routes.shadow);
        core::mem::swap(&mut self.nat.live, &mut self.nat.shadow);
        core::mem::swap(&mut self.connections.live, &mut self.connections.shadow);
        self.links.exchange();
        self.rates.exchange();
        self.known.exchange();
        self.services.exchange();
        self.overlay.exchange();
        self.policy.commit();
        self.generation = generation;
        self.epoch = self.epoch.wrapping_add(1);
    }
}

/// Links, the node, and the addresses that mean something.
impl Tables<'_> {
    fn put_node(&mut self, row: &NodeRow) -> Result<(), Fault> {
        let node = Node::from(row);
        let wrong4 = node.gateway4.is_martian_in(Family::V4) || node.gateway4.is_multicast();
        if wrong4 || node.gateway6.is_unspecified() || node.gateway6.is_multicast() {
            return Err((Field::Gateway, RejectReason::Invalid));
        }
        if node.gateway_mac.is_group() || node.gateway_mac.0 == [0; 6] {
            return Err((Field::Mac, RejectReason::Invalid));
        }
        self.node.shadow = node;
        Ok(())
    }

    fn put_link(&mut self, row: &LinkRow) -> Result<(), Fault> {
        let own = [LinkId::UPLINK, LinkId::HOST, LinkId::PROBES];
        if !row.id.is_pod() && !own.contains(&row.id) {
            return Err((Field::Id, RejectReason::Invalid));
        }
        if row.mac.is_group() || row.mac.0 == [0; 6] || row.mac == self.node.shadow.gateway_mac {
            return Err((Field::Mac, RejectReason::Invalid));
        }
        // RFC 791 asks for 576 everywhere, RFC 8200 for 1280.
        let least = if row.addresses.iter().any(core::net::IpAddr::is_ipv6) {
            1280
        } else {
            576
        };
        if row.mtu < least {
            return Err((Field::Mtu, RejectReason::Invalid));
        }
        for address in row.addresses.iter().map(|address| Address::from(*address)) {
            self.check_address(row.id, address)?;
        }
        let before = self.link_slot(row.id);
        self.remove_link_rows(row.id);
        for address in &row.addresses {
            let full = self.know((*address).into(), |known| known.with_link(Some(row.id)));
            if let Err(full) = full {
                self.forget_addresses(row);
                return Err((Field::Addresses, RejectReason::Full(full.capacity)));
            }
        }
        // Its limits and its mark are rows of their own, and stay.
        self.links
            .write(row.id.index(), Link::new(row).treated_as(&before));
        Ok(())
    }

    /// Takes the addresses of a link that is not there (any more).
    fn forget_addresses(&mut self, row: &LinkRow) {
        for address in row.addresses.iter().map(|address| Address::from(*address)) {
            let known = self.known.find_shadow(address).and_then(Known::link);
            if known == Some(row.id) {
                // Taking something away needs no room.
                let _ = self.know(address, |known| known.with_link(None));
            }
        }
    }

    fn put_bandwidth(&mut self, row: &BandwidthRow) -> Result<(), Fault> {
        let rates = || [row.ingress, row.egress].into_iter().flatten();
        if rates().any(|rate| rate.bits_per_second == 0 || rate.burst == 0) {
            return Err((Field::Rate, INVALID));
        }
        if rates().next().is_none() {
            return Err((Field::Whole, INVALID));
        }
        if !row.link.is_pod() {
            return Err((Field::Link, INVALID));
        }
        let link = self.link_slot(row.link);
        let limits = (Limit::new(row.ingress), Limit::new(row.egress));
        self.links
            .write(row.link.index(), link.with_limits(limits.0, limits.1));
        Ok(())
    }

    fn remove_bandwidth(&mut self, id: LinkId) -> Result<(), Fault> {
        let link = self.link_slot(id);
        if !link.has_bandwidth() {
            return Err((Field::Whole, MISSING));
        }
        let none = Limit::default();
        self.links.write(id.index(), link.with_limits(none, none));
        Ok(())
    }

    fn put_marking(&mut self, row: &MarkingRow) -> Result<(), Fault> {
        if row.dscp > 63 {
            return Err((Field::Dscp, INVALID));
        }
        if !row.link.is_pod() {
            return Err((Field::Link, INVALID));
        }
        let link = self.link_slot(row.link).with_mark(Some(row.dscp));
        self.links.write(row.link.index(), link);
        Ok(())
    }

    fn remove_marking(&mut self, id: LinkId) -> Result<(), Fault> {
        let link = self.link_slot(id);
        if link.mark().is_none() {
            return Err((Field::Whole, MISSING));
        }
        self.links.write(id.index(), link.with_mark(None));
        Ok(())
    }

    fn put_rates(&mut self, row: &RatesRow) -> Result<(), Fault> {
        let rates = Rates::new(row);
        let (packets, connections) = rates.limits();
        if !packets && !connections {
            return Err((Field::Whole, INVALID));
        }
        if !row.link.is_pod() {
            return Err((Field::Link, INVALID));
        }
        self.rates.write(row.link.index(), rates);
        let link = self.link_slot(row.link).with_rates(packets, connections);
        self.links.write(row.link.index(), link);
        Ok(())
    }

    fn remove_rates(&mut self, id: LinkId) -> Result<(), Fault> {
        let link = self.link_slot(id);
        if !link.has_packet_rate() && !link.has_connection_rate() {
            return Err((Field::Whole, MISSING));
        }
        self.rates.write(id.index(), Rates::default());
        self.links.write(id.index(), link.with_rates(false, false));
        Ok(())
    }

    /// Whatever is written down of a link, which need not be there.
    fn link_slot(&self, id: LinkId) -> Link {
        let link = self.links.shadow_at(id.index()).copied();
        link.unwrap_or_else(Link::empty)
    }

    fn check_address(&self, link: LinkId, address: Address) -> Result<(), Fault> {
        let node = &self.node.shadow;
        if !is_host(address) || address == node.gateway4 || address == node.gateway6 {
            return Err((Field::Addresses, INVALID));
        }
        let Some(known) = self.known.find_shadow(address) else {
            return Ok(());
        };
        let other_link = known.link().is_some_and(|other| other != link);
        let other_role = known.role().is_some_and(|role| match role {
            AddressRole::Node | AddressRole::NodeWithoutPorts => link != LinkId::HOST,
            AddressRole::Peer | AddressRole::Cluster => true,
            // Whoever may write a Service can claim any address: that keeps no pod from its own.
            AddressRole::External => false,
        });
        if other_link || other_role {
            return Err((Field::Addresses, RejectReason::Taken));
        }
        Ok(())
    }

    /// Changes what is known of an address; the row comes and goes by itself.
    fn know(&mut self, address: Address, change: impl FnOnce(Known) -> Known) -> Result<(), Full> {
        let old = self.known.find_shadow(address).copied();
        let new = change(old.unwrap_or_else(|| Known::of(address)));
        if new.link().is_none() && new.role().is_none() {
            self.known.remove(address);
            return Ok(());
        }
        self.known.put(new).map(|_| ())
    }

    fn remove_link(&mut self, id: LinkId) -> Result<(), Fault> {
        if self.remove_link_rows(id) {
            Ok(())
        } else {
            Err((Field::Id, MISSING))
        }
    }

    /// Takes the link and its addresses out; `false` if there is none.
    fn remove_link_rows(&mut self, id: LinkId) -> bool {
        let Some(old) = self.links.shadow_at(id.index()).copied() else {
            return false;
        };
        for address in old.addresses() {
            // Taking something away needs no room.
            let _ = self.know(address, |known| known.with_link(None));
        }
        self.links.write(id.index(), Link::empty().treated_as(&old));
        old.is_present()
    }

    fn put_address(&mut self, row: &AddressRow) -> Result<(), Fault> {
        let address = Address::from(row.address);
        if !is_host(address) {
            return Err((Field::Address, INVALID));
        }
        let link = self.known.find_shadow(address).and_then(Known::link);
        let is_taken = |link| match row.role {
            AddressRole::Node | AddressRole::NodeWithoutPorts => link != LinkId::HOST,
            AddressRole::Peer | AddressRole::Cluster => true,
            AddressRole::External => false,
        };
        if link.is_some_and(is_taken) {
            return Err((Field::Address, RejectReason::Taken));
        }
        self.know(address, |known| known.with_role(Some(row.role)))
            .map_err(|full| (Field::Whole, RejectReason::Full(full.capacity)))
    }

    fn remove_address(&mut self, address: Address) -> Result<(), Fault> {
        if self
            .known
            .find_shadow(address)
            .and_then(Known::role)
            .is_none()
        {
            return Err((Field::Address, MISSING));
        }
        // Taking something away needs no room.
        let _ = self.know(address, |known| known.with_role(None));
        Ok(())
    }

    fn put_range(&mut self, row: &PrefixRow) -> Result<(), Fault> {
        put_range(&mut self.ranges.shadow, Range::new(row.prefix, row.purpose)).map(|_| ())
    }

    fn put_route(&mut self, row: &RouteRow) -> Result<(), Fault> {
        if let Some(id) = row.next_hop {
            self.overlay.use_hop(id, 1)?;
        }
        let range = Range::new(row.prefix, row.next_hop);
        let former = put_range(&mut self.routes.shadow, range);
        let released = match former {
            Ok(former) => former.flatten(),
            Err(_) => row.next_hop,
        };
        if let Some(id) = released {
            self.overlay.use_hop(id, -1)?;
        }
        former.map(|_| ())
    }

    fn put_nat(&mut self, row: &NatRow) -> Result<(), Fault> {
        if row.first_port == 0 || row.first_port > row.last_port {
            return Err((Field::Port, INVALID));
        }
        let addresses = [row.node4.map(Address::from), row.node6.map(Address::from)];
        if addresses
            .into_iter()
            .flatten()
            .any(|address| !is_host(address))
        {
            return Err((Field::Address, INVALID));
        }
        self.nat.shadow = Nat {
            row: row.clone(),
            present: true,
        };
        Ok(())
    }

    fn put_connections(&mut self, row: &ConnectionsRow) -> Result<(), Fault> {
        if row.seconds().contains(&0) {
            return Err((Field::Timeout, INVALID));
        }
        if [row.pod_share, row.tenant_share]
            .iter()
            .any(|share| !(1..=100).contains(share))
        {
            return Err((Field::Count, INVALID));
        }
        self.connections.shadow = *row;
        Ok(())
    }
}

/// Whether an address can be somebody's.
fn is_host(address: Address) -> bool {
    !address.is_martian_in(address.family())
        && !address.is_multicast()
        && !address.is_broadcast4()
        && !address.is_link_local6()
        && !address.is_unspecified()
}

/// Yields what the range meant before.
fn put_range<T: Copy, const N: usize>(
    ranges: &mut Vec<Range<T>, N>,
    range: Range<T>,
) -> Result<Option<T>, Fault> {
    if let Some(same) = ranges.iter_mut().find(|old| old.prefix == range.prefix) {
        let former = same.meaning;
        *same = range;
        return Ok(Some(former));
    }
    let capacity = u32::try_from(N).unwrap_or(u32::MAX);
    ranges
        .push(range)
        .map_err(|_| (Field::Whole, RejectReason::Full(capacity)))?;
    Ok(None)
}

fn remove_range<T: Copy, const N: usize>(
    ranges: &mut Vec<Range<T>, N>,
    prefix: Prefix,
) -> Result<T, Fault> {
    let at = ranges.iter().position(|range| range.prefix == prefix);
    Ok(ranges.remove(at.ok_or((Field::Prefix, MISSING))?).meaning)
}

fn clamp(budget: usize) -> u32 {
    u32::try_from(budget).unwrap_or(u32::MAX)
}
