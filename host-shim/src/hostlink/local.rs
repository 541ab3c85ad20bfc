//! Host ports, used by the node's own programs at the node's own addresses.
//!
//! The kernel keeps what is for its own addresses to itself: the rule of the table `local` comes first of all. Host ports are
//! the appliance's, so a rule before that one sends exactly these, and only what is made on this node, to the tap. The kernel
//! puts nothing before its first rule: that one is made anew behind ours, and goes back to its place with the last host port.
//! At no moment is there none.
//!
//! 127.0.0.1 is not served: an answer from it could only come in on the tap if the kernel took the whole of 127.0.0.0/8 from
//! there, and with it whatever the appliance cares to send to the host's most private programs.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::TAP;
use crate::wiring::netlink::{Netlink, family, host_prefix};
use crate::wiring::netns::set_sysctl;

/// The table that leads to the tap, and the places of our rules and of the one that is moved behind them. By these they are
/// known again in a later life. No rule of somebody else may come before the table `local`, so both are near the top.
pub(super) const TABLE: u32 = 0x534c;
const OURS: u32 = 6;
const LOCAL: u32 = 7;
/// Where the kernel has it.
const FIRST: u32 = 0;

/// A port of one of the node's addresses, by the protocol's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LocalPort {
    pub(crate) address: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
}

/// The rules that are there.
#[derive(Debug)]
pub(crate) struct LocalPorts {
    addresses: Vec<IpAddr>,
    present: BTreeSet<LocalPort>,
}

impl LocalPorts {
    /// Those of an earlier life, which stay in use until others are wanted; of an earlier version, which are not understood, none.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn adopt(addresses: &[IpAddr], netlink: &mut Netlink) -> io::Result<Self> {
        let mut ports = Self {
            addresses: addresses.to_vec(),
            present: BTreeSet::new(),
        };
        for family in ports.families() {
            for rule in rules_at(netlink, family, OURS)? {
                match port_of(&rule) {
                    Some(port) => drop(ports.present.insert(port)),
                    None => netlink.delete_rule(rule)?,
                }
            }
        }
        match ports.present.is_empty() {
            true => ports.give_back(netlink)?,
            // The tap may be another, and a life that was killed may not have come so far.
            false => ports.make_room(netlink)?,
        }
        Ok(ports)
    }

    /// The addresses at which they are served.
    pub(crate) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Makes the rules those of `wanted`.
    ///
    /// # Errors
    /// As the kernel says; what was done stays done.
    pub(crate) fn set(&mut self, wanted: &BTreeSet<LocalPort>) -> io::Result<()> {
        if *wanted == self.present {
            return Ok(());
        }
        let mut netlink = Netlink::open()?;
        if self.present.is_empty() {
            self.make_room(&mut netlink)?;
        }
        for port in wanted {
            if !self.present.contains(port) {
                add(&mut netlink, port_rule(port))?;
                self.present.insert(*port);
            }
        }
        for port in self.present.clone().difference(wanted) {
            netlink.delete_rule(port_rule(port))?;
            self.present.remove(port);
        }
        if wanted.is_empty() {
            self.give_back(&mut netlink)?;
        }
        Ok(())
    }

    fn families(&self) -> Vec<AddressFamily> {
        let all = [AddressFamily::Inet, AddressFamily::Inet6];
        let has = |which: &AddressFamily| self.addresses.iter().any(|a| family(*a) == *which);
        all.into_iter().filter(has).collect()
    }

    /// The rule of the table `local` goes behind ours. Where somebody else has moved it further, it stays there.
    fn make_room(&self, netlink: &mut Netlink) -> io::Result<()> {
        // What comes back from the tap has the node's own address as its source.
        accept_own_address(true)?;
        for family in self.families() {
            if !rules_at(netlink, family, FIRST)?.is_empty() {
                add(netlink, local_rule(family, LOCAL))?;
                netlink.delete_rule(local_rule(family, FIRST))?;
            }
        }
        Ok(())
    }

    fn give_back(&self, netlink: &mut Netlink) -> io::Result<()> {
        for family in self.families() {
            for moved in rules_at(netlink, family, LOCAL)? {
                add(netlink, local_rule(family, FIRST))?;
                netlink.delete_rule(moved)?;
            }
        }
        accept_own_address(false)
    }
}

fn accept_own_address(accept: bool) -> io::Result<()> {
    let value = if accept { "1" } else { "0" };
    set_sysctl(&format!("ipv4/conf/{TAP}/accept_local"), value)
}

/// Adds a rule; one that is there is as good.
fn add(netlink: &mut Netlink, rule: RuleMessage) -> io::Result<()> {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    match netlink.order(RouteNetlinkMessage::NewRule(rule), flags) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

fn rule(family: AddressFamily, priority: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    // Network managers take away at their start whatever rules are not theirs or the kernel's.
    rule.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Protocol(RouteProtocol::Kernel),
    ];
    rule
}

fn local_rule(family: AddressFamily, priority: u32) -> RuleMessage {
    let mut rule = rule(family, priority);
    rule.header.table = libc::RT_TABLE_LOCAL;
    rule
}

fn port_rule(port: &LocalPort) -> RuleMessage {
    let mut rule = rule(family(port.address), OURS);
    rule.header.dst_len = host_prefix(port.address);
    let number = port.port;
    let range = RulePortRange {
        start: number,
        end: number,
    };
    rule.attributes.extend([
        RuleAttribute::Table(TABLE),
        RuleAttribute::Destination(port.address),
        // As rules have it: what is made on this node.
        RuleAttribute::Iifname("lo".into()),
        RuleAttribute::IpProtocol(i32::from(port.protocol).into()),
        RuleAttribute::DestinationPortRange(range),
    ]);
    rule
}

/// The port of a rule, if it is one that [`port_rule`] makes.
fn port_of(rule: &RuleMessage) -> Option<LocalPort> {
    let mut port = LocalPort {
        address: IpAddr::from([0; 4]),
        protocol: 0,
        port: 0,
    };
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Destination(address) => port.address = *address,
            RuleAttribute::IpProtocol(protocol) => {
                port.protocol = u8::try_from(i32::from(*protocol)).ok()?;
            }
            RuleAttribute::DestinationPortRange(range) => port.port = range.start,
            _ => {}
        }
    }
    let made = port_rule(&port);
    // The kernel tells more of a rule than it was given.
    let is_whole = made
        .attributes
        .iter()
        .all(|it| rule.attributes.contains(it));
    (is_whole && made.header.dst_len == rule.header.dst_len).then_some(port)
}

/// The rules at that place. The kernel does not say the priority 0.
fn rules_at(
    netlink: &mut Netlink,
    family: AddressFamily,
    place: u32,
) -> io::Result<Vec<RuleMessage>> {
    let mut ask = RuleMessage::default();
    ask.header.family = family;
    let mut found = Vec::new();
    netlink.request(RouteNetlinkMessage::GetRule(ask), NLM_F_DUMP, |answer| {
        let RouteNetlinkMessage::NewRule(rule) = answer else {
            return;
        };
        let priority = rule
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RuleAttribute::Priority(priority) => Some(*priority),
                _ => None,
            });
        if priority.unwrap_or(FIRST) == place {
            found.push(rule);
        }
    })?;
    Ok(found)
}
