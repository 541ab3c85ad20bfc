//! Processor time of the whole machine and of one process.

use anyhow::{Context as _, Result};

/// Seconds of processor time used since boot by everything, idle time not counted.
///
/// # Errors
/// If `/proc/stat` does not read as it always does.
pub fn machine() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let fields: Vec<f64> = text
        .lines()
        .next()
        .context("/proc/stat is empty")?
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal: all but idle, iowait and steal.
    let used = [0, 1, 2, 5, 6]
        .iter()
        .filter_map(|&i| fields.get(i))
        .sum::<f64>();
    Ok(used / ticks())
}

/// Seconds of processor time used by process `pid`.
///
/// # Errors
/// If it is gone.
pub fn process(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = text.rsplit(')').next().context("/proc/PID/stat")?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let at = |i: usize| {
        fields
            .get(i)
            .and_then(|f| f.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    Ok((at(11) + at(12)) / ticks())
}

/// Resident memory of a process beyond its mapping of the guest's memory, in KiB.
///
/// # Errors
/// If it is gone.
pub fn overhead_kib(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut guest = false;
    let mut total = 0;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("Rss:") {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            total += if guest { 0 } else { kib };
        } else if line
            .split(' ')
            .next()
            .is_some_and(|range| range.contains('-'))
        {
            guest = line.contains("memfd:");
        }
    }
    Ok(total)
}

fn ticks() -> f64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .map_or(100.0, |ticks| ticks as f64)
}
