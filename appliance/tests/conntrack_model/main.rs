//! The connection table against a slow, obvious one: a vector that is searched from end to end. Random packets, time,
//! evictions, quotas; after every step both say the same and the table's own invariants hold.

mod reference;

use proptest::prelude::*;
use reference::{CAPACITY, Expect, Kind, Outcome, POD_SHARE, Reference, address, tcp_packet};
use sluice_appliance::conntrack::{
    Attached, CommitError, Conntrack, Hit, Segment, Settings, Signal, State, Track, Visit, flag,
};
use sluice_appliance::flow::{Direction, Flow};
use sluice_appliance::hash::Hasher;
use sluice_appliance::time::{Duration, Instant};
use sluice_contract::LinkId;

/// Time goes on in whole places of the timer wheel, and all timeouts end in the middle of one: so a sweep ends exactly
/// what is over.
const PLACE: u64 = 1_024 << 7;

#[derive(Clone, Copy, Debug)]
enum Step {
    Packet {
        client: u8,
        protocol: u8,
        v6: bool,
        reply: bool,
        kind: Kind,
        /// The service has two backends; which one a new connection would get.
        backend: u8,
    },
    Wait(u16),
    /// Time goes on and nobody sweeps.
    Lag(u16),
    Remove(u8),
    Flush(u8),
}

fn steps(length: usize) -> impl Strategy<Value = Vec<Step>> {
    use Kind::*;
    let kind = prop::sample::select(vec![
        Syn, Syn, SynAck, SynAck, Ack, Ack, Ack, Data, Fin, Fin, Reset, LooseReset, WildData,
        WildReset,
    ]);
    let packet = (0u8..8, 0u8..4, any::<bool>(), any::<bool>(), kind, 0u8..3).prop_map(
        |(client, protocol, v6, reply, kind, backend)| Step::Packet {
            client,
            protocol: [6, 6, 17, 1][protocol as usize],
            v6,
            reply,
            kind,
            backend,
        },
    );
    let step = prop_oneof![
        20 => packet,
        2 => (0u16..40).prop_map(Step::Wait),
        1 => (0u16..3_000).prop_map(Step::Wait),
        1 => (0u16..60).prop_map(Step::Lag),
        1 => any::<u8>().prop_map(Step::Remove),
        1 => any::<u8>().prop_map(Step::Flush),
    ];
    prop::collection::vec(step, 1..length)
}

struct Pair<'r> {
    table: Conntrack<'r>,
    reference: Reference,
}

