//! SCTP seen from the middle (RFC 9260): the four-way handshake, verification tags, shutdown and abort.
//!
//! A packet whose verification tag is not the one its receiver asked for is not part of the association (§8.5), which is
//! what keeps blind ABORTs out. An association of several addresses is several connections here; only the path on which
//! it was opened is known.

use crate::conntrack::Invalid;
use crate::conntrack::state::State;
use crate::conntrack::tcp::Next;
use crate::flow::Direction;

/// What of an SCTP packet matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Chunks {
    /// The verification tag of the common header.
    pub tag: u32,
    /// Bit n: a chunk of type n (0 to 14) is in the packet.
    pub kinds: u16,
    /// The initiate tag of an INIT or INIT ACK; otherwise not read.
    pub initiate_tag: u32,
    /// The T bit of an ABORT or SHUTDOWN COMPLETE: the tag is the sender's own, reflected (§8.5.1).
    pub reflected: bool,
}

/// Bits of [`Chunks::kinds`] (RFC 9260 §3.2).
pub mod chunk {
    pub const DATA: u16 = 1;
    pub const INIT: u16 = 1 << 1;
    pub const INIT_ACK: u16 = 1 << 2;
    pub const ABORT: u16 = 1 << 6;
    pub const SHUTDOWN: u16 = 1 << 7;
    pub const SHUTDOWN_ACK: u16 = 1 << 8;
    pub const COOKIE_ECHO: u16 = 1 << 10;
    pub const COOKIE_ACK: u16 = 1 << 11;
    pub const SHUTDOWN_COMPLETE: u16 = 1 << 14;
}
use chunk::{
    ABORT, COOKIE_ACK, COOKIE_ECHO, INIT, INIT_ACK, SHUTDOWN, SHUTDOWN_ACK, SHUTDOWN_COMPLETE,
};

/// The tags that packets of each direction have to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Tags {
    /// 0: not known yet.
    pub(crate) tag: [u32; 2],
    /// The same for an association that is being begun anew inside this one (§5.2.2); 0: none.
    pub(crate) restart: [u32; 2],
}

/// The first packet of a flow nobody knows. `midflow`: without its handshake if need be.
pub(crate) fn open(chunks: &Chunks, midflow: bool) -> Result<(State, Tags), Invalid> {
    let mut tags = Tags::default();
    if chunks.kinds & INIT != 0 {
        if chunks.tag != 0 || chunks.kinds != INIT || chunks.initiate_tag == 0 {
            return Err(Invalid::Tag);
        }
        tags.tag[Direction::Reply.index()] = chunks.initiate_tag;
        return Ok((State::SctpInitSent, tags));
    }
    const HANDSHAKE: u16 = INIT_ACK | COOKIE_ECHO | COOKIE_ACK | ABORT | SHUTDOWN_COMPLETE;
    if midflow && chunks.tag != 0 && chunks.kinds & HANDSHAKE == 0 {
        tags.tag[Direction::Original.index()] = chunks.tag;
        return Ok((State::SctpCookieEchoed, tags));
    }
    Err(Invalid::NotOpening)
}

impl Tags {
    /// Judges a packet of a known association and lets it take effect.
    pub(crate) fn advance(
        &mut self,
        state: State,
        direction: Direction,
        chunks: &Chunks,
    ) -> Result<Next, Invalid> {
        if chunks.kinds & INIT != 0 {
            return self.init(state, direction, chunks);
        }
        let (own, other) = (direction.index(), direction.opposite().index());
        if self.restart[own] != 0 && chunks.tag == self.restart[own] {
            return Ok(self.restarting(direction, chunks));
        }
        let reflected = chunks.reflected
            && chunks.kinds & (ABORT | SHUTDOWN_COMPLETE) != 0
            && self.tag[other] != 0
            && chunks.tag == self.tag[other];
        if self.tag[own] == 0 && state == State::SctpCookieEchoed {
            // Picked up mid-flow: the first packet of this direction tells.
            self.tag[own] = chunks.tag;
        }
        if !reflected && (chunks.tag == 0 || chunks.tag != self.tag[own]) {
            return Err(Invalid::Tag);
        }
        self.known(state, direction, chunks)
    }

