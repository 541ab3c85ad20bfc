//! The control channel: a virtio-console whose bytes go to a unix socket and come from it.
//!
//! Served by the event thread. Nothing is lost while the socket is down or slow: guest buffers stay in the ring (that is the
//! guest's back-pressure), host bytes stay in the socket, and this file keeps at most one chain and one read of each direction.
//! A chain that was only partly written when the socket broke is sent again from its start, so that a reader that frames by
//! chain sees whole frames. A chain larger than `stream::CHAIN_MAX` or with bad descriptors is returned unused and counted.

use std::io;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use event_manager::EventOps;
use event_manager::Events;
use event_manager::MutEventSubscriber;
use virtio_queue::Queue;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::event;
use crate::event::Subscriber;
use crate::socket::connect_unix;
use crate::virtio::Device;
use crate::virtio::FEATURE_EVENT_INDEX;
use crate::virtio::FEATURE_INDIRECT;
use crate::virtio::FEATURE_VERSION_1;
use crate::virtio::QueueLayout;
use crate::virtio::backend::RingEvents;
use crate::virtio::stream::Broken;
use crate::virtio::stream::Incoming;
use crate::virtio::stream::Outgoing;
use crate::virtio::stream::give_back;
use crate::virtio::stream::next_chain;

const DEVICE_ID: u32 = 3;
/// Receive, transmit.
pub const QUEUES: usize = 2;
const QUEUE_SIZES: [u16; QUEUES] = [128; QUEUES];
/// Chains per turn, so that one direction cannot starve the other.
const TURN: usize = 128;
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_LAST: Duration = Duration::from_millis(50);

const RECEIVE_KICK: u32 = 0;
const TRANSMIT_KICK: u32 = 1;
const SOCKET: u32 = 2;
const RETRY: u32 = 3;

/// The device the guest's driver sees.
#[derive(Debug)]
pub struct Control {
    port: Arc<Mutex<Port>>,
    wake: Arc<EventFd>,
}

