//! Two appliances back to back: what pods of one node say to pods of the other, through all stages of both.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::frame::{Offload, Partial};
use sluice_appliance::testing::{Bench, Builder, End};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::checksum;
use sluice_appliance::{Capacity, Family, Verdict};
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol, TunnelRow,
};
use sluice_contract::row::LinkRow;
use sluice_contract::service::{AddressRole, AddressRow, PrefixRow, PrefixUse, ServiceRow};
use sluice_contract::{DropReason, Identity, LinkId, Mac, Prefix, Row};
use std::net::IpAddr;

const UPLINK: u16 = 1;
const HOST: u16 = 2;
const POD: u16 = 16;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix::new(ip(address), length.parse().unwrap()).unwrap()
}

fn nic(node: u8) -> Mac {
    Mac([2, 0, 0, 0, 1, node])
}

fn vtep(node: u8) -> Mac {
    Mac([2, 0, 0, 0, 2, node])
}

fn host_mac(node: u8) -> Mac {
    Mac([2, 0, 0, 0, 3, node])
}

fn link(id: u16, mac: Mac, addresses: &[&str], mtu: u16) -> Row {
    let id = LinkId::new(id).unwrap();
    let mut list = heapless::Vec::new();
    for address in addresses {
        list.push(ip(address)).unwrap();
    }
    Row::Link(LinkRow {
        id,
        mac,
        addresses: list,
        mtu,
        identity: Identity(300),
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    })
}

/// How large packets may be: of the pods, of the uplinks, and of the other node's.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    pod: u16,
    uplink: u16,
    peer: u16,
}

const USUAL: Sizes = Sizes {
    pod: 1500,
    uplink: 1500,
    peer: 1500,
};

/// A node: pod 10.n.0.5 / fd0n::5 behind link 16, the host at 192.168.0.n / fd99::n, the other node as its peer.
fn node(n: u8, protocol: TunnelProtocol, underlay: Family) -> Bench {
    sized(n, protocol, underlay, USUAL)
}

fn sized(n: u8, protocol: TunnelProtocol, underlay: Family, sizes: Sizes) -> Bench {
    let other = 3 - n;
    let underlay_of = |node: u8| match underlay {
        Family::V4 => format!("192.168.0.{node}"),
        Family::V6 => format!("fd99::{node}"),
    };
    let mut bench = Bench::empty(Capacity::default());
    let role = |address: String, role| {
        Row::Service(ServiceRow::Address(AddressRow {
            address: ip(&address),
            role,
        }))
    };
    let remote = |text: String| {
        Row::Overlay(OverlayRow::Remote(RemoteRow {
            prefix: prefix(&text),
            peer: PeerId(7),
        }))
    };
    let (pod4, pod6) = (format!("10.{n}.0.5"), format!("fd0{n}::5"));
    let (host4, host6) = (format!("192.168.0.{n}"), format!("fd99::{n}"));
    let mut rows = vec![
        link(UPLINK, nic(n), &[], sizes.uplink),
        link(HOST, host_mac(n), &[&host4, &host6], 1500),
        link(
            POD,
            Mac::of_pod(LinkId::new(POD).unwrap()),
            &[&pod4, &pod6],
            sizes.pod,
        ),
    ];
    rows.extend(["10.0.0.0/8", "fd00::/12"].map(|range| {
        Row::Service(ServiceRow::Prefix(PrefixRow {
            prefix: prefix(range),
            purpose: PrefixUse::Pods,
        }))
    }));
    rows.push(role(format!("192.168.0.{other}"), AddressRole::Peer));
    rows.push(role(format!("fd99::{other}"), AddressRole::Peer));
    let tunnel = TunnelRow {
        protocol,
        mac: vtep(n),
        source4: Some([192, 168, 0, n].into()),
        source6: Some(format!("fd99::{n}").parse().unwrap()),
        zero_checksum6: true,
        ..TunnelRow::default()
    };
    let hop = NextHopRow {
        id: NextHopId(0),
        address: ip(&underlay_of(other)),
        mac: Some(nic(other)),
    };
    rows.push(Row::Overlay(OverlayRow::Tunnel(tunnel)));
    rows.push(Row::Overlay(OverlayRow::NextHop(hop)));
    rows.push(peer(&underlay_of(other), other, sizes.peer, false));
    rows.push(remote(format!("10.{other}.0.0/24")));
    rows.push(remote(format!("fd0{other}::/64")));
    bench.commit(&rows);
    bench
}

