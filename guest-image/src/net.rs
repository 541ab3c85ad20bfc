//! The trunk: frames in from the receive ring, out by the transmit ring, in the buffers in which
//! they came.
//!
//! Buffers move: pool → receive ring → [`Packet`] → transmit ring → pool, and never anywhere else.

use sluice_appliance::frame::Offload;
use sluice_appliance::verdict::Originate;
use sluice_contract::LinkId;

use crate::packet::{Batch, FRAME, HEADROOM, Packet, ROOM, Tail};
use crate::packet::{header_of, read_front, write_front};
use crate::pool::{BUFFER, Buffer, Page, Pool};
use crate::transport::F_EVENT_IDX;
use crate::virtqueue::{Part, QUEUE_SIZE, Queue, Ring};
use crate::vnet;

/// Buffers of the longest frame: 64 KiB and its headers.
pub const MAX_CHAIN: usize = (65_536usize + 256).div_ceil(ROOM);
/// Both rings full, and some to originate frames with.
pub const BUFFERS: usize = 2 * QUEUE_SIZE + 64;
/// How many frames ahead the first cache lines are loaded.
const PREFETCH: u16 = 4;

pub const RECEIVE: u16 = 0;
pub const TRANSMIT: u16 = 1;

/// The rings of the trunk and the buffers between them.
#[derive(Debug)]
pub struct Trunk<'m> {
    receive: Queue<'m, Buffer<'m>>,
    transmit: Queue<'m, Buffer<'m>>,
    pool: Pool<'m, BUFFERS>,
    /// Transmit descriptors that the frames of the present batch may need.
    reserved: usize,
    malformed: u64,
}

