//! Breaks the machine in the way the command line asks for, so that a VMM's handling of each can be
//! tested.

use sluice_firmware::layout;
use sluice_guest::boot::Breaking;

use super::platform;

/// Does what is asked; comes back only if the machine survives it, which is an error of ring 0.
#[expect(clippy::panic, reason = "that is what was asked for")]
pub(crate) fn run(how: Breaking) {
    match how {
        Breaking::Fault => platform::touch(0),
        Breaking::Ring0 => platform::report_from(layout::STACK_BOTTOM - layout::PAGE),
        Breaking::Panic => panic!("The command line asks for a panic"),
        Breaking::Hang => loop {
            core::hint::spin_loop();
        },
    }
}
