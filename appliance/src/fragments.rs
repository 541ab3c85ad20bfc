//! Fragments: the first one of a datagram shows its flow and decides, the others follow it; those that come too early wait.
//!
//! A datagram is never put together: what is remembered is its flow, which eight-byte units of it have come, and the frames
//! that wait. Complete datagrams are forgotten at once, others after 30 s as Linux does (RFC 1122 asks hosts for 60 and more;
//! a middlebox may be stricter). An overlap condemns the whole datagram (RFC 5722). Room is bounded: sets of four datagrams,
//! waiting frames of at most [`ROOM`] bytes, [`MOST`] of a datagram, and a quarter of all for one link.
//!
//! Room is shared by [`Group`]. With n groups that have datagrams here, 1/(n+1) of all datagrams is each one's share. A new
//! datagram takes the place of the one that ends first of a group beyond its share, or of its own; that of a group within its
//! share is only taken by another within its own, when chance has put five such into one set. A group holds no more waiting
//! frames than there is room left, so there always is some for another.

use crate::address::Address;
use crate::arena::{Arena, OutOfMemory};
use crate::decap::Origin;
use crate::flow::Flow;
use crate::frame::{Frame, Offload};
use crate::group::{GROUPS, Group};
use crate::hash::Hasher;
use crate::overlay::Target;
use crate::parse::{Fragment, Packet};
use crate::time::{Duration, Instant};
use crate::wire::{ethernet, ipv4, ipv6};
use heapless::Vec;
use sluice_contract::overlay::PeerId;
use sluice_contract::{DropReason, Family, Identity, LinkId};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// How long a datagram is remembered.
pub const LIFETIME: Duration = Duration::from_secs(30);
/// The longest frame that can wait.
pub const ROOM: usize = 2048;
/// Frames of one datagram that can wait.
pub const MOST: usize = 48;
/// Datagrams in a set.
const WAYS: usize = 4;
/// Sets. 1024 datagrams in all, each with a map of one kilobyte.
const SETS: usize = 256;
/// Words of the map of a datagram: a bit per eight bytes.
const WORDS: usize = 128;
/// Sets that one sweep looks at, at most.
pub const SWEEP: usize = SETS;
/// No frame.
const NONE: u16 = u16::MAX;

/// Which datagram, and which part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    source: Address,
    destination: Address,
    identification: u32,
    link: LinkId,
    protocol: u8,
    /// In bytes.
    offset: u16,
    length: u16,
    /// Others follow behind it.
    more: bool,
}

impl Piece {
    /// Of a packet that is a fragment.
    pub fn of(frame: &Frame<'_>, packet: &Packet) -> Option<Self> {
        let header = frame.bytes().get(usize::from(packet.fragment_header)..)?;
        let (identification, offset, more, behind, protocol) = match packet.family {
            Family::V4 => {
                let (header, _) = ipv4::Header::ref_from_prefix(header).ok()?;
                (
                    u32::from(header.identification.get()),
                    header.fragment_offset(),
                    header.more_fragments(),
                    ethernet::LENGTH + header.header_length(),
                    header.protocol,
                )
            }
            Family::V6 => {
                let (header, _) = ipv6::FragmentHeader::ref_from_prefix(header).ok()?;
                let behind =
                    usize::from(packet.fragment_header) + size_of::<ipv6::FragmentHeader>();
                (
                    header.identification.get(),
                    header.offset(),
                    header.more_fragments(),
                    behind,
                    header.next_header,
                )
            }
        };
        let length = (packet.end as usize).checked_sub(behind)?;
        Some(Self {
            source: packet.source,
            destination: packet.destination,
            identification,
            link: frame.ingress,
            protocol,
            offset,
            length: u16::try_from(length).ok()?,
            more,
        })
    }
}

/// What is known of a fragment's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its first fragment has not come.
    Waiting,
    /// It is of this flow.
    Of(Flow),
    /// It is condemned, for this reason.
    Refused(DropReason),
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Datagram {
    source: Address,
    destination: Address,
    /// In microseconds; 0: empty.
    expires: u64,
    identification: u32,
    source_port: u16,
    destination_port: u16,
    link: u16,
    /// The first frame that waits.
    waiting: u16,
    waiting_count: u16,
    /// Units that have come, and all there are (0: not known).
    units: u16,
    all_units: u16,
    protocol: u8,
    fate: u8,
    /// Of the flow: behind IPv6's fragment header more headers may follow.
    flow_protocol: u8,
    pad: u8,
    group: u16,
    rest: [u8; 8],
}

