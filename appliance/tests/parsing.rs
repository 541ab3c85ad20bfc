//! The parser against noise, and against an independent parser of the same headers.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use sluice_appliance::parse::{Fragment, Parsed, Transport, parse};
use sluice_appliance::testing::{self, Builder, Segment, address};
use sluice_appliance::wire::ipv6;
use sluice_appliance::{Address, Family, Frame, Offload};
use sluice_contract::LinkId;

fn parse_bytes(bytes: &[u8]) -> Result<Parsed, sluice_contract::DropReason> {
    let mut copy = bytes.to_vec();
    let end = copy.len();
    let frame = Frame::new(&mut copy, 0, end, 0, LinkId::HOST, Offload::default()).unwrap();
    parse(&frame)
}

/// What we accept means the same to etherparse.
fn agrees(bytes: &[u8]) -> Result<(), TestCaseError> {
    let Ok(Parsed::Ip(packet)) = parse_bytes(bytes) else {
        return Ok(());
    };
    if packet.fragment == Fragment::Later && matches!(packet.protocol, 0 | 43 | 44 | 51 | 60) {
        // It reads headers in the middle of a datagram, where there are none.
        return Ok(());
    }
    if packet.family == Family::V4 && packet.protocol == 51 {
        // It looks behind IPv4's authentication header; we do not.
        return Ok(());
    }
    let foreign_icmp = packet.protocol == if packet.family == Family::V4 { 58 } else { 1 };
    if foreign_icmp {
        // It reads ICMP of the other family; to us that is a protocol like any other.
        prop_assert_eq!(packet.transport, Transport::Opaque);
        return Ok(());
    }
    if packet.family == Family::V4
        && matches!(packet.transport, Transport::Icmp { kind: 13 | 14, .. })
    {
        // It refuses timestamps of another length than theirs.
        return Ok(());
    }
    if packet.family == Family::V6 && has_odd_fragment_header(bytes) {
        return Ok(());
    }
    let other = SlicedPacket::from_ethernet(bytes);
    prop_assert!(other.is_ok(), "{packet:?} {other:?}");
    let other = other.unwrap();
    let (source, destination, hops, number, payload) = match other.net.as_ref().unwrap() {
        NetSlice::Ipv4(v4) => (
            Address::from(v4.header().source_addr()),
            Address::from(v4.header().destination_addr()),
            v4.header().ttl(),
            v4.payload_ip_number().0,
            v4.payload().payload.len(),
        ),
        NetSlice::Ipv6(v6) => (
            Address::from(v6.header().source_addr()),
            Address::from(v6.header().destination_addr()),
            v6.header().hop_limit(),
            v6.payload().ip_number.0,
            v6.payload().payload.len(),
        ),
        NetSlice::Arp(_) => return Err(TestCaseError::fail("ARP is not IP")),
    };
    prop_assert_eq!(
        (packet.source, packet.destination, packet.hops),
        (source, destination, hops)
    );
    prop_assert_eq!(packet.protocol, number);
    prop_assert_eq!(packet.end as usize - usize::from(packet.payload), payload);
    let ours = packet.transport;
    let same = match &other.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            ours.ports() == Some((tcp.source_port(), tcp.destination_port()))
                && matches!(ours, Transport::Tcp { .. })
        }
        Some(TransportSlice::Udp(udp)) => {
            let (source, destination) = (udp.source_port(), udp.destination_port());
            ours == Transport::Udp {
                source,
                destination,
            }
        }
        Some(TransportSlice::Icmpv4(icmp)) => is_icmp(ours, icmp.type_u8(), icmp.code_u8()),
        Some(TransportSlice::Icmpv6(icmp)) => is_icmp(ours, icmp.type_u8(), icmp.code_u8()),
        // It takes no transport header out of a fragment; we do, out of the first.
        None => {
            packet.fragment != Fragment::Whole
                || matches!(
                    ours,
                    Transport::Opaque | Transport::Sctp { .. } | Transport::Icmp { .. }
                )
        }
    };
    prop_assert!(same, "{:?} {:?}", ours, other.transport);
    Ok(())
}

/// Whether the other parser mistakes the first fragment header: it looks for the reserved bits (RFC 8200 §4.5: two, before the last
/// one) among those of the offset, so it takes some whole datagrams for pieces and some pieces for whole datagrams.
fn has_odd_fragment_header(bytes: &[u8]) -> bool {
    const FRAGMENT: u8 = 44;
    let (Some(next), Some(field)) = (bytes.get(20), bytes.get(56..58)) else {
        return false;
    };
    let field = field
        .iter()
        .fold(0, |all, byte| all << 8 | u16::from(*byte));
    *next == FRAGMENT && (field & 0xfff9 != 0) != (field & 0xff9f != 0)
}

