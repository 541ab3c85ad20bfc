//! Network namespaces of a test's own, which vanish with it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::{fs, io};

use super::netns::Netns;

/// A network namespace that lives as long as this.
#[derive(Debug)]
pub struct Namespace {
    pub path: PathBuf,
    _end: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    /// An empty one, `lo` down.
    ///
    /// # Errors
    /// Without the right to make one.
    pub fn new() -> io::Result<Self> {
        let (made, when_made) = mpsc::channel();
        let (end, when_over) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let unshared = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
            made.send(unshared.map(|()| nix::unistd::gettid())).ok();
            // Ends with an error, when the other half is dropped.
            when_over.recv().ok();
        });
        let tid = when_made.recv().map_err(io::Error::other)??;
        let path = format!("/proc/{}/task/{tid}/ns/net", std::process::id()).into();
        Ok(Self {
            path,
            _end: end,
            thread: Some(thread),
        })
    }

    /// Runs `work` inside; a test has no use for its error.
    ///
    /// # Panics
    /// When `work` fails.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        let outcome = Netns::open(&self.path).and_then(|netns| netns.run(work));
        outcome.expect("work inside a test's namespace succeeds")
    }

    /// Names of all interfaces.
    pub fn interfaces(&self) -> BTreeSet<String> {
        let table = self.run(|| fs::read_to_string("/proc/thread-self/net/dev"));
        let names = table.lines().skip(2).filter_map(|l| l.split_once(':'));
        names.map(|(name, _)| name.trim().to_owned()).collect()
    }

    /// Everything that wiring could leave: interfaces, addresses, routes.
    pub fn picture(&self) -> Vec<String> {
        let files = ["dev", "route", "ipv6_route", "if_inet6", "fib_trie"];
        let read = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        let texts = self.run(|| files.into_iter().map(read).collect::<io::Result<Vec<_>>>());
        // Only the first word of a line is no counter.
        let first_word = |line: &str| line.split_whitespace().next().map(str::to_owned);
        texts
            .iter()
            .flat_map(|t| t.lines().filter_map(first_word))
            .collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let (end, _) = mpsc::channel();
        self._end = end;
        self.thread.take().map(JoinHandle::join);
    }
}

/// Namespaces for the host and two pods, or the reason why not.
pub fn namespaces() -> Option<[Namespace; 3]> {
    let tun = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let made = tun.and_then(|_| Ok([Namespace::new()?, Namespace::new()?, Namespace::new()?]));
    made.map_err(|error| println!("SKIP: no taps or namespaces here: {error}"))
        .ok()
}
