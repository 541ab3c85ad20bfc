//! Translation of sources, ICMP errors about translated packets, fragments, and the packet that only might come.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use proptest::prelude::*;
use sluice_appliance::observe::Step;
use sluice_appliance::testing::node::{
    self, BOTH, HOST, Svc, UPLINK, V4, assert_checksums, ends, ip, nat, packet, prefix, service,
};
use sluice_appliance::testing::{BUFFER, Bench, Builder, HEADROOM};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::{ipv4, tcp};
use sluice_appliance::{Family, Frame, Offload, Partial, Verdict};
use sluice_contract::service::{NatRow, PrefixRow, PrefixUse, ServiceRow};
use sluice_contract::{DropReason, LinkId, Protocol};
use std::collections::BTreeSet;

#[test]
fn e01_pods_leave_with_the_nodes_address_and_answers_find_them() {
    for a in BOTH {
        let mut bench = node::node();
        let end = bench.send(16, &packet(16, a.pods[0], a.outside).udp(4000, 53).build());
        assert_checksums(end.forwarded(UPLINK));
        let (source, port, destination, to) = ends(&end.bytes);
        assert_eq!((source, destination, to), (ip(a.node), ip(a.outside), 53));
        assert!(port >= 49152);
        assert_eq!(
            &end.bytes[..12],
            [node::ROUTER_MAC.0, node::NODE_MAC.0].concat()
        );
        let back = packet(UPLINK, a.outside, a.node)
            .udp(53, port)
            .payload(b"answer");
        let end = bench.send(UPLINK, &back.build());
        assert_checksums(end.forwarded(16));
        assert_eq!(ends(&end.bytes), (ip(a.outside), 53, ip(a.pods[0]), 4000));
        // To pods and nodes, here and elsewhere, the source is the pod's own.
        for (to, link) in [
            (a.pods[1], 17),
            (a.remote, UPLINK),
            (a.node, HOST),
            (a.other_node, UPLINK),
        ] {
            let end = bench.send(16, &packet(16, a.pods[0], to).udp(4000, 53).build());
            assert_eq!(ends(end.forwarded(link)).0, ip(a.pods[0]), "{to}");
        }
    }
}

#[test]
fn e02_kept_ranges_are_not_translated_and_live_flows_stay_as_they_are() {
    let a = V4;
    let mut bench = node::node();
    let sent = |port| packet(16, a.pods[0], a.outside).udp(port, 53).build();
    let before = ends(bench.send(16, &sent(1)).forwarded(UPLINK));
    let keep = PrefixRow {
        prefix: prefix("203.0.113.0/24"),
        purpose: PrefixUse::Keep,
    };
    bench.commit(&[service(ServiceRow::Prefix(keep))]);
    assert_eq!(ends(bench.send(16, &sent(1)).forwarded(UPLINK)), before);
    let after = ends(bench.send(16, &sent(2)).forwarded(UPLINK));
    assert_eq!(after.0, ip(a.pods[0]));
}

#[test]
fn e03_mappings_are_independent_of_the_destination_and_exhaustion_is_told() {
    let a = V4;
    let mut bench = node::node();
    let narrow = NatRow {
        first_port: 60_000,
        last_port: 60_003,
        ..nat()
    };
    bench.commit(&[service(ServiceRow::Nat(narrow))]);
    let sent = |to: &str, port| packet(16, a.pods[0], to).udp(port, 53).build();
    // One inside endpoint has one outside port towards everybody (RFC 4787 REQ-1).
    let ports: BTreeSet<u16> = (1..=40)
        .map(|n| ends(&bench.send(16, &sent(&format!("203.0.113.{n}"), 7)).bytes).1)
        .collect();
    assert_eq!(ports.len(), 1);
    // Four ports serve four flows to one destination, each its own: two of the first pod, one each of the others. The fifth is
    // told.
    let from = |link: u16, port| {
        let pod = a.pods[usize::from(link) - 16];
        packet(link, pod, "198.18.0.1").udp(port, 53).build()
    };
    let ports: BTreeSet<u16> = [(16, 100), (16, 101), (17, 102), (18, 103)]
        .map(|(link, port)| ends(&bench.send(link, &from(link, port)).bytes).1)
        .into();
    assert_eq!(ports, BTreeSet::from([60_000, 60_001, 60_002, 60_003]));
    let fifth = sent("198.18.0.1", 104);
    let told = bench.send(16, &fifth);
    assert_eq!(&told.replied()[34..36], &[3, 13]);
    // The port is free again when its flow is over.
    bench.wait(Duration::from_secs(59));
    bench.wait(Duration::from_secs(59));
    bench.wait(Duration::from_secs(59));
    bench.send(16, &fifth).forwarded(UPLINK);
}

