//! What the fuzz target `adoption` runs: a successor reads a region that anybody may have written.

extern crate std;

use crate::conntrack::region::{Detail, Layout, Row, TRANSLATED, V6, pack};
use crate::conntrack::state::{EXTENSION, State};
use crate::conntrack::{Adopted, Adoption, Conntrack, Settings, Visit};
use crate::hash::Hasher;
use crate::testing::Input;
use crate::time::{Duration, Instant};
use crate::wire::protocol;
use std::vec::Vec;
use zerocopy::{FromBytes, IntoBytes};

/// Slots of the old region, and of the table that takes its connections over.
const OLD: u32 = 24;
const NEW: u32 = 40;

/// In a row's first byte: what agrees.
const CHECKED: u8 = 1;
const SEALED: u8 = 2;
/// State and protocol belong together, the flags are known ones, and the reply is the reversed flow where it has to be.
const PLAUSIBLE: u8 = 4;
/// The next slot holds the reply flow.
const EXTENDED: u8 = 8;

/// Fuzz entry: any bytes as a region, and any rows behind a good header, with and without right checksums. Holds: no panic,
/// a table whose parts agree after every step, and whose own region a second successor adopts without a loss.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_adoption(bytes: &[u8]) {
    if let Ok(mut adoption) = Adoption::begin(bytes) {
        in_table(|table| adopt(&mut adoption, table, 64));
    }
    let mut input = Input::new(bytes);
    let region = region(&mut input);
    let Ok(mut adoption) = Adoption::begin(region.bytes()) else {
        unreachable!("the header is good");
    };
    let step = 8 + usize::from(input.byte() % 32);
    let taken = in_table(|table| adopt(&mut adoption, table, step));
    let mut again = Adoption::begin(taken.bytes()).expect("a table's own region");
    in_table(|table| {
        let adopted = adopt(&mut again, table, 64);
        assert_eq!((adopted.corrupt, adopted.relearning), (0, 0));
        live_on(table, &mut input);
    });
}

/// Adopts everything in steps of `budget` rows.
fn adopt(adoption: &mut Adoption<'_>, table: &mut Conntrack<'_>, budget: usize) -> Adopted {
    loop {
        let adopted = adoption.step(table, at(5), budget);
        assert_eq!(table.audit(), Ok(()));
        if let Some(adopted) = adopted {
            assert!(adopted.adopted <= table.capacity());
            assert!(adopted.relearning <= adopted.adopted);
            return adopted;
        }
    }
}

/// What was adopted is found, ends when its time is over, and can be removed.
fn live_on(table: &mut Conntrack<'_>, input: &mut Input<'_>) {
    let mut entries = Vec::new();
    table.visit(0, u32::MAX, at(5), |entry| {
        entries.push(*entry);
        Visit::Keep
    });
    for entry in &entries {
        for flow in [entry.original, entry.reply] {
            let hit = table.find(&flow, table.hash(&flow));
            assert_eq!(hit.map(|hit| hit.id), Some(entry.id));
        }
        if input.byte() & 1 != 0 {
            table.remove(entry.id);
        }
    }
    assert_eq!(table.audit(), Ok(()));
    table.sweep(at(5) + Duration::from_secs(input.short().into()), u32::MAX);
    assert_eq!(table.audit(), Ok(()));
}

/// Memory that begins at a cache line.
struct Region(Vec<u8>);

impl Region {
    fn new(capacity: u32) -> Self {
        let bytes = Conntrack::region_bytes(capacity).expect("a capacity");
        Self(std::vec![0; bytes + 63])
    }

    fn range(&self) -> core::ops::Range<usize> {
        let pad = self.0.as_ptr().align_offset(64);
        pad..pad + self.0.len() - 63
    }

    fn bytes(&self) -> &[u8] {
        &self.0[self.range()]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let range = self.range();
        &mut self.0[range]
    }
}

fn in_table<T>(run: impl FnOnce(&mut Conntrack<'_>) -> T) -> Region {
    let mut region = Region::new(NEW);
    let hasher = Hasher::new([3; 16]);
    let mut table = Conntrack::new(region.bytes_mut(), NEW, Settings::default(), hasher, at(5))
        .expect("the region suffices");
    run(&mut table);
    region
}

fn at(seconds: u64) -> Instant {
    Instant::from_micros(seconds * 1_000_000)
}

/// A region with a good header and the input's rows.
fn region(input: &mut Input<'_>) -> Region {
    let mut region = Region::new(OLD);
    let hasher = Hasher::new([9; 16]);
    let table = Conntrack::new(region.bytes_mut(), OLD, Settings::default(), hasher, at(9));
    table.expect("the region suffices").region.header.watermark = input.byte().into();
    let layout = Layout::of(OLD).expect("a capacity");
    let bytes = region.bytes_mut();
    for slot in 0..layout.capacity {
        if input.is_empty() {
            break;
        }
        let (row, detail) = entry(input, slot, &hasher);
        let row_at = layout.rows_at + slot * size_of::<Row>();
        bytes[row_at..row_at + size_of::<Row>()].copy_from_slice(row.as_bytes());
        let detail_at = layout.details_at + slot * size_of::<Detail>();
        bytes[detail_at..detail_at + size_of::<Detail>()].copy_from_slice(detail.as_bytes());
    }
    region
}

/// One row and its detail.
fn entry(input: &mut Input<'_>, slot: usize, hasher: &Hasher) -> (Row, Detail) {
    let shape = input.byte();
    let mut row = Row::read_from_bytes(&[0; size_of::<Row>()]).expect("a row");
    for address in &mut row.addresses {
        // Few addresses, so that flows meet.
        *address = [10, 0, 0, input.byte() & 3];
    }
    row.original_ports = [input.short() & 3, 80];
    row.reply_ports = [80, input.short() & 3];
    row.owner = input.short();
    row.protocol = input.byte();
    row.flags = input.byte();
    row.state = input.byte();
    row.seen = input.word();
    row.extension = pack(input.byte().into());
    let mut detail = Detail::EMPTY;
    detail.attached[0] = input.byte().into();
    detail.end = [input.word(), input.word()];
    detail.max_end = [input.word(), input.word()];
    detail.window = [input.short(), input.short()];
    detail.scale = input.byte();
    detail.marks = input.byte();
    detail.seal = input.short();
    if shape & PLAUSIBLE != 0 {
        make_plausible(&mut row);
    }
    if shape & EXTENDED != 0 {
        row.flags = V6 | TRANSLATED;
        row.extension = pack(slot as u32 + 1);
    }
    if shape & CHECKED != 0 {
        let attached = if row.state == EXTENSION {
            &[0; 7]
        } else {
            &detail.attached
        };
        row.check = row.expected_check(attached, hasher);
    }
    if shape & SEALED != 0 {
        detail.seal = detail.expected_seal(row.state);
    }
    (row, detail)
}

fn make_plausible(row: &mut Row) {
    let number = usize::from(row.state) % State::ALL.len();
    let state = State::ALL[number];
    row.state = state as u8;
    let protocols = [
        protocol::TCP,
        protocol::UDP,
        protocol::SCTP,
        protocol::ICMP,
        47,
    ];
    row.protocol = protocols
        .into_iter()
        .find(|protocol| state.fits(*protocol))
        .unwrap_or(row.protocol);
    row.flags &= V6 | TRANSLATED;
    row.owner &= 0xff;
    row.seen &= 3;
    if !row.is_v6() && !row.is_translated() {
        let [from, to, ..] = row.addresses;
        row.addresses[2..4].copy_from_slice(&[to, from]);
        let [from, to] = row.original_ports;
        row.reply_ports = [to, from];
    }
}
