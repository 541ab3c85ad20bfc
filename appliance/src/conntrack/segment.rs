//! A TCP segment as connection tracking sees it: numbers, flags, and arithmetic on the circle of sequence numbers.

/// What of a TCP segment matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    pub sequence: u32,
    pub acknowledgment: u32,
    /// The flag byte of the header.
    pub flags: u8,
    pub window: u16,
    /// Payload bytes; of a GSO frame, of all its segments.
    pub length: u32,
    /// The window scale option; only read if SYN is set.
    pub scale: Option<u8>,
}

/// The flag bits of a segment.
pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
    pub const URG: u8 = 32;
}
use flag::{ACK, FIN, RST, SYN, URG};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Syn,
    SynAck,
    Rst,
    Fin,
    Ack,
}

impl Segment {
    /// The combinations that occur in RFC 9293; anything else is a probe or an accident.
    pub(crate) const fn kind(&self) -> Option<Kind> {
        Some(match self.flags & (FIN | SYN | RST | ACK | URG) {
            f if f & !URG == SYN => Kind::Syn,
            f if f == SYN | ACK => Kind::SynAck,
            f if f & !ACK == RST => Kind::Rst,
            f if f & !URG == FIN | ACK => Kind::Fin,
            f if f & !URG == ACK => Kind::Ack,
            _ => return None,
        })
    }

    pub(crate) const fn end(&self) -> u32 {
        let phantom = (self.flags & SYN != 0) as u32 + (self.flags & FIN != 0) as u32;
        self.sequence
            .wrapping_add(self.length)
            .wrapping_add(phantom)
    }

    pub(crate) const fn acknowledges(&self) -> bool {
        self.flags & ACK != 0
    }
}

/// `a` is after `b` on the circle of sequence numbers.
pub(crate) const fn after(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) < 0
}

/// `low <= x <= high` on the circle.
pub(crate) const fn within(x: u32, low: u32, high: u32) -> bool {
    x.wrapping_sub(low) <= high.wrapping_sub(low)
}
