//! Which VMM is started, why that one, and with which arguments (docs/machine.md, "Reports", "Sockets").

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use crate::config::{Config, Isolation};

/// A VMM, chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// sluice-vmm.
    Kvm,
    /// QEMU microvm, emulated.
    Tcg,
}

/// What will run, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// `None`: somebody else starts it.
    pub kind: Option<Kind>,
    pub why: String,
}

/// Chooses by the configuration and, for `auto`, by what this machine can do.
pub fn choose(config: &Config) -> Choice {
    let asked = |kind, word: &str| Choice {
        kind,
        why: format!("isolation is set to {word}"),
    };
    match config.isolation {
        Isolation::Kvm => asked(Some(Kind::Kvm), "kvm"),
        Isolation::Tcg => asked(Some(Kind::Tcg), "tcg"),
        Isolation::External => asked(None, "external"),
        Isolation::Auto => match OpenOptions::new().read(true).write(true).open(&config.kvm) {
            Ok(_) => Choice {
                kind: Some(Kind::Kvm),
                why: format!("{} can be used", config.kvm.display()),
            },
            Err(error) => Choice {
                kind: Some(Kind::Tcg),
                why: format!("{} cannot be used: {error}", config.kvm.display()),
            },
        },
    }
}

/// The sockets of a run directory.
#[derive(Clone, Debug)]
pub struct Sockets {
    pub trunk: PathBuf,
    pub control: PathBuf,
}

impl Sockets {
    /// Where they are.
    pub fn in_dir(run_dir: &Path) -> Self {
        Self {
            trunk: run_dir.join("trunk.sock"),
            control: run_dir.join("control.sock"),
        }
    }
}

/// Program and arguments of a VMM.
pub fn command_line(kind: Kind, config: &Config, sockets: &Sockets) -> Vec<OsString> {
    match kind {
        Kind::Kvm => kvm(config, sockets),
        Kind::Tcg => tcg(config, sockets),
    }
}

fn kvm(config: &Config, sockets: &Sockets) -> Vec<OsString> {
    let memory = format!("{}M", config.memory_mib);
    vec![
        beside_us(&config.vmm).into(),
        "--image".into(),
        (&config.image).into(),
        "--memory".into(),
        memory.into(),
        "--trunk".into(),
        (&sockets.trunk).into(),
        "--control".into(),
        (&sockets.control).into(),
        "--kvm".into(),
        (&config.kvm).into(),
        "--timings".into(),
    ]
}

/// A program given by name alone is looked for beside this one before PATH: that is where a build puts it.
fn beside_us(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.into();
    }
    let ours = std::env::current_exe().ok();
    let beside = ours.and_then(|exe| Some(exe.parent()?.join(program)));
    beside
        .filter(|p| p.exists())
        .unwrap_or_else(|| program.into())
}

fn tcg(config: &Config, sockets: &Sockets) -> Vec<OsString> {
    let memory = config.memory_mib;
    // A comma in a QEMU option value is written twice.
    let option = |path: &Path| path.to_string_lossy().replace(',', ",,");
    let (trunk, control) = (option(&sockets.trunk), option(&sockets.control));
    let machine = "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off,memory-backend=ram";
    let arguments = [
        "-M",
        machine,
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        &format!("{memory}M"),
        "-object",
        &format!("memory-backend-memfd,id=ram,size={memory}M,share=on"),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-chardev",
        "stdio,id=log,signal=off",
        "-device",
        "isa-debugcon,iobase=0x402,chardev=log",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=4",
        "-global",
        "virtio-mmio.force-legacy=false",
        "-chardev",
        &format!("socket,id=trunk,path={trunk},reconnect=1"),
        "-netdev",
        "vhost-user,id=net,chardev=trunk",
        "-device",
        "virtio-net-device,netdev=net",
        "-chardev",
        &format!("socket,id=control,path={control},reconnect=1"),
        "-device",
        "virtio-serial-device,max_ports=1",
        "-device",
        "virtconsole,chardev=control",
        "-kernel",
    ];
    let mut line = vec![OsString::from(&config.qemu)];
    line.extend(arguments.map(OsString::from));
    line.push((&config.image).into());
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(isolation: &str, kvm: &str) -> Config {
        let text = format!(r#"{{"image": "/i", "isolation": "{isolation}", "kvm": "{kvm}"}}"#);
        Config::parse(&text, false).unwrap()
    }

    #[test]
    fn p10_without_kvm_tcg_is_chosen_and_the_reason_says_so() {
        let choice = choose(&config("auto", "/none/kvm"));
        assert_eq!(choice.kind, Some(Kind::Tcg));
        assert!(
            choice
                .why
                .contains("/none/kvm cannot be used: No such file"),
            "{}",
            choice.why
        );
        // A file that can be opened stands for a device that can.
        assert_eq!(choose(&config("auto", "/dev/null")).kind, Some(Kind::Kvm));
        assert_eq!(choose(&config("tcg", "/dev/null")).kind, Some(Kind::Tcg));
        assert_eq!(choose(&config("external", "/dev/null")).kind, None);
    }

    #[test]
    fn sockets_and_image_reach_either_vmm() {
        let config = config("auto", "/dev/null");
        let sockets = Sockets::in_dir(Path::new("/run/a,b"));
        for (kind, socket) in [
            (Kind::Kvm, "/run/a,b/trunk.sock"),
            (Kind::Tcg, "/run/a,,b/trunk.sock"),
        ] {
            let line = command_line(kind, &config, &sockets);
            let line: Vec<_> = line.iter().map(|a| a.to_string_lossy()).collect();
            assert!(line.iter().any(|a| a.contains(socket)), "{line:?}");
            assert!(line.iter().any(|a| a == "/i"), "{line:?}");
        }
    }
}
