//! One VMM's requests, and the two queues they are about.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, mpsc};

use super::wire::{Reply, Request};
use super::{TrunkPeer, TrunkState};
use crate::driver::{Command, Mailbox, Unanswered};
use crate::features::Features;
use crate::memory::{GuestMemory, MemoryError};
use crate::ring::{Ring, RingError, RingSpec};

/// Queues of the trunk: one pair.
const QUEUES: usize = 2;
/// The protocol features offered: only that of answering every request (`VHOST_USER_PROTOCOL_F_REPLY_ACK`).
const REPLY_ACK: u64 = 1 << 3;

/// Why a request is refused. The conversation goes on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("Feature bits {0:#x} were not offered")]
    Features(u64),
    #[error("Protocol feature bits {0:#x} were not offered")]
    ProtocolFeatures(u64),
    #[error("There is no queue {0}")]
    Queue(u32),
    #[error("{0} is no ring size or index")]
    Number(u32),
    #[error("The guest did not accept VERSION_1 and MRG_RXBUF")]
    Header,
    #[error("Request {0} belongs to a feature that was not offered")]
    Other(u32),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("A file descriptor of the VMM cannot be used")]
    Descriptor(#[from] io::Error),
    #[error("A kick or call must be an eventfd, not {0}")]
    NoEventfd(String),
    #[error(transparent)]
    Engine(#[from] Unanswered),
}

#[derive(Debug, Default)]
struct Queue {
    size: u16,
    /// Descriptor table, available ring, used ring.
    areas: Option<[u64; 3]>,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    /// Set by the kick descriptor, cleared by `GET_VRING_BASE`.
    wanted: bool,
    running: bool,
    base: u16,
}

#[derive(Debug)]
pub(super) struct Backend {
    offered: Features,
    accepted: Features,
    mailbox: Mailbox,
    memory: Option<Arc<GuestMemory>>,
    queues: [Queue; QUEUES],
    pid: Option<i32>,
    state: TrunkState,
}

impl Backend {
    pub(super) fn new(
        offered: Features,
        mailbox: Mailbox,
        pid: Option<i32>,
        state: TrunkState,
    ) -> Self {
        let queues = [Queue::default(), Queue::default()];
        let accepted = Features::default();
        Self {
            offered,
            accepted,
            mailbox,
            memory: None,
            queues,
            pid,
            state,
        }
    }

    /// Does what a request asks for.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub(super) fn obey(&mut self, request: Request) -> Result<Reply, Refusal> {
        match request {
            Request::GetFeatures => return Ok(Reply::Number(self.offered.0)),
            Request::GetProtocolFeatures => return Ok(Reply::Number(REPLY_ACK)),
            Request::SetProtocolFeatures(bits) if bits & !REPLY_ACK != 0 => {
                return Err(Refusal::ProtocolFeatures(bits & !REPLY_ACK));
            }
            Request::SetOwner | Request::SetProtocolFeatures(_) => {}
            Request::ResetOwner => self.stop_all()?,
            Request::SetFeatures(bits) => self.set_features(bits)?,
            Request::SetMemTable(table, files) => {
                let memory = GuestMemory::map(&table, files)?;
                // Running rings go over to the new memory: they resume where the guest has seen them.
                self.stop_all()?;
                self.memory = Some(Arc::new(memory));
                self.settle_all()?;
            }
            Request::SetVringNum { queue, size } => {
                self.queue(queue)?.size = u16::try_from(size).map_err(|_| Refusal::Number(size))?;
            }
            Request::SetVringAddr { queue, areas } => {
                self.queue(queue)?.areas = Some(areas);
                self.settle(queue)?;
            }
            // Only remembered for the answer: a ring resumes at the used index in guest memory.
            Request::SetVringBase { queue, base } => {
                self.queue(queue)?.base = u16::try_from(base).map_err(|_| Refusal::Number(base))?;
            }
            Request::GetVringBase { queue } => {
                self.queue(queue)?.wanted = false;
                self.settle(queue)?;
                let q = self.queue(queue)?;
                q.kick = None;
                return Ok(Reply::Base {
                    queue,
                    base: q.base.into(),
                });
            }
            Request::SetVringKick { queue, file } => self.set_kick(queue, file)?,
            Request::SetVringCall { queue, file } => self.set_call(queue, file)?,
            Request::SetVringErr { queue } => drop(self.queue(queue)?),
            Request::SetVringEnable { queue, enable } => {
                self.queue(queue)?.enabled = enable;
                self.settle(queue)?;
            }
            Request::Other { code } => return Err(Refusal::Other(code)),
        }
        Ok(Reply::Done)
    }

    /// # Errors
    /// When the engine's thread did not confirm: it may still use the rings.
    pub(super) fn stop_all(&mut self) -> Result<(), Unanswered> {
        for index in 0..QUEUES {
            if self.queues.get(index).is_some_and(|q| q.running) {
                self.stop(index)?;
            }
        }
        Ok(())
    }

    fn queue(&mut self, queue: u32) -> Result<&mut Queue, Refusal> {
        let index = usize::try_from(queue).unwrap_or(usize::MAX);
        self.queues.get_mut(index).ok_or(Refusal::Queue(queue))
    }

    fn set_features(&mut self, bits: u64) -> Result<(), Refusal> {
        if bits & !self.offered.0 != 0 {
            return Err(Refusal::Features(bits & !self.offered.0));
        }
        if self.accepted != Features(bits) {
            self.accepted = Features(bits);
            let takes = self.accepted.guest_takes();
            self.mailbox.send(Command::Offloads(takes))?;
        }
        if !self.accepted.rings_begin_disabled() {
            self.queues.iter_mut().for_each(|q| q.enabled = true);
        }
        self.settle_all()
    }

    fn set_kick(&mut self, queue: u32, file: Option<File>) -> Result<(), Refusal> {
        let kick = eventfd(file)?;
        let q = self.queue(queue)?;
        q.kick = kick;
        q.wanted = true;
        // A new descriptor for a running ring: serve it anew.
        if q.running {
            self.stop(queue as usize)?;
        }
        self.settle(queue)
    }

    fn set_call(&mut self, queue: u32, file: Option<File>) -> Result<(), Refusal> {
        let call = eventfd(file)?;
        let copy = call.as_ref().map(File::try_clone).transpose()?;
        let q = self.queue(queue)?;
        q.call = call;
        if q.running {
            self.mailbox.send(Command::SetCall {
                queue: queue as usize,
                call: copy,
            })?;
        }
        Ok(())
    }

    fn settle_all(&mut self) -> Result<(), Refusal> {
        (0..QUEUES as u32).try_for_each(|queue| self.settle(queue))
    }

    /// Starts or stops a queue so that it runs exactly when it should.
    fn settle(&mut self, queue: u32) -> Result<(), Refusal> {
        let (memory, accepted) = (self.memory.clone(), self.accepted);
        let index = queue as usize;
        let q = self.queue(queue)?;
        match (q.running, q.enabled && q.wanted, q.areas, memory) {
            (true, false, ..) => self.stop(index)?,
            (false, true, Some([descriptors, available, used]), Some(memory)) => {
                if !accepted.long_header() {
                    return Err(Refusal::Header);
                }
                let (size, event_idx) = (q.size, accepted.event_idx());
                let spec = RingSpec {
                    size,
                    descriptors,
                    available,
                    used,
                    event_idx,
                };
                let ring = Box::new(Ring::new(memory, &spec)?);
                let call = q.call.as_ref().map(File::try_clone).transpose()?;
                let kick = q.kick.as_ref().map(File::try_clone).transpose()?;
                q.running = true;
                self.mailbox.send(Command::StartRing {
                    queue: index,
                    ring,
                    call,
                    kick,
                })?;
            }
            _ => {}
        }
        self.tell_state();
        Ok(())
    }

    fn stop(&mut self, index: usize) -> Result<(), Unanswered> {
        let ask = |reply: mpsc::Sender<_>| Command::StopRing {
            queue: index,
            reply,
        };
        let base = self.mailbox.ask(ask)?;
        if let Some(queue) = self.queues.get_mut(index) {
            queue.running = false;
            queue.base = base.unwrap_or(queue.base);
        }
        self.tell_state();
        Ok(())
    }

    fn tell_state(&self) {
        let serving = self.queues.iter().all(|q| q.running);
        let features = self.accepted.0;
        self.state.set(Some(TrunkPeer {
            pid: self.pid,
            features,
            serving,
        }));
    }
}

