//! The whole pipeline against a slow, obvious node: random packets, random answers to what arrived, time, and tables that change
//! at random under live connections. After every step both agree about what became of the packet, and about every connection.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod reference;
mod world;

use proptest::prelude::*;
use reference::{Connection, Expect, Reference, Stage, TCP, UDP};
use sluice_appliance::connection::flow_of;
use sluice_appliance::parse::{Parsed, parse};
use sluice_appliance::testing::node::{HOST, NODE_MAC, ROUTER_MAC, UPLINK, assert_checksums};
use sluice_appliance::testing::{Builder, HEADROOM, Originated, address};
use sluice_appliance::time::Duration;
use sluice_appliance::wire::{icmp, tcp};
use sluice_appliance::{
    Address, Arena, Capacity, Direction, Family, Flow, Frame, Instant, Offload, Pipeline, Verdict,
};
use sluice_contract::{Generation, LinkId, Mac, ToGuest};
use std::collections::HashSet;
use world::{Change, PODS, SERVICES, Sender, TARGET, World, change};

/// Connections that the reference remembers, dead ones included: answers to any of them may still come.
const REMEMBERED: usize = 40;

#[derive(Clone, Debug)]
enum Step {
    /// A first packet, or the same again.
    New {
        sender: Sender,
        target: Target,
        protocol: u8,
        port: u16,
    },
    /// Another packet of one of the connections that there were, from either end.
    Again {
        which: prop::sample::Index,
        direction: Direction,
    },
    Wait(u64),
    Change(Change),
}

#[derive(Clone, Copy, Debug)]
enum Target {
    Pod(usize),
    ClusterIp(usize),
    NodePort(usize),
    LoadBalancer(usize),
    /// A port of a Service's address that it does not have.
    NoPort,
    Unallocated,
    Remote,
    Outside,
    OtherNode,
    Node,
}

fn step() -> impl Strategy<Value = Step> {
    let sender = prop_oneof![
        6 => (0..PODS).prop_map(Sender::Pod),
        1 => Just(Sender::Node),
        2 => Just(Sender::Outside),
        1 => Just(Sender::OtherNode),
    ];
    let target = prop_oneof![
        2 => (0..PODS).prop_map(Target::Pod),
        5 => (0..SERVICES).prop_map(Target::ClusterIp),
        3 => (0..SERVICES).prop_map(Target::NodePort),
        3 => (0..SERVICES).prop_map(Target::LoadBalancer),
        1 => prop::sample::select(vec![Target::NoPort, Target::Unallocated, Target::Remote]),
        2 => prop::sample::select(vec![Target::Outside, Target::OtherNode, Target::Node]),
    ];
    let protocol = prop::sample::select(vec![TCP, TCP, UDP, UDP, 1]);
    let direction = prop::sample::select(vec![Direction::Original, Direction::Reply]);
    prop_oneof![
        8 => (sender, target, protocol, 1000u16..1003).prop_map(|(sender, target, protocol, port)| {
            Step::New { sender, target, protocol, port }
        }),
        10 => (any::<prop::sample::Index>(), direction)
            .prop_map(|(which, direction)| Step::Again { which, direction }),
        1 => (1u64..90).prop_map(Step::Wait),
        1 => prop::sample::select(vec![130u64, 310, 8_000]).prop_map(Step::Wait),
        3 => change().prop_map(Step::Change),
    ]
}

/// Both nodes side by side.
struct Pair<'m> {
    pipeline: Pipeline<'m>,
    reference: Reference,
    now: Instant,
    generation: u64,
    /// All connections that there were, for packets that come late.
    past: Vec<Connection>,
}

impl<'m> Pair<'m> {
    fn new(memory: &'m mut [u8], v6: bool) -> Self {
        let pipeline = Pipeline::new(&mut Arena::new(memory), Capacity::TINY, [3; 16]).unwrap();
        let mut pair = Self {
            pipeline,
            reference: Reference {
                world: World::new(v6),
                connections: Vec::new(),
                affinities: Vec::new(),
                epoch: 0,
                now: 1_000,
            },
            now: Instant::from_micros(1_000_000_000),
            generation: 0,
            past: Vec::new(),
        };
        pair.commit();
        pair
    }

