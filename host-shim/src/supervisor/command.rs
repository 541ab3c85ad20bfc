//! Which host of an appliance is started, why that one, and with which arguments (docs/machine.md, docs/ports.md).

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use sluice_ports::offloads::Offloads;

use crate::appliance::build_id;
use crate::config::{Config, Isolation};

/// A host of an appliance, chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// sluice-vmm.
    Kvm,
    /// sluice-process.
    Process,
    /// sluice-trunk with QEMU, emulated.
    Tcg,
}

impl Kind {
    /// The word in the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
            Self::Tcg => "tcg",
        }
    }

    /// What stands between a pod's packets and this machine's kernel, for a person.
    pub fn isolates(self) -> &'static str {
        match self {
            Self::Kvm => "a virtual machine",
            Self::Process => "a process of its own, no virtual machine",
            Self::Tcg => "an emulated virtual machine",
        }
    }

    /// The program that serves the ports, as it names itself.
    pub fn program(self) -> &'static str {
        match self {
            Self::Kvm => "sluice-vmm",
            Self::Process => "sluice-process",
            Self::Tcg => "sluice-trunk",
        }
    }
}

/// What will run, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// `None`: it is started by other means.
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
        Isolation::Process => asked(Some(Kind::Process), "process"),
        Isolation::Tcg => asked(Some(Kind::Tcg), "tcg"),
        Isolation::External => asked(None, "external"),
        Isolation::Auto => match OpenOptions::new().read(true).write(true).open(&config.kvm) {
            Ok(_) => Choice {
                kind: Some(Kind::Kvm),
                why: format!("{} can be used", config.kvm.display()),
            },
            Err(error) => Choice {
                kind: Some(Kind::Process),
                why: format!("{} cannot be used: {error}", config.kvm.display()),
            },
        },
    }
}

/// The sockets of a run directory.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// Where the appliance's process listens for daemons.
    pub ports: PathBuf,
    /// Where the daemon listens for the guest's console.
    pub control: PathBuf,
    /// Between sluice-trunk and QEMU.
    pub trunk: PathBuf,
}

impl Sockets {
    /// Where they are.
    pub fn in_dir(run_dir: &Path) -> Self {
        Self {
            ports: run_dir.join("ports.sock"),
            control: run_dir.join("control.sock"),
            trunk: run_dir.join("trunk.sock"),
        }
    }
}

/// The recipe for command lines: all but what is known at a start only.
#[derive(Clone, Debug)]
pub struct Recipe {
    kind: Kind,
    program: PathBuf,
    /// Whose build id says which appliance it is.
    image: PathBuf,
    /// Behind those that all programs have, and behind these QEMU's line, if there is one.
    arguments: Vec<OsString>,
    taps: Offloads,
}

impl Recipe {
    /// For a kind of host.
    pub fn new(kind: Kind, config: &Config, taps: Offloads) -> Self {
        let sockets = Sockets::in_dir(&config.run_dir);
        let memory = format!("{}M", config.memory_mib);
        let own = |arguments: &[(&str, &Path)]| -> Vec<OsString> {
            let pairs = arguments.iter();
            let pairs = pairs.flat_map(|(flag, path)| [(*flag).into(), (*path).into()]);
            ["--memory".into(), (&memory).into()]
                .into_iter()
                .chain(pairs)
                .collect()
        };
        let control = ("--control", sockets.control.as_path());
        let (program, arguments) = match kind {
            Kind::Kvm => {
                let image = ("--image", config.image.as_path());
                let mut arguments = own(&[image, control, ("--kvm", &config.kvm)]);
                arguments.push("--timings".into());
                (beside_us(&config.vmm), arguments)
            }
            Kind::Process => (beside_us(&config.process), own(&[control])),
            Kind::Tcg => {
                let mut arguments = vec!["--socket".into(), (&sockets.trunk).into(), "--".into()];
                arguments.extend(qemu(config, &sockets));
                (beside_us(&config.trunk), arguments)
            }
        };
        let image = match kind {
            Kind::Process => in_path(&program),
            Kind::Kvm | Kind::Tcg => config.image.clone(),
        };
        Self {
            kind,
            program,
            image,
            arguments,
            taps,
        }
    }

