//! Frames in, frames and counters out: the minimal forwarding between pods of one node, in both families.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::testing::{Bench, Builder, address, pod_row};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::{checksum, ethernet, icmp, ipv4, protocol, tcp};
use sluice_appliance::{Family, Gso, GsoKind, Offload, Partial, Verdict};
use sluice_contract::{DropReason, LinkId, Mac, Row};

const V4: (&str, &str) = ("10.0.0.1", "10.0.0.2");
const V6: (&str, &str) = ("fd00::1", "fd00::2");

/// The IP header's checksum and the transport's, over a whole frame.
fn checksums_hold(frame: &[u8]) -> bool {
    let sliced = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
    let (source, destination, payload) = match sliced.net.as_ref().unwrap() {
        etherparse::NetSlice::Ipv4(v4) => {
            let header = v4.header().to_header();
            assert_eq!(header.calc_header_checksum(), header.header_checksum);
            (
                address(&v4.header().source_addr().to_string()),
                address(&v4.header().destination_addr().to_string()),
                v4.payload(),
            )
        }
        etherparse::NetSlice::Ipv6(v6) => (
            address(&v6.header().source_addr().to_string()),
            address(&v6.header().destination_addr().to_string()),
            v6.payload(),
        ),
        etherparse::NetSlice::Arp(_) => return true,
    };
    let number = payload.ip_number.0;
    let pseudo = if number == protocol::ICMP {
        0
    } else {
        checksum::pseudo(source, destination, number, payload.payload.len())
    };
    checksum::finish(checksum::sum(payload.payload, pseudo)) == 0
}

fn arp(sender_mac: Mac, sender: [u8; 4], target: [u8; 4], operation: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&Mac::BROADCAST.0);
    bytes.extend_from_slice(&sender_mac.0);
    bytes.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4]);
    bytes.extend_from_slice(&operation.to_be_bytes());
    bytes.extend_from_slice(&sender_mac.0);
    bytes.extend_from_slice(&sender);
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(&target);
    bytes
}

fn pod(n: u16) -> Mac {
    Mac::of_pod(LinkId::new(n).unwrap())
}

#[test]
fn w03_arp_for_the_gateway_is_answered_with_its_mac() {
    let mut bench = Bench::pods();
    let end = bench.send(16, &arp(pod(16), [10, 0, 0, 1], [169, 254, 1, 1], 1));
    let reply = end.replied();
    let mut expected = Vec::new();
    expected.extend_from_slice(&pod(16).0);
    expected.extend_from_slice(&Mac::GATEWAY.0);
    expected.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    expected.extend_from_slice(&Mac::GATEWAY.0);
    expected.extend_from_slice(&[169, 254, 1, 1]);
    expected.extend_from_slice(&pod(16).0);
    expected.extend_from_slice(&[10, 0, 0, 1]);
    assert_eq!(reply, expected);
}

#[test]
fn w03_arp_for_anything_else_is_not_answered() {
    let mut bench = Bench::pods();
    let cases = [
        (
            arp(pod(16), [10, 0, 0, 1], [10, 0, 0, 2], 1),
            DropReason::NeighborIgnored,
        ),
        // Gratuitous, both ways it is done.
        (
            arp(pod(16), [10, 0, 0, 1], [10, 0, 0, 1], 1),
            DropReason::NeighborIgnored,
        ),
        (
            arp(pod(16), [10, 0, 0, 1], [10, 0, 0, 1], 2),
            DropReason::NeighborIgnored,
        ),
        (
            arp(pod(16), [10, 0, 0, 1], [169, 254, 1, 1], 2),
            DropReason::NeighborIgnored,
        ),
        (
            arp(pod(16), [10, 0, 0, 2], [169, 254, 1, 1], 1),
            DropReason::Spoof,
        ),
        (
            arp(pod(17), [10, 0, 0, 1], [169, 254, 1, 1], 1),
            DropReason::Spoof,
        ),
    ];
    for (frame, reason) in cases {
        assert_eq!(bench.send(16, &frame).dropped(), reason);
    }
    // The pod's gratuitous ARP changed nothing: packets to it still carry its own MAC.
    let end = bench.send(17, &Builder::from(17, "10.0.0.2", "10.0.0.1").build());
    assert_eq!(&end.forwarded(16)[..6], &pod(16).0);
}

