//! What Sluice claims, each as a function that shows it on a running lab and says what was seen.
//!
//! The demo prints them as a checklist, the tests assert them: one implementation of each claim.

use crate::command::{self, Running};
use crate::cpu;
use crate::lab::{Lab, Pod};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::time::{Duration, Instant};

/// For what the appliance has counted to be told: a status does not wait for a guest that is busy.
const COUNTED: Duration = Duration::from_secs(20);

/// The words of `ping` that all its uses share.
fn ping(pod: &Pod, words: &[&str]) -> Result<String> {
    let output = pod.netns.output(&[&["ping", "-n"][..], words].concat())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        !text.is_empty(),
        "ping: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(text)
}

/// What ping says once none of a series is missing: on a machine that others keep busy an answer may be late, and the kernel
/// drops what its processors' backlogs cannot hold.
fn all_answered(pod: &Pod, words: &[&str]) -> Result<String> {
    command::until("an answer to every ping", Duration::from_secs(20), || {
        let text = ping(pod, words)?;
        let (sent, received) = counts(&text)?;
        ensure!(sent == received, "{received} of {sent}: {text}");
        Ok(text)
    })
}

/// `(sent, received)` from ping's closing lines.
fn counts(text: &str) -> Result<(u64, u64)> {
    let line = text
        .lines()
        .find(|l| l.contains("packets transmitted"))
        .context("no summary")?;
    let mut numbers = line
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|n| n.parse().ok());
    Ok((
        numbers.next().context("sent")?,
        numbers.next().context("received")?,
    ))
}

fn pods(lab: &Lab) -> Result<(&Pod, &Pod)> {
    match lab.pods.as_slice() {
        [a, b, ..] => Ok((a, b)),
        _ => anyhow::bail!("the lab has fewer than two pods"),
    }
}

/// The node runs, and says on what.
///
/// # Errors
/// If its status does not say.
pub fn node_says_what_it_runs_on(lab: &Lab) -> Result<String> {
    let status = lab.status()?;
    let machine = &status["machine"];
    let isolation = machine["isolation"]
        .as_str()
        .context("no isolation in the status")?;
    let why = machine["why"].as_str().unwrap_or_default();
    let start = status["start"]["to_configured_ms"]
        .as_f64()
        .unwrap_or(f64::NAN);
    Ok(format!(
        "isolation {isolation} ({why}), configured {start:.1} ms after the VMM's start"
    ))
}

/// Pods reach each other in both families, with the TTL one lower than they sent it.
///
/// # Errors
/// If a ping is lost or crosses with another TTL.
pub fn pods_ping_each_other(lab: &Lab) -> Result<String> {
    let (a, b) = pods(lab)?;
    for address in [b.v4.to_string(), b.v6.to_string()] {
        let text = all_answered(a, &["-c", "3", "-i", "0.05", "-W", "2", &address])?;
        ensure!(
            text.contains("ttl=63"),
            "the TTL did not fall by exactly one: {text}"
        );
    }
    Ok(format!("{} and {}, TTL 64 → 63", b.v4, b.v6))
}

/// The pods' gateway answers in both families.
///
/// # Errors
/// If it does not.
pub fn gateway_answers(lab: &Lab) -> Result<String> {
    let (a, _) = pods(lab)?;
    for address in ["169.254.1.1", "fe80::1%eth0"] {
        all_answered(a, &["-c", "2", "-i", "0.05", "-W", "2", address])?;
    }
    Ok("169.254.1.1 and fe80::1".into())
}

/// `count` pings, one a millisecond, none lost.
///
/// # Errors
/// If one is.
pub fn no_ping_is_lost(lab: &Lab, count: u32) -> Result<String> {
    let (a, b) = pods(lab)?;
    let (count, address) = (count.to_string(), b.v4.to_string());
    let text = ping(a, &["-q", "-i", "0.001", "-c", &count, "-W", "2", &address])?;
    let (sent, received) = counts(&text)?;
    ensure!(sent == received, "{} of {sent} were lost", sent - received);
    let times = text
        .lines()
        .find(|l| l.starts_with("rtt"))
        .unwrap_or_default();
    Ok(format!("{received} of {sent} answered; {times}"))
}

