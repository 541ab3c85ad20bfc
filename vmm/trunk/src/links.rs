//! The taps the trunk serves: which link id is which file descriptor, who has frames waiting, and what each has carried.
//!
//! Readiness is edge-triggered: a link waits for its turn from when its tap reports a frame until a
//! read says there is none, so that no syscall is spent on quiet links however many there are.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::turns::Turns;
use super::vnet;
use sluice_ports::drops::{Counter, Drops};
use sluice_ports::tap;

/// Link ids have 12 bits; 0 and 4095 name no VLAN (IEEE 802.1Q §9.6).
const IDS: usize = 4096;
/// Ready links learnt at once; the rest stays with the kernel for the next step.
const EVENTS: usize = 64;

/// What one link carried in one direction.
#[derive(Debug, Default)]
pub struct Carried {
    /// Frames, of whatever size.
    pub frames: Counter,
    /// Bytes of Ethernet frame, without vnet header and tag.
    pub bytes: Counter,
    /// Those that were segmentation-offload frames.
    pub gso: Counter,
}

/// The counters of one link on the host.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// From the tap to the guest.
    pub to_guest: Carried,
    /// From the guest to the tap.
    pub from_guest: Carried,
    /// Frames from the guest that were cut here, because the tap could not.
    pub cut: Counter,
    /// Frames of this link that ended here.
    pub drops: Drops,
}

impl Carried {
    pub(super) fn add(&self, bytes: usize, gso: bool) {
        self.frames.add(1);
        self.bytes.add(bytes as u64);
        if gso {
            self.gso.add(1);
        }
    }
}

/// One tap on the trunk.
#[derive(Debug)]
pub struct Link {
    id: u16,
    tap: OwnedFd,
    /// Bytes of the tap's vnet header.
    header: usize,
    counters: Arc<LinkCounters>,
}

impl Link {
    pub(super) fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    /// Whether the tap's vnet header tells of tunnels.
    pub(super) fn knows_tunnels(&self) -> bool {
        self.header == vnet::LONG_HEADER
    }

    /// Bytes of the tap's vnet header.
    pub(super) fn header(&self) -> usize {
        self.header
    }

    pub(super) fn counters(&self) -> &LinkCounters {
        &self.counters
    }
}

/// All links of the trunk.
#[derive(Debug)]
pub struct Links {
    epoll: Epoll,
    by_id: Vec<Option<Box<Link>>>,
    turns: Turns,
}

impl Links {
    /// No links.
    ///
    /// # Errors
    /// When the kernel gives no epoll instance.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let by_id = std::iter::repeat_with(|| None).take(IDS).collect();
        Ok(Self {
            epoll,
            by_id,
            turns: Turns::new(IDS),
        })
    }

    /// Adds a tap (non-blocking, vnet headers of 12 bytes, or of 24 if it knows tunnels), replacing the link of the same id.
    ///
    /// # Errors
    /// When the id is no link id or the tap cannot be watched.
    pub fn add(&mut self, id: u16, tap: OwnedFd, counters: Arc<LinkCounters>) -> io::Result<()> {
        self.remove(id);
        let slot = match self.by_id.get_mut(usize::from(id)) {
            Some(slot) if id != 0 => slot,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        // What is no tap, as in tests, has the short header.
        let header = match tap::vnet_header_size(tap.as_fd()) {
            Ok(vnet::LONG_HEADER) => vnet::LONG_HEADER,
            _ => vnet::HEADER,
        };
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll
            .add(&tap, EpollEvent::new(interest, u64::from(id)))?;
        // A new tap may have frames already: it begins as active.
        *slot = Some(Box::new(Link {
            id,
            tap,
            header,
            counters,
        }));
        self.turns.join(id);
        Ok(())
    }

    /// Removes a link and closes its tap; false when there is none.
    pub fn remove(&mut self, id: u16) -> bool {
        let Some(link) = self.by_id.get_mut(usize::from(id)).and_then(Option::take) else {
            return false;
        };
        self.turns.forget(id);
        // Closing would end the watch too, but another process may hold a copy of the file.
        if let Err(error) = self.epoll.delete(&link.tap) {
            tracing::warn!(link = link.id, %error, "tap was not watched");
        }
        true
    }

    pub(super) fn link(&self, id: u16) -> Option<&Link> {
        self.by_id.get(usize::from(id)).and_then(Option::as_deref)
    }

    /// Every link's tap.
    pub(super) fn taps(&self) -> impl Iterator<Item = (u16, BorrowedFd<'_>)> {
        self.by_id.iter().flatten().map(|l| (l.id, l.tap()))
    }

    /// Readable when a quiet link has a frame.
    pub fn readiness(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Learns which quiet links have frames. Cost: one syscall.
    pub(super) fn collect_ready(&mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        let Ok(n) = self.epoll.wait(&mut events, EpollTimeout::ZERO) else {
            return;
        };
        for event in events.iter().take(n) {
            let id = u16::try_from(event.data()).unwrap_or(0);
            if self.link(id).is_some() {
                self.turns.join(id);
            }
        }
    }

    /// Whose turn it is, of the links that may have frames.
    pub(super) fn turns(&mut self) -> &mut Turns {
        &mut self.turns
    }

    /// Every link may have a frame waiting.
    pub(super) fn activate_all(&mut self) {
        for link in self.by_id.iter().flatten() {
            self.turns.join(link.id);
        }
    }

    /// Whether a link may have a frame waiting.
    pub(super) fn any_active(&self) -> bool {
        self.turns.any()
    }
}
