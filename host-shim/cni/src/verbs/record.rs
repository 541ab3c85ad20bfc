//! The attachments that were made, one file each: what DEL, CHECK and GC need without their caller's help.
//!
//! `<run>/attachments/<network>/<container>@<ifname>`. Written before anything is made, marked complete when all is: a file
//! that is not complete after a start is a call that died in the middle. The run directory does not outlive a boot, and
//! neither do the links.

use crate::config::Config;
use crate::env::Environment;
use crate::verbs::node::Link;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What names an attachment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    pub network: String,
    pub container_id: String,
    pub ifname: String,
}

impl Key {
    /// The attachment of a call.
    pub fn of(env: &Environment, config: &Config) -> Self {
        Self {
            network: config.name.clone(),
            container_id: env.container_id.clone(),
            ifname: env.ifname.clone(),
        }
    }
}

/// An attachment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub v: u32,
    pub key: Key,
    /// The link's name on this node: the pod's, unless another sandbox of the pod has it.
    pub name: String,
    /// Everything of it was made.
    pub complete: bool,
    pub link: Link,
    /// The configuration it was made with, for the delegate.
    pub config: Value,
    /// Where the delegate was found.
    pub path: String,
}

/// What the kernel writes without looking whether the writer has been killed.
const PAGE: usize = 4096;

/// The version of a record.
pub const VERSION: u32 = 1;

/// All attachments of a node: read once at the start, written through.
#[derive(Debug)]
pub struct Records {
    root: PathBuf,
    known: Mutex<BTreeMap<Key, Arc<Record>>>,
}

impl Records {
    /// Those below `run_dir`.
    ///
    /// # Errors
    /// As the disk says.
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let root = run_dir.join("attachments");
        let mut known = BTreeMap::new();
        for network in entries(&root)? {
            if !network.is_dir() {
                // Left by a crash in the middle of a write.
                fs::remove_file(&network)?;
                continue;
            }
            for path in entries(&network)? {
                if path.metadata()?.len() == 0 {
                    // Made and not written: nothing was begun.
                    fs::remove_file(&path)?;
                } else if let Some(record) = read(&path)? {
                    known.insert(record.key.clone(), Arc::new(record));
                }
            }
        }
        Ok(Self {
            root,
            known: Mutex::new(known),
        })
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Record>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.root
            .join(&key.network)
            .join(format!("{}@{}", key.container_id, key.ifname))
    }

    /// Writes a record; whoever dies in the middle leaves the old one or the new one, or a file that says nothing where there was
    /// none: the run directory outlives processes and no power cut, so no file is made beside it and renamed.
    ///
    /// # Errors
    /// As the disk says.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let path = self.path(&record.key);
        // Configurations of runtimes are in it, which may hold secrets of a delegated IPAM.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.root.join(&record.key.network))?;
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        let mut bytes = serde_json::to_vec(record)?;
        // Nothing of a longer one shows behind it.
        let before = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        if bytes.len() < before && before <= PAGE {
            bytes.resize(before, b' ');
        }
        if before == 0 || bytes.len().max(before) <= PAGE {
            // One write of one page is done or not begun when its process is killed.
            file.write_all_at(&bytes, 0)?;
        } else {
            drop(file);
            self.replace(&record.key, &path, &bytes)?;
        }
        self.known()
            .insert(record.key.clone(), Arc::new(record.clone()));
        Ok(())
    }

    fn replace(&self, key: &Key, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let Key {
            network,
            container_id,
            ifname,
        } = key;
        let temporary = self
            .root
            .join(format!(".{network}-{container_id}@{ifname}"));
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        fs::rename(&temporary, path)
    }

    /// The record of `key`.
    pub fn read(&self, key: &Key) -> Option<Arc<Record>> {
        self.known().get(key).cloned()
    }

    /// Removes a record; one that is gone is no error.
    ///
    /// # Errors
    /// As the disk says.
    pub fn remove(&self, key: &Key) -> io::Result<()> {
        match fs::remove_file(self.path(key)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.known().remove(key);
        Ok(())
    }

    /// All records of a network, or of all.
    pub fn all(&self, network: Option<&str>) -> Vec<Arc<Record>> {
        let known = self.known();
        let is_of = |record: &&Arc<Record>| network.is_none_or(|name| record.key.network == name);
        known.values().filter(is_of).cloned().collect()
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// What cannot be read, or is of another version, is not ours to understand.
fn read(path: &Path) -> io::Result<Option<Record>> {
    let bytes = fs::read(path)?;
    Ok(serde_json::from_slice(&bytes)
        .ok()
        .filter(|record: &Record| record.v == VERSION))
}
