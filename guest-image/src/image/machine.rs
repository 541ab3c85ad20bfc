//! The microVM as the loop needs it: its devices, its clock, its sleep.

use core::ptr;

use sluice_firmware::layout;
use sluice_guest::boot::Options;
use sluice_guest::report::Line;
use sluice_guest::run::{Device, Machine};
use sluice_guest::transport::{CONSOLE, NETWORK, Registers, Transport};

use super::clock::Clock;
use super::platform;

/// A window of device registers that ring 3 may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mmio(u64);

impl Mmio {
    /// `address` was checked with [`platform::is_device`], for all the bytes that will be used.
    pub(crate) fn new(address: u64) -> Self {
        debug_assert!(platform::is_device(address, 4));
        Self(address)
    }
}

impl Registers for Mmio {
    fn read(&self, offset: u64) -> u32 {
        let register = ptr::with_exposed_provenance::<u32>((self.0 + offset) as usize);
        // SAFETY: inside a device window (`new`), mapped uncached; device registers are not Rust
        // objects.
        unsafe { ptr::read_volatile(register) }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let register = ptr::with_exposed_provenance_mut::<u32>((self.0 + offset) as usize);
        // SAFETY: as in `read`; the devices of the contract write guest memory only through the
        // rings they are given.
        unsafe { ptr::write_volatile(register, value) }
    }
}

const PARK: u64 = 0;
const HEARTBEAT: u64 = 4;

/// Devices and clock.
#[derive(Debug)]
pub(crate) struct MicroVm {
    pub(crate) trunk: Option<Transport<Mmio>>,
    pub(crate) control: Option<Transport<Mmio>>,
    park: Option<Mmio>,
    advice: Option<u64>,
    clock: Clock,
}

impl MicroVm {
    /// Looks at every transport of the command line.
    pub(crate) fn new(options: &Options, clock: Clock) -> Self {
        let mut machine = Self {
            trunk: None,
            control: None,
            park: options.park.map(Mmio::new),
            advice: options.advice,
            clock,
        };
        for address in options.transports() {
            let Some(transport) = Transport::probe(Mmio::new(*address)) else {
                continue;
            };
            let place = match transport.device() {
                NETWORK => &mut machine.trunk,
                CONSOLE => &mut machine.control,
                _ => continue,
            };
            if place.is_none() {
                *place = Some(transport);
            }
        }
        machine
    }

    fn transports(&mut self) -> impl Iterator<Item = &mut Transport<Mmio>> {
        self.trunk.iter_mut().chain(&mut self.control)
    }
}

impl Machine for MicroVm {
    fn now(&self) -> u64 {
        self.clock.nanoseconds(platform::tsc())
    }

    fn notify(&mut self, device: Device, queue: u16) {
        let transport = match device {
            Device::Trunk => &mut self.trunk,
            Device::Control => &mut self.control,
        };
        if let Some(transport) = transport {
            transport.notify(queue);
        }
    }

    fn clear_interrupts(&mut self) {
        // A park page is woken by the events themselves; lines exist only without one.
        if self.park.is_none() {
            self.transports().for_each(Transport::acknowledge_interrupt);
        }
    }

    fn sleep(&mut self, nanoseconds: u64) {
        let microseconds = (nanoseconds / 1000).clamp(1, u64::from(u32::MAX));
        match &mut self.park {
            Some(page) => page.write(PARK, microseconds as u32),
            None => platform::wait(microseconds),
        }
    }

    fn heartbeat(&mut self) {
        if let Some(page) = &mut self.park {
            page.write(HEARTBEAT, 1);
        }
    }

    fn moves_meanwhile(&self) -> bool {
        self.advice.is_none_or(|word| platform::low_word(word) != 0)
    }
}

/// A line for whoever reads the debug port.
pub(crate) fn log(message: &str, detail: &dyn core::fmt::Debug) {
    let mut line = Line::new("log")
        .text("message", message)
        .text("detail", format_args!("{detail:?}"));
    platform::report(line.finish());
}

/// RAM above the image, if there is enough for the rings, buffers and smallest tables.
pub(crate) fn packet_memory(ram_end: u64) -> Option<(usize, usize)> {
    const LEAST: u64 = 8 << 20;
    let end = ram_end.min(layout::RAM_END);
    (end >= layout::RAM + LEAST).then_some((layout::RAM as usize, end as usize))
}
