//! Wiring of one link: from the pod's `eth0` to a tap whose descriptor the daemon holds.
//!
//! Two ways. `veth`: the pod has one end of a veth pair, the other end and a tap are glued together by a tc redirect in both
//! directions. `tap`: the tap itself is the pod's `eth0`, one hop less. In both the pod has its addresses alone (/32, /128),
//! and a default route to a link-local gateway that the appliance answers for.
//!
//! A link is there as a whole or not at all: a failure at any step removes what the steps before it made.

mod adopt;
mod inspect;
pub mod netlink;
pub mod netns;
mod removal;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sluice_contract::row::NodeRow;
use sluice_contract::{LinkId, Mac};
use sluice_ports::tap;

use self::netlink::{Change, Netlink};
use self::netns::{Netns, NetnsId, is_out_of_means, set_sysctl};

/// How the pod's `eth0` reaches the tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A veth pair, its host end redirected to the tap.
    #[default]
    Veth,
    /// The tap itself.
    Tap,
}

/// What a link is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSpec {
    pub id: LinkId,
    /// Path of the pod's network namespace.
    pub netns: PathBuf,
    /// Which one that is; `None`: whichever is there.
    pub netns_id: Option<NetnsId>,
    /// Name of the interface in the pod.
    pub interface: String,
    pub addresses: Vec<IpAddr>,
    pub mac: Mac,
    pub mtu: u16,
    pub mode: Mode,
    /// The host's end of a pair that another plugin made, taken over instead of making one.
    pub adopt: Option<String>,
}

/// A step of wiring that failed.
#[derive(Debug, thiserror::Error)]
#[error("Link {link}: cannot {step}")]
pub struct WiringError {
    pub link: LinkId,
    pub step: &'static str,
    pub source: io::Error,
}

impl LinkSpec {
    /// The tap in the daemon's namespace.
    pub fn tap_name(&self) -> String {
        format!("slt{}", self.id)
    }

