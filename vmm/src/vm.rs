//! One virtual machine from nothing to its first instruction: create, wire, start.
//!
//! Threads afterwards: the caller's (`run`: watchdog and signals), `vcpu0`, `trunk` (frames, or the vhost-user connection), `ports`
//! (daemons), `devices` (console), `report` (guest log lines), and for a moment `prefault`. The vCPU thread owns the buses; everything shared with it is an eventfd or
//! an atomic.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use kvm_ioctls::IoEventAddress;
use kvm_ioctls::VmFd;
use sluice_ports::message::Drive;
use sluice_trunk::pair::Inline;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::boot;
use crate::boot::BootError;
use crate::boot::CommandLine;
use crate::bus::Bus;
use crate::bus::BusError;
use crate::config::Backend;
use crate::config::Config;
use crate::config::Prefault;
use crate::event;
use crate::event::EventThread;
use crate::event::Subscriber;
use crate::gauge::Gauge;
use crate::kvm;
use crate::kvm::NoKvm;
use crate::lines::Lines;
use crate::memory;
use crate::memory::GuestRam;
use crate::memory::MemoryError;
use crate::park::ParkPage;
use crate::park::Pulse;
use crate::park::Sleeper;
use crate::ports::ServedPorts;
use crate::report;
use crate::report::ExitPort;
use crate::report::LogPort;
use crate::run::Kept;
use crate::run::Running;
use crate::run::Stop;
use crate::vcpu::Core;
use crate::vcpu::Vcpu;
use crate::vcpu::VcpuError;
use crate::virtio::Device;
use crate::virtio::backend::RingEvents;
use crate::virtio::control;
use crate::virtio::control::Control;
use crate::virtio::here::Here;
use crate::virtio::here::HereError;
use crate::virtio::mmio;
use crate::virtio::mmio::Transport;
use crate::virtio::net;
use crate::virtio::net::Net;
use crate::virtio::net::Server;
use crate::virtio::trunk::Trunk;
use crate::virtio::trunk::TrunkError;

/// Interrupt lines named on the command line; nothing is ever raised on them.
const FIRST_IRQ: usize = 5;

