//! A process as the appliance's loop needs a machine: the clock of the host, and rests in which this very thread moves frames.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_guest::run::{Device, Machine};
use sluice_trunk::pair::{Inline, Rest};
use sluice_vmm::event;
use sluice_vmm::park::Sleeper;
use sluice_vmm::virtio::backend::RingEvents;
use vmm_sys_util::eventfd::EventFd;

/// The machine.
#[derive(Debug)]
pub(crate) struct Process {
    started: Instant,
    inline: Option<Inline>,
    sleeper: Sleeper,
    /// The console's queues.
    kicks: Vec<Arc<EventFd>>,
}

impl Process {
    pub(crate) fn new(inline: Option<Inline>, sleeper: Sleeper, console: &[RingEvents]) -> Self {
        let kicks = console.iter().map(|events| Arc::clone(&events.kick));
        Self {
            started: Instant::now(),
            inline,
            sleeper,
            kicks: kicks.collect(),
        }
    }
}

impl Machine for Process {
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn notify(&mut self, device: Device, queue: u16) {
        // The trunk is looked at in every rest.
        if device == Device::Control
            && let Some(kick) = self.kicks.get(usize::from(queue))
        {
            event::signal(kick);
        }
    }

    fn clear_interrupts(&mut self) {}

    fn sleep(&mut self, nanoseconds: u64) {
        let limit = Duration::from_nanos(nanoseconds);
        let rest = self
            .inline
            .as_mut()
            .map_or(Rest::Apart, |inline| inline.rest(Some(limit)));
        // What was signalled meanwhile is taken, or the next rest would end at once.
        let left = match rest {
            Rest::Apart => limit,
            Rest::Frames | Rest::Other => Duration::ZERO,
        };
        // Why it ended does not matter: the loop looks everywhere.
        let _ = self.sleeper.sleep(Some(left));
    }

    fn heartbeat(&mut self) {}

    fn moves_meanwhile(&self) -> bool {
        false
    }
}
