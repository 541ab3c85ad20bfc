//! The trunk's rings served by this process: the crate `sluice-trunk` behind the device.

use std::fs::File;
use std::io;
use std::sync::Arc;

use sluice_ports::offloads::Offloads;
use sluice_trunk::driver::Command;
use sluice_trunk::driver::Mailbox;
use sluice_trunk::features::Features;
use sluice_trunk::memory::GuestMemory;
use sluice_trunk::memory::MemoryError;
use sluice_trunk::memory::RegionSpec;
use sluice_trunk::pair::Driving;
use sluice_trunk::ring::Ring;
use sluice_trunk::ring::RingError;
use sluice_trunk::ring::RingSpec;

use crate::event;
use crate::memory::GuestRam;
use crate::virtio::backend::Activation;
use crate::virtio::backend::RingEvents;

/// Why the rings cannot be served here.
#[derive(Debug, thiserror::Error)]
pub enum HereError {
    #[error("guest memory has no descriptor to map it by")]
    NoFile,
    #[error("guest memory cannot be mapped for the trunk")]
    Map(#[source] MemoryError),
    #[error("out of descriptors")]
    Descriptors(#[from] io::Error),
}

/// The device's side of the engine.
#[derive(Debug)]
pub struct Here {
    mailbox: Mailbox,
    driving: Arc<Driving>,
    memory: Arc<GuestMemory>,
    rings: Vec<RingEvents>,
    taps: Offloads,
}

impl Here {
    /// The engine behind `mailbox` will serve these rings in this memory, on taps that can do so much.
    ///
    /// # Errors
    /// The memory cannot be mapped once more.
    pub fn new(
        mailbox: Mailbox,
        driving: Arc<Driving>,
        ram: &GuestRam,
        rings: Vec<RingEvents>,
        taps: Offloads,
    ) -> Result<Here, HereError> {
        let file = ram.file().ok_or(HereError::NoFile)?.try_clone()?;
        // Rings are named by guest-physical addresses here: there is no other process with a mapping of its own.
        let whole = RegionSpec {
            guest: 0,
            len: ram.size(),
            user: 0,
            offset: 0,
        };
        let memory = GuestMemory::map(&[whole], vec![file]).map_err(HereError::Map)?;
        Ok(Here::over(mailbox, driving, Arc::new(memory), rings, taps))
    }

    /// The same in memory that is mapped already.
    #[must_use]
    pub fn over(
        mailbox: Mailbox,
        driving: Arc<Driving>,
        memory: Arc<GuestMemory>,
        rings: Vec<RingEvents>,
        taps: Offloads,
    ) -> Here {
        Here {
            mailbox,
            driving,
            memory,
            rings,
            taps,
        }
    }

    /// What the device offers.
    #[must_use]
    pub fn features(&self) -> u64 {
        Features::offered(self.taps).0
    }

    /// Serves the rings from now on. What the guest has got wrong is logged, and its device stays silent.
    pub fn start(&self, activation: &Activation) {
        let features = Features(activation.features);
        self.driving.set_features(activation.features);
        if !features.long_header() {
            tracing::error!("the guest accepted a header that is not served");
            return;
        }
        let mut commands = vec![Command::Offloads(features.guest_takes())];
        for (queue, (layout, events)) in activation.queues.iter().zip(&self.rings).enumerate() {
            let spec = RingSpec {
                size: layout.size,
                descriptors: layout.descriptors,
                available: layout.driver,
                used: layout.device,
                event_idx: features.event_idx(),
            };
            match self.ring(queue, &spec, events) {
                Ok(command) => commands.push(command),
                Err(error) => {
                    tracing::error!(queue, %error, "a ring of the guest is not served");
                    return;
                }
            }
        }
        for command in commands {
            if let Err(error) = self.mailbox.send(command) {
                tracing::error!(%error, "the rings are not served");
            }
        }
    }

    fn ring(
        &self,
        queue: usize,
        spec: &RingSpec,
        events: &RingEvents,
    ) -> Result<Command, RingFailure> {
        let copy = |event| -> io::Result<File> {
            let descriptor = event::fd(event).try_clone_to_owned()?;
            Ok(File::from(descriptor))
        };
        Ok(Command::StartRing {
            queue,
            ring: Box::new(Ring::new(self.memory.clone(), spec)?),
            call: Some(copy(&events.call)?),
            kick: Some(copy(&events.kick)?),
        })
    }

    /// Takes the rings back; returns when the engine touches them no more.
    pub fn reset(&self) {
        for queue in 0..self.rings.len() {
            let stopped = self.mailbox.ask(|reply| Command::StopRing { queue, reply });
            if let Err(error) = stopped {
                tracing::error!(queue, %error, "the engine did not confirm that a ring is stopped");
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum RingFailure {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Descriptors(#[from] io::Error),
}
