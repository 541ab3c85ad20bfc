//! `sluice-process`: the appliance as a plain process over the same ports and the same control channel, for nodes without KVM.
//!
//! The code is the image's: its rings, buffers and loop (`sluice-guest`), and the dataplane. What differs is the machine below
//! (`machine`) and where the memory comes from (`memory`). There is no virtual machine around it: what isolates it is what
//! isolates any process.

mod machine;
mod memory;

use std::error::Error;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::Parser;
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use sluice_appliance::session::Facts;
use sluice_appliance::{Arena, Capacity, Pipeline};
use sluice_guest::console::{self, Console};
use sluice_guest::control::Control;
use sluice_guest::features::{self, F_MRG_RXBUF};
use sluice_guest::memory::Memory;
use sluice_guest::net::{self, Trunk};
use sluice_guest::run::Loop;
use sluice_guest::transport::F_VERSION_1;
use sluice_guest::virtqueue::{Areas, QUEUE_SIZE, Ring};
use sluice_ports::args::PortsArgs;
use sluice_ports::message::Drive;
use sluice_trunk::policy::Wish;
use sluice_vmm::config::Size;
use sluice_vmm::event::{self, EventThread};
use sluice_vmm::park::Sleeper;
use sluice_vmm::ports::ServedPorts;
use sluice_vmm::virtio::backend::{Activation, RingEvents};
use sluice_vmm::virtio::here::Here;
use sluice_vmm::virtio::{Device, QueueLayout, control};

use self::machine::Process;
use self::memory::Room;

/// Less holds no tables worth having.
const LEAST: u64 = 16 << 20;
/// The console's device serves no larger ring.
const CONSOLE_RING: u16 = 128;
/// The appliance's loop has its rings' private halves on its stack.
const STACK: usize = 16 << 20;

/// Runs one Sluice appliance as a process, without a virtual machine around it.
///
/// The dataplane is the one of the virtual machine's image. It isolates less: it runs under the host's kernel, and what keeps it
/// from the rest of the host is what keeps any process from it.
#[derive(Debug, Parser)]
#[command(name = "sluice-process", version, max_term_width = 100)]
struct CommandLine {
    /// Memory for tables and packets, like 64M or 1G
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    memory: Size,

    /// Unix socket that carries the control channel; without it the appliance forwards nothing
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,

    #[command(flatten)]
    ports: PortsArgs,
}

