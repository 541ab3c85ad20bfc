//! Taking over an interface that another CNI plugin made: its host end is glued to the tap, its addresses become our kind.
//!
//! The pair itself stays the other plugin's: it is not removed with the link, only set free.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use super::netlink::{Change, Netlink};
use super::{LinkSpec, WiringError, quiet};

impl LinkSpec {
    /// Glues the host's end of a pair that is there already to the tap.
    pub(super) fn take_over(&self, host: &mut Netlink, tap: u32) -> Result<u32, WiringError> {
        let name = self.veth_name();
        let veth = host
            .index(&name)
            .map_err(self.failed("find the interface to take over"))?;
        host.leave_bridge(veth)
            .map_err(self.failed("take the interface off its bridge"))?;
        host.flush_addresses(veth)
            .map_err(self.failed("take the interface's addresses"))?;
        quiet(&name).map_err(self.failed("keep the host's IPv6 off the interface"))?;
        host.redirect(veth, tap)
            .map_err(self.failed("redirect the interface to the tap"))?;
        host.redirect(tap, veth)
            .map_err(self.failed("redirect the tap to the interface"))?;
        Ok(veth)
    }

    /// The pod's end as we make them: our MTU, no addresses but those that follow.
    pub(super) fn take_over_in_pod(&self, pod: &mut Netlink) -> Result<(), WiringError> {
        let step = "take over the pod's interface";
        let mut change = || -> io::Result<()> {
            let index = pod.index(&self.interface)?;
            pod.change(
                index,
                &Change {
                    mtu: Some(self.mtu),
                    ..Change::default()
                },
            )?;
            pod.flush_addresses(index)
        };
        change().map_err(self.failed(step))
    }

    /// Leaves the host's end of a taken-over pair to the plugin that made it.
    pub(super) fn set_free(&self, host: &mut Netlink) -> io::Result<()> {
        match host.interface(&self.veth_name())? {
            Some(veth) => host.remove_redirect(veth.index),
            None => Ok(()),
        }
    }
}

impl Netlink {
    fn leave_bridge(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.push(LinkAttribute::Controller(0));
        self.order(RouteNetlinkMessage::SetLink(link), 0)
    }
}
