//! One virtual machine from start to end: create, wire, start, watch, stop.
//!
//! Threads: this one (watchdog and signals), `vcpu0`, `trunk` (vhost-user), `devices` (console), `report` (guest log lines), and
//! for a moment `prefault`. The vCPU thread owns the buses; everything shared with it is an eventfd or an atomic.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use kvm_ioctls::Cap;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::Kvm;
use kvm_ioctls::VmFd;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::Killable;
use vmm_sys_util::signal::SIGRTMIN;
use vmm_sys_util::signal::register_signal_handler;

use crate::boot;
use crate::boot::BootError;
use crate::boot::CommandLine;
use crate::bus::Bus;
use crate::bus::BusError;
use crate::config::Config;
use crate::config::Prefault;
use crate::event;
use crate::event::EventThread;
use crate::event::Subscriber;
use crate::exit::Ending;
use crate::memory;
use crate::memory::GuestRam;
use crate::memory::MemoryError;
use crate::park::ParkPage;
use crate::park::Pulse;
use crate::park::Sleeper;
use crate::park::Watchdog;
use crate::report;
use crate::report::ExitPort;
use crate::report::LineWriter;
use crate::report::LogPort;
use crate::vcpu::Core;
use crate::vcpu::Vcpu;
use crate::vcpu::VcpuError;
use crate::virtio::Device;
use crate::virtio::backend::RingEvents;
use crate::virtio::control;
use crate::virtio::control::Control;
use crate::virtio::mmio;
use crate::virtio::mmio::Transport;
use crate::virtio::net;
use crate::virtio::net::Net;
use crate::virtio::trunk::Trunk;
use crate::virtio::trunk::TrunkError;

/// The only version of the KVM interface there has ever been.
const KVM_API_VERSION: i32 = 12;
/// Interrupt lines named on the command line; nothing is ever raised on them.
const FIRST_IRQ: usize = 5;
/// How long a vCPU may take to leave the guest when asked.
const STOP_TIME: Duration = Duration::from_secs(1);

