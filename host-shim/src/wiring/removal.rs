//! Taking away interfaces, addresses, filters and rules. What is gone is removed: the end of a namespace, the kernel's own
//! clean-up or another program may come between the look that found it and the order that removes it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::address::{AddressMessage, AddressScope};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol,
};
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::{ETHERTYPES, MATCHING, Netlink, clsact, filter_at};

/// What the kernel says of an interface, an address and a rule that it does not have, and of whatever hangs on them.
const ABSENT: [i32; 4] = [libc::ENODEV, libc::EADDRNOTAVAIL, libc::ENOENT, libc::ESRCH];

impl Netlink {
    /// Deletes an interface.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn delete(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        self.take_away(RouteNetlinkMessage::DelLink(link), &ABSENT)
    }

    /// Deletes a tap by its name, if there is one.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn delete_tap(&mut self, name: &str) -> io::Result<()> {
        match self.interface(name)? {
            Some(found) if found.kind == "tun" => self.delete(found.index),
            _ => Ok(()),
        }
    }

    /// Takes away the routes by gateways that [`add_gateway_route`](Self::add_gateway_route) made on an interface, but these: by
    /// range and table.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn keep_gateway_routes(
        &mut self,
        index: u32,
        wanted: &[((IpAddr, u8), Option<u32>)],
    ) -> io::Result<()> {
        let mut others = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut ask = RouteMessage::default();
            ask.header.address_family = family;
            let ask = RouteNetlinkMessage::GetRoute(ask);
            self.request(ask, NLM_F_DUMP, |answer| {
                if let RouteNetlinkMessage::NewRoute(route) = answer
                    && route.attributes.contains(&RouteAttribute::Oif(index))
                    && route.header.protocol == RouteProtocol::Static
                    && !wanted.contains(&range_of(&route))
                {
                    others.push(route);
                }
            })?;
        }
        others
            .into_iter()
            .map(RouteNetlinkMessage::DelRoute)
            .try_for_each(|order| self.take_away(order, &ABSENT))
    }

    /// Deletes a rule.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn delete_rule(&mut self, rule: RuleMessage) -> io::Result<()> {
        self.take_away(RouteNetlinkMessage::DelRule(rule), &ABSENT)
    }

    /// Takes back all of [`redirect_matching`](Self::redirect_matching).
    ///
    /// # Errors
    /// As the kernel says.
    pub fn unredirect(&mut self, from: u32) -> io::Result<()> {
        (0..MATCHING.len()).try_for_each(|set| self.unredirect_set(from, set))
    }

    /// Takes back one set of filters.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn unredirect_set(&mut self, from: u32, set: usize) -> io::Result<()> {
        let priorities = MATCHING[set % MATCHING.len()];
        for (priority, ethertype) in priorities.into_iter().zip(ETHERTYPES) {
            let filter = filter_at(from, (priority, ethertype.to_be()));
            self.take_filters(RouteNetlinkMessage::DelTrafficFilter(filter))?;
        }
        Ok(())
    }

    /// Takes back a [`redirect`](Self::redirect).
    pub(super) fn remove_redirect(&mut self, index: u32) -> io::Result<()> {
        self.take_filters(RouteNetlinkMessage::DelQueueDiscipline(clsact(index)))
    }

    /// Removes all addresses but the link-local ones that the kernel made; the routes through them go with them.
    pub(super) fn flush_addresses(&mut self, index: u32) -> io::Result<()> {
        let mut found = Vec::new();
        let ask = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.request(ask, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewAddress(message) = answer
                && message.header.index == index
                && message.header.scope != AddressScope::Link
            {
                found.push(message);
            }
        })?;
        // The kernel takes the secondary addresses of a subnet away with the primary one.
        found
            .into_iter()
            .map(RouteNetlinkMessage::DelAddress)
            .try_for_each(|order| self.take_away(order, &ABSENT))
    }

    /// Where there is no queue discipline, there are no filters.
    fn take_filters(&mut self, order: RouteNetlinkMessage) -> io::Result<()> {
        self.take_away(order, &[libc::ENODEV, libc::ENOENT, libc::EINVAL])
    }

    fn take_away(&mut self, order: RouteNetlinkMessage, absent: &[i32]) -> io::Result<()> {
        match self.order(order, 0) {
            Err(error) if error.raw_os_error().is_some_and(|e| absent.contains(&e)) => Ok(()),
            outcome => outcome,
        }
    }
}

/// The range of a route, and its table unless it is the main one.
fn range_of(route: &RouteMessage) -> ((IpAddr, u8), Option<u32>) {
    let to = route.attributes.iter().find_map(|it| match it {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some((*v4).into()),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some((*v6).into()),
        _ => None,
    });
    let everywhere = match route.header.address_family {
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    let table = route.attributes.iter().find_map(|it| match it {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let table = table.unwrap_or_else(|| route.header.table.into());
    (
        (
            to.unwrap_or(everywhere),
            route.header.destination_prefix_length,
        ),
        Some(table).filter(|table| *table != u32::from(RouteHeader::RT_TABLE_MAIN)),
    )
}
