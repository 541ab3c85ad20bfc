//! TCP through the table: two endpoints that obey RFC 9293, and those who do not.

use super::*;
use crate::conntrack::Invalid;
use proptest::prelude::*;

const CLIENT: u32 = 1_000;
const SERVER: u32 = 700_000;

/// A table with one connection, and a word for each of its packets.
struct Wire<'r> {
    table: Conntrack<'r>,
    flow: Flow,
    now: Instant,
    scale: Option<u8>,
    window: u16,
}

use Direction::{Original, Reply};

impl<'r> Wire<'r> {
    fn new(memory: &'r mut Memory) -> Self {
        Self {
            table: memory.table(64),
            flow: Flow::new(v4(1), v4(2), protocol::TCP, 40_000, 80),
            now: at(10),
            scale: Some(7),
            window: 500,
        }
    }

    fn segment(&self, flags: u8, sequence: u32, acknowledgment: u32, length: u32) -> Segment {
        Segment {
            sequence,
            acknowledgment,
            flags,
            window: self.window,
            length,
            scale: self.scale,
        }
    }

    fn send(
        &mut self,
        direction: Direction,
        (flags, sequence, acknowledgment, length): (u8, u32, u32, u32),
    ) -> Result<Track, Invalid> {
        let signal = Signal::Tcp(self.segment(flags, sequence, acknowledgment, length));
        let flow = match direction {
            Original => self.flow,
            Reply => self.flow.reversed(),
        };
        let hash = self.table.hash(&flow);
        let Some(hit) = self.table.lookup(&flow, hash, self.now) else {
            let new = self.table.open(&flow, hash, POD, &signal, self.now)?;
            self.table.commit(&new, self.now).unwrap();
            return Ok(Track::Belongs);
        };
        let tracked = self.table.track(hit, &signal, self.now);
        self.table.audit().unwrap();
        tracked
    }

    fn ok(&mut self, direction: Direction, packet: (u8, u32, u32, u32)) -> State {
        assert_eq!(
            self.send(direction, packet),
            Ok(Track::Belongs),
            "{packet:?}"
        );
        self.state()
    }

    fn refused(&mut self, direction: Direction, packet: (u8, u32, u32, u32), why: Invalid) {
        let before = self.state();
        assert_eq!(self.send(direction, packet), Err(why), "{packet:?}");
        assert_eq!(self.state(), before);
    }

    fn state(&self) -> State {
        let hash = self.table.hash(&self.flow);
        self.table.lookup(&self.flow, hash, self.now).unwrap().state
    }

    fn establish(&mut self) {
        assert_eq!(self.ok(Original, (S, CLIENT, 0, 0)), State::TcpSynSent);
        assert_eq!(
            self.ok(Reply, (S | A, SERVER, CLIENT + 1, 0)),
            State::TcpSynReceived
        );
        let ack = (A, CLIENT + 1, SERVER + 1, 0);
        assert_eq!(self.ok(Original, ack), State::TcpEstablished);
    }
}

const S: u8 = flag::SYN;
const A: u8 = flag::ACK;
const R: u8 = flag::RST;
const F: u8 = flag::FIN;

#[test]
fn k02_a_connection_is_opened_used_and_closed() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.establish();
    let (c, s) = (CLIENT + 1, SERVER + 1);
    wire.ok(Original, (A, c, s, 100));
    wire.ok(Reply, (A, s, c + 100, 60_000));
    wire.ok(Original, (A, c + 100, s + 60_000, 0));
    assert_eq!(
        wire.ok(Original, (F | A, c + 100, s + 60_000, 0)),
        State::TcpHalfClosed
    );
    assert_eq!(
        wire.ok(Reply, (A, s + 60_000, c + 101, 0)),
        State::TcpHalfClosed
    );
    // Half-closed: the other side goes on for as long as it likes.
    assert_eq!(
        wire.ok(Reply, (A, s + 60_000, c + 101, 1_000)),
        State::TcpHalfClosed
    );
    assert_eq!(
        wire.ok(Original, (A, c + 101, s + 61_000, 0)),
        State::TcpHalfClosed
    );
    assert_eq!(
        wire.ok(Reply, (F | A, s + 61_000, c + 101, 0)),
        State::TcpClosing
    );
    assert_eq!(
        wire.ok(Original, (A, c + 101, s + 61_001, 0)),
        State::TcpTimeWait
    );
    // A retransmitted FIN and its acknowledgment still pass.
    assert_eq!(
        wire.ok(Reply, (F | A, s + 61_000, c + 101, 0)),
        State::TcpTimeWait
    );
    assert_eq!(
        wire.ok(Original, (A, c + 101, s + 61_001, 0)),
        State::TcpTimeWait
    );
}