fn peer(address: &str, node: u8, mtu: u16, direct: bool) -> Row {
    Row::Overlay(OverlayRow::Peer(PeerRow {
        id: PeerId(7),
        address: ip(address),
        mac: vtep(node),
        next_hop: NextHopId(0),
        mtu,
        direct,
    }))
}

const PROTOCOLS: [TunnelProtocol; 5] = [
    TunnelProtocol::Vxlan,
    TunnelProtocol::VxlanGbp,
    TunnelProtocol::Geneve,
    TunnelProtocol::GeneveIp,
    TunnelProtocol::IpIp,
];

fn pod(family: Family) -> Builder {
    match family {
        Family::V4 => Builder::from(POD, "10.1.0.5", "10.2.0.5"),
        Family::V6 => Builder::from(POD, "fd01::5", "fd02::5"),
    }
}

fn answer(family: Family) -> Builder {
    match family {
        Family::V4 => Builder::from(POD, "10.2.0.5", "10.1.0.5"),
        Family::V6 => Builder::from(POD, "fd02::5", "fd01::5"),
    }
}

/// Sends a frame that left one node into the other.
fn carry(to: &mut Bench, sent: &End) -> End {
    to.send_with(UPLINK, sent.forwarded(UPLINK), 0, sent.offload)
}

#[test]
fn o01_o11_o13_pods_of_two_nodes_talk_in_every_format_and_family() {
    for protocol in PROTOCOLS {
        for underlay in [Family::V4, Family::V6] {
            for family in [Family::V4, Family::V6] {
                let (mut a, mut b) = (node(1, protocol, underlay), node(2, protocol, underlay));
                let sent = a.send(POD, &pod(family).tcp(4000, 80, 2).build());
                let arrived = carry(&mut b, &sent);
                let bytes = arrived.forwarded(POD);
                assert_eq!(bytes[..6], Mac::of_pod(LinkId::new(POD).unwrap()).0);
                let hops = if family == Family::V4 { 22 } else { 21 };
                assert_eq!(bytes[hops], 62, "a hop at each node");
                let sent = b.send(
                    POD,
                    &answer(family).tcp(80, 4000, 0x12).numbers(1, 1001).build(),
                );
                carry(&mut a, &sent).forwarded(POD);
                // The tunnel is no way in for what does not lie behind the node.
                let stranger = pod(family).tcp(4000, 80, 2).build();
                let mut outer = a.send(POD, &stranger);
                assert!(matches!(outer.verdict, Verdict::Forward(_)));
                let at =
                    outer.bytes.len() - stranger.len() + if family == Family::V4 { 27 } else { 22 };
                outer.bytes[at] ^= 0x70;
                if family == Family::V6 {
                    assert_eq!(carry(&mut b, &outer).dropped(), DropReason::TunnelSpoof);
                }
            }
        }
    }
}

#[test]
fn w06_the_host_reaches_remote_pods_and_is_answered_the_way_it_asked() {
    let vxlan = TunnelProtocol::Vxlan;
    let (mut a, mut b) = (node(1, vxlan, Family::V4), node(2, vxlan, Family::V4));
    let host = Builder::from(HOST, "192.168.0.1", "10.2.0.5").macs(host_mac(1), Mac::GATEWAY);
    let sent = a.send(HOST, &host.udp(5000, 53).build());
    carry(&mut b, &sent).forwarded(POD);
    let back = Builder::from(POD, "10.2.0.5", "192.168.0.1").udp(53, 5000);
    let sent = b.send(POD, &back.build());
    assert_eq!(sent.forwarded(UPLINK)[36..38], 8472u16.to_be_bytes());
    let arrived = carry(&mut a, &sent);
    assert_eq!(arrived.forwarded(HOST)[..6], host_mac(1).0);
}

#[test]
fn o06_bare_packets_that_should_have_come_in_a_tunnel_are_spoofed() {
    let vxlan = TunnelProtocol::Vxlan;
    let mut b = node(2, vxlan, Family::V4);
    let bare = pod(Family::V4).macs(nic(1), nic(2)).udp(1, 2).build();
    assert_eq!(b.send(UPLINK, &bare).dropped(), DropReason::Spoof);
    b.commit(&[peer("192.168.0.1", 1, 1500, true)]);
    b.send(UPLINK, &bare).forwarded(POD);
}