/// The machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "cannot use KVM: {path}: {reason}; without KVM the same image runs under QEMU (TCG), see docs/machine.md"
    )]
    NoKvm { path: PathBuf, reason: String },
    #[error("cannot create the virtual machine")]
    CreateVm(#[source] kvm_ioctls::Error),
    #[error("cannot wire {what}")]
    Wire {
        what: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Trunk(#[from] TrunkError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("devices overlap in the physical map")]
    Bus(#[from] BusError),
    #[error("out of descriptors or threads")]
    Host(#[from] io::Error),
}

/// How long each step of the start took.
#[derive(Debug)]
pub struct Timings {
    last: Instant,
    steps: Vec<(&'static str, Duration)>,
}

impl Timings {
    fn new() -> Timings {
        Timings {
            last: Instant::now(),
            steps: Vec::new(),
        }
    }

    fn step(&mut self, name: &'static str) {
        let now = Instant::now();
        self.steps.push((name, now - self.last));
        self.last = now;
    }

    /// `{"vmm":"timings","kvm_us":…,…,"total_us":…}`
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = serde_json::Map::new();
        line.insert("vmm".into(), "timings".into());
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        for (name, time) in &self.steps {
            line.insert(format!("{name}_us"), micros(*time).into());
        }
        let total = self.steps.iter().map(|(_, time)| *time).sum();
        line.insert("total_us".into(), micros(total).into());
        serde_json::Value::Object(line).to_string()
    }
}

/// A machine that is ready to run.
#[derive(Debug)]
pub struct Vm {
    vm: VmFd,
    ram: Arc<GuestRam>,
    vcpu: Vcpu,
    subscribers: Vec<Subscribed>,
    writer: LineWriter,
    stop: Stop,
    watchdog: Option<Duration>,
    prefault: Prefault,
    timings: Timings,
}

struct Subscribed(Subscriber);

impl std::fmt::Debug for Subscribed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Subscriber")
    }
}

/// What ends a vCPU's run, wherever it is.
#[derive(Debug, Clone)]
struct Stop {
    flag: Arc<AtomicBool>,
    event: Arc<EventFd>,
}

/// Devices while they are being put on the bus.
struct Board<'a> {
    vm: &'a VmFd,
    ram: &'a Arc<GuestRam>,
    memory_mapped: Bus,
    calls: Vec<Arc<EventFd>>,
    devices: usize,
    command_line: CommandLine,
}

impl Vm {
    /// Creates the machine: KVM, RAM, image, devices, vCPU. Waits for the trunk's backend as long as the configuration allows.
    ///
    /// # Errors
    /// One cause per variant of [`StartError`], each with what to do about it where that is known.
    pub fn create(config: &Config) -> Result<Vm, StartError> {
        let mut timings = Timings::new();
        let kvm = open_kvm(&config.kvm)?;
        timings.step("kvm");
        let ram = Arc::new(GuestRam::create(config.memory, config.hugetlb)?);
        let entry = boot::load_image(&ram, &config.image)?;
        timings.step("image");
        let vm = create_vm(&kvm)?;
        ram.register(&vm)?;
        let core = Core::create(&kvm, &vm)?;
        timings.step("vm");

        let mut board = Board {
            vm: &vm,
            ram: &ram,
            memory_mapped: Bus::default(),
            calls: Vec::new(),
            devices: 0,
            command_line: CommandLine::new()?,
        };
        board.memory_mapped.insert(
            memory::PARK_PAGE,
            memory::PARK_PAGE_SIZE,
            Box::new(ParkPage),
        )?;
        board
            .command_line
            .push(&format!("sluice.park={:#x}", memory::PARK_PAGE))?;
        if let Some(khz) = core.tsc_khz() {
            board.command_line.push(&format!("sluice.tsc_khz={khz}"))?;
        }
        if let Some(path) = &config.trunk {
            let rings = ring_events::<{ net::QUEUES }>()?;
            let trunk = Trunk::connect(
                path.clone(),
                config.connect_timeout,
                Arc::clone(&ram),
                rings.to_vec(),
            )?;
            board.add(Box::new(Net::new(trunk)), &rings)?;
        }
        timings.step("trunk");
        let mut subscribers = Vec::new();
        if let Some(path) = &config.control {
            let rings = ring_events::<{ control::QUEUES }>()?;
            let memory = ram.memory().clone();
            let (device, subscriber) = Control::new(path.clone(), memory, rings.clone())?;
            board.add(Box::new(device), &rings)?;
            subscribers.push(Subscribed(subscriber));
        }
        for token in &config.cmdline {
            board.command_line.push(token)?;
        }
        boot::write_parameters(&ram, &board.command_line)?;
        core.enter_at(entry)?;
        tracing::debug!(
            cmdline = board.command_line.text()?,
            entry = entry.address,
            "wired"
        );

        let (lines, writer) = LineWriter::start(io::stderr())?;
        let mut ports = Bus::default();
        ports.insert(report::LOG_PORT, 1, Box::new(LogPort::new(lines)))?;
        ports.insert(report::EXIT_PORT, 4, Box::new(ExitPort))?;
        let stop = Stop {
            flag: Arc::default(),
            event: Arc::new(event::eventfd()?),
        };
        let Board {
            memory_mapped,
            calls,
            ..
        } = board;
        let vcpu = Vcpu {
            core,
            memory_mapped,
            ports,
            sleeper: Sleeper::new(calls, Arc::clone(&stop.event)),
            pulse: Arc::new(Pulse::default()),
            stop: Arc::clone(&stop.flag),
        };
        timings.step("devices");
        Ok(Vm {
            vm,
            ram,
            vcpu,
            subscribers,
            writer,
            stop,
            watchdog: config.watchdog,
            prefault: config.prefault,
            timings,
        })
    }

    /// Pre-faults as configured and starts all threads; the guest runs when this returns.
    ///
    /// # Errors
    /// The host is out of threads or memory.
    pub fn start(mut self) -> Result<Running, StartError> {
        match self.prefault {
            Prefault::Before => self.ram.prefault()?,
            Prefault::Background => memory::prefault_in_background(&self.ram)?,
            Prefault::Never => {}
        }
        self.timings.step("prefault");
        let subscribers: Vec<Subscriber> = self.subscribers.into_iter().map(|s| s.0).collect();
        let devices = EventThread::start(subscribers)?;
        register_kick()?;
        let pulse = Arc::clone(&self.vcpu.pulse);
        let done = Arc::new(event::eventfd()?);
        let vcpu = self.vcpu;
        let finished = Arc::clone(&done);
        let begin = Instant::now();
        let thread = thread::Builder::new().name("vcpu0".into()).spawn(move || {
            let ending = vcpu.run();
            event::signal(&finished);
            ending
        })?;
        self.timings.step("threads");
        Ok(Running {
            thread: Some(thread),
            done,
            pulse,
            stop: self.stop,
            watchdog: self.watchdog.map(Watchdog::new),
            writer: self.writer,
            timings: self.timings,
            begin,
            _devices: devices,
            _vm: self.vm,
            _ram: self.ram,
        })
    }
}

impl Board<'_> {
    /// Puts a device on the bus: registers, notifications without exits, wake-ups, and its token on the command line.
    fn add(&mut self, device: Box<dyn Device>, rings: &[RingEvents]) -> Result<(), StartError> {
        let address = memory::VIRTIO + self.devices as u64 * memory::VIRTIO_STRIDE;
        let irq = FIRST_IRQ + self.devices;
        for (index, ring) in (0_u32..).zip(rings) {
            let register = IoEventAddress::Mmio(address + mmio::QUEUE_NOTIFY);
            self.vm
                .register_ioevent(&ring.kick, &register, index)
                .map_err(|source| StartError::Wire {
                    what: "queue notifications",
                    source,
                })?;
            self.calls.push(Arc::clone(&ring.call));
        }
        let transport = Transport::new(device, Arc::clone(self.ram));
        self.memory_mapped
            .insert(address, memory::VIRTIO_SIZE, Box::new(transport))?;
        let size = memory::VIRTIO_SIZE;
        self.command_line
            .push(&format!("virtio_mmio.device={size}@{address:#x}:{irq}"))?;
        self.devices += 1;
        Ok(())
    }
}

