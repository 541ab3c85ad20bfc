//! What the appliance has room for: when one says so, the model chooses rows that fit, and only then they are sent.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use super::Shared;
use crate::control::Measured;

/// Has the control channel tell of each appliance's room.
pub(super) fn listen(shared: &Arc<Shared>) -> io::Result<()> {
    let (sender, measured) = channel();
    shared.control.plan(sender);
    let shared = Arc::downgrade(shared);
    let plan = move |measured: Receiver<Measured>| {
        while let Ok(measured) = measured.recv() {
            let Some(shared) = shared.upgrade() else {
                break;
            };
            shared.plan(measured);
        }
    };
    std::thread::Builder::new()
        .name("room".into())
        .spawn(move || plan(measured))?;
    Ok(())
}

impl Shared {
    fn plan(&self, measured: Measured) {
        let mut state = self.lock();
        state.model.set_room(measured.room, measured.ram_mib);
        self.tell(&mut state, Vec::new(), Vec::new());
        state.note_findings();
        drop(state);
        self.control.planned(measured.room);
    }
}
