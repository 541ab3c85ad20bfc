//! Packets: questions and answers through a whole pipeline, and the connections that follow.

use crate::message::Message;
use sluice_appliance::names::message::{A, AAAA};
use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{self, Addresses, UPLINK, V4, V6, ends, outcome, packet};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::tcp;
use sluice_appliance::{Gso, GsoKind, Offload, Verdict};
use sluice_contract::name::{Learnt, NameId, NameRow};
use sluice_contract::overlay::{NextHopId, OverlayRow, PeerId, PeerRow, RemoteRow};
use sluice_contract::policy::{
    Action, BindingRow, Established, Layer, LayerId, NamedRow, PolicyKey, PolicyRow, RuleId,
    RulesetId, RulesetRow, SettingsRow, SpanEntry, SpanId, SpanRow, Target, port_key,
};
use sluice_contract::report::CounterId;
use sluice_contract::service::AddressRole;
use sluice_contract::{DropReason, Key, LinkId, Mac, Protocol, Row, ToGuest};
use std::net::IpAddr;

/// Who is asked: outside, and believed.
pub(crate) const RESOLVER: [&str; 2] = ["203.0.113.53", "2001:db8:99::53"];
/// Where names lead.
pub(crate) const SITE: [&str; 2] = ["198.51.100.80", "2001:db8:99::80"];

fn policy(row: PolicyRow) -> Row {
    Row::Policy(row)
}

pub(crate) fn name(text: &str) -> NameId {
    NameRow::parse(text).unwrap().id
}

fn span(id: u64, entries: &[(u32, Target)]) -> Row {
    let entries = entries.iter().map(|(start, target)| SpanEntry {
        start: *start,
        target: *target,
    });
    policy(PolicyRow::Span(SpanRow {
        id: SpanId(id),
        entries: entries.collect(),
    }))
}

fn rule(action: Action, order: u16) -> Target {
    Target::Rule {
        action,
        order,
        rule: RuleId(20 + u32::from(order)),
    }
}

/// Pods 16 and 17 may ask anybody about names, may connect to port 443 of `names`, and nowhere else.
fn rows(names: &[&str]) -> Vec<Row> {
    let (dns, https) = (
        port_key(Some(Protocol::Udp), 53),
        port_key(Some(Protocol::Tcp), 443),
    );
    let tcp_dns = port_key(Some(Protocol::Tcp), 53);
    let (accept, deny) = (rule(Action::Accept, 0), rule(Action::Deny, 9));
    let ask = [
        (0, deny),
        (tcp_dns, accept),
        (tcp_dns + 1, deny),
        (dns, accept),
        (dns + 1, deny),
    ];
    let site = rule(Action::Accept, 1);
    let secure = [
        (0, Target::Nothing),
        (https, site),
        (https + 1, Target::Nothing),
    ];
    let mut rows = vec![
        policy(PolicyRow::Settings(SettingsRow {
            unbound: Action::Accept,
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
            audit_node: false,
            unlisted_pods: false,
        })),
        span(1, &ask),
        span(2, &secure),
    ];
    for text in names {
        rows.push(policy(PolicyRow::Name(NameRow::parse(text).unwrap())));
        rows.push(policy(PolicyRow::Named(NamedRow {
            layer: LayerId(4),
            name: name(text),
            ports: SpanId(2),
        })));
    }
    for address in RESOLVER {
        rows.push(policy(PolicyRow::Resolver(address.parse().unwrap())));
    }
    let layer = Layer {
        id: LayerId(4),
        classes: false,
        pods: SpanId(1),
        others: SpanId(1),
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Pass,
        miss_rule: RuleId::NONE,
    };
    rows.push(policy(PolicyRow::Ruleset(RulesetRow {
        id: RulesetId(4),
        layers: heapless::Vec::from_slice(&[layer]).unwrap(),
    })));
    for link in [16, 17] {
        rows.push(policy(PolicyRow::Binding(BindingRow {
            link: LinkId::new(link).unwrap(),
            ingress: RulesetId::NONE,
            egress: RulesetId(4),
        })));
    }
    rows
}

pub(crate) fn bench(names: &[&str]) -> Bench {
    let mut bench = node::node();
    bench.commit(&rows(names));
    bench
}

pub(crate) fn counter(bench: &Bench, id: CounterId) -> u64 {
    let stats = bench.pipeline.stats();
    let mut cursor = 0;
    while let Some((counter, next)) = stats.next_from(cursor) {
        if counter.id == id {
            return counter.value;
        }
        cursor = next;
    }
    0
}

