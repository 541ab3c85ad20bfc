//! Whether a link is as it was made: what is there is compared with what was asked for, and what is missing is named.

use std::io;

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use sluice_contract::row::NodeRow;
use std::net::IpAddr;

use super::netlink::Netlink;
use super::netns::Netns;
use super::{LinkSpec, Mode, WiringError};

impl LinkSpec {
    /// Names whatever of the link is not there.
    ///
    /// # Errors
    /// When that cannot be found out. A namespace that is gone is missing, not an error.
    pub fn missing(&self) -> Result<Vec<String>, WiringError> {
        let mut missing = Vec::new();
        let pod = Netns::open(&self.netns).and_then(|netns| netns.run(Netlink::open));
        match pod {
            Err(_) => missing.push(format!("the namespace {}", self.netns.display())),
            Ok(mut pod) => self
                .missing_in_pod(&mut pod, &mut missing)
                .map_err(self.failed("look at the pod's interface"))?,
        }
        if self.mode == Mode::Veth {
            let step = "look at the host's interfaces";
            Netlink::open()
                .and_then(|mut host| self.missing_on_host(&mut host, &mut missing))
                .map_err(self.failed(step))?;
        }
        Ok(missing)
    }

    fn missing_in_pod(&self, pod: &mut Netlink, missing: &mut Vec<String>) -> io::Result<()> {
        let name = &self.interface;
        let Some(interface) = pod.interface(name)? else {
            missing.push(format!("the pod's interface {name}"));
            return Ok(());
        };
        if !interface.up {
            missing.push(format!("the state UP of the pod's interface {name}"));
        }
        let there = pod.addresses(interface.index)?;
        for address in self.addresses.iter().filter(|a| !there.contains(a)) {
            missing.push(format!("the pod's address {address}"));
        }
        let node = NodeRow::default();
        for gateway in [IpAddr::from(node.gateway4), node.gateway6.into()] {
            let wanted = self
                .addresses
                .iter()
                .any(|a| a.is_ipv4() == gateway.is_ipv4());
            if wanted && !pod.has_default_route(interface.index, gateway)? {
                missing.push(format!("the pod's default route via {gateway}"));
            }
        }
        Ok(())
    }

    fn missing_on_host(&self, host: &mut Netlink, missing: &mut Vec<String>) -> io::Result<()> {
        for name in [self.veth_name(), self.tap_name()] {
            match host.interface(&name)? {
                None => missing.push(format!("the host's interface {name}")),
                Some(interface) if !interface.up => {
                    missing.push(format!("the state UP of the host's interface {name}"));
                }
                Some(interface) => {
                    if !host.has_ingress_filter(interface.index)? {
                        missing.push(format!("the redirect of {name}"));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Netlink {
    /// The addresses of an interface.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn addresses(&mut self, index: u32) -> io::Result<Vec<IpAddr>> {
        let mut found = Vec::new();
        let ask = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.request(ask, NLM_F_DUMP, |answer| {
            let RouteNetlinkMessage::NewAddress(message) = answer else {
                return;
            };
            if message.header.index == index {
                found.extend(
                    message
                        .attributes
                        .iter()
                        .find_map(|attribute| match attribute {
                            AddressAttribute::Address(address) => Some(*address),
                            _ => None,
                        }),
                );
            }
        })?;
        Ok(found)
    }

    /// Whether an interface has the default route via `gateway`.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn has_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<bool> {
        let mut ask = RouteMessage::default();
        ask.header.address_family = match gateway {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let via = match gateway {
            IpAddr::V4(gateway) => RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
            IpAddr::V6(gateway) => RouteAttribute::Gateway(RouteAddress::Inet6(gateway)),
        };
        let mut found = false;
        self.request(RouteNetlinkMessage::GetRoute(ask), NLM_F_DUMP, |answer| {
            let RouteNetlinkMessage::NewRoute(route) = answer else {
                return;
            };
            found |= route.header.destination_prefix_length == 0
                && route.attributes.contains(&via)
                && route.attributes.contains(&RouteAttribute::Oif(index));
        })?;
        Ok(found)
    }

    /// Whether frames that come in on an interface meet a filter.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn has_ingress_filter(&mut self, index: u32) -> io::Result<bool> {
        let mut ask = TcMessage::with_index(index.cast_signed());
        ask.header.parent = TcHandle {
            major: 0xffff,
            minor: TcHandle::MIN_INGRESS,
        };
        let mut found = false;
        let get = RouteNetlinkMessage::GetTrafficFilter(ask);
        let outcome = self.request(get, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) = answer {
                found |= filter
                    .attributes
                    .iter()
                    .any(|a| matches!(a, TcAttribute::Kind(_)));
            }
        });
        match outcome {
            // No queue discipline, or no interface any more, so no filter.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => {
                Ok(false)
            }
            outcome => outcome.map(|()| found),
        }
    }
}
