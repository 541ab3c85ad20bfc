//! One call of the binary: the environment and standard input in, what goes to standard output and the exit status out.
//!
//! Everything that needs no node is decided here; the rest is the node's. Nothing takes longer than 30 s.

use crate::config::{self, Config};
use crate::deferred::Deferred;
use crate::env::{Args, Environment, Verb};
use crate::error::{CniError, Code};
use crate::rpc::{self, Patience, Request, Unanswered};
use crate::version::Version;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// From start to end, whatever happens (row C-20).
pub const OVERALL: Duration = Duration::from_secs(29);
/// A node that does not even accept a call within this hangs.
const ACCEPTED: Duration = Duration::from_secs(5);
/// The same for DEL, which then is kept for later: it ends within 2 s (row C-04).
pub const ACCEPTED_DEL: Duration = Duration::from_millis(1500);
/// A runtime that does not close standard input.
const INPUT: Duration = Duration::from_secs(10);

/// What the process does at its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub stdout: Option<Value>,
    pub success: bool,
}

/// Carries out one call.
pub fn run<R: Read + AsFd>(lookup: impl Fn(&str) -> Option<String>, stdin: &mut R) -> Outcome {
    let mut version = Version::CURRENT;
    match call(lookup, stdin, &mut version) {
        Ok(stdout) => Outcome {
            stdout,
            success: true,
        },
        Err(error) => Outcome {
            stdout: Some(error.to_json(version)),
            success: false,
        },
    }
}

fn call<R: Read + AsFd>(
    lookup: impl Fn(&str) -> Option<String>,
    stdin: &mut R,
    version: &mut Version,
) -> Result<Option<Value>, CniError> {
    let started = Instant::now();
    let env = Environment::read(lookup)?;
    if env.verb == Verb::Version {
        return Ok(Some(version_object()));
    }
    let input = read_input(stdin, started + INPUT)
        .map_err(|e| CniError::new(Code::Io, "standard input cannot be read").details(&e))?;
    if let Some(asked) = config::version_of(&input) {
        *version = asked;
    }
    let config = Config::for_verb(env.verb, config::json(&input)?)?;
    check(&env, &config)?;
    let env = check_netns(env)?;
    ask(&env, &config, started)
}

/// What VERSION says.
pub fn version_object() -> Value {
    json!({
        "cniVersion": Version::CURRENT.as_str(),
        "supportedVersions": Version::SUPPORTED.map(Version::as_str),
    })
}

/// One line about the plugin, for a person who starts it.
pub fn about() -> String {
    let versions = Version::SUPPORTED.map(Version::as_str).join(", ");
    format!(
        "sluice-cni {}: CNI plugin of the Sluice pod network\nCNI protocol versions supported: {versions}",
        env!("CARGO_PKG_VERSION")
    )
}

/// What can be said of a call without looking at the machine. The node asks again.
///
/// # Errors
/// Code 1 for a verb that the version does not have, 7 for a CHECK without `prevResult` or a GC without a list, and the
/// faults of `CNI_ARGS` and `prevResult`.
pub fn check(env: &Environment, config: &Config) -> Result<(), CniError> {
    let version = config.version;
    let too_old = |verb: &str, since: Version| {
        let msg = format!("{verb} needs cniVersion {since}, the configuration says {version}");
        Err(CniError::new(Code::IncompatibleVersion, msg))
    };
    match env.verb {
        Verb::Add => {
            Args::parse(&env.args)?;
            config.previous()?;
        }
        Verb::Check if !version.has_check() => return too_old("CHECK", Version::V0_4_0),
        Verb::Check => {
            Args::parse(&env.args)?;
            if config.previous()?.is_none() {
                return Err(CniError::new(Code::Config, "CHECK without prevResult"));
            }
        }
        Verb::Gc if !version.has_gc_and_status() => return too_old("GC", Version::V1_1_0),
        Verb::Gc => {
            config.valid_attachments()?;
        }
        Verb::Status if !version.has_gc_and_status() => return too_old("STATUS", Version::V1_1_0),
        // DEL succeeds with whatever is left of its configuration.
        Verb::Status | Verb::Del | Verb::Version => {}
    }
    Ok(())
}

/// Opens the namespace, and refuses the plugin's own unless told otherwise.
fn check_netns(mut env: Environment) -> Result<Environment, CniError> {
    if env.verb == Verb::Del {
        // Whatever happened to the namespace, DEL goes on without it; and it must not touch the node's own.
        if !matches!(is_own_netns(&env.netns), Ok(false)) && !env.netns_override {
            env.netns.clear();
        }
        return Ok(env);
    }
    if !env.verb.has_attachment() {
        return Ok(env);
    }
    let netns = &env.netns;
    match is_own_netns(netns) {
        Err(error) => {
            let msg = format!("network namespace {netns:?} cannot be opened");
            Err(CniError::new(Code::Netns, msg).details(&error))
        }
        Ok(true) if !env.netns_override => {
            let msg = format!("network namespace {netns:?} is the plugin's own");
            Err(CniError::new(Code::Netns, msg))
        }
        Ok(_) => Ok(env),
    }
}

fn is_own_netns(path: &str) -> io::Result<bool> {
    let identity = |path: &Path| {
        let metadata = std::fs::metadata(path)?;
        Ok::<_, io::Error>((metadata.dev(), metadata.ino()))
    };
    Ok(identity(Path::new(path))? == identity(Path::new("/proc/self/ns/net"))?)
}

fn ask(env: &Environment, config: &Config, started: Instant) -> Result<Option<Value>, CniError> {
    let is_del = env.verb == Verb::Del;
    let request = Request::new(env, config);
    let patience = Patience {
        accepted: if is_del { ACCEPTED_DEL } else { ACCEPTED },
        answered: OVERALL.saturating_sub(started.elapsed()),
    };
    let unanswered = match rpc::call(&config.run_dir.join(rpc::SOCKET), &request, patience) {
        Ok(Ok(Value::Null)) => return Ok(None),
        Ok(answer) => return answer.map(Some),
        Err(unanswered) => unanswered,
    };
    match env.verb {
        Verb::Del => keep(config, &request, &unanswered).map(|()| None),
        Verb::Status => Err(unanswered.to_error(Code::Unavailable)),
        _ => Err(unanswered.to_error(Code::Later)),
    }
}

fn keep(config: &Config, request: &Request, why: &Unanswered) -> Result<(), CniError> {
    Deferred::new(&config.state_dir)
        .keep(&config.name, request)
        .map_err(|error| {
            CniError::new(
                Code::Io,
                format!("{why}, and the DEL cannot be kept for later"),
            )
            .details(&error)
        })
}

/// Reads all of standard input, within a bound of bytes and of time.
fn read_input<R: Read + AsFd>(stdin: &mut R, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut input = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let ready = poll(
            &mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)],
            timeout,
        );
        match ready {
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
        }
        match stdin.read(&mut chunk) {
            Ok(0) => return Ok(input),
            Ok(read) => input.extend(chunk.iter().take(read)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if input.len() > config::LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
        }
    }
}
