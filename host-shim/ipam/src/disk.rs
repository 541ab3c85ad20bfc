//! The file operations that the store is made of.
//!
//! Few enough that a test can stand in for the disk and cut the power between any two of them, losing whatever was not
//! synced (`disk::testing`).

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirEntryExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

/// One directory of small files.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Holds off everybody else, threads and processes, until it is dropped.
    type Lock;

    /// # Errors
    /// As the system says.
    fn lock(&self) -> io::Result<Self::Lock>;

    /// The names, each with a number that changes when another file takes the name.
    ///
    /// # Errors
    /// As the system says.
    fn list(&self) -> io::Result<Vec<(String, u64)>>;

    /// # Errors
    /// As the system says.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;

    /// Makes a file that is not there yet; its bytes are on the disk when this returns, its name need not be.
    ///
    /// # Errors
    /// As the system says.
    fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Replaces a file that nobody misses: after a power cut it may be the old one, the new one, or empty.
    ///
    /// # Errors
    /// As the system says.
    fn note(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Gives the file a second name, if that is free.
    ///
    /// # Errors
    /// `AlreadyExists`, or as the system says.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;

    /// # Errors
    /// As the system says.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// # Errors
    /// `NotFound`, or as the system says.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// All changes of names made so far are on the disk when this returns.
    ///
    /// # Errors
    /// As the system says.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of the machine.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// `host-local`'s lock file.
    pub const LOCK: &'static str = "lock";

    /// The directory `path`, made if it is not there.
    ///
    /// # Errors
    /// As the system says.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path)?;
        Ok(Self { path })
    }
}

impl Disk for Directory {
    type Lock = File;

    fn lock(&self) -> io::Result<File> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.path.join(Self::LOCK))?;
        file.lock()?;
        Ok(file)
    }

    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if let Ok(name) = entry.file_name().into_string() {
                names.push((name, entry.ino()));
            }
        }
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path.join(name))
    }

    fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.path.join(name);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn note(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        fs::write(self.path.join(name), bytes)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        fs::hard_link(self.path.join(from), self.path.join(to))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A disk that loses power: after a given number of operations everything fails, and what was not synced is there or
    //! not, as the test wishes.

    use super::*;
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    type Names = BTreeMap<String, Arc<Vec<u8>>>;

    #[derive(Debug, Default)]
    struct State {
        /// What is on the platter.
        durable: Names,
        /// What a running system sees.
        seen: Names,
        /// Changes of names since the last sync: the new file, or none.
        pending: Vec<(String, Option<Arc<Vec<u8>>>)>,
        left: Option<usize>,
        /// Only the next operation fails, not all after it.
        once: bool,
        operations: usize,
    }

    #[derive(Clone, Debug, Default)]
    pub(crate) struct PowerCut(Arc<Mutex<State>>);

    impl PowerCut {
        /// Fails everything after `operations` more changes.
        pub(crate) fn cut_after(&self, operations: usize) {
            let mut state = self.0.lock().unwrap();
            (state.left, state.once) = (Some(operations), false);
        }

        /// Fails one change, after `operations` more.
        pub(crate) fn refuse_after(&self, operations: usize) {
            let mut state = self.0.lock().unwrap();
            (state.left, state.once) = (Some(operations), true);
        }

        /// How many changes there were.
        pub(crate) fn operations(&self) -> usize {
            self.0.lock().unwrap().operations
        }

        /// Power again. Of the changes that were not synced those are kept whose bit is set.
        pub(crate) fn restart(&self, kept: u64) {
            let mut state = self.0.lock().unwrap();
            let pending = std::mem::take(&mut state.pending);
            for (index, (name, file)) in pending.into_iter().enumerate() {
                if kept >> (index % 64) & 1 == 1 {
                    match file {
                        Some(file) => state.durable.insert(name, file),
                        None => state.durable.remove(&name),
                    };
                }
            }
            state.seen = state.durable.clone();
            state.left = None;
        }

        fn change<T>(&self, f: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
            let mut state = self.0.lock().unwrap();
            match &mut state.left {
                Some(0) => {
                    if state.once {
                        state.left = None;
                    }
                    return Err(io::Error::other("the power is off"));
                }
                Some(left) => *left -= 1,
                None => {}
            }
            state.operations += 1;
            f(&mut state)
        }
    }

    impl State {
        fn set(&mut self, name: &str, file: Option<Arc<Vec<u8>>>) {
            match &file {
                Some(file) => self.seen.insert(name.into(), file.clone()),
                None => self.seen.remove(name),
            };
            self.pending.push((name.into(), file));
        }

        fn find(&self, name: &str) -> io::Result<Arc<Vec<u8>>> {
            self.seen
                .get(name)
                .cloned()
                .ok_or_else(|| io::ErrorKind::NotFound.into())
        }
    }

    impl Disk for PowerCut {
        type Lock = ();

        fn lock(&self) -> io::Result<()> {
            Ok(())
        }

        fn list(&self) -> io::Result<Vec<(String, u64)>> {
            let state = self.0.lock().unwrap();
            Ok(state
                .seen
                .iter()
                .map(|(n, f)| (n.clone(), Arc::as_ptr(f) as u64))
                .collect())
        }

        fn read(&self, name: &str) -> io::Result<Vec<u8>> {
            Ok(self.0.lock().unwrap().find(name)?.to_vec())
        }

        fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
            if self.0.lock().unwrap().seen.contains_key(name) {
                return self.change(|_| Err(io::ErrorKind::AlreadyExists.into()));
            }
            self.note(name, bytes)
        }

        fn note(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
            // The name first, the bytes later: a cut between leaves an empty file.
            self.change(|state| {
                state.set(name, Some(Arc::default()));
                Ok(())
            })?;
            self.change(|state| {
                let file = Arc::new(bytes.to_vec());
                state.seen.insert(name.into(), file.clone());
                if let Some(last) = state.pending.last_mut() {
                    last.1 = Some(file);
                }
                Ok(())
            })
        }

        fn link(&self, from: &str, to: &str) -> io::Result<()> {
            self.change(|state| {
                if state.seen.contains_key(to) {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                let file = state.find(from)?;
                state.set(to, Some(file));
                Ok(())
            })
        }

        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
            self.change(|state| {
                let file = state.find(from)?;
                // A rename is one change of a journal: both names or none. Here the worst is assumed: any of the two.
                state.set(to, Some(file));
                state.set(from, None);
                Ok(())
            })
        }

        fn remove(&self, name: &str) -> io::Result<()> {
            self.change(|state| {
                state.find(name)?;
                state.set(name, None);
                Ok(())
            })
        }

        fn sync(&self) -> io::Result<()> {
            self.change(|state| {
                for (name, file) in std::mem::take(&mut state.pending) {
                    match file {
                        Some(file) => state.durable.insert(name, file),
                        None => state.durable.remove(&name),
                    };
                }
                Ok(())
            })
        }
    }
}