    fn init(
        &mut self,
        state: State,
        direction: Direction,
        chunks: &Chunks,
    ) -> Result<Next, Invalid> {
        if chunks.tag != 0 || chunks.kinds != INIT || chunks.initiate_tag == 0 {
            return Err(Invalid::Tag);
        }
        let other = direction.opposite().index();
        match state {
            State::SctpClosed => Ok(Next::Reopen),
            State::SctpInitSent if direction == Direction::Original => {
                self.tag[other] = chunks.initiate_tag;
                Ok(Next::To(State::SctpInitSent))
            }
            // Both began at once: whichever handshake ends first is the association, both have the same tags (§5.2.1).
            State::SctpInitSent | State::SctpInitAcked | State::SctpCookieEchoed => Ok(Next::Aside),
            // A restart (§5.2.2). The old association goes on until the new one's cookie is accepted.
            _ => {
                self.restart[other] = chunks.initiate_tag;
                Ok(Next::Aside)
            }
        }
    }

    /// A packet that carries the tag of an association being begun anew.
    fn restarting(&mut self, direction: Direction, chunks: &Chunks) -> Next {
        let (own, other) = (direction.index(), direction.opposite().index());
        if chunks.kinds & INIT_ACK != 0 && chunks.initiate_tag != 0 {
            self.restart[other] = chunks.initiate_tag;
            return Next::Aside;
        }
        if chunks.kinds & COOKIE_ACK != 0 {
            self.tag[own] = self.restart[own];
            if self.restart[other] != 0 {
                self.tag[other] = self.restart[other];
            }
            self.restart = [0; 2];
            return Next::To(State::SctpEstablished);
        }
        Next::Aside
    }

