//! The park page, the sleep behind it, and the watchdog that tells sleeping from hanging.
//!
//! No wake-up is lost: an event raises an eventfd that stays readable until it is drained, and draining happens after the
//! sleep and before the guest re-enters and looks at its rings again. An event that came before the park ends it at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::bus::Effect;
use crate::event;

const PARK: u64 = 0x00;
const HEARTBEAT: u64 = 0x04;

/// The page itself: 32-bit writes, no reads.
#[derive(Debug)]
pub struct ParkPage;

impl BusDevice for ParkPage {
    fn read(&mut self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Effect {
        let Ok(value) = <[u8; 4]>::try_from(bytes).map(u32::from_le_bytes) else {
            return Effect::Continue;
        };
        match offset {
            PARK if value == 0 => Effect::Park(None),
            PARK => Effect::Park(Some(Duration::from_micros(value.into()))),
            HEARTBEAT => Effect::Heartbeat,
            _ => Effect::Continue,
        }
    }
}

/// Why a sleep ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Wake {
    Event,
    Deadline,
    Stop,
}

/// Everything a parked vCPU listens to.
#[derive(Debug)]
pub struct Sleeper {
    calls: Vec<Arc<EventFd>>,
    stop: Arc<EventFd>,
}

impl Sleeper {
    /// Sleeps until one of `calls` or `stop` is signalled.
    #[must_use]
    pub fn new(calls: Vec<Arc<EventFd>>, stop: Arc<EventFd>) -> Sleeper {
        Sleeper { calls, stop }
    }

    /// Sleeps at most `limit` (for ever without one). Events that are already pending end it at once, and are taken.
    #[must_use]
    pub fn sleep(&self, limit: Option<Duration>) -> Wake {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut fds: Vec<PollFd> = Vec::with_capacity(self.calls.len() + 1);
        fds.push(PollFd::from_borrowed_fd(
            event::fd(&self.stop),
            PollFlags::IN,
        ));
        for call in &self.calls {
            fds.push(PollFd::from_borrowed_fd(event::fd(call), PollFlags::IN));
        }
        loop {
            let rest = deadline.map(|deadline| {
                let rest = deadline.saturating_duration_since(Instant::now());
                // At most 2^32 µs: the conversion cannot fail.
                Timespec::try_from(rest).unwrap_or(Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                })
            });
            match poll(&mut fds, rest.as_ref()) {
                Ok(0) => return Wake::Deadline,
                Ok(_) => break,
                // A signal: either the stop (then its eventfd is raised) or none of ours.
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => {
                    // Never expected with valid descriptors. Waking too early is always right.
                    tracing::error!(%error, "poll failed while parked");
                    break;
                }
            }
        }
        let raised = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        if raised(0) {
            return Wake::Stop;
        }
        for (index, call) in (1..).zip(&self.calls) {
            if raised(index) {
                event::drain(call);
            }
        }
        Wake::Event
    }
}

/// What the vCPU thread tells the watchdog.
#[derive(Debug, Default)]
pub struct Pulse {
    beats: AtomicU64,
    running: AtomicBool,
}

impl Pulse {
    /// The guest is about to run, and owes heartbeats from now on.
    pub fn run(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
        self.running.store(true, Ordering::Release);
    }

    /// The guest sleeps, or is gone.
    pub fn rest(&self) {
        self.running.store(false, Ordering::Release);
    }

    /// The guest said that it is alive.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }
}

/// Ends a guest that runs without a heartbeat for too long.
///
/// Time is counted only while the watchdog itself is called in time: a VMM that was stopped as a whole (a debugger, a frozen
/// cgroup, a host without CPU for it) does not blame its guest.
#[derive(Debug)]
pub struct Watchdog {
    limit: Duration,
    silent: Duration,
    beats: u64,
}

impl Watchdog {
    /// A watchdog that allows `limit` of silence.
    #[must_use]
    pub fn new(limit: Duration) -> Watchdog {
        Watchdog {
            limit,
            silent: Duration::ZERO,
            beats: 0,
        }
    }

    /// How often [`Watchdog::tick`] wants to be called.
    #[must_use]
    pub fn period(&self) -> Duration {
        (self.limit / 8).max(Duration::from_millis(1))
    }

