//! The self-test in ring 3: one line per check, a summary, and an exit code.
//!
//! The protections are proven by breaking each: the access must fault with exactly the expected
//! vector and error code, and ring 0 then resumes the test.

use core::arch::asm;
use core::hint::black_box;
use core::ptr;

use sluice_firmware::layout;
use sluice_firmware::ring0::exit_code;
use sluice_guest::memory::Memory;
use sluice_guest::report::Line;

use super::{exercise, platform};

const INVALID_OPCODE: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;
/// Error code bits of a page fault: page present, write, from ring 3, instruction fetch.
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const FETCH: u64 = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct Outcome {
    vector: u64,
    error: u64,
}

unsafe extern "C" {
    /// `probe.s`: runs `action(argument)` and says what became of it.
    safe fn probe(action: extern "C" fn(u64), argument: u64) -> Outcome;
}

/// Something forbidden, and the fault it must end in.
struct Forbidden {
    name: &'static str,
    action: extern "C" fn(u64),
    argument: u64,
    expected: fn(&Outcome, u64) -> bool,
    error: u64,
}

static READ_ONLY: u64 = 7;
static mut WRITABLE: [u8; 16] = [0xc3; 16];

/// Runs everything and ends the machine.
pub(crate) fn run(memory_start: usize, memory_end: usize) -> ! {
    let mut failed = 0u32;
    let mut passed = 0u32;
    let mut count = |ok: bool| if ok { passed += 1 } else { failed += 1 };
    for check in &forbidden() {
        count(faults(check));
    }
    for (name, check) in ORDINARY {
        count(holds(name, check()));
    }
    count(holds(
        "packet_memory_is_zero",
        is_zero(memory_start, memory_end),
    ));
    // SAFETY: RAM above the image, found zeroed, and nobody uses it after the self-test.
    let mut memory = unsafe { Memory::new(memory_start, memory_end) };
    count(holds(
        "ring_carries_chains",
        exercise::ring_carries_chains(&mut memory),
    ));
    count(holds(
        "tables_answer_for_the_gateway",
        exercise::tables_answer_for_the_gateway(memory),
    ));
    let mut line = Line::new("selftest")
        .text("check", "summary")
        .number("passed", passed);
    line = line.number("failed", failed).flag("ok", failed == 0);
    platform::report(line.finish());
    platform::exit(if failed == 0 {
        exit_code::DONE
    } else {
        exit_code::SELFTEST_FAILED
    })
}

fn faults(check: &Forbidden) -> bool {
    let outcome = probe(check.action, check.argument);
    let ok = (check.expected)(&outcome, check.error);
    let mut line = Line::new("selftest")
        .text("check", check.name)
        .flag("ok", ok);
    if !ok {
        line = line
            .number("vector", outcome.vector)
            .number("error", outcome.error);
    }
    platform::report(line.finish());
    ok
}

fn holds(name: &str, ok: bool) -> bool {
    platform::report(
        Line::new("selftest")
            .text("check", name)
            .flag("ok", ok)
            .finish(),
    );
    ok
}

fn forbidden() -> [Forbidden; 20] {
    let page = |name, action, argument, error| {
        let expected = page_fault;
        Forbidden {
            name,
            action,
            argument,
            expected,
            error,
        }
    };
    let other = |name, action, expected| Forbidden {
        name,
        action,
        argument: 0,
        expected,
        error: 0,
    };
    let privileged = |name, action| other(name, action, general_protection);
    let data = ptr::addr_of!(WRITABLE) as u64;
    let constant = &raw const READ_ONLY as u64;
    [
        page(
            "text_is_not_writable",
            write,
            layout::TEXT,
            PRESENT | WRITE | USER,
        ),
        page(
            "rodata_is_not_writable",
            write,
            constant,
            PRESENT | WRITE | USER,
        ),
        page(
            "low_memory_is_not_writable",
            write,
            0x1000,
            PRESENT | WRITE | USER,
        ),
        page(
            "data_is_not_executable",
            execute,
            data,
            PRESENT | USER | FETCH,
        ),
        page(
            "stack_is_not_executable",
            execute,
            layout::STACK_TOP - 64,
            PRESENT | USER | FETCH,
        ),
        page(
            "packet_memory_is_not_executable",
            execute,
            layout::RAM,
            PRESENT | USER | FETCH,
        ),
        page("page_zero_is_not_mapped", read, 8, USER),
        page("stack_overflow_is_caught", overflow, 0, USER | WRITE),
        page(
            "firmware_text_is_closed",
            execute,
            layout::STUBS,
            PRESENT | USER | FETCH,
        ),
        page(
            "firmware_data_is_closed",
            read,
            layout::FIRMWARE_DATA,
            PRESENT | USER,
        ),
        page(
            "page_tables_are_closed",
            read,
            layout::TABLES,
            PRESENT | USER,
        ),
        page(
            "interrupt_controller_is_closed",
            read,
            layout::APICS,
            PRESENT | USER,
        ),
        page(
            "memory_above_4_gib_is_not_mapped",
            read,
            layout::DEVICES_END,
            USER,
        ),
        privileged("cli_is_privileged", cli),
        privileged("hlt_is_privileged", hlt),
        privileged("out_is_privileged", out),
        privileged("mov_cr3_is_privileged", mov_cr3),
        privileged("wrmsr_is_privileged", wrmsr),
        privileged("lidt_is_privileged", lidt),
        other("other_gates_are_closed", gate, closed_gate),
    ]
}