#[test]
fn k02_both_may_open_at_once() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.ok(Original, (S, CLIENT, 0, 0));
    assert_eq!(wire.ok(Reply, (S, SERVER, 0, 0)), State::TcpSynCrossed);
    wire.refused(
        Original,
        (A, CLIENT + 1, SERVER + 1, 0),
        Invalid::NotOpening,
    );
    let first = (S | A, CLIENT, SERVER + 1, 0);
    assert_eq!(wire.ok(Original, first), State::TcpSynReceived);
    let second = (S | A, SERVER, CLIENT + 1, 0);
    assert_eq!(wire.ok(Reply, second), State::TcpEstablished);
    wire.ok(Original, (A, CLIENT + 1, SERVER + 1, 60_000));
    wire.ok(Reply, (A, SERVER + 1, CLIENT + 60_001, 60_000));
}

#[test]
fn k02_a_syn_in_time_wait_begins_another_connection() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.establish();
    let (c, s) = (CLIENT + 1, SERVER + 1);
    wire.ok(Original, (F | A, c, s, 0));
    wire.ok(Reply, (F | A, s, c + 1, 0));
    assert_eq!(wire.ok(Original, (A, c + 1, s + 1, 0)), State::TcpTimeWait);
    assert_eq!(wire.send(Original, (S, 9_000_000, 0, 0)), Ok(Track::Anew));
    assert_eq!(wire.table.used(), 0);
    assert_eq!(wire.ok(Original, (S, 9_000_000, 0, 0)), State::TcpSynSent);
}

#[test]
fn k02_a_blind_reset_closes_nothing() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.establish();
    let (c, s) = (CLIENT + 1, SERVER + 1);
    wire.ok(Original, (A, c, s, 100));
    // Windows are 64 000 bytes.
    for direction in [Original, Reply] {
        let next = if direction == Original { c + 100 } else { s };
        for offset in [65_000, 1 << 20, 1 << 31, u32::MAX - 65_000] {
            let sequence = next.wrapping_add(offset);
            wire.refused(direction, (R, sequence, 0, 0), Invalid::Reset);
        }
    }
    // Within the window, but not what the receiver expects next: it answers with a challenge, and the connection goes on.
    assert_eq!(wire.ok(Reply, (R, s + 50, 0, 0)), State::TcpResetPending);
    assert_eq!(wire.ok(Original, (A, c + 100, s, 0)), State::TcpEstablished);
    // Exactly that: closed.
    assert_eq!(wire.ok(Reply, (R | A, s, c + 100, 0)), State::TcpClosed);
}

#[test]
fn a_loose_reset_that_nobody_contradicts_ends_the_connection_soon() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.establish();
    wire.ok(Reply, (R, SERVER + 51, 0, 0));
    wire.now = at(39);
    wire.table.sweep(wire.now, 1_000);
    assert_eq!(wire.table.used(), 1);
    wire.now = at(41);
    wire.table.sweep(wire.now, 1_000);
    assert_eq!(wire.table.used(), 0);
}

#[test]
fn a_refused_connection_is_closed_by_the_right_reset_only() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.ok(Original, (S, CLIENT, 0, 0));
    wire.refused(Reply, (R | A, 0, CLIENT + 2, 0), Invalid::Reset);
    wire.refused(Reply, (R, 0, CLIENT + 1, 0), Invalid::Reset);
    assert_eq!(wire.ok(Reply, (R | A, 0, CLIENT + 1, 0)), State::TcpClosed);
    assert_eq!(
        wire.send(Original, (S, CLIENT + 64_000, 0, 0)),
        Ok(Track::Anew)
    );
}