/// Values of [`Datagram::fate`].
const WAITING: u8 = 0;
const OF_FLOW: u8 = 1;
const OVERLAP: u8 = 2;
const DROPPED: u8 = 3;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Slot {
    bytes: [u8; ROOM],
    length: u16,
    next: u16,
    link: u16,
    /// One more than the identity that the tunnel told; 0: none. And the node, one more; 0: it came in no tunnel.
    identity: [u8; 8],
    peer: [u8; 8],
    /// It is addressed to a Service's frontend, and the node named a backend.
    has_target: u8,
    pad: u8,
    group: u16,
    rest: [u8; 38],
}

/// A frame that waited.
#[derive(Clone, Debug)]
pub struct Waited {
    pub link: LinkId,
    /// The node it came from, if it came in a tunnel.
    pub origin: Option<Origin>,
    pub bytes: Vec<u8, ROOM>,
}

/// Frames that no longer wait, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    first: u16,
    /// `None`: they follow their datagram's flow.
    pub dropped: Option<DropReason>,
}

/// The room.
#[derive(Debug)]
pub struct Fragments<'m> {
    sets: &'m mut [[Datagram; WAYS]],
    maps: &'m mut [[u64; WORDS]],
    slots: &'m mut [Slot],
    /// The first free slot; free slots are chained like those in use.
    free: u16,
    /// Frames that wait, by link and by group.
    by_link: &'m mut [u16],
    by_group: &'m mut [u16],
    /// Datagrams that are remembered, by group; and how many groups have some.
    datagrams: &'m mut [u16],
    groups: usize,
    /// Where the search for datagrams whose time is over goes on.
    cursor: usize,
    tidied: usize,
    waiting: u32,
    hasher: Hasher,
}

