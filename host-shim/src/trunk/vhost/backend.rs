//! One VMM's requests, as the `vhost` crate hands them over, and the two queues they are about.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::{TrunkPeer, TrunkState};
use crate::trunk::driver::{Command, Mailbox};
use crate::trunk::features::Features;
use crate::trunk::memory::{GuestMemory, RegionSpec};
use crate::trunk::ring::{Ring, RingSpec};

/// Queues of the trunk: one pair.
const QUEUES: usize = 2;

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

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, error))
}

fn unsupported(what: &'static str) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::Unsupported, what))
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

    fn queue(&mut self, index: u32) -> Result<&mut Queue> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.queues.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Starts or stops a queue so that it runs exactly when it should.
    fn settle(&mut self, index: usize) -> Result<()> {
        let event_idx = self.accepted.event_idx();
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(());
        };
        let should_run = queue.enabled && queue.wanted;
        match (queue.running, should_run, queue.areas, &self.memory) {
            (true, false, ..) => self.stop(index),
            (false, true, Some([descriptors, available, used]), Some(memory)) => {
                if !self.accepted.long_header() {
                    return Err(unsupported("VERSION_1 and MRG_RXBUF are required"));
                }
                let size = queue.size;
                let spec = RingSpec {
                    size,
                    descriptors,
                    available,
                    used,
                    event_idx,
                };
                let ring = Box::new(Ring::new(memory.clone(), &spec).map_err(refused)?);
                let copy = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
                let call = copy(&queue.call).map_err(Error::ReqHandlerError)?;
                let kick = copy(&queue.kick).map_err(Error::ReqHandlerError)?;
                queue.running = true;
                self.mailbox.send(Command::StartRing {
                    queue: index,
                    ring,
                    call,
                    kick,
                });
            }
            _ => {}
        }
        self.tell_state();
        Ok(())
    }

    fn stop(&mut self, index: usize) {
        let ask = |reply: mpsc::Sender<_>| Command::StopRing {
            queue: index,
            reply,
        };
        let base = self.mailbox.ask(ask).flatten();
        if let Some(queue) = self.queues.get_mut(index) {
            queue.running = false;
            queue.base = base.unwrap_or(queue.base);
        }
        self.tell_state();
    }

    pub(super) fn stop_all(&mut self) {
        for index in 0..QUEUES {
            if self.queues[index].running {
                self.stop(index);
            }
        }
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

/// A descriptor shared with the VMM must never make the data path wait, whatever it really is.
fn non_blocking(file: Option<File>) -> Result<Option<File>> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    if let Some(file) = &file {
        let failed = |e: nix::errno::Errno| Error::ReqHandlerError(e.into());
        let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(failed)?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(file.as_fd(), FcntlArg::F_SETFL(flags)).map_err(failed)?;
    }
    Ok(file)
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered.0)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered.0 != 0 {
            return Err(Error::InvalidParam);
        }
        let changed = self.accepted != Features(features);
        self.accepted = Features(features);
        if changed {
            self.mailbox
                .send(Command::Offloads(self.accepted.guest_takes()));
        }
        if !self.accepted.rings_begin_disabled() {
            for index in 0..QUEUES {
                self.queues[index].enabled = true;
                self.settle(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let spec = |r: &VhostUserMemoryRegion| RegionSpec {
            guest: r.guest_phys_addr,
            len: r.memory_size,
            user: r.user_addr,
            offset: r.mmap_offset,
        };
        let table: Vec<_> = table.iter().map(spec).collect();
        let memory = GuestMemory::map(&table, files).map_err(refused)?;
        // Running rings go over to the new memory: they resume where the guest has seen them.
        self.stop_all();
        self.memory = Some(Arc::new(memory));
        for index in 0..QUEUES {
            self.settle(index)?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.queue(index)?.size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.queue(index)?.areas = Some([descriptor, available, used]);
        self.settle(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // Only remembered for the answer: a ring resumes at the used index in guest memory.
        self.queue(index)?.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.queue(index)?.wanted = false;
        self.settle(index as usize)?;
        let queue = self.queue(index)?;
        queue.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(queue.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = non_blocking(fd)?;
        let queue = self.queue(index.into())?;
        queue.kick = kick;
        queue.wanted = true;
        // A new descriptor for a running ring: serve it anew.
        if queue.running {
            self.stop(index.into());
        }
        self.settle(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = non_blocking(fd)?;
        let copy = fd.as_ref().map(File::try_clone).transpose();
        let call = copy.map_err(Error::ReqHandlerError)?;
        let queue = self.queue(index.into())?;
        queue.call = fd;
        if queue.running {
            self.mailbox.send(Command::SetCall {
                queue: index.into(),
                call,
            });
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.queue(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.queue(index)?.enabled = enable;
        self.settle(index as usize)
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(unsupported("no device configuration"))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(unsupported("no device configuration"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(unsupported("not a GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(unsupported("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(unsupported("no in-flight log: chains are used in order"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(unsupported("no in-flight log: chains are used in order"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(unsupported("no memory hot-plug"))
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(unsupported("no memory hot-plug"))
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(unsupported("no memory hot-plug"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(unsupported("no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(unsupported("no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(unsupported("no shared memory regions"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(unsupported("no dirty log"))
    }
}
