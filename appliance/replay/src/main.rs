//! `sluice-replay`: flags, files, exit codes.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use sluice_replay::replay::{self, Replay, Totals};
use sluice_replay::tables::{DOCUMENT_MAX, Tables};
use sluice_replay::verdict::Report;

/// Sends a capture through Sluice's dataplane, and says what became of each frame and why.
///
/// It is the code that runs in the microVM, fed from files: no root, no KVM, no network. Each interface of the capture is a
/// link of the node, by its name: `uplink`, `host` or `pod:NAME`. Time is the capture's, randomness comes from the seed, so the
/// same input gives the same output, byte by byte.
#[derive(Debug, Parser)]
#[command(name = "sluice-replay", version, after_help = AFTER_HELP)]
struct Flags {
    /// The node's tables, as JSON (docs/replay.md)
    #[arg(long, value_name = "FILE")]
    tables: PathBuf,

    /// The traffic: a pcapng capture of whole Ethernet frames
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,

    /// Where the result goes: each frame that left, on its link; what did not, on `not-sent`; the verdict as comment
    #[arg(long = "out", value_name = "FILE")]
    result: Option<PathBuf>,

    /// How to print the verdicts
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: Output,

    /// Randomness: of hashes, and so of backends and ports. Default: that of the tables, else 0
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,

    /// The link of an interface that is not named after one; `#0` is the first interface, if it has no name
    #[arg(long = "map", value_name = "INTERFACE=LINK", value_parser = pair)]
    map: Vec<(String, String)>,
}

const AFTER_HELP: &str = "\
Example, from the folder of the sources:
  sluice-replay --tables examples/replay/tables.json --in examples/replay/traffic.pcapng --out /tmp/result.pcapng

Exit status: 0 replayed (whatever the verdicts), 1 a file cannot be used, and standard error says why.";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A line per frame and a summary, for people
    Text,
    /// A JSON object per frame, one a line, and one with the summary at the end
    Json,
    /// The summary alone
    Summary,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once('=') {
        Some((interface, link)) if !interface.is_empty() && !link.is_empty() => {
            Ok((interface.to_owned(), link.to_owned()))
        }
        _ => Err("not of the form INTERFACE=LINK".to_owned()),
    }
}

fn main() -> ExitCode {
    match run(&Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice-replay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever read the verdicts has seen enough.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    })
}

fn run(flags: &Flags) -> anyhow::Result<()> {
    let tables = read_tables(&flags.tables)?;
    let capture = File::open(&flags.input).with_context(|| show(&flags.input))?;
    let mut printer = Printer {
        output: flags.output,
        to: BufWriter::new(io::stdout().lock()),
    };
    let sink: Box<dyn Write> = match &flags.result {
        Some(path) if same_file(path, &flags.input) => {
            bail!("{}: --out would overwrite --in", path.display())
        }
        Some(path) => Box::new(BufWriter::new(
            File::create(path).with_context(|| show(path))?,
        )),
        None => Box::new(io::sink()),
    };
    let mut memory = replay::memory(&tables);
    let seed = flags.seed.unwrap_or(tables.seed);
    let node = Replay::new(&tables, seed, &mut memory, &flags.map, sink)
        .with_context(|| show(&flags.tables))?;
    let totals = node.run(BufReader::new(capture), |report| printer.frame(report));
    // What was printed so far is true, however it ended.
    printer.to.flush()?;
    let totals = totals.with_context(|| show(&flags.input))?;
    printer.summary(&totals)?;
    if !totals.balanced {
        bail!("the dataplane's counters do not agree with its verdicts: this is a bug in Sluice");
    }
    Ok(())
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

fn read_tables(path: &Path) -> anyhow::Result<Tables> {
    let file = File::open(path).with_context(|| show(path))?;
    let mut json = String::new();
    let read = file.take(DOCUMENT_MAX + 1).read_to_string(&mut json);
    if read.with_context(|| show(path))? as u64 > DOCUMENT_MAX {
        bail!("{}: Longer than {DOCUMENT_MAX} bytes", path.display());
    }
    Tables::read(&json).with_context(|| show(path))
}

/// Standard output.
struct Printer<W: Write> {
    output: Output,
    to: W,
}

impl<W: Write> Printer<W> {
    fn frame(&mut self, report: &Report) -> io::Result<()> {
        match self.output {
            Output::Text => writeln!(self.to, "{report}"),
            Output::Json => {
                serde_json::to_writer(&mut self.to, report)?;
                writeln!(self.to)
            }
            Output::Summary => Ok(()),
        }
    }

    fn summary(&mut self, totals: &Totals) -> io::Result<()> {
        if self.output == Output::Json {
            serde_json::to_writer(&mut self.to, &serde_json::json!({ "summary": totals }))?;
            writeln!(self.to)?;
            return self.to.flush();
        }
        writeln!(
            self.to,
            "{} packets: {} forwarded, {} replied, {} dropped, {} released later, {} still held",
            totals.packets,
            totals.forwarded,
            totals.replied,
            totals.dropped,
            totals.released,
            totals.held
        )?;
        for (reason, count) in &totals.reasons {
            writeln!(self.to, "{count:>8} {reason}")?;
        }
        self.to.flush()
    }
}