/// A pod in a family, and whom it asks.
#[derive(Clone, Copy)]
pub(crate) struct Asker {
    link: u16,
    addresses: &'static Addresses,
    resolver: &'static str,
    port: u16,
}

pub(crate) fn asker(link: u16, family: usize) -> Asker {
    Asker {
        link,
        addresses: [&V4, &V6][family],
        resolver: RESOLVER[family],
        port: 5000 + link,
    }
}

impl Asker {
    pub(crate) fn own(&self) -> &'static str {
        self.addresses.pods[usize::from(self.link) - 16]
    }

    fn ask(&self, bench: &mut Bench, question: &Message) -> Vec<u8> {
        let ask = packet(self.link, self.own(), self.resolver).udp(self.port, 53);
        let end = bench.send(self.link, &ask.payload(&question.0).build());
        end.forwarded(UPLINK).to_vec()
    }

    /// What `from` answers to what left as `asked`.
    fn tell(&self, bench: &mut Bench, from: &str, asked: &[u8], answer: &Message) -> Vec<u8> {
        let (source, port, ..) = ends(asked);
        let answer = packet(UPLINK, from, &source.to_string())
            .udp(53, port)
            .payload(&answer.0);
        let end = bench.send(UPLINK, &answer.build());
        end.forwarded(self.link).to_vec()
    }

    /// Asks and is told.
    pub(crate) fn resolve(
        &self,
        bench: &mut Bench,
        id: u16,
        text: &str,
        address: &str,
        seconds: u32,
    ) {
        let address: IpAddr = address.parse().unwrap();
        let (kind, data) = match address {
            IpAddr::V4(v4) => (A, v4.octets().to_vec()),
            IpAddr::V6(v6) => (AAAA, v6.octets().to_vec()),
        };
        let question = Message::question(id, text, kind);
        let asked = self.ask(bench, &question);
        let answer = Message::to(&question).record(text, kind, seconds, &data);
        self.tell(bench, self.resolver, &asked, &answer);
    }

    /// How the first packet of a connection ends.
    pub(crate) fn connect(
        &self,
        bench: &mut Bench,
        to: &str,
        port: u16,
    ) -> Result<u16, DropReason> {
        let source = 10_000 + (bench.now.micros() / 1000 % 50_000) as u16;
        bench.wait(Duration::from_millis(1));
        let open = packet(self.link, self.own(), to).tcp(source, port, tcp::SYN);
        outcome(&bench.send(self.link, &open.build()))
    }
}

pub(crate) const DENIED: Result<u16, DropReason> = Err(DropReason::PolicyEgress);
pub(crate) const REACHED: Result<u16, DropReason> = Ok(UPLINK);

#[test]
fn n14_a_pod_reaches_what_it_was_told_its_names_are_and_nothing_else() {
    for (family, site) in SITE.iter().enumerate() {
        let mut bench = bench(&["example.com", "*.cdn.test"]);
        let (pod, other) = (asker(16, family), asker(17, family));
        assert_eq!(
            pod.connect(&mut bench, site, 443),
            DENIED,
            "before any answer"
        );
        pod.resolve(&mut bench, 1, "Example.COM", site, 60);
        // The answer has just been sent on: the very next packet is the first one of a connection.
        assert_eq!(pod.connect(&mut bench, site, 443), REACHED);
        assert_eq!(pod.connect(&mut bench, site, 80), DENIED, "another port");
        assert_eq!(other.connect(&mut bench, site, 443), DENIED, "another pod");
        let next = ["198.51.100.81", "2001:db8:99::81"][family];
        assert_eq!(
            pod.connect(&mut bench, next, 443),
            DENIED,
            "another address"
        );
        // Names that are not the rules', and their parts.
        for text in [
            "www.example.com",
            "cdn.test",
            "xcdn.test",
            "com",
            "a.cdn.test.org",
        ] {
            pod.resolve(&mut bench, 2, text, next, 60);
            assert_eq!(pod.connect(&mut bench, next, 443), DENIED, "{text}");
        }
        for text in ["a.cdn.test", "x.y.z.cdn.test"] {
            other.resolve(&mut bench, 3, text, next, 60);
            assert_eq!(other.connect(&mut bench, next, 443), REACHED, "{text}");
        }
        assert_eq!(counter(&bench, CounterId::NamesLearnt), 3);
    }
}

