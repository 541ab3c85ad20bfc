//! TCP seen from the middle: which segments belong to a connection, and what they make of it.
//!
//! States follow RFC 9293 §3.3.2 as far as both ends can be known from here. Sequence and acknowledgment numbers are
//! judged by the four inequalities of van Rooij, "Real Stateful TCP Packet Filtering in IP Filter" (2001), with window
//! scaling (RFC 7323 §2.3). RST and SYN inside a connection are judged as RFC 5961 §3 and §4 want their receivers to:
//! a guess never closes anything.

use crate::conntrack::Invalid;
use crate::conntrack::segment::flag::FIN;
use crate::conntrack::segment::{Kind, Segment, after, within};
use crate::conntrack::state::State;
use crate::flow::Direction;

/// One direction: what its sender has sent, may send, and is ready to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Half {
    /// One past the highest sequence number sent.
    pub(crate) end: u32,
    /// One past the highest it may send: the other's highest acknowledgment plus window.
    pub(crate) max_end: u32,
    /// The largest window it ever offered, in bytes; 0 until it was seen.
    pub(crate) window: u32,
    /// Of its SYN. [`NO_SCALE`]: it had none.
    pub(crate) scale: u8,
}

pub(crate) const NO_SCALE: u8 = 15;
/// RFC 7323 §2.3.
pub(crate) const MAX_SCALE: u8 = 14;
/// How far behind an acknowledgment may lie, if windows are smaller (the paper's MAXACKWINDOW).
const ACK_WINDOW: u32 = 66_000;

/// Both directions, and what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Tcp {
    pub(crate) half: [Half; 2],
    pub(crate) marks: u8,
}

/// Marks, each for Original; shifted by one for Reply.
const FIN_SENT: u8 = 1;
const FIN_ACKED: u8 = 1 << 2;
/// A SYN inside the connection is waiting for the other end's word on it.
const SYN_ASKED: u8 = 1 << 4;
/// This side sent the SYN-ACK, so the other one's acknowledgment establishes.
pub(crate) const SYN_ANSWERED: u8 = 1 << 6;

/// What a segment does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It belongs to the connection, which goes on in this state.
    To(State),
    /// It may pass, since an end needs it to find out, and changes nothing: no state, no timeout.
    Aside,
    /// The connection is over, and this SYN begins another one.
    Reopen,
}

impl Tcp {
    /// Judges a segment of a known connection and lets it take effect.
    #[inline]
    pub(crate) fn advance(
        &mut self,
        state: State,
        direction: Direction,
        segment: &Segment,
    ) -> Result<Next, Invalid> {
        let kind = segment.kind().ok_or(Invalid::Flags)?;
        match state {
            State::TcpSynSent => self.syn_sent(direction, segment, kind),
            State::TcpSynCrossed if kind != Kind::Rst => self.syn_crossed(direction, segment, kind),
            State::TcpMidflow => self.midflow(direction, segment, kind),
            _ if state.is_one_way() => self.one_way(state, direction, kind),
            _ => match kind {
                Kind::Syn => Ok(self.syn_inside(state, direction)),
                Kind::SynAck => self.syn_ack_inside(state, direction, segment),
                Kind::Rst => self.reset(state, direction, segment),
                Kind::Fin | Kind::Ack => self.transfer(state, direction, segment),
            },
        }
    }

    /// A SYN inside a connection passes and does nothing: a live receiver answers it with a challenge (RFC 5961 §4.2), a
    /// restarted one with a SYN-ACK, for which [`Self::syn_ack_inside`] waits.
    fn syn_inside(&mut self, state: State, direction: Direction) -> Next {
        if matches!(state, State::TcpTimeWait | State::TcpClosed) {
            // RFC 9293 §3.6.1 lets the receiver decide by sequence number or timestamp; it sees the SYN in any case.
            return Next::Reopen;
        }
        self.marks |= SYN_ASKED << direction.index();
        Next::Aside
    }

