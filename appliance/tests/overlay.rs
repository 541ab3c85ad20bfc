//! Tunnels between two appliances: what one wraps the other unwraps, and nothing that is not a known node's gets in.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use proptest::prelude::*;
use sluice_appliance::decap::{self, Origin};
use sluice_appliance::frame::{Gso, GsoKind, Offload, Partial, TunnelKind};
use sluice_appliance::hash::Hasher;
use sluice_appliance::mtu::Learned;
use sluice_appliance::parse::{self, Packet, Parsed};
use sluice_appliance::testing::{Bench, Builder};
use sluice_appliance::wire::checksum;
use sluice_appliance::{Address, Arena, Capacity, Family, Frame, encap, mtu};
use sluice_contract::overlay::{
    GENEVE_CLASS, NextHopId, NextHopRow, OverlayKey, OverlayRow, PeerId, PeerRow, RemoteRow,
    TunnelProtocol, TunnelRow,
};
use sluice_contract::report::{Field, RejectReason};
use sluice_contract::{DropReason, Identity, Key, LinkId, Mac, Prefix, Row, ToGuest};
use std::net::IpAddr;

const PROTOCOLS: [TunnelProtocol; 5] = [
    TunnelProtocol::Vxlan,
    TunnelProtocol::VxlanGbp,
    TunnelProtocol::Geneve,
    TunnelProtocol::GeneveIp,
    TunnelProtocol::IpIp,
];
const HEADROOM: usize = 128;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix::new(ip(address), length.parse().unwrap()).unwrap()
}

fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

fn tunnel(node: u8, protocol: TunnelProtocol) -> TunnelRow {
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
fn rows(node: u8, underlay: Family, tunnel: TunnelRow) -> Vec<Row> {
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

fn node(node: u8, underlay: Family, tunnel: TunnelRow) -> Bench {
    let mut bench = Bench::empty(Capacity::default());
    bench.commit(&rows(node, underlay, tunnel));
    bench
}

fn pair(protocol: TunnelProtocol, underlay: Family) -> (Bench, Bench) {
    (
        node(1, underlay, tunnel(1, protocol)),
        node(2, underlay, tunnel(2, protocol)),
    )
}

fn nothing_learned() -> Learned<'static> {
    Learned::new(&mut Arena::new(vec![0; 128].leak()), 0).unwrap()
}

/// A frame in a buffer of its own.
struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    tail: usize,
    link: LinkId,
    offload: Offload,
}

impl Buffer {
    fn new(frame: &[u8], link: u16) -> Self {
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

    fn frame(&mut self) -> Frame<'_> {
        let end = HEADROOM + self.length;
        let (tail, link, offload) = (self.tail, self.link, self.offload);
        Frame::new(&mut self.bytes, HEADROOM, end, tail, link, offload).unwrap()
    }
}

fn packet(frame: &Frame<'_>) -> Packet {
    match parse::parse(frame) {
        Ok(Parsed::Ip(packet)) => packet,
        other => panic!("{other:?}"),
    }
}

/// What the sending node makes of the frame: the outer frame and its offload words.
fn wrapped(
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
        Identity(identity),
    )?;
    Ok((frame.bytes().to_vec(), frame.offload))
}

