//! How a packet ends: exactly one way, exactly one counter.

use crate::frame::Offload;
use sluice_contract::{DropReason, LinkId};

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The frame, rewritten in place, leaves by this link.
    Forward(LinkId),
    /// The frame was turned into an answer and goes back to where it came from.
    Reply,
    /// The frame ends here.
    Drop(DropReason),
    /// The appliance took a copy for later; the buffer is free.
    Held,
}

/// Where frames go that no received frame became.
pub trait Originate {
    /// Sends `bytes`, a whole Ethernet frame. `false` if there was no room; the caller counts it.
    fn originate(&mut self, link: LinkId, bytes: &[u8], offload: Offload) -> bool;
}