    fn syn_ack_inside(
        &mut self,
        state: State,
        direction: Direction,
        segment: &Segment,
    ) -> Result<Next, Invalid> {
        let (own, other) = (direction.index(), direction.opposite().index());
        let repeated = segment.end() == self.half[own].end
            || within(
                segment.end(),
                self.half[own].end.wrapping_sub(ACK_WINDOW),
                self.half[own].end,
            );
        if repeated {
            // The simultaneous open's second SYN-ACK acknowledges the first one's SYN.
            let second = state == State::TcpSynReceived
                && self.marks & (SYN_ANSWERED << other) != 0
                && segment.acknowledgment == self.half[other].end;
            return Ok(if second {
                Next::To(State::TcpEstablished)
            } else {
                Next::Aside
            });
        }
        if self.marks & (SYN_ASKED << other) == 0 {
            return Err(Invalid::Sequence);
        }
        // Both ends have begun anew with the same ports. Its first SYN is known only by this acknowledgment.
        self.half[other] = Half {
            end: segment.acknowledgment,
            max_end: segment.acknowledgment,
            window: u32::from(u16::MAX),
            scale: MAX_SCALE,
        };
        self.half[own] = segment.syn_half();
        if self.half[own].scale == NO_SCALE {
            self.half[other].scale = NO_SCALE;
        }
        self.handshake(direction);
        Ok(Next::To(State::TcpSynReceived))
    }

    fn reset(
        &mut self,
        state: State,
        direction: Direction,
        segment: &Segment,
    ) -> Result<Next, Invalid> {
        let (own, other) = (direction.index(), direction.opposite().index());
        let (sender, receiver) = (&self.half[own], &self.half[other]);
        let low = sender.end.wrapping_sub(receiver.window);
        let high = if after(sender.end, sender.max_end) {
            sender.end
        } else {
            sender.max_end
        };
        if after(low, segment.sequence) || after(segment.sequence, high) {
            return Err(Invalid::Reset);
        }
        if matches!(state, State::TcpTimeWait | State::TcpClosed) {
            return Ok(Next::Aside);
        }
        // At the edge of what was sent the receiver accepts it for certain (RFC 5961 §3.2); elsewhere it asks back.
        Ok(Next::To(if segment.sequence == sender.end {
            State::TcpClosed
        } else {
            State::TcpResetPending
        }))
    }

    /// Windows and acknowledgments need both directions: nothing is judged by them here, but by the node that sees both.
    fn one_way(&mut self, state: State, direction: Direction, kind: Kind) -> Result<Next, Invalid> {
        if direction == Direction::Reply {
            return Err(Invalid::Unsolicited);
        }
        match (state, kind) {
            (_, Kind::SynAck) => Err(Invalid::Flags),
            (State::TcpOneWayClosing, Kind::Syn) => Ok(Next::Reopen),
            (State::TcpOneWayOpening, Kind::Syn) => Ok(Next::To(state)),
            (_, Kind::Syn) => Ok(Next::Aside),
            (_, Kind::Fin | Kind::Rst) | (State::TcpOneWayClosing, Kind::Ack) => {
                Ok(Next::To(State::TcpOneWayClosing))
            }
            (_, Kind::Ack) => Ok(Next::To(State::TcpOneWay)),
        }
    }

    fn midflow(
        &mut self,
        direction: Direction,
        segment: &Segment,
        kind: Kind,
    ) -> Result<Next, Invalid> {
        if !matches!(kind, Kind::Fin | Kind::Ack) {
            return match kind {
                Kind::Rst => Ok(Next::Aside),
                _ => Err(Invalid::Flags),
            };
        }
        if self.half[direction.index()].window == 0 {
            self.meet(direction, segment);
        } else {
            let own = &mut self.half[direction.index()];
            if after(segment.end(), own.end) {
                own.end = segment.end();
                own.max_end = own.end.wrapping_add(own.window);
            }
        }
        self.note_fin(direction, segment);
        let [a, b] = &mut self.half;
        if a.window == 0 || b.window == 0 {
            return Ok(Next::To(State::TcpMidflow));
        }
        a.max_end = a.end.wrapping_add(b.window);
        b.max_end = b.end.wrapping_add(a.window);
        Ok(Next::To(self.settled()))
    }

