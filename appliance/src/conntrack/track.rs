//! A packet meets its connection: judged by its protocol's rules, and what follows for state, time and place.

use crate::conntrack::row::Tracking;
use crate::conntrack::state::{Standing, State};
use crate::conntrack::tcp::Next;
use crate::conntrack::{Conntrack, Hit, Invalid, Signal};
use crate::flow::Direction;
use crate::time::Instant;
use crate::wire::protocol;

/// What a valid packet of a known connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// Part of the connection.
    Belongs,
    /// The beginning of another connection with the same flow; the old one is gone. Go on as after a miss.
    Anew,
}

impl Conntrack<'_> {
    /// Judges a packet of a known connection, and lets it take effect if it is valid: state, windows, time of last use.
    ///
    /// # Errors
    /// [`Invalid`]: the packet is to be dropped; it has changed nothing.
    ///
    /// # Cost
    /// Nothing but the connection's own two rows is written, unless the state changes.
    #[inline]
    pub fn track(&mut self, hit: Hit, signal: &Signal, now: Instant) -> Result<Track, Invalid> {
        let slot = hit.id.0;
        if !self.region.is_connection(slot) {
            return Err(self.counters.count_invalid(Invalid::Gone));
        }
        let tick = self.clock.tick_at(now);
        let row = &mut self.region.rows[slot as usize];
        let detail = &mut self.region.details[slot as usize];
        let state = State::from_raw(row.state).unwrap_or(hit.state);
        let (next, tracking) = match (signal, row.protocol) {
            (Signal::Tcp(segment), protocol::TCP) => {
                let mut tcp = detail.tcp(state);
                let next = tcp.advance(state, hit.direction, segment);
                if next == Ok(Next::To(state)) {
                    row.seen = tick as u32;
                    detail.store_tcp(state, &tcp);
                    detail.seal = detail.expected_seal(state as u8);
                    return Ok(Track::Belongs);
                }
                (next, Tracking::Tcp(tcp))
            }
            (Signal::Sctp(chunks), protocol::SCTP) => {
                let mut tags = detail.tags(state);
                let next = tags.advance(state, hit.direction, chunks);
                (next, Tracking::Sctp(tags))
            }
            _ => {
                let next = datagram(state, hit.direction, signal);
                if next == Ok(Next::To(state)) {
                    row.seen = tick as u32;
                    return Ok(Track::Belongs);
                }
                (next, Tracking::None)
            }
        };
        self.conclude(slot, state, next, &tracking, tick)
    }

    /// What [`Self::track`] would say, and nothing changes: for a packet that only might come.
    ///
    /// # Errors
    /// [`Invalid`], as there.
    pub fn judge(&self, hit: Hit, signal: &Signal) -> Result<Track, Invalid> {
        let slot = hit.id.0;
        if !self.region.is_connection(slot) {
            return Err(Invalid::Gone);
        }
        let (row, detail) = (
            &self.region.rows[slot as usize],
            &self.region.details[slot as usize],
        );
        let state = State::from_raw(row.state).unwrap_or(hit.state);
        let next = match (signal, row.protocol) {
            (Signal::Tcp(segment), protocol::TCP) => {
                detail.tcp(state).advance(state, hit.direction, segment)
            }
            (Signal::Sctp(chunks), protocol::SCTP) => {
                detail.tags(state).advance(state, hit.direction, chunks)
            }
            _ => datagram(state, hit.direction, signal),
        };
        next.map(|next| match next {
            Next::To(_) | Next::Aside => Track::Belongs,
            Next::Reopen => Track::Anew,
        })
    }

    /// What follows if more than the rows is concerned.
    #[inline(never)]
    fn conclude(
        &mut self,
        slot: u32,
        state: State,
        next: Result<Next, Invalid>,
        tracking: &Tracking,
        tick: u64,
    ) -> Result<Track, Invalid> {
        match next {
            Ok(Next::To(new)) => {
                self.region.rows[slot as usize].seen = tick as u32;
                self.settle(slot, state, new, tracking, tick);
                Ok(Track::Belongs)
            }
            Ok(Next::Aside) => {
                self.settle(slot, state, state, tracking, tick);
                Ok(Track::Belongs)
            }
            Ok(Next::Reopen) => {
                self.discard(slot);
                self.counters.reopened += 1;
                Ok(Track::Anew)
            }
            Err(invalid) => Err(self.counters.count_invalid(invalid)),
        }
    }

    /// Writes what tracking has found, and moves the connection to where its new state belongs.
    fn settle(&mut self, slot: u32, old: State, new: State, tracking: &Tracking, tick: u64) {
        let moved = old.standing() != new.standing();
        if moved {
            self.region.list_remove(slot, old.standing());
            self.count_standing(slot, old.standing(), new.standing());
        }
        let detail = &mut self.region.details[slot as usize];
        detail.store(new, tracking);
        detail.seal = detail.expected_seal(new as u8);
        if old == new {
            return;
        }
        self.region.rows[slot as usize].state = new as u8;
        if moved {
            self.region.list_push(slot, new.standing());
        }
        let timeouts = &self.settings.timeouts;
        if timeouts.ticks(new) < timeouts.ticks(old) {
            self.hasten(slot, tick + u64::from(timeouts.ticks(new)));
        }
    }

    fn count_standing(&mut self, slot: u32, old: Standing, new: Standing) {
        let owner = usize::from(self.region.rows[slot as usize].owner);
        if let Some(owner) = self.region.owners.get_mut(owner) {
            owner.unreplied -= u32::from(old == Standing::Unreplied);
            owner.unreplied += u32::from(new == Standing::Unreplied);
        }
    }
}

/// Protocols without a handshake.
#[inline]
fn datagram(state: State, direction: Direction, signal: &Signal) -> Result<Next, Invalid> {
    let reply = direction == Direction::Reply;
    if reply && state.is_one_way() {
        return Err(Invalid::Unsolicited);
    }
    Ok(Next::To(match (state, signal) {
        (State::UdpOneWay | State::UdpOneWayStream, Signal::Datagram) => State::UdpOneWayStream,
        (State::UdpUnreplied, Signal::Datagram) if reply => State::UdpReplied,
        (State::UdpReplied, Signal::Datagram) if !reply => State::UdpStream,
        (State::UdpUnreplied | State::UdpReplied | State::UdpStream, Signal::Datagram) => state,
        (State::EchoUnreplied | State::EchoReplied, Signal::Answer) if reply => State::EchoReplied,
        (State::EchoUnreplied | State::EchoReplied, Signal::Query) if !reply => state,
        (State::EchoUnreplied | State::EchoReplied, Signal::Query | Signal::Answer) => {
            return Err(Invalid::Unsolicited);
        }
        (State::OtherUnreplied, Signal::Datagram) if reply => State::OtherReplied,
        (State::OtherUnreplied | State::OtherReplied, Signal::Datagram) => state,
        _ => return Err(Invalid::Protocol),
    }))
}