fn solicitation(source: &str, target: &str) -> Vec<u8> {
    let mut payload = address(target).0.to_vec();
    if source != "::" {
        payload.extend_from_slice(&[1, 1]);
        payload.extend_from_slice(&pod(16).0);
    }
    Builder::from(16, source, "ff02::1:ff00:1")
        .macs(pod(16), Mac([0x33, 0x33, 0xff, 0, 0, 1]))
        .icmp(135, 0, 0)
        .hops(255)
        .payload(&payload)
        .build()
}

#[test]
fn w03_neighbor_solicitation_for_the_gateway_is_answered() {
    for source in ["fd00::1", "fe80::53:4cff:fe01:10"] {
        let mut bench = Bench::pods();
        let end = bench.send(16, &solicitation(source, "fe80::1"));
        let reply = end.replied();
        assert!(checksums_hold(reply));
        assert_eq!(&reply[..6], &pod(16).0);
        assert_eq!(&reply[6..12], &Mac::GATEWAY.0);
        assert_eq!(reply[21], 255);
        assert_eq!(&reply[22..38], &address("fe80::1").0);
        assert_eq!(&reply[38..54], &address(source).0);
        assert_eq!(&reply[54..56], &[136, 0]);
        assert_eq!(reply[58], 0xe0, "router, solicited, override");
        assert_eq!(&reply[62..78], &address("fe80::1").0);
        assert_eq!(&reply[78..86], &[2, 1, 2, 0x53, 0x4c, 0, 0, 1]);
        assert_eq!(reply.len(), 86);
    }
}

#[test]
fn v03_neighbor_discovery_that_is_not_for_the_gateway_is_ignored_or_refused() {
    let mut bench = Bench::pods();
    let duplicate_probe = solicitation("::", "fe80::53:4cff:fe01:10");
    assert_eq!(
        bench.send(16, &duplicate_probe).dropped(),
        DropReason::NeighborIgnored
    );
    let probe_for_ours = solicitation("::", "fe80::1");
    assert_eq!(
        bench.send(16, &probe_for_ours).dropped(),
        DropReason::NeighborIgnored
    );
    let other = solicitation("fd00::1", "fd00::2");
    assert_eq!(
        bench.send(16, &other).dropped(),
        DropReason::NeighborIgnored
    );
    let spoofed = solicitation("fd00::2", "fe80::1");
    assert_eq!(bench.send(16, &spoofed).dropped(), DropReason::Spoof);
    let mut broken = solicitation("fd00::1", "fe80::1");
    broken[56] ^= 1;
    assert_eq!(bench.send(16, &broken).dropped(), DropReason::Malformed);
}

#[test]
fn v03_rogue_router_is_dropped() {
    let mut bench = Bench::pods();
    for kind in [134, 137] {
        let frame = Builder::from(16, "fe80::2", "ff02::1")
            .macs(pod(16), Mac([0x33, 0x33, 0, 0, 0, 1]))
            .icmp(kind, 0, 0x4000_0708)
            .hops(255)
            .payload(&[0; 24])
            .build();
        assert_eq!(bench.send(16, &frame).dropped(), DropReason::RogueRouter);
    }
    for kind in [133, 136] {
        let frame = Builder::from(16, "fe80::2", "ff02::2")
            .macs(pod(16), Mac([0x33, 0x33, 0, 0, 0, 2]))
            .icmp(kind, 0, 0)
            .hops(255)
            .payload(&[0; 16])
            .build();
        assert_eq!(
            bench.send(16, &frame).dropped(),
            DropReason::NeighborIgnored
        );
    }
}

