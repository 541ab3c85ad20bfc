//! The page tables, computed at compile time from the memory layout.
//!
//! Below [`RAM`] the unit is 4 KiB, above it 2 MiB. Upper levels grant everything and the leaf
//! decides. Accessed and dirty bits are set from the start, so the processor never writes the
//! tables and they can be mapped read-only even for ring 0.

use crate::layout::{LARGE_PAGE, PAGE, RAM, Rights, rights};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

const ENTRIES: usize = 512;
/// 4 KiB tables for everything below packet memory.
const SMALL_TABLES: usize = (RAM / LARGE_PAGE) as usize;
/// Four directories span the 4 GiB that can be addressed at all.
const DIRECTORIES: usize = 4;
/// Root, pointer table, directories, small tables.
pub const TABLE_COUNT: usize = 2 + DIRECTORIES + SMALL_TABLES;

/// One page of 512 entries, at any of the four levels.
#[repr(C, align(4096))]
#[derive(Clone, Copy, Debug)]
pub struct Table(pub [u64; ENTRIES]);

/// The four-level tables for a set of tables that will lie at `base`, root first.
///
/// # Panics
/// At compile time, if `base` is not page-aligned.
pub const fn build(base: u64) -> [Table; TABLE_COUNT] {
    assert!(base.is_multiple_of(PAGE));
    let mut tables = [Table([0; ENTRIES]); TABLE_COUNT];
    tables[0].0[0] = pointer(base, 1);
    let mut d = 0;
    while d < DIRECTORIES {
        tables[1].0[d] = pointer(base, 2 + d);
        let mut i = 0;
        while i < ENTRIES {
            let page = d * ENTRIES + i;
            tables[2 + d].0[i] = if page < SMALL_TABLES {
                pointer(base, 2 + DIRECTORIES + page)
            } else {
                leaf(page as u64 * LARGE_PAGE, LARGE)
            };
            i += 1;
        }
        d += 1;
    }
    let mut page = 0;
    while page < SMALL_TABLES * ENTRIES {
        tables[2 + DIRECTORIES + page / ENTRIES].0[page % ENTRIES] = leaf(page as u64 * PAGE, 0);
        page += 1;
    }
    tables
}

const fn pointer(base: u64, index: usize) -> u64 {
    (base + index as u64 * PAGE) | PRESENT | WRITE | USER | ACCESSED
}

const fn leaf(address: u64, size: u64) -> u64 {
    match rights(address) {
        None => 0,
        Some(rights) => address | PRESENT | ACCESSED | DIRTY | size | bits(rights),
    }
}

const fn bits(rights: Rights) -> u64 {
    (if rights.user { USER } else { 0 })
        | (if rights.write { WRITE } else { 0 })
        | (if rights.execute { 0 } else { NO_EXECUTE })
        | (if rights.cached {
            0
        } else {
            CACHE_DISABLE | WRITE_THROUGH
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{DEVICES_END, REGIONS, TABLES};

    static BUILT: [Table; TABLE_COUNT] = build(TABLES);

    fn table_at(entry: u64) -> &'static Table {
        let address = entry & 0x000f_ffff_ffff_f000;
        &BUILT[((address - TABLES) / PAGE) as usize]
    }

    /// The processor's walk, written from the manual: where an address leads and what is allowed.
    fn walk(address: u64) -> Option<(u64, Rights)> {
        let mut table = &BUILT[0];
        let (mut user, mut write, mut execute) = (true, true, true);
        for shift in [39u32, 30, 21, 12] {
            let entry = table.0[(address >> shift & 511) as usize];
            if entry & PRESENT == 0 {
                return None;
            }
            assert_ne!(entry & ACCESSED, 0, "the processor would write the tables");
            user &= entry & USER != 0;
            write &= entry & WRITE != 0;
            execute &= entry & NO_EXECUTE == 0;
            if shift == 12 || entry & LARGE != 0 {
                assert_ne!(entry & DIRTY, 0, "the processor would write the tables");
                let mask = (1u64 << shift) - 1;
                let target = (entry & 0x000f_ffff_ffff_f000 & !mask) | address & mask;
                let cached = entry & CACHE_DISABLE == 0;
                return Some((
                    target,
                    Rights {
                        user,
                        write,
                        execute,
                        cached,
                    },
                ));
            }
            table = table_at(entry);
        }
        None
    }

    #[test]
    fn every_page_has_exactly_the_promised_rights() {
        let mut address = 0;
        while address < DEVICES_END {
            for probe in [address, address + PAGE - 1] {
                let promised = rights(probe).map(|r| (probe, r));
                assert_eq!(walk(probe), promised, "{probe:#x}");
            }
            address += if address < RAM { PAGE } else { PAGE * 64 };
        }
    }

    #[test]
    fn every_edge_of_every_region_is_exact() {
        for r in REGIONS {
            for probe in [r.start - 1, r.start, r.end - 1, r.end] {
                assert_eq!(walk(probe), rights(probe).map(|r| (probe, r)), "{probe:#x}");
            }
        }
    }

    #[test]
    fn nothing_is_mapped_above_4_gib() {
        for address in [
            DEVICES_END,
            1 << 33,
            1 << 39,
            1 << 46,
            u64::MAX,
            0xffff_8000_0000_0000,
        ] {
            assert_eq!(walk(address), None, "{address:#x}");
        }
    }

    #[test]
    fn regions_of_large_pages_start_and_end_on_large_pages() {
        for r in REGIONS.iter().filter(|r| r.start >= RAM) {
            assert_eq!((r.start % LARGE_PAGE, r.end % LARGE_PAGE), (0, 0), "{r:x?}");
        }
    }
}
