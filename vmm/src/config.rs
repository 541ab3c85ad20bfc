//! What the operator asked for: flags and a JSON file, merged and checked once.
//!
//! Both spell the same settings; a flag wins over the file. Unknown fields are refused by name. What comes out as [`Config`]
//! needs no further check by anybody.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap::Parser;
use clap::ValueEnum;
use serde::Deserialize;
use sluice_ports::args::PortsArgs;
use sluice_ports::message::Drive;
use sluice_trunk::policy::Wish;

use crate::memory::RAM_GRANULE;
use crate::memory::RAM_MAX;
use crate::memory::RAM_MIN;
use crate::socket;

const DEFAULT_MEMORY: Size = Size(64 << 20);
const DEFAULT_WATCHDOG_MS: u64 = 2000;
const DEFAULT_CONNECT_TIMEOUT: Span = Span(Duration::from_secs(10));
const DEFAULT_KVM: &str = "/dev/kvm";
/// Tokens that describe the machine; only the VMM knows them.
const OWN_TOKENS: [&str; 5] = [
    "sluice.advice=",
    "virtio_mmio.device=",
    "sluice.park=",
    "sluice.seed=",
    "sluice.tsc_khz=",
];

const AFTER_HELP: &str = "\
Exit status:
   0  orderly end: the guest said so, its self-test passed, or SIGTERM/SIGINT
   1  could not start (KVM, image, memory, socket); the message says why
   2  wrong flags or configuration file
  65  the guest's self-test failed
  66  the guest refused to boot; its last line says why
  70  fault in the guest's ring 3
  71  panic in the guest's ring 3
  72  watchdog: the guest ran too long without a heartbeat
  73  triple fault or other error of the virtual machine

Standard error carries the VMM's log, the guest's report lines (JSON, {\"sluice\":...}) and, last, one
line {\"vmm\":\"end\",...}. docs/machine.md describes the machine, and how to boot the same image under QEMU
where there is no /dev/kvm.

Example:
  sluice-vmm --image sluice-appliance --memory 64M \\
             --trunk vhost-user=/run/sluice/trunk.sock --control /run/sluice/control.sock";

/// Runs one Sluice appliance in a KVM virtual machine.
///
/// The machine has one virtual CPU, RAM, a network device (the trunk), and a console (the control channel) that is bridged to a
/// unix socket. With --ports this process moves the frames itself, between the ports that a daemon gives it and the device; with
/// --trunk a vhost-user backend in another process does. A socket that breaks is connected again, for as long as the VMM lives.
#[derive(Debug, Parser)]
#[command(name = "sluice-vmm", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct CommandLine {
    /// Read settings from a JSON file; its fields are the long flags with "_" for "-". Flags win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub settings: Settings,

    #[command(flatten)]
    pub ports: PortsArgs,
}

/// Every setting, as it may appear as a flag or in the file.
#[derive(Debug, Default, Clone, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The guest image: an ELF with a PVH note (required, here or in the file)
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,

    /// Guest RAM, like 64M or 1G, in steps of 2M [default: 64M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,

    /// Have a vhost-user backend serve the network device, instead of this process: vhost-user=SOCKET
    #[arg(long, value_name = "BACKEND")]
    pub trunk: Option<Backend>,

    /// Which thread moves frames between ports and guest, with --ports [default: auto]
    #[arg(long, value_name = "THREAD")]
    pub drive: Option<DriveChoice>,

    /// Unix socket that carries the console's bytes; without it there is no console
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,

    /// More tokens for the guest's command line, like "sluice.selftest"
    #[arg(long, value_name = "TOKENS", allow_hyphen_values = true)]
    pub cmdline: Option<String>,

    /// End a guest that runs this many milliseconds without a heartbeat; 0 turns it off [default: 2000]
    #[arg(long, value_name = "MS")]
    pub watchdog_ms: Option<u64>,

    /// How long to wait at start for the trunk's backend, like 10s or 500ms [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub connect_timeout: Option<Span>,

    /// When to touch guest RAM: while the guest boots, before it starts, or only as it goes [default: background]
    #[arg(long, value_name = "WHEN")]
    pub prefault: Option<Prefault>,

    /// Use reserved 2 MiB pages for guest RAM, if there are any
    #[arg(long)]
    pub hugetlb: bool,

    /// How the VMM's own log looks [default: human]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// How much it says [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,

    /// Print how long each step of the start took, as a line {"vmm":"timings",...}
    #[arg(long)]
    pub timings: bool,

    /// The KVM device [default: /dev/kvm]
    #[arg(long, value_name = "FILE")]
    pub kvm: Option<PathBuf>,
}

/// Where a vhost-user backend listens, written as vhost-user=SOCKET.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Backend(pub PathBuf);

impl FromStr for Backend {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Backend, ConfigError> {
        text.strip_prefix("vhost-user=")
            .filter(|path| !path.is_empty())
            .map(|path| Backend(path.into()))
            .ok_or_else(|| ConfigError::Backend {
                text: text.to_owned(),
            })
    }
}

impl TryFrom<String> for Backend {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Backend, ConfigError> {
        text.parse()
    }
}

/// Which thread moves frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveChoice {
    /// As the cost of leaving the guest and the load say.
    Auto,
    /// The thread that runs the guest.
    Inline,
    /// A thread of its own, while the guest polls.
    Apart,
}

