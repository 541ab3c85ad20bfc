//! virtio over MMIO, version 2 (virtio 1.2, 4.2): finding a device, agreeing on features, handing
//! over rings.

use crate::virtqueue::{Areas, QUEUE_SIZE};

const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE_NOW: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_AVAILABLE: u64 = 0x090;
const QUEUE_USED: u64 = 0x0a0;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const FAILED: u32 = 128;

/// Features of the transport and the rings.
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

/// Device ids.
pub const NETWORK: u32 = 1;
pub const CONSOLE: u32 = 3;

/// A window of 32-bit device registers.
pub trait Registers {
    fn read(&self, offset: u64) -> u32;
    fn write(&mut self, offset: u64, value: u32);
}

/// Why a device cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// It does not come out of reset.
    Reset,
    /// It lacks features that the driver cannot do without (the missing bits).
    Features(u64),
    /// It took back its own features.
    FeaturesRefused,
    /// This queue does not exist, or is in use.
    Queue(u16),
}

/// A transport with a device of a known kind behind it.
#[derive(Debug)]
pub struct Transport<R> {
    registers: R,
    device: u32,
}

impl<R: Registers> Transport<R> {
    /// The device behind the window, or `None` if there is none that this driver speaks to.
    pub fn probe(registers: R) -> Option<Self> {
        let is_transport = registers.read(MAGIC_VALUE) == MAGIC && registers.read(VERSION) == 2;
        let device = if is_transport {
            registers.read(DEVICE_ID)
        } else {
            0
        };
        (device != 0).then_some(Self { registers, device })
    }

    pub fn device(&self) -> u32 {
        self.device
    }

    /// Resets the device and agrees on features: all of `required`, and what `choose` wants of the
    /// offered.
    ///
    /// # Errors
    /// [`Unusable`]; the device is told that the driver gave up.
    pub fn negotiate(
        &mut self,
        required: u64,
        choose: impl FnOnce(u64) -> u64,
    ) -> Result<u64, Unusable> {
        self.registers.write(STATUS, 0);
        let is_reset = (0..1000).any(|_| self.registers.read(STATUS) == 0);
        if !is_reset {
            return Err(Unusable::Reset);
        }
        self.registers.write(STATUS, ACKNOWLEDGE | DRIVER);
        let offered = self.offered();
        if offered & required != required {
            return Err(self.give_up(Unusable::Features(required & !offered)));
        }
        let chosen = required | choose(offered) & offered;
        for (select, half) in [(0, chosen), (1, chosen >> 32)] {
            self.registers.write(DRIVER_FEATURES_SELECT, select);
            self.registers
                .write(DRIVER_FEATURES, (half & 0xffff_ffff) as u32);
        }
        self.registers
            .write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.registers.read(STATUS) & FEATURES_OK == 0 {
            return Err(self.give_up(Unusable::FeaturesRefused));
        }
        Ok(chosen)
    }

    /// How long the ring of a queue will be: the largest power of two that both sides can.
    ///
    /// # Errors
    /// [`Unusable::Queue`].
    pub fn queue_size(&mut self, queue: u16) -> Result<u16, Unusable> {
        self.registers.write(QUEUE_SELECT, u32::from(queue));
        let largest = self.registers.read(QUEUE_SIZE_MAX).min(QUEUE_SIZE as u32);
        if largest == 0 || self.registers.read(QUEUE_READY) != 0 {
            return Err(self.give_up(Unusable::Queue(queue)));
        }
        Ok(1 << largest.ilog2())
    }

    /// Hands the queue's memory to the device.
    pub fn start_queue(&mut self, queue: u16, size: u16, areas: Areas) {
        self.registers.write(QUEUE_SELECT, u32::from(queue));
        self.registers.write(QUEUE_SIZE_NOW, u32::from(size));
        for (offset, address) in [
            (QUEUE_DESCRIPTORS, areas.descriptors),
            (QUEUE_AVAILABLE, areas.available),
            (QUEUE_USED, areas.used),
        ] {
            self.registers.write(offset, (address & 0xffff_ffff) as u32);
            self.registers.write(offset + 4, (address >> 32) as u32);
        }
        self.registers.write(QUEUE_READY, 1);
    }