/// The machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Kvm(#[from] NoKvm),
    #[error("cannot create the virtual machine")]
    CreateVm(#[source] kvm_ioctls::Error),
    #[error("cannot wire the queue notifications")]
    Notifications(#[source] kvm_ioctls::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Trunk(#[from] TrunkError),
    #[error("cannot serve the ports")]
    Ports(#[source] io::Error),
    #[error("cannot serve the trunk")]
    Here(#[from] HereError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("devices overlap in the physical map")]
    Bus(#[from] BusError),
    #[error("out of descriptors, threads or memory")]
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
pub struct Vm {
    vm: VmFd,
    ram: Arc<GuestRam>,
    vcpu: Vcpu,
    subscribers: Vec<Subscriber>,
    ports: Option<ServedPorts>,
    quit: Arc<EventFd>,
    stop: Stop,
    watchdog: Option<Duration>,
    prefault: Prefault,
    timings: Timings,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("vcpu", &self.vcpu)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Creates the machine: KVM, RAM, image, devices, vCPU. The guest's report lines go to `lines`. Waits for the trunk's backend as long as the configuration allows.
    ///
    /// # Errors
    /// One cause per variant of [`StartError`], each with what to do about it where that is known.
    pub fn create(config: &Config, lines: &Lines) -> Result<Vm, StartError> {
        let mut timings = Timings::new();
        let kvm = kvm::open(&config.kvm)?;
        timings.step("kvm");
        let ram = Arc::new(GuestRam::create(config.memory, config.hugetlb)?);
        let entry = boot::load_image(&ram, &config.image)?;
        timings.step("image");
        let vm = kvm::create_vm(&kvm).map_err(StartError::CreateVm)?;
        ram.register(&vm)?;
        let mut core = Core::create(&kvm, &vm)?;
        core.collect_port_writes(&vm, report::LOG_PORT);
        timings.step("vm");

        let mut board = Board::new(&vm, &ram)?;
        board.describe_machine(&core)?;
        board.add_trunk(config)?;
        timings.step("trunk");
        board.add_control(config)?;
        for token in &config.cmdline {
            board.command_line.push(token)?;
        }
        tracing::debug!(
            cmdline = board.command_line.text()?,
            entry = entry.address,
            "wired"
        );
        board.command_line.push_seed()?;
        boot::write_parameters(&ram, &board.command_line)?;
        core.enter_at(entry)?;

        let ports = report_ports(lines)?;
        let Board {
            memory_mapped,
            calls,
            subscribers,
            ports: served,
            quit,
            ..
        } = board;
        let stop = Stop {
            flag: Arc::default(),
            event: Arc::new(event::eventfd()?),
        };
        let (served, inline) = served.unzip();
        if let Some(inline) = &inline {
            watch(inline, calls.iter().chain([&stop.event])).map_err(StartError::Ports)?;
        }
        let vcpu = Vcpu {
            core,
            memory_mapped,
            ports,
            sleeper: Sleeper::new(calls, Arc::clone(&stop.event)),
            inline,
            gauge: Gauge::default(),
            pulse: Arc::new(Pulse::default()),
            stop: Arc::clone(&stop.flag),
        };
        timings.step("devices");
        Ok(Vm {
            vm,
            ram,
            vcpu,
            subscribers,
            ports: served,
            quit,
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
    pub fn start(self) -> Result<(Running, Timings), StartError> {
        let mut timings = self.timings;
        if self.prefault == Prefault::Before {
            self.ram.prefault()?;
        }
        timings.step("prefault");
        let ram = Arc::clone(&self.ram);
        let devices = EventThread::start(self.subscribers)?;
        let kept = Kept {
            devices,
            ports: self.ports,
            quit: self.quit,
            vm: self.vm,
            ram: self.ram,
        };
        let running = Running::start(self.vcpu, self.stop, self.watchdog, kept)?;
        if self.prefault == Prefault::Background {
            // Last: it holds the lock that every new thread's stack needs.
            memory::prefault_in_background(&ram)?;
        }
        timings.step("threads");
        Ok((running, timings))
    }
}

/// Devices while they are being put on the bus, and the command line that names them.
struct Board<'a> {
    vm: &'a VmFd,
    ram: &'a Arc<GuestRam>,
    memory_mapped: Bus,
    calls: Vec<Arc<EventFd>>,
    subscribers: Vec<Subscriber>,
    devices: usize,
    command_line: CommandLine,
    ports: Option<(ServedPorts, Inline)>,
    quit: Arc<EventFd>,
}

impl<'a> Board<'a> {
    fn new(vm: &'a VmFd, ram: &'a Arc<GuestRam>) -> Result<Board<'a>, StartError> {
        Ok(Board {
            vm,
            ram,
            memory_mapped: Bus::default(),
            calls: Vec::new(),
            subscribers: Vec::new(),
            devices: 0,
            command_line: CommandLine::new()?,
            ports: None,
            quit: Arc::new(event::eventfd()?),
        })
    }

    fn describe_machine(&mut self, core: &Core) -> Result<(), StartError> {
        let page = memory::PARK_PAGE;
        self.memory_mapped
            .insert(page, memory::PARK_PAGE_SIZE, Box::new(ParkPage))?;
        self.command_line.push(&format!("sluice.park={page:#x}"))?;
        if let Some(khz) = core.tsc_khz() {
            self.command_line.push(&format!("sluice.tsc_khz={khz}"))?;
        }
        Ok(())
    }

    fn add_trunk(&mut self, config: &Config) -> Result<(), StartError> {
        let rings = ring_events::<{ net::QUEUES }>()?;
        let server = if let Some(listener) = &config.listener {
            Server::Here(self.serve_ports(config, listener.clone(), &rings)?)
        } else if let Some(Backend(path)) = &config.trunk {
            Server::Backend(Trunk::connect(
                path.clone(),
                config.connect_timeout,
                Arc::clone(self.ram),
                rings.to_vec(),
            )?)
        } else {
            return Ok(());
        };
        self.add(Box::new(Net::new(server)), &rings)
    }

    fn serve_ports(
        &mut self,
        config: &Config,
        listener: Arc<OwnedFd>,
        rings: &[RingEvents],
    ) -> Result<Here, StartError> {
        let identity = config
            .ports
            .identity("sluice-vmm", env!("CARGO_PKG_VERSION"));
        let wake = Arc::new(event::eventfd()?);
        self.calls.push(Arc::clone(&wake));
        let tell = tell(Arc::clone(self.ram), wake);
        let served = ServedPorts::start(listener, identity, config.drive, tell, self.quit.clone());
        let (ports, inline) = served.map_err(StartError::Ports)?;
        let here = Here::new(
            ports.pair().mailbox().clone(),
            ports.pair().driving().clone(),
            self.ram,
            rings.to_vec(),
            config.ports.taps,
        )?;
        self.command_line
            .push(&format!("sluice.advice={:#x}", memory::ADVICE))?;
        self.ports = Some((ports, inline));
        Ok(here)
    }

    fn add_control(&mut self, config: &Config) -> Result<(), StartError> {
        let Some(path) = &config.control else {
            return Ok(());
        };
        let rings = ring_events::<{ control::QUEUES }>()?;
        let memory = self.ram.memory().clone();
        let (device, subscriber) = Control::new(path.clone(), memory, rings.clone())?;
        self.subscribers.push(subscriber);
        self.add(Box::new(device), &rings)
    }

    /// Puts a device on the bus: registers, notifications without exits, wake-ups, and its token on the command line.
    fn add(&mut self, device: Box<dyn Device>, rings: &[RingEvents]) -> Result<(), StartError> {
        let address = memory::VIRTIO + self.devices as u64 * memory::VIRTIO_STRIDE;
        let irq = FIRST_IRQ + self.devices;
        for (index, ring) in (0_u32..).zip(rings) {
            let register = IoEventAddress::Mmio(address + mmio::QUEUE_NOTIFY);
            self.vm
                .register_ioevent(&ring.kick, &register, index)
                .map_err(StartError::Notifications)?;
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

/// Writes into guest memory whether frames move while the guest runs, and wakes a guest's thread that sleeps on its own.
fn tell(ram: Arc<GuestRam>, wake: Arc<EventFd>) -> Box<dyn Fn(Drive) + Send + Sync> {
    Box::new(move |drive| {
        let polls = u32::from(drive == Drive::Apart);
        // The word lies in RAM, whatever its size.
        if let Err(error) = ram.memory().write_obj(polls, GuestAddress(memory::ADVICE)) {
            tracing::error!(%error, "the guest does not learn who moves frames");
        }
        event::signal(&wake);
    })
}

fn watch<'a>(inline: &Inline, events: impl Iterator<Item = &'a Arc<EventFd>>) -> io::Result<()> {
    for event in events {
        inline.watch(event::fd(event))?;
    }
    Ok(())
}

fn report_ports(lines: &Lines) -> Result<Bus, BusError> {
    let mut ports = Bus::default();
    ports.insert(report::LOG_PORT, 1, Box::new(LogPort::new(lines.clone())))?;
    ports.insert(report::EXIT_PORT, 4, Box::new(ExitPort))?;
    Ok(ports)
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
