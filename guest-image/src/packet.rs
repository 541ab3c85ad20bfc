//! A frame on its way through the appliance, in the buffers in which it came.
//!
//! A buffer's layout: [`HEADROOM`] bytes for headers the appliance may push, the virtio-net header,
//! the frame. A frame too long for one buffer goes on in others, each from the same offset; those,
//! the tails, are only carried along.

use heapless::Deque;
use sluice_appliance::frame::{Frame, Offload};
use sluice_contract::LinkId;

use crate::pool::{BUFFER, Buffer};
use crate::virtqueue::QUEUE_SIZE;
use crate::vnet;

/// For pushed headers: an outer Ethernet, IPv6, UDP and Geneve header with options are 86 bytes.
pub const HEADROOM: usize = 128;
/// What of a buffer the device may fill.
pub(crate) const ROOM: usize = BUFFER - HEADROOM;
/// Where an untagged frame begins.
pub(crate) const FRAME: usize = HEADROOM + vnet::HEADER + vnet::TAG;
/// Kept free in front of a frame for what the trunk itself needs there.
pub(crate) const FRONT: usize = vnet::HEADER + vnet::TAG;
/// Frames of one batch.
pub const BATCH: usize = 64;

/// The rest of a frame that is longer than its head.
#[derive(Debug)]
pub(crate) struct Tail<'m> {
    pub(crate) buffer: Buffer<'m>,
    pub(crate) length: u32,
}

/// A received frame on its way through the appliance. Its tails are in the [`Batch`].
#[derive(Debug)]
pub struct Packet<'m> {
    pub(crate) head: Buffer<'m>,
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) tails: usize,
    pub(crate) tail_bytes: usize,
    pub(crate) ingress: LinkId,
    pub(crate) offload: Offload,
}

impl Packet<'_> {
    pub fn ingress(&self) -> LinkId {
        self.ingress
    }

    /// Bytes of the whole frame.
    pub fn length(&self) -> usize {
        self.end - self.start + self.tail_bytes
    }

    /// The frame as the appliance sees it: what the trunk needs in front is out of its reach.
    pub fn frame(&mut self) -> Option<Frame<'_>> {
        let head = self.head.bytes_mut().get_mut(FRONT..)?;
        let (start, end) = (self.start - FRONT, self.end - FRONT);
        Frame::new(
            head,
            start,
            end,
            self.tail_bytes,
            self.ingress,
            self.offload,
        )
    }

    /// Takes over what the appliance made of the frame.
    pub fn adopt(&mut self, outcome: &Outcome) {
        self.start = outcome.start + FRONT;
        self.end = outcome.end + FRONT;
        self.tail_bytes = outcome.tail;
        self.offload = outcome.offload;
    }
}

/// What a [`Frame`] says of itself once the appliance is done with it.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    start: usize,
    end: usize,
    tail: usize,
    offload: Offload,
}

impl From<&Frame<'_>> for Outcome {
    fn from(frame: &Frame<'_>) -> Self {
        let (start, end, tail) = (frame.start(), frame.end(), frame.tail());
        Self {
            start,
            end,
            tail,
            offload: frame.offload,
        }
    }
}

/// Frames received together, to be sent or recycled in the same order.
#[derive(Debug, Default)]
pub struct Batch<'m> {
    pub packets: Deque<Packet<'m>, BATCH>,
    /// The tails of all packets, first packet's first.
    pub(crate) tails: Deque<Tail<'m>, QUEUE_SIZE>,
}

/// The virtio-net header at the front of what the device wrote.
pub(crate) fn header_of(buffer: &Buffer<'_>, length: u32) -> Option<[u8; vnet::HEADER]> {
    if (length as usize) < vnet::HEADER {
        return None;
    }
    buffer
        .bytes()
        .get(HEADROOM..)?
        .first_chunk::<{ vnet::HEADER }>()
        .copied()
}

/// Reads header and tag and takes the tag off. `None` if the frame is not one the trunk may carry.
pub(crate) fn read_front(packet: &mut Packet<'_>, length: u32) -> Option<(LinkId, Offload)> {
    let offload = vnet::read(&header_of(&packet.head, length)?)?;
    let tagged = packet
        .head
        .bytes_mut()
        .get_mut(HEADROOM + vnet::HEADER..packet.end)?;
    let ingress = vnet::strip_tag(tagged)?;
    Some((ingress, offload))
}

/// Puts tag and header in front of the frame and returns where the header begins. `None` if the
/// frame lies so that it cannot.
pub(crate) fn write_front(packet: &mut Packet<'_>, link: LinkId) -> Option<usize> {
    let tagged = packet.start.checked_sub(vnet::TAG)?;
    let start = tagged.checked_sub(vnet::HEADER)?;
    let bytes = packet.head.bytes_mut();
    if !vnet::push_tag(bytes.get_mut(tagged..packet.end)?, link) {
        return None;
    }
    bytes
        .get_mut(start..tagged)?
        .copy_from_slice(&vnet::write(&packet.offload));
    Some(start)
}