impl Control {
    /// A console bridged to the socket at `path`, and the subscriber that serves it. `rings` is receive, transmit.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(
        path: PathBuf,
        memory: GuestMemoryMmap,
        rings: [RingEvents; QUEUES],
    ) -> io::Result<(Control, Subscriber)> {
        let [receive, transmit] = rings;
        let wake = Arc::clone(&transmit.kick);
        let port = Port {
            path,
            memory,
            receive,
            transmit,
            retry: TimerFd::new().map_err(io::Error::from)?,
            retry_time: RETRY_FIRST,
            told_down: false,
            stream: None,
            interest: EventSet::empty(),
            queues: None,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            refused: 0,
        };
        let port = Arc::new(Mutex::new(port));
        let subscriber: Subscriber = Arc::<Mutex<Port>>::clone(&port);
        Ok((Control { port, wake }, subscriber))
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Control {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_INDEX | FEATURE_INDIRECT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// No size, no multiport, no emergency write: all zero.
    fn read_config(&self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn activate(&mut self, features: u64, queues: &[QueueLayout]) {
        let event_index = features & FEATURE_EVENT_INDEX != 0;
        let queue = |index| {
            queues
                .get(index)
                .and_then(|layout| build(layout, event_index))
        };
        let (Some(receive), Some(transmit)) = (queue(0), queue(1)) else {
            // The transport checked both layouts by the same rules.
            tracing::error!("the control queues were refused after a successful check");
            return;
        };
        self.port().queues = Some(Queues { receive, transmit });
        event::signal(&self.wake);
    }

    fn reset(&mut self) {
        // The event thread serves queues only under this lock.
        self.port().queues = None;
    }
}

fn build(layout: &QueueLayout, event_index: bool) -> Option<Queue> {
    let mut queue = Queue::new(layout.size).ok()?;
    queue
        .try_set_desc_table_address(GuestAddress(layout.descriptors))
        .ok()?;
    queue
        .try_set_avail_ring_address(GuestAddress(layout.driver))
        .ok()?;
    queue
        .try_set_used_ring_address(GuestAddress(layout.device))
        .ok()?;
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    Some(queue)
}

#[derive(Debug)]
struct Queues {
    receive: Queue,
    transmit: Queue,
}

/// What stopped a direction.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// The ring has nothing (more) for this direction.
    Ring,
    /// The socket would block, or there is none.
    Socket,
    /// Enough for one turn; more is waiting.
    Turn,
}

/// The side that the event thread serves.
#[derive(Debug)]
struct Port {
    path: PathBuf,
    memory: GuestMemoryMmap,
    receive: RingEvents,
    transmit: RingEvents,
    retry: TimerFd,
    retry_time: Duration,
    told_down: bool,
    stream: Option<UnixStream>,
    interest: EventSet,
    queues: Option<Queues>,
    outgoing: Outgoing,
    incoming: Incoming,
    refused: u64,
}

impl Port {
    /// Guest to host.
    fn send(&mut self) -> Result<Stop, Broken> {
        let Some(mut stream) = self.stream.as_ref() else {
            return Ok(Stop::Socket);
        };
        for _ in 0..TURN {
            if !self.outgoing.write_to(&mut stream)? {
                return Ok(Stop::Socket);
            }
            let Some(queues) = &mut self.queues else {
                return Ok(Stop::Ring);
            };
            let queue = &mut queues.transmit;
            let Some(chain) = next_chain(queue, &self.memory) else {
                return Ok(Stop::Ring);
            };
            let head = chain.head_index();
            if !self.outgoing.take(chain, &self.memory) {
                self.refused += 1;
            }
            give_back(queue, &self.memory, head, 0, &self.transmit.call);
        }
        Ok(Stop::Turn)
    }

    /// Host to guest.
    fn fetch(&mut self) -> Result<Stop, Broken> {
        for _ in 0..TURN {
            if self.incoming.is_empty() {
                let Some(mut stream) = self.stream.as_ref() else {
                    return Ok(Stop::Socket);
                };
                if self.queues.is_none() {
                    return Ok(Stop::Ring);
                }
                if !self.incoming.read_from(&mut stream)? {
                    return Ok(Stop::Socket);
                }
            }
            let Some(queues) = &mut self.queues else {
                return Ok(Stop::Ring);
            };
            let queue = &mut queues.receive;
            let Some(chain) = next_chain(queue, &self.memory) else {
                return Ok(Stop::Ring);
            };
            let head = chain.head_index();
            let length = self.incoming.fill(chain, &self.memory);
            if length == 0 {
                self.refused += 1;
            }
            give_back(queue, &self.memory, head, length, &self.receive.call);
        }
        Ok(Stop::Turn)
    }

    /// Moves what can be moved, then asks to be called for what could not.
    fn turn(&mut self, ops: &mut EventOps) {
        let moved = self.send().and_then(|sent| Ok((sent, self.fetch()?)));
        let (sent, fetched) = match moved {
            Ok(stops) => stops,
            Err(Broken(error)) => {
                self.disconnect(&error, ops);
                return;
            }
        };
        if sent == Stop::Turn || fetched == Stop::Turn {
            event::signal(&self.transmit.kick);
        }
        let mut interest = EventSet::empty();
        if sent == Stop::Socket {
            interest |= EventSet::OUT;
        }
        if fetched == Stop::Socket {
            interest |= EventSet::IN;
        }
        if let Some(stream) = &self.stream
            && interest != self.interest
        {
            self.interest = interest;
            if let Err(error) = ops.modify(Events::with_data(stream, SOCKET, interest)) {
                self.disconnect(&io::Error::other(error), ops);
            }
        }
    }

    fn connect(&mut self, ops: &mut EventOps) {
        let result = connect_unix(&self.path).and_then(|stream| {
            ops.add(Events::with_data(&stream, SOCKET, EventSet::IN))
                .map_err(io::Error::other)?;
            Ok(stream)
        });
        match result {
            Ok(stream) => {
                self.stream = Some(stream);
                self.interest = EventSet::IN;
                self.retry_time = RETRY_FIRST;
                self.told_down = false;
                self.outgoing.start_over();
                tracing::info!(path = %self.path.display(), "control socket connected");
                self.turn(ops);
            }
            Err(error) => self.retry_later(&error),
        }
    }

    fn disconnect(&mut self, error: &io::Error, ops: &mut EventOps) {
        if let Some(stream) = self.stream.take() {
            // Closing the socket would remove it too; this keeps the subscriber's books in order.
            let _ = ops.remove(Events::empty(&stream));
        }
        self.retry_later(error);
    }

    fn retry_later(&mut self, error: &io::Error) {
        if !self.told_down {
            tracing::warn!(path = %self.path.display(), %error, "control socket down, retrying");
            self.told_down = true;
        }
        if let Err(error) = self.retry.reset(self.retry_time, None) {
            tracing::error!(%error, "the control socket will not be retried");
        }
        self.retry_time = (self.retry_time * 2).min(RETRY_LAST);
    }

    /// The peer hung up: take what it said last, then start over.
    fn hang_up(&mut self, ops: &mut EventOps) {
        let mut error = io::Error::from(ErrorKind::UnexpectedEof);
        if let (Some(mut stream), true) = (self.stream.as_ref(), self.incoming.is_empty())
            && let Err(Broken(why)) = self.incoming.read_from(&mut stream)
        {
            error = why;
        }
        self.disconnect(&error, ops);
        self.turn(ops);
    }
}

impl MutEventSubscriber for Port {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            RECEIVE_KICK => {
                event::drain(&self.receive.kick);
                self.turn(ops);
            }
            TRANSMIT_KICK => {
                event::drain(&self.transmit.kick);
                self.turn(ops);
            }
            SOCKET => {
                let set = events.event_set();
                self.turn(ops);
                if set.intersects(EventSet::HANG_UP | EventSet::ERROR) && self.stream.is_some() {
                    self.hang_up(ops);
                }
            }
            RETRY => {
                if self.retry.wait().is_ok() && self.stream.is_none() {
                    self.connect(ops);
                }
            }
            other => tracing::error!(token = other, "unknown event"),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let added = ops
            .add(Events::with_data(
                &*self.receive.kick,
                RECEIVE_KICK,
                EventSet::IN,
            ))
            .and_then(|()| {
                ops.add(Events::with_data(
                    &*self.transmit.kick,
                    TRANSMIT_KICK,
                    EventSet::IN,
                ))
            })
            .and_then(|()| ops.add(Events::with_data(&self.retry, RETRY, EventSet::IN)));
        if let Err(error) = added {
            tracing::error!(%error, "the control channel is not served");
        }
        self.connect(ops);
    }
}
