//! The least that a userspace process between two pods can do: the pods' `eth0` are taps, and one thread moves frames from one to
//! the other, whole, with the header that says what is unfinished about them. It looks at nothing.

use crate::signals;
use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use sluice_ports::offloads::Offloads;
use sluice_ports::tap;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// The pods' interface.
const INTERFACE: &str = "eth0";
/// Frames from one side before it is the other one's turn.
const BATCH: usize = 64;
/// Silence after which the thread sleeps: longer than it takes to wake a core.
const POLLING: Duration = Duration::from_micros(50);
/// Milliseconds of sleep after which it looks whether it is to end.
const PATIENCE: u16 = 500;
/// The longest frame, with its header and what is put in front of it.
const ROOM: usize = 1 << 17;

/// Moves frames between two pods until a signal ends the process.
///
/// # Errors
/// If a tap cannot be made or breaks.
pub fn run(one: &Path, other: &Path) -> Result<()> {
    let offloads = tap::probe()?;
    let pods = [pod(one, offloads)?, pod(other, offloads)?];
    let whole = |_: &mut [u8], end: usize| Some((0, end));
    forward(pods, 0, (whole, whole))
}

/// Makes the tap that is a pod's interface.
///
/// # Errors
/// If the namespace cannot be entered or the tap cannot be made.
pub(super) fn pod(netns: &Path, offloads: Offloads) -> Result<File> {
    enter(netns)?;
    let tap = tap::attach(INTERFACE).context("a pod's tap")?;
    tap::set_offloads(tap.as_fd(), offloads).context("a pod's offloads")?;
    Ok(tap)
}

/// The thread's network namespace is this one from now on.
///
/// # Errors
/// If it cannot be entered.
pub(super) fn enter(netns: &Path) -> Result<()> {
    let file = File::open(netns).with_context(|| netns.display().to_string())?;
    Ok(setns(file, CloneFlags::CLONE_NEWNET)?)
}

/// Moves frames between two taps until a signal ends the process. Frames of the first are read at `offset` of a buffer, those of the
/// second at its start; the edit of each gets the buffer and the end of the frame, and says from where to where it is to be written to the
/// other tap, or that it is not.
///
/// # Errors
/// If a tap cannot be read any more.
pub(super) fn forward<A, B>(taps: [File; 2], offset: usize, (edit, edit_back): (A, B)) -> Result<()>
where
    A: Fn(&mut [u8], usize) -> Option<(usize, usize)>,
    B: Fn(&mut [u8], usize) -> Option<(usize, usize)>,
{
    let [one, other] = taps;
    let mut buffer = vec![0u8; ROOM];
    let mut moved = Instant::now();
    while !signals::ended() {
        let there = shift((&one, &other), &mut buffer, offset, &edit)?;
        let back = shift((&other, &one), &mut buffer, 0, &edit_back)?;
        if there || back {
            moved = Instant::now();
        } else if moved.elapsed() >= POLLING {
            sleep(&one, &other)?;
            moved = Instant::now();
        } else {
            std::hint::spin_loop();
        }
    }
    Ok(())
}

/// Up to a batch; whether there was any frame.
fn shift(
    (mut from, mut to): (&File, &File),
    buffer: &mut [u8],
    offset: usize,
    edit: impl Fn(&mut [u8], usize) -> Option<(usize, usize)>,
) -> Result<bool> {
    for number in 0..BATCH {
        let length = match from.read(&mut buffer[offset..]) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(number > 0),
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(number > 0),
            Err(error) => return Err(error).context("reading a tap"),
        };
        if let Some((start, end)) = edit(buffer, offset + length) {
            // A tap that cannot take a frame drops it, as a wire would.
            let _lost = to.write(&buffer[start..end]);
        }
    }
    Ok(true)
}

fn sleep(one: &File, other: &File) -> Result<()> {
    let mut both = [one, other].map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN));
    match poll(&mut both, PollTimeout::from(PATIENCE)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error).context("waiting for a tap"),
    }
}
