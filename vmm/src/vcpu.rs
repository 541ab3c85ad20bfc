//! One virtual CPU: its first state, and the one loop around `KVM_RUN`.
//!
//! Exits are dear (up to 25 µs on a host with a software KVM), so no packet causes one: queue notifications are ioeventfds. What
//! remains is set-up, parking, heartbeats and reports. Where this process serves the trunk, a guest that parks gives this thread
//! the time to move frames, and finds the next ones when it goes on.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_bindings::CpuId;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use sluice_trunk::pair::Inline;
use sluice_trunk::pair::Rest;

use crate::boot::Entry;
use crate::bus::Bus;
use crate::bus::Effect;
use crate::exit::Ending;
use crate::exit::Failure;
use crate::exit::Registers;
use crate::gauge::Gauge;
use crate::memory::START_INFO;
use crate::park::Pulse;
use crate::park::Sleeper;
use crate::park::Wake;

const CR0_PROTECTED_MODE: u64 = 1;
/// Bit 1 is always one.
const RFLAGS_RESERVED: u64 = 2;

/// A virtual CPU cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the virtual CPU ({step})")]
pub struct VcpuError {
    step: &'static str,
    source: kvm_ioctls::Error,
}

fn at(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuError {
    move |source| VcpuError { step, source }
}

/// The bare vCPU, before it has anything to talk to.
#[derive(Debug)]
pub struct Core {
    fd: VcpuFd,
}

impl Core {
    /// Creates vCPU 0 with the host's features, without a local APIC.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create(kvm: &Kvm, vm: &VmFd) -> Result<Core, VcpuError> {
        let fd = vm.create_vcpu(0).map_err(at("create"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(at("features"))?;
        fd.set_cpuid2(&without_apic(cpuid))
            .map_err(at("set features"))?;
        Ok(Core { fd })
    }

    /// Lets the kernel collect the bytes of a write-only port and hand them over at the next exit, instead of one exit each:
    /// a boot line of 200 bytes costs 5 ms otherwise where an exit costs 25 µs. Older kernels go on with exits.
    pub fn collect_port_writes(&mut self, vm: &VmFd, port: u64) {
        let collected = vm
            .register_coalesced_mmio(IoEventAddress::Pio(port), 1)
            .and_then(|()| self.fd.map_coalesced_mmio_ring());
        if let Err(error) = collected {
            tracing::debug!(%error, "port writes are not collected");
        }
    }

    /// The TSC frequency that the guest sees, where KVM knows it.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// Points the vCPU at the image: 32-bit protected mode, flat segments, paging off, `ebx` = start info (Xen's PVH ABI).
    ///
    /// # Errors
    /// KVM refuses.
    pub fn enter_at(&self, entry: Entry) -> Result<(), VcpuError> {
        let mut system = self.fd.get_sregs().map_err(at("read segments"))?;
        let code = flat_segment(0x08, 0xb);
        let data = flat_segment(0x10, 0x3);
        system.cs = code;
        for segment in [
            &mut system.ds,
            &mut system.es,
            &mut system.fs,
            &mut system.gs,
            &mut system.ss,
        ] {
            *segment = data;
        }
        system.tr = kvm_segment {
            limit: 0x67,
            s: 0,
            g: 0,
            db: 0,
            ..flat_segment(0x18, 0xb)
        };
        system.cr0 = CR0_PROTECTED_MODE;
        system.cr3 = 0;
        system.cr4 = 0;
        system.efer = 0;
        self.fd.set_sregs(&system).map_err(at("set segments"))?;
        let registers = kvm_regs {
            rip: entry.address,
            rbx: START_INFO,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        self.fd.set_regs(&registers).map_err(at("set registers"))
    }
}

fn flat_segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// There is no interrupt controller of any kind: a guest must not believe in a local APIC, x2APIC or MONITOR.
fn without_apic(mut cpuid: CpuId) -> CpuId {
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx &= !((1 << 3) | (1 << 21) | (1 << 24));
            entry.ecx |= 1 << 31; // a hypervisor is present
            entry.edx &= !(1 << 9);
            entry.ebx &= 0x0000_ffff; // APIC id 0, one logical processor
        }
    }
    cpuid
}

/// How often the guest was left, by reason. On the packet path none of these may grow with packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exits {
    pub registers: u64,
    pub ports: u64,
    pub signals: u64,
    pub parks: u64,
    pub heartbeats: u64,
}

/// A vCPU with everything it talks to; consumed by [`Vcpu::run`] on its own thread.
#[derive(Debug)]
pub struct Vcpu {
    pub core: Core,
    pub memory_mapped: Bus,
    pub ports: Bus,
    pub sleeper: Sleeper,
    /// Moves frames while the guest rests, where this process serves the trunk.
    pub inline: Option<Inline>,
    pub pulse: Arc<Pulse>,
    pub gauge: Gauge,
    /// Raised (with a signal to this thread) to end the run.
    pub stop: Arc<AtomicBool>,
}

impl Vcpu {
    /// Runs the guest until it ends, one way or another.
    pub fn run(mut self) -> Ending {
        let mut exits = Exits::default();
        self.pulse.run();
        let ending = loop {
            if self.stop.load(Ordering::Acquire) {
                break Ending::Stopped;
            }
            match self.run_once(&mut exits) {
                Effect::Continue => {}
                Effect::Heartbeat => {
                    exits.heartbeats += 1;
                    self.pulse.beat();
                }
                Effect::Park(limit) => {
                    exits.parks += 1;
                    self.pulse.rest();
                    let wake = self.rest(limit);
                    self.pulse.run();
                    if wake == Wake::Stop {
                        break Ending::Stopped;
                    }
                }
                Effect::End(ending) => break ending,
            }
        };
        self.pulse.rest();
        let unclaimed = self.memory_mapped.unclaimed() + self.ports.unclaimed();
        tracing::debug!(?exits, unclaimed, "the guest is done");
        ending
    }

