//! The virtio-mmio (version 2) transport: registers as a state machine.
//!
//! The driver may write anything at any time. Rules, virtio 1.2 sections 3.1 and 4.2:
//!
//! * R1 status bits are only added, in the order acknowledge, driver, features-ok, driver-ok; zero resets from any state;
//! * R2 features are chosen between "driver" and "features-ok", which is refused unless they are a subset of the offer with
//!   `VERSION_1`;
//! * R3 queues are configured between "features-ok" and "driver-ok", and a ready queue is frozen;
//! * R4 "driver-ok" starts the device only if every queue is ready and valid; otherwise the device asks for a reset.
//!
//! What breaks a rule is ignored. There is no interrupt line: the image polls, and a parked vCPU is woken by eventfd, so
//! `InterruptStatus` is always zero. Notifications are ioeventfds; one that arrives here is for a queue that does not exist.

use std::ops::RangeInclusive;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER as DRIVER;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FAILED as FAILED;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET;

use crate::bus::BusDevice;
use crate::bus::Effect;
use crate::memory::GuestRam;
use crate::virtio::Device;
use crate::virtio::FEATURE_VERSION_1;
use crate::virtio::QueueError;
use crate::virtio::QueueLayout;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"Slce");
const STEPS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

const MAGIC_VALUE: u64 = 0x000;
const VERSION_NUMBER: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Where the driver writes a queue's number to say "new buffers".
pub const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const SHARED_MEMORY: RangeInclusive<u64> = 0x0b0..=0x0bc;
const CONFIG: u64 = 0x100;

#[derive(Debug, Clone, Copy, Default)]
struct QueueState {
    layout: QueueLayout,
    ready: bool,
}

/// The registers of one device.
#[derive(Debug)]
pub struct Transport {
    device: Box<dyn Device>,
    ram: Arc<GuestRam>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueState>,
}

impl Transport {
    /// The registers of `device` in reset state.
    #[must_use]
    pub fn new(device: Box<dyn Device>, ram: Arc<GuestRam>) -> Transport {
        let queues = vec![QueueState::default(); device.queue_sizes().len()];
        Transport {
            device,
            ram,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION_NUMBER => VERSION,
            DEVICE_ID => self.device.id(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.device.features(), self.device_features_select),
            QUEUE_SIZE_MAX => self.selected_max().into(),
            QUEUE_READY => self.selected().is_some_and(|queue| queue.ready).into(),
            STATUS => self.status,
            // No shared memory regions: length and base read as all ones (4.2.2.1).
            offset if SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SELECT => self.device_features_select = value,
            DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            DRIVER_FEATURES if self.may_choose_features() => {
                set_half(
                    &mut self.driver_features,
                    self.driver_features_select,
                    value,
                );
            }
            QUEUE_SELECT => self.queue_select = value,
            STATUS => self.set_status(value),
            _ => self.set_queue_register(offset, value),
        }
    }

