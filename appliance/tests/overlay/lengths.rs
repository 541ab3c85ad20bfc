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
                .icmp(kind, code, 640)
                .payload(quote)
                .build()
        };
        let complaint = |bytes: &[u8]| {
            let mut buffer = Buffer::new(bytes, 1);
            let frame = buffer.frame();
            decap::complaint(&frame, &packet(&frame), overlay)
        };
        let heard = complaint(&error(&outer[14..200])).unwrap();
        assert_eq!(
            (heard.peer, heard.mtu, heard.genuine),
            (PeerId(2), 640, true)
        );
        let shortest = if underlay == Family::V4 { 28 } else { 48 };
        let is_genuine = |quote: &[u8]| complaint(&error(quote)).unwrap().genuine;
        assert!(is_genuine(&outer[14..14 + shortest]));
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
        // Everything may be guessed but the mark, which goes with the source port; and what fits is no reason.
        let (mark, length) = match underlay {
            Family::V4 => (4..6, 2),
            Family::V6 => (1..4, 4),
        };
        let source_port = udp + 1;
        for at in mark.chain([source_port]) {
            let mut guess = outer[14..200].to_vec();
            guess[at] ^= if at == 1 { 1 } else { 0x80 };
            assert!(!is_genuine(&guess), "octet {at}");
        }
        let mut short = outer[14..200].to_vec();
        short[length..length + 2].copy_from_slice(&500u16.to_be_bytes());
        assert!(!is_genuine(&short));
        if underlay == Family::V4 {
            // The kernel counts the identification up when it cuts a large frame.
            let mut later = outer[14..200].to_vec();
            let id = u16::from_be_bytes([later[4], later[5]]).wrapping_add(40);
            later[4..6].copy_from_slice(&id.to_be_bytes());
            assert!(is_genuine(&later));
        }
        let mut wrong = error(&outer[14..200]);
        let last = wrong.len() - 1;
        wrong[last] ^= 1;
        assert_eq!(complaint(&wrong), None, "checksum");
    }
}

#[test]
fn m07_what_a_router_said_only_lowers_and_is_forgotten_in_time() {
    use sluice_appliance::mtu::MEMORY;
    use sluice_appliance::time::{Duration, Instant};
    let mut memory = vec![0u8; 4096];
    let mut learned = Learned::new(&mut Arena::new(&mut memory), 8).unwrap();
    let start = Instant::from_micros(5);
    let until = start + MEMORY;
    let (peer, four) = (PeerId(3), Address::v4([192, 168, 0, 2]));
    let (at, sizes) = ((peer, four), (1500, 50));
    assert!(learned.lower(at, sizes, 1400, until));
    assert_eq!(learned.path(peer, four, 1500), 1400);
    assert!(!learned.lower(at, sizes, 1450, until), "never up");
    assert!(
        learned.lower(at, sizes, 60, until),
        "but what travels inside may have 1280 octets"
    );
    assert_eq!(learned.path(peer, four, 1500), 1330);
    let moved = Address::v4([192, 168, 0, 7]);
    assert_eq!(learned.path(peer, moved, 1500), 1500, "another path");
    assert_eq!(learned.path(peer, four, 500), 500);
    learned.age(until - Duration::from_secs(1), 8);
    assert_eq!(learned.path(peer, four, 1500), 1330);
    learned.age(until, 8);
    assert_eq!(learned.path(peer, four, 1500), 1500);
}