fn main() -> ExitCode {
    let line = CommandLine::parse();
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    match run(line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text.push_str(": ");
                text.push_str(&error.to_string());
                cause = error.source();
            }
            // Nothing is left to be done about a standard error that takes nothing.
            let _ = writeln!(io::stderr(), "sluice-process: cannot start: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(line: CommandLine) -> Result<(), Box<dyn Error>> {
    let listener = line
        .ports
        .listener()
        .map_err(|error| format!("--ports cannot be used: {error}"))?;
    rustix::thread::set_no_new_privs(true)?;
    keep_memory_private()?;
    let Size(bytes) = line.memory;
    if bytes < LEAST {
        let text = format!("--memory must be {} MiB or more", LEAST >> 20);
        return Err(text.into());
    }
    let stop = stop_request()?;
    let quit = Arc::new(event::eventfd()?);
    let Room {
        memory,
        engine,
        devices: device_memory,
    } = Room::take(bytes)?;
    let mut parts = Parts {
        memory,
        here: None,
        console: None,
        facts: Facts {
            image: image_id(&line.ports.build),
            ram_mib: u32::try_from(bytes >> 20).unwrap_or(u32::MAX),
        },
    };
    let (mut calls, mut console_events) = (Vec::new(), Vec::new());
    let mut inline = None;
    // Their end is the end of the process.
    let mut served = None;
    let mut subscribers = Vec::new();
    if let Some(listener) = listener {
        let identity = line
            .ports
            .identity("sluice-process", env!("CARGO_PKG_VERSION"));
        let wish = Wish::Always(Drive::Inline);
        let tell = Box::new(|_| {});
        let (ports, guest) =
            ServedPorts::start(Arc::new(listener), identity, wish, tell, quit.clone())?;
        let events = ring_events()?;
        calls.extend(events.iter().map(|events| Arc::clone(&events.call)));
        parts.here = Some(Here::over(
            ports.pair().mailbox().clone(),
            ports.pair().driving().clone(),
            engine,
            events,
            line.ports.taps,
        ));
        (inline, served) = (Some(guest), Some(ports));
    }
    if let Some(path) = line.control {
        console_events = ring_events()?;
        calls.extend(console_events.iter().map(|events| Arc::clone(&events.call)));
        let events = <[RingEvents; 2]>::try_from(console_events.clone());
        let events = events.map_err(|_| "the console has two queues")?;
        let (device, subscriber) = control::Control::new(path, device_memory, events)?;
        parts.console = Some(device);
        subscribers.push(subscriber);
    }
    let devices = EventThread::start(subscribers)?;
    let stopped = Arc::new(event::eventfd()?);
    if let Some(inline) = &inline {
        for call in calls.iter().chain([&stopped]) {
            inline.watch(event::fd(call))?;
        }
    }
    let machine = Process::new(inline, Sleeper::new(calls, stopped), &console_events);
    let mut seed = [0; 16];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
    let done = Arc::new(event::eventfd()?);
    let finished = Arc::clone(&done);
    thread::Builder::new()
        .name("appliance".into())
        .stack_size(STACK)
        .spawn(move || {
            if let Err(error) = parts.run(machine, seed) {
                tracing::error!(%error, "the appliance cannot start");
            }
            event::signal(&finished);
        })?;
    tracing::info!(
        memory_mib = bytes >> 20,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    wait(&stop, &quit, &done);
    // The appliance's thread works in memory that is never given back: the process ends around it.
    drop((served, devices));
    Ok(())
}

/// What the appliance's thread puts together.
struct Parts {
    memory: Memory,
    here: Option<Here>,
    console: Option<control::Control>,
    facts: Facts,
}

/// The memory does not suffice.
#[derive(Debug, thiserror::Error)]
enum TooSmall {
    #[error("the memory is too small for the rings of the {0}")]
    Rings(&'static str),
    #[error("the memory is too small for the tables")]
    Tables,
}

impl Parts {
    /// Runs until the control channel asks for the end.
    fn run(mut self, machine: Process, seed: [u8; 16]) -> Result<(), TooSmall> {
        let trunk = self.here.take().map(|here| {
            let trunk = self.trunk(&here);
            trunk.ok_or(TooSmall::Rings("trunk"))
        });
        let trunk = trunk.transpose()?;
        let console = self.console.take().map(|mut device| {
            let console = self.console(&mut device);
            // The device answers for as long as its subscriber is served.
            console.ok_or(TooSmall::Rings("console"))
        });
        let control = console
            .transpose()?
            .map(|console| Control::new(console, self.facts));
        let mut arena = Arena::new(self.memory.rest());
        let capacity = Capacity::fitting(arena.left());
        let pipeline = Pipeline::new(&mut arena, capacity, seed).map_err(|_| TooSmall::Tables)?;
        Loop::new(machine, trunk, control, pipeline).run();
        Ok(())
    }

    /// The features that both ends know, and rings that the engine serves.
    fn trunk(&mut self, here: &Here) -> Option<Trunk<'static>> {
        let offered = here.features();
        let features = features::choose_features(offered) | F_MRG_RXBUF | F_VERSION_1;
        let rings = [self.memory.ring()?, self.memory.ring()?];
        let pages = self.memory.pages(net::BUFFERS)?;
        let size = u16::try_from(QUEUE_SIZE).ok()?;
        let trunk = Trunk::new(rings, [size; 2], features, pages)?;
        here.start(&Activation {
            features,
            queues: rings.map(|ring| layout(ring, size)).to_vec(),
        });
        Some(trunk)
    }

    fn console(&mut self, device: &mut control::Control) -> Option<Console<'static>> {
        let features = console::choose_features(device.features()) | F_VERSION_1;
        let rings = [self.memory.ring()?, self.memory.ring()?];
        let pages = self.memory.pages(console::BUFFERS)?;
        let console = Console::new(rings, [CONSOLE_RING; 2], features, pages)?;
        device.activate(features, &rings.map(|ring| layout(ring, CONSOLE_RING)));
        Some(console)
    }
}

fn layout(ring: &Ring, size: u16) -> QueueLayout {
    let Areas {
        descriptors,
        available,
        used,
    } = ring.areas();
    QueueLayout {
        size,
        descriptors,
        driver: available,
        device: used,
    }
}

fn ring_events() -> io::Result<Vec<RingEvents>> {
    let one = || -> io::Result<RingEvents> {
        let (kick, call) = (Arc::new(event::eventfd()?), Arc::new(event::eventfd()?));
        Ok(RingEvents { kick, call })
    };
    Ok(vec![one()?, one()?])
}

/// Returns when a signal, a daemon or the control channel asked for the end.
fn wait(
    stop: &OwnedFd,
    quit: &vmm_sys_util::eventfd::EventFd,
    done: &vmm_sys_util::eventfd::EventFd,
) {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(event::fd(quit), PollFlags::IN),
            PollFd::from_borrowed_fd(event::fd(done), PollFlags::IN),
        ];
        // An interrupted wait is repeated.
        let _ = poll(&mut fds, None);
        if fds.iter().any(|fd| !fd.revents().is_empty()) {
            return;
        }
    }
}

/// Readable after SIGTERM or SIGINT.
fn stop_request() -> io::Result<OwnedFd> {
    let (read, write) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read.into())
}

/// No core dump, and no debugger without the right to debug any process: the memory holds what pods say.
fn keep_memory_private() -> io::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(setrlimit(Resource::Core, none)?)
}

/// The build id as the session says it; zeros where it is not one.
fn image_id(build: &str) -> [u8; 20] {
    let mut id = [0; 20];
    let (digits, rest) = build.as_bytes().as_chunks::<2>();
    if digits.len() != id.len() || !rest.is_empty() {
        return id;
    }
    for (octet, pair) in id.iter_mut().zip(digits) {
        let text = std::str::from_utf8(pair).unwrap_or_default();
        match u8::from_str_radix(text, 16) {
            Ok(value) => *octet = value,
            Err(_) => return [0; 20],
        }
    }
    id
}