#[test]
fn w04_pod_to_pod_loses_one_hop_and_nothing_else() {
    for (from, to) in [V4, V6] {
        let mut bench = Bench::pods();
        let sent = Builder::from(16, from, to)
            .udp(1, 2)
            .payload(b"payload")
            .build();
        let end = bench.send(16, &sent);
        let got = end.forwarded(17);
        assert!(checksums_hold(got));
        let mut expected = sent.clone();
        expected[..6].copy_from_slice(&pod(17).0);
        expected[6..12].copy_from_slice(&Mac::GATEWAY.0);
        if from == V4.0 {
            expected[22] = 63;
            expected[24..26].copy_from_slice(&got[24..26]);
        } else {
            expected[21] = 63;
        }
        assert_eq!(got, expected);
        assert_eq!(
            bench.pipeline.stats().link(LinkId::new(17).unwrap()).sent,
            1
        );
        assert_eq!(bench.pipeline.stats().forwarded(), 1);
    }
}

#[test]
fn w07_spoofed_frames_are_dropped() {
    let mut bench = Bench::pods();
    let cases = [
        Builder::from(16, "10.0.0.2", "10.0.0.3"),
        Builder::from(16, "192.168.0.1", "10.0.0.3"),
        Builder::from(17, "10.0.0.1", "10.0.0.2"),
        Builder::from(16, "fd00::2", "fd00::3"),
        // Link-local goes to the gateway and no further.
        Builder::from(16, "fe80::1234", "fd00::2"),
        Builder::from(16, "10.0.0.1", "10.0.0.2").macs(Mac::GATEWAY, Mac::GATEWAY),
    ];
    for case in cases {
        assert_eq!(
            bench.send(16, &case.build()).dropped(),
            DropReason::Spoof,
            "{case:?}"
        );
    }
}

#[test]
fn gateway_answers_ping_and_nothing_else() {
    for (pod_address, gateway) in [
        ("10.0.0.1", "169.254.1.1"),
        ("fd00::1", "fe80::1"),
        ("fe80::53:4cff:fe01:10", "fe80::1"),
    ] {
        let mut bench = Bench::pods();
        let ping = Builder::from(16, pod_address, gateway)
            .echo(9, 1)
            .payload(b"0123456")
            .build();
        let end = bench.send(16, &ping);
        let reply = end.replied();
        assert!(checksums_hold(reply), "{gateway}");
        let back = etherparse::SlicedPacket::from_ethernet(reply).unwrap();
        let (kind, payload) = match back.transport.unwrap() {
            etherparse::TransportSlice::Icmpv4(icmp) => (icmp.type_u8(), icmp.payload().to_vec()),
            etherparse::TransportSlice::Icmpv6(icmp) => (icmp.type_u8(), icmp.payload().to_vec()),
            _ => unreachable!(),
        };
        assert!(matches!(kind, 0 | 129));
        assert_eq!(payload, b"0123456");
        assert_eq!(&reply[..6], &pod(16).0);
        let other = Builder::from(16, pod_address, gateway)
            .tcp(1, 80, tcp::SYN)
            .build();
        assert_eq!(
            bench.send(16, &other).dropped(),
            DropReason::GatewayNotServed
        );
    }
}

#[test]
fn ttl_that_runs_out_is_reported_to_the_sender() {
    for (from, to) in [V4, V6] {
        let mut bench = Bench::pods();
        let sent = Builder::from(16, from, to)
            .udp(1, 2)
            .hops(1)
            .payload(&[1; 32])
            .build();
        let end = bench.send(16, &sent);
        let reply = end.replied();
        assert!(checksums_hold(reply));
        let (network, kind) = if from == V4.0 { (20, 11) } else { (40, 3) };
        assert_eq!(&reply[14 + network..][..2], &[kind, 0]);
        assert_eq!(
            &reply[14 + network + 8..],
            &sent[14..],
            "the packet is quoted as it came"
        );
    }
}

