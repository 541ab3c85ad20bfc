//! Frames from the taps to the guest: `readv` straight into the guest's receive buffers.
//!
//! Buffers are staged ahead until they hold a frame of any length; a frame then uses as many of them as it needs and
//! the rest stays staged for the next. Nothing is taken from a tap that the guest has no room for.

use std::fs::File;
use std::io;

use super::chain::{self, Access, MAX_FRAME};
use super::engine::TrunkCounters;
use super::links::{Link, Links};
use super::memory::{MAX_ENTRIES, Scatter, TRUNK_HEAD};
use super::ring::{Ring, RingError};
use super::vnet;
use sluice_ports::drops::HostDrop;

/// Most pieces that may be needed for one frame: the 64 KiB in buffers of 128 bytes, and still one `readv`.
const MAX_STAGED: usize = MAX_ENTRIES - chain::MAX_PIECES - 2;
/// Consumed pieces kept before the list is moved to the front.
const SLACK: usize = 128;

/// The receive queue (of the guest) in use.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) ring: Ring,
    pub(super) call: Option<File>,
    pieces: Scatter,
    heads: std::collections::VecDeque<Staged>,
    /// Pieces before this one are consumed.
    first: usize,
    /// Bytes that the staged heads hold.
    capacity: u32,
    /// Chains known to be available and not yet taken.
    pending: u16,
    /// Chains that this phase may still take. A guest that makes chains available as fast as they are returned would hold the
    /// phase for ever otherwise.
    budget: u16,
}

#[derive(Clone, Copy, Debug)]
struct Staged {
    head: u16,
    pieces: usize,
    len: u32,
}

/// What a phase did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Phase {
    pub(super) frames: u32,
    /// The guest has too few buffers for a frame of any length.
    pub(super) starved: bool,
}

enum Outcome {
    /// A frame of this length was taken from the tap: moved, or dropped and counted.
    Done(usize),
    Empty,
}

impl Receiver {
    pub(super) fn new(ring: Ring, call: Option<File>) -> Self {
        let pieces = Scatter::new(ring.memory().clone(), SLACK + 2 * chain::MAX_PIECES);
        let heads = std::collections::VecDeque::new();
        Self {
            ring,
            call,
            pieces,
            heads,
            first: 0,
            capacity: 0,
            pending: 0,
            budget: 0,
        }
    }

    /// Moves up to `limit` frames and shows them to the guest at once.
    pub(super) fn run(
        &mut self,
        links: &mut Links,
        limit: u32,
        counters: &TrunkCounters,
    ) -> Result<Phase, RingError> {
        let mut phase = Phase::default();
        self.budget = self.ring.size();
        while phase.frames < limit && !phase.starved && self.budget != 0 {
            let Some(id) = links.turns().current() else {
                break;
            };
            match self.serve(links, id, limit - phase.frames, counters)? {
                Served::Frames(n) => phase.frames += n,
                Served::Quiet(n) => {
                    phase.frames += n;
                    links.turns().leave(id);
                }
                Served::Starved(n) => {
                    phase.frames += n;
                    phase.starved = self.budget != 0;
                }
            }
        }
        if self.ring.unpublished() != 0 && self.ring.publish() {
            counters.call(self.call.as_ref());
        }
        Ok(phase)
    }

    /// Moves up to `limit` frames of the link whose turn it is. A turn that the limit or the guest's buffers cut short goes on
    /// in the next phase.
    fn serve(
        &mut self,
        links: &mut Links,
        id: u16,
        limit: u32,
        counters: &TrunkCounters,
    ) -> Result<Served, RingError> {
        let mut frames = 0;
        while frames < limit {
            if !self.stage(counters)? {
                return Ok(Served::Starved(frames));
            }
            let outcome = links.link(id).map(|link| self.frame(id, link));
            let Some(Outcome::Done(bytes)) = outcome else {
                return Ok(Served::Quiet(frames));
            };
            frames += 1;
            if !links.turns().charge(id, bytes) {
                break;
            }
        }
        Ok(Served::Frames(frames))
    }

