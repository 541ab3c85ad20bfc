//! How large a packet may be on its way, and who says so.

use crate::ground::*;
use sluice_appliance::decap::{self};
use sluice_appliance::mtu::Learned;
use sluice_appliance::testing::Builder;
use sluice_appliance::wire::checksum;
use sluice_appliance::{Address, Arena, Family, mtu};
use sluice_contract::overlay::{PeerId, TunnelProtocol};

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
