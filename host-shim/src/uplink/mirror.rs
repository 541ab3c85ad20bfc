//! What the host knows of the way to other nodes: routes, neighbors, the network card itself. Asked for again whenever the
//! kernel says that something has changed, and once a second in any case.
//!
//! The appliance has no ARP of its own on the uplink: it uses the neighbors the kernel resolves, and has the kernel resolve
//! those it needs (`NTF_USE`).

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::sync::Arc;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::EventFd;
use sluice_contract::{Mac, Prefix};

use crate::wiring::netlink::{Netlink, family, host_prefix};

/// Changes of links, neighbors, addresses and routes (`RTNLGRP_*`).
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// Hears that something has changed, not what.
#[derive(Debug)]
pub(super) struct Changes {
    kernel: Socket,
    /// Others than the kernel may say so as well.
    asked: Arc<EventFd>,
}

impl Changes {
    /// Listens in the calling thread's namespace.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn listen(asked: Arc<EventFd>) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self {
            kernel: socket,
            asked,
        })
    }

    /// Waits for a change, `milliseconds` at most, and takes in all that have come; whether there was one.
    pub(super) fn wait(&self, milliseconds: u16) -> bool {
        let ready = |limit: PollTimeout| {
            let mut events = [self.kernel.as_fd(), self.asked.as_fd()]
                .map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
            // An error is looked into by whoever reads.
            let _ = nix::poll::poll(&mut events, limit);
            events.map(|event| event.revents().is_some_and(|seen| !seen.is_empty()))
        };
        let [mut kernel, asked] = ready(PollTimeout::from(milliseconds));
        let heard = kernel || asked;
        if asked {
            // Whoever asks again meanwhile is heard at the next wait.
            let _ = self.asked.read();
        }
        while kernel {
            // An overflow is a change as well.
            let _ = self.kernel.recv_from_full();
            [kernel, _] = ready(PollTimeout::ZERO);
        }
        heard
    }
}

/// The way to an address, as the kernel would go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// The interface it leaves by.
    pub(super) interface: u32,
    /// The neighbor it goes to.
    pub(super) next_hop: IpAddr,
    /// The route's own MTU, if it has one.
    pub(super) mtu: Option<u32>,
}

/// A neighbor, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Neighbor {
    pub(super) mac: Option<Mac>,
    /// Known to be there: nothing is to be asked.
    pub(super) fresh: bool,
    /// Asked for and not there.
    pub(super) failed: bool,
}

/// The route to an address.
///
/// # Errors
/// As the kernel says; `ENETUNREACH` if there is none.
pub(super) fn route(netlink: &mut Netlink, to: IpAddr) -> io::Result<Route> {
    let mut ask = RouteMessage::default();
    ask.header.address_family = family(to);
    ask.header.destination_prefix_length = host_prefix(to);
    ask.attributes.push(RouteAttribute::Destination(to.into()));
    let mut found = None;
    netlink.request(RouteNetlinkMessage::GetRoute(ask), 0, |answer| {
        if let RouteNetlinkMessage::NewRoute(route) = answer {
            found = read_route(&route, to);
        }
    })?;
    found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENETUNREACH))
}

fn read_route(route: &RouteMessage, to: IpAddr) -> Option<Route> {
    let mut read = Route {
        interface: 0,
        next_hop: to,
        mtu: None,
    };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => read.interface = *index,
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => {
                read.next_hop = (*gateway).into();
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => {
                read.next_hop = (*gateway).into();
            }
            RouteAttribute::Metrics(metrics) => {
                read.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (read.interface != 0).then_some(read)
}

/// A row of the host's main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TableRow {
    pub(super) range: Prefix,
    /// The lowest wins.
    metric: u32,
    pub(super) interface: u32,
    /// None: the range is on the link itself.
    pub(super) gateway: Option<IpAddr>,
}

/// The host's main table: of several rows for a range the one that counts. Rows with several next hops count by their first.
///
/// # Errors
/// As the kernel says.
pub(super) fn table(netlink: &mut Netlink) -> io::Result<Vec<TableRow>> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut ask = RouteMessage::default();
        ask.header.address_family = family;
        let dump = RouteNetlinkMessage::GetRoute(ask);
        netlink.request(dump, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewRoute(route) = answer
                && route.header.table == RouteHeader::RT_TABLE_MAIN
                && route.header.kind == RouteType::Unicast
            {
                all.extend(read_row(&route));
            }
        })?;
    }
    all.sort();
    all.dedup_by_key(|row| row.range);
    Ok(all)
}

fn read_row(route: &RouteMessage) -> Option<TableRow> {
    let any: IpAddr = match route.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let to = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    });
    let to = to.unwrap_or(any);
    let metric = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    let hops = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::MultiPath(hops) => hops.first(),
        _ => None,
    });
    let of = |attributes: &[RouteAttribute]| {
        attributes.iter().find_map(|a| match a {
            RouteAttribute::Gateway(RouteAddress::Inet(v4))
            | RouteAttribute::Via(RouteVia::Inet(v4)) => Some(IpAddr::V4(*v4)),
            RouteAttribute::Gateway(RouteAddress::Inet6(v6))
            | RouteAttribute::Via(RouteVia::Inet6(v6)) => Some(IpAddr::V6(*v6)),
            _ => None,
        })
    };
    let (interface, gateway) = match hops {
        Some(hop) => (hop.interface_index, of(&hop.attributes)),
        None => {
            let interface = route.attributes.iter().find_map(|a| match a {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            (interface?, of(&route.attributes))
        }
    };
    Some(TableRow {
        range: Prefix::new(to, route.header.destination_prefix_length)?,
        metric: metric.unwrap_or(0),
        interface,
        gateway,
    })
}

/// All neighbors on an interface.
///
/// # Errors
/// As the kernel says.
pub(super) fn neighbors(
    netlink: &mut Netlink,
    interface: u32,
) -> io::Result<BTreeMap<IpAddr, Neighbor>> {
    let ask = NeighbourMessage::default();
    let mut all = BTreeMap::new();
    let dump = RouteNetlinkMessage::GetNeighbour(ask);
    netlink.request(dump, NLM_F_DUMP, |answer| {
        if let RouteNetlinkMessage::NewNeighbour(row) = answer
            && row.header.ifindex == interface
            && let Some((address, neighbor)) = read_neighbor(&row)
        {
            all.insert(address, neighbor);
        }
    })?;
    Ok(all)
}

fn read_neighbor(row: &NeighbourMessage) -> Option<(IpAddr, Neighbor)> {
    use NeighbourState as S;
    let address = row.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })?;
    let known = !matches!(row.header.state, S::Incomplete | S::Failed | S::None);
    let mac = row.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::LinkLayerAddress(bytes) if known => {
            <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac)
        }
        _ => None,
    });
    let neighbor = Neighbor {
        mac,
        fresh: matches!(row.header.state, S::Reachable | S::Permanent | S::Noarp),
        failed: row.header.state == S::Failed,
    };
    Some((address, neighbor))
}

/// Has the kernel find out where a neighbor is.
///
/// # Errors
/// As the kernel says.
pub(super) fn resolve(netlink: &mut Netlink, interface: u32, address: IpAddr) -> io::Result<()> {
    let mut row = NeighbourMessage::default();
    row.header.family = family(address);
    row.header.ifindex = interface;
    row.header.state = NeighbourState::None;
    row.header.flags = NeighbourFlags::Use;
    row.attributes
        .push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        }));
    netlink.request(
        RouteNetlinkMessage::NewNeighbour(row),
        NLM_F_CREATE | NLM_F_REPLACE,
        |_| (),
    )
}
