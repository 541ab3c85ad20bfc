//! What the machine looks like from outside: taken before and after, the difference is what somebody left behind.

use crate::command;
use anyhow::Result;
use std::collections::BTreeSet;

/// One line per namespace, link, tc filter, route and process that a lab could leave behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    lines: BTreeSet<String>,
}

impl Snapshot {
    /// Looks now. Processes are those named `sluice*` or QEMU whose working run directory is ours.
    ///
    /// # Errors
    /// If `ip` or `tc` cannot be asked.
    pub fn take() -> Result<Self> {
        let mut lines = BTreeSet::new();
        for (kind, words) in [
            ("netns", &["ip", "netns", "list"][..]),
            ("link", &["ip", "-o", "link", "show"]),
            ("qdisc", &["tc", "qdisc", "show"]),
            ("route", &["ip", "route", "show", "table", "all"]),
            ("rule", &["ip", "rule", "show"]),
        ] {
            for line in command::run(words)?.lines() {
                let line = match kind {
                    // Counters and link states move by themselves; the name and the kind are what counts.
                    "link" => line.split(' ').take(2).collect::<Vec<_>>().join(" "),
                    "netns" => line.split(' ').next().unwrap_or_default().to_owned(),
                    _ => line.to_owned(),
                };
                lines.insert(format!("{kind} {line}"));
            }
        }
        lines.extend(processes());
        Ok(Self { lines })
    }

    /// Lines that are here and not in `before`. Of namespaces and processes only those of the lab whose process has this id: other
    /// labs of the machine have their own.
    pub fn added_since(&self, before: &Self, lab: u32) -> Vec<String> {
        let own = format!("sluice-{lab}-");
        let of_labs = |line: &str| line.starts_with("netns ") || line.starts_with("process ");
        self.lines
            .difference(&before.lines)
            .filter(|line| line.contains(&own) || !of_labs(line))
            .cloned()
            .collect()
    }
}

fn processes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().into_string().ok()?;
            pid.parse::<u32>().ok()?;
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let program = line.split(' ').next()?.rsplit('/').next()?.to_owned();
            let ours = matches!(
                program.as_str(),
                "sluice-node"
                    | "sluice-vmm"
                    | "sluice-process"
                    | "sluice-trunk"
                    | "qemu-system-x86_64"
            );
            ours.then(|| format!("process {pid} {}", line.trim()))
        })
        .collect()
}
