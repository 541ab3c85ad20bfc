//! Walking a descriptor chain that a hostile guest may have written.
//!
//! A chain is accepted when it ends, stays inside its table and inside guest memory, has no empty buffer, goes in the
//! expected direction and is not longer than a frame can be; otherwise it is refused with a reason and the caller
//! returns it with length 0.
//! Cost: at most `MAX_PIECES` descriptors are looked at, whatever the guest wrote.

use super::memory::{GuestMemory, Scatter};
use super::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Ring};
use sluice_ports::drops::HostDrop;

/// Most descriptors of one chain: a 64 KiB frame in 1 KiB buffers, and its header.
pub const MAX_PIECES: usize = 72;
/// Longest frame on the trunk: headers, tag, a tag of the pod's own and 64 KiB of GSO payload.
pub const MAX_FRAME: u32 = 12 + 14 + 4 + 4 + 65536;

/// Which way the buffers of a chain go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads: frames from the guest.
    Read,
    /// The device writes: frames to the guest.
    Write,
}

/// Appends the buffers of the chain at `head` to `pieces`; returns their total length.
///
/// On refusal `pieces` is as before.
pub(super) fn collect(
    ring: &Ring,
    head: u16,
    access: Access,
    pieces: &mut Scatter,
) -> Result<u32, HostDrop> {
    let before = pieces.len();
    let walked = walk(ring, head, access, pieces);
    if walked.is_err() {
        pieces.truncate(before);
    }
    walked
}

fn walk(ring: &Ring, head: u16, access: Access, pieces: &mut Scatter) -> Result<u32, HostDrop> {
    let first = ring.descriptor(head).ok_or(HostDrop::ChainOutOfRange)?;
    if first.flags & DESC_INDIRECT == 0 {
        return follow(first, |i| ring.descriptor(i), access, pieces);
    }
    // An indirect table stands alone: no next (virtio 1.2 §2.7.5.3.1), a whole number of entries, not empty.
    let count = first.len / Descriptor::SIZE;
    let whole = first.len.is_multiple_of(Descriptor::SIZE) && count != 0;
    if !whole || first.flags & DESC_NEXT != 0 {
        return Err(HostDrop::ChainIndirect);
    }
    let memory = ring.memory();
    let entry = |i: u16| {
        let inside = u32::from(i) < count;
        inside
            .then(|| read_descriptor(memory, first.addr, i))
            .flatten()
    };
    let start = entry(0).ok_or(HostDrop::ChainOutOfRange)?;
    follow(start, entry, access, pieces)
}

fn read_descriptor(memory: &GuestMemory, table: u64, index: u16) -> Option<Descriptor> {
    let mut bytes = [0; 16];
    let at = table.checked_add(u64::from(index) * u64::from(Descriptor::SIZE))?;
    memory
        .read(at, &mut bytes)
        .then(|| Descriptor::from_bytes(bytes))
}

fn follow(
    first: Descriptor,
    table: impl Fn(u16) -> Option<Descriptor>,
    access: Access,
    pieces: &mut Scatter,
) -> Result<u32, HostDrop> {
    let mut descriptor = first;
    let mut total = 0u32;
    for _ in 0..MAX_PIECES {
        if descriptor.flags & DESC_INDIRECT != 0 {
            return Err(HostDrop::ChainIndirect);
        }
        if (descriptor.flags & DESC_WRITE != 0) != (access == Access::Write) {
            return Err(HostDrop::ChainDirection);
        }
        if descriptor.len == 0 {
            return Err(HostDrop::ChainZeroLength);
        }
        total = total.saturating_add(descriptor.len);
        // A receive buffer may be larger than any frame; a frame may not.
        if access == Access::Read && total > MAX_FRAME {
            return Err(HostDrop::ChainOversized);
        }
        if !pieces.push(descriptor.addr, descriptor.len) {
            return Err(HostDrop::ChainOutOfRange);
        }
        if descriptor.flags & DESC_NEXT == 0 {
            return Ok(total);
        }
        descriptor = table(descriptor.next).ok_or(HostDrop::ChainOutOfRange)?;
    }
    Err(HostDrop::ChainLoop)
}
