//! What a test needs of the machine. An absent need is a skip with a reason, printed and written to the summary.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;

/// Something that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Namespaces, taps and tc need uid 0.
    Root,
    /// A `/dev/kvm` that opens and makes a VM.
    Kvm,
    /// A program on the path.
    Tool(&'static str),
}

impl Need {
    /// Why it is not there, if it is not.
    pub fn missing(self) -> Option<String> {
        match self {
            Self::Root if nix::unistd::Uid::effective().is_root() => None,
            Self::Root => Some("needs root (network namespaces, taps)".into()),
            Self::Kvm => match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
                Ok(_) => None,
                Err(error) => Some(format!("needs /dev/kvm: {error}")),
            },
            Self::Tool(name) => {
                let found = std::env::var_os("PATH").is_some_and(|path| {
                    std::env::split_paths(&path).any(|d| d.join(name).exists())
                });
                (!found).then(|| format!("needs the program {name} (make setup installs it)"))
            }
        }
    }
}

/// Whether all needs are met. If not, says so on standard error and in the file that `SLUICE_SKIPS` names.
pub fn met(test: &str, needs: &[Need]) -> bool {
    let Some(reason) = needs.iter().find_map(|need| need.missing()) else {
        return true;
    };
    skip(test, &reason);
    false
}

/// Records a skip.
pub fn skip(test: &str, reason: &str) {
    eprintln!("SKIP: {test}: {reason}");
    let Some(file) = std::env::var_os("SLUICE_SKIPS") else {
        return;
    };
    let line = format!("{test}: {reason}\n");
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(Path::new(&file))
        .and_then(|mut f| f.write_all(line.as_bytes()));
    if let Err(error) = written {
        eprintln!("the skip could not be written to the summary: {error}");
    }
}

/// Leaves the calling test, loudly, if the machine lacks one of its needs.
#[macro_export]
macro_rules! need {
    ($test:literal, $($need:expr),+ $(,)?) => {
        if !$crate::need::met($test, &[$($need),+]) {
            return;
        }
    };
}