#[test]
fn e06_two_pods_ping_one_host_with_one_identifier() {
    for a in BOTH {
        let mut bench = node::node();
        let mut seen = BTreeSet::new();
        for (link, pod) in [(16, a.pods[0]), (17, a.pods[1])] {
            let end = bench.send(link, &packet(link, pod, a.outside).echo(77, 1).build());
            let sent = end.forwarded(UPLINK).to_vec();
            assert_checksums(&sent);
            let at = if a.family == Family::V4 { 34 } else { 54 };
            let id = u16::from_be_bytes([sent[at + 4], sent[at + 5]]);
            assert!(seen.insert(id));
            let kind = if a.family == Family::V4 { 0 } else { 129 };
            let second = u32::from(id) << 16 | 1;
            let answer = packet(UPLINK, a.outside, a.node)
                .icmp(kind, 0, second)
                .build();
            let end = bench.send(UPLINK, &answer);
            let back = end.forwarded(link);
            assert_checksums(back);
            assert_eq!(u16::from_be_bytes([back[at + 4], back[at + 5]]), 77);
        }
        let stray = packet(UPLINK, a.outside, a.pods[0]).icmp(
            if a.family == Family::V4 { 0 } else { 129 },
            0,
            9 << 16,
        );
        assert_eq!(
            bench.send(UPLINK, &stray.build()).dropped(),
            DropReason::CtNotOpening
        );
    }
}

#[test]
fn e08_what_nobody_here_asked_for_is_the_nodes_own_business() {
    for a in BOTH {
        let mut bench = node::node();
        for port in [22, 50_000] {
            let sent = packet(UPLINK, a.outside, a.node)
                .tcp(1, port, tcp::SYN)
                .build();
            let end = bench.send(UPLINK, &sent);
            assert_eq!(
                ends(end.forwarded(HOST)),
                (ip(a.outside), 1, ip(a.node), port)
            );
        }
        assert_eq!(bench.pipeline.conntrack().used(), 0);
        // But nobody outside speaks in a pod's name, or the node's.
        for source in [a.pods[0], a.node] {
            let sent = packet(UPLINK, source, a.pods[1]).udp(1, 2).build();
            assert_eq!(bench.send(UPLINK, &sent).dropped(), DropReason::Spoof);
        }
    }
}

#[test]
fn w08_pods_speak_no_tunnel_to_nodes_unless_they_may() {
    for a in BOTH {
        let mut bench = node::node();
        let frames = |to: &str| {
            let vxlan = [4789, 8472, 6081].map(|port| packet(16, a.pods[0], to).udp(1, port));
            let ipip = packet(16, a.pods[0], to).raw(4).payload(&[0; 20]);
            vxlan
                .into_iter()
                .chain([ipip])
                .map(|builder| builder.build())
        };
        for to in [a.node, a.other_node] {
            for frame in frames(to) {
                assert_eq!(bench.send(16, &frame).dropped(), DropReason::EncapFromPod);
            }
        }
        bench
            .send(16, &frames(a.pods[1]).next().unwrap())
            .forwarded(17);
        let open = NatRow {
            deny_encap: false,
            ..nat()
        };
        bench.commit(&[service(ServiceRow::Nat(open))]);
        bench
            .send(16, &frames(a.other_node).next().unwrap())
            .forwarded(UPLINK);
    }
}