#[test]
fn o10_direct_peers_talk_without_a_tunnel_and_switching_over_cuts_no_connection() {
    let vxlan = TunnelProtocol::Vxlan;
    let (mut a, mut b) = (node(1, vxlan, Family::V4), node(2, vxlan, Family::V4));
    let talk = |a: &mut Bench, b: &mut Bench, length| {
        let sent = a.send(POD, &pod(Family::V4).udp(1, 2).build());
        assert_eq!(sent.forwarded(UPLINK).len(), length);
        carry(b, &sent).forwarded(POD);
        let sent = b.send(POD, &answer(Family::V4).udp(2, 1).build());
        carry(a, &sent).forwarded(POD);
    };
    talk(&mut a, &mut b, 92);
    a.commit(&[peer("192.168.0.2", 2, 1500, true)]);
    talk(&mut a, &mut b, 42);
    b.commit(&[peer("192.168.0.1", 1, 1500, true)]);
    talk(&mut a, &mut b, 42);
    a.commit(&[peer("192.168.0.2", 2, 1500, false)]);
    talk(&mut a, &mut b, 92);
}

#[test]
fn m05_a_packet_too_large_for_the_tunnel_is_answered_with_what_fits() {
    for (protocol, underlay, fits) in [
        (TunnelProtocol::Vxlan, Family::V4, 1450u16),
        (TunnelProtocol::Geneve, Family::V6, 1422),
        (TunnelProtocol::IpIp, Family::V4, 1480),
    ] {
        for family in [Family::V4, Family::V6] {
            let mut a = node(1, protocol, underlay);
            let header = if family == Family::V4 { 28 } else { 48 };
            let sized = |size: u16| {
                pod(family)
                    .payload(&vec![1; usize::from(size) - header])
                    .build()
            };
            a.send(POD, &sized(fits)).forwarded(UPLINK);
            let answer = a.send(POD, &sized(fits + 1));
            let told = answer.replied();
            let at = if family == Family::V4 { 40 } else { 60 };
            assert_eq!(told[at..at + 2], fits.to_be_bytes());
        }
    }
}

/// An ICMP "too big" of a router on the underlay.
fn too_big(underlay: Family, mtu: u32, quote: &[u8]) -> Vec<u8> {
    let (router, own, kind, code) = match underlay {
        Family::V4 => ("192.168.7.1", "192.168.0.1", 3, 4),
        Family::V6 => ("fd99:7::1", "fd99::1", 2, 0),
    };
    Builder::from(UPLINK, router, own)
        .macs(nic(9), nic(1))
        .icmp(kind, code, mtu)
        .payload(quote)
        .build()
}

#[test]
fn m07_a_router_on_the_underlay_lowers_what_pods_are_told_until_it_is_forgotten() {
    for (is_probed, seconds) in [(false, 600), (true, 60)] {
        let mut a = node(1, TunnelProtocol::Vxlan, Family::V4);
        if is_probed {
            let probes = link(LinkId::PROBES.raw(), Mac([2, 0, 0, 0, 7, 7]), &[], 1500);
            a.commit(&[probes]);
        }
        let large = pod(Family::V4).payload(&[1; 1400]).build();
        let sent = a.send(POD, &large);
        let outer = sent.forwarded(UPLINK).to_vec();
        let complaint = too_big(Family::V4, 1400, &outer[14..42]);
        assert_eq!(a.send(UPLINK, &complaint).dropped(), DropReason::PathMtu);
        let told = a.send(POD, &large);
        assert_eq!(told.replied()[40..42], 1350u16.to_be_bytes());
        a.wait(Duration::from_secs(seconds - 1));
        a.send(POD, &large).replied();
        a.wait(Duration::from_secs(2));
        a.send(POD, &large).forwarded(UPLINK);
        // Never below what IPv6 may count on.
        let complaint = too_big(Family::V4, 552, &outer[14..42]);
        assert_eq!(a.send(UPLINK, &complaint).dropped(), DropReason::PathMtu);
        let told = a.send(POD, &large);
        assert_eq!(told.replied()[40..42], 1280u16.to_be_bytes());
    }
}