fn page_fault(outcome: &Outcome, error: u64) -> bool {
    outcome.vector == PAGE_FAULT && outcome.error == error
}

fn general_protection(outcome: &Outcome, error: u64) -> bool {
    outcome.vector == GENERAL_PROTECTION && outcome.error == error
}

/// The error code names the gate (QEMU before 8 computes it wrongly); a software KVM that cannot
/// deliver software interrupts says invalid opcode instead.
fn closed_gate(outcome: &Outcome, _: u64) -> bool {
    const NAMES_A_GATE: u64 = 2;
    match outcome.vector {
        GENERAL_PROTECTION => outcome.error & NAMES_A_GATE != 0,
        vector => vector == INVALID_OPCODE,
    }
}

extern "C" fn write(address: u64) {
    // SAFETY: meant to fault; if the page were writable, the machine ends right after.
    unsafe {
        ptr::write_volatile(
            ptr::with_exposed_provenance_mut::<u8>(address as usize),
            0x90,
        );
    }
}

extern "C" fn read(address: u64) {
    platform::touch(address);
}

extern "C" fn execute(address: u64) {
    // SAFETY: meant to fault at the first fetch; WRITABLE holds `ret` in case it does not.
    unsafe { asm!("call {}", in(reg) address, clobber_abi("C")) }
}

extern "C" fn overflow(depth: u64) {
    let frame = black_box([depth; 64]);
    if depth < u64::MAX {
        overflow(black_box(depth + 1));
    }
    black_box(frame);
}

extern "C" fn cli(_: u64) {
    // SAFETY: meant to fault; interrupts are off anyway.
    unsafe { asm!("cli") }
}

extern "C" fn hlt(_: u64) {
    // SAFETY: meant to fault.
    unsafe { asm!("hlt") }
}

extern "C" fn out(_: u64) {
    // SAFETY: meant to fault; port 0x80 is nobody's.
    unsafe { asm!("out 0x80, al") }
}

extern "C" fn mov_cr3(_: u64) {
    // SAFETY: meant to fault.
    unsafe { asm!("mov cr3, {}", in(reg) 0u64) }
}

extern "C" fn wrmsr(_: u64) {
    // SAFETY: meant to fault; it would set the TSC.
    unsafe { asm!("wrmsr", in("ecx") 0x10, in("eax") 0, in("edx") 0) }
}

extern "C" fn lidt(_: u64) {
    // SAFETY: meant to fault before it reads its operand.
    unsafe { asm!("lidt [{}]", in(reg) &raw const READ_ONLY) }
}

extern "C" fn gate(_: u64) {
    // SAFETY: meant to fault: the timer's gate is not open to ring 3.
    unsafe { asm!("int 0x21") }
}

/// Something that must simply be so.
type Check = fn() -> bool;

const ORDINARY: [(&str, Check); 4] = [
    ("runs_in_ring_3_without_port_access", runs_in_ring_3),
    ("clock_moves_forward", clock_moves),
    ("copies_are_exact", copies_are_exact),
    ("fills_and_comparisons_are_exact", fills_are_exact),
];

/// The tables rely on memory that was never written.
fn is_zero(start: usize, end: usize) -> bool {
    let first = ptr::with_exposed_provenance::<u64>(start);
    // SAFETY: RAM above the image, page-aligned, mapped for ring 3, not yet used.
    let words = unsafe { core::slice::from_raw_parts(first, (end - start) / size_of::<u64>()) };
    words.iter().all(|word| *word == 0)
}

fn runs_in_ring_3() -> bool {
    let (cs, flags): (u64, u64);
    // SAFETY: reads two registers by way of the stack.
    unsafe { asm!("mov {}, cs", "pushfq", "pop {}", out(reg) cs, out(reg) flags) }
    cs & 3 == 3 && flags & (3 << 12) == 0
}

fn clock_moves() -> bool {
    let start = platform::tsc();
    (0..100_000).any(|_| platform::tsc() > start)
}

/// Every length up to past the last special case, every small overlap both ways.
fn copies_are_exact() -> bool {
    let fresh = || {
        let mut bytes = [0u8; 320];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (i * 7 % 251) as u8;
        }
        bytes
    };
    let original = fresh();
    for length in 0..=144usize {
        for distance in [1usize, 3, 8, 17, 40, 150] {
            for (from, to) in [(8, 8 + distance), (8 + distance, 8)] {
                let mut bytes = fresh();
                black_box(&mut bytes).copy_within(from..from + length, black_box(to));
                let exact = bytes.iter().enumerate().all(|(i, byte)| {
                    let source = if (to..to + length).contains(&i) {
                        i - to + from
                    } else {
                        i
                    };
                    original.get(source) == Some(byte)
                });
                if !exact {
                    return false;
                }
            }
        }
    }
    true
}

fn fills_are_exact() -> bool {
    (0..=80usize).all(|length| {
        let mut bytes = [1u8; 96];
        if let Some(part) = bytes.get_mut(8..8 + black_box(length)) {
            part.fill(black_box(0xa5));
        }
        let mut expected = [1u8; 96];
        for byte in expected.iter_mut().skip(8).take(length) {
            *byte = black_box(0xa5);
        }
        let equal = black_box(&bytes) == black_box(&expected);
        expected[40] ^= 1;
        equal && black_box(&bytes) != black_box(&expected) && bytes[7] == 1 && bytes[95] == 1
    })
}