#[test]
fn checksums_that_wait_for_the_far_side_keep_waiting_for_the_right_sum() {
    use sluice_appliance::wire::checksum;
    for a in BOTH {
        let mut bench = node::node();
        let (at, field) = match a.family {
            Family::V4 => (34u16, 50usize),
            Family::V6 => (54, 70),
        };
        let mut syn = packet(16, a.pods[0], a.outside)
            .tcp(4000, 80, tcp::SYN)
            .build();
        let length = syn.len() - usize::from(at);
        let pseudo = |source, destination| {
            let address = sluice_appliance::testing::address;
            checksum::fold(checksum::pseudo(
                address(source),
                address(destination),
                6,
                length,
            ))
        };
        syn[field..field + 2].copy_from_slice(&pseudo(a.pods[0], a.outside).to_be_bytes());
        let offload = Offload {
            partial: Some(Partial {
                start: at,
                offset: 16,
            }),
            ..Offload::default()
        };
        let end = bench.send_with(16, &syn, 0, offload);
        let sent = end.forwarded(UPLINK);
        assert_eq!(end.offload, offload);
        let got = u16::from_be_bytes([sent[field], sent[field + 1]]);
        assert_eq!(got % 0xffff, pseudo(a.node, a.outside) % 0xffff);
    }
}

/// An error from a router about a packet that left.
fn error_about(a: &node::Addresses, sent: &[u8], from: &str, to: &str) -> Builder {
    let quote = &sent[14..sent.len().min(14 + 200)];
    let (kind, code, second) = match a.family {
        Family::V4 => (3, 4, 1400),
        Family::V6 => (2, 0, 1400),
    };
    packet(UPLINK, from, to)
        .icmp(kind, code, second)
        .payload(quote)
}

#[test]
fn m06_errors_about_translated_packets_reach_the_pod_and_quote_its_own() {
    for a in BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let router = if a.family == Family::V4 {
                "198.18.0.9"
            } else {
                "2001:db8:50::9"
            };
            let mut bench = node::node();
            let out = packet(16, a.pods[0], a.outside).payload(&[5; 64]);
            let out = match protocol {
                Protocol::Tcp => out.tcp(4000, 80, tcp::SYN).payload(&[]),
                _ => out.udp(4000, 80),
            };
            let original = out.build();
            let sent = bench.send(16, &original).forwarded(UPLINK).to_vec();
            let error = error_about(&a, &sent, router, a.node).build();
            let end = bench.send(UPLINK, &error);
            let got = end.forwarded(16);
            assert_checksums(got);
            let at = if a.family == Family::V4 { 34 } else { 54 };
            // Quoted as the pod sent it, but for the hop and what follows from it.
            let (from, to) = if a.family == Family::V4 {
                (12, 28)
            } else {
                (8, 44)
            };
            let quote = &got[at + 8..];
            assert_eq!(&quote[from..to], &original[14 + from..14 + to]);
            assert_eq!(bench.pipeline.conntrack().used(), sluice_slots(&a));
            // A guess about a connection that is not there, and one with a broken quotation.
            let mut wrong = error_about(&a, &sent, router, a.node);
            let last = if a.family == Family::V4 { 20 } else { 40 };
            wrong.payload[last] ^= 1;
            let end = bench.send(UPLINK, &wrong.build());
            assert_eq!(end.dropped(), DropReason::IcmpUnrelated);
            let mut broken = error;
            let end = broken.len() - 1;
            broken[end] ^= 1;
            assert_eq!(
                bench.send(UPLINK, &broken).dropped(),
                DropReason::BadChecksum
            );
        }
    }
}

