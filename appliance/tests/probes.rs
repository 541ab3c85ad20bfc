//! The node's probes of other nodes: they travel as pods' packets do, but at whatever size the node wants to know about.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::Capacity;
use sluice_appliance::testing::{Bench, Builder};
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow,
};
use sluice_contract::row::LinkRow;
use sluice_contract::{DropReason, Identity, LinkId, Mac, Prefix, Row};
use std::net::IpAddr;

const UPLINK: u16 = 1;
const PROBES: u16 = 3;
const POD: u16 = 16;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

fn own(link: u16) -> Mac {
    if link == UPLINK {
        mac(1)
    } else {
        Mac::of_pod(LinkId::new(link).unwrap())
    }
}

fn link(id: u16, addresses: &[&str]) -> Row {
    Row::Link(LinkRow {
        id: LinkId::new(id).unwrap(),
        mac: own(id),
        addresses: addresses.iter().map(|it| ip(it)).collect(),
        mtu: 1500,
        identity: if id == POD {
            Identity(300)
        } else {
            Identity::HOST
        },
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    })
}

/// A node with a pod and probes, whose way to the other node takes only packets of 1400 in the tunnel.
fn node(direct: bool) -> Bench {
    let mut bench = Bench::empty(Capacity::default());
    let remote = |text: &str, length| {
        Row::Overlay(OverlayRow::Remote(RemoteRow {
            prefix: Prefix::new(ip(text), length).unwrap(),
            peer: PeerId(7),
        }))
    };
    bench.commit(&[
        link(UPLINK, &[]),
        link(PROBES, &["10.1.0.0", "fd01::"]),
        link(POD, &["10.1.0.5", "fd01::5"]),
        Row::Overlay(OverlayRow::Tunnel(TunnelRow {
            mac: mac(0x11),
            source4: Some([192, 168, 0, 1].into()),
            ..TunnelRow::default()
        })),
        Row::Overlay(OverlayRow::NextHop(NextHopRow {
            id: NextHopId(0),
            address: ip("192.168.0.2"),
            mac: Some(mac(2)),
        })),
        Row::Overlay(OverlayRow::Peer(PeerRow {
            id: PeerId(7),
            address: ip("192.168.0.2"),
            mac: mac(0x12),
            next_hop: NextHopId(0),
            mtu: if direct { 1350 } else { 1400 },
            direct,
        })),
        remote("10.2.0.0", 24),
        remote("fd02::", 64),
    ]);
    bench
}

/// An echo of that size.
fn echo(from: (u16, &str), to: &str, size: usize) -> Vec<u8> {
    let headers = if to.contains(':') { 48 } else { 28 };
    let (link, source) = from;
    let frame = Builder::from(link, source, to).macs(own(link), Mac::GATEWAY);
    frame.echo(9, 1).payload(&vec![7; size - headers]).build()
}

#[test]
fn m03_a_probe_goes_at_sizes_at_which_pods_are_told_to_send_less() {
    for direct in [false, true] {
        let mut bench = node(direct);
        for (pod, probe, to) in [
            ("10.1.0.5", "10.1.0.0", "10.2.0.0"),
            ("fd01::5", "fd01::", "fd02::"),
        ] {
            let sent = bench.send(POD, &echo((POD, pod), to, 1350));
            sent.forwarded(UPLINK);
            // Told, in a packet of its own.
            bench.send(POD, &echo((POD, pod), to, 1351)).replied();
            for size in [128, 1350, 1351, 1450] {
                let sent = bench.send(PROBES, &echo((PROBES, probe), to, size));
                let outer = sent.forwarded(UPLINK).len();
                assert_eq!(outer, 14 + size + if direct { 0 } else { 50 });
            }
        }
    }
}

#[test]
fn o22_the_probes_link_claims_no_address_but_its_own_and_nobody_takes_its_own() {
    let mut bench = node(false);
    for claimed in ["10.1.0.5", "10.1.0.9", "10.2.0.0", "192.168.0.1"] {
        let sent = bench.send(PROBES, &echo((PROBES, claimed), "10.2.0.0", 128));
        assert_eq!(sent.dropped(), DropReason::Spoof, "{claimed}");
    }
    let sent = bench.send(POD, &echo((POD, "10.1.0.0"), "10.2.0.0", 128));
    assert_eq!(sent.dropped(), DropReason::Spoof);
    // From the wire as it is, posing as the other node's probe: that one comes in the tunnel.
    let posing = Builder::from(UPLINK, "10.2.0.0", "10.1.0.0")
        .macs(mac(2), own(UPLINK))
        .echo(9, 1)
        .build();
    assert_eq!(bench.send(UPLINK, &posing).dropped(), DropReason::Spoof);
}

#[test]
fn o22_the_other_nodes_probe_comes_in_and_its_answer_goes_back() {
    let mut bench = node(true);
    for (own_end, theirs) in [("10.1.0.0", "10.2.0.0"), ("fd01::", "fd02::")] {
        let request = Builder::from(UPLINK, theirs, own_end)
            .macs(mac(2), own(UPLINK))
            .echo(9, 1)
            .payload(&[7; 1400])
            .build();
        let delivered = bench.send(UPLINK, &request);
        assert_eq!(delivered.forwarded(PROBES).len(), request.len());
        let answer = Builder::from(PROBES, own_end, theirs).macs(own(PROBES), Mac::GATEWAY);
        let answer = if own_end.contains(':') {
            answer.icmp(129, 0, 0x0009_0001)
        } else {
            answer.icmp(0, 0, 0x0009_0001)
        };
        let answer = answer.payload(&[7; 1400]).build();
        bench.send(PROBES, &answer).forwarded(UPLINK);
    }
}
