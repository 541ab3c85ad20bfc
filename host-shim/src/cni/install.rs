//! Putting the plugin where a runtime finds it, and taking it away again.
//!
//! The binary first, the configuration last: a runtime that sees a configuration may call at once. Both appear whole, by
//! rename, so an upgrade under running ADDs never shows half a program. Away it goes in the other order.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The plugin's name in the directory of plugins.
const PLUGIN: &str = "sluice-cni";

/// What to install, and where.
#[derive(Clone, Debug)]
pub struct Installation {
    /// `/opt/cni/bin`.
    pub bin_dir: PathBuf,
    /// `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// The configuration's file: runtimes take the first in the order of names.
    pub file: String,
    /// The network's name.
    pub network: String,
    /// The newest version that the runtime speaks.
    pub version: String,
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
}

/// Why it is not installed, or not removed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("Cannot {step} {path}")]
    File {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is not ours: it does not name {PLUGIN}")]
    NotOurs { path: PathBuf },
    #[error(
        "{count} pods are attached; remove them first, or force it and lose their addresses until the next GC"
    )]
    InUse { count: usize },
}

fn at(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::File { step, path, source }
}

impl Installation {
    /// The network configuration list. What a runtime adds (`runtimeConfig`, `args`, `cni.dev/…`) is never in it.
    pub fn conflist(&self) -> Value {
        json!({
            "cniVersion": self.version,
            "name": self.network,
            "plugins": [{
                "type": PLUGIN,
                "runDir": self.run_dir,
                "stateDir": self.state_dir,
                "ipam": {"type": "sluice"},
                "capabilities": {
                    "portMappings": true, "bandwidth": true, "mac": true, "ips": true, "dns": true,
                    "aliases": true, "ipRanges": true,
                },
            }],
        })
    }

    fn conf_path(&self) -> PathBuf {
        self.conf_dir.join(&self.file)
    }

    fn bin_path(&self) -> PathBuf {
        self.bin_dir.join(PLUGIN)
    }

    /// Puts both in place.
    ///
    /// # Errors
    /// The step that failed; a runtime then sees what it saw before, or a new program under the old configuration.
    pub fn install(&self, program: &Path) -> Result<(), InstallError> {
        let conf = self.conf_path();
        if conf.exists() && !is_ours(&conf)? {
            return Err(InstallError::NotOurs { path: conf });
        }
        let bytes = fs::read(program).map_err(at("read", program))?;
        place(&self.bin_path(), &bytes, 0o755)?;
        let text = format!("{:#}\n", self.conflist());
        place(&conf, text.as_bytes(), 0o644)
    }

    /// Takes both away; what is not there is no error.
    ///
    /// # Errors
    /// If pods are attached and it is not forced, the configuration is somebody else's, or a file cannot be removed.
    pub fn uninstall(&self, force: bool) -> Result<(), InstallError> {
        let conf = self.conf_path();
        if conf.exists() {
            if !is_ours(&conf)? {
                return Err(InstallError::NotOurs { path: conf });
            }
            let count = self.attached();
            if count > 0 && !force {
                // A runtime needs the plugin to remove them.
                return Err(InstallError::InUse { count });
            }
            remove(&conf)?;
        }
        remove(&self.bin_path())
    }

    fn attached(&self) -> usize {
        let attachments = self.run_dir.join("attachments").join(&self.network);
        fs::read_dir(attachments).map_or(0, Iterator::count)
    }
}

fn is_ours(path: &Path) -> Result<bool, InstallError> {
    let text = fs::read(path).map_err(at("read", path))?;
    let conf: Value = serde_json::from_slice(&text).unwrap_or_default();
    let plugins = conf["plugins"].as_array();
    Ok(plugins
        .into_iter()
        .flatten()
        .any(|plugin| plugin["type"] == PLUGIN))
}

/// Writes a file so that it is the old one or the new one at every moment, also after a power cut.
fn place(path: &Path, bytes: &[u8], mode: u32) -> Result<(), InstallError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).map_err(at("make the directory", dir))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Runtimes read no names that begin with a dot.
    let beside = dir.join(format!(".{name}.{}", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&beside)?;
        // The daemon's umask is for its own files: runtimes have to read these.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&beside, path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|error| {
        // The first failure is the one to tell.
        let _gone_already = fs::remove_file(&beside);
        at("write", path)(error)
    })
}