#[test]
fn n14_a_name_holds_for_its_time_and_five_seconds_and_connections_live_on() {
    let mut bench = bench(&["example.com"]);
    let pod = asker(16, 0);
    pod.resolve(&mut bench, 1, "example.com", SITE[0], 0);
    bench.wait(Duration::from_secs(4));
    let source = 40_000;
    let segment = |flags| packet(16, V4.pods[0], SITE[0]).tcp(source, 443, flags);
    let opened = bench.send(16, &segment(tcp::SYN).numbers(100, 0).build());
    let (_, port, ..) = ends(opened.forwarded(UPLINK));
    let answer = packet(UPLINK, SITE[0], V4.node).tcp(443, port, tcp::SYN | tcp::ACK);
    bench
        .send(UPLINK, &answer.numbers(500, 101).build())
        .forwarded(16);
    bench.wait(Duration::from_secs(2));
    assert_eq!(
        pod.connect(&mut bench, SITE[0], 443),
        DENIED,
        "its time is over"
    );
    let go_on = segment(tcp::ACK).numbers(101, 501).build();
    bench.send(16, &go_on).forwarded(UPLINK);
    // Policy changes elsewhere: the connection is judged again, as what it was when it began.
    bench.commit(&[policy(PolicyRow::Name(
        NameRow::parse("other.test").unwrap(),
    ))]);
    bench.send(16, &go_on).forwarded(UPLINK);
    assert_eq!(pod.connect(&mut bench, SITE[0], 443), DENIED);
    // The rule no longer names it: now it is over.
    let remove = ToGuest::Remove(Key::Policy(PolicyKey::Named(
        LayerId(4),
        name("example.com"),
    )));
    bench.change(&[remove]);
    assert_eq!(bench.send(16, &go_on).dropped(), DropReason::PolicyEgress);
}

#[test]
fn d04_only_the_answer_to_ones_own_question_counts() {
    let mut bench = bench(&["example.com"]);
    let (pod, other) = (asker(16, 0), asker(17, 0));
    let question = Message::question(7, "example.com", A);
    let answer = |question: &Message| {
        Message::to(question).record("example.com", A, 60, &[198, 51, 100, 80])
    };
    let asked = pod.ask(&mut bench, &question);
    // Another number, another name, another type; delivered, as any datagram of the connection, and not believed.
    for wrong in [
        Message::question(8, "example.com", A),
        Message::question(7, "example.org", A),
        Message::question(7, "example.com", AAAA),
    ] {
        pod.tell(&mut bench, RESOLVER[0], &asked, &answer(&wrong));
        assert_eq!(pod.connect(&mut bench, SITE[0], 443), DENIED);
    }
    // A question from outside is no answer.
    pod.tell(&mut bench, RESOLVER[0], &asked, &question);
    assert_eq!(pod.connect(&mut bench, SITE[0], 443), DENIED);
    // Somebody else than was asked.
    let (source, port, ..) = ends(&asked);
    let forged = packet(UPLINK, "203.0.113.54", &source.to_string()).udp(53, port);
    let forged = forged.payload(&answer(&question).0).build();
    assert_ne!(outcome(&bench.send(UPLINK, &forged)), Ok(16));
    assert_eq!(pod.connect(&mut bench, SITE[0], 443), DENIED);
    // The right one: for who asked.
    pod.tell(&mut bench, RESOLVER[0], &asked, &answer(&question));
    assert_eq!(pod.connect(&mut bench, SITE[0], 443), REACHED);
    assert_eq!(other.connect(&mut bench, SITE[0], 443), DENIED);
    // It was answered; a second answer says nothing.
    let late = Message::to(&question).record("example.com", A, 60, &[198, 51, 100, 99]);
    pod.tell(&mut bench, RESOLVER[0], &asked, &late);
    assert_eq!(pod.connect(&mut bench, "198.51.100.99", 443), DENIED);
}

#[test]
fn d04_whoever_is_no_resolver_is_not_believed() {
    let mut bench = bench(&["example.com"]);
    let mut pod = asker(16, 0);
    pod.resolver = "203.0.113.66";
    pod.resolve(&mut bench, 1, "example.com", SITE[0], 60);
    assert_eq!(pod.connect(&mut bench, SITE[0], 443), DENIED);
    // An answer that nobody asked for comes to nobody.
    let unasked = packet(UPLINK, RESOLVER[0], V4.node).udp(53, 5016);
    let end = bench.send(UPLINK, &unasked.build());
    assert_ne!(outcome(&end), Ok(16));
}

