//! What is said about packets, how large they may be, and what becomes of their pieces.

use super::{
    ACK, BOTH, GENEVE, POD, ROUTER, SYN, UPLINK, V4, V6, World, carry, handshake, ip, nic, nodes,
    octets, serve,
};
use sluice_appliance::testing::Builder;
use sluice_appliance::testing::node::{assert_checksums, ends};
use sluice_appliance::wire::checksum;
use sluice_appliance::{Family, Verdict};
use sluice_contract::DropReason;

/// An ICMP error from `source` to `destination` about `quoted`, which is the beginning of an IP packet.
fn error(world: World, link: u16, (source, destination): (&str, &str), quoted: &[u8]) -> Builder {
    let builder = Builder::from(link, source, destination);
    let (kind, code) = match world.family {
        Family::V4 => (3, 3),
        Family::V6 => (1, 4),
    };
    builder.icmp(kind, code, 0).payload(quoted)
}

#[test]
fn s28_errors_about_either_direction_arrive_in_words_of_who_gets_them() {
    for world in BOTH {
        let (mut a, mut b) = nodes(GENEVE);
        let at = world.frontends()[0];
        let asks = world.asks(at).udp(4000, at.1).payload(b"question");
        let sent = a.send(UPLINK, &asks.build());
        let asked = carry(&mut b, &sent).forwarded(POD).to_vec();
        // The pod's: nobody listens there.
        let told = error(world, POD, (world.pods[1], world.client), &asked[14..]);
        let told = b.send(POD, &told.build());
        let bytes = told.forwarded(UPLINK);
        assert_eq!(bytes[..6], ROUTER.0);
        let (outer, inner) = match world.family {
            Family::V4 => (26, 42),
            Family::V6 => (22, 62),
        };
        let node = octets(at.0);
        let length = node.len();
        assert_eq!(bytes[outer..outer + length], node, "the frontend says it");
        let source = inner + outer - 14;
        let quoted = [octets(world.client), node.clone()].concat();
        assert_eq!(bytes[source..source + 2 * length], quoted);
        let ports = [4000u16.to_be_bytes(), at.1.to_be_bytes()].concat();
        assert_eq!(bytes[source + 2 * length..][..4], ports);
        assert_checksums(bytes);
        // The client's, about an answer: it goes to the node asked, and on to the pod.
        let answer = world.answers().udp(8080, 4000).payload(b"answer");
        let answered = b.send(POD, &answer.build());
        let quote = &answered.forwarded(UPLINK)[14..];
        for by in [
            world.client,
            if length == 4 {
                "203.0.113.254"
            } else {
                "2001:db8:99::fe"
            },
        ] {
            let told = error(world, UPLINK, (by, at.0), quote).macs(ROUTER, nic(1));
            let passed = a.send(UPLINK, &told.build());
            let arrived = carry(&mut b, &passed);
            let bytes = arrived.forwarded(POD);
            assert_checksums(bytes);
            let quoted = [octets(world.pods[1]), octets(world.client)].concat();
            assert_eq!(bytes[source..source + 2 * length], quoted);
            assert_eq!(bytes[outer..outer + length], octets(by));
        }
        // About nothing that was said.
        let mut other = quote.to_vec();
        let port = 2 * length + source - inner + 3;
        other[port] ^= 1;
        let told = error(world, UPLINK, (world.client, at.0), &other).macs(ROUTER, nic(1));
        assert_eq!(
            a.send(UPLINK, &told.build()).dropped(),
            DropReason::IcmpUnrelated
        );
    }
}

#[test]
fn s28_what_the_backends_node_tells_the_client_goes_to_the_client() {
    for world in BOTH {
        let (mut a, mut b) = nodes(GENEVE);
        let at = world.frontends()[0];
        handshake(&mut a, &mut b, world, at, 4000);
        // The endpoint is gone there, and the node asked does not know it yet.
        serve(&mut b, |svc, world| {
            svc.cluster = vec![(world.pods[0], 8080)];
        });
        let ack = world.asks(at).tcp(4000, at.1, ACK).numbers(1001, 5001);
        let sent = a.send(UPLINK, &ack.build());
        let reset = carry(&mut b, &sent);
        let bytes = reset.replied();
        assert_eq!(bytes[..12], [ROUTER.0, nic(2).0].concat());
        let expected = (ip(at.0), at.1, ip(world.client), 4000);
        assert_eq!(ends(bytes), expected);
        // A packet whose hops end there.
        let asks = world.asks(at).udp(4001, at.1).hops(2).build();
        let sent = a.send(UPLINK, &asks);
        let told = carry(&mut b, &sent);
        let bytes = told.replied();
        assert_eq!(bytes[..12], [ROUTER.0, nic(2).0].concat());
    }
}