/// A descriptor shared with the VMM must never make the data path wait, and a write of eight bytes must mean nothing but a
/// signal: a file of /proc or of FUSE would be written with this process's rights.
fn eventfd(file: Option<File>) -> Result<Option<File>, Refusal> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let Some(file) = file else { return Ok(None) };
    let kind = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if kind.as_os_str() != "anon_inode:[eventfd]" {
        return Err(Refusal::NoEventfd(kind.display().to_string()));
    }
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(io::Error::from)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(file.as_fd(), FcntlArg::F_SETFL(flags)).map_err(io::Error::from)?;
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    #[test]
    fn only_an_eventfd_is_taken_as_kick_or_call_and_it_no_longer_blocks() {
        let open = |path| File::options().read(true).write(true).open(path).unwrap();
        let (_, pipe) = nix::unistd::pipe().unwrap();
        for file in [
            open("/proc/self/oom_score_adj"),
            open("/dev/null"),
            File::from(pipe),
        ] {
            assert!(matches!(eventfd(Some(file)), Err(Refusal::NoEventfd(_))));
        }
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
        let file = File::from(event.as_fd().try_clone_to_owned().unwrap());
        assert!(eventfd(Some(file)).unwrap().is_some());
        // The flag belongs to the open file that both descriptors share: a read of the empty counter no longer waits.
        assert_eq!(event.read(), Err(nix::errno::Errno::EAGAIN));
        assert!(eventfd(None).unwrap().is_none());
    }
}