#[test]
fn n14_answers_through_a_service_count_for_its_backend_and_for_its_address() {
    for believed in [V4.pods[2], V4.cluster_ip] {
        let mut bench = bench(&["example.com"]);
        let mut service = node::Svc::new(&[(V4.pods[2], 5353)], &[]);
        service.protocol = Protocol::Udp;
        service.port = 53;
        let mut all = service.rows(&V4);
        all.push(span(3, &[(0, rule(Action::Accept, 0))]));
        bench.commit(&all);
        let question = Message::question(9, "example.com", A);
        let ask = packet(16, V4.pods[0], V4.cluster_ip)
            .udp(5000, 53)
            .payload(&question.0);
        let answer = Message::to(&question).record("example.com", A, 60, &[198, 51, 100, 80]);
        let answer = packet(18, V4.pods[2], V4.pods[0])
            .udp(5353, 5000)
            .payload(&answer.0);
        // The rules let port 53 out, and the backend has another one.
        assert_eq!(
            bench.send(16, &ask.build()).dropped(),
            DropReason::PolicyEgress
        );
        let mut open = rows(&["example.com"]);
        open.retain(|row| !matches!(row, Row::Policy(PolicyRow::Span(it)) if it.id == SpanId(1)));
        let port = port_key(Some(Protocol::Udp), 5353);
        open.insert(
            1,
            span(
                1,
                &[
                    (0, rule(Action::Deny, 9)),
                    (port, rule(Action::Accept, 0)),
                    (port + 1, rule(Action::Deny, 9)),
                ],
            ),
        );
        bench.commit(&open);
        let pod = asker(16, 0);
        for (is_resolver, reached) in [(false, DENIED), (true, REACHED)] {
            if is_resolver {
                let address = believed.parse().unwrap();
                bench.commit(&[policy(PolicyRow::Resolver(address))]);
            }
            bench.send(16, &ask.build()).forwarded(18);
            bench.send(18, &answer.build()).forwarded(16);
            assert_eq!(pod.connect(&mut bench, SITE[0], 443), reached, "{believed}");
        }
    }
}

#[test]
fn d06_answers_that_a_device_put_together_count_each() {
    let mut bench = bench(&["example.com"]);
    let pod = asker(16, 0);
    // Two datagrams that a device has put together, each as long as the other.
    let questions = [1, 2].map(|id| Message::question(id, "example.com", A));
    let asked = questions.clone().map(|it| pod.ask(&mut bench, &it));
    let answers = [[198, 51, 100, 80], [198, 51, 100, 81]];
    let answers = [0, 1].map(|n| {
        Message::to(&questions[n])
            .record("example.com", A, 60, &answers[n])
            .0
    });
    let (source, port, ..) = ends(&asked[0]);
    let joined = packet(UPLINK, RESOLVER[0], &source.to_string()).udp(53, port);
    let joined = joined.payload(&answers.concat()).build();
    let gso = Gso {
        kind: GsoKind::Udp,
        size: answers[0].len() as u16,
        header: 42,
        ecn: false,
    };
    let offload = Offload {
        gso: Some(gso),
        partial: Some(sluice_appliance::Partial {
            start: 34,
            offset: 6,
        }),
        ..Offload::default()
    };
    bench.send_with(UPLINK, &joined, 0, offload).forwarded(16);
    for site in ["198.51.100.80", "198.51.100.81"] {
        assert_eq!(pod.connect(&mut bench, site, 443), REACHED, "{site}");
    }
}

#[test]
fn n14_names_never_lead_to_the_node_or_to_what_is_local() {
    let mut bench = bench(&["example.com"]);
    let pod = asker(16, 0);
    for (id, address) in (1..).zip([
        "0.0.0.0",
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.1",
        V4.node,
    ]) {
        pod.resolve(&mut bench, id, "example.com", address, 60);
    }
    let link = LinkId::new(16);
    assert_eq!(bench.pipeline.names_from(link, 0), None);
    pod.resolve(&mut bench, 9, "example.com", SITE[0], 60);
    let learnt = Learnt {
        link: link.unwrap(),
        name: name("example.com"),
        address: SITE[0].parse().unwrap(),
        left: 65,
    };
    for of in [link, None] {
        assert_eq!(bench.pipeline.names_from(of, 0), Some((Some(learnt), 1)));
    }
    assert_eq!(bench.pipeline.names_from(link, 1), None);
    assert_eq!(bench.pipeline.names_from(None, 1), None);
}

