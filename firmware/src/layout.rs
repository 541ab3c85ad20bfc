//! Where everything lies in guest-physical memory, and who may do what there.
//!
//! Addresses are identity-mapped. The linker script asserts the same boundaries; `paging` turns
//! [`REGIONS`] into page tables; nothing else in the image repeats these numbers. An address in no
//! region is not mapped: page 0, the page below every stack, and all gaps.

/// A 4 KiB page, the unit of the image's own regions.
pub const PAGE: u64 = 0x1000;
/// A 2 MiB page, the unit of packet memory and device windows.
pub const LARGE_PAGE: u64 = 0x20_0000;

/// Start info, memory map and command line are accepted only below this address.
pub const LOW_END: u64 = 0x20_0000;
/// One 16-byte stub per vector, so that the IDT is a constant.
pub const STUBS: u64 = 0x20_0000;
pub const TABLES: u64 = 0x20_4000;
pub const IDT: u64 = TABLES + crate::paging::TABLE_COUNT as u64 * PAGE;
pub const FIRMWARE_DATA: u64 = 0x20_e000;
/// The task state segment opens the firmware's data, the GDT follows it.
pub const TSS: u64 = FIRMWARE_DATA;
pub const GDT: u64 = FIRMWARE_DATA + 0x80;
/// Ring 0 enters here from ring 3.
pub const TRAP_STACK_TOP: u64 = 0x21_3000;
/// Double fault, NMI and machine check have their own stack: the other may be what is broken.
pub const ABORT_STACK_TOP: u64 = 0x21_5000;
pub const TEXT: u64 = 0x22_0000;
pub const RODATA: u64 = 0x40_0000;
pub const DATA: u64 = 0x48_0000;
pub const DATA_END: u64 = 0x4c_0000;
pub const STACK_BOTTOM: u64 = 0x4c_1000;
pub const STACK_TOP: u64 = 0x5f_f000;
/// All RAM from here up is packet memory and tables.
pub const RAM: u64 = 0x60_0000;
/// RAM above this address is left alone (3 GiB are plenty, and here the device hole begins).
pub const RAM_END: u64 = 0xc000_0000;
/// virtio-mmio transports and the park page. The IO-APIC and the local APIC above are ring 0's.
pub const DEVICES: u64 = RAM_END;
pub const APICS: u64 = 0xfec0_0000;
pub const HIGH_DEVICES: u64 = 0xff00_0000;
pub const DEVICES_END: u64 = 0x1_0000_0000;

/// What a page may be used for. No page is both writable and executable, whoever runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights {
    pub user: bool,
    pub write: bool,
    pub execute: bool,
    pub cached: bool,
}

impl Rights {
    const fn new(user: bool, write: bool, execute: bool) -> Self {
        Self {
            user,
            write,
            execute,
            cached: true,
        }
    }

    const fn device(user: bool) -> Self {
        Self {
            user,
            write: true,
            execute: false,
            cached: false,
        }
    }
}

/// A half-open range with one set of rights.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub start: u64,
    pub end: u64,
    pub rights: Rights,
}

const fn region(start: u64, end: u64, rights: Rights) -> Region {
    Region { start, end, rights }
}

/// The whole map, in ascending order.
pub const REGIONS: [Region; 14] = [
    region(PAGE, LOW_END, Rights::new(true, false, false)),
    region(STUBS, TABLES, Rights::new(false, false, true)),
    region(TABLES, FIRMWARE_DATA, Rights::new(false, false, false)),
    region(
        FIRMWARE_DATA,
        FIRMWARE_DATA + 2 * PAGE,
        Rights::new(false, true, false),
    ),
    region(
        TRAP_STACK_TOP - 2 * PAGE,
        TRAP_STACK_TOP,
        Rights::new(false, true, false),
    ),
    region(
        ABORT_STACK_TOP - PAGE,
        ABORT_STACK_TOP,
        Rights::new(false, true, false),
    ),
    region(TEXT, RODATA, Rights::new(true, false, true)),
    region(RODATA, DATA, Rights::new(true, false, false)),
    region(DATA, DATA_END, Rights::new(true, true, false)),
    region(STACK_BOTTOM, STACK_TOP, Rights::new(true, true, false)),
    region(RAM, RAM_END, Rights::new(true, true, false)),
    region(DEVICES, APICS, Rights::device(true)),
    region(APICS, HIGH_DEVICES, Rights::device(false)),
    region(HIGH_DEVICES, DEVICES_END, Rights::device(true)),
];

/// The rights at an address, or `None` where nothing is mapped.
pub const fn rights(address: u64) -> Option<Rights> {
    let mut i = 0;
    while i < REGIONS.len() {
        if address >= REGIONS[i].start && address < REGIONS[i].end {
            return Some(REGIONS[i].rights);
        }
        i += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_ascend_without_overlap_and_start_and_end_on_pages() {
        let mut last = PAGE;
        for r in REGIONS {
            assert!(r.start >= last && r.end > r.start, "{r:x?}");
            assert_eq!((r.start % PAGE, r.end % PAGE), (0, 0), "{r:x?}");
            last = r.end;
        }
        assert_eq!(last, DEVICES_END);
    }

    #[test]
    fn no_region_is_writable_and_executable() {
        assert!(
            REGIONS
                .iter()
                .all(|r| !(r.rights.write && r.rights.execute))
        );
    }

    #[test]
    fn page_zero_and_the_page_below_every_stack_are_unmapped() {
        for guard in [
            0,
            TRAP_STACK_TOP - 3 * PAGE,
            ABORT_STACK_TOP - 2 * PAGE,
            STACK_BOTTOM - PAGE,
        ] {
            assert_eq!(rights(guard), None, "{guard:#x}");
            assert_eq!(rights(guard + PAGE - 1), None, "{guard:#x}");
        }
        assert_eq!(rights(STACK_TOP), None);
    }

    #[test]
    fn firmware_and_interrupt_controllers_are_closed_to_ring_3() {
        for address in [
            STUBS,
            TABLES,
            IDT,
            TSS,
            GDT,
            TRAP_STACK_TOP - 8,
            0xfec0_0000,
            0xfee0_0000,
        ] {
            assert!(rights(address).is_some_and(|r| !r.user), "{address:#x}");
        }
    }
}
