//! What every virtio device of this VMM has in common: features, queue layout, and the trait the transport drives.
//!
//! `mmio` is the transport, `net` the trunk device (its rings are served `here`, or by another process through `trunk` and `backend`),
//! `control` the console device (its rings are served here, by way of `stream`). The driver is the guest: hostile until proven otherwise.

pub mod backend;
pub mod control;
pub mod here;
pub mod mmio;
pub mod net;
pub mod stream;
pub mod trunk;

use std::fmt::Debug;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use crate::memory::GuestRam;

/// Virtio 1.0 or later; without it no driver is accepted.
pub const FEATURE_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Descriptor tables inside descriptors.
pub const FEATURE_INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Notification by index instead of by flag.
pub const FEATURE_EVENT_INDEX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// A queue as the driver configured it. Checked by [`QueueLayout::check`], and only then given to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueLayout {
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring: written by the driver.
    pub driver: u64,
    /// Used ring: written by the device.
    pub device: u64,
}

/// A driver's queue cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    #[error("the size is not a power of two up to the maximum")]
    Size,
    #[error("an address is not aligned")]
    Alignment,
    #[error("a part lies outside guest memory")]
    OutOfMemory,
    #[error("the driver started the device without it")]
    NotReady,
}

impl QueueLayout {
    /// Bytes of the descriptor table.
    #[must_use]
    pub fn descriptors_length(&self) -> u64 {
        16 * u64::from(self.size)
    }

    /// Bytes of the available ring, event index included.
    #[must_use]
    pub fn driver_length(&self) -> u64 {
        6 + 2 * u64::from(self.size)
    }

    /// Bytes of the used ring, event index included.
    #[must_use]
    pub fn device_length(&self) -> u64 {
        6 + 8 * u64::from(self.size)
    }

    /// Virtio 1.2, 2.7: a power of two, aligned, and here also wholly inside RAM.
    ///
    /// # Errors
    /// Names the first rule that is broken.
    pub fn check(&self, ram: &GuestRam, max_size: u16) -> Result<(), QueueError> {
        if !self.size.is_power_of_two() || self.size > max_size {
            return Err(QueueError::Size);
        }
        let parts = [
            (self.descriptors, self.descriptors_length(), 16),
            (self.driver, self.driver_length(), 2),
            (self.device, self.device_length(), 4),
        ];
        for (address, length, alignment) in parts {
            if address % alignment != 0 {
                return Err(QueueError::Alignment);
            }
            if ram.host_address(address, length).is_err() {
                return Err(QueueError::OutOfMemory);
            }
        }
        Ok(())
    }
}

/// A device behind the transport. All calls come from the vCPU thread.
pub trait Device: Debug + Send {
    /// Virtio device id.
    fn id(&self) -> u32;

    /// Everything the driver may choose from.
    fn features(&self) -> u64;

    /// Largest size of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Device configuration at `offset`; zero where there is none.
    fn read_config(&self, offset: u64, bytes: &mut [u8]);

    /// The driver is ready. All queues are configured and checked, `features` is a subset of what was offered.
    fn activate(&mut self, features: u64, queues: &[QueueLayout]);

    /// The driver takes everything back: when this returns, no queue of the last activation is touched any more.
    fn reset(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_must_be_a_power_of_two_aligned_and_inside_memory() {
        let ram = GuestRam::create(4 << 20, false).unwrap();
        let good = QueueLayout {
            size: 256,
            descriptors: 0x20_0000,
            driver: 0x20_1000,
            device: 0x20_2000,
        };
        assert_eq!(good.check(&ram, 256), Ok(()));
        let end = 4 << 20;
        let table = [
            (QueueLayout { size: 0, ..good }, QueueError::Size),
            (QueueLayout { size: 255, ..good }, QueueError::Size),
            (QueueLayout { size: 512, ..good }, QueueError::Size),
            (
                QueueLayout {
                    descriptors: 0x20_0008,
                    ..good
                },
                QueueError::Alignment,
            ),
            (
                QueueLayout {
                    driver: 0x20_1001,
                    ..good
                },
                QueueError::Alignment,
            ),
            (
                QueueLayout {
                    device: 0x20_2002,
                    ..good
                },
                QueueError::Alignment,
            ),
            (
                QueueLayout {
                    descriptors: end - 16,
                    ..good
                },
                QueueError::OutOfMemory,
            ),
            (
                QueueLayout {
                    driver: end - 16,
                    ..good
                },
                QueueError::OutOfMemory,
            ),
            (
                QueueLayout {
                    device: u64::MAX - 3,
                    ..good
                },
                QueueError::OutOfMemory,
            ),
        ];
        for (layout, error) in table {
            assert_eq!(layout.check(&ram, 256), Err(error), "{layout:?}");
        }
        let last = QueueLayout {
            device: end - good.device_length() - 2,
            ..good
        };
        assert_eq!(
            last.check(&ram, 256),
            Ok(()),
            "the end of memory may be used"
        );
    }
}
