//! Places ring 0 in an image: code from `entry.s` and `traps.s`, tables from const fns.

/// Numbers of the calls from ring 3 (`rax` at the call gate).
pub mod call {
    pub const REPORT: u32 = 0;
    pub const EXIT: u32 = 1;
    pub const WAIT: u32 = 2;
    pub const EXPECT_FAULT: u32 = 3;
}

/// What the machine ends with (port 0xf4).
pub mod exit_code {
    pub const DONE: u32 = 0x10;
    pub const SELFTEST_FAILED: u32 = 0x11;
    pub const BOOT_REFUSED: u32 = 0x12;
    pub const FAULT: u32 = 0x20;
    pub const PANIC: u32 = 0x21;
}

pub const DEBUG_PORT: u16 = 0x402;
pub const EXIT_PORT: u16 = 0xf4;
/// Longest report in one call.
pub const REPORT_LIMIT: usize = 4096;

/// Emits ring 0 into the calling crate, entering ring 3 at `$entry`, which is
/// `extern "C" fn(start_info: u64, tsc_at_entry: u64, tsc_at_ring_3: u64) -> !`.
///
/// The crate must be linked by a script that puts `.fw.stubs`, `.fw.text`, `.fw.tables`, `.fw.idt`,
/// `.fw.tss`, `.fw.gdt` and `.fw.data` where [`layout`](crate::layout) says. The assembly is found
/// beside the calling crate, so this serves this workspace only.
#[macro_export]
macro_rules! ring0 {
    ($entry:path) => {
        #[used]
        #[unsafe(link_section = ".fw.tables")]
        static PAGE_TABLES: [$crate::paging::Table; $crate::paging::TABLE_COUNT] =
            $crate::paging::build($crate::layout::TABLES);
        #[used]
        #[unsafe(link_section = ".fw.idt")]
        static IDT: [$crate::descriptors::Gate; $crate::descriptors::VECTORS] =
            $crate::descriptors::idt();
        #[used]
        #[unsafe(link_section = ".fw.tss")]
        static TSS: $crate::descriptors::Tss = $crate::descriptors::tss();
        #[used]
        #[unsafe(link_section = ".fw.gdt")]
        static GDT: [u64; 7] = $crate::descriptors::gdt();

        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../firmware/src/entry.s")),
            entry = sym $entry,
            tables = const $crate::layout::TABLES,
            gdt = const $crate::layout::GDT,
            idt = const $crate::layout::IDT,
            vectors = const $crate::descriptors::VECTORS,
            trap_stack = const $crate::layout::TRAP_STACK_TOP,
            stack_top = const $crate::layout::STACK_TOP,
            kernel_code = const $crate::descriptors::KERNEL_CODE,
            kernel_data = const $crate::descriptors::KERNEL_DATA,
            user_code = const $crate::descriptors::USER_CODE,
            user_data = const $crate::descriptors::USER_DATA,
            task = const $crate::descriptors::TASK,
            debug_port = const $crate::ring0::DEBUG_PORT,
            exit_port = const $crate::ring0::EXIT_PORT,
            code_refused = const $crate::ring0::exit_code::BOOT_REFUSED,
        );
        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../firmware/src/traps.s")),
            vectors = const $crate::descriptors::VECTORS,
            call_vector = const $crate::descriptors::CALL_VECTOR,
            timer_vector = const $crate::descriptors::TIMER_VECTOR,
            device_vector = const $crate::descriptors::DEVICE_VECTOR,
            spurious_vector = const $crate::descriptors::SPURIOUS_VECTOR,
            stack_bottom = const $crate::layout::STACK_BOTTOM,
            stack_top = const $crate::layout::STACK_TOP,
            text = const $crate::layout::TEXT,
            ram_end = const $crate::layout::RAM_END,
            low_end = const $crate::layout::LOW_END,
            report_limit = const $crate::ring0::REPORT_LIMIT,
            debug_port = const $crate::ring0::DEBUG_PORT,
            exit_port = const $crate::ring0::EXIT_PORT,
            code_fault = const $crate::ring0::exit_code::FAULT,
            call_report = const $crate::ring0::call::REPORT,
            call_exit = const $crate::ring0::call::EXIT,
            call_wait = const $crate::ring0::call::WAIT,
            call_expect = const $crate::ring0::call::EXPECT_FAULT,
        );
    };
}
