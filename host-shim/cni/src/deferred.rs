//! DELs that the node could not be told of: one file each, written so that a power cut loses none that was promised.
//!
//! `<state>/deferred/<network>/<container>@<ifname>`. A later ADD of the same attachment carries the DEL out first.

use crate::rpc::Request;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// The kept DELs below one state directory.
#[derive(Clone, Debug)]
pub struct Deferred {
    root: PathBuf,
}

/// A kept DEL and its file.
#[derive(Clone, Debug)]
pub struct Kept {
    pub path: PathBuf,
    pub request: Request,
}

impl Deferred {
    /// Those below `state_dir`.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            root: state_dir.join("deferred"),
        }
    }

    fn path(&self, network: &str, container_id: &str, ifname: &str) -> PathBuf {
        self.root
            .join(network)
            .join(format!("{container_id}@{ifname}"))
    }

    /// Keeps `request`. When this returns, it survives a power cut.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn keep(&self, network: &str, request: &Request) -> io::Result<()> {
        let path = self.path(network, &request.env.container_id, &request.env.ifname);
        let dir = self.root.join(network);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)?;
        let temporary = self.root.join(format!(".{}-{network}", std::process::id()));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec(request)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        for dir in [
            dir.as_path(),
            self.root.as_path(),
            self.root.parent().unwrap_or(&dir),
        ] {
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    }

    /// The kept DEL of one attachment.
    ///
    /// # Errors
    /// If the disk refuses; a file that cannot be read is no error but is not found.
    pub fn of(&self, network: &str, container: &str, ifname: &str) -> io::Result<Option<Kept>> {
        read(&self.path(network, container, ifname))
    }

    /// All of them.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn all(&self) -> io::Result<Vec<Kept>> {
        let mut all = Vec::new();
        for network in entries(&self.root)? {
            if network.is_dir() {
                for path in entries(&network)? {
                    all.extend(read(&path)?);
                }
            }
        }
        Ok(all)
    }

    /// Forgets a DEL that has been carried out.
    ///
    /// # Errors
    /// If the disk refuses; it is no error if the file is gone.
    pub fn forget(&self, kept: &Kept) -> io::Result<()> {
        match fs::remove_file(&kept.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn read(path: &Path) -> io::Result<Option<Kept>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // The rename makes a torn file impossible; what cannot be read was not written here.
    let Ok(request) = serde_json::from_slice(&bytes) else {
        return Ok(None);
    };
    Ok(Some(Kept {
        path: path.to_owned(),
        request,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::env::Environment;

    fn request(container: &str) -> Request {
        let env = Environment::read(|name| match name {
            "CNI_COMMAND" => Some("DEL".into()),
            "CNI_CONTAINERID" => Some(container.into()),
            "CNI_IFNAME" => Some("eth0".into()),
            _ => None,
        });
        let config =
            Config::parse(br#"{"cniVersion":"1.1.0","name":"net","type":"sluice-cni"}"#).unwrap();
        Request::new(&env.unwrap(), &config)
    }

    #[test]
    fn what_is_kept_is_found_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let deferred = Deferred::new(dir.path());
        assert!(deferred.all().unwrap().is_empty());
        for container in ["one", "two", "one"] {
            deferred.keep("net", &request(container)).unwrap();
        }
        assert_eq!(deferred.all().unwrap().len(), 2);
        let one = deferred.of("net", "one", "eth0").unwrap().unwrap();
        assert_eq!(one.request, request("one"));
        assert!(deferred.of("other", "one", "eth0").unwrap().is_none());
        deferred.forget(&one).unwrap();
        deferred.forget(&one).unwrap();
        assert_eq!(deferred.all().unwrap().len(), 1);
    }
}
