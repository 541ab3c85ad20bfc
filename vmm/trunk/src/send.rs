//! Frames from the guest to the taps: `writev` straight from the guest's buffers; what a tap cannot cut is cut on the way.
//!
//! The first 28 bytes (vnet header, MAC addresses, tag) are copied to host memory, judged and rewritten there, because
//! the guest may change its memory while we look; the payload behind them is never touched.

use std::fs::File;
use std::io;
use std::time::Instant;

use super::chain::{self, Access};
use super::engine::TrunkCounters;
use super::links::{Link, Links};
use super::memory::{Scatter, TAP_HEAD, TRUNK_HEAD};
use super::ring::{Ring, RingError};
use super::segment::{Cut, MOST_HEADERS};
use super::vnet::{self, TrunkFault, Tunnelled};
use sluice_ports::drops::HostDrop;

/// The transmit queue (of the guest) in use.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) ring: Ring,
    pub(super) call: Option<File>,
    pieces: Scatter,
    /// A frame has reached a tap.
    has_sent: bool,
    /// Segments that this phase has cut.
    segments: usize,
}

/// Segments after which a phase takes no more chains: about half a millisecond of writing. A frame that a guest wants to have cut into
/// its smallest pieces costs as much as a thousand others.
const MOST_SEGMENTS: usize = 512;

impl Sender {
    pub(super) fn new(ring: Ring, call: Option<File>) -> Self {
        let pieces = Scatter::new(ring.memory().clone(), chain::MAX_PIECES);
        Self {
            ring,
            call,
            pieces,
            has_sent: false,
            segments: 0,
        }
    }

    /// Moves up to `limit` frames and gives all their buffers back at once. Returns how many chains were seen.
    pub(super) fn run(
        &mut self,
        links: &Links,
        limit: u16,
        counters: &TrunkCounters,
    ) -> Result<u32, RingError> {
        let available = self.ring.pending()?.min(limit);
        let mut chains = 0;
        self.segments = 0;
        while chains < available && self.segments < MOST_SEGMENTS {
            chains += 1;
            let head = self.ring.take();
            match self.frame(head, links) {
                Err(reason) => counters.drops.count(reason),
                Ok(()) if !self.has_sent => {
                    self.has_sent = true;
                    counters.set_first_sent(Some(Instant::now()));
                }
                Ok(()) => {}
            }
            self.ring.put_used(head, 0);
        }
        if chains != 0 && self.ring.publish() {
            counters.call(self.call.as_ref());
        }
        Ok(u32::from(chains))
    }

    /// Moves one frame. Errors name drops that no link can be blamed for.
    fn frame(&mut self, head: u16, links: &Links) -> Result<(), HostDrop> {
        self.pieces.truncate(0);
        let len = chain::collect(&self.ring, head, Access::Read, &mut self.pieces)?;
        let mut front = [0; TRUNK_HEAD];
        // Two more bytes: the EtherType.
        if (len as usize) < TRUNK_HEAD + 2 || !self.pieces.copy_front(&mut front) {
            return Err(HostDrop::ShortHeader);
        }
        let (on_tap, tag) = split(&front);
        let id = vnet::link_of(tag).map_err(reason_of)?;
        let link = links.link(id).ok_or(HostDrop::UnknownLink)?;
        if let Err(reason) = self.write(link, on_tap, len) {
            link.counters().drops.count(reason);
        }
        Ok(())
    }

