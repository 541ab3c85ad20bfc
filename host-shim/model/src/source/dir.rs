//! A directory of manifests: `*.yaml`, `*.yml`, `*.json`, not its subdirectories. The embedded default.
//!
//! Changes are seen by inotify. A file is read once its writer has closed it and nothing has happened to it for a
//! moment, so neither a file half written nor the gap in which an editor renames is taken for the truth. A writer that keeps
//! its file open is waited for, but not for ever. Volumes of a ConfigMap, which swap a symlink, are understood.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify;
use rustix::fs::inotify::{CreateFlags, ReadFlags, WatchFlags};

use super::tree::{Tree, is_manifest};
use super::{Running, Source};
use crate::compile::Config;
use crate::finding::Finding;
use crate::object::{Kind, ObjectKey};
use crate::overview;
use crate::store::{Event, Store};

/// Nothing may have happened to a file for this long before it is read.
const QUIET: Duration = Duration::from_millis(40);
/// A writer that does not close its file is waited for this long.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a directory that is not there is looked for.
const MISSING: Duration = Duration::from_millis(500);
/// A manifest is text of people; more is something else.
const FILE_SIZE: u64 = 64 << 20;

/// The directory.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

/// What `sluice validate` says about a directory.
#[derive(Debug)]
pub struct Report {
    /// In the order of files and lines.
    pub findings: Vec<Finding>,
    /// What the valid objects amount to.
    pub store: Store,
}

/// Reads a directory once.
///
/// # Errors
/// The directory cannot be read. A file that cannot be is a finding.
pub fn validate(directory: &Path) -> io::Result<Report> {
    let mut tree = Tree::default();
    read_all(directory, &mut tree)?;
    let mut store = Store::default();
    for event in tree.events() {
        store.apply(event);
    }
    store.apply(Event::InSync);
    let mut findings = tree.findings();
    let config = Config {
        endpoints_from_selectors: true,
        ..Config::default()
    };
    for (name, found) in overview::refused(&store, &config) {
        let kind = Kind::Service;
        let place = tree.place(&ObjectKey { kind, name });
        let (file, line) = place.map_or((None, 0), |(file, line)| (Some(file.to_owned()), line));
        findings.extend(found.into_iter().map(|it| Finding {
            file: file.clone(),
            line,
            ..it
        }));
    }
    findings.sort();
    Ok(Report { findings, store })
}

impl Source for Directory {
    fn start(self, events: Sender<Event>) -> io::Result<Running> {
        let notify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let watcher = Watcher {
            directory: self.path,
            notify,
            stopped,
            watch: None,
            is_lost: false,
            tree: Tree::default(),
            waiting: BTreeMap::new(),
            events,
        };
        let thread = std::thread::Builder::new()
            .name("manifests".into())
            .spawn(move || watcher.run())?;
        let stop = move || {
            if let Err(error) = rustix::io::write(&stop, &1u64.to_ne_bytes()) {
                tracing::error!(%error, "The manifest watcher could not be told to end");
            }
        };
        Ok(Running::new(stop, thread))
    }
}

struct Watcher {
    directory: PathBuf,
    notify: OwnedFd,
    stopped: OwnedFd,
    watch: Option<i32>,
    /// It was said that there is no directory to watch.
    is_lost: bool,
    tree: Tree,
    waiting: BTreeMap<PathBuf, Waiting>,
    events: Sender<Event>,
}

/// A file to which something has happened.
#[derive(Clone, Copy)]
struct Waiting {
    first: Instant,
    last: Instant,
    /// Its writer has not closed it.
    open: bool,
}

impl Waiting {
    fn due(&self) -> Instant {
        if self.open {
            self.first + PATIENCE
        } else {
            self.last + QUIET
        }
    }
}

/// Nobody listens any more, or the source was told to end.
struct Ended;

impl Watcher {
    fn run(mut self) {
        while self.step().is_ok() {}
    }

    fn step(&mut self) -> Result<(), Ended> {
        if self.watch.is_none() {
            self.begin()?;
        }
        let next = match self.watch {
            None => Some(MISSING),
            Some(_) => self
                .waiting
                .values()
                .map(|it| it.due().saturating_duration_since(Instant::now()))
                .min(),
        };
        self.wait(next)?;
        self.read_due()
    }

    /// Watches the directory and reads all of it. In this order: what changes meanwhile is read again.
    fn begin(&mut self) -> Result<(), Ended> {
        let wanted = WatchFlags::CLOSE_WRITE
            | WatchFlags::MODIFY
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        let watch = match inotify::add_watch(&self.notify, &self.directory, wanted) {
            Ok(watch) => watch,
            Err(error) => return self.lost(&error.to_string()),
        };
        match read_all(&self.directory, &mut self.tree) {
            Ok(()) => {
                self.watch = Some(watch);
                self.is_lost = false;
                self.say()?;
                self.send(Event::InSync)
            }
            Err(error) => self.lost(&error.to_string()),
        }
    }

