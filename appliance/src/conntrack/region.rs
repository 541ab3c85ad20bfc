//! How the table lies in memory: one contiguous region of plain numbers, indices instead of pointers, so that it can be
//! copied, mapped elsewhere and read by a successor. `docs/conntrack-region.md` is the same for people.
//!
//! `Header · Head × (wheel + lists) · Owner × links · Bucket × B · Row × N · Detail × N`, each part beginning at a
//! multiple of 64 from the start of the region. N is the capacity; B = 8/45 N + 2, so that if every connection were
//! translated, and so had two entries, the buckets of 15 would be 75 % full.

use core::mem::{offset_of, size_of};

use sluice_contract::LinkId;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::hash::Hasher;

/// Begins every region.
pub(crate) const MAGIC: [u8; 8] = *b"SLUICECT";
/// Moves with every change of the layout or of a number's meaning.
pub(crate) const VERSION: u32 = 1;
/// "No slot". Slots are 24-bit numbers below it.
pub(crate) const NONE: u32 = 0x00ff_ffff;
/// Slots of the timer wheel.
pub(crate) const WHEEL: usize = 2048;
/// Lists besides the wheel's: the two standings that may be evicted.
pub(crate) const LISTS: usize = 2;
/// Owners: one per possible link id.
pub(crate) const OWNERS: usize = LinkId::LAST as usize + 1;
/// Entries of a bucket.
pub(crate) const WAYS: usize = 15;
/// So that the two buckets of a hash differ, and small tables have no bad luck.
const SPARE_BUCKETS: usize = 2;
const LINE: usize = 64;

/// The first bytes of a region.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: [u8; 8],
    pub(crate) version: u32,
    pub(crate) capacity: u32,
    pub(crate) buckets: u32,
    /// Where the rows begin, and the whole length: redundant, and compared.
    pub(crate) rows_at: u32,
    pub(crate) length: u64,
    pub(crate) key: [u64; 2],
    /// Of all above, under the key.
    pub(crate) check: u64,
    /// The table's clock when it was last advanced.
    pub(crate) tick: u64,
    /// Slots in use; slots that were ever in use; first of the free ones below that.
    pub(crate) used: u32,
    pub(crate) watermark: u32,
    pub(crate) free: u32,
    pub(crate) reserved: u32,
}

impl Header {
    /// What `check` has to be.
    pub(crate) fn expected_check(&self) -> u64 {
        Hasher::with_key(self.key).hash([
            u64::from_le_bytes(self.magic),
            u64::from(self.version) | (u64::from(self.capacity) << 32),
            u64::from(self.buckets) | (u64::from(self.rows_at) << 32),
            self.length,
        ])
    }
}

/// The ends of a list of rows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Head {
    pub(crate) first: u32,
    pub(crate) last: u32,
}

impl Head {
    pub(crate) const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };
}

/// What one link holds of the table.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Owner {
    pub(crate) slots: u32,
    pub(crate) unreplied: u32,
    pub(crate) refused: u32,
    pub(crate) evicted: u32,
}

/// One cache line of the index: up to 15 slots, each with a byte of its flow's hash.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub(crate) struct Bucket {
    /// 0 is an empty place; the sixteenth is none and stays 0.
    pub(crate) tags: [u8; 16],
    pub(crate) slots: [[u8; 3]; WAYS],
    pub(crate) reserved: u8,
    /// Entries that belong here and lie in their other bucket. While it is 0 the other bucket need not be read.
    pub(crate) displaced: u16,
}

/// The line of a connection that every lookup reads: who, in which state, when last.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub(crate) struct Row {
    /// IPv4: source and destination of the original flow, then of the reply flow. IPv6: source and destination of the
    /// original flow; those of the reply flow are the reverse or lie in `extension`.
    pub(crate) addresses: [[u8; 4]; 8],
    pub(crate) original_ports: [u16; 2],
    pub(crate) reply_ports: [u16; 2],
    /// Low half of the clock at the last valid packet.
    pub(crate) seen: u32,
    /// Checksum of everything that stays as committed, in this row and in its detail.
    pub(crate) check: u32,
    pub(crate) owner: u16,
    /// The place in the wheel.
    pub(crate) armed: u16,
    pub(crate) next: [u8; 3],
    pub(crate) previous: [u8; 3],
    pub(crate) extension: [u8; 3],
    pub(crate) protocol: u8,
    pub(crate) flags: u8,
    pub(crate) state: u8,
}

/// The rest of a connection.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Detail {
    pub(crate) attached: [u32; 7],
    /// TCP: the highest sequence number each direction has sent. SCTP: the verification tags.
    pub(crate) end: [u32; 2],
    /// TCP: the highest each direction may send. While the connection may be evicted: previous and next of its list.
    pub(crate) max_end: [u32; 2],
    pub(crate) window: [u16; 2],
    pub(crate) scale: u8,
    pub(crate) marks: u8,
    /// Checksum of what packets change: `Row::state` and the five fields above.
    pub(crate) seal: u16,
}

/// Row flag: the addresses are IPv6.
pub(crate) const V6: u8 = 1;
/// Row flag: the reply flow is not the reversed original flow, so there are two index entries.
pub(crate) const TRANSLATED: u8 = 2;

pub(crate) const fn pack(slot: u32) -> [u8; 3] {
    let [a, b, c, _] = slot.to_le_bytes();
    [a, b, c]
}

pub(crate) const fn unpack([a, b, c]: [u8; 3]) -> u32 {
    u32::from_le_bytes([a, b, c, 0])
}

/// Why a region cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionError {
    /// Capacities go from 1 to 2²⁴ − 2.
    Capacity(u32),
    /// The region is shorter than the table.
    Short { wanted: usize, found: usize },
    /// The region does not begin at a multiple of 64.
    Misaligned,
}

