//! One vhost-user conversation: connect, agree on features, hand over memory and rings, take them back.
//!
//! Each step takes at most [`ANSWER_TIME`]. After any error the conversation is over: drop it (which closes the socket, and
//! with it every claim of the backend on the rings) and start another.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::VhostUserMemoryRegionInfo;
use vhost::VringConfigData;
use vhost::vhost_user::Frontend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::memory::MemoryError;
use crate::socket::connect_unix;
use crate::virtio::FEATURE_VERSION_1;
use crate::virtio::QueueLayout;

/// A backend on the same machine does its part of a step within a millisecond; one that takes this long is stuck.
pub const ANSWER_TIME: Duration = Duration::from_secs(1);

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Why a conversation with a backend failed.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("vhost-user {step} failed")]
    Protocol {
        step: &'static str,
        source: vhost::Error,
    },
    #[error("the backend does not offer VIRTIO_F_VERSION_1")]
    NoVersion1,
    #[error("the backend lacks features that the guest runs with: {missing:#x}")]
    MissingFeatures { missing: u64 },
    #[error("guest memory cannot be described to the backend")]
    Memory(#[source] MemoryError),
}

/// The eventfds of one ring.
#[derive(Debug, Clone)]
pub struct RingEvents {
    /// Guest to backend: signalled by KVM when the guest writes the queue's number.
    pub kick: Arc<EventFd>,
    /// Backend to guest: a parked vCPU listens.
    pub call: Arc<EventFd>,
}

/// What the guest started the device with; everything a new backend needs to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activation {
    pub features: u64,
    pub queues: Vec<QueueLayout>,
}

/// An open conversation.
pub struct Backend {
    frontend: Frontend,
    socket: UnixStream,
    features: u64,
    acknowledges: bool,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend")
            .field("features", &self.features)
            .finish_non_exhaustive()
    }
}

fn at(step: &'static str) -> impl Fn(vhost::Error) -> BackendError {
    move |source| BackendError::Protocol { step, source }
}

impl Backend {
    /// Connects to the socket at `path` and learns what the backend can do.
    ///
    /// # Errors
    /// Nobody listens, or what listens does not speak vhost-user.
    pub fn connect(path: &Path, rings: u64) -> Result<Backend, BackendError> {
        let open = || {
            let socket = connect_unix(path)?;
            // The vhost crate waits inside recvmsg.
            socket.set_nonblocking(false)?;
            Ok((socket.try_clone()?, socket))
        };
        let (stream, socket) = open().map_err(BackendError::Connect)?;
        let mut frontend = Frontend::from_stream(stream, rings);
        let (features, acknowledges) = in_time(&socket, || agree(&mut frontend))?;
        Ok(Backend {
            frontend,
            socket,
            features,
            acknowledges,
        })
    }

    /// Everything the backend offers, vhost's own bits included.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Readable when the backend is gone (or says something out of turn, which is as bad).
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Hands features, memory and rings over. Each ring goes on at the used index found in guest memory: what the last backend
    /// had taken but not returned is taken again.
    ///
    /// # Errors
    /// The backend lacks a feature, refuses a message, or is gone.
    pub fn start(
        &mut self,
        ram: &GuestRam,
        activation: &Activation,
        rings: &[RingEvents],
    ) -> Result<(), BackendError> {
        let missing = activation.features & !self.features;
        if missing != 0 {
            return Err(BackendError::MissingFeatures { missing });
        }
        let protocol = self.features & PROTOCOL_FEATURES;
        let frontend = &mut self.frontend;
        if self.acknowledges {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let result = in_time(&self.socket, || {
            let features = activation.features | protocol;
            frontend
                .set_features(features)
                .map_err(at("SET_FEATURES"))?;
            share_memory(frontend, ram)?;
            for (index, (queue, events)) in activation.queues.iter().zip(rings).enumerate() {
                hand_over(frontend, ram, index, queue, events)?;
            }
            // Without protocol features rings are enabled from the start.
            let switched = if protocol == 0 {
                0
            } else {
                activation.queues.len()
            };
            for index in 0..switched {
                frontend
                    .set_vring_enable(index, true)
                    .map_err(at("SET_VRING_ENABLE"))?;
            }
            Ok(())
        });
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        result
    }

    /// Takes the rings back: when this returns without error the backend touches them no more.
    ///
    /// # Errors
    /// The backend refuses or is gone; drop the conversation then.
    pub fn stop(&mut self, queues: usize) -> Result<(), BackendError> {
        let frontend = &self.frontend;
        in_time(&self.socket, || {
            for index in 0..queues {
                frontend
                    .get_vring_base(index)
                    .map_err(at("GET_VRING_BASE"))?;
            }
            Ok(())
        })
    }
}

/// Does `step`, and breaks the connection under it if the backend does not answer in time: the vhost crate itself waits for
/// ever.
fn in_time<T>(socket: &UnixStream, step: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        let (finished, wait) = mpsc::channel::<()>();
        scope.spawn(move || {
            if wait.recv_timeout(ANSWER_TIME) == Err(RecvTimeoutError::Timeout) {
                // Already closed by the other side is as good.
                let _ = socket.shutdown(Shutdown::Both);
            }
        });
        let result = step();
        drop(finished);
        result
    })
}