    fn commit(&mut self) {
        self.generation += 1;
        self.reference.epoch += 1;
        let generation = Generation(self.generation);
        let begin = ToGuest::Begin {
            generation,
            fresh: true,
        };
        let puts = self.reference.world.rows().into_iter().map(ToGuest::Put);
        let all = std::iter::once(begin).chain(puts);
        for message in all.chain([ToGuest::Commit { generation }]) {
            while !self.pipeline.work(usize::MAX / 2) {}
            let outcome = self.pipeline.configure(&message);
            let taken = outcome == sluice_appliance::apply::Outcome::Noted || outcome.is_whole();
            assert!(taken, "{message:?}: {outcome:?}");
        }
        while !self.pipeline.work(usize::MAX / 2) {}
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Wait(seconds) => self.wait(*seconds),
            Step::Change(change) => {
                self.reference.world.apply(change);
                self.commit();
            }
            Step::New {
                sender,
                target,
                protocol,
                port,
            } => {
                if let Some(flow) = self.first(*sender, *target, *protocol, *port) {
                    self.packet(*sender, flow, Direction::Original);
                }
            }
            Step::Again { which, direction } => {
                if self.past.is_empty() {
                    return;
                }
                let past = which.get(&self.past).clone();
                let (flow, link) = match direction {
                    Direction::Original => (past.original, past.links[0]),
                    Direction::Reply => (past.reply, past.links[1]),
                };
                let sender = match (link, flow.source()) {
                    (LinkId::HOST, _) => Sender::Node,
                    (LinkId::UPLINK, from) if from == address(self.a().other_node) => {
                        Sender::OtherNode
                    }
                    (LinkId::UPLINK, _) => Sender::Outside,
                    (pod, _) => Sender::Pod(usize::from(pod.raw() - 16)),
                };
                self.packet(sender, flow, *direction);
            }
        }
        self.agree();
    }

    fn a(&self) -> &'static sluice_appliance::testing::node::Addresses {
        self.reference.world.addresses()
    }

    /// Time goes on, in steps that a running node would see, to a moment at which nothing is about to end.
    fn wait(&mut self, seconds: u64) {
        let mut left = seconds;
        loop {
            let span = left.min(50);
            left -= span;
            self.reference.now += span;
            self.now = self.now + Duration::from_secs(span);
            let mut out = Originated::default();
            self.pipeline.sweep(self.now, 1 << 20, &mut out);
            if left == 0 {
                if !self.reference.is_on_the_edge() {
                    break;
                }
                left = 5;
            }
        }
    }

    /// The flow of a first packet; `None` for what nobody would send.
    fn first(&self, sender: Sender, target: Target, protocol: u8, port: u16) -> Option<Flow> {
        let a = self.a();
        let (to, to_port) = match target {
            Target::Pod(pod) => (a.pods[pod], TARGET),
            Target::ClusterIp(n) => (a.cluster_ip, 80 + n as u16),
            Target::NodePort(n) => (a.node, 30_080 + n as u16),
            Target::LoadBalancer(n) => (a.load_balancer, 80 + n as u16),
            Target::NoPort => (a.cluster_ip, 9),
            Target::Unallocated => (a.unallocated, 80),
            Target::Remote => (a.remote, 80),
            Target::Outside => (a.outside, 53),
            Target::OtherNode => (a.other_node, 53),
            Target::Node => (a.node, 22),
        };
        let from_outside = matches!(sender, Sender::Outside | Sender::OtherNode);
        let goes_outside = matches!(target, Target::Remote | Target::Outside | Target::OtherNode);
        let to_itself = sender == Sender::Node && matches!(target, Target::Node);
        if (from_outside && goes_outside) || to_itself {
            return None;
        }
        let (protocol, to_port) = match (protocol, self.reference.world.v6) {
            (1, true) => (58, 0),
            (1, false) => (1, 0),
            (protocol, _) => (protocol, to_port),
        };
        let from = address(sender.address(a));
        Some(Flow::new(from, address(to), protocol, port, to_port))
    }

    /// Builds the packet that an honest end of `flow` would send now, and whether it may begin a connection.
    fn build(&self, sender: Sender, flow: &Flow, direction: Direction) -> (Vec<u8>, bool) {
        let mut builder = Builder::from(sender.link().raw(), "10.0.0.1", "10.0.0.2");
        builder.source = flow.source();
        builder.destination = flow.destination();
        builder = match sender.link().raw() {
            UPLINK => builder.macs(ROUTER_MAC, NODE_MAC),
            HOST => builder.macs(Mac([2, 0, 0, 0, 0, 2]), Mac::GATEWAY),
            _ => builder,
        };
        let (from, to) = (flow.source_port(), flow.destination_port());
        let live = self.reference.find(flow);
        let stage = live.map(|(at, _)| self.reference.connections[at].stage);
        match flow.protocol() {
            TCP => {
                let (flags, sequence, acknowledgment) = match (direction, stage) {
                    (Direction::Original, None | Some(Stage::Asked)) => (tcp::SYN, 1000, 0),
                    (Direction::Original, Some(_)) => (tcp::ACK, 1001, 5001),
                    (Direction::Reply, Some(Stage::Lasting)) => (tcp::ACK, 5001, 1001),
                    (Direction::Reply, _) => (tcp::SYN | tcp::ACK, 5000, 1001),
                };
                let built = builder
                    .tcp(from, to, flags)
                    .numbers(sequence, acknowledgment)
                    .build();
                (built, flags == tcp::SYN)
            }
            UDP => (builder.udp(from, to).payload(b"model").build(), true),
            _ => {
                let v6 = self.reference.world.v6;
                let (kind, id) = match (direction, v6) {
                    (Direction::Original, false) => (icmp::v4::ECHO, from),
                    (Direction::Original, true) => (icmp::v6::ECHO, from),
                    (Direction::Reply, false) => (icmp::v4::ECHO_REPLY, to),
                    (Direction::Reply, true) => (icmp::v6::ECHO_REPLY, to),
                };
                let built = builder.icmp(kind, 0, u32::from(id) << 16 | 1).build();
                (built, direction == Direction::Original)
            }
        }
    }

    fn send(&mut self, link: LinkId, bytes: &[u8]) -> (Verdict, Vec<u8>) {
        let mut buffer = vec![0; HEADROOM + bytes.len() + 256];
        let end = HEADROOM + bytes.len();
        buffer[HEADROOM..end].copy_from_slice(bytes);
        let offload = Offload::default();
        let frame = Frame::new(&mut buffer, HEADROOM, end, 0, link, offload).unwrap();
        let (mut frames, mut verdicts) = ([frame], [Verdict::Held]);
        let mut out = Originated::default();
        self.pipeline
            .process_batch(&mut frames, &mut verdicts, self.now, &mut out);
        assert!(out.0.is_empty());
        assert!(self.pipeline.stats().is_balanced());
        (verdicts[0], frames[0].bytes().to_vec())
    }

    fn packet(&mut self, sender: Sender, flow: Flow, direction: Direction) {
        let (bytes, opens) = self.build(sender, &flow, direction);
        let expect = self.reference.expect(sender, &flow, opens);
        let (verdict, left) = self.send(sender.link(), &bytes);
        let context = format!("{sender:?} sent {flow:?}: {verdict:?}, expected {expect:?}");
        match expect {
            Expect::Drop(reason) => assert_eq!(verdict, Verdict::Drop(reason), "{context}"),
            Expect::Refuse(reason) => {
                let told = [Verdict::Reply, Verdict::Drop(reason)];
                assert!(told.contains(&verdict), "{context}");
            }
            Expect::Pong => {
                let limited = Verdict::Drop(sluice_contract::DropReason::RateLimited);
                assert!([Verdict::Reply, limited].contains(&verdict), "{context}");
            }
            Expect::ToNode => {
                assert_eq!(verdict, Verdict::Forward(LinkId::HOST), "{context}");
                assert_eq!(flow_in(&left), flow, "{context}");
            }
            Expect::Continue(at, direction) => {
                let c = &self.reference.connections[at];
                let (outgoing, link) = match direction {
                    Direction::Original => (c.reply.reversed(), c.links[1]),
                    Direction::Reply => (c.original.reversed(), c.links[0]),
                };
                assert_eq!(verdict, Verdict::Forward(link), "{context}");
                assert_eq!(flow_in(&left), outgoing, "{context}");
                assert_checksums(&left);
                self.reference.touch(at, direction);
            }
            Expect::Begin(beginning) => {
                self.begun(sender, flow, &beginning, verdict, &left, &context);
            }
        }
    }

    /// A connection begins, with a backend and a source that the dataplane chose: both have to be allowed ones.
    fn begun(
        &mut self,
        sender: Sender,
        flow: Flow,
        beginning: &reference::Beginning,
        verdict: Verdict,
        left: &[u8],
        context: &str,
    ) {
        if let Verdict::Drop(reason) = verdict {
            // Policy speaks of the backend, and which one it would have been is not seen: one of them must be forbidden so.
            let mut backends = beginning.backends.iter();
            let forbidden =
                backends.any(|(to, _)| self.reference.allows(sender, &flow, *to) == Err(reason));
            assert!(forbidden, "{context}");
            return;
        }
        let leaves = flow_in(left);
        let backend = (leaves.destination(), leaves.destination_port());
        assert!(
            beginning.backends.contains(&backend),
            "{context}: {leaves:?}"
        );
        let allowed = self.reference.allows(sender, &flow, backend.0);
        assert_eq!(allowed, Ok(()), "{context}");
        assert_eq!(
            verdict,
            Verdict::Forward(self.reference.way_to(backend.0)),
            "{context}"
        );
        assert_checksums(left);
        let reply = leaves.reversed();
        let hairpin = beginning.service.is_some() && backend.0 == flow.source();
        let plain = flow.with_destination(backend.0, backend.1);
        let taken = |reply: &Flow| self.reference.find(reply).is_some();
        assert!(!taken(&reply), "{context}: {reply:?} is another's");
        if beginning.masquerade || hairpin {
            assert_eq!(leaves.source(), address(self.a().node), "{context}");
            assert!(leaves.source_port() >= 49_152, "{context}: {leaves:?}");
        } else if taken(&plain.reversed()) {
            assert_eq!(leaves.source(), flow.source(), "{context}");
            assert!(leaves.source_port() >= 49_152, "{context}: {leaves:?}");
        } else {
            assert_eq!(leaves, plain, "{context}");
        }
        self.reference
            .commit(sender, flow, reply, beginning.service);
        if let Some(service) = beginning.service {
            self.reference.remember(service, flow.source(), backend.0);
        }
        let connection = self.reference.connections.last().unwrap().clone();
        if self.past.len() == REMEMBERED {
            self.past.remove(0);
        }
        self.past.push(connection);
    }

    /// Both know the same connections.
    fn agree(&self) {
        let ct = self.pipeline.conntrack();
        let lookup = |flow: &Flow| ct.lookup(flow, ct.hash(flow), self.now);
        let mut live = HashSet::new();
        for c in &self.reference.connections {
            if self.reference.is_over(c) {
                continue;
            }
            let (one, other) = (lookup(&c.original), lookup(&c.reply));
            let (Some(one), Some(other)) = (one, other) else {
                panic!("{c:?} is not in the table at {}", self.reference.now);
            };
            assert_eq!(one.id, other.id, "{c:?}");
            assert_eq!(ct.original(one.id), Some(c.original));
            assert_eq!(ct.reply(one.id), Some(c.reply));
            live.insert(c.original);
            live.insert(c.reply);
        }
        for c in &self.past {
            for flow in [c.original, c.reply] {
                let known = lookup(&flow).is_some();
                assert!(!known || live.contains(&flow), "{flow:?} should be over");
            }
        }
    }
}