#[test]
fn data_with_the_syn_may_be_acknowledged_or_not() {
    for accepted in [0, 500] {
        let mut memory = Memory::new(64);
        let mut wire = Wire::new(&mut memory);
        wire.ok(Original, (S, CLIENT, 0, 500));
        let syn_ack = (S | A, SERVER, CLIENT + 1 + accepted, 0);
        assert_eq!(wire.ok(Reply, syn_ack), State::TcpSynReceived);
        let again = (A, CLIENT + 1 + accepted, SERVER + 1, 500);
        assert_eq!(wire.ok(Original, again), State::TcpEstablished);
    }
}

#[test]
fn half_open_peers_can_find_out() {
    // RFC 9293 §3.5.1, figure 9: the server remembers an earlier life, acknowledges it, and is reset.
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.ok(Original, (S, CLIENT, 0, 0));
    assert_eq!(wire.ok(Reply, (A, 42, 77, 0)), State::TcpSynSent);
    assert_eq!(wire.ok(Original, (R, 77, 0, 0)), State::TcpSynSent);
    assert_eq!(wire.ok(Original, (S, CLIENT, 0, 0)), State::TcpSynSent);
    assert_eq!(
        wire.ok(Reply, (S | A, SERVER, CLIENT + 1, 0)),
        State::TcpSynReceived
    );
}

#[test]
fn a_syn_inside_a_connection_changes_nothing_unless_both_ends_begin_anew() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.establish();
    let (c, s) = (CLIENT + 1, SERVER + 1);
    assert_eq!(
        wire.ok(Original, (S, 5_000_000, 0, 0)),
        State::TcpEstablished
    );
    // The challenge of RFC 5961 §4.2: the connection lives, and a late SYN-ACK is none.
    assert_eq!(wire.ok(Reply, (A, s, c, 0)), State::TcpEstablished);
    let late = (S | A, 8_000_000, 5_000_001, 0);
    wire.refused(Reply, late, Invalid::Sequence);
    // The server has forgotten: the handshake is a new one.
    wire.ok(Original, (S, 5_000_000, 0, 0));
    assert_eq!(wire.ok(Reply, late), State::TcpSynReceived);
    let ack = (A, 5_000_001, 8_000_001, 0);
    assert_eq!(wire.ok(Original, ack), State::TcpEstablished);
    let old = (A, 8_000_001_u32.wrapping_sub(16 << 20), c, 100);
    wire.refused(Reply, old, Invalid::Sequence);
    wire.ok(Reply, (A, 8_000_001, 5_000_001, 1_000));
}

#[test]
fn windows_are_scaled_only_if_both_ends_say_so() {
    for (client, server, limit) in [
        (Some(7), Some(7), 64_000),
        (Some(7), None, 500),
        (None, Some(7), 500),
        (None, None, 500),
    ] {
        let mut memory = Memory::new(64);
        let mut wire = Wire::new(&mut memory);
        wire.scale = client;
        wire.ok(Original, (S, CLIENT, 0, 0));
        wire.scale = server;
        wire.ok(Reply, (S | A, SERVER, CLIENT + 1, 0));
        wire.ok(Original, (A, CLIENT + 1, SERVER + 1, 0));
        wire.ok(Reply, (A, SERVER + 1, CLIENT + 1, 0));
        let beyond = (A, CLIENT + 1 + limit + 1, SERVER + 1, 10);
        wire.refused(Original, beyond, Invalid::Sequence);
        wire.ok(Original, (A, CLIENT + 1 + limit, SERVER + 1, 10));
    }
}

#[test]
fn s25_what_is_outside_the_window_is_invalid() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.establish();
    let (c, s) = (CLIENT + 1, SERVER + 1);
    wire.ok(Reply, (A, s, c, 0));
    wire.refused(Original, (A, c + 64_001, s, 100), Invalid::Sequence);
    wire.refused(
        Original,
        (A, c.wrapping_sub(70_000), s, 100),
        Invalid::Sequence,
    );
    wire.refused(Original, (A, c, s + 1, 100), Invalid::Acknowledgment);
    wire.refused(
        Original,
        (A, c, s.wrapping_sub(70_000), 100),
        Invalid::Acknowledgment,
    );
    // A keep-alive, and a retransmission of all that is under way.
    wire.ok(Original, (A, c - 1, s, 0));
    wire.ok(Original, (A, c, s, 64_000));
    wire.ok(Original, (A, c, s, 64_000));
}