    fn known(
        &mut self,
        state: State,
        direction: Direction,
        chunks: &Chunks,
    ) -> Result<Next, Invalid> {
        let kinds = chunks.kinds;
        let reply = direction == Direction::Reply;
        if kinds & ABORT != 0
            || (kinds & SHUTDOWN_COMPLETE != 0 && state == State::SctpShutdownAcked)
        {
            return Ok(Next::To(State::SctpClosed));
        }
        Ok(Next::To(match state {
            State::SctpInitSent if reply && kinds & INIT_ACK != 0 && chunks.initiate_tag != 0 => {
                self.tag[Direction::Original.index()] = chunks.initiate_tag;
                State::SctpInitAcked
            }
            State::SctpInitSent => return Err(Invalid::NotOpening),
            State::SctpInitAcked if !reply && kinds & COOKIE_ECHO != 0 => State::SctpCookieEchoed,
            State::SctpInitAcked if reply && kinds & INIT_ACK != 0 => State::SctpInitAcked,
            State::SctpInitAcked => return Err(Invalid::NotOpening),
            // Its acknowledgment, or anything else from the side that verified the cookie.
            State::SctpCookieEchoed if reply => State::SctpEstablished,
            State::SctpEstablished | State::SctpShutdown if kinds & SHUTDOWN_ACK != 0 => {
                State::SctpShutdownAcked
            }
            State::SctpEstablished if kinds & SHUTDOWN != 0 => State::SctpShutdown,
            same => same,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::chunk::DATA;
    use super::*;
    use Direction::{Original, Reply};

    const A: u32 = 0xaaaa;
    const B: u32 = 0xbbbb;

    fn packet(tag: u32, kinds: u16) -> Chunks {
        Chunks {
            tag,
            kinds,
            ..Chunks::default()
        }
    }

    fn established() -> (State, Tags) {
        let init = Chunks {
            kinds: INIT,
            initiate_tag: A,
            ..Chunks::default()
        };
        let (mut state, mut tags) = open(&init, false).unwrap();
        let init_ack = Chunks {
            tag: A,
            kinds: INIT_ACK,
            initiate_tag: B,
            ..Chunks::default()
        };
        for (direction, chunks, expected) in [
            (Reply, init_ack, State::SctpInitAcked),
            (
                Original,
                packet(B, COOKIE_ECHO | DATA),
                State::SctpCookieEchoed,
            ),
            (Reply, packet(A, COOKIE_ACK), State::SctpEstablished),
        ] {
            let next = tags.advance(state, direction, &chunks);
            assert_eq!(next, Ok(Next::To(expected)));
            state = expected;
        }
        (state, tags)
    }

    #[test]
    fn shutdown_is_followed_to_its_end() {
        let (mut state, mut tags) = established();
        for (direction, kinds, expected) in [
            (Original, SHUTDOWN, State::SctpShutdown),
            (Reply, SHUTDOWN_ACK, State::SctpShutdownAcked),
            (Original, SHUTDOWN_COMPLETE, State::SctpClosed),
        ] {
            let tag = if direction == Original { B } else { A };
            let next = tags.advance(state, direction, &packet(tag, kinds));
            assert_eq!(next, Ok(Next::To(expected)));
            state = expected;
        }
        let again = Chunks {
            kinds: INIT,
            initiate_tag: 7,
            ..Chunks::default()
        };
        assert_eq!(tags.advance(state, Original, &again), Ok(Next::Reopen));
    }

    #[test]
    fn a_blind_abort_closes_nothing() {
        let (state, mut tags) = established();
        for guess in [0, 1, A, B ^ 1] {
            let next = tags.advance(state, Original, &packet(guess, ABORT));
            assert_eq!(next, Err(Invalid::Tag), "{guess:x}");
        }
        let reflected = Chunks {
            reflected: true,
            ..packet(A, ABORT)
        };
        let next = tags.advance(state, Original, &reflected);
        assert_eq!(next, Ok(Next::To(State::SctpClosed)));
    }

    #[test]
    fn an_association_may_be_restarted_from_within() {
        let (state, mut tags) = established();
        let init = Chunks {
            kinds: INIT,
            initiate_tag: 0xa2,
            ..Chunks::default()
        };
        assert_eq!(tags.advance(state, Original, &init), Ok(Next::Aside));
        let init_ack = Chunks {
            tag: 0xa2,
            kinds: INIT_ACK,
            initiate_tag: 0xb2,
            ..Chunks::default()
        };
        assert_eq!(tags.advance(state, Reply, &init_ack), Ok(Next::Aside));
        // Until the cookie is accepted the old one still holds.
        let old = tags.advance(state, Original, &packet(B, DATA));
        assert_eq!(old, Ok(Next::To(State::SctpEstablished)));
        let cookie = tags.advance(state, Original, &packet(0xb2, COOKIE_ECHO));
        assert_eq!(cookie, Ok(Next::Aside));
        let done = tags.advance(state, Reply, &packet(0xa2, COOKIE_ACK));
        assert_eq!(done, Ok(Next::To(State::SctpEstablished)));
        assert_eq!(tags.tag, [0xb2, 0xa2]);
        let old = tags.advance(state, Original, &packet(B, DATA));
        assert_eq!(old, Err(Invalid::Tag));
    }

    #[test]
    fn nothing_but_init_opens() {
        for kinds in [DATA, INIT_ACK, COOKIE_ECHO, COOKIE_ACK, ABORT, SHUTDOWN] {
            assert_eq!(open(&packet(5, kinds), false), Err(Invalid::NotOpening));
        }
        assert_eq!(open(&packet(5, INIT), false), Err(Invalid::Tag));
        assert!(open(&packet(5, DATA), true).is_ok());
        assert!(open(&packet(5, INIT_ACK), true).is_err());
    }
}