    /// First sight of a direction whose SYN was not seen. Its scale is not known: the largest, so that nothing is refused
    /// that may be right.
    pub(crate) fn meet(&mut self, direction: Direction, segment: &Segment) {
        let window = (u32::from(segment.window) << MAX_SCALE).max(1);
        let end = segment.end();
        self.half[direction.index()] = Half {
            end,
            max_end: end.wrapping_add(window),
            window,
            scale: MAX_SCALE,
        };
    }

    /// An ordinary segment: the four inequalities, then what it teaches.
    #[inline]
    fn transfer(
        &mut self,
        state: State,
        direction: Direction,
        segment: &Segment,
    ) -> Result<Next, Invalid> {
        let (own, other) = (direction.index(), direction.opposite().index());
        let mut sender = self.half[own];
        let mut receiver = self.half[other];
        let ack = segment.acknowledgment;
        let end = segment.end();
        let scale = if sender.scale == NO_SCALE {
            0
        } else {
            sender.scale
        };
        let window = u32::from(segment.window) << scale;

        if after(segment.sequence, sender.max_end) {
            return Err(Invalid::Sequence);
        }
        if !after(
            end,
            sender.end.wrapping_sub(receiver.window).wrapping_sub(1),
        ) {
            return Err(Invalid::Sequence);
        }
        if after(ack, receiver.end) {
            return Err(Invalid::Acknowledgment);
        }
        let behind = sender.window.max(receiver.window).max(ACK_WINDOW);
        if !after(ack, receiver.end.wrapping_sub(behind).wrapping_sub(1)) {
            return Err(Invalid::Acknowledgment);
        }

        sender.window = sender.window.max(window);
        if after(end, sender.end) {
            sender.end = end;
        }
        // It sends more than it was offered and is believed to: the offer was not seen.
        if after(end, sender.max_end) {
            receiver.window = receiver
                .window
                .wrapping_add(end.wrapping_sub(sender.max_end));
        }
        // A closed window is probed with one byte (RFC 9293 §3.8.6.1).
        let limit = ack.wrapping_add(window.max(1));
        if after(limit, receiver.max_end) {
            receiver.max_end = limit;
        }
        self.half[own] = sender;
        self.half[other] = receiver;
        self.note_fin(direction, segment);
        Ok(Next::To(self.following(state, direction)))
    }

    #[inline]
    fn note_fin(&mut self, direction: Direction, segment: &Segment) {
        let (own, other) = (direction.index(), direction.opposite().index());
        self.marks &= !(SYN_ASKED << other);
        if segment.flags & FIN != 0 {
            self.marks |= FIN_SENT << own;
        }
        let fin_acked =
            self.marks & (FIN_SENT << other) != 0 && segment.acknowledgment == self.half[other].end;
        if fin_acked {
            self.marks |= FIN_ACKED << other;
        }
    }

    #[inline]
    fn following(&self, state: State, direction: Direction) -> State {
        match state {
            State::TcpSynReceived | State::TcpSynCrossed
                if self.marks & (SYN_ANSWERED << direction.index()) != 0 =>
            {
                state
            }
            State::TcpClosed => State::TcpClosed,
            _ => self.settled(),
        }
    }

    #[inline]
    const fn settled(&self) -> State {
        const BOTH_SENT: u8 = FIN_SENT * 3;
        const BOTH_ACKED: u8 = FIN_ACKED * 3;
        match (self.marks & BOTH_SENT, self.marks & BOTH_ACKED) {
            (0, _) => State::TcpEstablished,
            (BOTH_SENT, BOTH_ACKED) => State::TcpTimeWait,
            (BOTH_SENT, _) => State::TcpClosing,
            _ => State::TcpHalfClosed,
        }
    }

    /// Whether a packet with this sequence number may have been sent in `direction` and be under way: what an ICMP error
    /// has to quote (RFC 5927 §4.1).
    pub(crate) fn is_in_flight(&self, direction: Direction, sequence: u32) -> bool {
        let sender = &self.half[direction.index()];
        let receiver = &self.half[direction.opposite().index()];
        let behind = sender.window.max(receiver.window).max(ACK_WINDOW);
        within(sequence, sender.end.wrapping_sub(behind), sender.end)
    }
}