#[test]
fn m06_an_error_from_outside_in_the_name_of_a_pod_or_of_the_node_is_refused() {
    for a in BOTH {
        let mut bench = node::node();
        let out = packet(16, a.pods[0], a.outside).udp(4000, 80);
        let sent = bench.send(16, &out.build()).forwarded(UPLINK).to_vec();
        for posing in [a.pods[0], a.pods[1], a.node] {
            let error = error_about(&a, &sent, posing, a.node);
            let end = bench.send(UPLINK, &error.build());
            assert_eq!(end.dropped(), DropReason::Spoof, "{posing}");
        }
        for honest in [a.outside, a.other_node] {
            let error = error_about(&a, &sent, honest, a.node);
            bench.send(UPLINK, &error.build()).forwarded(16);
        }
    }
}

/// A translated connection of IPv6 takes two slots.
const fn sluice_slots(a: &node::Addresses) -> u32 {
    match a.family {
        Family::V4 => 1,
        Family::V6 => 2,
    }
}

#[test]
fn m06_an_endpoints_error_comes_from_the_services_address() {
    for a in BOTH {
        let mut bench = node::node();
        let mut svc = Svc::new(&[(a.pods[1], 8080)], &[]);
        svc.protocol = Protocol::Udp;
        bench.commit(&svc.rows(&a));
        let original = packet(16, a.pods[0], a.cluster_ip).udp(4000, 80).build();
        let sent = bench.send(16, &original).forwarded(17).to_vec();
        let (kind, code) = if a.family == Family::V4 {
            (3, 3)
        } else {
            (1, 4)
        };
        let error = packet(17, a.pods[1], a.pods[0])
            .icmp(kind, code, 0)
            .payload(&sent[14..])
            .build();
        let end = bench.send(17, &error);
        let got = end.forwarded(16);
        assert_checksums(got);
        let (source, inner) = if a.family == Family::V4 {
            (26..30, 42)
        } else {
            (22..38, 62)
        };
        assert_eq!(&got[source], &address_bytes(&a, a.cluster_ip)[..]);
        let destination = if a.family == Family::V4 {
            16..20
        } else {
            24..40
        };
        assert_eq!(
            &got[inner..][destination],
            &address_bytes(&a, a.cluster_ip)[..]
        );
    }
}

fn address_bytes(a: &node::Addresses, text: &str) -> Vec<u8> {
    let address = sluice_appliance::testing::address(text);
    match a.family {
        Family::V4 => address.v4_octets().to_vec(),
        Family::V6 => address.0.to_vec(),
    }
}

/// The fragments of a UDP datagram through a Service, in order.
fn fragments(a: &node::Addresses, id: u16, payload: &[u8], size: usize) -> Vec<Vec<u8>> {
    let whole = packet(16, a.pods[0], a.cluster_ip)
        .udp(4000, 80)
        .payload(payload)
        .build();
    let network = if a.family == Family::V4 { 34 } else { 54 };
    let datagram = &whole[network..];
    let count = datagram.len().div_ceil(size);
    (0..count)
        .map(|n| {
            let piece = &datagram[n * size..datagram.len().min((n + 1) * size)];
            let more = n + 1 < count;
            let mut builder = packet(16, a.pods[0], a.cluster_ip).raw(17).payload(piece);
            builder.identification = id;
            builder.fragment = (n * size / 8) as u16 | if more { ipv4::MF } else { 0 };
            builder.fragment6 = Some(((n * size) as u16 | u16::from(more), u32::from(id)));
            builder.build()
        })
        .collect()
}

fn fragment_node(a: &node::Addresses) -> Bench {
    let mut bench = node::node();
    let mut svc = Svc::new(&[(a.pods[1], 8080)], &[]);
    svc.protocol = Protocol::Udp;
    bench.commit(&svc.rows(a));
    bench
}

