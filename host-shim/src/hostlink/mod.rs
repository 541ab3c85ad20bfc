//! The host link: a tap `sluice0` by which the node itself reaches pods and Services, here and on other nodes, without
//! address translation on the host.
//!
//! The host routes the cluster's ranges to the tap, with the node's own address as source. It needs to ask nobody for a MAC: the
//! appliance's is known beforehand. Tap, routes and neighbors end with the daemon.

pub mod config;

use std::fs::File;
use std::io;
use std::net::IpAddr;

use sluice_contract::row::{LinkRow, NodeRow};
use sluice_contract::{Identity, LinkId, Mac, Row};

use self::config::HostLinkConfig;
use crate::wiring::netlink::{Change, GatewayRoute, Netlink};
use crate::wiring::netns::set_sysctl;
use crate::wiring::tap;

/// The tap.
pub const TAP: &str = "sluice0";
/// Its MAC: the host's own on that link.
const OWN: Mac = Mac([0x02, 0x53, 0x4c, 0, 0, 0x02]);

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

/// Makes the tap and the routes: the tap for the trunk's link 2, and the row by which the appliance knows it.
///
/// # Errors
/// The step that failed; what was made before goes with the tap.
pub fn make(config: &HostLinkConfig, mtu: u16) -> Result<(File, Row), HostLinkError> {
    let mut netlink = Netlink::open().map_err(failed("open netlink"))?;
    let tap = tap::attach(TAP).map_err(failed("make the tap"))?;
    let index = netlink.index(TAP).map_err(failed("find the tap"))?;
    calm().map_err(failed("set the tap's sysctls"))?;
    let change = Change {
        up: true,
        mtu: Some(mtu),
        mac: Some(OWN),
        ..Change::default()
    };
    netlink
        .change(index, &change)
        .map_err(failed("set up the tap"))?;
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
    for range in config.ranges() {
        let v4 = range.address().is_ipv4();
        let of_family = |address: &&IpAddr| address.is_ipv4() == v4;
        let (Some(gateway), Some(source)) = (
            gateways.iter().find(of_family),
            config.addresses.iter().find(of_family),
        ) else {
            // Checked with the configuration.
            continue;
        };
        let route = GatewayRoute {
            to: (range.address(), range.length()),
            gateway: *gateway,
            source: *source,
        };
        netlink
            .add_gateway_route(index, &route)
            .map_err(failed(format!("route {range} to the tap")))?;
    }
    tracing::info!(tap = TAP, ranges = config.routes.len(), "host link in use");
    Ok((tap, row(config, mtu)))
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
