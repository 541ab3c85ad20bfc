//! `sluice-node`: the daemon. Flags, signals, and nothing else.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use sluice_host::api;
use sluice_host::config::Config;
use sluice_host::logging;
use sluice_host::node::readiness::Readiness;
use sluice_host::node::{Node, Place};

/// Runs one node of Sluice: the plumbing between this machine's pods and its appliance.
///
/// It makes the pods' taps and gives them to the appliance's process, starts that process and starts it again when it dies, and
/// tells the appliance what to do. It moves no packet itself: one that is killed or replaced costs none. Ask it with `sluice status`.
#[derive(Debug, Parser)]
#[command(name = "sluice-node", version, after_help = AFTER_HELP)]
struct Flags {
    /// The configuration: JSON, or YAML by its name
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// Take the appliance from the sluice-node that runs, which ends then and leaves everything as it is
    #[arg(long)]
    take_over: bool,

    /// Check the configuration, print it with all defaults, and end
    #[arg(long)]
    check: bool,
}

const AFTER_HELP: &str = "\
SIGTERM and SIGINT end it in order: with on_stop \"tear_down\" (the default) the appliance, all links and all files
go, with \"leave\" they stay for the next daemon. After a kill -9 everything stays.

RUST_LOG sets what is logged, like RUST_LOG=sluice_host=debug.

Example (examples/two-pods/node.json):
  {\"image\": \"sluice-appliance\",
   \"pods\": [{\"name\": \"default/a\", \"netns\": \"/run/netns/a\", \"addresses\": [\"10.77.0.2\", \"fd77::2\"]}]}

Exit status: 0 ended in order, 1 could not start, 2 wrong flags or configuration.";

fn main() -> ExitCode {
    let flags = Flags::parse();
    let config = match Config::read(&flags.config) {
        Ok(config) => config,
        Err(error) => {
            complain(&error.into());
            return ExitCode::from(2);
        }
    };
    let outcome = if flags.check {
        print(&config)
    } else {
        run(config, flags.take_over)
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints why the daemon ends. Unlike `eprintln!` it does not panic when standard error is closed.
fn complain(error: &anyhow::Error) {
    let _ = writeln!(io::stderr(), "sluice-node: {error:#}");
}

fn print(config: &Config) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(config)?);
    Ok(())
}

/// Files and sockets are for this user alone from the moment they are made. No core dump, and no debugger without the right
/// to debug any process: the memory holds what pods say, and the cluster's credentials. The appliance's process inherits it.
fn keep_private() -> io::Result<()> {
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(setrlimit(Resource::Core, none)?)
}

fn run(config: Config, take_over: bool) -> anyhow::Result<()> {
    keep_private().context("Cannot keep its memory private")?;
    // Before any thread is started: a signal is then only ever taken by the wait below.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    signals.thread_block().context("Cannot block signals")?;
    let log = logging::start(config.log).context("Cannot start the log")?;
    let outcome = serve(config, take_over, &signals);
    // A reader that is gone or stuck gets no more than the flush's limit.
    log.flush();
    outcome
}

fn serve(config: Config, take_over: bool, signals: &SigSet) -> anyhow::Result<()> {
    let socket = config.run_dir.join("node.sock");
    // As a service manager would end it: the wait below sees it, whenever it comes.
    let usurped = || {
        if let Err(error) = kill(Pid::this(), Signal::SIGTERM) {
            tracing::error!(%error, "this daemon does not end");
        }
    };
    let place = Place {
        take_over,
        usurped: Box::new(usurped),
    };
    let node = Arc::new(Node::start(config, place)?);
    // It carries out what was asked of the plugin while there was no node: one that answers is done with that.
    let cni = sluice_host::cni::start(&node).context("Cannot serve the CNI plugin")?;
    let listener = sluice_host::node::listen(&socket)?;
    api::serve(listener, &node).context("Cannot serve the API")?;
    let readiness = Readiness::start(&node).context("Cannot look after the node's taint")?;
    tracing::info!(socket = %socket.display(), "node is up");
    let signal = signals.wait();
    tracing::info!(?signal, "node is to stop");
    // First: the cluster gives no pods to a node that goes, and nobody adds a link while all go.
    drop(readiness);
    drop(cni);
    std::fs::remove_file(&socket).context("Cannot remove the API's socket")?;
    node.stop();
    Ok(())
}