#[test]
fn impossible_flags_are_invalid_everywhere() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    let impossible = [
        0,
        F,
        S | F,
        S | R,
        F | R,
        S | A | F,
        F | flag::PSH | flag::URG,
        S | F | A | R,
    ];
    for flags in impossible {
        assert_eq!(wire.send(Original, (flags, 1, 1, 0)), Err(Invalid::Flags));
    }
    for flags in [A, F | A, S | A, R, R | A] {
        assert_eq!(
            wire.send(Original, (flags, 1, 1, 0)),
            Err(Invalid::NotOpening)
        );
    }
    wire.establish();
    for flags in impossible {
        wire.refused(Original, (flags, CLIENT + 1, SERVER + 1, 0), Invalid::Flags);
    }
    // ECN's bits and PSH say nothing about the state.
    wire.ok(Original, (A | flag::PSH | 0xc0, CLIENT + 1, SERVER + 1, 5));
}

#[test]
fn k09_flows_are_picked_up_midway_only_if_and_while_told_so() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    let first = (A, CLIENT, SERVER, 100);
    assert_eq!(wire.send(Original, first), Err(Invalid::NotOpening));
    wire.table
        .adopt_midflow(wire.now + Duration::from_secs(120));
    assert_eq!(wire.ok(Original, first), State::TcpMidflow);
    assert_eq!(
        wire.ok(Original, (A, CLIENT + 100, SERVER, 100)),
        State::TcpMidflow
    );
    assert_eq!(
        wire.ok(Reply, (A, SERVER, CLIENT + 200, 0)),
        State::TcpEstablished
    );
    // From here on as any other; though the scale is not known and the largest is assumed.
    wire.refused(Reply, (R, SERVER + 0x4000_0000, 0, 0), Invalid::Reset);
    wire.refused(Reply, (A, SERVER, CLIENT + 900, 0), Invalid::Acknowledgment);
    assert_eq!(wire.ok(Reply, (R, SERVER, 0, 0)), State::TcpClosed);
    wire.now = wire.now + Duration::from_secs(120);
    assert_eq!(wire.send(Original, first), Err(Invalid::NotOpening));
    assert!(wire.table.counters().invalid >= 4);
}

#[test]
fn icmp_errors_find_the_flow_of_a_segment_under_way() {
    let mut memory = Memory::new(64);
    let mut wire = Wire::new(&mut memory);
    wire.establish();
    wire.ok(Original, (A, CLIENT + 1, SERVER + 1, 1_000));
    let quoted = wire.flow;
    let hit = wire
        .table
        .related(&quoted, Some(CLIENT + 1), wire.now)
        .unwrap();
    assert_eq!(hit.direction, Reply);
    let hit = wire
        .table
        .related(&quoted.reversed(), Some(SERVER + 1), wire.now);
    assert_eq!(hit.unwrap().direction, Original);
    assert!(wire.table.related(&quoted, None, wire.now).is_some());
    for guess in [CLIENT + 2_000, CLIENT.wrapping_sub(70_000), 1 << 31] {
        assert_eq!(wire.table.related(&quoted, Some(guess), wire.now), None);
    }
    // Errors are no use of the connection.
    for _ in 0..124 {
        assert!(wire.table.related(&quoted, None, wire.now).is_some());
        wire.now = wire.now + Duration::from_secs(60);
        wire.table.sweep(wire.now, 0);
    }
    assert_eq!(wire.table.related(&quoted, None, wire.now), None);
}

