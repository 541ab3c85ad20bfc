//! Which device answers at an address, and what an access asks the vCPU to do next.
//!
//! Two buses exist, memory-mapped and port I/O; both are built once, before the guest runs, and are owned by the vCPU thread:
//! no lock is taken on an exit. Overlap is an error at construction. An access that no device fully covers reads as ones and
//! writes to nowhere, as on a real board.

use std::fmt::Debug;
use std::time::Duration;

use crate::exit::Ending;

/// What the vCPU thread does after a write, before it re-enters the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Re-enter the guest.
    Continue,
    /// Sleep until an event or, if given, the deadline; then re-enter.
    Park(Option<Duration>),
    /// The guest is alive; re-enter.
    Heartbeat,
    /// Never re-enter.
    End(Ending),
}

/// A device that answers reads and writes at offsets inside its own range.
///
/// Offset and length come from the guest: any combination inside the range may arrive.
pub trait BusDevice: Debug + Send {
    fn read(&mut self, offset: u64, bytes: &mut [u8]);
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Effect;
}

/// Two devices claim the same address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    #[error("range {start:#x}+{length:#x} overlaps {other:#x}+{other_length:#x}")]
    Overlap {
        start: u64,
        length: u64,
        other: u64,
        other_length: u64,
    },
    #[error("range {start:#x}+{length:#x} is empty or wraps")]
    BadRange { start: u64, length: u64 },
}

#[derive(Debug)]
struct Slot {
    start: u64,
    length: u64,
    device: Box<dyn BusDevice>,
}

/// Address ranges and the devices behind them.
#[derive(Debug, Default)]
pub struct Bus {
    slots: Vec<Slot>,
    unclaimed: u64,
}

impl Bus {
    /// Puts `device` at `start`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another.
    pub fn insert(
        &mut self,
        start: u64,
        length: u64,
        device: Box<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let end = match start.checked_add(length) {
            Some(end) if length > 0 => end,
            _ => return Err(BusError::BadRange { start, length }),
        };
        if let Some(slot) = self
            .slots
            .iter()
            .find(|slot| start < slot.start + slot.length && slot.start < end)
        {
            return Err(BusError::Overlap {
                start,
                length,
                other: slot.start,
                other_length: slot.length,
            });
        }
        self.slots.push(Slot {
            start,
            length,
            device,
        });
        Ok(())
    }

    /// Reads `bytes.len()` bytes at `address`; ones where nothing answers.
    pub fn read(&mut self, address: u64, bytes: &mut [u8]) {
        match self.find(address, bytes.len()) {
            Some((slot, offset)) => slot.device.read(offset, bytes),
            None => {
                bytes.fill(0xff);
                self.unclaimed += 1;
            }
        }
    }

    /// Writes `bytes` at `address`.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Effect {
        match self.find(address, bytes.len()) {
            Some((slot, offset)) => slot.device.write(offset, bytes),
            None => {
                self.unclaimed += 1;
                Effect::Continue
            }
        }
    }

    /// Accesses so far that no device answered.
    #[must_use]
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed
    }

    fn find(&mut self, address: u64, length: usize) -> Option<(&mut Slot, u64)> {
        let length = u64::try_from(length).ok()?;
        self.slots.iter_mut().find_map(|slot| {
            let offset = address.checked_sub(slot.start)?;
            let end = offset.checked_add(length)?;
            (end <= slot.length).then_some((slot, offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fixed(u8);

    impl BusDevice for Fixed {
        fn read(&mut self, offset: u64, bytes: &mut [u8]) {
            bytes.fill(self.0.wrapping_add(offset as u8));
        }
        fn write(&mut self, offset: u64, _bytes: &[u8]) -> Effect {
            Effect::Park(Some(Duration::from_micros(offset)))
        }
    }

    #[test]
    fn an_access_reaches_the_device_that_covers_it_with_its_own_offset() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, Box::new(Fixed(1))).unwrap();
        bus.insert(0x1010, 0x10, Box::new(Fixed(100))).unwrap();
        let mut byte = [0];
        bus.read(0x100f, &mut byte);
        assert_eq!(byte, [16]);
        bus.read(0x1010, &mut byte);
        assert_eq!(byte, [100]);
        assert_eq!(
            bus.write(0x1012, &[0]),
            Effect::Park(Some(Duration::from_micros(2)))
        );
        assert_eq!(bus.unclaimed(), 0);
    }

    #[test]
    fn an_access_across_the_end_of_a_range_reaches_nobody() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, Box::new(Fixed(1))).unwrap();
        bus.insert(0x1010, 0x10, Box::new(Fixed(2))).unwrap();
        let mut word = [0; 4];
        for address in [0x0ffe, 0x100e, 0x101e, 0x2000, u64::MAX, 0] {
            bus.read(address, &mut word);
            assert_eq!(word, [0xff; 4], "{address:#x}");
            assert_eq!(bus.write(address, &word), Effect::Continue);
        }
        assert_eq!(bus.unclaimed(), 12);
    }

    #[test]
    fn overlap_is_a_construction_error() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, Box::new(Fixed(1))).unwrap();
        for (start, length) in [(0x1000, 1), (0xfff, 2), (0x100f, 1), (0, 0x4000)] {
            let error = bus.insert(start, length, Box::new(Fixed(2))).unwrap_err();
            assert!(matches!(error, BusError::Overlap { other: 0x1000, .. }));
        }
        for (start, length) in [(0, 0), (u64::MAX, 2)] {
            let error = bus.insert(start, length, Box::new(Fixed(2))).unwrap_err();
            assert_eq!(error, BusError::BadRange { start, length });
        }
    }
}