    /// The guest has nothing to do.
    fn rest(&mut self, limit: Option<Duration>) -> Wake {
        let Some(inline) = &mut self.inline else {
            return self.sleeper.sleep(limit);
        };
        match inline.rest(limit) {
            Rest::Apart => self.sleeper.sleep(limit),
            // Takes what was signalled meanwhile, or the next rest would end at once.
            Rest::Frames | Rest::Other => self.sleeper.sleep(Some(Duration::ZERO)),
        }
    }

    fn run_once(&mut self, exits: &mut Exits) -> Effect {
        let begin = self.gauge.begin();
        let left = leave(
            &mut self.core.fd,
            exits,
            &mut self.memory_mapped,
            &mut self.ports,
        );
        if let Some(cost) = begin.and_then(|begin| self.gauge.end(begin, exits.registers))
            && let Some(inline) = &self.inline
        {
            tracing::debug!(?cost, "leaving the guest and entering it again");
            inline.exit_costs(cost);
        }
        // What the kernel has collected was written before this exit, and must be seen before it.
        while let Ok(Some(written)) = self.core.fd.coalesced_mmio_read() {
            let length = usize::try_from(written.len).unwrap_or(0);
            let bytes = written.data.get(..length).unwrap_or_default();
            self.ports.write(written.phys_addr, bytes);
        }
        match left {
            Left::Again => Effect::Continue,
            Left::WroteMemory(address, bytes) => self.memory_mapped.write(address, &bytes),
            Left::WrotePort(port, bytes) => self.ports.write(port, &bytes),
            Left::Failed(cause) => {
                let registers = self.registers().map(Box::new);
                Effect::End(Ending::Failed { cause, registers })
            }
        }
    }

    fn registers(&self) -> Option<Registers> {
        let general = self.core.fd.get_regs().ok()?;
        let system = self.core.fd.get_sregs().ok()?;
        let hex = |value: u64| format!("{value:#x}");
        Some(Registers {
            rip: hex(general.rip),
            rsp: hex(general.rsp),
            rflags: hex(general.rflags),
            cs: hex(system.cs.selector.into()),
            cr0: hex(system.cr0),
            cr2: hex(system.cr2),
            cr3: hex(system.cr3),
            cr4: hex(system.cr4),
            efer: hex(system.efer),
        })
    }
}

/// Why the guest was left, with everything copied out of the page shared with the kernel.
enum Left {
    /// Nothing (more) to do.
    Again,
    WroteMemory(u64, Vec<u8>),
    WrotePort(u64, Vec<u8>),
    Failed(Failure),
}

/// Enters the guest and comes back. Reads are answered at once: their answer belongs into that page.
fn leave(fd: &mut VcpuFd, exits: &mut Exits, memory_mapped: &mut Bus, ports: &mut Bus) -> Left {
    let cause = match fd.run() {
        Ok(VcpuExit::MmioWrite(address, bytes)) => {
            exits.registers += 1;
            return Left::WroteMemory(address, bytes.to_vec());
        }
        Ok(VcpuExit::MmioRead(address, bytes)) => {
            exits.registers += 1;
            memory_mapped.read(address, bytes);
            return Left::Again;
        }
        Ok(VcpuExit::IoOut(port, bytes)) => {
            exits.ports += 1;
            return Left::WrotePort(port.into(), bytes.to_vec());
        }
        Ok(VcpuExit::IoIn(port, bytes)) => {
            exits.ports += 1;
            ports.read(port.into(), bytes);
            return Left::Again;
        }
        Ok(VcpuExit::Intr) => return Left::Again,
        Ok(VcpuExit::Shutdown) => Failure::TripleFault,
        Ok(VcpuExit::Hlt) => Failure::Halted,
        Ok(VcpuExit::FailEntry(reason, _cpu)) => Failure::EntryFailed(reason),
        Ok(VcpuExit::InternalError) => Failure::Internal,
        Ok(other) => Failure::UnexpectedExit(format!("{other:?}")),
        Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
            exits.signals += 1;
            return Left::Again;
        }
        Err(error) => Failure::RunFailed(error.to_string()),
    };
    Left::Failed(cause)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn the_guest_is_told_of_a_hypervisor_and_of_no_apic() {
        let leaf = kvm_cpuid_entry2 {
            function: 1,
            ebx: u32::MAX,
            ecx: 0x7fff_ffff,
            edx: u32::MAX,
            ..Default::default()
        };
        let other = kvm_cpuid_entry2 {
            function: 7,
            ecx: u32::MAX,
            ..Default::default()
        };
        let cpuid = without_apic(CpuId::from_entries(&[leaf, other]).unwrap());
        let [leaf, other] = cpuid.as_slice() else {
            panic!("two leaves")
        };
        assert_eq!(leaf.ecx >> 31, 1);
        assert_eq!(leaf.ecx & (1 << 21 | 1 << 24 | 1 << 3), 0);
        assert_eq!(leaf.edx & (1 << 9), 0);
        assert_eq!(leaf.ebx >> 16, 0);
        assert_eq!(other.ecx, u32::MAX);
    }
}