impl From<DriveChoice> for Wish {
    fn from(choice: DriveChoice) -> Wish {
        match choice {
            DriveChoice::Auto => Wish::Auto,
            DriveChoice::Inline => Wish::Always(Drive::Inline),
            DriveChoice::Apart => Wish::Always(Drive::Apart),
        }
    }
}

/// When guest RAM is faulted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefault {
    Background,
    Before,
    Never,
}

/// The look of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Human,
    Json,
}

/// The amount of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// A number of bytes, written as 67108864, 65536K, 64M or 1G.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "NumberOrText")]
pub struct Size(pub u64);

/// A time, written as 10s, 500ms, or a plain number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "NumberOrText")]
pub struct Span(pub Duration);

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

impl fmt::Display for NumberOrText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NumberOrText::Number(number) => number.fmt(f),
            NumberOrText::Text(text) => text.fmt(f),
        }
    }
}

impl TryFrom<NumberOrText> for Size {
    type Error = ConfigError;

    fn try_from(value: NumberOrText) -> Result<Size, ConfigError> {
        value.to_string().parse()
    }
}

impl TryFrom<NumberOrText> for Span {
    type Error = ConfigError;

    fn try_from(value: NumberOrText) -> Result<Span, ConfigError> {
        value.to_string().parse()
    }
}

impl FromStr for Size {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Size, ConfigError> {
        let (digits, shift) = match text.char_indices().last() {
            Some((at, 'K' | 'k')) => (text.get(..at), 10),
            Some((at, 'M' | 'm')) => (text.get(..at), 20),
            Some((at, 'G' | 'g')) => (text.get(..at), 30),
            _ => (Some(text), 0),
        };
        digits
            .and_then(|digits| digits.parse::<u64>().ok())
            .and_then(|number| number.checked_mul(1 << shift))
            .map(Size)
            .ok_or_else(|| ConfigError::Size {
                text: text.to_owned(),
            })
    }
}

impl FromStr for Span {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Span, ConfigError> {
        let parsed = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
            (Some(number), _) => number.parse().map(Duration::from_millis),
            (None, Some(number)) => number.parse().map(Duration::from_secs),
            (None, None) => text.parse().map(Duration::from_secs),
        };
        parsed.map(Span).map_err(|_| ConfigError::Span {
            text: text.to_owned(),
        })
    }
}

/// What is wrong with the flags or the file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the configuration {path} is wrong")]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("no image is given: use --image FILE, or \"image\" in the configuration file")]
    NoImage,
    #[error("{text:?} is no size: write it like 64M, 1G or 67108864")]
    Size { text: String },
    #[error("{text:?} is no backend: write it as vhost-user=SOCKET")]
    Backend { text: String },
    #[error(
        "--ports and --trunk exclude each other: the network device is served here or by another process"
    )]
    TwoTrunks,
    #[error("--ports {number} cannot be used")]
    Ports { number: i32, source: io::Error },
    #[error("{text:?} is no time: write it like 10s or 500ms")]
    Span { text: String },
    #[error(
        "memory of {bytes} bytes is not possible: it must be {} MiB to {} MiB in steps of {} MiB",
        RAM_MIN >> 20, RAM_MAX >> 20, RAM_GRANULE >> 20
    )]
    Memory { bytes: u64 },
    #[error("{name} cannot be the socket {path}")]
    Socket {
        name: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cmdline: the token {token:?} belongs to the VMM")]
    OwnToken { token: String },
}

