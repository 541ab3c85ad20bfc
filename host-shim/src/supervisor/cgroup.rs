//! A control group for the appliance's process beside the daemon's own: who ends the daemon's group, as a service manager or a
//! kubelet does, does not end the appliance.
//!
//! It is made in every hierarchy in which the daemon is where the service manager has put it: in all of version 2, and in those
//! of version 1 that agree with the manager's. Where another has put it elsewhere, the process stays with it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

const NAME: &str = "sluice-appliance";
/// Hierarchies of version 1 that a process cannot enter before its processors and memory are set.
const NOT_READY: &str = "cpuset";

/// The group, in all hierarchies.
#[derive(Debug)]
pub(super) struct Group {
    directories: Vec<PathBuf>,
    entries: Vec<File>,
}

impl Group {
    /// Makes it, or finds it.
    ///
    /// # Errors
    /// When the daemon's own group has none above it here, as in a container, or the kernel refuses.
    pub(super) fn make() -> io::Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mut group = Self {
            directories: Vec::new(),
            entries: Vec::new(),
        };
        for (mount, parent) in places(&own, &mounts) {
            let parent = match parent {
                Some(parent) => mount.join(parent),
                None if is_root(&mount) => mount,
                None => {
                    let reason = "what is above the daemon's own group cannot be seen from here";
                    return Err(io::Error::other(reason));
                }
            };
            let directory = parent.join(NAME);
            match fs::create_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(named(&directory, &error));
                }
                _ => group.directories.push(directory.clone()),
            }
            let entry = directory.join("cgroup.procs");
            let file = OpenOptions::new().write(true).open(&entry);
            group
                .entries
                .push(file.map_err(|error| named(&entry, &error))?);
        }
        match group.entries.is_empty() {
            true => Err(io::Error::other(
                "no hierarchy of control groups is mounted",
            )),
            false => Ok(group),
        }
    }

    /// Puts the calling process into it. Nothing is allocated: it is called between fork and exec.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn enter(&self) -> io::Result<()> {
        self.entries
            .iter()
            .try_for_each(|mut entry| entry.write_all(b"0"))
    }

    /// Whether a process is in it.
    pub(super) fn has(pid: i32) -> bool {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        groups
            .lines()
            .any(|line| line.ends_with(&format!("/{NAME}")))
    }

    /// Removes it, unless another process is in it.
    pub(super) fn remove(&self) {
        for directory in &self.directories {
            if let Err(error) = fs::remove_dir(directory) {
                tracing::debug!(directory = %directory.display(), %error, "control group not removed");
            }
        }
    }
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Only the first group of all has none of the files by which a group says what is in it.
fn is_root(mount: &Path) -> bool {
    mount.join("release_agent").exists() || !mount.join("cgroup.events").exists()
}

/// Where each hierarchy is mounted, and the group above the daemon's in it; `None`: the daemon is in the first that is seen.
fn places(own: &str, mounts: &str) -> Vec<(PathBuf, Option<PathBuf>)> {
    // `hierarchy:controllers:path` (cgroups(7)).
    let entries = || {
        own.lines().filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            Some((fields.next()?, fields.next()?))
        })
    };
    let of = |wanted: &str| entries().find(|(name, _)| *name == wanted);
    let unified = of("").map(|(_, path)| path);
    let managed = match of("name=systemd") {
        Some((_, path)) => Some(path),
        None => unified,
    };
    let agrees = |path: &str| managed.is_none_or(|managed| managed == path);
    entries()
        .filter(|(name, path)| *name != NOT_READY && agrees(path))
        .filter_map(|(name, path)| {
            let above = Path::new(path.strip_prefix('/')?).parent();
            Some((mount_of(name, mounts)?, above.map(Path::to_owned)))
        })
        .collect()
}

/// The mount of a hierarchy by its controllers; that of version 2 has none.
fn mount_of(controllers: &str, mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        // `… root point options … - type source super-options` (proc(5)).
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let is_it = match controllers {
            "" => kind == "cgroup2",
            _ => {
                let has = |name: &str| options.split(',').any(|option| option == name);
                kind == "cgroup" && controllers.split(',').all(has)
            }
        };
        (is_it && root == "/").then(|| PathBuf::from(point))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(own: &str, mounts: &str) -> Vec<(String, Option<String>)> {
        let text = |path: PathBuf| path.display().to_string();
        let places = places(own, mounts).into_iter();
        places
            .map(|(mount, above)| (text(mount), above.map(text)))
            .collect()
    }

    const V2: &str =
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";

    #[test]
    fn the_group_is_beside_the_daemons_in_every_kind_of_hierarchy() {
        let service = "/system.slice/sluice-node.service";
        let beside = Some("system.slice".to_owned());
        let unified = found(&format!("0::{service}\n"), V2);
        assert_eq!(unified, [("/sys/fs/cgroup".into(), beside.clone())]);
        let pod = found("0::/kubepods.slice/pod1/cri-1.scope\n", V2);
        assert_eq!(pod[0].1.as_deref(), Some("kubepods.slice/pod1"));

        let mounts = "\
            32 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let own = format!(
            "9:memory:/elsewhere\n8:cpuset:{service}\n3:cpu,cpuacct:{service}\n1:name=systemd:{service}\n0::{service}\n"
        );
        let at = |name: &str| (format!("/sys/fs/cgroup/{name}"), beside.clone());
        assert_eq!(
            found(&own, mounts),
            [at("cpu,cpuacct"), at("systemd"), at("unified")]
        );
    }

    #[test]
    fn the_first_group_has_none_above_it_and_what_is_not_mounted_is_left_out() {
        assert_eq!(found("0::/\n", V2), [("/sys/fs/cgroup".into(), None)]);
        assert_eq!(found("4:pids:/a/b\n0::/\n", V2).len(), 1);
        assert_eq!(found("", V2), []);
        // A part of the hierarchy that is mounted alone is not the place.
        let part = V2.replace(" / /sys", " /kubepods /sys");
        assert_eq!(found("0::/a/b\n", &part), []);
    }
}
