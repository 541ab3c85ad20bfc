//! Tunnels between two appliances: what one wraps the other unwraps, and nothing that is not a known node's gets in.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod ground;
mod lengths;
mod peers;

use crate::ground::*;
use proptest::prelude::*;
use sluice_appliance::decap::{self};
use sluice_appliance::frame::{Gso, GsoKind, Offload, Partial, TunnelKind};
use sluice_appliance::hash::Hasher;
use sluice_appliance::parse::{self};
use sluice_appliance::testing::Builder;
use sluice_appliance::wire::checksum;
use sluice_appliance::{Family, encap, mtu};
use sluice_contract::overlay::{GENEVE_CLASS, PeerId, TunnelProtocol};
use sluice_contract::{DropReason, Identity, Mac};

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