#[test]
fn m07_a_complaint_about_a_packet_that_was_never_sent_changes_nothing() {
    for underlay in [Family::V4, Family::V6] {
        let mut a = node(1, TunnelProtocol::Vxlan, underlay);
        let large = pod(Family::V4).payload(&[1; 1350]).build();
        let outer = a.send(POD, &large).forwarded(UPLINK).to_vec();
        let quote = match underlay {
            Family::V4 => 14..42,
            Family::V6 => 14..62,
        };
        // What a stranger knows: addresses and the tunnel's port. The rest is guessed, one number after the other.
        let mut guess = outer[quote.clone()].to_vec();
        for number in 0..100_000u32 {
            let bytes = number.wrapping_mul(0x9e37_79b1).to_be_bytes();
            match underlay {
                Family::V4 => {
                    guess[4..6].copy_from_slice(&bytes[..2]);
                    guess[20..22].copy_from_slice(&bytes[2..]);
                }
                Family::V6 => {
                    guess[1..4].copy_from_slice(&bytes[..3]);
                    guess[1] &= 0xf;
                    guess[41] = bytes[3];
                }
            }
            let end = a.send(UPLINK, &too_big(underlay, 552, &guess));
            assert_eq!(end.dropped(), DropReason::IcmpUnrelated, "guess {number}");
        }
        a.send(POD, &large).forwarded(UPLINK);
        // Who guesses has made routers unheard for a while, not for good.
        let genuine = too_big(underlay, 1400, &outer[quote]);
        assert_eq!(
            a.send(UPLINK, &genuine).dropped(),
            DropReason::IcmpUnrelated
        );
        a.wait(Duration::from_secs(601));
        assert_eq!(a.send(UPLINK, &genuine).dropped(), DropReason::PathMtu);
        a.send(POD, &large).replied();
    }
}

/// What a pod says to everybody ends with one reason and leaves by no link: not by the uplink, not through the tunnel, not to
/// the host or another pod, whatever MAC the frame is addressed to.
#[test]
fn o21_what_pods_say_to_everybody_never_leaves_them() {
    let everybody = |address: &str| match ip(address) {
        IpAddr::V4(v4) if v4.is_multicast() => {
            let [_, b, c, d] = v4.octets();
            Mac([1, 0, 0x5e, b & 0x7f, c, d])
        }
        IpAddr::V4(_) => Mac([0xff; 6]),
        IpAddr::V6(v6) => {
            let [.., a, b, c, d] = v6.octets();
            Mac([0x33, 0x33, a, b, c, d])
        }
    };
    for protocol in [TunnelProtocol::Vxlan, TunnelProtocol::Geneve] {
        let mut bench = node(1, protocol, Family::V4);
        let mut sent = 0;
        for to in [
            "255.255.255.255",
            "224.0.0.1",
            "224.0.0.251",
            "239.1.2.3",
            "ff02::1",
            "ff02::fb",
            "ff05::1:3",
            "ff0e::7",
        ] {
            let from = if ip(to).is_ipv4() {
                "10.1.0.5"
            } else {
                "fd01::5"
            };
            let own = Mac::of_pod(LinkId::new(POD).unwrap());
            for mac in [everybody(to), Mac::GATEWAY, Mac([0xff; 6])] {
                let packet = Builder::from(POD, from, to).udp(4000, 5353).payload(b"all");
                let end = bench.send(POD, &packet.macs(own, mac).build());
                assert_eq!(end.dropped(), DropReason::Multicast, "{to} by {mac}");
                sent += 1;
            }
        }
        assert_eq!(sent, 24);
    }
}

#[test]
fn o17_a_dead_next_hop_is_told_to_the_pod() {
    let mut a = node(1, TunnelProtocol::Vxlan, Family::V4);
    let hop = NextHopRow {
        id: NextHopId(0),
        address: ip("192.168.0.2"),
        mac: None,
    };
    a.commit(&[Row::Overlay(OverlayRow::NextHop(hop))]);
    let told = a.send(POD, &pod(Family::V4).udp(1, 2).build());
    assert_eq!(told.replied()[34..36], [3, 1], "host unreachable");
}

#[test]
fn errors_about_what_came_in_a_tunnel_go_back_in_it() {
    let vxlan = TunnelProtocol::Vxlan;
    for family in [Family::V4, Family::V6] {
        let (mut a, mut b) = (node(1, vxlan, Family::V4), node(2, vxlan, Family::V4));
        let sent = a.send(POD, &pod(family).udp(1, 2).hops(2).build());
        let expired = carry(&mut b, &sent);
        let error = expired.replied().to_vec();
        assert_eq!(error[36..38], 8472u16.to_be_bytes());
        assert_eq!(error[..12], [nic(1).0, nic(2).0].concat());
        let arrived = a.send_with(UPLINK, &error, 0, Offload::default());
        let kind = if family == Family::V4 {
            (34, 11)
        } else {
            (54, 3)
        };
        assert_eq!(arrived.forwarded(POD)[kind.0], kind.1);
    }
}