/// Learns the backend's features, and whether it acknowledges messages.
fn agree(frontend: &mut Frontend) -> Result<(u64, bool), BackendError> {
    frontend.set_owner().map_err(at("SET_OWNER"))?;
    let features = frontend.get_features().map_err(at("GET_FEATURES"))?;
    if features & FEATURE_VERSION_1 == 0 {
        return Err(BackendError::NoVersion1);
    }
    if features & PROTOCOL_FEATURES == 0 {
        return Ok((features, false));
    }
    let theirs = frontend
        .get_protocol_features()
        .map_err(at("GET_PROTOCOL_FEATURES"))?;
    let ours = theirs & VhostUserProtocolFeatures::REPLY_ACK;
    frontend
        .set_protocol_features(ours)
        .map_err(at("SET_PROTOCOL_FEATURES"))?;
    Ok((features, !ours.is_empty()))
}

fn share_memory(frontend: &Frontend, ram: &GuestRam) -> Result<(), BackendError> {
    let region = VhostUserMemoryRegionInfo::from_guest_region(ram.region())
        .map_err(at("describing memory"))?;
    frontend
        .set_mem_table(&[region])
        .map_err(at("SET_MEM_TABLE"))?;
    Ok(())
}

fn hand_over(
    frontend: &Frontend,
    ram: &GuestRam,
    index: usize,
    queue: &QueueLayout,
    events: &RingEvents,
) -> Result<(), BackendError> {
    let addresses = ring_addresses(ram, queue).map_err(BackendError::Memory)?;
    let base = used_index(ram, queue);
    frontend
        .set_vring_num(index, queue.size)
        .map_err(at("SET_VRING_NUM"))?;
    frontend
        .set_vring_addr(index, &addresses)
        .map_err(at("SET_VRING_ADDR"))?;
    frontend
        .set_vring_base(index, base)
        .map_err(at("SET_VRING_BASE"))?;
    frontend
        .set_vring_call(index, &events.call)
        .map_err(at("SET_VRING_CALL"))?;
    // Last: a kick descriptor starts the ring.
    frontend
        .set_vring_kick(index, &events.kick)
        .map_err(at("SET_VRING_KICK"))
}

fn ring_addresses(ram: &GuestRam, queue: &QueueLayout) -> Result<VringConfigData, MemoryError> {
    Ok(VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: 0,
        desc_table_addr: ram.host_address(queue.descriptors, queue.descriptors_length())?,
        used_ring_addr: ram.host_address(queue.device, queue.device_length())?,
        avail_ring_addr: ram.host_address(queue.driver, queue.driver_length())?,
        log_addr: None,
    })
}

fn used_index(ram: &GuestRam, queue: &QueueLayout) -> u16 {
    // The layout was checked to lie inside RAM; zero is where a new ring starts.
    ram.memory()
        .read_obj(GuestAddress(queue.device + 2))
        .map_or(0, u16::from_le)
}
