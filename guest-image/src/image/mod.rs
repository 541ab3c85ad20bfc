//! The image: ring 0's code and tables, entry at ring 3, panic handler, hand-off. Nothing else.

mod clock;
mod platform;
mod selftest;

use core::panic::PanicInfo;

use sluice_firmware::layout;
use sluice_firmware::pvh::StartInfo;
use sluice_firmware::ring0::exit_code;
use sluice_guest::boot::Options;
use sluice_guest::report::Line;

sluice_firmware::ring0!(ring_3);
core::arch::global_asm!(include_str!("bytes.s"));
core::arch::global_asm!(
    include_str!("probe.s"),
    call_expect = const sluice_firmware::ring0::call::EXPECT_FAULT,
);

/// Where ring 0 leaves for good.
extern "C" fn ring_3(start_info: u64, tsc_at_entry: u64, tsc_at_ring_3: u64) -> ! {
    let info = match StartInfo::read(platform::low_memory(), start_info) {
        Ok(info) => info,
        Err(refusal) => platform::refuse(&refusal),
    };
    let Some(ram_end) = info.ram_end_from(0x20_0000) else {
        platform::refuse(&"the image does not lie in RAM");
    };
    let options = Options::parse(info.command_line(), platform::is_device);
    let tsc_khz = clock::frequency_khz(options.tsc_khz);
    platform::report(
        Line::new("boot")
            .text("version", env!("CARGO_PKG_VERSION"))
            .number("ram_mib", ram_end >> 20)
            .number("tsc_khz", tsc_khz)
            .number(
                "entry_to_ring3_us",
                (tsc_at_ring_3 - tsc_at_entry) * 1000 / tsc_khz,
            )
            .number(
                "ring3_to_here_us",
                (platform::tsc() - tsc_at_ring_3) * 1000 / tsc_khz,
            )
            .number("transports", options.transports().len() as u32)
            .flag("park", options.park.is_some())
            .number("unknown_tokens", options.unknown)
            .finish(),
    );
    if ram_end < layout::RAM + layout::LARGE_PAGE {
        platform::refuse(&"too little memory");
    }
    if options.selftest {
        selftest::run();
    }
    platform::exit(exit_code::DONE)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line) = info.location().map_or(("", 0), |l| (l.file(), l.line()));
    let mut text = Line::new("panic")
        .text("file", file)
        .number("line", line)
        .text("message", info.message());
    platform::report(text.finish());
    platform::exit(exit_code::PANIC)
}

/// Debug builds of `core` name it; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