#[test]
fn m11_fragments_follow_their_first_through_a_service_in_any_order() {
    for a in BOTH {
        let payload: Vec<u8> = (0..2000u32).map(|n| n as u8).collect();
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]] {
            let mut bench = fragment_node(&a);
            let pieces = fragments(&a, 7, &payload, 800);
            assert_eq!(pieces.len(), 3);
            let mut arrived = Vec::new();
            for at in order {
                let end = bench.send(16, &pieces[at]);
                match end.verdict {
                    Verdict::Forward(link) => arrived.push((link, end.bytes)),
                    Verdict::Held => {}
                    other => assert_eq!(other, Verdict::Held),
                }
            }
            arrived.append(&mut bench.originated.0);
            assert_eq!(arrived.len(), 3, "{order:?}");
            let backend = address_bytes(&a, a.pods[1]);
            for (link, bytes) in &arrived {
                assert_eq!(*link, LinkId::new(17).unwrap());
                let to = if a.family == Family::V4 {
                    30..34
                } else {
                    38..54
                };
                assert_eq!(&bytes[to], &backend[..]);
            }
            let stats = bench.pipeline.stats();
            assert_eq!((stats.forwarded(), stats.held()), (3, 0));
            // All of it has come, so the identification may be used again.
            let end = bench.send(16, &pieces[0]);
            end.forwarded(17);
        }
    }
}

#[test]
fn m11_overlaps_condemn_the_datagram_and_waiting_ends_in_time() {
    for a in BOTH {
        let payload = [3; 2000];
        let mut bench = fragment_node(&a);
        let pieces = fragments(&a, 9, &payload, 800);
        bench.send(16, &pieces[0]).forwarded(17);
        bench.send(16, &pieces[1]).forwarded(17);
        assert_eq!(
            bench.send(16, &pieces[1]).dropped(),
            DropReason::FragmentOverlap
        );
        assert_eq!(
            bench.send(16, &pieces[2]).dropped(),
            DropReason::FragmentOverlap
        );
        let mut bench = fragment_node(&a);
        assert_eq!(bench.send(16, &pieces[2]).verdict, Verdict::Held);
        assert_eq!(bench.pipeline.stats().held(), 1);
        bench.wait(Duration::from_secs(31));
        let stats = bench.pipeline.stats();
        assert_eq!(
            (stats.held(), stats.dropped(DropReason::FragmentTimeout)),
            (0, 1)
        );
        assert!(stats.is_balanced());
        // Room for waiting is bounded: a quarter of it for one pod.
        let mut bench = fragment_node(&a);
        let held = (0..200u16)
            .filter(|id| {
                let late = fragments(&a, *id, &payload, 800).remove(1);
                bench.send(16, &late).verdict == Verdict::Held
            })
            .count();
        assert_eq!(held, 16);
        assert_eq!(
            bench.pipeline.stats().dropped(DropReason::FragmentLimit),
            184
        );
    }
}

#[test]
fn k06_two_packets_of_one_flow_in_one_batch_get_one_endpoint() {
    for a in BOTH {
        let mut bench = fragment_node(&a);
        let mut svc = Svc::new(
            &[(a.pods[1], 8080), (a.pods[2], 8080), (a.remote, 8080)],
            &[],
        );
        svc.protocol = Protocol::Udp;
        bench.commit(&svc.rows(&a));
        for port in 1..500 {
            let sent = packet(16, a.pods[0], a.cluster_ip).udp(port, 80).build();
            let mut buffers = [[0u8; BUFFER]; 2];
            let [one, two] = &mut buffers;
            let mut frames = [one, two].map(|buffer| {
                buffer[HEADROOM..HEADROOM + sent.len()].copy_from_slice(&sent);
                let link = LinkId::new(16).unwrap();
                let end = HEADROOM + sent.len();
                Frame::new(buffer, HEADROOM, end, 0, link, Offload::default()).unwrap()
            });
            let mut verdicts = [Verdict::Held; 2];
            let (now, out) = (bench.now, &mut bench.originated);
            bench
                .pipeline
                .process_batch(&mut frames, &mut verdicts, now, out);
            assert!(matches!(verdicts[0], Verdict::Forward(_)));
            assert_eq!(verdicts[0], verdicts[1]);
            assert_eq!(ends(frames[0].bytes()), ends(frames[1].bytes()));
        }
    }
}

