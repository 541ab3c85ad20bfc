//! Flags in, exit status out.

use std::error::Error;
use std::io;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use rustix::process::DumpableBehavior;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::set_dumpable_behavior;
use rustix::process::setrlimit;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::pipe;
use sluice_vmm::config::CommandLine;
use sluice_vmm::config::Config;
use sluice_vmm::config::LogFormat;
use sluice_vmm::config::LogLevel;
use sluice_vmm::exit::Ending;
use sluice_vmm::exit::STATUS_START_FAILED;
use sluice_vmm::exit::STATUS_USAGE;
use sluice_vmm::lines::Lines;
use sluice_vmm::log_file::LogFile;
use sluice_vmm::vm::StartError;
use sluice_vmm::vm::Vm;
use tracing_subscriber::filter::LevelFilter;
use vmm_sys_util::signal::unblock_signal;

fn main() -> ExitCode {
    let config = match CommandLine::parse().resolve() {
        Ok(config) => config,
        Err(error) => {
            let text = complaint(LogFormat::Human, "wrong configuration", &error);
            // Whoever reads this may be gone; the status still tells.
            let _ = writeln!(io::stderr(), "{text}");
            return ExitCode::from(STATUS_USAGE);
        }
    };
    let lines = LogFile::new(io::stderr()).and_then(Lines::start);
    let status = lines.map_or(STATUS_START_FAILED, |lines| {
        start_log(&config, &lines);
        let (status, line) = match run(&config, &lines) {
            Ok((ending, uptime)) => (ending.status(), ending.line(uptime)),
            Err(error) => (
                STATUS_START_FAILED,
                complaint(config.log_format, "cannot start", &error),
            ),
        };
        // What did not fit or was not taken in time is lost; the status still tells.
        let _ = lines.send(line);
        let _ = lines.flush();
        status
    });
    ExitCode::from(status)
}

fn run(config: &Config, lines: &Lines) -> Result<(Ending, Duration), StartError> {
    // Nothing this process starts or becomes may gain privileges.
    rustix::thread::set_no_new_privs(true).map_err(io::Error::from)?;
    keep_memory_private()?;
    // Until here a signal ends the process as it always does; waiting for the trunk is part of that.
    let vm = Vm::create(config, lines)?;
    let stop = stop_request()?;
    let (running, timings) = vm.start()?;
    tracing::info!(
        image = %config.image.display(),
        memory_mib = config.memory >> 20,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    if config.timings {
        // As good as a line of the log.
        let _ = lines.send(timings.line());
    }
    Ok(running.wait(&stop))
}

/// No core dump, and no debugger without the right to debug any process: the guest's memory holds what pods say.
fn keep_memory_private() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(setrlimit(Resource::Core, none)?)
}

/// Readable after SIGTERM or SIGINT.
fn stop_request() -> io::Result<OwnedFd> {
    let (read, write) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        pipe::register(signal, write.try_clone()?)?;
        // A parent that waits for signals in its own way has them blocked, and a child inherits that.
        unblock_signal(signal).map_err(|error| io::Error::other(format!("{error:?}")))?;
    }
    Ok(read.into())
}

fn start_log(config: &Config, lines: &Lines) {
    let level = match config.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    let lines = lines.clone();
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(move || lines.clone())
        .with_ansi(false)
        .with_target(false);
    // Not `init`: that would also take in the `log` lines of libraries, and a guest can cause those without limit.
    // Fails only if a log was set before, and none was.
    let _ = match config.log_format {
        LogFormat::Human => tracing::subscriber::set_global_default(log.finish()),
        LogFormat::Json => tracing::subscriber::set_global_default(log.json().finish()),
    };
}

/// The error and its causes, one line.
fn complaint(format: LogFormat, what: &str, error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    match format {
        LogFormat::Human => format!("sluice-vmm: {what}: {text}"),
        LogFormat::Json => {
            serde_json::json!({ "vmm": "error", "what": what, "error": text }).to_string()
        }
    }
}
