//! How a virtual machine ended: one value, one process status, one JSON line.
//!
//! The statuses are the table in `docs/machine.md`; `--help` prints them. The line is always JSON, whatever the log format,
//! so that the process that started the VMM can tell a fault from a stop without parsing prose.

use std::time::Duration;

use serde::Serialize;

/// The VMM could not start the machine (image, KVM, memory, socket).
pub const STATUS_START_FAILED: u8 = 1;
/// Flags or configuration file are wrong.
pub const STATUS_USAGE: u8 = 2;

/// Why the machine is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest wrote this code to port 0xf4.
    Code(u32),
    /// The guest ran this long without a heartbeat.
    Watchdog { silent: Duration },
    /// The operator asked for it (SIGTERM, SIGINT).
    Stopped,
    /// KVM or the guest left the path that the contract describes.
    Failed {
        cause: Failure,
        registers: Option<Box<Registers>>,
    },
}

/// What went wrong below the contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("triple fault")]
    TripleFault,
    #[error("the guest halted, but nothing could wake it: no interrupt controller exists")]
    Halted,
    #[error("KVM could not enter the guest (hardware reason {0:#x})")]
    EntryFailed(u64),
    #[error("KVM internal error: it could not emulate an instruction")]
    Internal,
    #[error("unexpected exit from KVM_RUN: {0}")]
    UnexpectedExit(String),
    #[error("KVM_RUN failed: {0}")]
    RunFailed(String),
    #[error("device events are no longer served")]
    DevicesUnserved,
}

/// The registers that tell where a guest died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Registers {
    pub rip: String,
    pub rsp: String,
    pub rflags: String,
    pub cs: String,
    pub cr0: String,
    pub cr2: String,
    pub cr3: String,
    pub cr4: String,
    pub efer: String,
}

#[derive(Serialize)]
struct EndLine<'a> {
    vmm: &'static str,
    status: u8,
    cause: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    silent_ms: Option<u128>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registers: Option<&'a Registers>,
    uptime_ms: u128,
}

impl Ending {
    /// The status this process exits with.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Ending::Code(0x10) | Ending::Stopped => 0,
            Ending::Code(0x11) => 65,
            Ending::Code(0x12) => 66,
            Ending::Code(0x20) => 70,
            Ending::Code(0x21) => 71,
            Ending::Watchdog { .. } => 72,
            Ending::Code(_) | Ending::Failed { .. } => 73,
        }
    }

    /// One word for the cause, stable for programs.
    #[must_use]
    pub fn cause(&self) -> &'static str {
        match self {
            Ending::Code(0x10) => "orderly",
            Ending::Code(0x11) => "selftest-failed",
            Ending::Code(0x12) => "boot-refused",
            Ending::Code(0x20) => "guest-fault",
            Ending::Code(0x21) => "guest-panic",
            Ending::Code(_) => "unknown-code",
            Ending::Watchdog { .. } => "watchdog",
            Ending::Stopped => "stopped",
            Ending::Failed { .. } => "vm-error",
        }
    }

    /// The JSON line for standard error: `{"vmm":"end","status":…,"cause":…}`.
    #[must_use]
    pub fn line(&self, uptime: Duration) -> String {
        let (code, silent_ms, error, registers) = match self {
            Ending::Code(code) => (Some(*code), None, None, None),
            Ending::Watchdog { silent } => (None, Some(silent.as_millis()), None, None),
            Ending::Stopped => (None, None, None, None),
            Ending::Failed { cause, registers } => {
                (None, None, Some(cause.to_string()), registers.as_deref())
            }
        };
        let line = EndLine {
            vmm: "end",
            status: self.status(),
            cause: self.cause(),
            code,
            silent_ms,
            error,
            registers,
            uptime_ms: uptime.as_millis(),
        };
        serde_json::to_string(&line).unwrap_or_else(|_| String::from(r#"{"vmm":"end"}"#))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_code_has_its_documented_status() {
        let table = [
            (Ending::Code(0x10), 0),
            (Ending::Code(0x11), 65),
            (Ending::Code(0x12), 66),
            (Ending::Code(0x20), 70),
            (Ending::Code(0x21), 71),
            (Ending::Code(0x99), 73),
            (
                Ending::Watchdog {
                    silent: Duration::from_secs(2),
                },
                72,
            ),
            (
                Ending::Failed {
                    cause: Failure::TripleFault,
                    registers: None,
                },
                73,
            ),
            (Ending::Stopped, 0),
        ];
        for (ending, status) in table {
            assert_eq!(ending.status(), status, "{ending:?}");
        }
    }

    #[test]
    fn the_end_line_is_one_json_object_on_one_line() {
        let ending = Ending::Failed {
            cause: Failure::UnexpectedExit("a \"quoted\"\nthing".into()),
            registers: None,
        };
        let line = ending.line(Duration::from_millis(12));
        assert!(!line.contains('\n'));
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["vmm"], "end");
        assert_eq!(value["cause"], "vm-error");
        assert_eq!(value["uptime_ms"], 12);
    }
}