    /// Looks at the pulse, `elapsed` after the last look. Returns the silence once it is too long.
    pub fn tick(&mut self, elapsed: Duration, pulse: &Pulse) -> Option<Duration> {
        let beats = pulse.beats.load(Ordering::Relaxed);
        if beats != self.beats || !pulse.running.load(Ordering::Acquire) {
            self.beats = beats;
            self.silent = Duration::ZERO;
            return None;
        }
        self.silent += elapsed.min(self.period() * 2);
        (self.silent >= self.limit).then_some(self.silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_32_bit_writes_to_the_two_registers_do_something() {
        let mut page = ParkPage;
        let micros = |n| Effect::Park(Some(Duration::from_micros(n)));
        assert_eq!(page.write(0, &250_u32.to_le_bytes()), micros(250));
        assert_eq!(
            page.write(0, &u32::MAX.to_le_bytes()),
            micros(u32::MAX.into())
        );
        assert_eq!(page.write(0, &[0; 4]), Effect::Park(None));
        assert_eq!(page.write(4, &[1, 2, 3, 4]), Effect::Heartbeat);
        for (offset, bytes) in [
            (0, &[1][..]),
            (0, &[1; 8]),
            (1, &[1; 4]),
            (8, &[1; 4]),
            (0, &[]),
        ] {
            assert_eq!(
                page.write(offset, bytes),
                Effect::Continue,
                "{offset} {bytes:?}"
            );
        }
        let mut word = [0xaa; 4];
        page.read(0, &mut word);
        assert_eq!(word, [0; 4]);
    }

    fn sleeper() -> (Sleeper, Arc<EventFd>, Arc<EventFd>) {
        let call = Arc::new(event::eventfd().unwrap());
        let stop = Arc::new(event::eventfd().unwrap());
        let other = Arc::new(event::eventfd().unwrap());
        (
            Sleeper::new(vec![other, Arc::clone(&call)], Arc::clone(&stop)),
            call,
            stop,
        )
    }

    #[test]
    fn an_event_before_the_park_ends_it_at_once_and_is_taken() {
        let (sleeper, call, _stop) = sleeper();
        event::signal(&call);
        assert_eq!(sleeper.sleep(None), Wake::Event);
        assert_eq!(
            sleeper.sleep(Some(Duration::from_micros(50))),
            Wake::Deadline
        );
    }

    #[test]
    fn an_event_during_the_park_ends_it() {
        let (sleeper, call, _stop) = sleeper();
        std::thread::scope(|scope| {
            scope.spawn(|| event::signal(&call));
            assert_eq!(sleeper.sleep(None), Wake::Event);
        });
    }

    #[test]
    fn a_stop_ends_every_park_from_then_on() {
        let (sleeper, _call, stop) = sleeper();
        event::signal(&stop);
        assert_eq!(sleeper.sleep(None), Wake::Stop);
        assert_eq!(sleeper.sleep(Some(Duration::from_secs(3600))), Wake::Stop);
    }

    #[test]
    fn a_deadline_is_not_early() {
        let (sleeper, _call, _stop) = sleeper();
        let begin = Instant::now();
        assert_eq!(
            sleeper.sleep(Some(Duration::from_millis(3))),
            Wake::Deadline
        );
        assert!(begin.elapsed() >= Duration::from_millis(3));
    }

    #[test]
    fn the_watchdog_counts_silence_only_while_the_guest_runs() {
        let (pulse, mut watchdog) = (Pulse::default(), Watchdog::new(Duration::from_secs(2)));
        let tick = watchdog.period();
        for _ in 0..100 {
            assert_eq!(watchdog.tick(tick, &pulse), None, "it does not run yet");
        }
        pulse.run();
        assert_eq!(watchdog.tick(tick, &pulse), None);
        for _ in 0..7 {
            assert_eq!(watchdog.tick(tick, &pulse), None);
        }
        pulse.beat();
        for _ in 0..8 {
            assert_eq!(watchdog.tick(tick, &pulse), None);
        }
        pulse.rest();
        for _ in 0..100 {
            assert_eq!(watchdog.tick(tick, &pulse), None, "it is parked");
        }
        pulse.run();
        assert_eq!(watchdog.tick(tick, &pulse), None);
        for _ in 0..7 {
            assert_eq!(watchdog.tick(tick, &pulse), None);
        }
        assert_eq!(watchdog.tick(tick, &pulse), Some(Duration::from_secs(2)));
    }

    #[test]
    fn time_in_which_the_watchdog_did_not_run_is_not_held_against_the_guest() {
        let (pulse, mut watchdog) = (Pulse::default(), Watchdog::new(Duration::from_secs(2)));
        pulse.run();
        assert_eq!(watchdog.tick(watchdog.period(), &pulse), None);
        assert_eq!(watchdog.tick(Duration::from_secs(3600), &pulse), None);
    }
}