    /// Makes sure that a frame of any length fits into the staged buffers; false when the guest has too few, or when the phase
    /// has taken as many chains as it may.
    fn stage(&mut self, counters: &TrunkCounters) -> Result<bool, RingError> {
        if self.first > SLACK {
            self.pieces.discard(self.first);
            self.first = 0;
        }
        while self.capacity < MAX_FRAME {
            if self.pieces.len() - self.first > MAX_STAGED {
                self.return_staged(counters);
            }
            if self.pending == 0 {
                self.pending = self.ring.pending()?;
                if self.pending == 0 {
                    return Ok(false);
                }
            }
            if self.budget == 0 {
                return Ok(false);
            }
            self.budget -= 1;
            self.pending -= 1;
            let head = self.ring.take();
            match self.check(head) {
                Ok(staged) => {
                    self.capacity = self.capacity.saturating_add(staged.len);
                    self.heads.push_back(staged);
                }
                Err(reason) => {
                    counters.drops.count(reason);
                    self.ring.put_used(head, 0);
                }
            }
        }
        Ok(true)
    }

    /// Gives back buffers so small that a frame would need more of them than one `readv` takes.
    fn return_staged(&mut self, counters: &TrunkCounters) {
        for staged in self.heads.drain(..) {
            counters.drops.count(HostDrop::ShortBuffer);
            self.ring.put_used(staged.head, 0);
        }
        self.pieces.truncate(0);
        self.first = 0;
        self.capacity = 0;
    }

    fn check(&mut self, head: u16) -> Result<Staged, HostDrop> {
        let before = self.pieces.len();
        let len = chain::collect(&self.ring, head, Access::Write, &mut self.pieces)?;
        let long = self
            .pieces
            .piece_len(before)
            .is_some_and(|n| n >= TRUNK_HEAD);
        if !long {
            self.pieces.truncate(before);
            return Err(HostDrop::ShortBuffer);
        }
        Ok(Staged {
            head,
            pieces: self.pieces.len() - before,
            len,
        })
    }

    /// Moves one frame from a tap into the staged buffers.
    fn frame(&mut self, id: u16, link: &Link) -> Outcome {
        let mut long = [0; vnet::LONG_HEADER];
        let (whole, beyond) = (link.header(), link.header() - vnet::HEADER);
        let place = long.get_mut(..whole).unwrap_or_default();
        let n = match self.pieces.read_frame(link.tap(), self.first, place) {
            // The other end of a socket port is closed: every read would end so, and a tap has no such frame.
            Ok(0) => {
                link.counters().drops.count(HostDrop::TapDown);
                return Outcome::Empty;
            }
            // What the long header says more is of no interest to the guest.
            Ok(n) => n.saturating_sub(beyond),
            Err(error) => return empty_or_gone(&error, link),
        };
        let mut header = [0; vnet::HEADER];
        header.copy_from_slice(&long[..vnet::HEADER]);
        let on_trunk = (n + vnet::TAG) as u32;
        if n < vnet::HEADER + vnet::MACS + 2 {
            link.counters().drops.count(HostDrop::ShortHeader);
            return Outcome::Done(n);
        }
        if on_trunk >= self.capacity {
            link.counters().drops.count(HostDrop::Truncated);
            return Outcome::Done(n);
        }
        link.counters()
            .to_guest
            .add(n - vnet::HEADER, vnet::is_gso(&header));
        vnet::to_trunk(&mut header, self.buffers_for(on_trunk));
        self.pieces.put_head(self.first, &header, vnet::tag(id));
        self.consume(on_trunk);
        Outcome::Done(n)
    }

    fn buffers_for(&self, len: u32) -> u16 {
        let mut held = 0;
        let mut buffers = 0;
        for staged in &self.heads {
            if held >= len {
                break;
            }
            held = held.saturating_add(staged.len);
            buffers += 1;
        }
        buffers
    }

    fn consume(&mut self, len: u32) {
        let mut left = len;
        while left > 0 {
            let Some(staged) = self.heads.pop_front() else {
                break;
            };
            let here = left.min(staged.len);
            self.ring.put_used(staged.head, here);
            self.capacity -= staged.len;
            self.first += staged.pieces;
            left -= here;
        }
    }
}

enum Served {
    Frames(u32),
    Quiet(u32),
    Starved(u32),
}

fn empty_or_gone(error: &io::Error, link: &Link) -> Outcome {
    match error.kind() {
        io::ErrorKind::WouldBlock => Outcome::Empty,
        io::ErrorKind::Interrupted => Outcome::Done(0),
        _ => {
            // EBADFD: the interface was deleted under us. The link stays quiet until it is removed.
            link.counters().drops.count(HostDrop::TapDown);
            Outcome::Empty
        }
    }
}
