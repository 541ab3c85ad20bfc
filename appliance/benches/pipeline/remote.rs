//! What it costs to know behind which node an address lies, by how many ranges there are: found one by one, as part of what
//! arrives in a tunnel, and as part of a new connection to a pod of another node.

use super::{BATCH, Packet, Random, Rig, report};
use sluice_appliance::testing::node::{self, NODE_MAC, V4};
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow,
};
use sluice_contract::{Mac, Prefix, Row};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

const PEERS: u32 = 5_000;
const OWN: Mac = Mac([2, 0, 0, 0, 5, 5]);
const VXLAN: u16 = 8472;

fn peer_address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x6440_0000 + n % PEERS)
}

/// Of 25 ranges 24 are single addresses and one is a block of 64.
fn range(n: u32) -> (Ipv4Addr, u8) {
    match n % 25 {
        0 => (Ipv4Addr::from(0x0b00_0000 + n / 25 * 64), 26),
        _ => (Ipv4Addr::from(0x0c00_0000 + n * 7), 32),
    }
}

fn world(ranges: u32) -> impl Iterator<Item = Row> {
    let tunnel = OverlayRow::Tunnel(TunnelRow {
        mac: OWN,
        source4: Some(V4.node.parse().unwrap()),
        ..TunnelRow::default()
    });
    let hop = OverlayRow::NextHop(NextHopRow {
        id: NextHopId(1),
        address: IpAddr::from([192, 0, 2, 77]),
        mac: Some(Mac([2, 0, 0, 0, 7, 7])),
    });
    let peers = (0..PEERS).map(|n| {
        OverlayRow::Peer(PeerRow {
            id: PeerId(u16::try_from(n).unwrap()),
            address: peer_address(n).into(),
            mac: Mac([2, 0, 0, 0, 8, 8]),
            next_hop: NextHopId(1),
            mtu: 1500,
            direct: false,
        })
    });
    let remotes = (0..ranges).map(|n| {
        let (address, length) = range(n);
        OverlayRow::Remote(RemoteRow {
            prefix: Prefix::new(address.into(), length).unwrap(),
            peer: PeerId(u16::try_from(n % PEERS).unwrap()),
        })
    });
    [tunnel, hop]
        .into_iter()
        .chain(peers)
        .chain(remotes)
        .map(Row::Overlay)
}

/// A datagram of the pod at `range(n)` for a pod here, in VXLAN.
fn arriving(n: u32) -> Packet {
    let source = range(n).0.to_string();
    let pod = V4.pods[usize::try_from(n % 3).unwrap()];
    let inner = node::packet(1, &source, pod).macs(Mac([2, 0, 0, 0, 8, 8]), OWN);
    let inner = inner.udp(4000, 53).payload(&[1; 18]).build();
    let header = [8, 0, 0, 0, 0, 0, 1, 0];
    let outer = node::packet(1, &peer_address(n).to_string(), V4.node).macs(OWN, NODE_MAC);
    let outer = outer
        .udp(50_000, VXLAN)
        .payload(&[&header[..], &inner].concat());
    let mut bytes = outer.build();
    // Without a checksum, as VXLAN has it.
    bytes[40..42].fill(0);
    Packet { link: 1, bytes }
}

fn leaving(n: u32) -> Packet {
    let to = range(n).0.to_string();
    let bytes = node::packet(16, V4.pods[0], &to).udp(4000, 53);
    let bytes = bytes.payload(&[1; 18]).build();
    Packet { link: 16, bytes }
}

/// Lookups of which each waits for the one before.
fn one_by_one(rig: &Rig, order: &[u32], name: &str) {
    let overlay = rig.pipeline.tables().overlay();
    let (mut times, mut chain) = (Vec::new(), 0);
    for batch in order.chunks(BATCH) {
        let start = Instant::now();
        for n in batch {
            let (address, _) = range(n ^ chain);
            let peer = overlay.remote(IpAddr::from(address).into()).unwrap();
            // Nothing, but the processor does not know.
            chain = u32::from(peer.0) >> 15;
        }
        times.push(start.elapsed().as_nanos() as f64 / batch.len() as f64);
    }
    report(name, times);
}

pub(super) fn by_ranges(random: &mut Random) {
    for (ranges, name) in [(1_000, "10^3"), (100_000, "10^5"), (500_000, "5*10^5")] {
        let mut rig = Rig::new();
        rig.commit(world(ranges));
        let below = usize::try_from(ranges).unwrap();
        let mut order = |count: usize| -> Vec<u32> {
            (0..count)
                .map(|_| u32::try_from(random.below(below)).unwrap())
                .collect()
        };
        one_by_one(
            &rig,
            &order(1 << 18),
            &format!("range found, one by one, {name} ranges"),
        );
        let few: Vec<u32> = order(64).into_iter().cycle().take(1 << 16).collect();
        one_by_one(
            &rig,
            &few,
            &format!("range found, the same 64, {name} ranges"),
        );
        // One flow to begin with for each of at most 10^5 ranges: the connections' own misses are the same then.
        let chosen = order(100_000);
        let frames: Vec<Packet> = chosen.iter().copied().map(arriving).collect();
        rig.send(&frames);
        let hits = (0..1 << 18).map(|_| &frames[random.below(frames.len())]);
        let hits: Vec<&Packet> = hits.collect();
        report(
            &format!("hit, arriving in a tunnel, {name} ranges"),
            rig.send(hits),
        );
        rig.forget();
        let new: Vec<Packet> = chosen.iter().copied().map(leaving).collect();
        let new = rig.send(&new);
        report(&format!("new or hit, to another node, {name} ranges"), new);
    }
}