#[test]
fn m05_too_big_is_reported_with_the_links_mtu() {
    for (from, to) in [V4, V6] {
        let mut bench = Bench::pods();
        let mut small = pod_row(17, 2);
        small.mtu = 1400;
        bench.commit(&[Row::Link(small)]);
        let fits = 1400 - 8 - if from == V4.0 { 20 } else { 40 };
        let frame = |size| {
            Builder::from(16, from, to)
                .udp(1, 2)
                .payload(&vec![7; size])
                .build()
        };
        bench.send(16, &frame(fits)).forwarded(17);
        let sent = frame(fits + 1);
        let end = bench.send(16, &sent);
        let reply = end.replied();
        assert!(checksums_hold(reply));
        if from == V4.0 {
            assert_eq!(&reply[34..36], &[3, 4]);
            assert_eq!(&reply[40..42], &1400u16.to_be_bytes());
            assert_eq!(reply.len(), 14 + 576);
            assert_eq!(&reply[42..], &sent[14..14 + 548]);
        } else {
            assert_eq!(&reply[54..56], &[2, 0]);
            assert_eq!(&reply[58..62], &1400u32.to_be_bytes());
            assert_eq!(reply.len(), 14 + 1280);
        }
        // At most one in 10 ms for one flow.
        assert_eq!(bench.send(16, &sent).dropped(), DropReason::TooBig);
        bench.wait(Duration::from_millis(10));
        bench.send(16, &sent).replied();
    }
}

#[test]
fn gso_frames_are_measured_by_their_segments_and_keep_their_metadata() {
    let mut bench = Bench::pods();
    let gso = |size| Offload {
        partial: Some(Partial {
            start: 34,
            offset: 16,
        }),
        verified: false,
        gso: Some(Gso {
            kind: GsoKind::Tcp4,
            size,
            header: 54,
            ecn: false,
        }),
        tunnel: None,
    };
    let mut frame = Builder::from(16, V4.0, V4.1)
        .tcp(1, 2, tcp::ACK)
        .numbers(1000, 500)
        .payload(&[3; 1000])
        .build();
    // 60 KiB more lie in further buffers.
    let total = u16::try_from(frame.len() - 14 + 60_000).unwrap();
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[24..26].fill(0);
    let sum = checksum::finish(checksum::sum(&frame[14..34], 0));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    for (from, source, destination, flags, numbers) in [
        (16, V4.0, V4.1, tcp::SYN, (999, 0)),
        (17, V4.1, V4.0, tcp::SYN | tcp::ACK, (499, 1000)),
    ] {
        let (to, ports) = if from == 16 {
            (17, (1, 2))
        } else {
            (16, (2, 1))
        };
        let builder = Builder::from(from, source, destination).tcp(ports.0, ports.1, flags);
        bench
            .send(from, &builder.numbers(numbers.0, numbers.1).build())
            .forwarded(to);
    }
    let end = bench.send_with(16, &frame, 60_000, gso(1460));
    end.forwarded(17);
    assert_eq!(end.offload, gso(1460));
    assert_eq!(
        bench.send_with(16, &frame, 60_000, gso(1461)).verdict,
        Verdict::Reply
    );
    let lies = [
        gso(0),
        Offload {
            gso: gso(1).gso.map(|g| Gso {
                kind: GsoKind::Tcp6,
                ..g
            }),
            ..gso(1)
        },
    ];
    for lie in lies {
        let end = bench.send_with(16, &frame, 60_000, lie);
        assert_eq!(end.dropped(), DropReason::Malformed);
    }
}

#[test]
fn errors_are_never_reported_about_errors_groups_or_later_fragments() {
    let mut bench = Bench::pods();
    let error = Builder::from(16, V4.0, V4.1)
        .icmp(3, 3, 0)
        .hops(1)
        .payload(&[0; 28])
        .build();
    assert_eq!(bench.send(16, &error).dropped(), DropReason::TtlExpired);
    let error = Builder::from(16, V6.0, V6.1)
        .icmp(1, 4, 0)
        .hops(1)
        .payload(&[0; 48])
        .build();
    assert_eq!(bench.send(16, &error).dropped(), DropReason::TtlExpired);
    // A later fragment quotes no ports, so it is not reported about; its first one is.
    let fragment = |word| {
        let mut fragment = Builder::from(16, V4.0, V4.1).hops(1).payload(&[0; 32]);
        fragment.fragment = word;
        fragment.build()
    };
    bench.send(16, &fragment(ipv4::MF)).replied();
    let later = bench.send(16, &fragment(5));
    assert_eq!(later.dropped(), DropReason::FragmentRefused);
}

