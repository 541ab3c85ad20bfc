//! Eventfds, and the one thread that serves devices inside this process.
//!
//! Devices are `event-manager` subscribers behind a mutex, because the vCPU thread activates and resets them while this thread
//! serves their queues. A subscriber must never block.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;

use event_manager::EventManager;
use event_manager::EventOps;
use event_manager::Events;
use event_manager::MutEventSubscriber;
use event_manager::SubscriberOps;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EFD_CLOEXEC;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

/// A device served by the event thread.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A non-blocking eventfd at zero.
///
/// # Errors
/// The process is out of descriptors.
pub fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// Adds one event. Never blocks: a counter that is already full is as readable as it gets.
pub fn signal(event: &EventFd) {
    // Only EAGAIN can happen (counter at its maximum), and then the reader wakes anyway.
    let _ = event.write(1);
}

/// Takes all events. Returns whether there were any.
pub fn drain(event: &EventFd) -> bool {
    event.read().is_ok()
}

/// The descriptor of `event`, for calls that want a borrowed one.
#[must_use]
pub fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns this descriptor and keeps it open for at least the lifetime of the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The thread that serves in-process devices; stops and is joined when dropped.
pub struct EventThread {
    stop: Arc<EventFd>,
    failed: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for EventThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventThread").finish_non_exhaustive()
    }
}

impl EventThread {
    /// Starts serving `subscribers`.
    ///
    /// # Errors
    /// The process is out of descriptors or threads.
    pub fn start(subscribers: Vec<Subscriber>) -> io::Result<EventThread> {
        let stop = Arc::new(eventfd()?);
        let stopped = Arc::new(AtomicBool::new(false));
        let failed = Arc::new(eventfd()?);
        let failure = Arc::clone(&failed);
        let mut manager = EventManager::<Subscriber>::new().map_err(io::Error::other)?;
        let watch = StopWatch {
            event: Arc::clone(&stop),
            stopped: Arc::clone(&stopped),
        };
        manager.add_subscriber(Arc::new(Mutex::new(watch)));
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        let thread = thread::Builder::new()
            .name("devices".into())
            .spawn(move || serve(&stopped, &failure, || manager.run()))?;
        Ok(EventThread {
            stop,
            failed,
            thread: Some(thread),
        })
    }
}

impl EventThread {
    /// Readable when devices are no longer served: the machine is then of no use.
    #[must_use]
    pub fn failed(&self) -> &EventFd {
        &self.failed
    }
}

fn serve<T, E: fmt::Display>(
    stopped: &AtomicBool,
    failed: &EventFd,
    mut run: impl FnMut() -> Result<T, E>,
) {
    while !stopped.load(Ordering::Acquire) {
        if let Err(error) = run() {
            tracing::error!(%error, "device events are no longer served");
            signal(failed);
            return;
        }
    }
}

impl Drop for EventThread {
    fn drop(&mut self) {
        signal(&self.stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has aborted the process already.
            let _ = thread.join();
        }
    }
}

struct StopWatch {
    event: Arc<EventFd>,
    stopped: Arc<AtomicBool>,
}

impl MutEventSubscriber for StopWatch {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        drain(&self.event);
        self.stopped.store(true, Ordering::Release);
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&*self.event, EventSet::IN)) {
            tracing::error!(%error, "the device thread will not hear a stop");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_takes_every_event_at_once() {
        let event = eventfd().unwrap();
        assert!(!drain(&event));
        signal(&event);
        signal(&event);
        assert!(drain(&event));
        assert!(!drain(&event));
    }

    #[test]
    fn an_error_of_the_event_loop_is_signalled_and_a_stop_is_not() {
        let (stopped, failed) = (AtomicBool::new(false), eventfd().unwrap());
        let mut rounds = 0;
        serve(&stopped, &failed, || {
            rounds += 1;
            stopped.store(rounds == 3, Ordering::Release);
            Ok::<_, String>(())
        });
        assert!(rounds == 3 && !drain(&failed));
        stopped.store(false, Ordering::Release);
        serve(&stopped, &failed, || Err::<(), _>("epoll"));
        assert!(drain(&failed));
    }

    #[test]
    fn the_event_thread_ends_when_dropped() {
        drop(EventThread::start(Vec::new()).unwrap());
    }
}
