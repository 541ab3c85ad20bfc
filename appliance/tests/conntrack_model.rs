//! The connection table against a slow, obvious one: a vector that is searched from end to end. Random packets, time,
//! evictions, quotas; after every step both say the same and the table's own invariants hold.

use proptest::prelude::*;
use sluice_appliance::address::Address;
use sluice_appliance::conntrack::{
    Attached, CommitError, Conntrack, Hit, Segment, Settings, Signal, Standing, State, Track,
    Visit, flag,
};
use sluice_appliance::flow::{Direction, Flow};
use sluice_appliance::hash::Hasher;
use sluice_appliance::time::{Duration, Instant};
use sluice_contract::LinkId;

/// Time goes on in whole places of the timer wheel, and all timeouts end in the middle of one: so a sweep ends exactly
/// what is over.
const PLACE: u64 = 1_024 << 7;
const CAPACITY: u32 = 20;
const POD_SHARE: u8 = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Syn,
    SynAck,
    Ack,
    Data,
    Fin,
    Reset,
    /// A RST within the window, but not at its edge.
    LooseReset,
    /// Far outside the window.
    WildData,
    WildReset,
}

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

/// A connection as the reference knows it.
#[derive(Clone, Debug)]
struct Known {
    serial: u32,
    original: Flow,
    reply: Flow,
    owner: LinkId,
    state: State,
    seen: u64,
    /// When it came to its standing: the order of eviction.
    arrived: u64,
    slots: u32,
    /// Next sequence number of each side, and which FINs were sent and acknowledged.
    next: [u32; 2],
    fin: [bool; 2],
    fin_acked: [bool; 2],
}

struct Reference {
    known: Vec<Known>,
    now: u64,
    clock: u64,
    serial: u32,
    settings: Settings,
}

impl Reference {
    fn timeout(&self, state: State) -> u64 {
        self.settings.timeouts.get(state).micros()
    }

    fn is_over(&self, known: &Known) -> bool {
        self.now - known.seen >= self.timeout(known.state)
    }

    fn find(&self, flow: &Flow) -> Option<(usize, Direction)> {
        self.known.iter().enumerate().find_map(|(at, known)| {
            if self.is_over(known) {
                None
            } else if known.original == *flow {
                Some((at, Direction::Original))
            } else {
                (known.reply == *flow).then_some((at, Direction::Reply))
            }
        })
    }

    /// The sweep: what is over is gone.
    fn sweep(&mut self) {
        let (now, timeouts) = (self.now, self.settings.timeouts);
        self.known
            .retain(|known| now - known.seen < timeouts.get(known.state).micros());
    }

    fn make_way(&mut self, flow: &Flow) {
        self.known
            .retain(|known| known.original != *flow && known.reply != *flow);
    }

    fn used(&self) -> u32 {
        self.known.iter().map(|known| known.slots).sum()
    }

    fn enter(&mut self, at: usize, state: State) {
        self.clock += 1;
        let known = &mut self.known[at];
        if known.state.standing() != state.standing() {
            known.arrived = self.clock;
        }
        known.state = state;
        known.seen = self.now;
    }

    /// What a commit is expected to end in, with the evictions it takes.
    fn commit(&mut self, original: Flow, reply: Flow, owner: LinkId, state: State) -> Outcome {
        let slots = 1 + u32::from(original.is_v6() && reply != original.reversed());
        // Connections that are over make way, even if the sweep has not come to them.
        self.make_way(&original);
        if self.find(&reply).is_some() {
            return Outcome::ReplyTaken;
        }
        self.make_way(&reply);
        if owner.is_pod() {
            let held: u32 = self
                .known
                .iter()
                .filter(|k| k.owner == owner)
                .map(|k| k.slots)
                .sum();
            if held + slots > CAPACITY * u32::from(POD_SHARE) / 100 {
                return Outcome::Quota;
            }
        }
        while self.used() + slots > CAPACITY {
            let oldest = self
                .known
                .iter()
                .enumerate()
                .filter(|(_, known)| known.state.standing() != Standing::Established)
                .min_by_key(|(_, known)| (known.state.standing(), known.arrived));
            let Some((at, _)) = oldest else {
                return Outcome::Full;
            };
            self.known.remove(at);
        }
        self.clock += 1;
        self.serial += 1;
        self.known.push(Known {
            serial: self.serial,
            original,
            reply,
            owner,
            state,
            seen: self.now,
            arrived: self.clock,
            slots,
            next: [1_001, 0],
            fin: [false; 2],
            fin_acked: [false; 2],
        });
        Outcome::Committed
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Committed,
    ReplyTaken,
    Full,
    Quota,
    Impossible,
}

/// What the reference expects of a packet of a known TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    To(State),
    Aside,
    Anew,
    Invalid,
}