/// The datagram behind the headers of IPv4, from the pieces of a packet in any order.
fn reassembled(pieces: &[Vec<u8>]) -> Vec<u8> {
    let mut datagram = Vec::new();
    for piece in pieces {
        let word = u16::from_be_bytes([piece[20], piece[21]]);
        assert_eq!(word & 0x4000, 0, "a piece may not forbid what it is");
        let at = usize::from(word & 0x1fff) * 8;
        let total = usize::from(u16::from_be_bytes([piece[16], piece[17]]));
        let payload = &piece[34..14 + total];
        datagram.resize(datagram.len().max(at + payload.len()), 0);
        datagram[at..at + payload.len()].copy_from_slice(payload);
    }
    let last = pieces.iter().filter(|piece| piece[20] & 0x20 == 0);
    assert_eq!(last.count(), 1, "one piece is the last");
    datagram
}

#[test]
fn m09_what_its_sender_allows_to_be_cut_arrives_in_pieces_and_nothing_else_does() {
    for protocol in PROTOCOLS {
        for partial in [false, true] {
            let (mut a, mut b) = (node(1, protocol, Family::V4), node(2, protocol, Family::V4));
            let payload: Vec<u8> = (0..1472u16).map(|n| n as u8).collect();
            let mut builder = pod(Family::V4).udp(4000, 53).payload(&payload);
            builder.fragment = 0;
            let mut bytes = builder.build();
            let datagram = bytes[34..].to_vec();
            let mut offload = Offload::default();
            if partial {
                // As a pod's kernel leaves it to the device: the pseudo-header's sum, to be completed.
                let sum = checksum::pseudo(builder.source, builder.destination, 17, 1480);
                bytes[40..42].copy_from_slice(&checksum::fold(sum).to_be_bytes());
                offload.partial = Some(Partial {
                    start: 34,
                    offset: 6,
                });
            }
            let first = a.send_with(POD, &bytes, 0, offload);
            assert_eq!(first.offload.partial, None);
            let mut outer = vec![first.forwarded(UPLINK).to_vec()];
            for (link, bytes) in std::mem::take(&mut a.originated.0) {
                assert_eq!(link, LinkId::UPLINK);
                outer.push(bytes);
            }
            assert!(outer.len() >= 2, "{protocol:?}");
            assert_eq!(a.pipeline.stats().originated() as usize, outer.len() - 1);
            let mut arrived = Vec::new();
            for piece in &outer {
                assert!(piece.len() <= 1514, "{} bytes on the wire", piece.len());
                arrived.push(b.send(UPLINK, piece).forwarded(POD).to_vec());
            }
            assert!(b.originated.0.is_empty());
            assert_eq!(reassembled(&arrived), datagram, "{protocol:?}");
            // The other end answers, and the connection is one.
            let answered = b.send(POD, &answer(Family::V4).udp(53, 4000).build());
            carry(&mut a, &answered).forwarded(POD);
        }
        let mut a = node(1, protocol, Family::V4);
        let whole = pod(Family::V4).udp(4000, 53).payload(&[7; 1472]).build();
        assert_eq!(&a.send(POD, &whole).replied()[34..36], &[3, 4]);
        let whole = pod(Family::V6).udp(4000, 53).payload(&[7; 1452]).build();
        assert_eq!(&a.send(POD, &whole).replied()[54..56], &[2, 0]);
        assert!(a.originated.0.is_empty());
    }
}

/// A packet of `size` bytes as its frame's head, of `at_hand` at most, and the bytes that lie in further buffers.
fn of_size(
    (family, kind): (Family, usize),
    size: u16,
    fragment: u16,
    at_hand: usize,
) -> (Vec<u8>, usize) {
    let mut builder = match kind {
        0 => pod(family).tcp(4000, 80, 2),
        1 => pod(family).udp(4000, 53),
        _ => pod(family).echo(1, 1),
    };
    builder.fragment = fragment;
    let headers = builder.build().len() - 14;
    let mut frame = builder
        .payload(&vec![7; usize::from(size) - headers])
        .build();
    let tail = frame.len().saturating_sub(at_hand);
    frame.truncate(at_hand);
    (frame, tail)
}