fn remove(path: &Path) -> Result<(), InstallError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn fixture(name: &str) -> (Dir, Installation) {
        let dir = std::env::temp_dir().join(format!("sluice-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("program"), "#!/bin/sh\nexit 0\n").unwrap();
        let installation = Installation {
            bin_dir: dir.join("bin"),
            conf_dir: dir.join("net.d"),
            file: "10-sluice.conflist".into(),
            network: "sluice".into(),
            version: "1.0.0".into(),
            run_dir: dir.join("run"),
            state_dir: dir.join("state"),
        };
        (Dir(dir), installation)
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).map(|e| e.map(|e| e.unwrap().path()).collect());
        entries.unwrap_or_default()
    }

    #[test]
    fn c16_p11_what_install_places_uninstall_takes_away() {
        let (dir, it) = fixture("install");
        it.install(&dir.0.join("program")).unwrap();
        it.install(&dir.0.join("program")).unwrap();
        assert_eq!(files(&it.bin_dir), [it.bin_path()]);
        assert_eq!(files(&it.conf_dir), [it.conf_path()]);
        it.uninstall(false).unwrap();
        it.uninstall(false).unwrap();
        assert!(files(&it.bin_dir).is_empty() && files(&it.conf_dir).is_empty());
    }

    #[test]
    fn c16_without_a_program_no_configuration_appears() {
        let (dir, it) = fixture("install-order");
        it.install(&dir.0.join("absent")).unwrap_err();
        assert!(!it.conf_path().exists());
        // In the way of the program's directory.
        fs::write(&it.bin_dir, "").unwrap();
        it.install(&dir.0.join("program")).unwrap_err();
        assert!(!it.conf_path().exists());
    }

    #[test]
    fn the_plugin_stays_while_pods_need_it_and_other_configurations_stay_anyway() {
        let (dir, it) = fixture("install-use");
        it.install(&dir.0.join("program")).unwrap();
        let attachments = it.run_dir.join("attachments/sluice");
        fs::create_dir_all(&attachments).unwrap();
        fs::write(attachments.join("a@eth0"), "").unwrap();
        assert!(matches!(
            it.uninstall(false),
            Err(InstallError::InUse { count: 1 })
        ));
        assert!(it.conf_path().exists() && it.bin_path().exists());
        it.uninstall(true).unwrap();
        fs::write(it.conf_path(), r#"{"plugins": [{"type": "bridge"}]}"#).unwrap();
        assert!(matches!(
            it.uninstall(true),
            Err(InstallError::NotOurs { .. })
        ));
        assert!(matches!(
            it.install(&dir.0.join("program")),
            Err(InstallError::NotOurs { .. })
        ));
    }

    #[test]
    fn cni16_the_installed_configuration_has_no_reserved_keys_and_is_read_by_the_plugin() {
        let (_dir, it) = fixture("install-conf");
        let list = it.conflist();
        let mut config = list["plugins"][0].clone();
        for key in config.as_object().unwrap().keys() {
            let is_reserved =
                key == "runtimeConfig" || key == "args" || key.starts_with("cni.dev/");
            assert!(!is_reserved, "{key}");
        }
        config["cniVersion"] = list["cniVersion"].clone();
        config["name"] = list["name"].clone();
        sluice_cni::config::Config::from_value(config).unwrap();
    }

    #[test]
    fn c17_replaced_under_use_the_program_always_starts() {
        let (dir, it) = fixture("install-busy");
        it.install(&dir.0.join("program")).unwrap();
        // A process of its own starts it, as a runtime does: a thread here would fork while `install` has the new file open
        // for writing, and that copy of the descriptor would make the file busy.
        let mut runtime = std::process::Command::new("sh")
            .args(["-c", "for i in $(seq 200); do \"$0\" || exit 1; done"])
            .arg(it.bin_path())
            .spawn()
            .unwrap();
        let status = loop {
            it.install(&dir.0.join("program")).unwrap();
            if let Some(status) = runtime.try_wait().unwrap() {
                break status;
            }
        };
        assert!(status.success());
    }
}