/// What the receiving node makes of an outer frame.
fn unwrapped(
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

fn inner(family: Family) -> Builder {
    match family {
        Family::V4 => Builder::from(16, "10.1.0.5", "10.2.0.9"),
        Family::V6 => Builder::from(16, "fd01::5", "fd02::9"),
    }
}

/// The UDP checksum over IPv6 of an outer frame, as the receiver sums it up: 0 is right.
fn outer_checksum6(outer: &[u8]) -> u16 {
    let datagram = &outer[54..];
    let address = |at: usize| Address(outer[at..at + 16].try_into().unwrap());
    let pseudo = checksum::pseudo(address(22), address(38), 17, datagram.len());
    checksum::finish(checksum::sum(datagram, pseudo))
}

/// Completes a checksum as a device does.
fn complete(frame: &mut [u8], partial: Partial) {
    let at = usize::from(partial.start + partial.offset);
    let sum = checksum::finish(checksum::sum(&frame[usize::from(partial.start)..], 0));
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn o01_o11_o13_what_one_node_wraps_the_other_unwraps_in_every_format_and_family() {
    for protocol in PROTOCOLS {
        for underlay in [Family::V4, Family::V6] {
            for family in [Family::V4, Family::V6] {
                let (a, b) = pair(protocol, underlay);
                let bytes = inner(family).tcp(1000, 80, 0x10).payload(b"whole").build();
                let (mut outer, offload) = wrapped(&a, &mut Buffer::new(&bytes, 16), 300).unwrap();
                let overhead = mtu::overhead(protocol, underlay);
                assert_eq!(
                    outer.len(),
                    bytes.len() + overhead,
                    "{protocol:?} {underlay:?}"
                );
                assert_eq!(outer[..12], [mac(2).0, mac(0xee).0].concat());
                if let Some(partial) = offload.partial {
                    assert_eq!(underlay, Family::V6);
                    complete(&mut outer, partial);
                    assert_eq!(outer_checksum6(&outer), 0);
                }
                let (again, offload, origin) = unwrapped(&b, &outer, Offload::default()).unwrap();
                assert_eq!(again[14..], bytes[14..]);
                assert_eq!(again[..6], Mac::GATEWAY.0);
                assert_eq!(offload, Offload::default());
                let told = !matches!(protocol, TunnelProtocol::Vxlan | TunnelProtocol::IpIp);
                assert_eq!(
                    origin.identity,
                    told.then_some(Identity(300)),
                    "{protocol:?}"
                );
                assert_eq!(origin.peer, PeerId(1));
            }
        }
    }
}

#[test]
fn o08_m10_the_outer_header_has_its_own_ttl_never_fragments_and_carries_the_mark() {
    let (a, _) = pair(TunnelProtocol::Vxlan, Family::V4);
    let mut bytes = inner(Family::V4).hops(7).build();
    // DSCP 46, ECT(0); the checksum is none of this test's.
    bytes[15] = 0xba;
    bytes[24..26].copy_from_slice(&[0, 0]);
    let sum = checksum::finish(checksum::sum(&bytes[14..34], 0)).to_be_bytes();
    bytes[24..26].copy_from_slice(&sum);
    let (outer, _) = wrapped(&a, &mut Buffer::new(&bytes, 16), 0).unwrap();
    assert_eq!((outer[15], outer[22]), (0x02, 64));
    assert_eq!(outer[20..22], [0x40, 0]);
    assert_eq!(outer[40..42], [0, 0], "no UDP checksum over IPv4");
    assert_eq!(checksum::finish(checksum::sum(&outer[14..34], 0)), 0);
    let mut copied = tunnel(1, TunnelProtocol::Vxlan);
    copied.copy_dscp = true;
    let a = node(1, Family::V4, copied);
    let (outer, _) = wrapped(&a, &mut Buffer::new(&bytes, 16), 0).unwrap();
    assert_eq!(outer[15], 0xba);
}

#[test]
fn o05_a_thousand_flows_have_nine_hundred_ports_and_one_flow_has_one() {
    let hasher = Hasher::new([5; 16]);
    for family in [Family::V4, Family::V6] {
        let mut ports = std::collections::BTreeSet::new();
        for flow in 0..1000u16 {
            let port = |payload: &[u8]| {
                let bytes = inner(family).udp(1024 + flow, 53).payload(payload).build();
                encap::source_port(&packet(&Buffer::new(&bytes, 16).frame()), &hasher)
            };
            assert_eq!(port(b"one"), port(b"another"));
            assert!(port(b"") >= 49152);
            ports.insert(port(b""));
        }
        assert!(ports.len() >= 900, "{}", ports.len());
    }
}

#[test]
fn o06_tunnel_packets_of_strangers_and_for_strangers_are_dropped() {
    let (a, b) = pair(TunnelProtocol::Vxlan, Family::V4);
    let bytes = inner(Family::V4).build();
    let (outer, _) = wrapped(&a, &mut Buffer::new(&bytes, 16), 0).unwrap();
    let mut stranger = outer.clone();
    stranger[29] = 9;
    stranger[25] = stranger[25].wrapping_sub(8);
    let refused = unwrapped(&b, &stranger, Offload::default());
    assert_eq!(refused, Err(DropReason::TunnelUnknownPeer));
    // The inner source is for the caller to ask about.
    let overlay = b.pipeline.tables().overlay();
    let may = |source: &str| overlay.may_speak_for(PeerId(1), ip(source).into());
    assert!(may("10.1.0.200") && may("fd01::1") && may("192.168.0.1"));
    assert!(!may("10.2.0.9") && !may("10.3.0.1") && !may("192.168.0.2"));
}

#[test]
fn o07_o12_headers_that_are_not_ours_are_dropped_each_for_its_reason() {
    use DropReason::{
        EtherType, Multicast, NotForUs, OuterFragment, TunnelHeader, TunnelOption, TunnelVni,
        VlanTag,
    };
    let vxlan: &[(&str, usize, &[u8], Option<DropReason>)] = &[
        ("no I flag", 42, &[0], Some(TunnelHeader)),
        ("reserved flags are ignored", 42, &[0xff, 0xff, 1, 2], None),
        ("reserved byte is ignored", 49, &[7], None),
        ("another network", 48, &[78], Some(TunnelVni)),
        (
            "inner MAC of another node",
            50,
            &[2, 0, 0, 0, 0, 0x55],
            Some(NotForUs),
        ),
        ("inner broadcast", 50, &[0xff; 6], Some(Multicast)),
        ("inner VLAN", 62, &[0x81, 0], Some(VlanTag)),
        ("inner ARP", 62, &[8, 6], Some(EtherType)),
    ];
    // Geneve: version and length at 42, flags, protocol, network at 46, options at 50.
    let geneve: &[(&str, usize, &[u8], Option<DropReason>)] = &[
        ("another version", 42, &[0x42], Some(TunnelHeader)),
        ("reserved bits are ignored", 43, &[0x3f], None),
        ("a control packet", 43, &[0x80], Some(TunnelHeader)),
        ("critical bit without a critical option", 43, &[0x40], None),
        ("another network", 48, &[78], Some(TunnelVni)),
        ("unknown protocol", 44, &[8, 6], Some(TunnelHeader)),
        ("options past the end", 42, &[0x3f], Some(TunnelHeader)),
        ("an option past the options", 53, &[2], Some(TunnelHeader)),
        ("an unknown option", 50, &[1, 2], None),
        (
            "an unknown critical option",
            50,
            &[1, 2, 0x81],
            Some(TunnelOption),
        ),
        ("reserved bits of an option", 53, &[0xe1], None),
    ];
    for (protocol, cases) in [
        (TunnelProtocol::Vxlan, vxlan),
        (TunnelProtocol::Geneve, geneve),
    ] {
        let (a, b) = pair(protocol, Family::V4);
        let bytes = inner(Family::V4).build();
        let (outer, _) = wrapped(&a, &mut Buffer::new(&bytes, 16), 300).unwrap();
        for (what, at, change, expected) in cases {
            let mut changed = outer.clone();
            changed[*at..at + change.len()].copy_from_slice(change);
            let ended = unwrapped(&b, &changed, Offload::default()).err();
            assert_eq!(ended, *expected, "{what}");
        }
        let mut fragment = outer.clone();
        fragment[20] = 0x20;
        fragment[24] = fragment[24].wrapping_add(0x20);
        let length = u16::from_be_bytes([fragment[16], fragment[17]]) - 20;
        if length % 8 == 0 {
            let ended = unwrapped(&b, &fragment, Offload::default()).err();
            assert_eq!(ended, Some(OuterFragment));
        }
    }
    assert_eq!(GENEVE_CLASS >> 8, 0xff, "experimental");
}

#[test]
fn o09_checksums_zero_is_taken_over_ipv4_and_a_wrong_one_never() {
    for underlay in [Family::V4, Family::V6] {
        let (a, b) = pair(TunnelProtocol::Vxlan, underlay);
        let bytes = inner(Family::V6).build();
        let (mut outer, offload) = wrapped(&a, &mut Buffer::new(&bytes, 16), 0).unwrap();
        let udp = if underlay == Family::V4 { 34 } else { 54 };
        if let Some(partial) = offload.partial {
            complete(&mut outer, partial);
        }
        assert!(unwrapped(&b, &outer, Offload::default()).is_ok());
        let mut wrong = outer.clone();
        wrong[udp + 7] ^= 0x55;
        let ended = unwrapped(&b, &wrong, Offload::default()).err();
        assert_eq!(ended, Some(DropReason::TunnelChecksum));
        let mut zero = outer.clone();
        zero[udp + 6..udp + 8].fill(0);
        let ended = unwrapped(&b, &zero, Offload::default()).err();
        let expected = (underlay == Family::V6).then_some(DropReason::TunnelChecksum);
        assert_eq!(ended, expected);
        let mut row = tunnel(2, TunnelProtocol::Vxlan);
        row.zero_checksum6 = true;
        let b = node(2, underlay, row);
        assert!(unwrapped(&b, &zero, Offload::default()).is_ok());
    }
}

#[test]
fn o08_congestion_met_on_the_underlay_reaches_the_pod_or_ends_the_packet() {
    let (a, b) = pair(TunnelProtocol::Vxlan, Family::V6);
    for family in [Family::V4, Family::V6] {
        for ect in [false, true] {
            let mut buffer = Buffer::new(&inner(family).build(), 16);
            if ect {
                let mut frame = buffer.frame();
                let network = &mut frame.bytes_mut()[14..];
                sluice_appliance::ecn::set_class(network, family, 2).unwrap();
            }
            let (mut outer, offload) = wrapped(&a, &mut buffer, 0).unwrap();
            complete(&mut outer, offload.partial.unwrap());
            outer[15] |= 0x30;
            let ended = unwrapped(&b, &outer, Offload::default());
            if !ect {
                assert_eq!(ended.err(), Some(DropReason::TunnelEcn));
                continue;
            }
            let (bytes, ..) = ended.unwrap();
            let class = sluice_appliance::ecn::class_of(&bytes[14..], family);
            assert_eq!(class, Some(3));
            packet(&Buffer::new(&bytes, 16).frame());
        }
    }
}

/// A large TCP frame, of which only the headers are at hand.
fn large(family: Family) -> Buffer {
    let bytes = inner(family)
        .tcp(1000, 80, 0x10)
        .payload(&[7; 3000])
        .build();
    let network = if family == Family::V4 { 20 } else { 40u16 };
    let header = 14 + network + 20;
    let mut buffer = Buffer::new(&bytes, 16);
    buffer.length = header.into();
    buffer.tail = 3000;
    buffer.offload = Offload {
        partial: Some(Partial {
            start: 14 + network,
            offset: 16,
        }),
        verified: false,
        gso: Some(Gso {
            kind: if family == Family::V4 {
                GsoKind::Tcp4
            } else {
                GsoKind::Tcp6
            },
            size: 1400,
            header,
            ecn: false,
        }),
        tunnel: None,
    };
    buffer
}

#[test]
fn m12_large_frames_are_wrapped_whole_and_the_offload_words_follow() {
    for protocol in PROTOCOLS {
        for underlay in [Family::V4, Family::V6] {
            for family in [Family::V4, Family::V6] {
                let (a, b) = pair(protocol, underlay);
                let mut buffer = large(family);
                let before = buffer.offload;
                let (outer, offload) = wrapped(&a, &mut buffer, 1).unwrap();
                let grown = mtu::overhead(protocol, underlay) as u16;
                let (partial, gso) = (offload.partial.unwrap(), offload.gso.unwrap());
                assert_eq!(partial.start, before.partial.unwrap().start + grown);
                assert_eq!(gso.header, before.gso.unwrap().header + grown);
                assert_eq!(usize::from(gso.header), outer.len());
                let told = offload.tunnel.unwrap();
                assert_eq!(told.network, 14 + grown);
                let devices = matches!(
                    protocol,
                    TunnelProtocol::Vxlan | TunnelProtocol::VxlanGbp | TunnelProtocol::Geneve
                );
                let expected = match underlay {
                    Family::V4 if devices => TunnelKind::Udp4,
                    Family::V6 if devices => TunnelKind::Udp6,
                    _ => TunnelKind::Other,
                };
                assert_eq!(told.kind, expected);
                let udp6 = underlay == Family::V6 && protocol != TunnelProtocol::IpIp;
                assert_eq!(told.checksum, udp6);
                let length = if underlay == Family::V4 { 16 } else { 18 };
                let said = u16::from_be_bytes([outer[length], outer[length + 1]]);
                let fixed = if underlay == Family::V4 { 14 } else { 54 };
                assert_eq!(usize::from(said), outer.len() + 3000 - fixed);
                // The other way round.
                let mut arrived = Buffer::new(&outer, 1);
                (arrived.tail, arrived.offload) = (3000, offload);
                let mut frame = arrived.frame();
                let parsed = packet(&frame);
                let overlay = b.pipeline.tables().overlay();
                decap::unwrap(&mut frame, &parsed, overlay, Mac::GATEWAY).unwrap();
                assert_eq!(frame.offload, before);
                packet(&frame);
            }
        }
    }
}

#[test]
fn v02_the_outer_checksum_is_right_although_the_inner_one_is_still_to_be_completed() {
    let (a, b) = pair(TunnelProtocol::Geneve, Family::V6);
    for family in [Family::V4, Family::V6] {
        let mut bytes = inner(family).udp(9, 10).payload(b"some odd load").build();
        let start = if family == Family::V4 { 34 } else { 54 };
        let (source, destination) = (inner(family).build(), bytes.len() - start);
        let addresses = packet(&Buffer::new(&source, 16).frame());
        let seed = checksum::pseudo(addresses.source, addresses.destination, 17, destination);
        bytes[start + 6..start + 8].copy_from_slice(&checksum::fold(seed).to_be_bytes());
        let mut buffer = Buffer::new(&bytes, 16);
        buffer.offload.partial = Some(Partial {
            start: start as u16,
            offset: 6,
        });
        let (mut outer, offload) = wrapped(&a, &mut buffer, 9).unwrap();
        complete(&mut outer, offload.partial.unwrap());
        assert_eq!(outer_checksum6(&outer), 0);
        let (bytes, ..) = unwrapped(&b, &outer, Offload::default()).unwrap();
        let sum = checksum::pseudo(addresses.source, addresses.destination, 17, destination);
        assert_eq!(checksum::finish(checksum::sum(&bytes[start..], sum)), 0);
    }
}

#[test]
fn m02_the_overhead_of_every_tunnel() {
    use TunnelProtocol::{Geneve, GeneveIp, IpIp, Vxlan, VxlanGbp};
    let table = [
        (Vxlan, 50),
        (VxlanGbp, 50),
        (Geneve, 58),
        (GeneveIp, 44),
        (IpIp, 20),
    ];
    for (protocol, over4) in table {
        assert_eq!(mtu::overhead(protocol, Family::V4), over4, "{protocol:?}");
        assert_eq!(
            mtu::overhead(protocol, Family::V6),
            over4 + 20,
            "{protocol:?}"
        );
    }
}

#[test]
fn m08_the_mss_is_lowered_never_raised_and_the_checksum_holds() {
    let syn = |options: &[u8]| {
        let mut bytes = inner(Family::V4).tcp(1, 2, 2).payload(options).build();
        bytes[46] = ((20 + options.len()) / 4 * 16) as u8;
        bytes[50..52].fill(0);
        let parsed_sum = checksum::pseudo(
            Address::v4([10, 1, 0, 5]),
            Address::v4([10, 2, 0, 9]),
            6,
            bytes.len() - 34,
        );
        let sum = checksum::finish(checksum::sum(&bytes[34..], parsed_sum));
        bytes[50..52].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    let right = |bytes: &[u8]| {
        let sum = checksum::pseudo(
            Address::v4([10, 1, 0, 5]),
            Address::v4([10, 2, 0, 9]),
            6,
            bytes.len() - 34,
        );
        checksum::finish(checksum::sum(&bytes[34..], sum)) == 0
    };
    let clamp = |bytes: &[u8], mtu| {
        let mut buffer = Buffer::new(bytes, 16);
        let mut frame = buffer.frame();
        let parsed = packet(&frame);
        let changed = mtu::clamp_mss(&mut frame, &parsed, mtu);
        (changed, frame.bytes().to_vec())
    };
    for (options, at) in [
        (&[2, 4, 5, 180][..], 56),
        (&[1, 2, 4, 5, 180, 0, 0, 0], 57),
        (&[3, 3, 7, 2, 4, 5, 180, 0], 59),
    ] {
        let bytes = syn(options);
        assert!(right(&bytes));
        let (changed, after) = clamp(&bytes, 1450);
        assert!(changed && right(&after), "{options:?}");
        assert_eq!(after[at..at + 2], 1410u16.to_be_bytes());
        assert_eq!(clamp(&bytes, 1500), (false, bytes.clone()));
        assert_eq!(clamp(&bytes, 9000), (false, bytes));
    }
    for broken in [&[2, 4, 5][..], &[2, 0, 0, 0], &[3, 99, 0, 0], &[]] {
        let mut padded = broken.to_vec();
        padded.resize(broken.len().next_multiple_of(4), 0);
        let bytes = syn(&padded);
        let (_, after) = clamp(&bytes, 1450);
        assert!(right(&after), "{broken:?}");
    }
}

#[test]
fn m07_a_router_that_quotes_our_packet_is_believed_and_no_one_else() {
    for underlay in [Family::V4, Family::V6] {
        let (a, _) = pair(TunnelProtocol::Vxlan, underlay);
        let overlay = a.pipeline.tables().overlay();
        let bytes = inner(Family::V4).payload(&[1; 600]).build();
        let (outer, _) = wrapped(&a, &mut Buffer::new(&bytes, 16), 0).unwrap();
        let (router, own, kind, code) = match underlay {
            Family::V4 => ("192.168.0.254", "192.168.0.1", 3, 4),
            Family::V6 => ("fd99::fe", "fd99::1", 2, 0),
        };
        let error = |quote: &[u8]| {
            Builder::from(1, router, own)
                .icmp(kind, code, 1400)
                .payload(quote)
                .build()
        };
        let complaint = |bytes: &[u8]| {
            let mut buffer = Buffer::new(bytes, 1);
            let frame = buffer.frame();
            decap::complaint(&frame, &packet(&frame), overlay)
        };
        let heard = complaint(&error(&outer[14..200])).unwrap();
        assert_eq!((heard.peer, heard.mtu), (PeerId(2), 1400));
        let shortest = if underlay == Family::V4 { 28 } else { 48 };
        assert!(complaint(&error(&outer[14..14 + shortest])).is_some());
        let udp = if underlay == Family::V4 { 20 } else { 40 };
        for (what, at) in [
            ("source", udp - 9),
            ("destination", udp - 1),
            ("port", udp + 3),
        ] {
            let mut other = outer[14..200].to_vec();
            let at = if what == "source" && underlay == Family::V6 {
                23
            } else if what == "source" {
                15
            } else {
                at
            };
            other[at] ^= 0x40;
            assert_eq!(complaint(&error(&other)), None, "{what}");
        }
        let mut wrong = error(&outer[14..200]);
        let last = wrong.len() - 1;
        wrong[last] ^= 1;
        assert_eq!(complaint(&wrong), None, "checksum");
    }
}

#[test]
fn m07_what_a_router_said_only_lowers_and_is_forgotten_after_ten_minutes() {
    use sluice_appliance::mtu::MEMORY;
    use sluice_appliance::time::{Duration, Instant};
    let mut memory = vec![0u8; 4096];
    let mut learned = Learned::new(&mut Arena::new(&mut memory), 8).unwrap();
    let start = Instant::from_micros(5);
    let (peer, four) = (PeerId(3), Address::v4([192, 168, 0, 2]));
    assert!(learned.lower(peer, four, 1500, 1400, start));
    assert_eq!(learned.path(peer, four, 1500), 1400);
    assert!(!learned.lower(peer, four, 1500, 1450, start), "never up");
    assert!(
        learned.lower(peer, four, 1500, 60, start),
        "but not below what is sane"
    );
    assert_eq!(learned.path(peer, four, 1500), 552);
    let moved = Address::v4([192, 168, 0, 7]);
    assert_eq!(learned.path(peer, moved, 1500), 1500, "another path");
    assert_eq!(learned.path(peer, four, 500), 500);
    learned.age(start + MEMORY - Duration::from_secs(1), 8);
    assert_eq!(learned.path(peer, four, 1500), 552);
    learned.age(start + MEMORY, 8);
    assert_eq!(learned.path(peer, four, 1500), 1500);
}

#[test]
fn rows_that_others_refer_to_stay_and_nonsense_is_refused_naming_the_field() {
    let mut bench = node(1, Family::V4, tunnel(1, TunnelProtocol::Vxlan));
    let mut refused = |message: ToGuest| match bench.change(&[message]) {
        sluice_appliance::apply::Outcome::Refused(_, reject) => (reject.field, reject.reason),
        other => panic!("{other:?}"),
    };
    let remove = |key| ToGuest::Remove(Key::Overlay(key));
    let in_use = |key| match key {
        OverlayKey::Peer(_) => (Field::Peer, RejectReason::InUse(2)),
        _ => (Field::NextHop, RejectReason::InUse(1)),
    };
    for key in [
        OverlayKey::Peer(PeerId(2)),
        OverlayKey::NextHop(NextHopId(4)),
    ] {
        assert_eq!(refused(remove(key)), in_use(key));
    }
    let put = |row| ToGuest::Put(Row::Overlay(row));
    let peer = PeerRow {
        id: PeerId(5),
        address: ip("192.168.0.2"),
        mac: mac(1),
        next_hop: NextHopId(4),
        mtu: 1500,
        direct: false,
    };
    for (row, expected) in [
        (peer, (Field::Address, RejectReason::Taken)),
        (
            PeerRow {
                address: ip("224.0.0.1"),
                ..peer
            },
            (Field::Address, RejectReason::Invalid),
        ),
        (
            PeerRow { mtu: 100, ..peer },
            (Field::Mtu, RejectReason::Invalid),
        ),
        (
            PeerRow {
                address: ip("192.168.0.3"),
                next_hop: NextHopId(9),
                ..peer
            },
            (Field::NextHop, RejectReason::Missing),
        ),
        (
            PeerRow {
                id: PeerId(60_000),
                ..peer
            },
            (Field::Id, RejectReason::Full(256)),
        ),
    ] {
        assert_eq!(refused(put(OverlayRow::Peer(row))), expected, "{row:?}");
    }
    let remote = RemoteRow {
        prefix: prefix("10.9.0.0/24"),
        peer: PeerId(9),
    };
    let row = OverlayRow::Remote(remote);
    assert_eq!(refused(put(row)), (Field::Peer, RejectReason::Missing));
    let row = OverlayRow::Tunnel(TunnelRow {
        vni: 1 << 24,
        ..TunnelRow::default()
    });
    assert_eq!(refused(put(row)), (Field::Id, RejectReason::Invalid));
}

#[test]
fn o17_a_next_hop_that_does_not_answer_is_told_and_one_that_moved_is_followed() {
    let mut bench = node(1, Family::V4, tunnel(1, TunnelProtocol::Vxlan));
    let hop = |mac| {
        Row::Overlay(OverlayRow::NextHop(NextHopRow {
            id: NextHopId(4),
            address: ip("192.168.0.2"),
            mac,
        }))
    };
    bench.commit(&[hop(None)]);
    let exit = |bench: &Bench| {
        bench
            .pipeline
            .tables()
            .overlay()
            .exit(PeerId(2), 1500, &nothing_learned())
    };
    assert_eq!(exit(&bench), Err(DropReason::NoNeighbor));
    bench.commit(&[hop(Some(mac(0x77)))]);
    assert_eq!(exit(&bench).unwrap().next_hop, mac(0x77));
    assert_eq!(exit(&bench).unwrap().mtu, 1450);
}

#[test]
fn o10_a_direct_peer_gets_bare_frames() {
    let mut bench = node(1, Family::V4, tunnel(1, TunnelProtocol::Vxlan));
    let row = PeerRow {
        id: PeerId(2),
        address: ip("192.168.0.2"),
        mac: mac(0x12),
        next_hop: NextHopId(4),
        mtu: 1500,
        direct: true,
    };
    bench.commit(&[Row::Overlay(OverlayRow::Peer(row))]);
    let bytes = inner(Family::V4).build();
    let (sent, _) = wrapped(&bench, &mut Buffer::new(&bytes, 16), 0).unwrap();
    assert_eq!(sent[14..], bytes[14..]);
    assert_eq!(sent[..12], [mac(2).0, mac(0xee).0].concat());
    let overlay = bench.pipeline.tables().overlay();
    assert_eq!(
        overlay
            .exit(PeerId(2), 1500, &nothing_learned())
            .unwrap()
            .mtu,
        1500
    );
}

proptest! {
    #[test]
    fn noise_from_a_known_peer_ends_without_panic(
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        which in 0..5usize,
        six: bool,
    ) {
        let protocol = PROTOCOLS[which];
        let underlay = if six { Family::V6 } else { Family::V4 };
        let mut row = tunnel(2, protocol);
        row.zero_checksum6 = true;
        let b = node(2, underlay, row);
        let (from, to) = if six { ("fd99::1", "fd99::2") } else { ("192.168.0.1", "192.168.0.2") };
        let builder = Builder::from(1, from, to).payload(&noise);
        let mut outer = match protocol {
            TunnelProtocol::IpIp => builder.raw(if noise.len() % 2 == 0 { 4 } else { 41 }).build(),
            _ => builder.udp(50_000, 4789).build(),
        };
        let udp = if six { 54 } else { 34 };
        if protocol != TunnelProtocol::IpIp {
            outer[udp + 6..udp + 8].fill(0);
        }
        if let Ok((bytes, offload, _)) = unwrapped(&b, &outer, Offload::default()) {
            let mut buffer = Buffer::new(&bytes, 1);
            buffer.offload = offload;
            let _ = parse::parse(&buffer.frame());
        }
    }
}
