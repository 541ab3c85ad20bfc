//! A running virtual machine: watched from the thread that started it, ended by the guest, the watchdog or the operator.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use kvm_ioctls::VmFd;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::Killable;
use vmm_sys_util::signal::SIGRTMIN;
use vmm_sys_util::signal::register_signal_handler;

use crate::event;
use crate::event::EventThread;
use crate::exit::Ending;
use crate::exit::Failure;
use crate::memory::GuestRam;
use crate::park::Pulse;
use crate::park::Watchdog;
use crate::ports::ServedPorts;
use crate::vcpu::Vcpu;

/// How long a vCPU may take to leave the guest when asked.
const STOP_TIME: Duration = Duration::from_secs(1);

/// What ends a vCPU's run, wherever it is.
#[derive(Debug, Clone)]
pub struct Stop {
    pub flag: Arc<AtomicBool>,
    pub event: Arc<EventFd>,
}

/// What must outlive the vCPU thread: nothing may enter the guest or touch its memory without it.
#[derive(Debug)]
pub struct Kept {
    pub devices: EventThread,
    /// The ports and the engine behind them, where this process serves the trunk.
    pub ports: Option<ServedPorts>,
    /// Readable when a daemon has asked for the end.
    pub quit: Arc<EventFd>,
    pub vm: VmFd,
    pub ram: Arc<GuestRam>,
}

/// A machine whose guest runs.
#[derive(Debug)]
pub struct Running {
    thread: Option<JoinHandle<Ending>>,
    done: Arc<EventFd>,
    pulse: Arc<Pulse>,
    stop: Stop,
    watchdog: Option<Watchdog>,
    begin: Instant,
    kept: Kept,
}

impl Running {
    /// Starts the vCPU's thread.
    ///
    /// # Errors
    /// The host is out of threads or descriptors.
    pub fn start(
        vcpu: Vcpu,
        stop: Stop,
        watchdog: Option<Duration>,
        kept: Kept,
    ) -> io::Result<Running> {
        register_kick()?;
        let pulse = Arc::clone(&vcpu.pulse);
        let done = Arc::new(event::eventfd()?);
        let finished = Arc::clone(&done);
        let begin = Instant::now();
        let thread = thread::Builder::new().name("vcpu0".into()).spawn(move || {
            let ending = vcpu.run();
            event::signal(&finished);
            ending
        })?;
        Ok(Running {
            thread: Some(thread),
            done,
            pulse,
            stop,
            watchdog: watchdog.map(Watchdog::new),
            begin,
            kept,
        })
    }

    /// Watches the guest until it ends by itself, the watchdog ends it, or `stop_request` becomes readable.
    /// Returns the ending and how long the guest lived.
    pub fn wait(mut self, stop_request: &OwnedFd) -> (Ending, Duration) {
        let asked = self.watch(stop_request);
        let ended = self.stop_vcpu();
        let uptime = self.begin.elapsed();
        // What the guest did itself wins, unless it only obeyed.
        let ending = match (asked, ended) {
            (Some(asked), None | Some(Ending::Stopped)) => asked,
            (None, None) => Ending::Stopped,
            (_, Some(ended)) => ended,
        };
        (ending, uptime)
    }

    /// Returns why the guest must stop, or nothing if it ended by itself.
    fn watch(&mut self, stop_request: &OwnedFd) -> Option<Ending> {
        let period = self
            .watchdog
            .as_ref()
            .and_then(|dog| Timespec::try_from(dog.period()).ok());
        let mut last = Instant::now();
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(event::fd(&self.done), PollFlags::IN),
                PollFd::from_borrowed_fd(stop_request.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(event::fd(self.kept.devices.failed()), PollFlags::IN),
                PollFd::from_borrowed_fd(event::fd(&self.kept.quit), PollFlags::IN),
            ];
            // An interrupted poll is as good as an early tick.
            let _ = poll(&mut fds, period.as_ref());
            let [done, stop, unserved, quit] = fds.map(|fd| !fd.revents().is_empty());
            if done {
                return None;
            }
            if stop || quit {
                return Some(Ending::Stopped);
            }
            if unserved {
                return Some(Ending::Failed {
                    cause: Failure::DevicesUnserved,
                    registers: None,
                });
            }
            let now = Instant::now();
            if let Some(watchdog) = &mut self.watchdog
                && let Some(silent) = watchdog.tick(now - last, &self.pulse)
            {
                return Some(Ending::Watchdog { silent });
            }
            last = now;
        }
    }

    /// Gets the vCPU thread out of the guest, out of a park, or out of nothing at all.
    fn stop_vcpu(&mut self) -> Option<Ending> {
        self.stop.flag.store(true, Ordering::Release);
        event::signal(&self.stop.event);
        let thread = self.thread.take()?;
        let begin = Instant::now();
        // Repeated, because a signal that arrives just before KVM_RUN is lost.
        while !thread.is_finished() {
            if begin.elapsed() > STOP_TIME {
                tracing::error!("the vCPU does not leave the guest");
                return None;
            }
            // Fails only if the thread is gone, and then the loop ends.
            let _ = thread.kill(SIGRTMIN());
            thread::sleep(Duration::from_millis(1));
        }
        thread.join().ok()
    }
}

/// The signal only has to interrupt `KVM_RUN`; the flag says what for.
fn register_kick() -> io::Result<()> {
    extern "C" fn interrupt(
        _signal: libc::c_int,
        _info: *mut libc::siginfo_t,
        _context: *mut libc::c_void,
    ) {
    }
    register_signal_handler(SIGRTMIN(), interrupt).map_err(io::Error::from)
}
