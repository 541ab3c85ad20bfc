//! A successor takes over the connections of a region it did not write: from a predecessor that was replaced, or died.
//!
//! The old region is only read, and believed nothing: its header and each row have to agree with their checksums, states
//! with protocols, extensions with their owners. What is whole goes through the ordinary way in, so index, wheel, lists
//! and counts are built anew and cannot be wrong, and the hash key may be a new one. It can be done in slices while the
//! new table already serves; a flow that is there by then wins.
//!
//! Two checksums, because they cost differently. The `check` (keyed, 32 bits) covers what never changes: addresses, ports,
//! owner, attached data. It is computed at commit; a row without it is dropped. The `seal` (16 bits, unkeyed, 1 ns) covers
//! what packets change, and only TCP and SCTP pay it per packet. A row with a wrong seal was torn or flipped in its
//! tracking only: its connection goes on as one picked up mid-flow, which is better than losing it. `seen` is in neither:
//! nonsense there at worst makes a connection end early or stay for one timeout more.

use sluice_contract::LinkId;
use zerocopy::FromBytes;

use crate::conntrack::region::{
    Detail, Header, Layout, MAGIC, Row, TRANSLATED, V6, VERSION, unpack,
};
use crate::conntrack::row::Tracking;
use crate::conntrack::state::{EXTENSION, FREE, State};
use crate::conntrack::{Attached, CommitError, Conntrack, sctp::Tags, tcp::Tcp};
use crate::flow::Flow;
use crate::hash::Hasher;
use crate::time::Instant;
use crate::wire::protocol;

/// Why a region is not adopted at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdoptError {
    /// It does not begin like a connection region.
    Magic,
    /// Another layout: theirs.
    Version(u32),
    /// The header does not agree with its checksum, or its geometry is impossible.
    Header,
    /// Bytes are missing.
    Truncated { wanted: u64, found: u64 },
}

impl core::fmt::Display for AdoptError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Magic => f.write_str("Not a connection region"),
            Self::Version(theirs) => {
                write!(f, "Region of version {theirs}, this side knows {VERSION}")
            }
            Self::Header => f.write_str("The region's header is corrupt"),
            Self::Truncated { wanted, found } => {
                write!(f, "The region has {found} of its {wanted} bytes")
            }
        }
    }
}

impl core::error::Error for AdoptError {}

/// What became of the rows of an old region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Adopted {
    /// Connections that go on.
    pub adopted: u32,
    /// Of these: with their tracking lost, so that it is learned anew.
    pub relearning: u32,
    /// Rows that failed their checksum or made no sense.
    pub corrupt: u32,
    /// Connections whose time was over.
    pub expired: u32,
    /// Flows that the new table had already.
    pub known: u32,
    /// Connections for which the new table had no room.
    pub refused: u32,
}

/// An adoption on its way.
#[derive(Debug)]
pub struct Adoption<'o> {
    old: &'o [u8],
    layout: Layout,
    hasher: Hasher,
    tick: u32,
    watermark: usize,
    next: usize,
    so_far: Adopted,
}

impl<'o> Adoption<'o> {
    /// Looks at the header of an old region, which may lie anywhere.
    ///
    /// # Errors
    /// [`AdoptError`] says what is wrong; nothing can be adopted then.
    pub fn begin(old: &'o [u8]) -> Result<Self, AdoptError> {
        let found = old.len() as u64;
        let (header, _) = Header::read_from_prefix(old).map_err(|_| AdoptError::Truncated {
            wanted: size_of::<Header>() as u64,
            found,
        })?;
        if header.magic != MAGIC {
            return Err(AdoptError::Magic);
        }
        if header.version != VERSION {
            return Err(AdoptError::Version(header.version));
        }
        let layout = Layout::of(header.capacity).map_err(|_| AdoptError::Header)?;
        let agrees = header.check == header.expected_check()
            && header.buckets as usize == layout.buckets
            && header.rows_at as usize == layout.rows_at
            && header.length == layout.length as u64;
        if !agrees {
            return Err(AdoptError::Header);
        }
        if found < header.length {
            return Err(AdoptError::Truncated {
                wanted: header.length,
                found,
            });
        }
        Ok(Self {
            old,
            layout,
            hasher: Hasher::with_key(header.key),
            tick: header.tick as u32,
            watermark: header.watermark as usize,
            next: 0,
            so_far: Adopted::default(),
        })
    }