/// A machine whose guest runs.
#[derive(Debug)]
pub struct Running {
    thread: Option<JoinHandle<Ending>>,
    done: Arc<EventFd>,
    pulse: Arc<Pulse>,
    stop: Stop,
    watchdog: Option<Watchdog>,
    writer: LineWriter,
    timings: Timings,
    begin: Instant,
    _devices: EventThread,
    // Dropped last: nothing may enter the guest or touch its memory without them.
    _vm: VmFd,
    _ram: Arc<GuestRam>,
}

impl Running {
    /// How long the start took.
    #[must_use]
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// Watches the guest until it ends by itself, the watchdog ends it, or `stop_request` becomes readable.
    /// Returns the ending and how long the guest lived.
    pub fn wait(mut self, stop_request: &OwnedFd) -> (Ending, Duration) {
        let asked = self.watch(stop_request);
        let ended = self.stop_vcpu();
        let uptime = self.begin.elapsed();
        if !self.writer.finish() {
            tracing::warn!("standard error is not read, the guest's last lines are lost");
        }
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
            ];
            // An interrupted poll is as good as an early tick.
            let _ = poll(&mut fds, period.as_ref());
            let [done, stop] = fds.map(|fd| !fd.revents().is_empty());
            if done {
                return None;
            }
            if stop {
                return Some(Ending::Stopped);
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

fn open_kvm(path: &Path) -> Result<Kvm, StartError> {
    let no_kvm = |reason: String| StartError::NoKvm {
        path: path.to_path_buf(),
        reason,
    };
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| no_kvm("the path contains a zero byte".into()))?;
    let kvm = Kvm::new_with_path(&name).map_err(|error| no_kvm(kvm_reason(error.errno())))?;
    if kvm.get_api_version() != KVM_API_VERSION {
        return Err(no_kvm("this is no KVM device".into()));
    }
    for (capability, name) in [
        (Cap::UserMemory, "user memory"),
        (Cap::Ioeventfd, "ioeventfd"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(no_kvm(format!("the host's KVM has no {name}")));
        }
    }
    Ok(kvm)
}

fn kvm_reason(errno: i32) -> String {
    match errno {
        libc::ENOENT => {
            "it does not exist (no hardware virtualisation, or the kvm module is not loaded)".into()
        }
        libc::EACCES | libc::EPERM => {
            "no permission (add the user to the group \"kvm\", or start as root)".into()
        }
        errno => io::Error::from_raw_os_error(errno).to_string(),
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, StartError> {
    loop {
        match kvm.create_vm() {
            // Creation waits for locks inside the kernel, and any signal interrupts that.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(StartError::CreateVm),
        }
    }
}

fn ring_events<const N: usize>() -> io::Result<[RingEvents; N]> {
    let mut rings = Vec::with_capacity(N);
    for _ in 0..N {
        let (kick, call) = (Arc::new(event::eventfd()?), Arc::new(event::eventfd()?));
        rings.push(RingEvents { kick, call });
    }
    rings
        .try_into()
        .map_err(|_| io::ErrorKind::InvalidData.into())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kvm_is_told_from_a_forbidden_one_and_both_point_to_qemu() {
        for (errno, word) in [
            (libc::ENOENT, "does not exist"),
            (libc::EACCES, "no permission"),
        ] {
            let error = StartError::NoKvm {
                path: "/dev/kvm".into(),
                reason: kvm_reason(errno),
            }
            .to_string();
            assert!(error.contains("/dev/kvm"), "{error}");
            assert!(error.contains(word), "{error}");
            assert!(error.contains("QEMU"), "{error}");
            assert!(error.contains("docs/machine.md"), "{error}");
        }
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        for path in ["/does/not/exist", "/dev/null"] {
            let error = open_kvm(Path::new(path)).unwrap_err();
            assert!(matches!(error, StartError::NoKvm { .. }), "{error}");
        }
    }
}
