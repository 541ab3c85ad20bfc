//! `sluice-trunk`: the ports of an appliance behind vhost-user, for QEMU and any other virtual machine monitor.

mod child;

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use sluice_ports::args::PortsArgs;
use sluice_ports::message::Drive;
use sluice_ports::serve::serve;
use sluice_ports::server::Server;
use sluice_ports::wire;
use sluice_trunk::driver::{Driver, DriverCounters, Polling};
use sluice_trunk::engine::{Engine, TrunkCounters};
use sluice_trunk::features::Features;
use sluice_trunk::pair::Driving;
use sluice_trunk::ports::EnginePorts;
use sluice_trunk::vhost::{self, TrunkState};

use self::child::Child;

const AFTER_HELP: &str = "\
The exit status is that of COMMAND; without one, 0 after SIGTERM, SIGINT or a daemon's request to end, and 1 when it could not start.

docs/machine.md has a whole command line that boots the appliance under QEMU behind this program.";

/// Serves the network device of an appliance that a virtual machine monitor in another process runs, by vhost-user.
///
/// Frames are moved between the ports that a daemon gives (docs/ports.md) and the rings of the virtual machine. One monitor is
/// served at a time. With a COMMAND this program starts the monitor, serves no other, and ends with it.
#[derive(Debug, Parser)]
#[command(name = "sluice-trunk", version, after_help = AFTER_HELP, max_term_width = 100)]
struct CommandLine {
    /// Where the monitor connects: made here, and removed at the end
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,

    #[command(flatten)]
    ports: PortsArgs,

    /// How long to poll for frames before sleeping, in microseconds
    #[arg(long, value_name = "US", default_value_t = 60)]
    poll_us: u32,

    /// The monitor to start
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    let line = CommandLine::parse();
    let log = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false);
    log.init();
    match run(&line) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            // Nothing is left to be done about a standard error that takes nothing.
            let _ = writeln!(io::stderr(), "sluice-trunk: cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(line: &CommandLine) -> Result<u8, Box<dyn Error>> {
    let listener = line
        .ports
        .listener()
        .map_err(|error| format!("--ports cannot be used: {error}"))?;
    let stop = stop_request()?;
    let trunk = Arc::new(TrunkCounters::default());
    let counters = Arc::new(DriverCounters::default());
    let polling = Polling {
        longest: Duration::from_micros(line.poll_us.into()),
    };
    let driver = Driver::start(Engine::new(trunk.clone())?, polling, counters.clone())?;
    let driving = Driving::only(Drive::Apart);
    let (quit, asked) = UnixStream::pair()?;
    if let Some(listener) = listener {
        let ports = EnginePorts::new(
            driver.mailbox().clone(),
            trunk,
            counters,
            driving.clone(),
            // Only fails when the end is under way already.
            Box::new(move || drop((&quit).write(&[1]))),
        );
        let identity = line
            .ports
            .identity("sluice-trunk", env!("CARGO_PKG_VERSION"));
        let (ends_with_us, stopped) = wire::pair()?;
        thread::Builder::new().name("ports".into()).spawn(move || {
            let _ends_with_us = ends_with_us;
            let mut server = Server::new(identity, ports);
            if let Err(error) = serve(&listener, &stopped, &mut server) {
                tracing::error!(%error, "the ports are no longer served");
            }
        })?;
    }
    let socket = Socket::listen(&line.socket)?;
    let state = TrunkState::default();
    let offered = Features::offered(line.ports.taps);
    let vmm = {
        let (listener, mailbox, state) = (
            socket.listener.try_clone()?,
            driver.mailbox().clone(),
            state.clone().reporting(driving),
        );
        move || vhost::serve(&listener, offered, &mailbox, &state)
    };
    let mut child = None;
    if let [program, arguments @ ..] = &line.command[..] {
        let started = Child::start(program, arguments)
            .map_err(|error| format!("{} cannot be started: {error}", program.display()))?;
        state.admit_only(Some(started.pid()));
        child = Some(started);
    }
    thread::Builder::new()
        .name("vhost-user".into())
        .spawn(vmm)?;
    wait(&stop, &asked, child.as_ref())?;
    let status = child.map_or(0, Child::end);
    driver.stop();
    Ok(status)
}

/// Returns when the end was asked for, or the child has ended.
fn wait(stop: &OwnedFd, asked: &UnixStream, child: Option<&Child>) -> io::Result<()> {
    loop {
        let mut fds = vec![
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(asked.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(child.map(|child| PollFd::new(child.ended(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            // Without a ports socket the other end of `asked` is closed: that asks for nothing.
            Ok(_) => {
                let is_readable = |fd: &PollFd<'_>| {
                    fd.revents()
                        .is_some_and(|events| events.contains(PollFlags::POLLIN))
                };
                if fds.iter().any(is_readable) {
                    return Ok(());
                }
            }
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

/// A listening socket whose name goes with it.
#[derive(Debug)]
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn listen(path: &Path) -> Result<Self, Box<dyn Error>> {
        let is_socket = |path: &Path| {
            use std::os::unix::fs::FileTypeExt;
            path.symlink_metadata()
                .is_ok_and(|about| about.file_type().is_socket())
        };
        if is_socket(path) && UnixStream::connect(path).is_err() {
            // Of a process that was killed.
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)
            .map_err(|error| format!("no socket can be made at {}: {error}", path.display()))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A name that cannot be removed is replaced by the next process.
        let _ = std::fs::remove_file(&self.path);
    }
}
