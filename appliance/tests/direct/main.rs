//! Direct return, packet by packet: a client outside asks node A, a pod of node B answers it straight from there.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod paths;
mod trust;

use sluice_appliance::testing::node::{Svc, assert_checksums, ends, service};
use sluice_appliance::testing::{Bench, Builder, End};
use sluice_appliance::time::Duration;
use sluice_appliance::{Capacity, Family, Verdict};
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol, TunnelRow,
};
use sluice_contract::row::{LinkRow, RouteRow};
use sluice_contract::service::{
    AddressRole, AddressRow, FrontendKind, NatRow, PrefixRow, PrefixUse, ServiceRow,
};
use sluice_contract::{DropReason, Identity, LinkId, Mac, Prefix, Protocol, Row};
use std::net::IpAddr;

const UPLINK: u16 = 1;
const POD: u16 = 16;
const ROUTER: Mac = Mac([2, 0, 0, 0, 9, 9]);
const GENEVE: TunnelProtocol = TunnelProtocol::Geneve;

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

/// The addresses of a family, of both nodes.
#[derive(Clone, Copy, Debug)]
struct World {
    family: Family,
    pods: [&'static str; 2],
    nodes: [&'static str; 2],
    client: &'static str,
    load_balancer: &'static str,
    any: &'static str,
}

const V4: World = World {
    family: Family::V4,
    pods: ["10.1.0.5", "10.2.0.5"],
    nodes: ["192.168.0.1", "192.168.0.2"],
    client: "203.0.113.5",
    load_balancer: "198.51.100.7",
    any: "0.0.0.0",
};

const V6: World = World {
    family: Family::V6,
    pods: ["fd01::5", "fd02::5"],
    nodes: ["fd99::1", "fd99::2"],
    client: "2001:db8:99::5",
    load_balancer: "2001:db8:7::7",
    any: "::",
};

const BOTH: [World; 2] = [V4, V6];

impl World {
    /// Where the client asks: the port of node A, or the load balancer's address.
    fn frontends(self) -> [(&'static str, u16); 2] {
        [(self.nodes[0], 30080), (self.load_balancer, 80)]
    }

    fn asks(self, (address, _): (&str, u16)) -> Builder {
        Builder::from(UPLINK, self.client, address).macs(ROUTER, nic(1))
    }

    fn answers(self) -> Builder {
        Builder::from(POD, self.pods[1], self.client)
    }
}

fn link(id: u16, mac: Mac, addresses: &[&str]) -> Row {
    Row::Link(LinkRow {
        id: LinkId::new(id).unwrap(),
        mac,
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        mtu: 1500,
        identity: Identity(300),
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    })
}

fn peer(n: u8, direct: bool) -> Row {
    Row::Overlay(OverlayRow::Peer(PeerRow {
        id: PeerId(7),
        address: [192, 168, 0, n].into(),
        mac: Mac([2, 0, 0, 0, 2, n]),
        next_hop: NextHopId(0),
        mtu: 1500,
        direct,
    }))
}

/// Node `n` of two, with a pod, and a router that leads to the client.
fn node(n: u8, protocol: TunnelProtocol) -> Bench {
    let (own, other) = (usize::from(n) - 1, usize::from(2 - n));
    let mut bench = Bench::empty(Capacity::default());
    let hop = |id, address: &str, mac| {
        Row::Overlay(OverlayRow::NextHop(NextHopRow {
            id: NextHopId(id),
            address: ip(address),
            mac: Some(mac),
        }))
    };
    let role = |address: &str, role| {
        let address = ip(address);
        service(ServiceRow::Address(AddressRow { address, role }))
    };
    let mut rows = vec![
        link(UPLINK, nic(n), &[]),
        link(2, Mac([2, 0, 0, 0, 3, n]), &[V4.nodes[own], V6.nodes[own]]),
        link(
            POD,
            Mac::of_pod(LinkId::new(POD).unwrap()),
            &[V4.pods[own], V6.pods[own]],
        ),
        service(ServiceRow::Nat(NatRow {
            node4: Some([192, 168, 0, n].into()),
            node6: Some(format!("fd99::{n}").parse().unwrap()),
            ..NatRow::default()
        })),
        Row::Overlay(OverlayRow::Tunnel(TunnelRow {
            protocol,
            mac: Mac([2, 0, 0, 0, 2, n]),
            source4: Some([192, 168, 0, n].into()),
            ..TunnelRow::default()
        })),
        hop(0, V4.nodes[other], nic(3 - n)),
        hop(1, "192.168.0.254", ROUTER),
        peer(3 - n, false),
    ];
    for (range, default, remote) in [
        ("10.0.0.0/8", "0.0.0.0/0", format!("10.{}.0.0/24", 3 - n)),
        ("fd00::/12", "::/0", format!("fd0{}::/64", 3 - n)),
    ] {
        rows.push(service(ServiceRow::Prefix(PrefixRow {
            prefix: prefix(range),
            purpose: PrefixUse::Pods,
        })));
        rows.push(Row::Route(RouteRow {
            prefix: prefix(default),
            next_hop: Some(NextHopId(1)),
        }));
        rows.push(Row::Overlay(OverlayRow::Remote(RemoteRow {
            prefix: prefix(&remote),
            peer: PeerId(7),
        })));
    }
    for world in BOTH {
        rows.push(role(world.nodes[own], AddressRole::Node));
        rows.push(role(world.nodes[other], AddressRole::Peer));
        rows.push(role(world.load_balancer, AddressRole::External));
    }
    bench.commit(&rows);
    bench
}

/// The Service of a family and protocol, whose backend is the pod of node B.
fn svc(world: World, protocol: Protocol) -> Svc {
    let mut svc = Svc::new(&[(world.pods[1], 8080)], &[]);
    svc.id = 2 * u32::from(world.family == Family::V6) + u32::from(protocol == Protocol::Udp);
    svc.protocol = protocol;
    svc.direct_return = true;
    svc
}

fn rows(world: World, svc: &Svc) -> Vec<Row> {
    let addresses = sluice_appliance::testing::node::Addresses {
        family: world.family,
        ..sluice_appliance::testing::node::V4
    };
    let mut rows = svc.inner_rows(&addresses);
    rows.push(svc.frontend(world.any, 30080, FrontendKind::NodePort));
    rows.push(svc.frontend(world.load_balancer, 80, FrontendKind::LoadBalancer));
    rows
}

fn serve(bench: &mut Bench, change: impl Fn(&mut Svc, World)) {
    for world in BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut svc = svc(world, protocol);
            change(&mut svc, world);
            bench.commit(&rows(world, &svc));
        }
    }
}

/// Both nodes, with the Services.
fn nodes(protocol: TunnelProtocol) -> (Bench, Bench) {
    let (mut a, mut b) = (node(1, protocol), node(2, protocol));
    serve(&mut a, |_, _| {});
    serve(&mut b, |_, _| {});
    (a, b)
}

fn carry(to: &mut Bench, sent: &End) -> End {
    to.send_with(UPLINK, sent.forwarded(UPLINK), 0, sent.offload)
}

const SYN: u8 = 2;
const ACK: u8 = 16;

/// One exchange of TCP through both nodes; yields the frame that left node A with the SYN.
fn handshake(a: &mut Bench, b: &mut Bench, world: World, at: (&str, u16), from: u16) -> Vec<u8> {
    let syn = world.asks(at).tcp(from, at.1, SYN).numbers(1000, 0);
    let sent = a.send(UPLINK, &syn.build());
    let arrived = carry(b, &sent);
    assert_eq!(
        ends(arrived.forwarded(POD)),
        (ip(world.client), from, ip(world.pods[1]), 8080)
    );
    let answer = world.answers().tcp(8080, from, SYN | ACK);
    let answer = b.send(POD, &answer.numbers(5000, 1001).build());
    let bytes = answer.forwarded(UPLINK);
    assert_eq!(ends(bytes), (ip(at.0), at.1, ip(world.client), from));
    assert_eq!(bytes[..12], [ROUTER.0, nic(2).0].concat(), "not through A");
    assert_checksums(bytes);
    let ack = world.asks(at).tcp(from, at.1, ACK).numbers(1001, 5001);
    let ack = a.send(UPLINK, &ack.build());
    assert_checksums(carry(b, &ack).forwarded(POD));
    sent.forwarded(UPLINK).to_vec()
}

#[test]
fn s28_the_backends_node_answers_the_client_from_the_frontends_address() {
    for protocol in [GENEVE, TunnelProtocol::GeneveIp] {
        for world in BOTH {
            let (mut a, mut b) = nodes(protocol);
            for (at, from) in world.frontends().into_iter().zip([4000, 4001]) {
                handshake(&mut a, &mut b, world, at, from);
                // Datagrams of the same kind.
                for _ in 0..3 {
                    let asks = world.asks(at).udp(from, at.1).payload(b"question");
                    let sent = a.send(UPLINK, &asks.build());
                    let arrived = carry(&mut b, &sent).forwarded(POD).to_vec();
                    assert_checksums(&arrived);
                    assert_eq!(ends(&arrived).0, ip(world.client), "the true client");
                    let back = b.send(POD, &world.answers().udp(8080, from).build());
                    let expected = (ip(at.0), at.1, ip(world.client), from);
                    assert_eq!(ends(back.forwarded(UPLINK)), expected);
                }
            }
        }
    }
}

#[test]
fn s28_both_frontends_may_be_asked_from_one_port() {
    for world in BOTH {
        let (mut a, mut b) = nodes(GENEVE);
        let mut seen = Vec::new();
        for at in world.frontends() {
            let asks = world.asks(at).udp(4000, at.1);
            let sent = a.send(UPLINK, &asks.build());
            let arrived = carry(&mut b, &sent);
            let (_, port, ..) = ends(arrived.forwarded(POD));
            let back = b.send(POD, &world.answers().udp(8080, port).build());
            let expected = (ip(at.0), at.1, ip(world.client), 4000);
            assert_eq!(ends(back.forwarded(UPLINK)), expected);
            seen.push(port);
        }
        assert_ne!(seen[0], seen[1], "the pod tells them apart");
    }
}

/// Lets time pass in steps that the table's clock follows.
fn pass(bench: &mut Bench, seconds: u64) {
    for _ in 0..seconds {
        bench.wait(Duration::from_secs(1));
    }
}

#[test]
fn s28_one_direction_is_followed_for_as_long_as_the_connection_lasts() {
    let (mut a, mut b) = nodes(GENEVE);
    let at = V4.frontends()[0];
    handshake(&mut a, &mut b, V4, at, 4000);
    let mut says = |flags, sequence: u32, acknowledgment: u32, wait: u64| {
        pass(&mut a, wait);
        let segment = V4.asks(at).tcp(4000, at.1, flags);
        let sent = a.send(UPLINK, &segment.numbers(sequence, acknowledgment).build());
        sent.verdict
    };
    let passes = Verdict::Forward(LinkId::UPLINK);
    // Far past every window that could be guessed from one side, and an hour apart.
    for step in 0..20u32 {
        let verdict = says(ACK, 1001, 5001 + step * 10_000_000, 3600);
        assert_eq!(verdict, passes, "{step}");
    }
    // A FIN of the client's is not the end of what the pod sends.
    assert_eq!(says(ACK | 1, 1001, 5001, 0), passes);
    assert_eq!(says(ACK, 1002, 9001, 230), passes);
    assert_eq!(says(ACK, 1002, 99_001, 230), passes);
    // Silence is.
    let late = says(ACK, 1002, 99_001, 250);
    assert_eq!(late, Verdict::Drop(DropReason::CtNotOpening));
    assert_eq!(
        says(SYN, 77, 0, 0),
        passes,
        "and the port may be used again"
    );
}

#[test]
fn s28_a_stream_of_datagrams_lives_as_long_as_one_seen_both_ways() {
    let (mut a, _) = nodes(GENEVE);
    let at = V4.frontends()[0];
    let asks = V4.asks(at).udp(4000, at.1).build();
    let used = |a: &Bench| a.pipeline.conntrack().used();
    a.send(UPLINK, &asks).forwarded(UPLINK);
    pass(&mut a, 110);
    assert_eq!(used(&a), 1, "a question, two minutes");
    a.send(UPLINK, &asks).forwarded(UPLINK);
    pass(&mut a, 290);
    assert_eq!(used(&a), 1, "a stream, five");
    a.send(UPLINK, &asks).forwarded(UPLINK);
    pass(&mut a, 600);
    assert_eq!(used(&a), 0);
}

#[test]
fn s28_the_node_asked_answers_for_a_backend_that_is_gone() {
    for world in BOTH {
        let (mut a, mut b) = nodes(GENEVE);
        let at = world.frontends()[0];
        handshake(&mut a, &mut b, world, at, 4000);
        a.send(UPLINK, &world.asks(at).udp(4000, at.1).build())
            .forwarded(UPLINK);
        // A commit alone changes nothing.
        a.commit(&[]);
        let ack = world.asks(at).tcp(4000, at.1, ACK).numbers(1001, 5001);
        a.send(UPLINK, &ack.build()).forwarded(UPLINK);
        serve(&mut a, |svc, world| {
            svc.cluster = vec![(world.pods[0], 8080)];
            svc.local = Vec::new();
        });
        let reset = a.send(UPLINK, &ack.build());
        let expected = (ip(at.0), at.1, ip(world.client), 4000);
        assert_eq!(ends(reset.replied()), expected);
        // A datagram goes to the other one, which is here: nothing has to be named.
        let moved = a.send(UPLINK, &world.asks(at).udp(4000, at.1).build());
        let expected = (ip(world.client), 4000, ip(world.pods[0]), 8080);
        assert_eq!(ends(moved.forwarded(POD)), expected);
    }
}

#[test]
fn s28_a_backend_here_sees_the_client_too() {
    for world in BOTH {
        let (mut a, _) = nodes(GENEVE);
        serve(&mut a, |svc, world| {
            svc.cluster = vec![(world.pods[0], 8080)];
        });
        let at = world.frontends()[1];
        let arrived = a.send(UPLINK, &world.asks(at).tcp(4000, at.1, SYN).build());
        let expected = (ip(world.client), 4000, ip(world.pods[0]), 8080);
        assert_eq!(ends(arrived.forwarded(POD)), expected);
    }
}

#[test]
fn s28_where_nothing_can_be_named_the_source_is_rewritten() {
    for world in BOTH {
        let at = world.frontends()[0];
        let masked = |a: &mut Bench, outer: usize| {
            let sent = a.send(UPLINK, &world.asks(at).udp(4000, at.1).build());
            let bytes = sent.forwarded(UPLINK).to_vec();
            let own = octets(world.nodes[0]);
            let mut places = bytes[outer..].windows(own.len());
            assert!(places.any(|it| it == own), "{bytes:02x?}");
            let client = octets(world.client);
            assert!(!bytes.windows(client.len()).any(|it| it == client));
        };
        for protocol in [
            TunnelProtocol::Vxlan,
            TunnelProtocol::VxlanGbp,
            TunnelProtocol::IpIp,
        ] {
            masked(&mut nodes(protocol).0, 34);
        }
        let (mut a, _) = nodes(GENEVE);
        a.commit(&[peer(2, true)]);
        masked(&mut a, 14);
        // Nor is it done unasked.
        let (mut a, _) = nodes(GENEVE);
        serve(&mut a, |svc, _| svc.direct_return = false);
        masked(&mut a, 34);
    }
}

/// The octets of an address.
fn octets(text: &str) -> Vec<u8> {
    match ip(text) {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    let mut places = bytes.windows(what.len());
    places.position(|it| it == what).unwrap()
}