    /// The driver is ready; the device may use the queues.
    pub fn start(&mut self) {
        self.registers
            .write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Tells the device that a queue has something new.
    pub fn notify(&mut self, queue: u16) {
        self.registers.write(QUEUE_NOTIFY, u32::from(queue));
    }

    /// Takes back the interrupt, so that the next event raises a new edge.
    pub fn acknowledge_interrupt(&mut self) {
        let status = self.registers.read(INTERRUPT_STATUS);
        if status != 0 {
            self.registers.write(INTERRUPT_ACK, status);
        }
    }

    fn offered(&mut self) -> u64 {
        [1, 0].into_iter().fold(0, |features, select| {
            self.registers.write(DEVICE_FEATURES_SELECT, select);
            features << 32 | u64::from(self.registers.read(DEVICE_FEATURES))
        })
    }

    fn give_up(&mut self, why: Unusable) -> Unusable {
        self.registers.write(STATUS, FAILED);
        why
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// A register file that answers like a device with two queues.
    struct Fake {
        features: u64,
        accepts: bool,
        resets: bool,
        largest: u32,
        written: BTreeMap<u64, u32>,
        log: Vec<(u64, u32)>,
        reads: Cell<u32>,
    }

    impl Fake {
        fn new(features: u64) -> Self {
            let (written, log) = (BTreeMap::new(), Vec::new());
            let reads = Cell::new(0);
            Self {
                features,
                accepts: true,
                resets: true,
                largest: 1000,
                written,
                log,
                reads,
            }
        }

        fn at(&self, offset: u64) -> u32 {
            self.written.get(&offset).copied().unwrap_or(0)
        }
    }

    impl Registers for Fake {
        fn read(&self, offset: u64) -> u32 {
            self.reads.set(self.reads.get() + 1);
            match offset {
                MAGIC_VALUE => MAGIC,
                VERSION => 2,
                DEVICE_ID => NETWORK,
                DEVICE_FEATURES => (self.features >> (32 * self.at(DEVICE_FEATURES_SELECT))) as u32,
                QUEUE_SIZE_MAX if self.at(QUEUE_SELECT) < 2 => self.largest,
                STATUS if !self.resets => 0xff,
                STATUS if !self.accepts => self.at(STATUS) & !FEATURES_OK,
                STATUS => self.at(STATUS),
                _ => 0,
            }
        }

        fn write(&mut self, offset: u64, value: u32) {
            self.written.insert(offset, value);
            self.log.push((offset, value));
        }
    }

    #[test]
    fn a_device_is_brought_up_in_the_order_of_the_specification() {
        let mut transport = Transport::probe(Fake::new(F_VERSION_1 | F_EVENT_IDX | 1)).unwrap();
        let chosen = transport
            .negotiate(F_VERSION_1, |_| F_EVENT_IDX | 2)
            .unwrap();
        assert_eq!(
            chosen,
            F_VERSION_1 | F_EVENT_IDX,
            "never what is not offered"
        );
        let size = transport.queue_size(1).unwrap();
        assert_eq!(usize::from(size), QUEUE_SIZE);
        let areas = Areas {
            descriptors: 0x1_2345_6000,
            available: 0x7000,
            used: 0x8000,
        };
        transport.start_queue(1, size, areas);
        transport.start();
        let fake = &transport.registers;
        assert_eq!(
            (fake.at(QUEUE_DESCRIPTORS), fake.at(QUEUE_DESCRIPTORS + 4)),
            (0x2345_6000, 1)
        );
        assert_eq!(fake.at(STATUS), 15);
        let at = |wanted: (u64, u32)| fake.log.iter().position(|entry| *entry == wanted).unwrap();
        assert!(at((STATUS, 0)) < at((STATUS, 3)));
        assert!(at((STATUS, 3)) < at((STATUS, 11)));
        assert!(at((STATUS, 11)) < at((QUEUE_READY, 1)));
        assert!(at((QUEUE_READY, 1)) < at((STATUS, 15)));
    }

    #[test]
    fn every_refusal_has_its_name_and_tells_the_device() {
        let usable = || Fake::new(F_VERSION_1);
        let negotiate = |fake: Fake, required| {
            let mut transport = Transport::probe(fake).unwrap();
            (
                transport.negotiate(required, |_| 0),
                transport.registers.at(STATUS),
            )
        };
        let missing = negotiate(usable(), F_VERSION_1 | 4);
        assert_eq!(missing, (Err(Unusable::Features(4)), FAILED));
        let refused = negotiate(
            Fake {
                accepts: false,
                ..usable()
            },
            F_VERSION_1,
        );
        assert_eq!(refused, (Err(Unusable::FeaturesRefused), FAILED));
        let (stuck, _) = negotiate(
            Fake {
                resets: false,
                ..usable()
            },
            F_VERSION_1,
        );
        assert_eq!(stuck, Err(Unusable::Reset));
        let mut transport = Transport::probe(usable()).unwrap();
        assert_eq!(transport.queue_size(2), Err(Unusable::Queue(2)));
    }

    #[test]
    fn a_ring_is_the_largest_power_of_two_both_can() {
        for (largest, size) in [
            (1, 1),
            (2, 2),
            (100, 64),
            (256, 256),
            (1024, QUEUE_SIZE as u16),
        ] {
            let fake = Fake {
                largest,
                ..Fake::new(F_VERSION_1)
            };
            assert_eq!(Transport::probe(fake).unwrap().queue_size(0), Ok(size));
        }
    }
}