#[test]
fn every_other_packet_is_dropped_for_a_reason_of_its_own() {
    let mut bench = Bench::pods();
    let good = Builder::from(16, V4.0, V4.1);
    let mut ethertype = good.build();
    ethertype[12..14].copy_from_slice(&[0x88, 0xcc]);
    let mut vlan = good.build();
    vlan[12..14].copy_from_slice(&ethernet::VLAN.to_be_bytes());
    let mut checksum = good.build();
    checksum[24] ^= 1;
    let mut route = good.clone();
    route.options = vec![131, 7, 4, 1, 2, 3, 4, 0];
    let mut tiny = good.clone().tcp(1, 2, tcp::SYN).payload(&[]);
    tiny.fragment = ipv4::MF;
    let mut tiny = tiny.build();
    tiny.truncate(14 + 20 + 16);
    tiny[16..18].copy_from_slice(&36u16.to_be_bytes());
    tiny[24..26].fill(0);
    let sum = checksum::finish(checksum::sum(&tiny[14..34], 0));
    tiny[24..26].copy_from_slice(&sum.to_be_bytes());
    let mut routing0 = Builder::from(16, V6.0, V6.1).raw(43);
    routing0.payload = vec![17, 0, 0, 1, 0, 0, 0, 0];
    let cases = [
        (vec![0; 13], DropReason::Malformed),
        (ethertype, DropReason::EtherType),
        (vlan, DropReason::VlanTag),
        (checksum, DropReason::BadChecksum),
        (route.build(), DropReason::SourceRoute),
        (tiny, DropReason::FragmentTiny),
        (routing0.build(), DropReason::ExtensionHeaders),
        (
            Builder::from(16, V4.0, "127.0.0.1").build(),
            DropReason::Martian,
        ),
        (
            Builder::from(16, "240.0.0.1", V4.1).build(),
            DropReason::Martian,
        ),
        (Builder::from(16, V6.0, "::1").build(), DropReason::Martian),
        (
            Builder::from(16, V4.0, "224.0.0.1").build(),
            DropReason::Multicast,
        ),
        (
            Builder::from(16, V4.0, "255.255.255.255").build(),
            DropReason::Multicast,
        ),
        (
            Builder::from(16, V6.0, "ff02::fb").build(),
            DropReason::Multicast,
        ),
        (
            Builder::from(16, "fe80::9", "ff02::16")
                .raw(58)
                .payload(&[143, 0, 0, 0, 0, 0, 0, 0])
                .build(),
            DropReason::Multicast,
        ),
        (
            good.clone().macs(pod(16), pod(17)).build(),
            DropReason::NotForUs,
        ),
        (
            Builder::from(16, V4.0, "10.0.0.9").build(),
            DropReason::NoRoute,
        ),
        (
            Builder::from(16, V6.0, "fd00::9").build(),
            DropReason::NoRoute,
        ),
    ];
    for (frame, reason) in cases {
        let before = bench.pipeline.stats().dropped(reason);
        assert_eq!(bench.send(16, &frame).dropped(), reason);
        assert_eq!(bench.pipeline.stats().dropped(reason), before + 1);
    }
    assert_eq!(
        bench.send(99, &good.build()).dropped(),
        DropReason::UnknownLink
    );
}

#[test]
fn families_never_meet() {
    let mut bench = Bench::pods();
    let mapped = Builder::from(16, "fd00::1", "fd00::2").build();
    let mut mapped = mapped;
    mapped[38..54].copy_from_slice(&address("10.0.0.2").0);
    assert_eq!(bench.send(16, &mapped).dropped(), DropReason::Martian);
    assert_eq!(address("10.0.0.2").family(), Family::V4);
    assert_eq!(icmp::v6::ECHO, 128);
}

#[test]
fn questions_are_answered_only_so_often() {
    let mut bench = Bench::pods();
    let ask = arp(pod(16), [10, 0, 0, 1], [169, 254, 1, 1], 1);
    let answered = (0..1000)
        .filter(|_| bench.send(16, &ask).verdict == Verdict::Reply)
        .count();
    assert_eq!(answered, 51);
    assert_eq!(bench.pipeline.stats().dropped(DropReason::RateLimited), 949);
    let other = arp(pod(17), [10, 0, 0, 2], [169, 254, 1, 1], 1);
    bench.send(17, &other).replied();
}
