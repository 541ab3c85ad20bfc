//! The guest's two report ports: log lines out of 0x402, and the end of the machine out of 0xf4.
//!
//! The guest is untrusted, and so are its lines: they are bounded in length and rate, and only a JSON object that starts with
//! `{"sluice":` passes as it is; anything else is wrapped and escaped, so that a guest cannot forge a line of the VMM (those
//! start with `{"vmm":`) or drive a terminal. Lines that nobody takes in time are dropped, and their number is told.

use std::time::Instant;

use serde::de::IgnoredAny;

use crate::bus::BusDevice;
use crate::bus::Effect;
use crate::exit::Ending;
use crate::lines::Lines;

/// The log port.
pub const LOG_PORT: u64 = 0x402;
/// The exit port, four bytes wide.
pub const EXIT_PORT: u64 = 0xf4;

/// What QEMU's debug console answers to a read: "I am here".
const LOG_PORT_PRESENT: u8 = 0xe9;
/// A fault report with its stack words stays well below this.
const LINE_MAX: usize = 4096;
/// A boot log is some tens of lines.
const BURST: u32 = 256;
const LINES_PER_SECOND: u32 = 32;
/// Fault and panic lines that pass whatever was logged before.
const RESERVED: u32 = 8;

/// Port 0x402.
#[derive(Debug)]
pub struct LogPort {
    line: Vec<u8>,
    too_long: bool,
    limit: RateLimit,
    dropped: u64,
    output: Lines,
}

impl LogPort {
    /// A port whose lines go to `output`, without ever blocking.
    #[must_use]
    pub fn new(output: Lines) -> LogPort {
        LogPort {
            line: Vec::new(),
            too_long: false,
            limit: RateLimit::new(Instant::now()),
            dropped: 0,
            output,
        }
    }

    fn push(&mut self, byte: u8) {
        match byte {
            b'\n' => self.finish_line(),
            _ if self.line.len() < LINE_MAX => self.line.push(byte),
            _ => self.too_long = true,
        }
    }

    fn finish_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let too_long = std::mem::take(&mut self.too_long);
        if line.is_empty() {
            return;
        }
        let grave =
            line.starts_with(br#"{"sluice":"fault""#) || line.starts_with(br#"{"sluice":"panic""#);
        if !self.limit.allows(Instant::now(), grave) {
            self.dropped += 1;
            return;
        }
        if self.dropped > 0 {
            let note = format!(r#"{{"vmm":"guest-log","dropped_lines":{}}}"#, self.dropped);
            if self.output.send(note) {
                self.dropped = 0;
            }
        }
        if !self.output.send(presentable(&line, too_long)) {
            self.dropped += 1;
        }
    }
}

impl BusDevice for LogPort {
    fn read(&mut self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(LOG_PORT_PRESENT);
    }

    /// Takes any number of bytes: `rep outsb` arrives as one batch.
    fn write(&mut self, _offset: u64, bytes: &[u8]) -> Effect {
        for byte in bytes {
            self.push(*byte);
        }
        Effect::Continue
    }
}

impl Drop for LogPort {
    /// The last words of a guest may lack their newline.
    fn drop(&mut self) {
        self.finish_line();
    }
}

/// The line as it may be shown to a person or a program.
fn presentable(line: &[u8], too_long: bool) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end_matches('\r');
    let genuine = !too_long
        && text.starts_with(r#"{"sluice":"#)
        && !text.chars().any(char::is_control)
        && serde_json::from_str::<IgnoredAny>(text).is_ok();
    if genuine {
        return text.to_owned();
    }
    let mut wrapped = serde_json::json!({ "sluice": "log", "raw": text });
    if too_long {
        wrapped["truncated"] = true.into();
    }
    // serde_json escapes control characters below 0x20; the rest (DEL, C1) must not reach a terminal either.
    wrapped
        .to_string()
        .replace(|c: char| c.is_control(), "\u{fffd}")
}

/// A token bucket in whole lines.
#[derive(Debug)]
struct RateLimit {
    tokens: u32,
    reserved: u32,
    last: Instant,
}

impl RateLimit {
    fn new(now: Instant) -> RateLimit {
        RateLimit {
            tokens: BURST,
            reserved: RESERVED,
            last: now,
        }
    }

    fn allows(&mut self, now: Instant, grave: bool) -> bool {
        let earned = now.saturating_duration_since(self.last).as_millis()
            * u128::from(LINES_PER_SECOND)
            / 1000;
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(earned).min(BURST);
            self.last = now;
        }
        if self.tokens > 0 {
            self.tokens -= 1;
            return true;
        }
        if grave && self.reserved > 0 {
            self.reserved -= 1;
            return true;
        }
        false
    }
}

/// Port 0xf4.
#[derive(Debug)]
pub struct ExitPort;

