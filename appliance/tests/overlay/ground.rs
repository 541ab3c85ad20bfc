//! Two nodes, and what one wraps and the other unwraps.

use sluice_appliance::decap::{self, Origin};
use sluice_appliance::frame::{Offload, Partial};
use sluice_appliance::mtu::Learned;
use sluice_appliance::parse::{self, Packet, Parsed};
use sluice_appliance::testing::{Bench, Builder};
use sluice_appliance::wire::checksum;
use sluice_appliance::{Address, Arena, Capacity, Family, Frame, encap};
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol, TunnelRow,
};
use sluice_contract::{DropReason, Identity, LinkId, Mac, Prefix, Row};
use std::net::IpAddr;

pub(crate) const PROTOCOLS: [TunnelProtocol; 5] = [
    TunnelProtocol::Vxlan,
    TunnelProtocol::VxlanGbp,
    TunnelProtocol::Geneve,
    TunnelProtocol::GeneveIp,
    TunnelProtocol::IpIp,
];
pub(crate) const HEADROOM: usize = 128;

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix::new(ip(address), length.parse().unwrap()).unwrap()
}

pub(crate) fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

pub(crate) fn tunnel(node: u8, protocol: TunnelProtocol) -> TunnelRow {
    TunnelRow {
        protocol,
        port: 4789,
        vni: 77,
        mac: mac(0x10 + node),
        source4: Some([192, 168, 0, node].into()),
        source6: Some(format!("fd99::{node}").parse().unwrap()),
        ..TunnelRow::default()
    }
}

/// Node `node` of two: pods 10.{node}.0.0/24 and fd0{node}::/64, underlay 192.168.0.{node} or fd99::{node}.
pub(crate) fn rows(node: u8, underlay: Family, tunnel: TunnelRow) -> Vec<Row> {
    let other = 3 - node;
    let address = match underlay {
        Family::V4 => format!("192.168.0.{other}"),
        Family::V6 => format!("fd99::{other}"),
    };
    let remote = |text: String| {
        OverlayRow::Remote(RemoteRow {
            prefix: prefix(&text),
            peer: PeerId(other.into()),
        })
    };
    [
        OverlayRow::Tunnel(tunnel),
        OverlayRow::NextHop(NextHopRow {
            id: NextHopId(4),
            address: ip(&address),
            mac: Some(mac(other)),
        }),
        OverlayRow::Peer(PeerRow {
            id: PeerId(other.into()),
            address: ip(&address),
            mac: mac(0x10 + other),
            next_hop: NextHopId(4),
            mtu: 1500,
            direct: false,
        }),
        remote(format!("10.{other}.0.0/24")),
        remote(format!("fd0{other}::/64")),
    ]
    .map(Row::Overlay)
    .to_vec()
}

pub(crate) fn node(node: u8, underlay: Family, tunnel: TunnelRow) -> Bench {
    let mut bench = Bench::empty(Capacity::default());
    bench.commit(&rows(node, underlay, tunnel));
    bench
}

pub(crate) fn pair(protocol: TunnelProtocol, underlay: Family) -> (Bench, Bench) {
    (
        node(1, underlay, tunnel(1, protocol)),
        node(2, underlay, tunnel(2, protocol)),
    )
}

pub(crate) fn nothing_learned() -> Learned<'static> {
    Learned::new(&mut Arena::new(vec![0; 128].leak()), 0).unwrap()
}

/// A frame in a buffer of its own.
pub(crate) struct Buffer {
    pub(crate) bytes: Vec<u8>,
    pub(crate) length: usize,
    pub(crate) tail: usize,
    pub(crate) link: LinkId,
    pub(crate) offload: Offload,
}

impl Buffer {
    pub(crate) fn new(frame: &[u8], link: u16) -> Self {
        let mut bytes = vec![0xa5; HEADROOM];
        bytes.extend_from_slice(frame);
        Self {
            bytes,
            length: frame.len(),
            tail: 0,
            link: LinkId::new(link).unwrap(),
            offload: Offload::default(),
        }
    }

    pub(crate) fn frame(&mut self) -> Frame<'_> {
        let end = HEADROOM + self.length;
        let (tail, link, offload) = (self.tail, self.link, self.offload);
        Frame::new(&mut self.bytes, HEADROOM, end, tail, link, offload).unwrap()
    }
}

pub(crate) fn packet(frame: &Frame<'_>) -> Packet {
    match parse::parse(frame) {
        Ok(Parsed::Ip(packet)) => packet,
        other => panic!("{other:?}"),
    }
}

/// What the sending node makes of the frame: the outer frame and its offload words.
pub(crate) fn wrapped(
    from: &Bench,
    buffer: &mut Buffer,
    identity: u32,
) -> Result<(Vec<u8>, Offload), DropReason> {
    let overlay = from.pipeline.tables().overlay();
    let mut frame = buffer.frame();
    let parsed = packet(&frame);
    let peer = overlay.remote(parsed.destination).unwrap();
    let exit = overlay.exit(peer, 9000, &nothing_learned()).unwrap();
    encap::send(
        &mut frame,
        &parsed,
        overlay,
        &exit,
        mac(0xee),
        encap::Told {
            identity: Identity(identity),
            target: None,
        },
    )?;
    Ok((frame.bytes().to_vec(), frame.offload))
}

/// What the receiving node makes of an outer frame.
pub(crate) fn unwrapped(
    to: &Bench,
    outer: &[u8],
    offload: Offload,
) -> Result<(Vec<u8>, Offload, Origin), DropReason> {
    let overlay = to.pipeline.tables().overlay();
    let mut buffer = Buffer::new(outer, 1);
    buffer.offload = offload;
    let mut frame = buffer.frame();
    let Parsed::Ip(parsed) = parse::parse(&frame)? else {
        return Err(DropReason::Malformed);
    };
    assert!(decap::is_tunnelled(overlay, &parsed), "{parsed:?}");
    let origin = decap::unwrap(&mut frame, &parsed, overlay, Mac::GATEWAY)?;
    Ok((frame.bytes().to_vec(), frame.offload, origin))
}

pub(crate) fn inner(family: Family) -> Builder {
    match family {
        Family::V4 => Builder::from(16, "10.1.0.5", "10.2.0.9"),
        Family::V6 => Builder::from(16, "fd01::5", "fd02::9"),
    }
}

/// The UDP checksum over IPv6 of an outer frame, as the receiver sums it up: 0 is right.
pub(crate) fn outer_checksum6(outer: &[u8]) -> u16 {
    let datagram = &outer[54..];
    let address = |at: usize| Address(outer[at..at + 16].try_into().unwrap());
    let pseudo = checksum::pseudo(address(22), address(38), 17, datagram.len());
    checksum::finish(checksum::sum(datagram, pseudo))
}

/// Completes a checksum as a device does.
pub(crate) fn complete(frame: &mut [u8], partial: Partial) {
    let at = usize::from(partial.start + partial.offset);
    let sum = checksum::finish(checksum::sum(&frame[usize::from(partial.start)..], 0));
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}