/// What `trace` says of a frame, and then what becomes of it.
fn traced(bench: &mut Bench, link: u16, bytes: &[u8]) -> (Verdict, Verdict, Vec<Step>) {
    let mut buffer = vec![0u8; BUFFER];
    let end = HEADROOM + bytes.len();
    buffer[HEADROOM..end].copy_from_slice(bytes);
    let ingress = LinkId::new(link).unwrap();
    let used = bench.pipeline.conntrack().used();
    let received = bench.pipeline.stats().received();
    let offload = Offload::default();
    let mut frame = Frame::new(&mut buffer, HEADROOM, end, 0, ingress, offload).unwrap();
    let (verdict, record) = bench.pipeline.trace(&mut frame, bench.now);
    assert_eq!(
        bench.pipeline.conntrack().used(),
        used,
        "a trace leaves no trace"
    );
    assert_eq!(bench.pipeline.stats().received(), received);
    let foreseen = frame.bytes().to_vec();
    let end = bench.send(link, bytes);
    if verdict == end.verdict && matches!(verdict, Verdict::Forward(_) | Verdict::Reply) {
        assert_eq!(foreseen, end.bytes);
    }
    (verdict, end.verdict, record.steps.to_vec())
}

#[test]
fn t08_a_trace_names_the_rows_that_decide() {
    let a = V4;
    let mut bench = node::node();
    bench.commit(&Svc::new(&[(a.pods[1], 8080)], &[]).rows(&a));
    let syn = packet(16, a.pods[0], a.cluster_ip)
        .tcp(4000, 80, tcp::SYN)
        .build();
    let (said, done, steps) = traced(&mut bench, 16, &syn);
    assert_eq!(said, done);
    assert!(steps.iter().any(|s| matches!(s, Step::Frontend { .. })));
    assert!(
        steps
            .iter()
            .any(|s| matches!(s, Step::Backend { port: 8080, .. }))
    );
    assert!(
        steps
            .iter()
            .any(|s| matches!(s, Step::Policy { accepted: true, .. }))
    );
    assert!(steps.iter().any(|s| matches!(s, Step::Rewritten(_))));
    let (said, done, steps) = traced(&mut bench, 16, &syn);
    assert_eq!(said, done);
    assert!(steps.iter().any(|s| matches!(s, Step::Connection { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn t08_a_trace_is_always_what_happens(
        steps in proptest::collection::vec((0..3usize, 0..8usize, 0..4u16, 0..4usize, any::<u8>(), 0..4u32), 1..60),
        v6: bool,
    ) {
        let a = BOTH[usize::from(v6)];
        let mut bench = node::node();
        let mut svc = Svc::new(&[(a.pods[1], 8080), (a.remote, 8080)], &[(a.pods[1], 8080)]);
        svc.external_local = true;
        let mut udp = svc.clone();
        udp.id = 1;
        udp.protocol = Protocol::Udp;
        let mut rows = svc.rows(&a);
        rows.extend(udp.rows(&a));
        bench.commit(&rows);
        for (from, to, port, kind, flags, sequence) in steps {
            let (link, source) = [(16, a.pods[0]), (HOST, a.node), (UPLINK, a.outside)][from];
            let to = [a.pods[1], a.pods[2], a.cluster_ip, a.node, a.load_balancer, a.outside, a.unallocated, a.remote][to];
            let ports = [80, 30080, 8080, 53];
            let builder = packet(link, source, to);
            let sent = match kind {
                0 => builder.tcp(4000 + port, ports[usize::from(port)], flags).numbers(1000 + sequence, sequence),
                1 => builder.udp(4000 + port, ports[usize::from(port)]),
                2 => builder.echo(port, 1),
                _ => builder.tcp(4000 + port, ports[usize::from(port)], tcp::SYN),
            };
            let (said, done, trail) = traced(&mut bench, link, &sent.build());
            prop_assert_eq!(said, done, "{:?} {:?}", sent, trail);
        }
    }
}