/// A segment that the side would send, and what becomes of it. The reference has no windows: numbers are either those of
/// an obedient endpoint, or far off.
fn tcp_packet(known: &mut Known, side: usize, kind: Kind) -> (Segment, Expect) {
    let other = 1 - side;
    // Of a connection that was refused one side has no numbers; all that is left to ask is whether it can be tried again.
    let refused = known.state == State::TcpClosed && known.next[1] == 0;
    let kind = if refused { Kind::Syn } else { kind };
    let handshake = matches!(known.state, State::TcpSynSent | State::TcpSynReceived);
    let over = matches!(known.state, State::TcpTimeWait | State::TcpClosed);
    let ack = known.next[other];
    let mut segment = Segment {
        sequence: known.next[side],
        acknowledgment: ack,
        flags: flag::ACK,
        window: 40_000,
        length: 0,
        scale: Some(3),
    };
    let expect = match (kind, known.state) {
        (Kind::Syn, State::TcpSynSent) if side == 0 => {
            segment.sequence = 1_000;
            Expect::To(State::TcpSynSent)
        }
        (Kind::Syn, State::TcpSynSent) => {
            // A crossing SYN would be accepted; not part of this model.
            segment.flags = 0;
            return (segment, Expect::Invalid);
        }
        (Kind::Syn, _) if over => Expect::Anew,
        (Kind::Syn, _) => Expect::Aside,
        (Kind::SynAck, State::TcpSynSent) if side == 1 => {
            segment.sequence = 5_000;
            known.next[1] = 5_001;
            Expect::To(State::TcpSynReceived)
        }
        (Kind::SynAck, State::TcpSynSent) => Expect::Invalid,
        (Kind::SynAck, state) => {
            // The one that opened the connection, again; or the opener's own, which acknowledges like any other segment.
            segment.sequence = known.next[side].wrapping_sub(1);
            if state == State::TcpSynReceived && side == 0 {
                Expect::To(State::TcpEstablished)
            } else {
                Expect::Aside
            }
        }
        (Kind::Ack | Kind::Data | Kind::Fin, State::TcpSynSent) if side == 0 => Expect::Invalid,
        (Kind::Ack | Kind::Data | Kind::Fin, State::TcpSynSent) => Expect::Aside,
        (Kind::Reset, State::TcpSynSent) if side == 1 => Expect::To(State::TcpClosed),
        (Kind::Reset | Kind::LooseReset | Kind::WildReset, State::TcpSynSent) if side == 0 => {
            Expect::Aside
        }
        (Kind::LooseReset | Kind::WildReset, State::TcpSynSent) => {
            segment.acknowledgment = ack.wrapping_add(500_000);
            Expect::Invalid
        }
        (Kind::WildData, State::TcpSynSent) if side == 0 => Expect::Invalid,
        (Kind::WildData, State::TcpSynSent) => Expect::Aside,
        (Kind::WildData | Kind::WildReset, _) => Expect::Invalid,
        (Kind::Reset | Kind::LooseReset, _) if over => Expect::Aside,
        (Kind::Reset, _) => Expect::To(State::TcpClosed),
        (Kind::LooseReset, _) => Expect::To(State::TcpResetPending),
        (Kind::Ack | Kind::Data | Kind::Fin, _) => {
            let may_send = !handshake && !known.fin[side] && !over;
            if kind == Kind::Data && may_send {
                segment.length = 700;
                known.next[side] = known.next[side].wrapping_add(700);
            }
            let fin = kind == Kind::Fin && (may_send || (handshake && side == 0));
            if fin {
                known.next[side] = known.next[side].wrapping_add(1);
                known.fin[side] = true;
                segment.flags |= flag::FIN;
            }
            if known.fin[other] {
                known.fin_acked[other] = true;
            }
            Expect::To(match (known.state, side) {
                (State::TcpSynReceived, 1) => State::TcpSynReceived,
                (State::TcpClosed, _) => State::TcpClosed,
                _ => match (known.fin, known.fin_acked) {
                    ([false, false], _) => State::TcpEstablished,
                    ([true, true], [true, true]) => State::TcpTimeWait,
                    ([true, true], _) => State::TcpClosing,
                    _ => State::TcpHalfClosed,
                },
            })
        }
    };
    match kind {
        Kind::Syn => {
            segment.flags = flag::SYN;
            segment.acknowledgment = 0;
        }
        Kind::SynAck => segment.flags = flag::SYN | flag::ACK,
        Kind::Reset | Kind::LooseReset | Kind::WildReset => segment.flags = flag::RST | flag::ACK,
        _ => {}
    }
    if kind == Kind::LooseReset {
        segment.sequence = segment.sequence.wrapping_sub(3);
    }
    if matches!(kind, Kind::WildData | Kind::WildReset) {
        segment.sequence = segment.sequence.wrapping_add(0x3000_0000);
    }
    (segment, expect)
}

fn address(group: u8, n: u8, v6: bool) -> Address {
    if v6 {
        Address([0xfd, 0, 0, group, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n])
    } else {
        Address::v4([10, group, 0, n])
    }
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