    /// The host's end of the veth pair.
    pub fn veth_name(&self) -> String {
        self.adopt
            .clone()
            .unwrap_or_else(|| format!("slv{}", self.id))
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(io::Error) -> WiringError {
        let link = self.id;
        move |source| WiringError { link, step, source }
    }

    /// Makes the link and returns its tap.
    ///
    /// # Errors
    /// The step that failed. Nothing is left then, and nothing that was there before is touched.
    pub fn create(&self) -> Result<File, WiringError> {
        let netns = self.open_netns()?;
        let mut host = Netlink::open().map_err(self.failed("open netlink"))?;
        let mut pod = netns
            .run(Netlink::open)
            .map_err(self.failed("enter the namespace"))?;
        self.refuse_taken(&mut host, &mut pod)?;
        let made = self.make(&netns, &mut host, &mut pod);
        if made.is_err()
            && let Err(error) = self.remove_from(&mut host, Some(&mut pod))
        {
            tracing::error!(link = %self.id, %error, "half a link is left behind");
        }
        made
    }

    /// Attaches to the tap that an earlier life of the daemon left. `found`: its descriptor, if a process has it still, which is
    /// taken as it is.
    ///
    /// # Errors
    /// `NotFound` as the cause when the link is no longer whole; [`remove`](Self::remove) it then.
    pub fn attach(&self, found: Option<File>) -> Result<File, WiringError> {
        let netns = self.open_netns()?;
        let step = "attach to the tap";
        let there = |netlink: &mut Netlink, name: &str, kind: &str| {
            let found = netlink.interface(name)?.is_some_and(|i| i.kind == kind);
            if found {
                Ok(())
            } else {
                Err(io::Error::from(io::ErrorKind::NotFound))
            }
        };
        let mut pod = netns
            .run(Netlink::open)
            .map_err(self.failed("enter the namespace"))?;
        match self.mode {
            Mode::Tap => netns.run(|| {
                there(&mut pod, &self.interface, "tun")?;
                found.map_or_else(|| tap::attach(&self.interface), Ok)
            }),
            Mode::Veth => Netlink::open().and_then(|mut host| {
                there(&mut pod, &self.interface, "veth")?;
                there(&mut host, &self.veth_name(), "veth")?;
                there(&mut host, &self.tap_name(), "tun")?;
                found.map_or_else(|| tap::attach(&self.tap_name()), Ok)
            }),
        }
        .map_err(self.failed(step))
    }

    /// Removes whatever there is of the link. A namespace that is gone took its end with it.
    ///
    /// # Errors
    /// The step that failed: something of the link may be left, to be removed by another call.
    pub fn remove(&self) -> Result<(), WiringError> {
        let mut host = Netlink::open().map_err(self.failed("open netlink"))?;
        let pod = || self.find_netns()?.run(Netlink::open);
        let mut pod = match (self.mode, pod()) {
            (Mode::Tap, Err(error)) if is_out_of_means(&error) => {
                return Err(self.failed("look for the pod's end")(error));
            }
            (_, pod) => pod.ok(),
        };
        self.remove_from(&mut host, pod.as_mut())
    }

    fn open_netns(&self) -> Result<Netns, WiringError> {
        self.find_netns().map_err(self.failed("open the namespace"))
    }

    fn find_netns(&self) -> io::Result<Netns> {
        let found = Netns::open(&self.netns)?;
        if let Some(wanted) = self.netns_id
            && found.identity()? != wanted
        {
            let reason = "the path leads to another namespace than the pod's, which is gone";
            return Err(io::Error::new(io::ErrorKind::NotFound, reason));
        }
        Ok(found)
    }

    fn refuse_taken(&self, host: &mut Netlink, pod: &mut Netlink) -> Result<(), WiringError> {
        let step = "use an interface name that is taken";
        let free = |netlink: &mut Netlink, name: &str| match netlink.interface(name) {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(self.failed(step)(io::ErrorKind::AlreadyExists.into())),
            Err(error) => Err(self.failed("look for interfaces")(error)),
        };
        free(host, &self.tap_name())?;
        if self.adopt.is_some() {
            return Ok(());
        }
        free(pod, &self.interface)?;
        free(host, &self.veth_name())
    }

    fn make(
        &self,
        netns: &Netns,
        host: &mut Netlink,
        pod: &mut Netlink,
    ) -> Result<File, WiringError> {
        let name = self.tap_name();
        let tap = tap::attach(&name).map_err(self.failed("create the tap"))?;
        let index = host.index(&name).map_err(self.failed("find the tap"))?;
        match self.mode {
            Mode::Tap => {
                let change = Change {
                    name: Some(&self.interface),
                    mac: Some(self.mac),
                    mtu: Some(self.mtu),
                    netns: Some(netns),
                    ..Change::default()
                };
                host.change(index, &change)
                    .map_err(self.failed("move the tap into the pod"))?;
            }
            Mode::Veth => {
                let set_up = Change {
                    mtu: Some(self.mtu),
                    up: true,
                    ..Change::default()
                };
                quiet(&name).map_err(self.failed("keep the host's IPv6 off the tap"))?;
                let veth = self.make_veth(netns, host, index)?;
                // After the redirects: on an interface that is up each of them waits for all processors.
                host.change(index, &set_up)
                    .map_err(self.failed("set up the tap"))?;
                let up = Change {
                    up: true,
                    ..Change::default()
                };
                host.change(veth, &up)
                    .map_err(self.failed("set up the veth"))?;
            }
        }
        self.set_up_pod(netns, pod)?;
        // Asking for an interface makes the kernel finish a pending carrier change (rtnl_getlink, "synchronize the
        // carrier state"): before that the queue discipline of a veth end swallows its frames.
        let settled = pod
            .interface(&self.interface)
            .and_then(|_| host.interface(&self.veth_name()));
        settled.map_err(self.failed("wait for the carrier"))?;
        // Last: until here closing the descriptor removes the tap, whatever happens to the daemon.
        tap::set_persistent(&tap, true).map_err(self.failed("make the tap persistent"))?;
        Ok(tap)
    }

    fn make_veth(&self, netns: &Netns, host: &mut Netlink, tap: u32) -> Result<u32, WiringError> {
        match self.adopt {
            Some(_) => self.take_over(host, tap),
            None => self.make_pair(netns, host, tap),
        }
    }

    fn make_pair(&self, netns: &Netns, host: &mut Netlink, tap: u32) -> Result<u32, WiringError> {
        let name = self.veth_name();
        let peer = (self.interface.as_str(), netns, self.mac);
        host.add_veth(&name, self.mtu, peer)
            .map_err(self.failed("create the veth pair"))?;
        let veth = host.index(&name).map_err(self.failed("find the veth"))?;
        quiet(&name).map_err(self.failed("keep the host's IPv6 off the veth"))?;
        host.redirect(veth, tap)
            .map_err(self.failed("redirect the veth to the tap"))?;
        host.redirect(tap, veth)
            .map_err(self.failed("redirect the tap to the veth"))?;
        Ok(veth)
    }

    fn set_up_pod(&self, netns: &Netns, pod: &mut Netlink) -> Result<(), WiringError> {
        let name = self.interface.as_str();
        let has = |v6: bool| self.addresses.iter().any(|a| a.is_ipv6() == v6);
        let sysctls = || -> io::Result<()> {
            let conf = |key: &str| format!("ipv6/conf/{name}/{key}");
            // Addresses are given, not guessed, and nobody else can have them.
            set_sysctl(&conf("accept_ra"), "0")?;
            set_sysctl(&conf("accept_dad"), "0")?;
            set_sysctl(&conf("dad_transmits"), "0")?;
            set_sysctl(&conf("router_solicitations"), "0")?;
            set_sysctl(&conf("disable_ipv6"), if has(true) { "0" } else { "1" })
        };
        netns
            .run(sysctls)
            .map_err(self.failed("set the pod's sysctls"))?;
        if self.adopt.is_some() {
            self.take_over_in_pod(pod)?;
        }
        let up = Change {
            up: true,
            ..Change::default()
        };
        let loopback = pod.index("lo").and_then(|lo| pod.change(lo, &up));
        loopback.map_err(self.failed("set up the pod's loopback"))?;
        let index = pod
            .index(name)
            .map_err(self.failed("find the pod's interface"))?;
        pod.change(index, &up)
            .map_err(self.failed("set up the pod's interface"))?;
        for address in &self.addresses {
            pod.add_address(index, *address)
                .map_err(self.failed("give the pod its address"))?;
        }
        let node = NodeRow::default();
        let gateways = [
            (has(false), node.gateway4.into()),
            (has(true), node.gateway6.into()),
        ];
        for (_, gateway) in gateways.into_iter().filter(|(wanted, _)| *wanted) {
            let routes = pod
                .add_link_route(index, gateway)
                .and_then(|()| pod.add_default_route(index, gateway));
            routes.map_err(self.failed("give the pod its routes"))?;
        }
        Ok(())
    }

    fn remove_from(
        &self,
        host: &mut Netlink,
        pod: Option<&mut Netlink>,
    ) -> Result<(), WiringError> {
        let mut first_error = None;
        let mut remove = |netlink: &mut Netlink, name: &str, kind: &str| {
            let removed = match netlink.interface(name) {
                Ok(Some(found)) if found.kind == kind => netlink.delete(found.index),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = removed {
                first_error.get_or_insert(self.failed("remove an interface")(error));
            }
        };
        if self.adopt.is_none() {
            remove(host, &self.veth_name(), "veth");
        }
        remove(host, &self.tap_name(), "tun");
        if let (Mode::Tap, Some(pod)) = (self.mode, pod) {
            remove(pod, &self.interface, "tun");
        }
        if self.adopt.is_some()
            && let Err(error) = self.set_free(host)
        {
            first_error.get_or_insert(self.failed("set an interface free")(error));
        }
        first_error.map_or(Ok(()), Err)
    }
}

/// An interface of the host's end carries the pod's frames and none of the host's own.
pub(crate) fn quiet(name: &str) -> io::Result<()> {
    set_sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1")
}