    fn set_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.configurable_queue() else {
            return;
        };
        if offset == QUEUE_READY {
            queue.ready = value & 1 == 1;
            return;
        }
        if queue.ready {
            return; // R3
        }
        let layout = &mut queue.layout;
        match offset {
            // A size beyond 16 bit is no size; zero is refused when the device starts.
            QUEUE_SIZE => layout.size = u16::try_from(value).unwrap_or(0),
            QUEUE_DESCRIPTORS_LOW => set_half(&mut layout.descriptors, 0, value),
            QUEUE_DESCRIPTORS_HIGH => set_half(&mut layout.descriptors, 1, value),
            QUEUE_DRIVER_LOW => set_half(&mut layout.driver, 0, value),
            QUEUE_DRIVER_HIGH => set_half(&mut layout.driver, 1, value),
            QUEUE_DEVICE_LOW => set_half(&mut layout.device, 0, value),
            QUEUE_DEVICE_HIGH => set_half(&mut layout.device, 1, value),
            _ => {}
        }
    }

    fn selected_index(&self) -> usize {
        usize::try_from(self.queue_select).unwrap_or(usize::MAX)
    }

    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(self.selected_index())
    }

    fn selected_max(&self) -> u16 {
        self.device
            .queue_sizes()
            .get(self.selected_index())
            .copied()
            .unwrap_or(0)
    }

    /// The selected queue, while rule R3 lets the driver touch it.
    fn configurable_queue(&mut self) -> Option<&mut QueueState> {
        let stage = self.status & (FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET);
        let index = self.selected_index();
        if stage == FEATURES_OK {
            self.queues.get_mut(index)
        } else {
            None
        }
    }

    fn may_choose_features(&self) -> bool {
        self.status & (DRIVER | FEATURES_OK | FAILED | NEEDS_RESET) == DRIVER // R2
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // R1: the driver repeats what it has set and adds the next step. `NEEDS_RESET` is ours, not the driver's.
        let old = self.status & !NEEDS_RESET;
        if value & old != old {
            return;
        }
        let added = value & !self.status;
        match (old, added) {
            (0, ACKNOWLEDGE) | (ACKNOWLEDGE, DRIVER) => self.status |= added,
            // Some drivers write the first two at once.
            (0, both) if both == ACKNOWLEDGE | DRIVER => self.status |= both,
            (steps, FEATURES_OK)
                if steps == ACKNOWLEDGE | DRIVER && self.features_are_acceptable() =>
            {
                self.status |= FEATURES_OK;
            }
            (STEPS, DRIVER_OK) => self.start(),
            (_, FAILED) => self.status |= FAILED,
            _ => {}
        }
    }

    fn features_are_acceptable(&self) -> bool {
        self.driver_features & !self.device.features() == 0
            && self.driver_features & FEATURE_VERSION_1 != 0
    }

    fn start(&mut self) {
        if self.status & NEEDS_RESET != 0 {
            return;
        }
        if let Some((index, error)) = self.first_bad_queue() {
            // Once per reset at most, and a reset costs the guest an exit: no flood.
            tracing::debug!(device = self.device.id(), queue = index, %error, "bad queue");
            self.status |= NEEDS_RESET; // R4
            return;
        }
        self.status |= DRIVER_OK;
        let layouts: Vec<QueueLayout> = self.queues.iter().map(|queue| queue.layout).collect();
        self.device.activate(self.driver_features, &layouts);
    }

    fn first_bad_queue(&self) -> Option<(usize, QueueError)> {
        let sizes = self.device.queue_sizes();
        self.queues
            .iter()
            .zip(sizes)
            .enumerate()
            .find_map(|(index, (queue, max_size))| {
                if !queue.ready {
                    return Some((index, QueueError::NotReady));
                }
                let error = queue.layout.check(&self.ram, *max_size).err()?;
                Some((index, error))
            })
    }

    fn reset(&mut self) {
        if self.status & DRIVER_OK != 0 {
            self.device.reset();
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues.fill(QueueState::default());
    }
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, bytes);
        } else if offset.is_multiple_of(4)
            && let Ok(word) = <&mut [u8; 4]>::try_from(bytes)
        {
            *word = self.register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Effect {
        // No device here has a configuration field that a driver may write.
        if offset < CONFIG
            && offset.is_multiple_of(4)
            && let Ok(word) = <[u8; 4]>::try_from(bytes)
        {
            self.set_register(offset, u32::from_le_bytes(word));
        }
        Effect::Continue
    }
}

fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, word: u32) {
    match select {
        0 => *value = (*value & !u64::from(u32::MAX)) | u64::from(word),
        1 => *value = (*value & u64::from(u32::MAX)) | (u64::from(word) << 32),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    const RAM: u64 = 4 << 20;
    const OFFER: u64 = FEATURE_VERSION_1 | 0b1010;
    const SIZES: [u16; 2] = [256, 64];

    #[derive(Debug, Default)]
    struct Seen {
        active: Option<(u64, Vec<QueueLayout>)>,
        activations: usize,
    }

    #[derive(Debug)]
    struct Fake(Arc<Mutex<Seen>>, Arc<GuestRam>);

    impl Device for Fake {
        fn id(&self) -> u32 {
            42
        }
        fn features(&self) -> u64 {
            OFFER
        }
        fn queue_sizes(&self) -> &[u16] {
            &SIZES
        }
        fn read_config(&self, offset: u64, bytes: &mut [u8]) {
            bytes.fill(offset as u8);
        }
        fn activate(&mut self, features: u64, queues: &[QueueLayout]) {
            let mut seen = self.0.lock().unwrap();
            assert!(seen.active.is_none(), "activated twice");
            assert_eq!(features & !OFFER, 0);
            assert_ne!(features & FEATURE_VERSION_1, 0);
            for (queue, size) in queues.iter().zip(SIZES) {
                queue.check(&self.1, size).unwrap();
            }
            seen.active = Some((features, queues.to_vec()));
            seen.activations += 1;
        }
        fn reset(&mut self) {
            assert!(
                self.0.lock().unwrap().active.take().is_some(),
                "reset while not active"
            );
        }
    }

    fn transport() -> (Transport, Arc<Mutex<Seen>>) {
        let ram = Arc::new(GuestRam::create(RAM, false).unwrap());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let device = Fake(Arc::clone(&seen), Arc::clone(&ram));
        (Transport::new(Box::new(device), ram), seen)
    }

    fn get(transport: &mut Transport, offset: u64) -> u32 {
        let mut word = [0xaa; 4];
        transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(transport: &mut Transport, offset: u64, value: u32) {
        assert_eq!(
            transport.write(offset, &value.to_le_bytes()),
            Effect::Continue
        );
    }

    /// What a well-behaved driver writes, step by step.
    fn negotiation() -> Vec<(u64, u32)> {
        let mut writes = vec![
            (STATUS, 0),
            (STATUS, ACKNOWLEDGE),
            (STATUS, ACKNOWLEDGE | DRIVER),
            (DRIVER_FEATURES_SELECT, 0),
            (DRIVER_FEATURES, 0b10),
            (DRIVER_FEATURES_SELECT, 1),
            (DRIVER_FEATURES, 1),
            (STATUS, STEPS),
        ];
        for index in 0..2 {
            let base = 0x20_0000 + index * 0x1_0000;
            writes.extend([
                (QUEUE_SELECT, index),
                (QUEUE_SIZE, 64),
                (QUEUE_DESCRIPTORS_LOW, base),
                (QUEUE_DESCRIPTORS_HIGH, 0),
                (QUEUE_DRIVER_LOW, base + 0x4000),
                (QUEUE_DRIVER_HIGH, 0),
                (QUEUE_DEVICE_LOW, base + 0x8000),
                (QUEUE_DEVICE_HIGH, 0),
                (QUEUE_READY, 1),
            ]);
        }
        writes.push((STATUS, STEPS | DRIVER_OK));
        writes
    }

    fn run(transport: &mut Transport, writes: &[(u64, u32)]) {
        for (offset, value) in writes {
            set(transport, *offset, *value);
        }
    }

    #[test]
    fn a_driver_that_follows_the_rules_gets_its_device_and_can_reset_it() {
        let (mut transport, seen) = transport();
        assert_eq!(get(&mut transport, MAGIC_VALUE), 0x7472_6976);
        assert_eq!(get(&mut transport, VERSION_NUMBER), 2);
        assert_eq!(get(&mut transport, DEVICE_ID), 42);
        assert_eq!(get(&mut transport, DEVICE_FEATURES), 0b1010);
        set(&mut transport, DEVICE_FEATURES_SELECT, 1);
        assert_eq!(get(&mut transport, DEVICE_FEATURES), 1);
        set(&mut transport, DEVICE_FEATURES_SELECT, 2);
        assert_eq!(get(&mut transport, DEVICE_FEATURES), 0);
        assert_eq!(get(&mut transport, QUEUE_SIZE_MAX), 256);
        set(&mut transport, QUEUE_SELECT, 9);
        assert_eq!(get(&mut transport, QUEUE_SIZE_MAX), 0);

        run(&mut transport, &negotiation());
        assert_eq!(get(&mut transport, STATUS), STEPS | DRIVER_OK);
        let (features, queues) = seen.lock().unwrap().active.clone().unwrap();
        assert_eq!(features, FEATURE_VERSION_1 | 0b10);
        assert_eq!(queues.len(), 2);
        assert_eq!(queues.first().unwrap().device, 0x20_8000);

        set(&mut transport, STATUS, 0);
        assert_eq!(get(&mut transport, STATUS), 0);
        assert!(seen.lock().unwrap().active.is_none());
        run(&mut transport, &negotiation());
        assert_eq!(seen.lock().unwrap().activations, 2);
    }

    #[test]
    fn features_outside_the_offer_or_without_version_1_are_refused() {
        for (low, high) in [(0b100, 1), (0b10, 0), (0, 3)] {
            let (mut transport, _) = transport();
            run(
                &mut transport,
                &[
                    (STATUS, ACKNOWLEDGE | DRIVER),
                    (DRIVER_FEATURES, low),
                    (DRIVER_FEATURES_SELECT, 1),
                    (DRIVER_FEATURES, high),
                    (STATUS, STEPS),
                ],
            );
            assert_eq!(
                get(&mut transport, STATUS),
                ACKNOWLEDGE | DRIVER,
                "{low:#x} {high:#x}"
            );
        }
    }

    #[test]
    fn a_device_with_a_bad_or_missing_queue_asks_for_a_reset() {
        for bad in [(QUEUE_READY, 0), (QUEUE_SIZE, 63), (QUEUE_DEVICE_HIGH, 1)] {
            let (mut transport, seen) = transport();
            let mut writes = negotiation();
            let last = writes.pop().unwrap();
            // Thaw the queue, break it, and (unless that is the fault) freeze it again.
            writes.push((QUEUE_READY, 0));
            writes.push(bad);
            writes.push((QUEUE_READY, u32::from(bad.0 != QUEUE_READY)));
            writes.push(last);
            run(&mut transport, &writes);
            assert_eq!(get(&mut transport, STATUS), STEPS | NEEDS_RESET, "{bad:?}");
            set(&mut transport, STATUS, STEPS | DRIVER_OK);
            assert!(seen.lock().unwrap().active.is_none());
            run(&mut transport, &negotiation());
            assert!(seen.lock().unwrap().active.is_some());
        }
    }

    #[test]
    fn a_ready_or_running_queue_is_frozen() {
        let (mut transport, seen) = transport();
        let mut writes = negotiation();
        let last = writes.pop().unwrap();
        writes.push((QUEUE_DEVICE_LOW, 0x1000));
        writes.push(last);
        writes.extend([(QUEUE_READY, 0), (QUEUE_SIZE, 4), (QUEUE_DRIVER_LOW, 0)]);
        run(&mut transport, &writes);
        assert_eq!(get(&mut transport, QUEUE_READY), 1);
        let seen = seen.lock().unwrap();
        let (_, queues) = seen.active.as_ref().unwrap();
        assert_eq!(queues.last().unwrap().device, 0x21_8000);
    }

    #[test]
    fn odd_widths_and_offsets_touch_no_register() {
        let (mut transport, _) = transport();
        transport.write(STATUS, &[1]);
        transport.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
        transport.write(STATUS + 1, &[1, 0, 0, 0]);
        assert_eq!(get(&mut transport, STATUS), 0);
        let mut eight = [0xaa; 8];
        transport.read(MAGIC_VALUE, &mut eight);
        assert_eq!(eight, [0; 8]);
        let mut config = [0; 2];
        transport.read(CONFIG + 5, &mut config);
        assert_eq!(config, [5, 5]);
    }

    proptest! {
        /// The fake device asserts what it must never see: unknown features, bad queues, double activation.
        #[test]
        fn any_sequence_of_accesses_keeps_the_rules(
            accesses in prop::collection::vec(
                (any::<bool>(), 0_u64..0x200, any::<u32>(), 0_usize..9), 0..200),
            good_prefix in 0_usize..30,
        ) {
            let (mut transport, _seen) = transport();
            let writes = negotiation();
            run(&mut transport, writes.get(..good_prefix.min(writes.len())).unwrap());
            for (is_write, offset, value, width) in accesses {
                // Mostly whole registers with plausible values, because those reach deepest.
                let aligned = offset & !3;
                match (is_write, value % 3) {
                    (true, 0) => set(&mut transport, aligned, value >> 24),
                    (true, 1) => set(&mut transport, STATUS, value & 0xff),
                    (true, _) => {
                        let bytes = [value as u8; 8];
                        transport.write(offset, bytes.get(..width.min(8)).unwrap());
                    }
                    (false, _) => {
                        let mut bytes = [0; 8];
                        transport.read(offset, bytes.get_mut(..width.min(8)).unwrap());
                    }
                }
            }
            set(&mut transport, STATUS, 0);
            prop_assert_eq!(get(&mut transport, STATUS), 0);
            run(&mut transport, &writes);
            prop_assert_eq!(get(&mut transport, STATUS), STEPS | DRIVER_OK);
        }
    }
}
