//! Signals that end the lab: noted, and looked at wherever the lab waits. The crate's only `unsafe`.

use anyhow::{Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::atomic::{AtomicBool, Ordering};

static ENDED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: i32) {
    ENDED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP are noted instead of killing at once, so that what was made can be removed.
///
/// # Errors
/// If the system refuses.
pub fn note_ends() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether somebody asked for the end.
pub fn ended() -> bool {
    ENDED.load(Ordering::Relaxed)
}

/// Goes on only if nobody asked for the end.
///
/// # Errors
/// If somebody did.
pub fn go_on() -> Result<()> {
    if ended() {
        bail!("interrupted");
    }
    Ok(())
}
