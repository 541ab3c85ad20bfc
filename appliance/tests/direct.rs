//! Direct return, packet by packet: a client outside asks node A, a pod of node B answers it straight from there.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::frame::Offload;
use sluice_appliance::testing::node::{Svc, assert_checksums, ends, service};
use sluice_appliance::testing::{Bench, Builder, End};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::checksum;
use sluice_appliance::{Capacity, Family, Verdict};
use sluice_contract::overlay::{
    GENEVE_BACKEND, NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol,
    TunnelRow,
};
use sluice_contract::policy::{
    Action, BindingRow, Established, Layer, LayerId, PolicyRow, RuleId, RulesetId, RulesetRow,
    SettingsRow, SpanEntry, SpanId, SpanRow, Target,
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

/// A frame between the nodes, and where in it there is what.
#[derive(Clone)]
struct Wrapped {
    world: World,
    bytes: Vec<u8>,
    option: usize,
    /// The inner IP header.
    inner: usize,
}

impl Wrapped {
    fn new(world: World, sent: &End) -> Self {
        let bytes = sent.forwarded(UPLINK).to_vec();
        let option = find(&bytes, &[0xff, 0x53, GENEVE_BACKEND]);
        let length = 4 + usize::from(bytes[option + 3] & 0x1f) * 4;
        let inner = option + length + 14;
        Self {
            world,
            bytes,
            option,
            inner,
        }
    }

    /// The same from another client, or to another address.
    fn with(&self, source: Option<&str>, destination: Option<&str>) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let (first, length) = match self.world.family {
            Family::V4 => (12, 4),
            Family::V6 => (8, 16),
        };
        let first = self.inner + first;
        for (at, text) in [(first, source), (first + length, destination)] {
            if let Some(text) = text {
                bytes[at..at + length].copy_from_slice(&octets(text));
            }
        }
        if self.world.family == Family::V4 {
            let header = &mut bytes[self.inner..self.inner + 20];
            header[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(header, 0));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    fn flipped(&self, at: usize) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[at] ^= 1;
        bytes
    }
}

fn refused(b: &mut Bench, bytes: &[u8]) -> DropReason {
    b.send_with(UPLINK, bytes, 0, Offload::default()).dropped()
}

#[test]
fn s28_only_pairs_that_the_backends_node_knows_are_taken() {
    for world in BOTH {
        let at = world.frontends()[0];
        let (mut a, mut b) = nodes(GENEVE);
        let sent = a.send(UPLINK, &world.asks(at).tcp(4000, at.1, SYN).build());
        let good = Wrapped::new(world, &sent);
        // Another backend, another port of it, and a backend that serves, but elsewhere.
        let address = good.option + 4;
        let last = octets(world.client).len() - 1;
        for at in [address + last, address + last + 2] {
            let reason = refused(&mut b, &good.flipped(at));
            assert_eq!(reason, DropReason::SvcDirectReturn);
        }
        let two = |svc: &mut Svc, world: World| svc.cluster.push((world.pods[0], 8080));
        serve(&mut b, two);
        let mut elsewhere = good.bytes.clone();
        elsewhere[address..=address + last].copy_from_slice(&octets(world.pods[0]));
        assert_eq!(refused(&mut b, &elsewhere), DropReason::SvcDirectReturn);
        // A port that no Service has.
        let port = good.inner + if last == 3 { 22 } else { 42 };
        let reason = refused(&mut b, &good.flipped(port + 1));
        assert_eq!(reason, DropReason::SvcDirectReturn);
        // An address that is the node's own, a pod's, or nobody's.
        for other in [world.nodes[1], world.pods[1], world.client] {
            let reason = refused(&mut b, &good.with(None, Some(other)));
            assert_eq!(reason, DropReason::TunnelSpoof, "{other}");
        }
        // A Service that is not served like that.
        serve(&mut b, |svc, world| {
            two(svc, world);
            svc.direct_return = false;
        });
        assert_eq!(refused(&mut b, &good.bytes), DropReason::SvcDirectReturn);
        serve(&mut b, |svc, world| {
            two(svc, world);
            svc.external_local = true;
        });
        assert_eq!(refused(&mut b, &good.bytes), DropReason::SvcDirectReturn);
        // A node that nobody knows.
        let mut stranger = good.bytes.clone();
        stranger[29] = 9;
        stranger[24..26].fill(0);
        let sum = checksum::finish(checksum::sum(&stranger[14..34], 0));
        stranger[24..26].copy_from_slice(&sum.to_be_bytes());
        let reason = refused(&mut b, &stranger);
        assert_eq!(reason, DropReason::TunnelUnknownPeer);
        // Nothing has begun by any of it; and the right one still may.
        assert_eq!(b.pipeline.conntrack().used(), 0);
        serve(&mut b, two);
        b.send(UPLINK, &good.bytes).forwarded(POD);
    }
}

#[test]
fn s28_pods_and_nodes_are_no_clients_that_another_node_may_pass_on() {
    for world in BOTH {
        for at in world.frontends() {
            let (mut a, mut b) = nodes(GENEVE);
            let sent = a.send(UPLINK, &world.asks(at).udp(4000, at.1).build());
            let good = Wrapped::new(world, &sent);
            for client in [world.nodes[0], world.nodes[1], world.pods[0], world.pods[1]] {
                let reason = refused(&mut b, &good.with(Some(client), None));
                assert_eq!(reason, DropReason::TunnelSpoof, "{client}");
            }
        }
    }
}

#[test]
fn s28_naming_a_backend_is_no_way_into_other_connections() {
    let at = V4.frontends()[1];
    let (mut a, mut b) = nodes(GENEVE);
    let sent = a.send(UPLINK, &V4.asks(at).udp(4000, at.1).build());
    let named = Wrapped::new(V4, &sent);
    // The same client asked node B itself.
    let asks = V4.asks(at).macs(ROUTER, nic(2)).udp(4000, at.1);
    serve(&mut b, |svc, _| svc.direct_return = false);
    b.send(UPLINK, &asks.build()).forwarded(POD);
    assert_eq!(refused(&mut b, &named.bytes), DropReason::Spoof);
}

#[test]
fn s28_source_ranges_are_asked_at_both_nodes() {
    for world in BOTH {
        let at = world.frontends()[1];
        let range = match world.family {
            Family::V4 => "192.0.2.0/24",
            Family::V6 => "2001:db8:1::/48",
        };
        let (mut a, mut b) = nodes(GENEVE);
        let asks = world.asks(at).tcp(4000, at.1, SYN).build();
        let sent = a.send(UPLINK, &asks);
        let mut strict = svc(world, Protocol::Tcp);
        strict.sources = vec![range];
        b.commit(&rows(world, &strict));
        assert_eq!(carry(&mut b, &sent).dropped(), DropReason::SvcSourceRange);
        let (mut a, _) = nodes(GENEVE);
        a.commit(&rows(world, &strict));
        assert_eq!(a.send(UPLINK, &asks).dropped(), DropReason::SvcSourceRange);
    }
}

/// Pods may reach the pod; who is none may if `others` is so.
fn policy(others: bool) -> Vec<Row> {
    let accept = Target::Rule {
        action: Action::Accept,
        order: 0,
        rule: RuleId(20),
    };
    let mut entries = heapless::Vec::new();
    entries
        .push(SpanEntry {
            start: 0,
            target: accept,
        })
        .unwrap();
    let all = SpanId(3);
    let layer = Layer {
        id: LayerId(1),
        classes: false,
        pods: all,
        others: if others { all } else { SpanId::NOTHING },
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Deny,
        miss_rule: RuleId(21),
    };
    vec![
        Row::Policy(PolicyRow::Settings(SettingsRow {
            unbound: Action::Deny,
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
        })),
        Row::Policy(PolicyRow::Span(SpanRow { id: all, entries })),
        Row::Policy(PolicyRow::Ruleset(RulesetRow {
            id: RulesetId(5),
            layers: heapless::Vec::from_slice(&[layer]).unwrap(),
        })),
        Row::Policy(PolicyRow::Binding(BindingRow {
            link: LinkId::new(POD).unwrap(),
            ingress: RulesetId(5),
            egress: RulesetId::NONE,
        })),
    ]
}

#[test]
fn s28_the_pods_policy_judges_the_true_client_whatever_the_tunnel_says_of_it() {
    for world in BOTH {
        for others in [true, false] {
            let (mut a, mut b) = nodes(GENEVE);
            b.commit(&policy(others));
            let at = world.frontends()[0];
            let sent = a.send(UPLINK, &world.asks(at).tcp(4000, at.1, SYN).build());
            let mut bytes = sent.forwarded(UPLINK).to_vec();
            // The node asked claims that it is a pod.
            let identity = find(&bytes, &[0xff, 0x53, 1, 1]) + 4;
            bytes[identity..identity + 4].copy_from_slice(&300u32.to_be_bytes());
            let end = b.send(UPLINK, &bytes);
            if others {
                end.forwarded(POD);
            } else {
                assert_eq!(end.dropped(), DropReason::PolicyIngress);
            }
        }
    }
}

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
