//! The binary that a container runtime starts: see `sluice_cni::plugin`.

use sluice_cni::plugin;
use std::io::{self, Write as _};
use std::process::ExitCode;

fn main() -> ExitCode {
    let lookup = |name: &str| std::env::var(name).ok();
    if lookup("CNI_COMMAND").unwrap_or_default().is_empty() {
        eprintln!("{}", plugin::about());
        return ExitCode::SUCCESS;
    }
    let outcome = plugin::run(lookup, &mut io::stdin());
    if let Some(object) = outcome.stdout
        && writeln!(io::stdout(), "{object}").is_err()
    {
        return ExitCode::FAILURE;
    }
    if outcome.success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