/// An endpoint that obeys its peer's window, on a network that loses, repeats and reorders.
#[derive(Debug, Default, Clone)]
struct Endpoint {
    next: u32,
    acknowledged: u32,
    /// What it has received in order, from a network that delivers whatever it delivers.
    received: u32,
    offered: u32,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// No packet of two honest endpoints is ever judged invalid, whatever is lost, repeated or late.
    #[test]
    fn honest_endpoints_are_never_refused(
        start in any::<[u32; 2]>(),
        scale in prop::option::of(0u8..15),
        steps in prop::collection::vec((any::<bool>(), 0u8..8, any::<u16>(), any::<u8>()), 1..300),
    ) {
        let mut memory = Memory::new(64);
        let mut wire = Wire::new(&mut memory);
        wire.scale = scale;
        wire.window = 60_000;
        wire.ok(Original, (S, start[0], 0, 0));
        wire.ok(Reply, (S | A, start[1], start[0].wrapping_add(1), 0));
        let first = start.map(|isn| isn.wrapping_add(1));
        wire.ok(Original, (A, first[0], first[1], 0));
        let shift = u32::from(scale.unwrap_or(0));
        let mut ends = [0, 1].map(|side: usize| Endpoint {
            next: first[side],
            acknowledged: first[side],
            received: first[1 - side],
            offered: 60_000,
        });
        // Segments that have passed the table and not yet their receiver: (to, sequence, length, ack, window).
        let mut flying: Vec<(usize, u32, u32, u32, u32)> = Vec::new();
        for (side, what, size, pick) in steps {
            let side = usize::from(side);
            let other = 1 - side;
            if what < 3 && !flying.is_empty() {
                // One of them arrives; sometimes it stays, to arrive again.
                let at = usize::from(pick) % flying.len();
                let (to, sequence, length, ack, window) = flying[at];
                if what > 0 {
                    flying.swap_remove(at);
                }
                let end = &mut ends[to];
                if sequence.wrapping_sub(end.received) as i32 <= 0 {
                    let upto = sequence.wrapping_add(length);
                    if upto.wrapping_sub(end.received) as i32 > 0 {
                        end.received = upto;
                    }
                }
                if ack.wrapping_sub(end.acknowledged) as i32 >= 0 {
                    end.acknowledged = ack;
                    end.offered = window;
                }
                continue;
            }
            let window = size % 60_001;
            let end = ends[side].clone();
            let flight = end.next.wrapping_sub(end.acknowledged);
            let room = end.offered.saturating_sub(flight);
            let length = (u32::from(size) << (pick % 5)).min(room).min(200_000);
            let (sequence, length) = match what {
                // A retransmission from the oldest byte on.
                3 => (end.acknowledged, flight.min(1_400)),
                4 => (end.next, 0),
                _ => (end.next, length),
            };
            wire.window = window;
            let packet = (A, sequence, end.received, length);
            let direction = if side == 0 { Original } else { Reply };
            prop_assert_eq!(wire.send(direction, packet), Ok(Track::Belongs));
            let upto = sequence.wrapping_add(length);
            if upto.wrapping_sub(end.next) as i32 > 0 {
                ends[side].next = upto;
            }
            flying.push((other, sequence, length, end.received, u32::from(window) << shift));
        }
        prop_assert_eq!(wire.state(), State::TcpEstablished);
    }

    /// Whatever arrives, nothing panics and the invariants hold.
    #[test]
    fn any_segments_leave_a_sound_table(
        steps in prop::collection::vec(
            (any::<bool>(), any::<u8>(), any::<[u32; 2]>(), 0u32..70_000, 0u64..3_000), 1..80),
        midflow: bool,
    ) {
        let mut memory = Memory::new(64);
        let mut wire = Wire::new(&mut memory);
        if midflow {
            wire.table.adopt_midflow(at(1_000_000));
        }
        for (reply, flags, [sequence, acknowledgment], length, seconds) in steps {
            let direction = if reply { Reply } else { Original };
            // Small numbers meet more often.
            let near = |n: u32| if n & 1 == 0 { n } else { n % 200_000 };
            let packet = (flags & 0x37, near(sequence), near(acknowledgment), length);
            let _ = wire.send(direction, packet);
            wire.now = wire.now + Duration::from_millis(seconds);
            wire.table.sweep(wire.now, 4);
            wire.table.audit().unwrap();
        }
    }
}
