//! What a run found: a table for people, a JSON file with every sample, and a chart.

use super::measure::METRICS;
use super::{Extent, Family, svg};
use crate::command;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Lines of a reason in the table.
const REASON: usize = 4;

/// A contender and what it showed.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) family: Family,
    about: &'static str,
    service: Option<String>,
    /// In the order of [`METRICS`], a value for each round.
    samples: Vec<Vec<f64>>,
}

/// Of the values of several rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Row {
    pub(super) fn spread(&self, metric: usize) -> Option<Spread> {
        let mut sorted = self.samples.get(metric)?.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        };
        Some(Spread { median, low, high })
    }
}

/// The run.
#[derive(Debug)]
pub(super) struct Report {
    what: String,
    pub(super) title: String,
    extent: Extent,
    pub(super) machine: String,
    kernel: String,
    cores: usize,
    date: String,
    /// Cores that the machine used before there was any contender, and while all stood idle.
    pub(super) idle: [f64; 2],
    pub(super) rows: Vec<Row>,
    left_out: Vec<(String, String)>,
    failures: Vec<String>,
}

impl Report {
    pub(super) fn new(what: &str, title: &str, extent: Extent) -> Result<Self> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let cores = std::thread::available_parallelism()?.get();
        let kernel = kernel.trim().to_owned();
        let date = command::run(&["date", "-u", "+%Y-%m-%d %H:%M UTC"])?;
        Ok(Self {
            what: what.into(),
            title: title.into(),
            extent,
            machine: format!("Linux {kernel}, {cores} cores, {}", date.trim()),
            kernel,
            cores,
            date: date.trim().into(),
            idle: [0.0; 2],
            rows: Vec::new(),
            left_out: Vec::new(),
            failures: Vec::new(),
        })
    }

    pub(super) fn add(
        &mut self,
        name: &'static str,
        family: Family,
        about: &'static str,
        service: Option<String>,
    ) {
        self.rows.push(Row {
            name,
            family,
            about,
            service,
            samples: vec![Vec::new(); METRICS.len()],
        });
    }

    pub(super) fn leave_out(&mut self, name: &str, reason: &str) {
        eprintln!("left out: {name}: {reason}");
        self.left_out.push((name.into(), reason.into()));
    }

    pub(super) fn sample(&mut self, row: usize, values: &[f64]) {
        let samples = self.rows.get_mut(row).map(|row| &mut row.samples);
        for (samples, value) in samples.into_iter().flatten().zip(values) {
            samples.push(*value);
        }
    }

    pub(super) fn failure(&mut self, name: &str, round: usize, reason: &str) {
        let failure = format!("{name}, round {}: {reason}", round + 1);
        eprintln!("failed: {failure}");
        self.failures.push(failure);
    }

    /// Writes and prints everything. Ratios are to the contender of that name, or else to the first that was measured.
    pub(super) fn finish(mut self, base: &str) -> Result<()> {
        for row in std::mem::take(&mut self.rows) {
            if row.spread(0).is_some() {
                self.rows.push(row);
            } else {
                self.leave_out(row.name, "every measurement failed, see above");
            }
        }
        ensure!(!self.rows.is_empty(), "nothing was measured");
        let base = self
            .rows
            .iter()
            .position(|row| row.name == base)
            .unwrap_or(0);
        let folder = folder();
        std::fs::create_dir_all(&folder)?;
        let folder = folder.canonicalize()?;
        let files = [
            ("json", format!("{:#}\n", self.json(base))),
            ("svg", svg::chart(&self, base)),
        ]
        .map(|(kind, text)| (folder.join(format!("{}.{kind}", self.what)), text));
        for (file, text) in &files {
            std::fs::write(file, text).with_context(|| file.display().to_string())?;
        }
        self.print(base);
        for (file, _) in &files {
            println!("written: {}", file.display());
        }
        Ok(())
    }

    /// How much was measured, in words.
    pub(super) fn extent(&self) -> String {
        let Extent {
            rounds, seconds, ..
        } = self.extent;
        format!("{rounds} rounds, {seconds} s each measurement")
    }

    fn print(&self, base: usize) {
        println!("{}: {}, {}", self.title, self.machine, self.extent());
        println!(
            "cores that the machine used before: {:.2}; with all {} contenders idle: {:.2}",
            self.idle[0],
            self.rows.len(),
            self.idle[1]
        );
        for row in &self.rows {
            let service = row.service.as_deref();
            let service = service.map(|it| format!("; its Service: {it}"));
            println!(
                "  {}: {}{}",
                row.name,
                row.about,
                service.unwrap_or_default()
            );
        }
        for (name, reason) in &self.left_out {
            println!("  left out: {name}: {}", end_of(reason));
        }
        for failure in &self.failures {
            println!("  failed: {failure}");
        }
        println!(
            "median (lowest..highest), ratio to {}; bulk and connections go to the Service's address where there is one, the others to the pod's",
            self.rows[base].name
        );
        for (metric, it) in METRICS.iter().enumerate() {
            let better = if it.more_is_better { "more" } else { "less" };
            println!("{}, {} ({better} is better)", it.name, it.unit);
            for (index, row) in self.rows.iter().enumerate() {
                let Some(Spread { median, low, high }) = row.spread(metric) else {
                    continue;
                };
                let ratio = self.ratio(index, base, metric);
                let ratio = ratio.map(|it| format!("{it:.2}x")).unwrap_or_default();
                let spread = format!("({}..{})", short(low), short(high));
                println!(
                    "  {:<34}{:>9} {spread:<22}{ratio:>8}",
                    row.name,
                    short(median)
                );
            }
        }
    }

    /// Of a contender's median to the base's; none for the base itself, or where that is nothing.
    pub(super) fn ratio(&self, row: usize, base: usize, metric: usize) -> Option<f64> {
        let median = |row: usize| Some(self.rows.get(row)?.spread(metric)?.median);
        let under = median(base).filter(|it| *it > 0.0 && row != base)?;
        Some(median(row)? / under)
    }

    fn json(&self, base: usize) -> Value {
        let contender = |(index, row): (usize, &Row)| {
            let metrics = METRICS.iter().enumerate().map(|(metric, it)| {
                let spread = row.spread(metric);
                json!({
                    "metric": it.name,
                    "unit": it.unit,
                    "more_is_better": it.more_is_better,
                    "to": if it.service && row.service.is_some() { "service" } else { "pod" },
                    "samples": row.samples[metric],
                    "median": spread.map(|it| it.median),
                    "lowest": spread.map(|it| it.low),
                    "highest": spread.map(|it| it.high),
                    "ratio": self.ratio(index, base, metric),
                })
            });
            json!({
                "name": row.name,
                "family": format!("{:?}", row.family),
                "about": row.about,
                "service": row.service,
                "metrics": metrics.collect::<Vec<_>>(),
            })
        };
        let left_out = self.left_out.iter();
        let left_out = left_out.map(|(name, reason)| json!({"name": name, "reason": reason}));
        json!({
            "what": self.what,
            "title": self.title,
            "date": self.date,
            "kernel": self.kernel,
            "cores": self.cores,
            "rounds": self.extent.rounds,
            "seconds": self.extent.seconds,
            "cores_used": {"before": self.idle[0], "idle": self.idle[1]},
            "base": self.rows[base].name,
            "contenders": self.rows.iter().enumerate().map(contender).collect::<Vec<_>>(),
            "left_out": left_out.collect::<Vec<_>>(),
            "failures": self.failures,
        })
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench")
}

/// The last lines of a reason, which may have a node's log in it; the JSON file has all of them.
fn end_of(reason: &str) -> String {
    let lines: Vec<&str> = reason.lines().collect();
    let skipped = lines.len().saturating_sub(REASON);
    let mut shown = lines[skipped..].join("\n    ");
    if skipped > 0 {
        shown.insert_str(0, "…\n    ");
    }
    shown
}

/// A number with about three digits.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        it if it >= 100.0 => format!("{value:.0}"),
        it if it >= 10.0 => format!("{value:.1}"),
        it if it >= 0.1 || it == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
