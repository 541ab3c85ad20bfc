//! The slow, obvious table: a vector.

use sluice_appliance::address::Address;
use sluice_appliance::conntrack::{Segment, Settings, Standing, State, flag};
use sluice_appliance::flow::{Direction, Flow};
use sluice_contract::LinkId;

pub(crate) const CAPACITY: u32 = 20;
pub(crate) const POD_SHARE: u8 = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
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

/// A connection as the reference knows it.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) serial: u32,
    pub(crate) original: Flow,
    pub(crate) reply: Flow,
    pub(crate) owner: LinkId,
    pub(crate) state: State,
    pub(crate) seen: u64,
    /// When it came to its standing: the order of eviction.
    pub(crate) arrived: u64,
    pub(crate) slots: u32,
    /// Next sequence number of each side, and which FINs were sent and acknowledged.
    pub(crate) next: [u32; 2],
    pub(crate) fin: [bool; 2],
    pub(crate) fin_acked: [bool; 2],
}

pub(crate) struct Reference {
    pub(crate) known: Vec<Known>,
    pub(crate) now: u64,
    pub(crate) clock: u64,
    pub(crate) serial: u32,
    pub(crate) settings: Settings,
}

impl Reference {
    pub(crate) fn timeout(&self, state: State) -> u64 {
        self.settings.timeouts.get(state).micros()
    }

    pub(crate) fn is_over(&self, known: &Known) -> bool {
        self.now - known.seen >= self.timeout(known.state)
    }

    pub(crate) fn find(&self, flow: &Flow) -> Option<(usize, Direction)> {
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
    pub(crate) fn sweep(&mut self) {
        let (now, timeouts) = (self.now, self.settings.timeouts);
        self.known
            .retain(|known| now - known.seen < timeouts.get(known.state).micros());
    }

    pub(crate) fn make_way(&mut self, flow: &Flow) {
        self.known
            .retain(|known| known.original != *flow && known.reply != *flow);
    }

    pub(crate) fn used(&self) -> u32 {
        self.known.iter().map(|known| known.slots).sum()
    }

    pub(crate) fn enter(&mut self, at: usize, state: State) {
        self.clock += 1;
        let known = &mut self.known[at];
        if known.state.standing() != state.standing() {
            known.arrived = self.clock;
        }
        known.state = state;
        known.seen = self.now;
    }

    /// What a commit is expected to end in, with the evictions it takes.
    pub(crate) fn commit(
        &mut self,
        original: Flow,
        reply: Flow,
        owner: LinkId,
        state: State,
    ) -> Outcome {
        let slots = 1 + u32::from(original.is_v6() && reply != original.reversed());
        // Connections that are over make way, even if the sweep has not come to them.
        self.make_way(&original);
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
        if self.find(&reply).is_some() {
            return Outcome::ReplyTaken;
        }
        self.make_way(&reply);
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
pub(crate) enum Outcome {
    Committed,
    ReplyTaken,
    Full,
    Quota,
    Impossible,
}

/// What the reference expects of a packet of a known TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    To(State),
    Aside,
    Anew,
    Invalid,
}

/// A segment that the side would send, and what becomes of it. The reference has no windows: numbers are either those of
/// an obedient endpoint, or far off.
pub(crate) fn tcp_packet(known: &mut Known, side: usize, kind: Kind) -> (Segment, Expect) {
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

pub(crate) fn address(group: u8, n: u8, v6: bool) -> Address {
    if v6 {
        Address([0xfd, 0, 0, group, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n])
    } else {
        Address::v4([10, group, 0, n])
    }
}