impl Pair<'_> {
    fn now(&self) -> Instant {
        Instant::from_micros(self.reference.now)
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Wait(places) => {
                self.reference.now += u64::from(places) * PLACE;
                let now = self.now();
                assert!(!self.table.sweep(now, u32::MAX).behind);
                self.reference.sweep();
            }
            Step::Lag(places) => self.reference.now += u64::from(places) * PLACE,
            Step::Remove(which) => self.remove(which),
            Step::Flush(modulus) => {
                let gone = |serial: u32| serial.is_multiple_of(u32::from(modulus) + 3);
                let now = self.now();
                let mut over = Vec::new();
                let next = self.table.visit(0, u32::MAX, now, |entry| {
                    over.push(entry.attached.words[0]);
                    if gone(entry.attached.words[0]) {
                        Visit::Remove
                    } else {
                        Visit::Keep
                    }
                });
                assert_eq!(next, None);
                self.reference
                    .known
                    .retain(|known| !(gone(known.serial) && over.contains(&known.serial)));
            }
            Step::Packet { .. } => self.packet(step),
        }
        self.compare();
    }

    fn remove(&mut self, which: u8) {
        let live = self.reference.known.len();
        if live == 0 {
            return;
        }
        let at = usize::from(which) % live;
        let flow = self.reference.known[at].reply;
        if self
            .reference
            .find(&flow)
            .is_some_and(|(found, _)| found == at)
        {
            let hit = self.lookup(&flow).expect("it is known");
            self.table.remove(hit.id);
            self.reference.known.remove(at);
        }
    }

    fn lookup(&self, flow: &Flow) -> Option<Hit> {
        self.table.lookup(flow, self.table.hash(flow), self.now())
    }

    fn packet(&mut self, step: Step) {
        let Step::Packet {
            client,
            protocol,
            v6,
            reply,
            kind,
            backend,
        } = step
        else {
            return;
        };
        let service = address(9, 1, v6);
        let port = if protocol == 1 { 0 } else { 80 };
        let mut flow = Flow::new(address(0, client / 2, v6), service, protocol, 1_000, port);
        if reply {
            // From whom the answer would come: the backend of the connection, if there is one.
            flow = match self.reference.find(&flow) {
                Some((at, _)) => self.reference.known[at].reply,
                None => flow.reversed(),
            };
        }
        let expected = self.reference.find(&flow);
        let hit = self.lookup(&flow);
        assert_eq!(hit.is_some(), expected.is_some(), "{flow}");
        match (hit, expected) {
            (Some(hit), Some((at, direction))) => {
                assert_eq!(hit.direction, direction);
                let anew = self.known_packet(hit, at, protocol, kind);
                if anew {
                    self.new_packet(flow, client, kind, backend);
                }
            }
            _ => self.new_packet(flow, client, kind, backend),
        }
    }

    /// Returns whether the packet begins another connection.
    fn known_packet(&mut self, hit: Hit, at: usize, protocol: u8, kind: Kind) -> bool {
        let known = &mut self.reference.known[at];
        assert_eq!(self.table.attached(hit.id).words[0], known.serial);
        assert_eq!(hit.state, known.state);
        assert_eq!(self.table.original(hit.id), Some(known.original));
        assert_eq!(self.table.reply(hit.id), Some(known.reply));
        let reply = hit.direction == Direction::Reply;
        let (signal, expect) = match protocol {
            6 => {
                let (segment, expect) = tcp_packet(known, hit.direction as usize, kind);
                (Signal::Tcp(segment), expect)
            }
            17 => (
                Signal::Datagram,
                Expect::To(match (known.state, reply) {
                    (State::UdpUnreplied, true) => State::UdpReplied,
                    (State::UdpReplied, false) => State::UdpStream,
                    (same, _) => same,
                }),
            ),
            _ => match (kind == Kind::WildData, reply) {
                (true, false) => (Signal::Answer, Expect::Invalid),
                (true, true) => (Signal::Query, Expect::Invalid),
                (false, true) => (Signal::Answer, Expect::To(State::EchoReplied)),
                (false, false) => (Signal::Query, Expect::To(known.state)),
            },
        };
        let now = self.now();
        let tracked = self.table.track(hit, &signal, now);
        let context = format!(
            "{signal:?} {:?} {:?}",
            hit.direction, self.reference.known[at]
        );
        match expect {
            Expect::To(state) => {
                assert_eq!(tracked, Ok(Track::Belongs), "{context}");
                self.reference.enter(at, state);
            }
            Expect::Aside => assert_eq!(tracked, Ok(Track::Belongs), "{context}"),
            Expect::Invalid => assert!(tracked.is_err(), "{context}"),
            Expect::Anew => {
                assert_eq!(tracked, Ok(Track::Anew), "{context}");
                self.reference.known.remove(at);
                return true;
            }
        }
        false
    }

    fn new_packet(&mut self, flow: Flow, client: u8, kind: Kind, backend: u8) {
        let owner = match client % 4 {
            0 => LinkId::UPLINK,
            n => LinkId::new(15 + u16::from(n)).expect("a pod"),
        };
        let (signal, state) = match flow.protocol() {
            6 => {
                let flags = match kind {
                    Kind::Syn => flag::SYN,
                    Kind::SynAck => flag::SYN | flag::ACK,
                    Kind::Reset | Kind::LooseReset | Kind::WildReset => flag::RST,
                    Kind::Fin => flag::FIN | flag::ACK,
                    _ => flag::ACK,
                };
                let segment = Segment {
                    sequence: 1_000,
                    flags,
                    window: 40_000,
                    scale: Some(3),
                    ..Segment::default()
                };
                let state = (kind == Kind::Syn).then_some(State::TcpSynSent);
                (Signal::Tcp(segment), state)
            }
            17 => (Signal::Datagram, Some(State::UdpUnreplied)),
            _ if kind == Kind::WildData => (Signal::Answer, None),
            _ => (Signal::Query, Some(State::EchoUnreplied)),
        };
        let (now, hash) = (self.now(), self.table.hash(&flow));
        let opened = self.table.open(&flow, hash, owner, &signal, now);
        assert_eq!(opened.is_ok(), state.is_some());
        let (Ok(mut new), Some(state)) = (opened, state) else {
            return;
        };
        // 0: not translated. The backend's port is the same for all clients; only UDP of clients 6 and 7 also gets a
        // source of the node's, and the same one, so that translations can clash.
        if backend > 0 {
            let to = address(20, backend, flow.is_v6());
            let port = if flow.protocol() == 1 { 0 } else { 8_080 };
            let mut changed = flow.with_destination(to, port);
            if client >= 6 {
                changed = changed.with_source(address(30, 1, flow.is_v6()), 60_000);
            }
            new.reply = changed.reversed();
        }
        new.attached = Attached {
            words: [self.reference.serial + 1, 2, 3, 4],
            ..Attached::default()
        };
        let reply = new.reply;
        let expected = self.reference.commit(flow, reply, owner, state);
        let committed = self.table.commit(&new, now);
        let outcome = match committed {
            Ok(_) => Outcome::Committed,
            Err(CommitError::ReplyTaken(_)) => Outcome::ReplyTaken,
            Err(CommitError::Full) => Outcome::Full,
            Err(CommitError::Quota) => Outcome::Quota,
            Err(CommitError::Conflict(_) | CommitError::Family) => Outcome::Impossible,
        };
        assert_eq!(outcome, expected);
    }

    fn compare(&mut self) {
        self.table.audit().expect("all invariants");
        assert_eq!(self.table.used(), self.reference.used());
        let mut seen = Vec::new();
        let now = self.now();
        let mut cursor = Some(0);
        while let Some(from) = cursor {
            cursor = self.table.visit(from, 7, now, |entry| {
                seen.push((
                    entry.attached.words[0],
                    entry.state,
                    entry.original,
                    entry.reply,
                ));
                Visit::Keep
            });
        }
        seen.sort_unstable();
        let mut known: Vec<_> = self
            .reference
            .known
            .iter()
            .filter(|known| !self.reference.is_over(known))
            .map(|known| (known.serial, known.state, known.original, known.reply))
            .collect();
        known.sort_unstable();
        assert_eq!(seen, known);
    }
}

