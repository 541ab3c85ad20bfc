//! Child processes: run to the end with their output at hand, or kept as a guest that ends with its owner.

use crate::signals;
use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs a command line of plain words and returns its standard output.
///
/// # Errors
/// If it cannot start or does not exit with 0; the message carries the command and what it said.
pub fn run(words: &[&str]) -> Result<String> {
    let output = output(words)?;
    if !output.status.success() {
        bail!(
            "`{}` ended with {}: {}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command line whose failure is an answer as well.
///
/// # Errors
/// If it cannot start.
pub fn output(words: &[&str]) -> Result<Output> {
    signals::go_on()?;
    let (program, arguments) = words.split_first().context("an empty command")?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", words.join(" ")))
}

/// A running child that is ended when this value goes.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
}

impl Running {
    /// Starts `command`.
    ///
    /// # Errors
    /// If it cannot start.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}: {:?}", command.get_program()))?;
        Ok(Self {
            child,
            name: name.to_owned(),
        })
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// Sends a signal; a process that is gone already is no error.
    pub fn signal(&self, signal: Signal) {
        let _gone_already = kill(self.pid(), signal);
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end, waits, and ends it if it does not.
    pub fn stop(&mut self, patience: Duration) {
        self.signal(Signal::SIGTERM);
        let asked = Instant::now();
        while asked.elapsed() < patience {
            if !self.is_running() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!(
            "{} did not end within {patience:?}; ended by force",
            self.name
        );
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If the system refuses to say.
    pub fn wait(&mut self) -> Result<std::process::ExitStatus> {
        Ok(self.child.wait()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_running() {
            self.stop(Duration::from_secs(5));
        }
    }
}

/// Calls `ready` every few milliseconds until it gives a value or `patience` runs out.
///
/// # Errors
/// If it never does; the message names `what` and the last reason.
pub fn until<T>(what: &str, patience: Duration, mut ready: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        signals::go_on()?;
        match ready() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= patience => {
                return Err(error.context(format!("waited {patience:?} for {what}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
