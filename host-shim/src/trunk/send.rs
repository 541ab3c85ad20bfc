//! Frames from the guest to the taps: `writev` straight from the guest's buffers.
//!
//! The first 28 bytes (vnet header, MAC addresses, tag) are copied to host memory, judged and rewritten there, because
//! the guest may change its memory while we look; the payload behind them is never touched.

use std::fs::File;
use std::io;
use std::time::Instant;

use super::chain::{self, Access};
use super::drops::HostDrop;
use super::engine::TrunkCounters;
use super::links::{Link, Links};
use super::memory::{Scatter, TAP_HEAD, TRUNK_HEAD};
use super::ring::{Ring, RingError};
use super::vnet::{self, TrunkFault};

/// The transmit queue (of the guest) in use.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) ring: Ring,
    pub(super) call: Option<File>,
    pieces: Scatter,
    /// A frame has reached a tap.
    has_sent: bool,
}

impl Sender {
    pub(super) fn new(ring: Ring, call: Option<File>) -> Self {
        let pieces = Scatter::new(ring.memory().clone(), chain::MAX_PIECES);
        Self {
            ring,
            call,
            pieces,
            has_sent: false,
        }
    }

    /// Moves up to `limit` frames and gives all their buffers back at once. Returns how many chains were seen.
    pub(super) fn run(
        &mut self,
        links: &Links,
        limit: u16,
        counters: &TrunkCounters,
    ) -> Result<u32, RingError> {
        let chains = self.ring.pending()?.min(limit);
        for _ in 0..chains {
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
        let gso = vnet::is_gso(header);
        let written = if link.knows_tunnels() {
            let header = match tunnelled {
                None => {
                    let mut long = [0; vnet::LONG_HEADER];
                    long[..vnet::HEADER].copy_from_slice(header);
                    long
                }
                Some(tunnel) => tunnel.long_header(header).ok_or(HostDrop::BadOffload)?,
            };
            let mut long = [0; vnet::LONG_HEADER + vnet::MACS];
            long[..vnet::LONG_HEADER].copy_from_slice(&header);
            long[vnet::LONG_HEADER..].copy_from_slice(&head[vnet::HEADER..]);
            self.pieces.write_frame(link.tap(), &long)
        } else if tunnelled.is_some() {
            return Err(HostDrop::BadOffload);
        } else {
            self.pieces.write_frame(link.tap(), &head)
        };
        match written {
            Ok(_) => {
                let bytes = len as usize - vnet::HEADER - vnet::TAG;
                link.counters().from_guest.add(bytes, gso);
                Ok(())
            }
            Err(error) => Err(refusal(&error)),
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