fn settings() -> Settings {
    let mut settings = Settings {
        pod_share: POD_SHARE,
        clock_step: Duration::from_secs(100_000),
        ..Settings::default()
    };
    // Of very different lengths; beyond a turn of the wheel too.
    for (state, places) in [
        (State::UdpUnreplied, 30),
        (State::UdpReplied, 300),
        (State::UdpStream, 2_500),
        (State::EchoUnreplied, 20),
        (State::EchoReplied, 100),
        (State::TcpSynSent, 50),
        (State::TcpSynReceived, 60),
        (State::TcpEstablished, 5_000),
        (State::TcpHalfClosed, 1_000),
        (State::TcpClosing, 70),
        (State::TcpTimeWait, 40),
        (State::TcpClosed, 10),
        (State::TcpResetPending, 25),
    ] {
        let timeout = Duration::from_micros(places * PLACE - PLACE / 2);
        settings.timeouts.set(state, timeout);
    }
    settings
}

fn run(steps: &[Step], seed: u8) {
    let bytes = Conntrack::region_bytes(CAPACITY).expect("a capacity");
    let mut memory = vec![seed; bytes + 64];
    let pad = memory.as_ptr().align_offset(64);
    let start = 77 * PLACE;
    let table = Conntrack::new(
        &mut memory[pad..],
        CAPACITY,
        settings(),
        Hasher::new([seed; 16]),
        Instant::from_micros(start),
    );
    let mut pair = Pair {
        table: table.expect("a table"),
        reference: Reference {
            known: Vec::new(),
            now: start,
            clock: 0,
            serial: 0,
            settings: settings(),
        },
    };
    for step in steps {
        pair.step(*step);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn the_table_is_what_the_obvious_one_is(steps in steps(400), seed: u8) {
        run(&steps, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3))]

    #[test]
    fn it_still_is_after_thousands_of_steps(steps in steps(8_000), seed: u8) {
        run(&steps, seed);
    }
}
