//! Flags in, exit status out.

use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::Parser;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::pipe;
use sluice_vmm::config::CommandLine;
use sluice_vmm::config::Config;
use sluice_vmm::config::LogFormat;
use sluice_vmm::config::LogLevel;
use sluice_vmm::exit::STATUS_START_FAILED;
use sluice_vmm::exit::STATUS_USAGE;
use sluice_vmm::vm::StartError;
use sluice_vmm::vm::Vm;
use tracing_subscriber::filter::LevelFilter;
use vmm_sys_util::signal::unblock_signal;

fn main() -> ExitCode {
    let config = match CommandLine::parse().resolve() {
        Ok(config) => config,
        Err(error) => {
            tell(LogFormat::Human, "wrong configuration", &error);
            return ExitCode::from(STATUS_USAGE);
        }
    };
    start_log(&config);
    match run(&config) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            tell(config.log_format, "cannot start", &error);
            ExitCode::from(STATUS_START_FAILED)
        }
    }
}

fn run(config: &Config) -> Result<u8, StartError> {
    // Nothing this process starts or becomes may gain privileges.
    rustix::thread::set_no_new_privs(true).map_err(io::Error::from)?;
    // Until here a signal ends the process as it always does; waiting for the trunk is part of that.
    let vm = Vm::create(config)?;
    let stop = stop_request()?;
    let (running, timings) = vm.start()?;
    tracing::info!(
        image = %config.image.display(),
        memory_mib = config.memory >> 20,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    if config.timings {
        eprintln!("{}", timings.line());
    }
    let (ending, uptime) = running.wait(&stop);
    eprintln!("{}", ending.line(uptime));
    Ok(ending.status())
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

fn start_log(config: &Config) {
    let level = match config.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false);
    // Not `init`: that would also take in the `log` lines of libraries, and a guest can cause those without limit.
    let result = match config.log_format {
        LogFormat::Human => tracing::subscriber::set_global_default(log.finish()),
        LogFormat::Json => tracing::subscriber::set_global_default(log.json().finish()),
    };
    if let Err(error) = result {
        eprintln!("sluice-vmm: no log: {error}");
    }
}

/// The error and its causes, one line.
fn tell(format: LogFormat, what: &str, error: &dyn Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    match format {
        LogFormat::Human => eprintln!("sluice-vmm: {what}: {text}"),
        LogFormat::Json => {
            eprintln!(
                "{}",
                serde_json::json!({ "vmm": "error", "what": what, "error": text })
            );
        }
    }
}