impl<'m> Fragments<'m> {
    /// Room for `frames` that wait.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>, frames: u32, hasher: Hasher) -> Result<Self, OutOfMemory> {
        let frames = (frames as usize).min(usize::from(NONE));
        let slots: &mut [Slot] = arena.slice(frames)?;
        let count = slots.len();
        for (at, slot) in slots.iter_mut().enumerate() {
            slot.next = if at + 1 < count {
                (at + 1) as u16
            } else {
                NONE
            };
        }
        Ok(Self {
            sets: arena.slice(SETS)?,
            maps: arena.slice(SETS * WAYS)?,
            slots,
            free: if count == 0 { NONE } else { 0 },
            by_link: arena.slice(usize::from(LinkId::LAST) + 1)?,
            by_group: arena.slice(GROUPS)?,
            datagrams: arena.slice(GROUPS)?,
            groups: 0,
            cursor: 0,
            tidied: 0,
            waiting: 0,
            hasher,
        })
    }

    /// Frames that wait.
    pub const fn waiting(&self) -> u32 {
        self.waiting
    }

    /// What is known of the datagram of a fragment, without noting that it came.
    pub fn peek(&self, piece: &Piece, now: Instant) -> Fate {
        let found = self.find(piece, now).and_then(|at| self.datagram(at));
        found.map_or(Fate::Waiting, Datagram::fate)
    }

    /// Notes that a fragment came. What is released thereby, if anything, goes through [`Self::take`].
    ///
    /// # Cost
    /// A set of four datagrams and at most [`WORDS`] words of a map.
    pub fn arrive(
        &mut self,
        piece: &Piece,
        group: Group,
        now: Instant,
    ) -> (Fate, Option<Released>) {
        let (at, evicted) = match self.find(piece, now) {
            Some(at) => (at, None),
            None => match self.claim(piece, group, now) {
                Some(claimed) => claimed,
                None => return (Fate::Refused(DropReason::FragmentLimit), None),
            },
        };
        let first = usize::from(piece.offset / 8);
        let count = usize::from(piece.length).div_ceil(8);
        let overlap = self.cover(at, first, count);
        let Some(datagram) = self.datagram_mut(at) else {
            return (Fate::Refused(DropReason::FragmentLimit), evicted);
        };
        datagram.units = datagram.units.saturating_add(count as u16);
        let end = (first + count) as u16;
        // Two ends, or something behind the end, is an overlap by other means.
        let two_ends = datagram.all_units != 0
            && (end > datagram.all_units || (!piece.more && end != datagram.all_units));
        if !piece.more {
            datagram.all_units = end;
        }
        if (overlap || two_ends) && datagram.fate <= OF_FLOW {
            datagram.fate = OVERLAP;
            let fate = datagram.fate();
            let released = self.release(at, Some(DropReason::FragmentOverlap));
            return (fate, released.or(evicted));
        }
        let fate = datagram.fate();
        if datagram.all_units != 0
            && datagram.units >= datagram.all_units
            && datagram.fate == OF_FLOW
        {
            self.forget(at);
        }
        (fate, evicted)
    }

    /// The first fragment has been judged: the datagram is of `flow`, or condemned. What waited for that is released.
    pub fn decide(&mut self, piece: &Piece, flow: Option<&Flow>, now: Instant) -> Option<Released> {
        let at = self.find(piece, now)?;
        let datagram = self.datagram_mut(at)?;
        if datagram.fate != WAITING {
            return None;
        }
        let Some(flow) = flow else {
            datagram.fate = DROPPED;
            return self.release(at, Some(DropReason::FragmentRefused));
        };
        datagram.fate = OF_FLOW;
        datagram.flow_protocol = flow.protocol();
        datagram.source_port = flow.source_port();
        datagram.destination_port = flow.destination_port();
        self.release(at, None)
    }

    /// Forgets a datagram of which everything has come and been sent on, so that its identification may be used again.
    pub fn finish(&mut self, piece: &Piece, now: Instant) {
        let Some(at) = self.find(piece, now) else {
            return;
        };
        let complete = self.datagram(at).is_some_and(|datagram| {
            datagram.fate == OF_FLOW
                && datagram.all_units != 0
                && datagram.units >= datagram.all_units
        });
        if complete {
            self.forget(at);
        }
    }

    /// Keeps a frame until the first fragment of its datagram comes.
    ///
    /// # Errors
    /// [`DropReason::FragmentLimit`].
    pub fn hold(
        &mut self,
        piece: &Piece,
        frame: &Frame<'_>,
        origin: Option<Origin>,
        now: Instant,
    ) -> Result<(), DropReason> {
        const LIMIT: DropReason = DropReason::FragmentLimit;
        let at = self.find(piece, now).ok_or(LIMIT)?;
        let share = self.slots.len() / 4;
        let left = self.slots.len().saturating_sub(self.waiting as usize);
        let held = self.by_link.get(piece.link.index()).copied().ok_or(LIMIT)?;
        let datagram = self.datagram(at).ok_or(LIMIT)?;
        let (of_datagram, group) = (datagram.waiting_count, Group::at(datagram.group));
        let by_group = self.by_group.get(group.index()).copied().ok_or(LIMIT)?;
        let bytes = frame.bytes();
        if frame.tail() != 0
            || bytes.len() > ROOM
            || usize::from(held) >= share
            || usize::from(by_group) >= left
            || usize::from(of_datagram) >= MOST
        {
            return Err(LIMIT);
        }
        let index = self.free;
        let datagram_first = self.datagram(at).ok_or(LIMIT)?.waiting;
        let slot = self.slots.get_mut(usize::from(index)).ok_or(LIMIT)?;
        self.free = slot.next;
        slot.next = datagram_first;
        slot.length = bytes.len() as u16;
        slot.link = piece.link.raw();
        slot.group = group.raw();
        let identity = origin.and_then(|origin| origin.identity);
        slot.identity = identity.map_or(0, |id| u64::from(id.0) + 1).to_le_bytes();
        slot.has_target = origin.is_some_and(|origin| origin.target.is_some()).into();
        slot.peer = origin
            .map_or(0, |origin| u64::from(origin.peer.0) + 1)
            .to_le_bytes();
        slot.bytes
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        if let Some(count) = self.by_link.get_mut(piece.link.index()) {
            *count += 1;
        }
        if let Some(count) = self.by_group.get_mut(group.index()) {
            *count += 1;
        }
        self.waiting += 1;
        let datagram = self.datagram_mut(at).ok_or(LIMIT)?;
        datagram.waiting = index;
        datagram.waiting_count += 1;
        Ok(())
    }

    /// Takes the next frame of those released.
    pub fn take(&mut self, released: &mut Released) -> Option<Waited> {
        let index = released.first;
        let slot = self.slots.get_mut(usize::from(index))?;
        released.first = slot.next;
        slot.next = self.free;
        self.free = index;
        self.waiting = self.waiting.saturating_sub(1);
        let link = LinkId::new(slot.link)?;
        if let Some(count) = self.by_link.get_mut(link.index()) {
            *count = count.saturating_sub(1);
        }
        if let Some(count) = self.by_group.get_mut(usize::from(slot.group)) {
            *count = count.saturating_sub(1);
        }
        let bytes = slot.bytes.get(..usize::from(slot.length))?;
        let number = |bytes| u64::from_le_bytes(bytes).checked_sub(1);
        let small = |bytes| number(bytes).and_then(|number| u32::try_from(number).ok());
        let peer = number(slot.peer).and_then(|peer| peer.try_into().ok());
        Some(Waited {
            link,
            origin: peer.map(|peer| Origin {
                peer: PeerId(peer),
                identity: small(slot.identity).map(Identity),
                // Which one does not matter: a later fragment begins no connection.
                target: (slot.has_target != 0).then_some(Target {
                    address: Address::UNSPECIFIED,
                    port: 0,
                }),
            }),
            bytes: Vec::from_slice(bytes).ok()?,
        })
    }

    /// Forgets datagrams whose time is over, looking at no more than `budget` sets; yields what waited in vain for one.
    pub fn sweep(&mut self, now: Instant, budget: &mut usize) -> Option<Released> {
        while *budget > 0 {
            *budget -= 1;
            for way in 0..WAYS {
                let at = (self.cursor, way);
                let over = self.datagram(at).is_some_and(|datagram| {
                    datagram.expires != 0 && datagram.expires <= now.micros()
                });
                if over {
                    let released = self.release(at, Some(DropReason::FragmentTimeout));
                    self.forget(at);
                    if released.is_some() {
                        return released;
                    }
                }
            }
            self.cursor = (self.cursor + 1) % SETS;
        }
        None
    }

    fn datagram(&self, (set, way): (usize, usize)) -> Option<&Datagram> {
        self.sets.get(set)?.get(way)
    }

    fn datagram_mut(&mut self, (set, way): (usize, usize)) -> Option<&mut Datagram> {
        self.sets.get_mut(set)?.get_mut(way)
    }

    fn set_of(&self, piece: &Piece) -> usize {
        let (from, to) = (piece.source, piece.destination);
        let rest = u64::from(piece.identification)
            | u64::from(piece.protocol) << 32
            | u64::from(piece.link.raw()) << 40;
        self.hasher
            .hash([from.high(), from.low(), to.high(), to.low(), rest]) as usize
            % SETS
    }

    fn find(&self, piece: &Piece, now: Instant) -> Option<(usize, usize)> {
        let set = self.set_of(piece);
        let datagrams = self.sets.get(set)?;
        let way = datagrams
            .iter()
            .position(|datagram| datagram.is_of(piece, now))?;
        Some((set, way))
    }

    /// A place for a new datagram, if its group may have one. What waited for the one that lay there is released.
    fn claim(
        &mut self,
        piece: &Piece,
        group: Group,
        now: Instant,
    ) -> Option<((usize, usize), Option<Released>)> {
        let set = self.set_of(piece);
        let way = self.place_in(self.sets.get(set)?, group, now)?;
        let at = (set, way);
        let over = self
            .datagram(at)
            .is_some_and(|datagram| datagram.expires <= now.micros());
        let reason = if over {
            DropReason::FragmentTimeout
        } else {
            DropReason::FragmentLimit
        };
        let released = self.release(at, Some(reason));
        self.forget(at);
        self.count(group, 1);
        if let Some(datagram) = self.datagram_mut(at) {
            datagram.source = piece.source;
            datagram.destination = piece.destination;
            datagram.identification = piece.identification;
            datagram.protocol = piece.protocol;
            datagram.link = piece.link.raw();
            datagram.group = group.raw();
            datagram.waiting = NONE;
            datagram.expires = (now + LIFETIME).micros();
        }
        self.tidy(now);
        Some((at, released))
    }

    /// Which of a set's places a new datagram of `group` gets, if any.
    fn place_in(&self, set: &[Datagram; WAYS], group: Group, now: Instant) -> Option<usize> {
        let count = |group: u16| {
            let count = self.datagrams.get(usize::from(group));
            usize::from(count.copied().unwrap_or(0))
        };
        let share = SETS * WAYS / (self.groups + 1);
        let is_within = count(group.raw()) < share;
        let rank = |datagram: &Datagram| {
            if datagram.expires <= now.micros() {
                Some(0)
            } else if count(datagram.group) > share {
                Some(1)
            } else if datagram.group == group.raw() {
                Some(2)
            } else {
                is_within.then_some(3)
            }
        };
        let ranked = set
            .iter()
            .enumerate()
            .filter_map(|(way, datagram)| rank(datagram).map(|rank| (rank, datagram.expires, way)));
        ranked.min().map(|(.., way)| way)
    }

    /// Forgets what is over and nothing waits for in the next set, so that nobody is counted for what is long gone.
    fn tidy(&mut self, now: Instant) {
        self.tidied = (self.tidied + 1) % SETS;
        for way in 0..WAYS {
            let at = (self.tidied, way);
            let is_over = self.datagram(at).is_some_and(|datagram| {
                datagram.expires != 0
                    && datagram.expires <= now.micros()
                    && datagram.waiting_count == 0
            });
            if is_over {
                self.forget(at);
            }
        }
    }

    /// Counts a datagram that a group has more, or less.
    fn count(&mut self, group: Group, step: i16) {
        let Some(count) = self.datagrams.get_mut(group.index()) else {
            return;
        };
        let before = *count;
        *count = before.saturating_add_signed(step);
        match (before, *count) {
            (0, 1..) => self.groups += 1,
            (1.., 0) => self.groups = self.groups.saturating_sub(1),
            _ => {}
        }
    }

    fn forget(&mut self, at: (usize, usize)) {
        let group = self.datagram(at).filter(|datagram| datagram.expires != 0);
        if let Some(group) = group.map(|datagram| Group::at(datagram.group)) {
            self.count(group, -1);
        }
        if let Some(datagram) = self.datagram_mut(at) {
            *datagram = Datagram::new_zeroed();
            datagram.waiting = NONE;
        }
        if let Some(map) = self.maps.get_mut(at.0 * WAYS + at.1) {
            map.fill(0);
        }
    }

    /// Marks units; `true` if one of them was marked.
    fn cover(&mut self, at: (usize, usize), first: usize, count: usize) -> bool {
        let Some(map) = self.maps.get_mut(at.0 * WAYS + at.1) else {
            return true;
        };
        let mut overlap = false;
        let mut unit = first;
        while unit < first + count {
            let bit = unit % 64;
            let run = (64 - bit).min(first + count - unit);
            let mask = (u64::MAX >> (64 - run)) << bit;
            match map.get_mut(unit / 64) {
                Some(word) => {
                    overlap |= *word & mask != 0;
                    *word |= mask;
                }
                None => return true,
            }
            unit += run;
        }
        overlap
    }

    fn release(&mut self, at: (usize, usize), dropped: Option<DropReason>) -> Option<Released> {
        let datagram = self.datagram_mut(at)?;
        // A place that was never used holds zeros, and zero frames wait there.
        let count = core::mem::take(&mut datagram.waiting_count);
        let first = core::mem::replace(&mut datagram.waiting, NONE);
        (count > 0).then_some(Released { first, dropped })
    }
}