/// Checked settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub image: PathBuf,
    /// Bytes; within the bounds of the physical map.
    pub memory: u64,
    pub trunk: Option<Backend>,
    pub drive: Wish,
    pub ports: PortsArgs,
    /// The end of the ports protocol that daemons connect to.
    pub listener: Option<Arc<OwnedFd>>,
    pub control: Option<PathBuf>,
    pub cmdline: Vec<String>,
    pub watchdog: Option<Duration>,
    pub connect_timeout: Duration,
    pub prefault: Prefault,
    pub hugetlb: bool,
    pub log_format: LogFormat,
    pub log_level: LogLevel,
    pub timings: bool,
    pub kvm: PathBuf,
}

impl CommandLine {
    /// Reads the file, if one is named, and merges the flags over it.
    ///
    /// # Errors
    /// The file cannot be read or understood, or a setting is impossible.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let settings = match &self.config {
            Some(path) => Settings::read(path)?.overridden_by(self.settings),
            None => self.settings,
        };
        let mut config = Config::try_from(settings)?;
        if self.ports.ports.is_some() && config.trunk.is_some() {
            return Err(ConfigError::TwoTrunks);
        }
        // Taken before anything is opened, so that no other descriptor can have the number.
        config.listener = self
            .ports
            .listener()
            .map_err(|source| ConfigError::Ports {
                number: self.ports.ports.unwrap_or(-1),
                source,
            })?
            .map(Arc::new);
        config.ports = self.ports;
        Ok(config)
    }
}

impl Settings {
    fn read(path: &Path) -> Result<Settings, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        serde_json::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_path_buf(),
            source,
        })
    }

    fn overridden_by(self, flags: Settings) -> Settings {
        // Exhaustive on purpose: a new setting must say how it merges.
        let Settings {
            image,
            memory,
            trunk,
            drive,
            control,
            cmdline,
            watchdog_ms,
            connect_timeout,
            prefault,
            hugetlb,
            log_format,
            log_level,
            timings,
            kvm,
        } = flags;
        Settings {
            image: image.or(self.image),
            memory: memory.or(self.memory),
            trunk: trunk.or(self.trunk),
            drive: drive.or(self.drive),
            control: control.or(self.control),
            cmdline: cmdline.or(self.cmdline),
            watchdog_ms: watchdog_ms.or(self.watchdog_ms),
            connect_timeout: connect_timeout.or(self.connect_timeout),
            prefault: prefault.or(self.prefault),
            hugetlb: hugetlb || self.hugetlb,
            log_format: log_format.or(self.log_format),
            log_level: log_level.or(self.log_level),
            timings: timings || self.timings,
            kvm: kvm.or(self.kvm),
        }
    }
}

impl TryFrom<Settings> for Config {
    type Error = ConfigError;