impl BusDevice for ExitPort {
    fn read(&mut self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0xff);
    }

    fn write(&mut self, _offset: u64, bytes: &[u8]) -> Effect {
        let mut code = [0; 4];
        for (to, from) in code.iter_mut().zip(bytes) {
            *to = *from;
        }
        Effect::End(Ending::Code(u32::from_le_bytes(code)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::lines::tests::Paper;

    fn port() -> (LogPort, Lines, Paper) {
        let paper = Paper::default();
        let lines = Lines::start(paper.clone()).unwrap();
        (LogPort::new(lines.clone()), lines, paper)
    }

    fn lines_of(bytes: &[u8]) -> Vec<String> {
        let (mut port, lines, paper) = port();
        assert_eq!(port.write(0, bytes), Effect::Continue);
        drop(port);
        lines.flush();
        paper.lines()
    }

    #[test]
    fn a_line_of_the_contract_passes_unchanged() {
        let line = r#"{"sluice":"boot","version":"0.1.0","tsc_khz":2596000}"#;
        assert_eq!(lines_of(format!("{line}\n").as_bytes()), [line]);
        assert_eq!(
            lines_of(format!("\r\n\n{line}\r\n{line}").as_bytes()),
            [r#"{"raw":"","sluice":"log"}"#, line, line]
        );
    }

    #[test]
    fn a_line_in_pieces_is_one_line() {
        let (mut port, lines, paper) = port();
        for byte in br#"{"sluice":"log"}"# {
            port.write(0, &[*byte]);
        }
        lines.flush();
        assert!(paper.lines().is_empty());
        port.write(0, b"\n");
        lines.flush();
        assert_eq!(paper.lines(), [r#"{"sluice":"log"}"#]);
    }

    #[test]
    fn a_guest_cannot_forge_a_line_of_the_vmm_or_drive_a_terminal() {
        let forged = lines_of(b"{\"vmm\":\"end\",\"status\":0}\n\x1b[2J\xc2\x9b31m\x7f\n");
        assert_eq!(forged.len(), 2);
        for line in forged {
            assert!(line.starts_with(r#"{"raw":"#), "{line}");
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
        let two = lines_of(b"{\"sluice\":\"log\"}{\"vmm\":\"end\"}\n");
        assert!(
            two.iter().all(|line| line.starts_with(r#"{"raw":"#)),
            "{two:?}"
        );
    }

    #[test]
    fn an_endless_line_is_cut_and_marked() {
        let lines = lines_of(&[b'a'; 3 * LINE_MAX]);
        assert_eq!(lines.len(), 1);
        let value: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(value["raw"].as_str().unwrap().len(), LINE_MAX);
        assert_eq!(value["truncated"], true);
    }

    #[test]
    fn a_flood_is_limited_but_a_fault_still_gets_through() {
        let begin = Instant::now();
        let mut limit = RateLimit::new(begin);
        let passed = (0..10_000).filter(|_| limit.allows(begin, false)).count();
        assert_eq!(passed, BURST as usize);
        assert!(limit.allows(begin, true));
        let passed = (0..100).filter(|_| limit.allows(begin, true)).count();
        assert_eq!(passed, RESERVED as usize - 1);
        let later = begin + Duration::from_secs(1);
        let passed = (0..100).filter(|_| limit.allows(later, false)).count();
        assert_eq!(passed, LINES_PER_SECOND as usize);
    }

    /// Tells of each line it is given, and takes it when told.
    struct Gate {
        given: mpsc::Sender<()>,
        take: mpsc::Receiver<()>,
        paper: Paper,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.given.send(()).unwrap();
            // Once the test lets go of the other end, everything is taken at once.
            let _ = self.take.recv();
            self.paper.write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stops_costs_lines_and_their_number_is_told() {
        let (given, is_given) = mpsc::channel();
        let (taken, take) = mpsc::channel();
        let paper = Paper::default();
        let gate = Gate {
            given,
            take,
            paper: paper.clone(),
        };
        let mut port = LogPort::new(Lines::start_with(1, gate).unwrap());
        port.write(0, b"{\"sluice\":1}\n");
        is_given.recv().unwrap();
        // The first is being written, the second waits, two are too many.
        port.write(0, b"{\"sluice\":2}\n{\"sluice\":3}\n{\"sluice\":4}\n");
        taken.send(()).unwrap();
        is_given.recv().unwrap();
        port.write(0, b"{\"sluice\":5}\n");
        drop(taken);
        is_given.recv().unwrap();
        let told = r#"{"vmm":"guest-log","dropped_lines":2}"#;
        port.output.flush();
        assert_eq!(paper.lines(), [r#"{"sluice":1}"#, r#"{"sluice":2}"#, told]);
    }

    #[test]
    fn the_exit_port_takes_any_width() {
        let code = |bytes: &[u8]| ExitPort.write(0, bytes);
        assert_eq!(
            code(&0x10_u32.to_le_bytes()),
            Effect::End(Ending::Code(0x10))
        );
        assert_eq!(code(&[0x12]), Effect::End(Ending::Code(0x12)));
        assert_eq!(code(&[0x12, 1]), Effect::End(Ending::Code(0x112)));
        assert_eq!(code(&[0; 64]), Effect::End(Ending::Code(0)));
    }

    proptest! {
        #[test]
        fn whatever_a_guest_logs_comes_out_as_json_lines_without_control_characters(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            for line in lines_of(&bytes) {
                prop_assert!(!line.chars().any(char::is_control));
                let value: serde_json::Value = serde_json::from_str(&line).unwrap();
                prop_assert!(value.get("sluice").is_some());
            }
        }
    }
}