impl<'m> Trunk<'m> {
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
            reserved: 0,
            malformed: 0,
        })
    }

    /// Frames and completions that made no sense.
    pub fn errors(&self) -> u64 {
        self.malformed + self.receive.errors() + self.transmit.errors()
    }

    /// Takes the frames that wait, as many as surely can be sent on.
    pub fn receive(&mut self, batch: &mut Batch<'m>) {
        self.reserved = 0;
        self.reclaim();
        for n in 0..self.receive.pending().min(PREFETCH) {
            self.prefetch(n);
        }
        while !batch.packets.is_full() && self.has_room_for_next() {
            self.prefetch(PREFETCH);
            let Some(buffers) = self.next_length() else {
                break;
            };
            self.take(buffers, batch);
        }
    }

    /// Sends a packet of the batch out by a link. `false`, and the buffers are recycled, if it has
    /// no room in front.
    pub fn send(&mut self, mut packet: Packet<'m>, link: LinkId, batch: &mut Batch<'m>) -> bool {
        self.reserved = self.reserved.saturating_sub(1 + packet.tails);
        if packet.tail_bytes == 0 {
            self.recycle_tails(&mut packet, batch);
        }
        let Some(start) = write_front(&mut packet, link) else {
            self.recycle_tails(&mut packet, batch);
            self.pool.give(packet.head);
            return false;
        };
        let (count, mut left) = (packet.tails, packet.tail_bytes);
        let tails = (0..count)
            .filter_map(|_| batch.tails.pop_front())
            .map(|tail| {
                let length = (tail.length as usize).min(left);
                left -= length;
                outgoing(tail.buffer, HEADROOM, HEADROOM + length)
            });
        let head = outgoing(packet.head, start, packet.end);
        let parts = Exact {
            parts: core::iter::once(head).chain(tails),
            count: count + 1,
        };
        // `receive` took no more than there is room for.
        let refused = self.transmit.add(parts).err();
        let sent = refused.is_none();
        for part in refused.into_iter().flat_map(|exact| exact.parts) {
            self.pool.give(part.token);
        }
        sent
    }

    /// Gives the buffers of a packet that ends here back to the pool.
    pub fn recycle(&mut self, mut packet: Packet<'m>, batch: &mut Batch<'m>) {
        self.reserved = self.reserved.saturating_sub(1 + packet.tails);
        self.recycle_tails(&mut packet, batch);
        self.pool.give(packet.head);
    }

    /// Shows the device the frames sent; `true` if it wants to be told.
    pub fn flush(&mut self) -> bool {
        self.transmit.publish()
    }

    /// Fills the receive ring from the pool; `true` if the device wants to be told.
    pub fn refill(&mut self) -> bool {
        while self.receive.room() > 0 {
            let Some(buffer) = self.pool.take() else {
                break;
            };
            let part = Part {
                address: buffer.address() + HEADROOM as u64,
                length: ROOM as u32,
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

    /// Takes back the buffers of frames that were sent.
    pub fn reclaim(&mut self) {
        let Self { transmit, pool, .. } = self;
        while transmit.pop(|buffer| pool.give(buffer)).is_some() {}
    }

    /// Asks for notifications before a sleep: `true` if there is something to do at once. Frames
    /// that wait for room to be sent on are not news; a transmission that makes room is.
    pub fn arm(&mut self) -> bool {
        self.receive.arm();
        self.reclaim();
        if self.has_room_for_next() {
            return true;
        }
        self.receive.pending() > 0 && self.transmit.arm()
    }

    /// Asks for none: the loop polls.
    pub fn disarm(&mut self) {
        self.receive.disarm();
        self.transmit.disarm();
    }

    /// Whether a whole frame waits and could be sent on.
    fn has_room_for_next(&mut self) -> bool {
        let Some(buffers) = self.next_length() else {
            return false;
        };
        let room = self.transmit.room().saturating_sub(self.reserved);
        let fits = usize::from(buffers) <= room || usize::from(buffers) > MAX_CHAIN;
        fits && buffers <= self.receive.refresh()
    }

    fn prefetch(&self, n: u16) {
        if let Some((buffer, _)) = self.receive.peek(n) {
            buffer.prefetch(HEADROOM);
            buffer.prefetch(HEADROOM + 64);
        }
    }

    /// Buffers of the next frame, by its header; 1 if that cannot be. `None` if none waits.
    fn next_length(&mut self) -> Option<u16> {
        if self.receive.pending() == 0 {
            return None;
        }
        let head = self.receive.peek(0);
        let header = head.and_then(|(buffer, length)| header_of(buffer, length));
        let buffers = header.map_or(1, |header| vnet::buffers(&header));
        Some(if usize::from(buffers) > QUEUE_SIZE {
            1
        } else {
            buffers
        })
    }

    /// Takes one frame of `buffers` buffers into the batch, or counts it as malformed.
    fn take(&mut self, buffers: u16, batch: &mut Batch<'m>) {
        let Some((head, length)) = self.take_buffer() else {
            return;
        };
        let mut packet = Packet {
            head,
            start: FRAME,
            end: HEADROOM + length as usize,
            tails: 0,
            tail_bytes: 0,
            ingress: LinkId::HOST,
            offload: Offload::default(),
        };
        let mut usable = usize::from(buffers) <= MAX_CHAIN;
        for _ in 1..buffers {
            let Some((buffer, length)) = self.take_buffer() else {
                break;
            };
            usable &= length > 0;
            packet.tail_bytes += length as usize;
            match batch.tails.push_back(Tail { buffer, length }) {
                Ok(()) => packet.tails += 1,
                Err(tail) => self.pool.give(tail.buffer),
            }
        }
        usable &= packet.tails + 1 == usize::from(buffers);
        let front = if usable {
            read_front(&mut packet, length)
        } else {
            None
        };
        let Some((ingress, offload)) = front else {
            self.malformed += 1;
            self.recycle_newest(packet, batch);
            return;
        };
        packet.ingress = ingress;
        packet.offload = offload;
        self.reserved += 1 + packet.tails;
        // The caller saw that the batch is not full.
        if let Err(packet) = batch.packets.push_back(packet) {
            self.recycle_newest(packet, batch);
        }
    }

    fn take_buffer(&mut self) -> Option<(Buffer<'m>, u32)> {
        let mut taken = None;
        let length = self.receive.pop(|buffer| taken = Some(buffer))?;
        Some((taken?, length))
    }

    /// Like [`recycle`](Self::recycle) for the packet taken last.
    fn recycle_newest(&mut self, packet: Packet<'m>, batch: &mut Batch<'m>) {
        for _ in 0..packet.tails {
            if let Some(tail) = batch.tails.pop_back() {
                self.pool.give(tail.buffer);
            }
        }
        self.pool.give(packet.head);
    }

    fn recycle_tails(&mut self, packet: &mut Packet<'m>, batch: &mut Batch<'m>) {
        for _ in 0..core::mem::take(&mut packet.tails) {
            if let Some(tail) = batch.tails.pop_front() {
                self.pool.give(tail.buffer);
            }
        }
    }
}

/// Frames that no received frame became. They take room that no frame of the present batch needs.
impl Originate for Trunk<'_> {
    fn originate(&mut self, link: LinkId, bytes: &[u8], offload: Offload) -> bool {
        if self.transmit.room() <= self.reserved || bytes.len() > BUFFER - FRAME {
            return false;
        }
        let Some(mut head) = self.pool.take() else {
            return false;
        };
        let end = FRAME + bytes.len();
        if let Some(place) = head.bytes_mut().get_mut(FRAME..end) {
            place.copy_from_slice(bytes);
        }
        let (tails, tail_bytes) = (0, 0);
        let mut packet = Packet {
            head,
            start: FRAME,
            end,
            tails,
            tail_bytes,
            ingress: link,
            offload,
        };
        let refused = match write_front(&mut packet, link) {
            Some(start) => self
                .transmit
                .add([outgoing(packet.head, start, end)].into_iter())
                .err(),
            None => Some([outgoing(packet.head, FRAME, end)].into_iter()),
        };
        let sent = refused.is_none();
        for part in refused.into_iter().flatten() {
            self.pool.give(part.token);
        }
        sent
    }
}

/// Bytes `start..end` of a buffer, for the device to read.
fn outgoing(buffer: Buffer<'_>, start: usize, end: usize) -> Part<Buffer<'_>> {
    Part {
        address: buffer.address() + start as u64,
        length: (end - start) as u32,
        device_writes: false,
        token: buffer,
    }
}

/// An iterator whose length is known from elsewhere.
struct Exact<I> {
    parts: I,
    count: usize,
}

impl<I: Iterator> Iterator for Exact<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        self.parts.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.count, Some(self.count))
    }
}

impl<I: Iterator> ExactSizeIterator for Exact<I> {}

#[cfg(test)]
#[path = "net_tests.rs"]
pub(crate) mod tests;
