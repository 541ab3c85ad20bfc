//! The host link: a tap `sluice0` by which the node itself reaches pods and Services, here and on other nodes, without
//! address translation on the host.
//!
//! The host routes the cluster's ranges to the tap, with the node's own address as source. It needs to ask nobody for a MAC: the
//! appliance's is known beforehand. Tap, routes and neighbors outlive the daemon; where they are removed, the ranges are
//! unreachable (`guard`).

pub mod config;
mod guard;
mod local;
pub mod policy;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::address::AddressScope;
use sluice_contract::row::{LinkRow, NodeRow};
use sluice_contract::{Identity, LinkId, Mac, Row};

use self::config::HostLinkConfig;
pub(crate) use self::local::{LocalPort, LocalPorts};
use crate::wiring::netlink::{Change, GatewayRoute, Netlink};
use crate::wiring::netns::set_sysctl;
use sluice_ports::tap;

/// The tap.
pub const TAP: &str = "sluice0";
/// Its MAC: the host's own on that link.
const OWN: Mac = Mac([0x02, 0x53, 0x4c, 0, 0, 0x02]);

/// An address for the tap that says nothing to anybody: where there is none, the kernel's loose check of sources is a strict one.
const UNSAID: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);

/// What of the host link cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("Host link: cannot {step}")]
pub struct HostLinkError {
    pub step: String,
    pub source: io::Error,
}

fn failed<S: Into<String>>(step: S) -> impl FnOnce(io::Error) -> HostLinkError {
    let step = step.into();
    move |source| HostLinkError { step, source }
}

/// Makes the tap and the routes, or adopts those that are there: the tap for the trunk's link 2, the row by which the appliance
/// knows it, and the ports of the node that its own programs find there. Whatever is as it should be is left alone. `found`: the
/// tap's descriptor, if a process has it still.
///
/// # Errors
/// The step that failed; a tap that was made here goes again, and with it all else.
pub(crate) fn make(
    config: &HostLinkConfig,
    mtu: u16,
    found: Option<File>,
) -> Result<(File, Row, LocalPorts), HostLinkError> {
    let mut netlink = Netlink::open().map_err(failed("open netlink"))?;
    let before = netlink.interface(TAP).map_err(failed("look for the tap"))?;
    // One that was removed meanwhile has a descriptor that leads nowhere.
    let found = found.filter(|_| before.is_some());
    let tap = found.map_or_else(|| tap::attach(TAP), Ok);
    let tap = tap.map_err(failed("make the tap"))?;
    let now = netlink.interface(TAP).map_err(failed("find the tap"))?;
    let now = now.unwrap_or_default();
    let index = now.index;
    calm().map_err(failed("set the tap's sysctls"))?;
    let change = Change {
        up: !now.up,
        mtu: Some(mtu).filter(|mtu| *mtu != now.mtu),
        // A change makes the kernel forget the neighbors, even to the same.
        mac: Some(OWN).filter(|mac| *mac != now.mac),
        ..Change::default()
    };
    netlink
        .change(index, &change)
        .map_err(failed("set up the tap"))?;
    match netlink.add_address_in(index, UNSAID.into(), AddressScope::Link) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        outcome => outcome.map_err(failed("give the tap an address"))?,
    }
    let appliance = NodeRow::default();
    let gateways: [IpAddr; 2] = [appliance.gateway4.into(), appliance.gateway6.into()];
    for gateway in gateways {
        let known = config
            .addresses
            .iter()
            .any(|own| own.is_ipv4() == gateway.is_ipv4());
        if known {
            netlink
                .add_neighbor(index, gateway, appliance.gateway_mac)
                .map_err(failed("name the appliance's MAC"))?;
        }
    }
    let own = config.addresses.iter().map(|own| {
        let whole = if own.is_ipv4() { 32 } else { 128 };
        ((*own, whole), Some(local::TABLE))
    });
    let ranges = config.ranges().into_iter();
    let ranges = ranges.map(|range| ((range.address(), range.length()), None));
    let mut wanted = Vec::new();
    for (to, table) in ranges.chain(own) {
        let v4 = to.0.is_ipv4();
        let of_family = |address: &&IpAddr| address.is_ipv4() == v4;
        let (Some(gateway), Some(source)) = (
            gateways.iter().find(of_family),
            config.addresses.iter().find(of_family),
        ) else {
            // Checked with the configuration.
            continue;
        };
        let route = GatewayRoute {
            to,
            gateway: *gateway,
            source: *source,
            table,
        };
        netlink
            .add_gateway_route(index, &route)
            .map_err(failed(format!("route {}/{} to the tap", to.0, to.1)))?;
        wanted.push((to, table));
    }
    netlink
        .keep_gateway_routes(index, &wanted)
        .map_err(failed("take away the routes of an earlier life"))?;
    let ports = LocalPorts::adopt(&config.addresses, &mut netlink)
        .map_err(failed("look at the rules of an earlier life"))?;
    // Last: until here closing the descriptor removes the tap, unless it was there before.
    tap::set_persistent(&tap, true).map_err(failed("make the tap persistent"))?;
    tracing::info!(tap = TAP, ranges = config.routes.len(), "host link in use");
    Ok((tap, row(config, mtu), ports))
}

/// Has the ranges of pods and Services be unreachable whenever the tap is not there; with no configuration, no ranges.
///
/// # Errors
/// When the kernel refuses a route.
pub(crate) fn guard(config: Option<&HostLinkConfig>) -> Result<(), HostLinkError> {
    let ranges = config.map(HostLinkConfig::ranges).unwrap_or_default();
    Netlink::open()
        .and_then(|mut netlink| guard::set(&mut netlink, &ranges))
        .map_err(failed("make pods and Services unreachable without it"))
}

/// Removes the tap, and with it the routes and neighbors.
///
/// # Errors
/// As the kernel says.
pub(crate) fn remove() -> Result<(), HostLinkError> {
    let removed = Netlink::open().and_then(|mut netlink| netlink.delete_tap(TAP));
    removed.map_err(failed("remove the tap"))
}

/// Has the tap take packets of another size; the row by which the appliance knows it.
///
/// # Errors
/// As the kernel says.
pub fn change_mtu(netlink: &mut Netlink, config: &HostLinkConfig, mtu: u16) -> io::Result<Row> {
    let index = netlink.index(TAP)?;
    let change = Change {
        mtu: Some(mtu),
        ..Change::default()
    };
    netlink.change(index, &change)?;
    tracing::info!(tap = TAP, mtu, "the host link takes other packets");
    Ok(row(config, mtu))
}

fn row(config: &HostLinkConfig, mtu: u16) -> Row {
    Row::Link(LinkRow {
        id: LinkId::HOST,
        mac: OWN,
        // The configuration was checked against the same limit.
        addresses: config.addresses.iter().copied().collect(),
        mtu,
        identity: Identity::HOST,
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    })
}

/// The host says nothing on the tap by itself, and takes from it what is for its own addresses whoever sent it: clients from
/// outside whose packets the appliance hands on have a way back that is not this link.
fn calm() -> io::Result<()> {
    let six = |key: &str, value| set_sysctl(&format!("ipv6/conf/{TAP}/{key}"), value);
    six("addr_gen_mode", "1")?;
    six("accept_ra", "0")?;
    six("router_solicitations", "0")?;
    six("disable_ipv6", "0")?;
    set_sysctl(&format!("ipv4/conf/{TAP}/rp_filter"), "2")
}
