//! How a TCP connection begins, seen from the middle: RFC 9293 §3.5 with its simultaneous and half-open cases, and data in
//! the SYN (RFC 7413).

use crate::conntrack::Invalid;
use crate::conntrack::segment::{Kind, Segment, within};
use crate::conntrack::state::State;
use crate::conntrack::tcp::{Half, MAX_SCALE, NO_SCALE, Next, SYN_ANSWERED, Tcp};
use crate::flow::Direction;

/// The first segment of a flow nobody knows. `midflow`: without its handshake if need be.
pub(crate) fn open(segment: &Segment, midflow: bool) -> Result<(State, Tcp), Invalid> {
    let mut tcp = Tcp::default();
    match segment.kind() {
        None => Err(Invalid::Flags),
        Some(Kind::Syn) => {
            tcp.half[0] = segment.syn_half();
            // Until the reply comes its window is not known; the place remembers how much data the SYN carried.
            tcp.half[1].window = segment.length;
            Ok((State::TcpSynSent, tcp))
        }
        Some(Kind::Ack | Kind::Fin) if midflow => {
            tcp.meet(Direction::Original, segment);
            Ok((State::TcpMidflow, tcp))
        }
        Some(_) => Err(Invalid::NotOpening),
    }
}

impl Segment {
    pub(crate) fn syn_half(&self) -> Half {
        let end = self.end();
        Half {
            end,
            max_end: end,
            window: u32::from(self.window).max(1),
            scale: self.scale.map_or(NO_SCALE, |scale| scale.min(MAX_SCALE)),
        }
    }
}

impl Tcp {
    pub(crate) fn syn_sent(
        &mut self,
        direction: Direction,
        segment: &Segment,
        kind: Kind,
    ) -> Result<Next, Invalid> {
        let carried = self.half[1].window;
        let end = self.half[0].end;
        // RFC 7413: the answer may acknowledge the SYN without the data it carried.
        let answers = segment.acknowledges()
            && within(segment.acknowledgment, end.wrapping_sub(carried), end);
        match (direction, kind) {
            (Direction::Original, Kind::Syn) => {
                self.half[0] = segment.syn_half();
                self.half[1].window = segment.length;
                Ok(Next::To(State::TcpSynSent))
            }
            // The answer to an acknowledgment of an earlier life.
            (Direction::Original, Kind::Rst) => Ok(Next::Aside),
            (Direction::Original, _) => Err(Invalid::NotOpening),
            (Direction::Reply, Kind::SynAck) if answers => {
                self.half[1] = segment.syn_half();
                self.handshake(direction);
                Ok(Next::To(State::TcpSynReceived))
            }
            (Direction::Reply, Kind::Syn) => {
                self.half[1] = segment.syn_half();
                Ok(Next::To(State::TcpSynCrossed))
            }
            (Direction::Reply, Kind::Rst) if answers => Ok(Next::To(State::TcpClosed)),
            (Direction::Reply, Kind::Rst) => Err(Invalid::Reset),
            // The other end remembers an earlier life and says so; the first one will reset it (RFC 9293 §3.5.1).
            (Direction::Reply, Kind::Ack | Kind::Fin | Kind::SynAck) => Ok(Next::Aside),
        }
    }

    /// RFC 9293 §3.5, simultaneous open: after both SYNs each side acknowledges with its SYN again.
    pub(crate) fn syn_crossed(
        &mut self,
        direction: Direction,
        segment: &Segment,
        kind: Kind,
    ) -> Result<Next, Invalid> {
        let (own, other) = (direction.index(), direction.opposite().index());
        if !matches!(kind, Kind::Syn | Kind::SynAck) {
            return Err(Invalid::NotOpening);
        }
        if segment.end() != self.half[own].end {
            return Err(Invalid::Sequence);
        }
        if kind == Kind::Syn {
            return Ok(Next::To(State::TcpSynCrossed));
        }
        if segment.acknowledgment != self.half[other].end {
            return Err(Invalid::Acknowledgment);
        }
        self.handshake(direction);
        Ok(Next::To(State::TcpSynReceived))
    }

    /// Both SYNs are known: windows and scales are.
    pub(crate) fn handshake(&mut self, answerer: Direction) {
        self.marks = SYN_ANSWERED << answerer.index();
        let [a, b] = &mut self.half;
        if a.scale == NO_SCALE || b.scale == NO_SCALE {
            a.scale = NO_SCALE;
            b.scale = NO_SCALE;
        }
        a.max_end = a.end.wrapping_add(b.window);
        b.max_end = b.end.wrapping_add(a.window);
    }
}