/// The flow of a frame that left.
fn flow_in(frame: &[u8]) -> Flow {
    let mut copy = frame.to_vec();
    let end = copy.len();
    let frame = Frame::new(&mut copy, 0, end, 0, LinkId::HOST, Offload::default()).unwrap();
    let Ok(Parsed::Ip(packet)) = parse(&frame) else {
        panic!("no IP packet: {:02x?}", frame.bytes())
    };
    flow_of(&packet)
}

fn run(v6: bool, steps: &[Step]) {
    let mut memory = vec![0; Capacity::TINY.bytes()];
    let mut pair = Pair::new(&mut memory, v6);
    for step in steps {
        pair.step(step);
    }
}

/// The usual number is for every day; whoever changed something asks for more.
fn cases() -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok();
    ProptestConfig {
        cases: asked.and_then(|cases| cases.parse().ok()).unwrap_or(400),
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    /// Some forty thousand steps; `PROPTEST_CASES` for more.
    #[test]
    fn the_pipeline_is_the_obvious_node(v6: bool, steps in prop::collection::vec(step(), 40..200)) {
        run(v6, &steps);
    }
}

/// The model is not satisfied by everything: a node that forgets a change is found out.
#[test]
fn the_reference_notices_a_node_that_missed_a_change() {
    let mut memory = vec![0; Capacity::TINY.bytes()];
    let mut pair = Pair::new(&mut memory, false);
    pair.reference.world.egress[0] = false;
    let flow = pair
        .first(Sender::Pod(0), Target::Pod(1), UDP, 1000)
        .unwrap();
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        pair.packet(Sender::Pod(0), flow, Direction::Original);
    }));
    assert!(found.is_err());
    assert_eq!(pair.a().family, Family::V4);
    assert_ne!(flow.source(), Address::UNSPECIFIED);
}