    fn write(&mut self, link: &Link, mut head: [u8; TAP_HEAD], len: u32) -> Result<(), HostDrop> {
        let Some(header) = head.first_chunk_mut::<{ vnet::HEADER }>() else {
            return Err(HostDrop::ShortHeader);
        };
        let tunnelled = vnet::to_tap(header).map_err(reason_of)?;
        let header = *header;
        let gso = vnet::is_gso(&header);
        match front_of(link, &header, tunnelled) {
            Some(front) => {
                let mut whole = [0; vnet::LONG_HEADER + vnet::MACS];
                let begin = link.header();
                whole[..begin].copy_from_slice(&front[..begin]);
                whole[begin..begin + vnet::MACS].copy_from_slice(&head[vnet::HEADER..]);
                let whole = &whole[..begin + vnet::MACS];
                let written = self.pieces.write_frame(link.tap(), whole);
                written.map_err(|error| refusal(&error))?;
            }
            None => self.write_segments(link, &header, tunnelled, len as usize)?,
        }
        let bytes = len as usize - vnet::HEADER - vnet::TAG;
        link.counters().from_guest.add(bytes, gso);
        Ok(())
    }

    /// Writes what the tap cannot cut as segments.
    fn write_segments(
        &mut self,
        link: &Link,
        header: &[u8; vnet::HEADER],
        tunnelled: Option<Tunnelled>,
        len: usize,
    ) -> Result<(), HostDrop> {
        let mut front = [0; TRUNK_HEAD + MOST_HEADERS];
        let there = len.min(front.len());
        let front = &mut front[..there];
        if !self.pieces.copy_front(front) {
            return Err(HostDrop::ShortHeader);
        }
        // The addresses move up to where the tag was; the frame begins there.
        front.copy_within(vnet::HEADER..TAP_HEAD, vnet::HEADER + vnet::TAG);
        let untagged = vnet::HEADER + vnet::TAG;
        let total = len - untagged;
        let cut = Cut::new(header, tunnelled, &front[untagged..], total);
        let cut = cut.ok_or(HostDrop::BadOffload)?;
        let before = vnet::of_segment(header);
        let before = &before[..link.header()];
        let mut one = [0; vnet::LONG_HEADER + MOST_HEADERS];
        one[..before.len()].copy_from_slice(before);
        let mut headers = [0; MOST_HEADERS];
        self.segments += cut.count();
        for index in 0..cut.count() {
            let segment = cut.segment(index, &mut headers);
            let (length, payload) = segment.ok_or(HostDrop::BadOffload)?;
            let end = before.len() + length;
            one[before.len()..end].copy_from_slice(&headers[..length]);
            self.pieces
                .write_part(
                    link.tap(),
                    &one[..end],
                    untagged + payload.start,
                    payload.len(),
                )
                .map_err(|e| refusal(&e))?;
        }
        link.counters().cut.add(1);
        Ok(())
    }
}

/// The vnet header of a frame that the tap takes as it is, long or to be cut short; `None` if it does not.
fn front_of(
    link: &Link,
    header: &[u8; vnet::HEADER],
    tunnelled: Option<Tunnelled>,
) -> Option<[u8; vnet::LONG_HEADER]> {
    match tunnelled {
        Some(tunnel) if link.knows_tunnels() => tunnel.long_header(header),
        Some(_) => None,
        None => {
            let mut long = [0; vnet::LONG_HEADER];
            long[..vnet::HEADER].copy_from_slice(header);
            Some(long)
        }
    }
}

/// The front of a trunk frame as the tap's front and the tag.
fn split(front: &[u8; TRUNK_HEAD]) -> ([u8; TAP_HEAD], [u8; vnet::TAG]) {
    let mut head = [0; TAP_HEAD];
    let mut tag = [0; vnet::TAG];
    head.copy_from_slice(&front[..TAP_HEAD]);
    tag.copy_from_slice(&front[TAP_HEAD..]);
    (head, tag)
}

fn reason_of(fault: TrunkFault) -> HostDrop {
    match fault {
        TrunkFault::MissingTag => HostDrop::MissingTag,
        TrunkFault::BadOffload => HostDrop::BadOffload,
    }
}

fn refusal(error: &io::Error) -> HostDrop {
    match error.raw_os_error() {
        // EIO: the interface is down. EBADFD: it is gone.
        Some(libc::EIO | libc::EBADFD | libc::ENXIO) => HostDrop::TapDown,
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => HostDrop::TapFull,
        _ => HostDrop::TapRefused,
    }
}
