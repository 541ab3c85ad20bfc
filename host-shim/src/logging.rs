//! The daemon's log: lines to standard error that can neither block nor end the daemon.
//!
//! The reader of standard error may stop reading (the pipe fills) or exit (writes fail). Pods' packets
//! and the plugin's calls must not wait for it, so lines go through a bounded queue to a thread of
//! their own. A line that finds the queue full is dropped and counted; the count is logged when the
//! reader is back.

use std::io::{self, IsTerminal as _, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;

/// Lines waiting for the writer. With lines of some hundred bytes: a quarter of a megabyte.
const QUEUE: usize = 1024;
/// A longer line is cut, so that a queue of them stays small.
const LINE_MAX: usize = 16 << 10;
/// How long the last lines may take.
const FLUSH: Duration = Duration::from_millis(500);

enum Message {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// Where log lines go; cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Starts the thread that writes to `output`. It ends with the last clone.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    fn start(format: LogFormat, output: impl Write + Send + 'static) -> io::Result<Self> {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let count = dropped.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(&messages, &count, format, output))?;
        Ok(Self { queue, dropped })
    }

    /// Waits until the lines so far are written, a bounded time. Returns whether they were.
    pub fn flush(&self) -> bool {
        let (done, wait) = mpsc::sync_channel(1);
        self.queue.try_send(Message::Flush(done)).is_ok() && wait.recv_timeout(FLUSH).is_ok()
    }
}

/// Every write is one whole line: the subscriber formats an event before it writes it.
impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut line = bytes.to_vec();
        if line.len() > LINE_MAX {
            line.truncate(LINE_MAX);
            line.push(b'\n');
        }
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

fn write_all(
    messages: &Receiver<Message>,
    dropped: &AtomicU64,
    format: LogFormat,
    mut output: impl Write,
) {
    for message in messages {
        match message {
            Message::Line(line) => {
                let missing = dropped.swap(0, Ordering::Relaxed);
                let reported =
                    missing == 0 || output.write_all(&dropped_line(format, missing)).is_ok();
                if !reported {
                    dropped.fetch_add(missing, Ordering::Relaxed);
                }
                if output.write_all(&line).is_err() {
                    dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            // The other side may have given up waiting.
            Message::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

fn dropped_line(format: LogFormat, lines: u64) -> Vec<u8> {
    match format {
        LogFormat::Human => format!(" WARN log lines dropped: {lines}\n"),
        LogFormat::Json => format!(
            "{{\"level\":\"WARN\",\"fields\":{{\"message\":\"log lines dropped\",\"lines\":{lines}}}}}\n"
        ),
    }
    .into_bytes()
}

/// Sends the log to standard error from now on.
///
/// # Errors
/// When the kernel gives no thread.
pub fn start(format: LogFormat) -> io::Result<Log> {
    let log = Log::start(format, io::stderr())?;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(log.clone());
    match format {
        LogFormat::Human => subscriber.with_target(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use super::*;

    /// Keeps what is written; a write waits for the gate and fails as long as it is told to.
    #[derive(Clone, Default)]
    struct Reader {
        text: Arc<Mutex<Vec<u8>>>,
        gate: Arc<Mutex<()>>,
        gone: Arc<Mutex<bool>>,
    }

    impl Reader {
        fn text(&self) -> String {
            String::from_utf8(self.text.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _open = self.gate.lock().unwrap();
            if *self.gone.lock().unwrap() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.text.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn drained(log: &Log) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !Log::flush(log) {
            assert!(Instant::now() < deadline, "not written in time");
        }
    }

    #[test]
    fn a_reader_that_stops_costs_lines_which_are_counted_and_no_time() {
        let reader = Reader::default();
        let mut log = Log::start(LogFormat::Json, reader.clone()).unwrap();
        let stuck = reader.gate.lock().unwrap();
        let begin = Instant::now();
        for _ in 0..QUEUE + 100 {
            log.write_all(b"line\n").unwrap();
        }
        assert!(begin.elapsed() < Duration::from_secs(1));
        assert!(!Log::flush(&log));
        drop(stuck);
        drained(&log);
        log.write_all(b"last\n").unwrap();
        drained(&log);
        let text = reader.text();
        let written = text.matches("line\n").count() as u64;
        let counted: u64 = text
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|line| line["fields"]["lines"].as_u64())
            .sum();
        assert_eq!(written + counted, QUEUE as u64 + 100, "{counted}");
        assert!(text.ends_with("last\n"));
    }

    #[test]
    fn a_reader_that_exits_costs_lines_which_are_counted() {
        let reader = Reader::default();
        let mut log = Log::start(LogFormat::Human, reader.clone()).unwrap();
        *reader.gone.lock().unwrap() = true;
        for _ in 0..3 {
            log.write_all(b"lost\n").unwrap();
        }
        drained(&log);
        *reader.gone.lock().unwrap() = false;
        log.write_all(b"seen\n").unwrap();
        drained(&log);
        assert_eq!(reader.text(), " WARN log lines dropped: 3\nseen\n");
    }

    #[test]
    fn a_long_line_is_cut() {
        let reader = Reader::default();
        let mut log = Log::start(LogFormat::Human, reader.clone()).unwrap();
        log.write_all(&vec![b'x'; 2 * LINE_MAX]).unwrap();
        drained(&log);
        assert_eq!(reader.text().len(), LINE_MAX + 1);
    }
}