impl Datagram {
    fn is_of(&self, piece: &Piece, now: Instant) -> bool {
        self.expires > now.micros()
            && self.identification == piece.identification
            && self.link == piece.link.raw()
            && self.protocol == piece.protocol
            && self.source == piece.source
            && self.destination == piece.destination
    }

    fn fate(&self) -> Fate {
        match self.fate {
            WAITING => Fate::Waiting,
            OF_FLOW => Fate::Of(Flow::new(
                self.source,
                self.destination,
                self.flow_protocol,
                self.source_port,
                self.destination_port,
            )),
            OVERLAP => Fate::Refused(DropReason::FragmentOverlap),
            _ => Fate::Refused(DropReason::FragmentRefused),
        }
    }
}

impl Waited {
    /// The frame again, in a buffer with headroom.
    pub fn frame<'b>(&self, buffer: &'b mut [u8], headroom: usize) -> Option<Frame<'b>> {
        let end = headroom.checked_add(self.bytes.len())?;
        buffer.get_mut(headroom..end)?.copy_from_slice(&self.bytes);
        Frame::new(buffer, headroom, end, 0, self.link, Offload::default())
    }
}

/// Whether a packet is part of a datagram in several pieces.
pub const fn is_piece(packet: &Packet) -> bool {
    !matches!(packet.fragment, Fragment::Whole)
}
