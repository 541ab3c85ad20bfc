//! Unreachable routes for the ranges of pods and Services, behind those to the tap.
//!
//! Where the tap is removed, its routes go with it. What the host then sends to a pod or a Service would
//! follow the default route, in clear, to whoever answers there. These routes stay: they are worse than
//! any other of the same range, so they count only when the tap is not there.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use sluice_contract::Prefix;

use crate::wiring::netlink::{Netlink, family};

/// By it they are known again in a later life; no routing daemon uses one so bad.
const METRIC: u32 = 0xfffe_534c;

/// Makes these ranges unreachable where nothing better leads there, and no others any more.
///
/// # Errors
/// As the kernel says.
pub(super) fn set(netlink: &mut Netlink, wanted: &[Prefix]) -> io::Result<()> {
    for range in wanted {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        match netlink.order(RouteNetlinkMessage::NewRoute(unreachable(*range)), flags) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            _ => {}
        }
    }
    for range in present(netlink)? {
        if !wanted.contains(&range) {
            match netlink.order(RouteNetlinkMessage::DelRoute(unreachable(range)), 0) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

fn unreachable(range: Prefix) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family(range.address());
    route.header.destination_prefix_length = range.length();
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    // Network managers remove at their start whatever routes are not theirs or the kernel's.
    route.header.protocol = RouteProtocol::Kernel;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unreachable;
    route.attributes = vec![
        RouteAttribute::Destination(range.address().into()),
        RouteAttribute::Priority(METRIC),
    ];
    route
}

/// The ranges of an earlier life, or of this one.
fn present(netlink: &mut Netlink) -> io::Result<Vec<Prefix>> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut ask = RouteMessage::default();
        ask.header.address_family = family;
        let ask = RouteNetlinkMessage::GetRoute(ask);
        netlink.request(ask, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                found.extend(ours(&route));
            }
        })?;
    }
    Ok(found)
}

fn ours(route: &RouteMessage) -> Option<Prefix> {
    let is_ours = route.header.kind == RouteType::Unreachable
        && route.header.table == RouteHeader::RT_TABLE_MAIN
        && route.attributes.contains(&RouteAttribute::Priority(METRIC));
    let to = route.attributes.iter().find_map(|it| match it {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some((*v4).into()),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some((*v6).into()),
        _ => None,
    });
    Prefix::new(to?, route.header.destination_prefix_length).filter(|_| is_ours)
}