fn is_icmp(ours: Transport, wanted_kind: u8, wanted_code: u8) -> bool {
    matches!(ours, Transport::Icmp { kind, code, .. } if (kind, code) == (wanted_kind, wanted_code))
}

fn segment() -> impl Strategy<Value = Segment> {
    prop_oneof![
        any::<(u16, u16, u32, u32, u8)>().prop_map(
            |(source, destination, sequence, acknowledgment, flags)| {
                Segment::Tcp {
                    source,
                    destination,
                    sequence,
                    acknowledgment,
                    flags,
                }
            }
        ),
        any::<(u16, u16)>().prop_map(|(source, destination)| Segment::Udp {
            source,
            destination
        }),
        any::<(u16, u16)>().prop_map(|(source, destination)| Segment::Sctp {
            source,
            destination,
            tag: 7
        }),
        any::<(u8, u8, u32)>().prop_map(|(kind, code, rest)| Segment::Icmp(kind, code, rest)),
        any::<u8>().prop_map(Segment::Raw),
    ]
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let addresses = prop_oneof![Just(("10.0.0.1", "10.0.0.2")), Just(("fd00::1", "fd00::2")),];
    let fragment = prop_oneof![3 => Just((0x4000u16, None)), 1 => any::<(u16, u16, u32)>().prop_map(|(a, b, c)| (a, Some((b, c))))];
    let bytes = proptest::collection::vec(any::<u8>(), 0..120);
    let damage = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (
        addresses,
        segment(),
        fragment,
        bytes,
        0..3usize,
        damage,
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(
            |(
                (from, to),
                transport,
                (fragment, fragment6),
                payload,
                options,
                damage,
                cut,
                whole,
            )| {
                let mut builder = Builder::from(16, from, to).payload(&payload);
                builder.transport = transport;
                builder.fragment = fragment;
                builder.fragment6 = fragment6;
                builder.options = vec![1; options * 4];
                let mut bytes = builder.build();
                for (at, byte) in damage {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
                if !whole {
                    bytes.truncate(cut.index(bytes.len()));
                }
                bytes
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_bytes(&bytes);
    }

    #[test]
    fn v04_accepted_frames_mean_the_same_to_another_parser(bytes in frame()) {
        agrees(&bytes)?;
    }

    #[test]
    fn every_short_prefix_of_a_packet_is_refused(segment in segment(), v6: bool, payload in 0..60usize) {
        let (from, to) = if v6 { ("fd00::1", "fd00::2") } else { ("10.0.0.1", "10.0.0.2") };
        let mut builder = Builder::from(16, from, to).payload(&vec![0; payload]);
        builder.transport = segment;
        let bytes = builder.build();
        for length in 0..bytes.len() {
            prop_assert!(parse_bytes(&bytes[..length]).is_err());
        }
    }

    #[test]
    fn the_extension_header_walk_is_bounded(next: u8, bytes in proptest::collection::vec(prop_oneof![Just(0u8), Just(60), Just(43), Just(44), Just(51), any::<u8>()], 0..400)) {
        if let Ok(upper) = ipv6::walk(next, &bytes) {
            prop_assert!(upper.offset <= bytes.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn z08_noise_and_broken_packets_end_in_exactly_one_counter(frames in proptest::collection::vec((frame(), any::<u8>(), any::<u8>()), 1..20)) {
        let mut bytes = Vec::new();
        for (frame, link, offload) in frames {
            bytes.extend_from_slice(&[(frame.len() / 2) as u8, link, offload]);
            bytes.extend_from_slice(&frame[..frame.len() / 2 * 2]);
        }
        testing::fuzz_frames(&bytes);
    }
}

#[test]
fn v04_a_chain_of_extension_headers_is_walked_to_the_transport() {
    let mut builder = Builder::from(16, "fd00::1", "fd00::2").raw(0);
    // Hop-by-hop, destination options, authentication, routing of type 4, then UDP.
    builder
        .payload
        .extend_from_slice(&[60, 0, 1, 4, 0, 0, 0, 0]);
    builder
        .payload
        .extend_from_slice(&[51, 0, 1, 4, 0, 0, 0, 0]);
    builder.payload.extend_from_slice(&[43, 4]);
    builder.payload.extend_from_slice(&[0; 22]);
    builder
        .payload
        .extend_from_slice(&[17, 0, 4, 0, 0, 0, 0, 0]);
    builder.payload.extend_from_slice(&[0, 7, 0, 9, 0, 8, 0, 0]);
    let Ok(Parsed::Ip(packet)) = parse_bytes(&builder.build()) else {
        panic!("refused")
    };
    assert_eq!(
        packet.transport,
        Transport::Udp {
            source: 7,
            destination: 9
        }
    );
    assert_eq!(packet.destination, address("fd00::2"));
}