    fn lost(&mut self, reason: &str) -> Result<(), Ended> {
        if std::mem::replace(&mut self.is_lost, true) {
            return Ok(());
        }
        let reason = format!("{}: {reason}", self.directory.display());
        self.send(Event::Lost { reason })
    }

    fn send(&self, event: Event) -> Result<(), Ended> {
        self.events.send(event).map_err(|_| Ended)
    }

    fn say(&mut self) -> Result<(), Ended> {
        self.tree
            .events()
            .into_iter()
            .try_for_each(|event| self.send(event))
    }

    /// Until something happens, at most for `limit`.
    fn wait(&mut self, limit: Option<Duration>) -> Result<(), Ended> {
        let timeout = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        let mut fds = [
            PollFd::new(&self.notify, PollFlags::IN),
            PollFd::new(&self.stopped, PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "The manifest watcher ends: it cannot wait");
                return Err(Ended);
            }
        }
        let stopped = !fds[1].revents().is_empty();
        if stopped {
            return Err(Ended);
        }
        self.take_notices();
        Ok(())
    }

    fn take_notices(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut seen = Vec::new();
        let mut reader = inotify::Reader::new(self.notify.as_fd(), &mut buffer);
        // Ends with `AGAIN` once all is read.
        while let Ok(event) = reader.next() {
            let name = event.file_name().and_then(|name| name.to_str().ok());
            seen.push((event.wd(), event.events(), name.map(str::to_owned)));
        }
        for (watch, flags, name) in seen {
            if Some(watch) == self.watch || flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                self.take_notice(flags, name.as_deref());
            }
        }
    }

    fn take_notice(&mut self, flags: ReadFlags, name: Option<&str>) {
        let moved = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED;
        if flags.intersects(moved) {
            // Another directory may come in its place.
            if let Some(watch) = self.watch.take()
                && flags.contains(ReadFlags::MOVE_SELF)
                && let Err(error) = inotify::remove_watch(&self.notify, watch)
            {
                tracing::debug!(%error, "The former manifest directory is still watched");
            }
            self.waiting.clear();
            return;
        }
        match name {
            Some(name) if is_manifest(name) => {
                let writing = ReadFlags::MODIFY | ReadFlags::CREATE;
                let now = Instant::now();
                let path = self.directory.join(name);
                let it = self.waiting.entry(path).or_insert(Waiting {
                    first: now,
                    last: now,
                    open: false,
                });
                it.last = now;
                it.open = flags.intersects(writing) && !flags.contains(ReadFlags::ISDIR);
            }
            Some(name) if !name.starts_with("..data") => {}
            // The symlink behind all files was swapped, or notices were lost.
            _ => self.expect_all(),
        }
    }

    fn expect_all(&mut self) {
        let now = Instant::now();
        let waiting = Waiting {
            first: now,
            last: now,
            open: false,
        };
        let listed = list(&self.directory).unwrap_or_default();
        let known = self.tree.files().map(Path::to_owned).collect::<Vec<_>>();
        for path in listed.into_iter().chain(known) {
            self.waiting.entry(path).or_insert(waiting);
        }
    }

    fn read_due(&mut self) -> Result<(), Ended> {
        let now = Instant::now();
        let due: Vec<PathBuf> = self
            .waiting
            .iter()
            .filter(|(_, it)| it.due() <= now)
            .map(|(path, _)| path.clone())
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        for path in due {
            self.waiting.remove(&path);
            read_one(&path, &mut self.tree);
        }
        self.say()
    }
}

fn list(directory: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_manifest) {
            files.insert(entry.path());
        }
    }
    Ok(files)
}

fn read_all(directory: &Path, tree: &mut Tree) -> io::Result<()> {
    let files = list(directory)?;
    let gone: Vec<_> = tree
        .files()
        .filter(|path| !files.contains(*path))
        .map(Path::to_owned)
        .collect();
    for path in gone {
        tree.update(&path, None);
    }
    for path in &files {
        read_one(path, tree);
    }
    Ok(())
}

fn read_one(path: &Path, tree: &mut Tree) {
    match fs::metadata(path) {
        Ok(it) if it.is_dir() => return,
        Ok(it) if it.len() > FILE_SIZE => {
            let reason = format!("Larger than {FILE_SIZE} bytes");
            return tree.update(path, Some(Err(reason)));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return tree.update(path, None),
        Err(error) => return tree.update(path, Some(Err(error.to_string()))),
    }
    match fs::read(path).map(String::from_utf8) {
        Ok(Ok(text)) => tree.update(path, Some(Ok(&text))),
        Ok(Err(_)) => tree.update(path, Some(Err("Not UTF-8".into()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => tree.update(path, None),
        Err(error) => tree.update(path, Some(Err(error.to_string()))),
    }
}