/// While one pod sends as fast as it can, by long frames and by short ones, every ping of another pair is answered. Says what
/// that does to their times. Of four pods the first floods the second, the third pings the fourth.
///
/// # Errors
/// If a ping is lost, or nothing was sent meanwhile.
pub fn a_flood_delays_no_other_pod(lab: &Lab, pings: u32) -> Result<String> {
    let [_, flooded, pinger, pinged] = lab.pods.as_slice() else {
        anyhow::bail!("the lab has not four pods");
    };
    let _server = lab.serve(1)?;
    let server = format!("{}:7000", flooded.v4);
    let (count, address) = (pings.to_string(), pinged.v4.to_string());
    let words = ["-i", "0.005", "-c", &count, "-W", "2", &address];
    all_answered(pinger, &["-c", "3", &address])?;
    let seconds = (f64::from(pings) * 0.006 + 1.0).to_string();
    let mut seen = vec![format!("alone {}", percentiles(&ping(pinger, &words)?)?)];
    for load in ["bulk", "udp"] {
        let (text, flood) = std::thread::scope(|scope| {
            let flood = scope.spawn(|| lab.load(0, &[load, &server, "--time", &seconds]));
            let text = ping(pinger, &words);
            (text, flood.join())
        });
        let flood = flood.map_err(|_| anyhow::anyhow!("the load ended"))??;
        ensure!(flood.done > 0, "{load}: nothing was sent");
        let text = text?;
        let (sent, received) = counts(&text)?;
        ensure!(
            sent == received,
            "{load}: {} of {sent} were lost",
            sent - received
        );
        seen.push(format!("beside {load} {}", percentiles(&text)?));
    }
    Ok(seen.join(", "))
}

/// Median and 99th percentile of the times that ping printed.
fn percentiles(text: &str) -> Result<String> {
    let times = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once("time=")?;
        rest.split(' ').next()?.parse().ok()
    });
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100);
    let (half, most) = (at(50).context("no times")?, at(99).context("no times")?);
    Ok(format!("p50 {half} ms, p99 {most} ms"))
}

/// A TCP stream arrives byte for byte, in both families.
///
/// # Errors
/// If a byte is missing or wrong.
pub fn tcp_is_intact(lab: &Lab, bytes: u64) -> Result<String> {
    let _server = lab.serve(1)?;
    let (_, b) = pods(lab)?;
    let bytes = bytes.to_string();
    let mut rates = Vec::new();
    for address in [format!("{}:7000", b.v4), format!("[{}]:7000", b.v6)] {
        let seen = lab.load(0, &["checked", &address, "--bytes", &bytes])?;
        rates.push(format!("{:.2} Gb/s", seen.rate() * 8.0 / 1e9));
    }
    Ok(format!(
        "{bytes} checked bytes each over IPv4 ({}) and IPv6 ({})",
        rates[0], rates[1]
    ))
}

/// Windowed UDP passes in both families without loss.
///
/// # Errors
/// If a datagram is not acknowledged.
pub fn udp_passes(lab: &Lab) -> Result<String> {
    let _server = lab.serve(1)?;
    let (_, b) = pods(lab)?;
    let mut seen = Vec::new();
    for address in [format!("{}:7000", b.v4), format!("[{}]:7000", b.v6)] {
        let outcome = lab.load(0, &["udp", &address, "--time", "0.5", "--window", "128"])?;
        ensure!(
            outcome.lost == 0,
            "{} datagrams to {address} were lost",
            outcome.lost
        );
        seen.push(format!("{} datagrams", outcome.done));
    }
    Ok(format!("IPv4 {}, IPv6 {}, none lost", seen[0], seen[1]))
}

/// A counter of the guest by its name in `sluice status -o json`; a counter that is not there is zero.
fn guest_counter(status: &Value, name: &str) -> u64 {
    status["guest"][name].as_u64().unwrap_or(0)
}