    /// Adopts up to `budget` rows into `table`. `Some` when all are done.
    ///
    /// # Cost
    /// About a commit per connection.
    pub fn step(
        &mut self,
        table: &mut Conntrack<'_>,
        now: Instant,
        budget: usize,
    ) -> Option<Adopted> {
        let end = self.layout.capacity.min(self.next.saturating_add(budget));
        while self.next < end {
            let slot = self.next;
            self.next += 1;
            match self.row(slot).map(|row| row.state) {
                Some(FREE | EXTENSION) => {}
                _ => self.adopt(slot, table, now),
            }
        }
        (self.next == self.layout.capacity).then_some(self.so_far)
    }

    fn row(&self, slot: usize) -> Option<Row> {
        let at = self.layout.rows_at + slot.checked_mul(size_of::<Row>())?;
        Some(Row::read_from_prefix(self.old.get(at..)?).ok()?.0)
    }

    fn detail(&self, slot: usize) -> Option<Detail> {
        let at = self.layout.details_at + slot.checked_mul(size_of::<Detail>())?;
        Some(Detail::read_from_prefix(self.old.get(at..)?).ok()?.0)
    }

    fn adopt(&mut self, slot: usize, table: &mut Conntrack<'_>, now: Instant) {
        let Some(found) = self.validate(slot) else {
            // Beyond the watermark no row was ever written, unless the watermark itself is wrong.
            self.so_far.corrupt += u32::from(slot < self.watermark);
            return;
        };
        let age = self.tick.wrapping_sub(found.seen);
        // A packet cannot have been seen after the end: such a row's age is not known.
        let age = if age >> 31 == 1 { 0 } else { age };
        if age >= table.settings.timeouts.ticks(found.state) {
            self.so_far.expired += 1;
            return;
        }
        let tick = table.advance_clock(now);
        let new = table.revive(
            found.original,
            found.reply,
            found.owner,
            found.attached,
            (found.state, found.tracking),
        );
        match table.take_in(&new, tick - u64::from(age)) {
            Ok(_) => {
                self.so_far.adopted += 1;
                self.so_far.relearning += u32::from(found.relearning);
            }
            Err(CommitError::Full) => self.so_far.refused += 1,
            Err(_) => self.so_far.known += 1,
        }
    }

    fn validate(&self, slot: usize) -> Option<Found> {
        let row = self.row(slot)?;
        let detail = self.detail(slot)?;
        let state = State::from_raw(row.state);
        let sound = row.check == row.expected_check(&detail.attached, &self.hasher)
            && row.flags & !(V6 | TRANSLATED) == 0
            && state.is_none_or(|state| state.fits(row.protocol))
            && row.state > EXTENSION;
        if !sound {
            return None;
        }
        let original = row.original();
        let reply = self.reply(slot, &row)?;
        if row.is_translated() == (reply == original.reversed()) {
            return None;
        }
        let whole = detail.seal == detail.expected_seal(row.state);
        let (state, tracking, relearning) = match (whole, state) {
            (true, Some(state)) => (state, tracking_of(&row, &detail, state), false),
            _ => (
                restart_of(&original),
                match row.protocol {
                    protocol::TCP => Tracking::Tcp(Tcp::default()),
                    protocol::SCTP => Tracking::Sctp(Tags::default()),
                    _ => Tracking::None,
                },
                true,
            ),
        };
        Some(Found {
            original,
            reply,
            owner: LinkId::new(row.owner)?,
            attached: detail.attached(),
            state,
            tracking,
            relearning,
            seen: row.seen,
        })
    }

    fn reply(&self, slot: usize, row: &Row) -> Option<Flow> {
        match (row.is_v6(), row.is_translated()) {
            (true, true) => {
                let wide = self.row(unpack(row.extension) as usize)?;
                let sound = wide.state == EXTENSION
                    && unpack(wide.extension) as usize == slot
                    && wide.check == wide.expected_check(&[0; 7], &self.hasher);
                (sound && wide.reply_ports == row.reply_ports).then(|| wide.reply6())
            }
            (true, false) => Some(row.original().reversed()),
            (false, _) => Some(row.reply4()),
        }
    }
}

struct Found {
    original: Flow,
    reply: Flow,
    owner: LinkId,
    attached: Attached,
    state: State,
    tracking: Tracking,
    relearning: bool,
    seen: u32,
}

fn tracking_of(row: &Row, detail: &Detail, state: State) -> Tracking {
    match row.protocol {
        protocol::TCP => Tracking::Tcp(detail.tcp(state)),
        protocol::SCTP => Tracking::Sctp(detail.tags(state)),
        _ => Tracking::None,
    }
}

/// Where a connection starts over whose tracking is lost.
const fn restart_of(flow: &Flow) -> State {
    match flow.protocol() {
        protocol::TCP => State::TcpMidflow,
        protocol::SCTP => State::SctpCookieEchoed,
        _ => State::unreplied(flow),
    }
}
