//! One frame in the buffer in which it arrived.
//!
//! The first buffer, the head, holds all headers; payload beyond it lies in further buffers that the dataplane never
//! touches and only knows the length of. Headers are pushed into and pulled from the headroom; payload does not move.
//! The frame is plain Ethernet: the trunk's tag was taken off by the driver and became [`Frame::ingress`].

use sluice_contract::LinkId;

/// What a sender left for the far side to do, and what is known about the checksums. From and to the virtio-net header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Offload {
    /// The transport checksum at `start + offset` is only the pseudo-header's sum; bytes from `start` are to be summed up.
    pub partial: Option<Partial>,
    /// The device has verified the transport checksum.
    pub verified: bool,
    /// The frame is to be cut into segments.
    pub gso: Option<Gso>,
    /// `gso` and `partial` speak of the packet inside a tunnel.
    pub tunnel: Option<Tunnel>,
}

/// The tunnel around a frame that is to be cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    pub kind: TunnelKind,
    /// Where the inner IP header begins, counted from the start of the frame. Not told of received frames: 0.
    pub network: u16,
    /// The outer UDP checksum holds the pseudo-header's sum; each segment needs its own.
    pub checksum: bool,
}

/// What the far side needs to know to cut a tunnelled frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelKind {
    /// UDP with Ethernet inside, over IPv4 or IPv6: devices can cut it.
    Udp4,
    Udp6,
    /// Anything else: the far side of the trunk cuts it in software.
    Other,
}

/// Where a checksum is still to be completed, counted from the start of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    pub start: u16,
    pub offset: u16,
}

/// A frame that stands for several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    pub kind: GsoKind,
    /// Payload bytes of each segment.
    pub size: u16,
    /// Length of all headers, counted from the start of the frame.
    pub header: u16,
    /// The TCP segments carry CWR as RFC 3168 wants.
    pub ecn: bool,
}

/// What the segments are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    Tcp4,
    Tcp6,
    /// UDP, cut into datagrams (USO).
    Udp,
}

/// One frame. `start..end` of `head` is the frame's first part.
#[derive(Debug)]
pub struct Frame<'b> {
    head: &'b mut [u8],
    start: usize,
    end: usize,
    /// Bytes in further buffers.
    tail: usize,
    /// The link it came from.
    pub ingress: LinkId,
    pub offload: Offload,
}

impl<'b> Frame<'b> {
    /// The frame at `start..end` of `head`, with `tail` more bytes elsewhere. `None` if the range is not in `head`.
    pub fn new(
        head: &'b mut [u8],
        start: usize,
        end: usize,
        tail: usize,
        ingress: LinkId,
        offload: Offload,
    ) -> Option<Self> {
        if start > end || end > head.len() {
            return None;
        }
        Some(Self {
            head,
            start,
            end,
            tail,
            ingress,
            offload,
        })
    }

    /// The part of the frame that is at hand: all headers, and the payload of small frames.
    pub fn bytes(&self) -> &[u8] {
        self.head.get(self.start..self.end).unwrap_or_default()
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.head.get_mut(self.start..self.end).unwrap_or_default()
    }

    /// Length of the whole frame.
    pub const fn length(&self) -> usize {
        self.end - self.start + self.tail
    }

    /// Bytes of the frame that are not at hand.
    pub const fn tail(&self) -> usize {
        self.tail
    }

    /// Bytes free in front.
    pub const fn headroom(&self) -> usize {
        self.start
    }

    /// Where the frame begins in its buffer.
    pub const fn start(&self) -> usize {
        self.start
    }

    /// Where the part at hand ends in its buffer.
    pub const fn end(&self) -> usize {
        self.end
    }

    /// Makes room for `bytes` in front and returns it; `None` (and no change) if the headroom does not have them.
    pub fn push(&mut self, bytes: usize) -> Option<&mut [u8]> {
        let start = self.start.checked_sub(bytes)?;
        self.start = start;
        self.head.get_mut(start..start + bytes)
    }

    /// Takes `bytes` off the front; `false` (and no change) if there are fewer at hand.
    pub fn pull(&mut self, bytes: usize) -> bool {
        match self.start.checked_add(bytes) {
            Some(start) if start <= self.end => {
                self.start = start;
                true
            }
            _ => false,
        }
    }

    /// Cuts or grows the part at hand to `length` bytes and forgets the tail: for a frame that becomes another one, such as an
    /// error about itself. `false` (and no change) if the buffer does not have them.
    pub fn resize(&mut self, length: usize) -> bool {
        match self.start.checked_add(length) {
            Some(end) if end <= self.head.len() => {
                self.end = end;
                self.tail = 0;
                true
            }
            _ => false,
        }
    }
}