/// TCP segments cross as the 64 KiB frames that the pod's stack made.
///
/// # Errors
/// If no frame much larger than the MTU crossed whole.
pub fn gso_frames_cross_whole(lab: &Lab) -> Result<String> {
    let before = lab.status()?;
    let _server = lab.serve(1)?;
    let (_, b) = pods(lab)?;
    lab.load(
        0,
        &["checked", &format!("{}:7000", b.v4), "--bytes", "200000000"],
    )?;
    let (frames, bytes) = command::until("a GSO frame that crossed", COUNTED, || {
        let after = lab.status()?;
        let rise = |name| guest_counter(&after, name) - guest_counter(&before, name);
        let (frames, bytes) = (rise("gso_forwarded"), rise("gso_forwarded_bytes"));
        ensure!(frames > 0, "none is counted");
        Ok((frames, bytes))
    })?;
    let mean = bytes / frames;
    ensure!(
        mean > 20_000,
        "GSO frames were {mean} bytes on average: they were cut on the way"
    );
    Ok(format!("{frames} GSO frames, {mean} bytes on average"))
}

/// A pod that claims another address is not heard, and the drop is counted by its reason.
///
/// # Errors
/// If the packet crosses or the counter stays.
pub fn spoofed_source_is_dropped(lab: &Lab) -> Result<String> {
    let (a, b) = pods(lab)?;
    let before = guest_counter(&lab.status()?, "dropped.spoof");
    a.netns
        .run(&["ip", "addr", "add", "10.9.9.9/32", "dev", "lo"])?;
    let text = ping(
        a,
        &[
            "-c",
            "3",
            "-i",
            "0.05",
            "-W",
            "1",
            "-I",
            "10.9.9.9",
            &b.v4.to_string(),
        ],
    );
    a.netns
        .run(&["ip", "addr", "del", "10.9.9.9/32", "dev", "lo"])?;
    let (_, received) = counts(&text?)?;
    ensure!(received == 0, "a packet with a forged source was answered");
    let after = command::until("the count of forged packets", COUNTED, || {
        let after = guest_counter(&lab.status()?, "dropped.spoof");
        ensure!(
            after >= before + 3,
            "dropped.spoof went from {before} to {after}"
        );
        Ok(after)
    })?;
    Ok(format!(
        "3 forged packets, {} dropped as spoof",
        after - before
    ))
}

fn vmm_pid(lab: &Lab) -> Result<u32> {
    let pid = lab.status()?["machine"]["pid"]
        .as_u64()
        .context("the status names no VMM")?;
    Ok(u32::try_from(pid)?)
}

/// `kill -9` of the VMM under traffic: another one runs by itself and traffic goes on.
///
/// # Errors
/// If it does not, or the pod's carrier was lost.
pub fn killed_vmm_comes_back(lab: &mut Lab) -> Result<String> {
    let (a, b) = pods(lab)?;
    let address = b.v4.to_string();
    let carrier = || a.netns.run(&["cat", "/sys/class/net/eth0/carrier_changes"]);
    let (old, changes) = (vmm_pid(lab)?, carrier()?);
    let mut words = a.netns.command("ping");
    words.args(["-n", "-q", "-i", "0.001", "-W", "1", &address]);
    let log = lab.run_dir().join("ping.log");
    words.stdout(std::fs::File::create(&log)?);
    let mut pinging = Running::start("ping", &mut words)?;
    // One that was answered before, so that all neighbors are known.
    let answered = || {
        ping(a, &["-c", "1", "-W", "1", &address]).and_then(|text| {
            let (_, received) = counts(&text)?;
            ensure!(received == 1, "no answer");
            Ok(())
        })
    };
    command::until("an answer", Duration::from_secs(20), answered)?;
    kill(Pid::from_raw(i32::try_from(old)?), Signal::SIGKILL)?;
    let killed = Instant::now();
    let new = command::until("another VMM", Duration::from_secs(30), || {
        let pid = vmm_pid(lab)?;
        ensure!(pid != old, "still {old}");
        Ok(pid)
    })?;
    command::until(
        "an answer by another VMM",
        Duration::from_secs(30),
        answered,
    )?;
    let back = killed.elapsed();
    pinging.signal(Signal::SIGINT);
    pinging.wait()?;
    let (sent, received) = counts(&std::fs::read_to_string(&log)?)?;
    std::fs::remove_file(&log)?;
    lab.healthy(Duration::from_secs(60))?;
    let (a, _) = pods(lab)?;
    let now = a
        .netns
        .run(&["cat", "/sys/class/net/eth0/carrier_changes"])?;
    ensure!(
        now == changes,
        "the pod's carrier changed: {changes} → {now}"
    );
    let status = lab.status()?;
    let first = status["start"]["to_first_forwarded_ms"]
        .as_f64()
        .context("no time of the first frame")?;
    Ok(format!(
        "VMM {old} → {new}, pods talk after {} ms, start to first forwarded frame {first:.1} ms, \
         {} of {sent} pings at 1 ms lost, carrier unchanged",
        back.as_millis(),
        sent - received
    ))
}

