//! Traffic between namespaces, and who it came from in the eyes of the one that got it.

use crate::capture::Capture;
use crate::command::{self, Running};
use crate::lab::program;
use crate::load::Outcome;
use crate::netns::Netns;
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

/// The port of the traffic server.
pub const PORT: u16 = 7000;
/// For neighbors to be found, and for a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(15);

/// An address and a port as programs write them.
pub fn at(address: &str, port: u16) -> String {
    if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    }
}

/// Starts the traffic server in a namespace.
///
/// # Errors
/// If it does not listen in time.
pub fn serve(netns: &Netns) -> Result<Running> {
    serve_at(netns, PORT)
}

/// The same at another port.
///
/// # Errors
/// If it does not listen in time.
pub fn serve_at(netns: &Netns, port: u16) -> Result<Running> {
    let mut command = netns.command(program("sluice-load"));
    let listen = format!("[::]:{port}");
    command.args(["serve", &listen]).stdout(Stdio::null());
    let server = Running::start("sluice-load", &mut command)?;
    command::until("the traffic server", PATIENCE, || {
        let port = format!(":{port}");
        let listening = netns.run(&["ss", "-ltnH", "sport", "=", &port])?;
        ensure!(!listening.trim().is_empty(), "not listening yet");
        Ok(())
    })?;
    Ok(server)
}

/// Runs the traffic client in a namespace.
///
/// # Errors
/// If it fails; with what it said.
pub fn load(netns: &Netns, words: &[&str]) -> Result<Outcome> {
    let program = program("sluice-load");
    let mut all = vec![program.to_str().context("path")?];
    all.extend(words);
    Ok(serde_json::from_str(&netns.run(&all)?)?)
}

/// A stream whose every byte is checked at the far end; says how fast it was.
///
/// # Errors
/// If it does not arrive whole.
pub fn stream(from: &Netns, to: &str, bytes: u64) -> Result<String> {
    let seen = load(from, &["checked", to, "--bytes", &bytes.to_string()])?;
    ensure!(seen.done >= bytes, "{} of {bytes} bytes arrived", seen.done);
    Ok(format!("{:.2} Gb/s", seen.rate() * 8.0 / 1e9))
}

/// So many seconds of datagrams, again until one is acknowledged: a machine may be busy for longer than they take.
///
/// # Errors
/// If none is.
pub fn datagrams(from: &Netns, to: &str, seconds: &str) -> Result<()> {
    command::until(&format!("an answer of {to}"), PATIENCE, || {
        load(from, &["udp", to, "--time", seconds, "--window", "16"]).map(drop)
    })
}

/// How an attempt to connect ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    Connected,
    Refused,
    /// Nothing comes back.
    Silent,
}

/// Tries to connect by TCP, for a second.
///
/// # Errors
/// If that cannot be tried.
pub fn attempt(client: &Netns, address: &str, port: u16) -> Result<Attempt> {
    let connect = format!("exec 3<>/dev/tcp/{address}/{port}");
    let output = client.output(&["timeout", "1", "bash", "-c", &connect])?;
    let said = String::from_utf8_lossy(&output.stderr);
    Ok(match output.status.code() {
        Some(0) => Attempt::Connected,
        Some(124) => Attempt::Silent,
        _ if said.contains("refused") => Attempt::Refused,
        code => anyhow::bail!("{address}:{port}: {code:?}, {said}"),
    })
}

/// Waits for the first answer, for neighbors have to be found, and then for a series of `count` of which none is missing: on a
/// machine that others keep busy, the kernel drops what its CPUs' backlogs cannot hold. The packets are not to be fragmented.
///
/// # Errors
/// If one is missing each time.
pub fn ping(from: &Netns, to: &str, count: u8, size: u16) -> Result<()> {
    ping_marked(from, to, count, size, "0")
}

/// The same with a traffic class.
///
/// # Errors
/// If one is missing each time.
pub fn ping_marked(from: &Netns, to: &str, count: u8, size: u16, class: &str) -> Result<()> {
    command::until(&format!("a first answer of {to}"), PATIENCE, || {
        from.run(&["ping", "-n", "-c", "1", "-W", "1", to])
    })?;
    let (count, size) = (count.to_string(), size.to_string());
    let words = [
        "ping", "-n", "-c", &count, "-i", "0.05", "-W", "2", "-M", "do", "-Q", class, "-s", &size,
        to,
    ];
    let what = format!("{count} answers of {to} to pings of {size} bytes");
    command::until(&what, PATIENCE, || {
        let text = from.run(&words)?;
        ensure!(text.contains(&format!(" {count} received")), "{text}");
        Ok(())
    })
}

/// The sources of what arrives at an interface while `action` runs, as tshark finds them in frames that match `shown`.
///
/// # Errors
/// If the action fails or nothing arrives.
pub fn sources(
    (at, interface): (&Netns, &str),
    shown: &str,
    action: impl FnOnce() -> Result<()>,
) -> Result<BTreeSet<String>> {
    let capture = Capture::start(at, interface, "")?;
    action()?;
    let lines = capture.until_fields(shown, &["ip.src", "ipv6.src"], 1)?;
    Ok(lines.iter().map(|line| line.trim().to_owned()).collect())
}