/// M-03, M-05: whatever the sizes of pods, uplinks and peers, nothing disappears. A packet arrives whole, in an outer packet that
/// the underlay takes, or in pieces; or its sender is told a size, and what has that size arrives.
#[test]
fn m05_no_size_is_a_black_hole() {
    const MTUS: [u16; 5] = [1280, 1450, 1500, 2500, 9000];
    let mut cells = 0;
    for protocol in [
        TunnelProtocol::Vxlan,
        TunnelProtocol::Geneve,
        TunnelProtocol::IpIp,
    ] {
        for underlay in [Family::V4, Family::V6] {
            for pod in MTUS {
                for uplink in MTUS {
                    for peer in MTUS {
                        let sizes = Sizes { pod, uplink, peer };
                        cells += no_black_hole(protocol, underlay, sizes);
                    }
                }
            }
        }
    }
    assert!(cells > 10_000, "{cells}");
}

fn no_black_hole(protocol: TunnelProtocol, underlay: Family, sizes: Sizes) -> usize {
    let mut a = sized(1, protocol, underlay, sizes);
    let theirs = Sizes {
        uplink: sizes.peer,
        peer: sizes.uplink,
        ..sizes
    };
    let mut b = sized(2, protocol, underlay, theirs);
    let overhead = sluice_appliance::mtu::overhead(protocol, underlay);
    let wire = sizes.uplink.min(sizes.peer);
    let tunnel = wire - u16::try_from(overhead).unwrap();
    let mut cells = 0;
    for family in [Family::V4, Family::V6] {
        if family == Family::V6 && tunnel < 1280 {
            // No link under IPv6 may be smaller (RFC 8200 §5), and outer packets are never cut: such an underlay carries none.
            continue;
        }
        let most = tunnel.min(sizes.pod);
        let mut lengths = [most - 1, most, most + 1, tunnel, tunnel + 1, sizes.pod, 600];
        lengths.sort_unstable();
        for size in lengths.into_iter().filter(|size| *size <= sizes.pod) {
            for kind in 0..3 {
                for (fragment, at_hand) in [(0x4000, 1000), (0, 1000), (0, 3500)] {
                    // Past the limits on how often somebody is told.
                    a.wait(Duration::from_millis(20));
                    b.wait(Duration::from_millis(20));
                    let packet = of_size((family, kind), size, fragment, at_hand);
                    let may_be_cut = family == Family::V4 && fragment == 0 && packet.1 == 0;
                    let what = format!(
                        "{protocol:?} over {underlay:?} {sizes:?}: {family:?} {size} {kind} {fragment:x}"
                    );
                    let sent = a.send_with(POD, &packet.0, packet.1, Offload::default());
                    let pieces = std::mem::take(&mut a.originated.0);
                    match sent.verdict {
                        Verdict::Reply if size > tunnel => {
                            assert!(!may_be_cut || tunnel > 2000, "{what}: it may be cut");
                            is_told(family, &sent, tunnel, &what);
                        }
                        Verdict::Forward(_) if size > tunnel && may_be_cut => {
                            let outer = pieces.into_iter().map(|(_, bytes)| bytes);
                            let outer = [sent.bytes].into_iter().chain(outer);
                            let arrived: Vec<Vec<u8>> = outer
                                .map(|bytes| {
                                    assert!(bytes.len() <= usize::from(wire) + 14, "{what}");
                                    b.send(UPLINK, &bytes).forwarded(POD).to_vec()
                                })
                                .collect();
                            assert_eq!(reassembled(&arrived), packet.0[34..], "{what}");
                        }
                        Verdict::Forward(_) if size <= tunnel => {
                            let outer = sent.bytes.len() + packet.1 - 14;
                            assert!(outer <= usize::from(wire), "{what}: {outer} on the wire");
                            let arrived = b.send_with(UPLINK, &sent.bytes, packet.1, sent.offload);
                            let bytes = arrived.forwarded(POD);
                            assert_eq!(bytes.len(), packet.0.len(), "{what}: it arrives whole");
                            assert_eq!(bytes[42..], packet.0[42..], "{what}");
                        }
                        other => unreachable!("{what}: {other:?}"),
                    }
                    cells += 1;
                }
            }
        }
    }
    cells
}

fn is_told(family: Family, sent: &End, size: u16, what: &str) {
    let (at, kind) = match family {
        Family::V4 => (34, [3, 4]),
        Family::V6 => (54, [2, 0]),
    };
    assert_eq!(sent.bytes[at..at + 2], kind, "{what}");
    let told = u16::from_be_bytes([sent.bytes[at + 6], sent.bytes[at + 7]]);
    assert_eq!(told, size, "{what}");
}