/// `kill -9` of the node daemon: the pods go on as if nothing had happened, without a daemon and with the next.
///
/// # Errors
/// If a ping is lost, the pod's carrier changes, or the VMM is another one afterwards.
pub fn killed_node_finds_its_taps(lab: &mut Lab) -> Result<String> {
    let vmm = vmm_pid(lab)?;
    let (a, b) = pods(lab)?;
    let carrier = ["cat", "/sys/class/net/eth0/carrier_changes"];
    let changes = a.netns.run(&carrier)?;
    let mut words = a.netns.command("ping");
    words.args(["-n", "-q", "-i", "0.001", "-W", "2", &b.v4.to_string()]);
    let log = lab.run_dir().join("ping.log");
    words.stdout(std::fs::File::create(&log)?);
    let mut pinging = Running::start("ping", &mut words)?;
    std::thread::sleep(Duration::from_millis(300));
    let node = lab.node().context("no node")?;
    node.signal(Signal::SIGKILL);
    node.wait()?;
    lab.forget_node();
    // The appliance is alone for a while.
    std::thread::sleep(Duration::from_millis(300));
    let restarted = Instant::now();
    lab.start_node()?;
    let back = restarted.elapsed();
    std::thread::sleep(Duration::from_millis(300));
    pinging.signal(Signal::SIGINT);
    pinging.wait()?;
    let (sent, received) = counts(&std::fs::read_to_string(&log)?)?;
    std::fs::remove_file(&log)?;
    ensure!(
        vmm_pid(lab)? == vmm,
        "the VMM was replaced although it was alive"
    );
    // The last one may have been under way when ping was ended.
    ensure!(
        sent > 100 && sent - received <= 1,
        "{} of {sent} pings were lost",
        sent - received
    );
    let (a, _) = pods(lab)?;
    let now = a.netns.run(&carrier)?;
    ensure!(
        now == changes,
        "the pod's carrier changed: {changes} → {now}"
    );
    pods_ping_each_other(lab)?;
    Ok(format!(
        "{received} of {sent} pings at 1 ms answered, carrier unchanged, healthy {} ms after the restart with VMM {vmm} untouched",
        back.as_millis()
    ))
}

/// An idle node costs next to nothing.
///
/// # Errors
/// If daemon and VMM together use more than `limit` of one core.
pub fn idle_is_cheap(lab: &mut Lab, limit: f64) -> Result<String> {
    let vmm = vmm_pid(lab)?;
    let node = u32::try_from(lab.node().context("no node")?.pid().as_raw())?;
    std::thread::sleep(Duration::from_millis(500));
    let used = |pid| cpu::process(pid);
    let (start, before) = (Instant::now(), used(vmm)? + used(node)?);
    std::thread::sleep(Duration::from_secs(4));
    let share = (used(vmm)? + used(node)? - before) / start.elapsed().as_secs_f64();
    ensure!(share < limit, "{:.1} % of a core", share * 100.0);
    Ok(format!(
        "{:.2} % of a core, daemon and VMM together",
        share * 100.0
    ))
}

/// The image is small.
///
/// # Errors
/// If it is larger than 1 MiB.
pub fn image_is_small() -> Result<String> {
    let bytes = std::fs::metadata(crate::lab::image())?.len();
    ensure!(bytes <= 1 << 20, "{bytes} bytes");
    Ok(format!("{} KiB", bytes / 1024))
}

/// The VMM needs little beside the guest's memory.
///
/// # Errors
/// If it is more than 8 MiB.
pub fn vmm_is_small(lab: &Lab) -> Result<String> {
    let kib = cpu::overhead_kib(vmm_pid(lab)?)?;
    ensure!(kib <= 8 * 1024, "{kib} KiB");
    Ok(format!("{kib} KiB resident beyond the guest's memory"))
}