    /// The kind of host.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Which appliance a start would bring.
    ///
    /// # Errors
    /// When the image does not say.
    pub fn build(&self) -> io::Result<String> {
        let named = |error: io::Error| {
            let reason = format!("{}: {error}", self.image.display());
            io::Error::new(error.kind(), reason)
        };
        build_id::read(&self.image).map_err(named)
    }

    /// Program and arguments, with the number of the inherited listener.
    pub fn command_line(&self, ports: RawFd, build: &str) -> Vec<OsString> {
        let mut line = vec![OsString::from(&self.program)];
        for (flag, value) in [
            ("--ports", ports.to_string()),
            ("--build", build.to_owned()),
            ("--contract", sluice_contract::VERSION.to_string()),
            ("--taps", self.taps.to_string()),
        ] {
            line.extend([flag.into(), value.into()]);
        }
        line.extend(self.arguments.iter().cloned());
        line
    }
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

/// The file that a start would find by PATH; the name itself if there is none.
fn in_path(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.into();
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&folders).map(|folder| folder.join(program));
    candidates
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| program.into())
}

fn qemu(config: &Config, sockets: &Sockets) -> Vec<OsString> {
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
        let text = format!(
            r#"{{"image": "/i", "isolation": "{isolation}", "kvm": "{kvm}", "run_dir": "/run/a,b"}}"#
        );
        Config::parse(&text, false).unwrap()
    }

    #[test]
    fn p10_without_kvm_a_process_is_chosen_and_the_reason_says_so() {
        let choice = choose(&config("auto", "/none/kvm"));
        assert_eq!(choice.kind, Some(Kind::Process));
        assert!(
            choice
                .why
                .contains("/none/kvm cannot be used: No such file"),
            "{}",
            choice.why
        );
        // A file that can be opened stands for a device that can.
        assert_eq!(choose(&config("auto", "/dev/null")).kind, Some(Kind::Kvm));
        for kind in [Kind::Kvm, Kind::Process, Kind::Tcg] {
            let asked = choose(&config(kind.word(), "/none/kvm"));
            assert_eq!(asked.kind, Some(kind));
        }
        assert_eq!(choose(&config("external", "/dev/null")).kind, None);
    }

    #[test]
    fn every_program_gets_its_ports_its_identity_and_its_sockets() {
        let config = config("auto", "/dev/null");
        let line = |kind| {
            let line = Recipe::new(kind, &config, Offloads::ALL).command_line(7, "ab12");
            let words: Vec<_> = line
                .iter()
                .map(|a| a.to_string_lossy().into_owned())
                .collect();
            words.join(" ")
        };
        let version = sluice_contract::VERSION;
        let common =
            format!(" --ports 7 --build ab12 --contract {version} --taps checksum,tso4,tso6,uso ");
        let kvm = line(Kind::Kvm);
        assert!(
            kvm.starts_with(&format!("sluice-vmm{common}--memory 64M --image /i ")),
            "{kvm}"
        );
        assert!(
            kvm.contains(" --control /run/a,b/control.sock --kvm /dev/null"),
            "{kvm}"
        );
        let process = line(Kind::Process);
        let rest = "--memory 64M --control /run/a,b/control.sock";
        assert_eq!(process, format!("sluice-process{common}{rest}"));
        let tcg = line(Kind::Tcg);
        let own = "--socket /run/a,b/trunk.sock -- qemu-system-x86_64 -M microvm";
        assert!(
            tcg.starts_with(&format!("sluice-trunk{common}{own}")),
            "{tcg}"
        );
        // A comma in a QEMU option value is written twice.
        assert!(
            tcg.contains("path=/run/a,,b/trunk.sock") && tcg.ends_with("-kernel /i"),
            "{tcg}"
        );
    }

    #[test]
    fn the_image_says_which_appliance_it_is_and_a_process_is_its_own() {
        let own = std::env::current_exe().unwrap();
        let mut config = config("auto", "/dev/null");
        config.process = own.clone();
        let build = Recipe::new(Kind::Process, &config, Offloads::ALL).build();
        assert_eq!(build.unwrap(), build_id::read(&own).unwrap());
        let missing = Recipe::new(Kind::Kvm, &config, Offloads::ALL).build();
        assert!(
            missing
                .unwrap_err()
                .to_string()
                .contains("/i: No such file")
        );
    }
}