impl core::fmt::Display for RegionError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Capacity(n) => write!(f, "No table has a capacity of {n}"),
            Self::Short { wanted, found } => {
                write!(f, "The table needs {wanted} bytes, the region has {found}")
            }
            Self::Misaligned => f.write_str("The region does not begin at a cache line"),
        }
    }
}

impl core::error::Error for RegionError {}

/// Where the parts begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) capacity: usize,
    pub(crate) buckets: usize,
    heads_at: usize,
    owners_at: usize,
    buckets_at: usize,
    pub(crate) rows_at: usize,
    pub(crate) details_at: usize,
    pub(crate) length: usize,
}

impl Layout {
    pub(crate) fn of(capacity: u32) -> Result<Self, RegionError> {
        if capacity == 0 || capacity >= NONE {
            return Err(RegionError::Capacity(capacity));
        }
        let capacity = capacity as usize;
        let buckets = (capacity * 8).div_ceil(45) + SPARE_BUCKETS;
        let heads_at = line(size_of::<Header>());
        let owners_at = heads_at + line((WHEEL + LISTS) * size_of::<Head>());
        let buckets_at = owners_at + line(OWNERS * size_of::<Owner>());
        let rows_at = buckets_at + buckets * size_of::<Bucket>();
        let details_at = rows_at + capacity * size_of::<Row>();
        let length = details_at + line(capacity * size_of::<Detail>());
        Ok(Self {
            capacity,
            buckets,
            heads_at,
            owners_at,
            buckets_at,
            rows_at,
            details_at,
            length,
        })
    }
}

const fn line(bytes: usize) -> usize {
    bytes.next_multiple_of(LINE)
}

/// The parts of a region.
#[derive(Debug)]
pub(crate) struct Region<'r> {
    pub(crate) header: &'r mut Header,
    pub(crate) heads: &'r mut [Head],
    pub(crate) owners: &'r mut [Owner],
    pub(crate) buckets: &'r mut [Bucket],
    pub(crate) rows: &'r mut [Row],
    pub(crate) details: &'r mut [Detail],
}

impl<'r> Region<'r> {
    /// An empty table in `bytes`. Rows need not be zeroed: none is read before it was written.
    pub(crate) fn format(
        bytes: &'r mut [u8],
        capacity: u32,
        hasher: &Hasher,
    ) -> Result<Self, RegionError> {
        let layout = Layout::of(capacity)?;
        let found = bytes.len();
        let short = RegionError::Short {
            wanted: layout.length,
            found,
        };
        let bytes = bytes.get_mut(..layout.length).ok_or(short)?;
        if bytes.as_ptr().align_offset(LINE) != 0 {
            return Err(RegionError::Misaligned);
        }
        let (head, rest) = bytes.split_at_mut(layout.rows_at);
        head.fill(0);
        let (rows, details) = rest.split_at_mut(layout.details_at - layout.rows_at);
        let (head, buckets) = head.split_at_mut(layout.buckets_at);
        let (head, owners) = head.split_at_mut(layout.owners_at);
        let (header, heads) = head.split_at_mut(layout.heads_at);
        let cut = |_| RegionError::Misaligned;
        let region = Self {
            header: Header::mut_from_prefix(header).map_err(|_| short)?.0,
            heads: prefix(heads, WHEEL + LISTS).map_err(cut)?,
            owners: prefix(owners, OWNERS).map_err(cut)?,
            buckets: prefix(buckets, layout.buckets).map_err(cut)?,
            rows: prefix(rows, layout.capacity).map_err(cut)?,
            details: prefix(details, layout.capacity).map_err(cut)?,
        };
        *region.header = Header {
            magic: MAGIC,
            version: VERSION,
            capacity,
            buckets: layout.buckets as u32,
            rows_at: layout.rows_at as u32,
            length: layout.length as u64,
            key: hasher.key(),
            check: 0,
            tick: 0,
            used: 0,
            watermark: 0,
            free: NONE,
            reserved: 0,
        };
        region.header.check = region.header.expected_check();
        region.heads.fill(Head::EMPTY);
        Ok(region)
    }
}

/// The cast failed; only possible if the layout's arithmetic were wrong.
struct Cut;

fn prefix<T: FromBytes + IntoBytes + KnownLayout + Immutable>(
    bytes: &mut [u8],
    count: usize,
) -> Result<&mut [T], Cut> {
    match <[T]>::mut_from_prefix_with_elems(bytes, count) {
        Ok((slice, _)) => Ok(slice),
        Err(_) => Err(Cut),
    }
}

const _: () = {
    assert!(size_of::<Header>() == 80);
    assert!(size_of::<Bucket>() == 64);
    assert!(size_of::<Row>() == 64);
    assert!(size_of::<Detail>() == 52);
    assert!(offset_of!(Row, state) == 63);
    // Per connection: 64 + 52 + 64 · 8/45 = 127.4.
    assert!((size_of::<Row>() + size_of::<Detail>()) * 45 + size_of::<Bucket>() * 8 < 128 * 45);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_connections_take_less_than_128_bytes_each() {
        let layout = Layout::of(1_000_000).unwrap();
        assert!(layout.length <= 128 * 1_000_000, "{}", layout.length);
        // Header, wheel and lists, owners, buckets, rows, details.
        let parts = 128 + 16_448 + 65_536 + 177_780 * 64 + 1_000_000 * (64 + 52);
        assert_eq!(layout.length, parts);
    }

    #[test]
    fn impossible_capacities_are_refused() {
        assert_eq!(Layout::of(0), Err(RegionError::Capacity(0)));
        assert_eq!(Layout::of(NONE), Err(RegionError::Capacity(NONE)));
        assert!(Layout::of(1).is_ok());
    }
}
