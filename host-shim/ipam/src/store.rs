//! Who has which address, in the layout of `host-local`: a file per address that holds the container's id and the
//! interface's name, `last_reserved_ip.<set>`, and a lock file.
//!
//! An address's file appears at once and whole (a hard link to a file that is synced already), so there is no moment at
//! which a power cut leaves half of one. Files that begin with a dot are ours alone; `host-local` skips them:
//! `.stage` (about to become an address's file), `.released-<seconds>-<address>` (cooling down), `.boot`.
//!
//! All functions expect the caller to hold the disk's lock.

use crate::disk::Disk;
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::IpAddr;

/// An attachment that has addresses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    pub container_id: String,
    pub ifname: String,
}

/// An address that is held.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease {
    pub ip: IpAddr,
    /// Empty for a file that says nothing: its writer died in the middle.
    pub container_id: String,
    /// `None` in files of old versions of `host-local`.
    pub ifname: Option<String>,
}

impl Lease {
    /// Whether `owner` holds it.
    pub fn is_of(&self, owner: &Owner) -> bool {
        self.container_id == owner.container_id
            && self
                .ifname
                .as_ref()
                .is_none_or(|ifname| *ifname == owner.ifname)
    }

    /// As a person would name its holder.
    pub fn holder(&self) -> String {
        match (&self.container_id, &self.ifname) {
            (id, _) if id.is_empty() => "nobody known".into(),
            (id, Some(ifname)) => format!("{id} {ifname}"),
            (id, None) => id.clone(),
        }
    }
}

const STAGE: &str = ".stage";
const STAGE_BOOT: &str = ".stage-boot";
const BOOT: &str = ".boot";
const RELEASED: &str = ".released-";
/// `host-local` separates with this, and compares whole contents.
const LINE_BREAK: &str = "\r\n";

/// The names in the directory, sorted by what they are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    pub(crate) leases: Vec<Lease>,
    /// Cooling down: when it was released, in seconds, and the file.
    pub(crate) released: HashMap<IpAddr, (u64, String)>,
}

/// The files, and what was read of them before.
#[derive(Debug)]
pub(crate) struct Store<D> {
    pub(crate) disk: D,
    read: HashMap<String, (u64, Lease)>,
}

impl<D: Disk> Store<D> {
    pub(crate) fn new(disk: D) -> Self {
        Self {
            disk,
            read: HashMap::new(),
        }
    }

    /// What is there now. Files are read once; a file that takes the place of another is read again.
    pub(crate) fn listing(&mut self) -> io::Result<Listing> {
        let mut listing = Listing::default();
        let mut read = HashMap::new();
        for (name, number) in self.disk.list()? {
            if let Ok(ip) = name.parse::<IpAddr>() {
                let lease = match self.read.remove(&name) {
                    Some((known, lease)) if known == number => lease,
                    _ => match self.disk.read(&name) {
                        Ok(bytes) => parse(ip, &bytes),
                        Err(error) if error.kind() == ErrorKind::NotFound => continue,
                        Err(error) => return Err(error),
                    },
                };
                read.insert(name, (number, lease.clone()));
                listing.leases.push(lease);
            } else if let Some((seconds, ip)) = parse_released(&name) {
                listing.released.insert(ip, (seconds, name));
            }
        }
        self.read = read;
        Ok(listing)
    }

    /// Writes what the files of `owner`'s addresses will be.
    pub(crate) fn stage(&self, owner: &Owner) -> io::Result<()> {
        // After a crash the stage may be a second name of an address's file: never write into it.
        absent_is_fine(self.disk.remove(STAGE))?;
        let content = format!("{}{LINE_BREAK}{}", owner.container_id.trim(), owner.ifname);
        self.disk.create(STAGE, content.as_bytes())
    }

    /// Gives `ip` to whoever was staged. `false` if somebody has it.
    pub(crate) fn take(&self, ip: IpAddr) -> io::Result<bool> {
        match self.disk.link(STAGE, &ip.to_string()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn unstage(&self) -> io::Result<()> {
        absent_is_fine(self.disk.remove(STAGE))
    }

    /// Where the walk through set `index` stands. A file that cannot be read says nothing.
    pub(crate) fn last_reserved(&self, index: usize) -> Option<IpAddr> {
        let bytes = self.disk.read(&last_reserved_name(index)).ok()?;
        String::from_utf8(bytes).ok()?.trim().parse().ok()
    }

    /// Remembers where the walk stands.
    pub(crate) fn set_last_reserved(&self, index: usize, ip: IpAddr) -> io::Result<()> {
        self.disk
            .note(&last_reserved_name(index), ip.to_string().as_bytes())
    }

    /// Frees `ip` if `lease` is still what its file says; it cools down from `seconds` on, if given.
    pub(crate) fn free(&self, lease: &Lease, seconds: Option<u64>) -> io::Result<bool> {
        let name = lease.ip.to_string();
        match self.disk.read(&name) {
            Ok(bytes) if parse(lease.ip, &bytes) == *lease => {}
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
        let freed = match seconds {
            Some(seconds) => self
                .disk
                .rename(&name, &format!("{RELEASED}{seconds}-{name}")),
            None => self.disk.remove(&name),
        };
        absent_is_fine(freed)?;
        Ok(true)
    }

    /// Forgets that an address was cooling down.
    pub(crate) fn forget_release(&self, file: &str) -> io::Result<()> {
        absent_is_fine(self.disk.remove(file))
    }

    /// The boot in which the directory was last used.
    pub(crate) fn boot(&self) -> io::Result<Option<String>> {
        match self.disk.read(BOOT) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn set_boot(&self, id: &str) -> io::Result<()> {
        absent_is_fine(self.disk.remove(STAGE_BOOT))?;
        self.disk.create(STAGE_BOOT, id.as_bytes())?;
        self.disk.rename(STAGE_BOOT, BOOT)?;
        self.disk.sync()
    }
}

fn absent_is_fine(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn last_reserved_name(index: usize) -> String {
    format!("last_reserved_ip.{index}")
}

fn parse(ip: IpAddr, bytes: &[u8]) -> Lease {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.trim().lines().map(str::trim);
    let container_id = lines.next().unwrap_or_default().to_owned();
    Lease {
        ip,
        container_id,
        ifname: lines.next().map(ToOwned::to_owned),
    }
}

fn parse_released(name: &str) -> Option<(u64, IpAddr)> {
    let (seconds, ip) = name.strip_prefix(RELEASED)?.split_once('-')?;
    Some((seconds.parse().ok()?, ip.parse().ok()?))
}
