//! Packets of another node in this node's tunnel, mostly right.

extern crate std;

use super::fixture::{TUNNEL_MAC, Tunnel, from_wire};
use super::input::Input;
use crate::Family;
use crate::overlay::Target;
use crate::testing::node;
use crate::testing::{Builder, address};
use crate::wire::{checksum, geneve, vxlan};
use sluice_contract::overlay::{GENEVE_CLASS, GENEVE_IDENTITY, TunnelProtocol, TunnelRow};
use std::vec::Vec;
use zerocopy::IntoBytes;

/// In the first byte: what is not as the other node would send it.
const OTHER_NETWORK: u8 = 1;
const OTHER_SENDER: u8 = 2;
const NO_CHECKSUM: u8 = 4;
const RAW_OPTIONS: u8 = 8;
const PADDED: u8 = 16;
const ANY_FLAGS: u8 = 32;
/// A backend is named: the packet is of a Service with direct return.
const NAMES_BACKEND: u8 = 64;
const MARKED: u8 = 128;

/// The inner packet in the tunnel, from the other node; without a tunnel, as it is.
pub(super) fn wrap(tunnel: Tunnel, mut inner: Builder, input: &mut Input<'_>) -> Vec<u8> {
    let Some((protocol, family)) = tunnel else {
        return inner.build();
    };
    let odd = input.byte();
    inner.destination_mac = TUNNEL_MAC;
    let inner_family = inner.source.family();
    let frame = inner.build();
    let at = match family {
        Family::V4 => node::V4,
        Family::V6 => node::V6,
    };
    let sender = if odd & OTHER_SENDER == 0 {
        at.other_node
    } else {
        input.pick(&[at.outside, at.node, at.pods[0], at.remote])
    };
    let outer = from_wire(sender, at.node);
    let row = TunnelRow::default();
    let vni = match odd & OTHER_NETWORK {
        0 => row.vni,
        _ => input.word(),
    };
    let outer = match protocol {
        TunnelProtocol::IpIp => {
            let number = match inner_family {
                Family::V4 => 4,
                Family::V6 => 41,
            };
            outer.raw(number).payload(&frame[14..])
        }
        TunnelProtocol::Vxlan | TunnelProtocol::VxlanGbp => {
            let group = (odd & ANY_FLAGS != 0).then(|| input.short());
            let header = vxlan::Header::new(vni, group);
            udp(outer, row.port, header.as_bytes(), &frame)
        }
        TunnelProtocol::Geneve | TunnelProtocol::GeneveIp => {
            let options = options(odd, input);
            let ethernet = (protocol == TunnelProtocol::Geneve) ^ (odd & ANY_FLAGS != 0);
            let (kind, carried) = match (ethernet, inner_family) {
                (true, _) => (geneve::ETHERNET, &frame[..]),
                (false, Family::V4) => (0x0800, &frame[14..]),
                (false, Family::V6) => (0x86dd, &frame[14..]),
            };
            let critical = odd & NAMES_BACKEND != 0;
            let header = geneve::Header::new(vni, kind, options.len(), critical);
            let header = [header.as_bytes(), &options].concat();
            udp(outer, row.port, &header, carried)
        }
    };
    let mut frame = outer.build();
    if odd & MARKED != 0 {
        mark(&mut frame, family, input.byte());
    }
    if odd & NO_CHECKSUM != 0 {
        let udp = if family == Family::V4 { 34 } else { 54 };
        frame[udp + 6..udp + 8].fill(0);
    }
    if odd & PADDED != 0 {
        frame.extend_from_slice(input.take(32));
    }
    frame
}

/// Sets bits of the outer traffic class, as routers do.
fn mark(frame: &mut [u8], family: Family, class: u8) {
    frame[15] |= class;
    if family == Family::V4 {
        frame[24..26].fill(0);
        let sum = checksum::finish(checksum::sum(&frame[14..34], 0));
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
}

fn udp(outer: Builder, port: u16, header: &[u8], carried: &[u8]) -> Builder {
    outer.udp(50_000, port).payload(&[header, carried].concat())
}

/// Geneve options: the identity, a backend if there is to be one, any bytes.
fn options(odd: u8, input: &mut Input<'_>) -> Vec<u8> {
    let mut options = Vec::new();
    if odd & RAW_OPTIONS != 0 {
        let words = usize::from(input.byte() % 32);
        options.extend_from_slice(input.take(words * 4));
    } else {
        let identity = u32::from(input.short());
        let option = geneve::WordOption::new(GENEVE_CLASS, GENEVE_IDENTITY, identity);
        options.extend_from_slice(option.as_bytes());
    }
    if odd & NAMES_BACKEND != 0 {
        let pods = [
            node::V4.pods[0],
            node::V6.pods[0],
            node::V4.pods[1],
            node::V4.remote,
        ];
        let target = Target {
            address: address(input.pick(&pods)),
            port: input.pick(&[53, 80, 0, 8080]),
        };
        options.extend_from_slice(&target.to_option());
    }
    options.resize(options.len().next_multiple_of(4), 0);
    options
}
