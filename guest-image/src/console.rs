//! The control channel's bytes: a stream in and a stream out over the console's two rings.
//!
//! Both directions are bounded. Received bytes stay in their buffers until they are asked for, and
//! the device gets no further buffer before; what is to be sent is taken whole or not at all.

use crate::pool::{BUFFER, Buffer, Page, Pool};
use crate::transport::F_EVENT_IDX;
use crate::virtqueue::{Part, Queue, Ring};

pub const RECEIVE: u16 = 0;
pub const TRANSMIT: u16 = 1;
/// Buffers that wait for the host's bytes.
const RECEIVE_BUFFERS: usize = 8;
/// Buffers for bytes on their way to the host.
const TRANSMIT_BUFFERS: usize = 16;
pub const BUFFERS: usize = RECEIVE_BUFFERS + TRANSMIT_BUFFERS;

/// What to accept of the offered features: one port, no window size.
pub fn choose_features(_offered: u64) -> u64 {
    F_EVENT_IDX
}

/// The rings of the console.
#[derive(Debug)]
pub struct Console<'m> {
    receive: Queue<'m, Buffer<'m>>,
    transmit: Queue<'m, Buffer<'m>>,
    pool: Pool<'m, BUFFERS>,
    /// The buffer that is being read: how far, and to where.
    current: Option<(Buffer<'m>, usize, usize)>,
}

impl<'m> Console<'m> {
    /// `None` if a size is no ring's. The receive ring is filled by the first
    /// [`refill`](Self::refill).
    pub fn new(
        rings: [&'m Ring; 2],
        sizes: [u16; 2],
        features: u64,
        pages: &'m mut [Page],
    ) -> Option<Self> {
        let event_index = features & F_EVENT_IDX != 0;
        let [receive, transmit] = rings;
        let [receive_size, transmit_size] = sizes;
        Some(Self {
            receive: Queue::new(receive, receive_size, event_index)?,
            transmit: Queue::new(transmit, transmit_size, event_index)?,
            pool: Pool::new(pages),
            current: None,
        })
    }

    /// Completions that made no sense.
    pub fn errors(&self) -> u64 {
        self.receive.errors() + self.transmit.errors()
    }

    /// Bytes received and not yet consumed, as far as they lie together; empty if there are none.
    pub fn received(&mut self) -> &[u8] {
        if self.current.as_ref().is_none_or(|(_, at, end)| at == end) {
            self.next_buffer();
        }
        match &self.current {
            Some((buffer, at, end)) => buffer.bytes().get(*at..*end).unwrap_or_default(),
            None => &[],
        }
    }

    /// Lets go of the first `count` bytes of [`received`](Self::received).
    pub fn consume(&mut self, count: usize) {
        if let Some((_, at, end)) = &mut self.current {
            *at = at.saturating_add(count).min(*end);
        }
    }

    /// Bytes that [`send`](Self::send) takes now.
    pub fn room(&mut self) -> usize {
        let Self { transmit, pool, .. } = self;
        while transmit.pop(|buffer| pool.give(buffer)).is_some() {}
        let with_receiver = self.receiver_share();
        self.pool
            .free()
            .saturating_sub(with_receiver)
            .min(self.transmit.room())
            * BUFFER
    }

    /// Sends bytes; `false` if there is no room for all of them, and then none is sent.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() > self.room() {
            return false;
        }
        for piece in bytes.chunks(BUFFER) {
            let Some(mut buffer) = self.pool.take() else {
                return false;
            };
            if let Some(place) = buffer.bytes_mut().get_mut(..piece.len()) {
                place.copy_from_slice(piece);
            }
            let part = Part {
                address: buffer.address(),
                length: piece.len() as u32,
                device_writes: false,
                token: buffer,
            };
            if let Err(parts) = self.transmit.add([part].into_iter()) {
                parts.for_each(|part| self.pool.give(part.token));
                return false;
            }
        }
        true
    }

    /// Shows the device what was sent; `true` if it wants to be told.
    pub fn flush(&mut self) -> bool {
        self.transmit.publish()
    }

    /// Gives the device buffers to fill; `true` if it wants to be told.
    pub fn refill(&mut self) -> bool {
        while self.receiver_share() > 0 && self.receive.room() > 0 {
            let Some(buffer) = self.pool.take() else {
                break;
            };
            let part = Part {
                address: buffer.address(),
                length: BUFFER as u32,
                device_writes: true,
                token: buffer,
            };
            if let Err(parts) = self.receive.add([part].into_iter()) {
                parts.for_each(|part| self.pool.give(part.token));
                break;
            }
        }
        self.receive.publish()
    }

    /// Asks for notifications before a sleep: `true` if there are bytes already, or room that
    /// `wants_room` waits for.
    pub fn arm(&mut self, wants_room: bool) -> bool {
        let sent = wants_room && self.transmit.arm();
        self.receive.arm() || sent || !self.received().is_empty()
    }

    /// Asks for none: the loop polls.
    pub fn disarm(&mut self) {
        self.receive.disarm();
        self.transmit.disarm();
    }

    /// Buffers that the receiving side should have and does not: they are not for sending.
    fn receiver_share(&self) -> usize {
        let current = usize::from(self.current.is_some());
        RECEIVE_BUFFERS.saturating_sub(self.receive.in_flight() + current)
    }

    fn next_buffer(&mut self) {
        if let Some((buffer, _, _)) = self.current.take() {
            self.pool.give(buffer);
        }
        let mut taken = None;
        while let Some(length) = self.receive.pop(|buffer| taken = Some(buffer)) {
            let Some(buffer) = taken.take() else { continue };
            if length > 0 {
                self.current = Some((buffer, 0, length as usize));
                return;
            }
            self.pool.give(buffer);
        }
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
pub(crate) mod tests;