/// By family: a pod here, a pod behind a peer, an address of the pods' range that no pod has, a ClusterIP, one that no Service
/// has, a load balancer's address, another node, a peer's underlay address.
fn inside() -> [[&'static str; 8]; 2] {
    [
        [
            V4.pods[2],
            "10.244.3.7",
            "10.0.200.9",
            V4.cluster_ip,
            "172.20.99.99",
            "203.0.113.200",
            V4.other_node,
            "192.0.2.77",
        ],
        [
            V6.pods[2],
            "fd44:3::7",
            "fd00:0:0:9::9",
            V6.cluster_ip,
            "fd20::9999",
            "2001:db8:50::200",
            V6.other_node,
            "2001:db8:2::77",
        ],
    ]
}

/// What makes those addresses be inside, but for what every node has.
fn inside_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (family, addresses) in [V4, V6].into_iter().enumerate() {
        let [.., balancer, _, underlay] = inside()[family];
        rows.push(node::known(addresses.cluster_ip, AddressRole::Cluster));
        rows.push(node::known(balancer, AddressRole::External));
        let peer = PeerId(7 + u16::try_from(family).unwrap());
        rows.push(Row::Overlay(OverlayRow::Peer(PeerRow {
            id: peer,
            address: node::ip(underlay),
            mac: Mac([2, 0, 0, 0, 9, 9]),
            next_hop: NextHopId(0),
            mtu: 1500,
            direct: true,
        })));
        let prefix = node::prefix(["10.244.3.0/24", "fd44:3::/64"][family]);
        rows.push(Row::Overlay(OverlayRow::Remote(RemoteRow { prefix, peer })));
    }
    rows
}

#[test]
fn n14_an_answer_never_opens_an_address_inside_the_cluster() {
    for (family, addresses) in inside().into_iter().enumerate() {
        let mut bench = bench(&["example.com"]);
        bench.commit(&inside_rows());
        let pod = asker(16, family);
        for (id, address) in (1..).zip(addresses) {
            pod.resolve(&mut bench, id, "example.com", address, 60);
            let open = packet(16, pod.own(), address).tcp(30_000, 443, tcp::SYN);
            let end = bench.send(16, &open.build()).verdict;
            assert!(!matches!(end, Verdict::Forward(_)), "{address}: {end:?}");
            assert_eq!(
                bench.pipeline.names_from(LinkId::new(16), 0),
                None,
                "{address} was learnt"
            );
        }
        pod.resolve(&mut bench, 99, "example.com", SITE[family], 60);
        assert_eq!(pod.connect(&mut bench, SITE[family], 443), REACHED);
    }
}

#[test]
fn n14_what_comes_to_lie_inside_the_cluster_is_no_longer_open_by_name() {
    for (family, addresses) in inside().into_iter().enumerate() {
        let [_, remote, .., underlay] = addresses;
        let mut bench = bench(&["example.com"]);
        let pod = asker(16, family);
        for (id, address) in (1..).zip([remote, underlay]) {
            pod.resolve(&mut bench, id, "example.com", address, 600);
            assert_eq!(pod.connect(&mut bench, address, 443), REACHED, "{address}");
        }
        bench.commit(&inside_rows());
        for address in [remote, underlay] {
            assert_eq!(pod.connect(&mut bench, address, 443), DENIED, "{address}");
        }
    }
}

#[test]
fn n23_the_next_pod_of_a_link_knows_nothing() {
    let mut bench = bench(&["example.com"]);
    let pod = asker(16, 0);
    pod.resolve(&mut bench, 1, "example.com", SITE[0], 60);
    let mut row = sluice_appliance::testing::pod_row(16, 1);
    row.incarnation = 2;
    bench.commit(&[Row::Link(row)]);
    assert_eq!(pod.connect(&mut bench, SITE[0], 443), DENIED);
}

#[test]
fn n14_rows_that_contradict_themselves_are_refused() {
    for (number, wildcard, text) in [(1, false, "example.com"), (0, true, "a b.c")] {
        let mut bench = bench(&[]);
        let mut row = NameRow::parse("example.com").unwrap();
        row.id = NameId(row.id.0 ^ number);
        (row.wildcard, row.text) = (wildcard, heapless::String::try_from(text).unwrap());
        bench.change(&[ToGuest::Put(policy(PolicyRow::Name(row)))]);
        assert_eq!(bench.refused.len(), 1);
    }
}