    fn try_from(settings: Settings) -> Result<Config, ConfigError> {
        let Size(memory) = settings.memory.unwrap_or(DEFAULT_MEMORY);
        if !(RAM_MIN..=RAM_MAX).contains(&memory) || memory % RAM_GRANULE != 0 {
            return Err(ConfigError::Memory { bytes: memory });
        }
        let backend = settings.trunk.as_ref().map(|Backend(path)| path.clone());
        for (name, path) in [("trunk", &backend), ("control", &settings.control)] {
            if let Some(path) = path {
                socket::check_path(path).map_err(|source| ConfigError::Socket {
                    name,
                    path: path.clone(),
                    source,
                })?;
            }
        }
        let cmdline: Vec<String> = settings
            .cmdline
            .iter()
            .flat_map(|line| line.split_whitespace())
            .map(String::from)
            .collect();
        if let Some(token) = cmdline
            .iter()
            .find(|token| OWN_TOKENS.iter().any(|own| token.starts_with(own)))
        {
            return Err(ConfigError::OwnToken {
                token: token.clone(),
            });
        }
        let watchdog = settings.watchdog_ms.unwrap_or(DEFAULT_WATCHDOG_MS);
        let Span(connect_timeout) = settings.connect_timeout.unwrap_or(DEFAULT_CONNECT_TIMEOUT);
        Ok(Config {
            image: settings.image.ok_or(ConfigError::NoImage)?,
            memory,
            trunk: settings.trunk,
            drive: settings.drive.unwrap_or(DriveChoice::Auto).into(),
            ports: PortsArgs::default(),
            listener: None,
            control: settings.control,
            cmdline,
            watchdog: (watchdog > 0).then(|| Duration::from_millis(watchdog)),
            connect_timeout,
            prefault: settings.prefault.unwrap_or(Prefault::Background),
            hugetlb: settings.hugetlb,
            log_format: settings.log_format.unwrap_or(LogFormat::Human),
            log_level: settings.log_level.unwrap_or(LogLevel::Info),
            timings: settings.timings,
            kvm: settings.kvm.unwrap_or_else(|| PathBuf::from(DEFAULT_KVM)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(arguments: &[&str]) -> CommandLine {
        let all = ["sluice-vmm"].iter().chain(arguments);
        CommandLine::try_parse_from(all).unwrap()
    }

    fn with_file(text: &str, arguments: &[&str]) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        fs::write(&path, text).unwrap();
        let mut line = parse(arguments);
        line.config = Some(path);
        line.resolve()
    }

    #[test]
    fn only_the_image_is_required() {
        let config = parse(&["--image", "a"]).resolve().unwrap();
        assert_eq!(config.image, Path::new("a"));
        assert_eq!(config.memory, 64 << 20);
        assert_eq!(config.watchdog, Some(Duration::from_secs(2)));
        assert_eq!(config.connect_timeout, Duration::from_secs(10));
        assert_eq!((config.trunk, config.control), (None, None));
        assert!(matches!(parse(&[]).resolve(), Err(ConfigError::NoImage)));
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let text = r#"{"image":"f","memory":"128M","trunk":"vhost-user=/t","watchdog_ms":0,"hugetlb":true,
            "connect_timeout":3,"cmdline":"a=1 b","log_format":"json","prefault":"never"}"#;
        let config = with_file(text, &["--image", "flag", "--connect-timeout", "250ms"]).unwrap();
        assert_eq!(config.image, Path::new("flag"));
        assert_eq!(config.memory, 128 << 20);
        assert_eq!(config.trunk, Some(Backend("/t".into())));
        assert_eq!(config.watchdog, None);
        assert_eq!(config.connect_timeout, Duration::from_millis(250));
        assert_eq!(config.cmdline, ["a=1", "b"]);
        assert_eq!(config.log_format, LogFormat::Json);
        assert_eq!(config.prefault, Prefault::Never);
        assert!(config.hugetlb);
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let error = with_file(r#"{"image":"f","tap":"x"}"#, &[]).unwrap_err();
        let ConfigError::Parse { source, .. } = error else {
            panic!("{error}")
        };
        assert!(source.to_string().contains("`tap`"), "{source}");
    }

    #[test]
    fn sizes_and_times_have_one_spelling_each() {
        for (text, bytes) in [
            ("67108864", 64 << 20),
            ("65536K", 64 << 20),
            ("64M", 64 << 20),
            ("1g", 1 << 30),
        ] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "1.5G",
            "-1",
            "64MB",
            "99999999999999999999",
            "99999999999G",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for (text, ms) in [("10s", 10_000), ("3", 3000), ("250ms", 250), ("0ms", 0)] {
            assert_eq!(
                text.parse::<Span>().unwrap(),
                Span(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for text in ["", "s", "ms", "1m", "-1s", "1.5s"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn memory_outside_the_map_is_refused() {
        for size in ["0", "2M", "5M", "4097M", "3074M"] {
            let result = parse(&["--image", "a", "--memory", size]).resolve();
            assert!(matches!(result, Err(ConfigError::Memory { .. })), "{size}");
        }
        for size in ["4M", "3G"] {
            parse(&["--image", "a", "--memory", size])
                .resolve()
                .unwrap();
        }
    }

    #[test]
    fn the_flags_are_consistent() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }

    proptest! {
        #[test]
        fn no_text_makes_a_size_or_a_time_panic(text in "\\PC*") {
            let _ = text.parse::<Size>();
            let _ = text.parse::<Span>();
        }
    }
}
