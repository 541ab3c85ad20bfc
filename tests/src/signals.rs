//! Signals that end the lab. The crate's only `unsafe`.

use anyhow::Result;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Calls `handler` on SIGINT, SIGTERM and SIGHUP instead of dying at once.
///
/// # Errors
/// If the system refuses.
pub fn on_end(handler: extern "C" fn(i32)) -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(handler),
        SaFlags::empty(),
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handlers given here only store to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}
