//! The image under QEMU alone: boot, read its machine-readable log, take its exit status.

use crate::lab::image;
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// What QEMU's isa-debug-exit makes of the code "orderly end".
pub const ORDERLY: i32 = 33;
/// The same for "boot refused".
pub const REFUSED: i32 = 37;

/// How a machine ended.
#[derive(Debug)]
pub struct Boot {
    /// QEMU's exit status.
    pub status: Option<i32>,
    /// The lines of the boot log, each one JSON object.
    pub lines: Vec<Value>,
}

impl Boot {
    /// Boots the image with `accelerator` (`tcg` or `kvm`), this command line and this much memory.
    ///
    /// # Errors
    /// If QEMU cannot start, does not end in a minute, or the log is not JSON line by line.
    pub fn run(accelerator: &str, command_line: &str, memory_mib: u32) -> Result<Self> {
        let log = Log(std::env::temp_dir().join(format!(
            "sluice-boot-{}-{accelerator}-{memory_mib}-{}.log",
            std::process::id(),
            command_line.len()
        )));
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-M",
            "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off",
        ])
        .args([
            "-nodefaults",
            "-no-reboot",
            "-display",
            "none",
            "-accel",
            accelerator,
        ])
        .args([
            "-m",
            &format!("{memory_mib}M"),
            "-append",
            command_line,
            "-kernel",
        ])
        .arg(image())
        .args(["-chardev", &format!("file,id=log,path={}", log.0.display())])
        .args(["-device", "isa-debugcon,iobase=0x402,chardev=log"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .stdout(Stdio::null());
        if accelerator == "kvm" {
            qemu.args(["-cpu", "host,-arch-capabilities"]);
        }
        let mut running = crate::command::Running::start("qemu", &mut qemu)?;
        crate::command::until("the end of the machine", Duration::from_secs(60), || {
            anyhow::ensure!(!running.is_running(), "still running");
            Ok(())
        })?;
        let text = std::fs::read_to_string(&log.0).context("no boot log")?;
        let lines = text
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
            .collect::<Result<_>>()?;
        Ok(Self {
            status: running.wait()?.code(),
            lines,
        })
    }

    /// The lines of one kind.
    pub fn lines_of<'b>(&'b self, kind: &'b str) -> impl Iterator<Item = &'b Value> + 'b {
        self.lines.iter().filter(move |line| line["sluice"] == kind)
    }
}

struct Log(PathBuf);

impl Drop for Log {
    fn drop(&mut self) {
        // A machine that never wrote has no log.
        let _absent = std::fs::remove_file(&self.0);
    }
}