/// A SYN that announces a maximum segment size.
fn announcing(world: World, syn: Builder, mss: u16) -> Vec<u8> {
    let option = [&[2, 4], mss.to_be_bytes().as_slice()].concat();
    let (source, destination) = (syn.source, syn.destination);
    let mut bytes = syn.payload(&option).build();
    let segment = match world.family {
        Family::V4 => &mut bytes[34..],
        Family::V6 => &mut bytes[54..],
    };
    segment[12] = 6 << 4;
    segment[16..18].fill(0);
    let pseudo = checksum::pseudo(source, destination, 6, segment.len());
    let sum = checksum::finish(checksum::sum(segment, pseudo));
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn announced(bytes: &[u8]) -> u16 {
    let option = &bytes[bytes.len() - 4..];
    assert_eq!(option[..2], [2, 4]);
    u16::from_be_bytes([option[2], option[3]])
}

#[test]
fn s28_the_room_that_the_name_takes_is_reckoned_with() {
    for (world, room) in [(V4, 58 + 12), (V6, 58 + 24)] {
        let (mut a, mut b) = nodes(GENEVE);
        let at = world.frontends()[0];
        let headers = if world.family == Family::V4 { 28 } else { 48 };
        let most = 1500 - room;
        let sized = |size: usize| {
            let asks = world.asks(at).udp(4000, at.1);
            asks.payload(&vec![1; size - headers]).build()
        };
        let sent = a.send(UPLINK, &sized(most));
        assert_eq!(sent.forwarded(UPLINK).len(), 1514);
        carry(&mut b, &sent).forwarded(POD);
        let told = a.send(UPLINK, &sized(most + 1));
        let place = if world.family == Family::V4 { 40 } else { 60 };
        let size = u16::try_from(most).unwrap();
        assert_eq!(told.replied()[place..place + 2], size.to_be_bytes());
        // Both ends of TCP are told what passes the tunnel, though the answers pass none.
        let segment = size - if world.family == Family::V4 { 40 } else { 60 };
        let syn = world.asks(at).tcp(4000, at.1, SYN);
        let sent = a.send(UPLINK, &announcing(world, syn, 1460));
        let arrived = carry(&mut b, &sent).forwarded(POD).to_vec();
        assert_checksums(&arrived);
        assert_eq!(announced(&arrived), segment);
        let answer = world.answers().tcp(8080, 4000, SYN | ACK).numbers(1, 1001);
        let answer = b.send(POD, &announcing(world, answer, 1460));
        let bytes = answer.forwarded(UPLINK);
        assert_checksums(bytes);
        assert_eq!(announced(bytes), segment);
    }
}

#[test]
fn s28_fragments_go_where_their_first_one_goes() {
    for whole_first in [true, false] {
        let (mut a, mut b) = nodes(GENEVE);
        let at = V4.frontends()[0];
        let mut whole = V4.asks(at).udp(4000, at.1).payload(&[9; 1600]);
        whole.fragment = 0;
        let whole = whole.build();
        let piece = |from: usize, to: usize, word: u16| {
            let mut bytes = [&whole[..34], &whole[34 + from..34 + to]].concat();
            let total = u16::try_from(bytes.len() - 14).unwrap();
            bytes[16..18].copy_from_slice(&total.to_be_bytes());
            bytes[20..22].copy_from_slice(&word.to_be_bytes());
            bytes[24..26].fill(0);
            let sum = checksum::finish(checksum::sum(&bytes[14..34], 0));
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
            bytes
        };
        let pieces = [piece(0, 800, 0x2000), piece(800, 1608, 100)];
        let mut arrived = Vec::new();
        if whole_first {
            for piece in &pieces {
                let sent = a.send(UPLINK, piece);
                arrived.push(carry(&mut b, &sent).forwarded(POD).to_vec());
            }
        } else {
            assert_eq!(a.send(UPLINK, &pieces[1]).verdict, Verdict::Held);
            let first = a.send(UPLINK, &pieces[0]);
            let (link, later) = a.originated.0.pop().unwrap();
            assert_eq!(link.raw(), UPLINK);
            // On the way they trade places.
            assert_eq!(b.send(UPLINK, &later).verdict, Verdict::Held);
            arrived.push(carry(&mut b, &first).forwarded(POD).to_vec());
            let (link, later) = b.originated.0.pop().unwrap();
            assert_eq!(link.raw(), POD);
            arrived.push(later);
        }
        let destination = octets(V4.pods[1]);
        for piece in &arrived {
            assert_eq!(piece[30..34], destination);
        }
        let sent: usize = pieces.iter().map(Vec::len).sum();
        assert_eq!(arrived.iter().map(Vec::len).sum::<usize>(), sent);
    }
}
