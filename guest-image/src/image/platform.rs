//! The machine as ring 3 reaches it: four calls to ring 0, the time-stamp counter, device
//! registers.
//!
//! Compiled into the image only; this file and the `.s` files are its unsafe.

use core::arch::asm;
use core::ptr;

use sluice_firmware::layout::{self, LOW_END};
use sluice_firmware::pvh::LowMemory;
use sluice_firmware::ring0::{REPORT_LIMIT, call, exit_code};
use sluice_guest::report::Line;

/// Raises the call gate. Ring 0 checks all arguments itself.
fn ring0(number: u32, first: u64, second: u64) -> u64 {
    let result;
    // SAFETY: the gate keeps the stack and every register except those named here; ring 0 reads
    // memory only for `report`, and only where ring 3 may read.
    unsafe {
        asm!(
            "int3",
            inout("rax") u64::from(number) => result,
            inout("rdi") first => _,
            inout("rsi") second => _,
            lateout("rcx") _,
            lateout("rdx") _,
            lateout("r8") _,
            lateout("r9") _,
            options(nostack),
        );
    }
    result
}

/// Writes bytes to the debug port.
pub(crate) fn report(bytes: &[u8]) {
    for part in bytes.chunks(REPORT_LIMIT) {
        ring0(call::REPORT, part.as_ptr() as u64, part.len() as u64);
    }
}

/// Like [`report`], of a byte that may not be there.
pub(crate) fn report_from(address: u64) {
    ring0(call::REPORT, address, 1);
}

/// Reads a byte that may not be there.
pub(crate) fn touch(address: u64) {
    // SAFETY: reading has no effect, or it is a fault, which ends the machine or is expected.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance::<u8>(address as usize)) };
}

/// Ends the machine.
pub(crate) fn exit(code: u32) -> ! {
    ring0(call::EXIT, u64::from(code), 0);
    // Ring 0 does not come back from this call; if a machine lets it, there is nothing else to do.
    loop {
        core::hint::spin_loop();
    }
}

/// Sleeps until an interrupt or until the microseconds are over.
pub(crate) fn wait(microseconds: u64) {
    ring0(call::WAIT, microseconds, 0);
}

/// Cycles since some moment before boot.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction and no VMM of the contract forbids it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Low memory, where the boot protocol's structures lie.
pub(crate) fn low_memory() -> LowMemory<'static> {
    // SAFETY: the page tables map this range read-only; after entry only the advice word changes, which is read by
    // `low_word` alone; the image
    // needs RAM from 0 without a hole, so it exists.
    let bytes = unsafe {
        core::slice::from_raw_parts(
            ptr::with_exposed_provenance::<u8>(LowMemory::START as usize),
            LowMemory::SIZE,
        )
    };
    debug_assert_eq!(LowMemory::START + LowMemory::SIZE as u64, LOW_END);
    LowMemory::new(bytes)
}

/// A word of low memory that the VMM changes.
pub(crate) fn low_word(address: u64) -> u32 {
    debug_assert!((LowMemory::START..LOW_END).contains(&address) && address.is_multiple_of(4));
    let word = ptr::with_exposed_provenance::<u32>(address as usize);
    // SAFETY: the page tables map low memory read-only (`low_memory`); the word is aligned, and another party changes it, hence
    // one volatile read.
    unsafe { ptr::read_volatile(word) }
}

/// Whether ring 3 may use `size` bytes at an address as device registers.
pub(crate) fn is_device(address: u64, size: u64) -> bool {
    let inside = |start: u64, end: u64| {
        address >= start && address.checked_add(size).is_some_and(|last| last <= end)
    };
    inside(layout::DEVICES, layout::APICS) || inside(layout::HIGH_DEVICES, layout::DEVICES_END)
}

/// Tells why the machine does not start, and ends it.
pub(crate) fn refuse(why: &dyn core::fmt::Debug) -> ! {
    report(
        Line::new("boot")
            .text("refused", format_args!("{why:?}"))
            .finish(),
    );
    exit(exit_code::BOOT_REFUSED)
}
