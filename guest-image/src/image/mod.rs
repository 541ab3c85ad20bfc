//! The image: ring 0's code and tables, entry at ring 3, panic handler, hand-off. Nothing else.

mod breaking;
mod clock;
mod entropy;
mod exercise;
mod machine;
mod platform;
mod selftest;

use core::panic::PanicInfo;

use sluice_appliance::session::Facts;
use sluice_appliance::{Arena, Capacity, OutOfMemory, Pipeline};
use sluice_firmware::layout;
use sluice_firmware::pvh::StartInfo;
use sluice_firmware::ring0::exit_code;
use sluice_guest::boot::{Options, SEED};
use sluice_guest::console::{self, Console};
use sluice_guest::control::Control;
use sluice_guest::features;
use sluice_guest::memory::Memory;
use sluice_guest::net::{self, Trunk};
use sluice_guest::report::Line;
use sluice_guest::run::Loop;
use sluice_guest::transport::{F_VERSION_1, Transport, Unusable};
use sluice_guest::virtqueue::Ring;

use self::clock::Clock;
use self::machine::{MicroVm, Mmio};

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
    let ram_end = info.ram_end_from(layout::LOW_END).unwrap_or(0);
    let Some((start, end)) = machine::packet_memory(ram_end) else {
        platform::refuse(&"there is too little memory above the image");
    };
    let options = Options::parse(info.command_line(), platform::is_device);
    let tsc_khz = clock::frequency_khz(options.tsc_khz);
    let clock = Clock::new(tsc_khz, tsc_at_entry);
    let machine = MicroVm::new(&options, clock);
    platform::report(
        Line::new("boot")
            .text("version", env!("CARGO_PKG_VERSION"))
            .text("image", Hex(&image_id()))
            .number("ram_mib", ram_end >> 20)
            .number("tsc_khz", tsc_khz)
            .number("entry_to_ring3_us", clock.nanoseconds(tsc_at_ring_3) / 1000)
            .number(
                "entry_to_here_us",
                clock.nanoseconds(platform::tsc()) / 1000,
            )
            .flag("trunk", machine.trunk.is_some())
            .flag("control", machine.control.is_some())
            .flag("park", options.park.is_some())
            .flag("seed", options.seed.is_some())
            .number("unknown_tokens", options.unknown)
            .finish(),
    );
    if options.selftest {
        selftest::run(start, end);
    }
    if let Some(how) = options.breaking {
        breaking::run(how);
    }
    // SAFETY: RAM above the image, as the memory map has it, mapped by ring 0 for ring 3 and in
    // nobody's use; the contract says that it is zero at boot.
    let memory = unsafe { Memory::new(start, end) };
    let facts = Facts {
        image: image_id(),
        ram_mib: (ram_end >> 20) as u32,
    };
    match appliance(machine, memory, facts, options.seed.as_ref()) {
        Ok(mut appliance) => appliance.run(),
        Err(why) => platform::refuse(&why),
    }
    platform::exit(exit_code::DONE)
}

/// Brings up what devices there are and gives the rest of the memory to the tables.
fn appliance(
    mut machine: MicroVm,
    mut memory: Memory,
    facts: Facts,
    seed: Option<&[u8; SEED]>,
) -> Result<Loop<'static, MicroVm>, OutOfMemory> {
    let trunk = machine.trunk.as_mut().and_then(|transport| {
        bring_up(
            transport,
            features::F_MRG_RXBUF,
            features::choose_features,
            &mut memory,
            |parts| {
                let Parts {
                    rings,
                    sizes,
                    features,
                    memory,
                } = parts;
                Trunk::new(rings, sizes, features, memory.pages(net::BUFFERS)?)
            },
        )
    });
    let control = machine.control.as_mut().and_then(|transport| {
        bring_up(
            transport,
            0,
            console::choose_features,
            &mut memory,
            |parts| {
                let Parts {
                    rings,
                    sizes,
                    features,
                    memory,
                } = parts;
                Console::new(rings, sizes, features, memory.pages(console::BUFFERS)?)
            },
        )
    });
    let control = control.map(|console| Control::new(console, facts));
    let mut arena = Arena::new(memory.rest());
    let capacity = Capacity::fitting(arena.left());
    let pipeline = Pipeline::new(&mut arena, capacity, entropy::seed(seed))?;
    Ok(Loop::new(machine, trunk, control, pipeline))
}

/// What a driver is made of.
struct Parts<'a> {
    rings: [&'static Ring; 2],
    sizes: [u16; 2],
    features: u64,
    memory: &'a mut Memory,
}

/// Agrees with a device of two queues and starts it. A device that cannot be used is named and left
/// alone.
fn bring_up<T>(
    transport: &mut Transport<Mmio>,
    required: u64,
    choose: impl FnOnce(u64) -> u64,
    memory: &mut Memory,
    driver: impl FnOnce(Parts<'_>) -> Option<T>,
) -> Option<T> {
    let (features, sizes) = match agree(transport, F_VERSION_1 | required, choose) {
        Ok(agreed) => agreed,
        Err(unusable) => {
            machine::log("device not usable", &(transport.device(), unusable));
            return None;
        }
    };
    let rings = [memory.ring()?, memory.ring()?];
    let driver = driver(Parts {
        rings,
        sizes,
        features,
        memory,
    })?;
    for (queue, (ring, size)) in (0u16..).zip(rings.iter().zip(sizes)) {
        transport.start_queue(queue, size, ring.areas());
    }
    transport.start();
    Some(driver)
}

/// The features, and the sizes of both rings.
fn agree(
    transport: &mut Transport<Mmio>,
    required: u64,
    choose: impl FnOnce(u64) -> u64,
) -> Result<(u64, [u16; 2]), Unusable> {
    let features = transport.negotiate(required, choose)?;
    Ok((
        features,
        [transport.queue_size(0)?, transport.queue_size(1)?],
    ))
}

unsafe extern "C" {
    static image_build_id: u8;
}

/// The SHA-1 that the linker put into the note `.note.gnu.build-id`, behind the note's header of 16
/// bytes.
fn image_id() -> [u8; 20] {
    const NOTE_HEADER: usize = 16;
    // SAFETY: the linker script places the whole note there, 36 bytes, in read-only data.
    unsafe {
        (&raw const image_build_id)
            .add(NOTE_HEADER)
            .cast::<[u8; 20]>()
            .read_unaligned()
    }
}

/// Bytes as people write hashes.
struct Hex<'a>(&'a [u8]);

impl core::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
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
