//! Lines to standard error that can neither block nor kill the VMM.
//!
//! Whoever reads standard error may stop reading (the pipe fills), or die (writing fails). Neither may stop the dataplane, so
//! lines go through a bounded queue to a thread of their own; a line that finds the queue full is lost, and the caller is told.

use std::io;
use std::io::Write;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::SyncSender;
use std::thread;
use std::time::Duration;

/// Lines waiting for the writer.
const QUEUE: usize = 256;
/// How long the last lines may take.
const FLUSH: Duration = Duration::from_millis(500);

#[derive(Debug)]
enum Message {
    Line(String),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// Where lines go; cheap to clone.
#[derive(Debug, Clone)]
pub struct Lines {
    queue: SyncSender<Message>,
}

impl Lines {
    /// Starts the thread that writes to `output`. It ends with the last clone.
    ///
    /// # Errors
    /// The process is out of threads.
    pub fn start(output: impl Write + Send + 'static) -> io::Result<Lines> {
        Lines::start_with(QUEUE, output)
    }

    pub(crate) fn start_with(
        queue: usize,
        output: impl Write + Send + 'static,
    ) -> io::Result<Lines> {
        let (queue, messages) = mpsc::sync_channel(queue);
        thread::Builder::new()
            .name("report".into())
            .spawn(move || write_all(&messages, output))?;
        Ok(Lines { queue })
    }

    /// Queues `line` (without its newline). Returns false if it is lost.
    #[must_use]
    pub fn send(&self, line: String) -> bool {
        self.queue.try_send(Message::Line(line)).is_ok()
    }

    /// Waits for the lines so far, a bounded time. Returns whether they were written.
    pub fn flush(&self) -> bool {
        let (done, wait) = mpsc::sync_channel(1);
        self.queue.try_send(Message::Flush(done)).is_ok() && wait.recv_timeout(FLUSH).is_ok()
    }
}

fn write_all(messages: &Receiver<Message>, mut output: impl Write) {
    for message in messages {
        match message {
            // One write per line, so that lines of several processes do not mix. Nobody is left to tell about an error.
            Message::Line(mut line) => {
                line.push('\n');
                let _ = output.write_all(line.as_bytes());
            }
            // The other side may have given up waiting.
            Message::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

/// For the log: every write is one whole line.
impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        // A lost line of the log is not worth another line.
        let _ = self.send(text.trim_end_matches('\n').to_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;
    use std::sync::Mutex;

    use super::*;

    /// Keeps what is written.
    #[derive(Clone, Default)]
    pub(crate) struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Paper {
        pub(crate) fn lines(&self) -> Vec<String> {
            let bytes = self.0.lock().unwrap();
            String::from_utf8(bytes.clone())
                .unwrap()
                .lines()
                .map(String::from)
                .collect()
        }
    }

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_arrive_in_order_and_a_flush_waits_for_them() {
        let paper = Paper::default();
        let mut lines = Lines::start(paper.clone()).unwrap();
        assert!(lines.send("one".into()));
        lines.write_all(b"two\n").unwrap();
        assert!(Lines::flush(&lines));
        assert_eq!(paper.lines(), ["one", "two"]);
    }

    struct Stuck(Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Until the test ends.
            let _ = self.0.recv();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stopped_costs_lines_but_never_waits() {
        let (_held, stuck) = mpsc::channel();
        let lines = Lines::start(Stuck(stuck)).unwrap();
        let taken = (0..10 * QUEUE).filter(|_| lines.send("x".into())).count();
        assert!((QUEUE..=QUEUE + 1).contains(&taken), "{taken}");
        assert!(!Lines::flush(&lines));
    }

    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_died_costs_lines_only() {
        let lines = Lines::start(Gone).unwrap();
        for _ in 0..10 {
            assert!(lines.send("x".into()));
        }
        assert!(Lines::flush(&lines));
    }
}
