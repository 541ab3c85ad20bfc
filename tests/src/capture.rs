//! Captures, read by dissectors that nobody here wrote.

use crate::command;
use crate::netns::Netns;
use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

/// For a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Captures on an interface until it is dropped; the file goes with it.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Child,
    path: PathBuf,
}

impl Capture {
    /// Begins; frames are captured when this returns, of each the headers.
    ///
    /// # Errors
    /// If tcpdump does not start.
    pub fn start(netns: &Netns, interface: &str, filter: &str) -> Result<Self> {
        Self::begin(netns, interface, filter, "256")
    }

    /// The same with every byte of frames as a wire has them, for whoever checks checksums.
    ///
    /// # Errors
    /// If tcpdump does not start.
    pub fn whole(netns: &Netns, interface: &str, filter: &str) -> Result<Self> {
        Self::begin(netns, interface, filter, "2048")
    }

    fn begin(netns: &Netns, interface: &str, filter: &str, length: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{}-{interface}.pcap", netns.name()));
        // Another capture's file must not be taken for this one's.
        let _ = std::fs::remove_file(&path);
        let mut command = netns.command("tcpdump");
        // Frame by frame, for otherwise they come a second late; and with room for those that come at once.
        command.args(["--immediate-mode", "-B", "16384"]);
        command.args(["-Uni", interface, "-s", length, "-w"]);
        command.arg(&path).arg(filter);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let capture = Self {
            tcpdump: command.spawn().context("tcpdump")?,
            path,
        };
        command::until("tcpdump", PATIENCE, || {
            ensure!(capture.path.metadata()?.len() >= 24, "no header yet");
            Ok(())
        })?;
        Ok(capture)
    }

    /// The frames so far, as they are.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn frames(&self) -> Result<Vec<Vec<u8>>> {
        let bytes = std::fs::read(&self.path)?;
        let mut frames = Vec::new();
        // The file's header, and then of each frame sixteen bytes, the third four of which are its length.
        let mut rest = bytes.get(24..).unwrap_or_default();
        while let Some((length, behind)) = rest
            .get(8..12)
            .and_then(|at| at.try_into().ok())
            .map(u32::from_ne_bytes)
            .zip(rest.get(16..))
        {
            let Some((frame, next)) = behind.split_at_checked(length as usize) else {
                break;
            };
            frames.push(frame.to_vec());
            rest = next;
        }
        Ok(frames)
    }

    /// What tcpdump prints of it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, filter: &str) -> Result<String> {
        let path = self.path.to_string_lossy();
        command::run(&["tcpdump", "-nvr", &path, filter])
    }

    /// Lines of fields that tshark finds in frames that match its display filter.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn fields(&self, shown: &str, fields: &[&str]) -> Result<Vec<String>> {
        let path = self.path.to_string_lossy();
        let mut words = vec![
            "tshark",
            "-r",
            &path,
            "-d",
            "udp.port==8472,vxlan",
            "-d",
            "udp.port==6081,geneve",
            // The traffic server's port is other protocols' for others.
            "-d",
            "udp.port==7000,data",
            "-d",
            "tcp.port==7000,data",
            // Off unless asked for, because most captures are taken before a card completes them.
            "-o",
            "ip.check_checksum:TRUE",
            "-o",
            "tcp.check_checksum:TRUE",
            "-o",
            "udp.check_checksum:TRUE",
            "-Y",
            shown,
            "-T",
            "fields",
            "-E",
            "separator=/s",
        ];
        for field in fields {
            words.extend(["-e", field]);
        }
        let text = command::run(&words)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// The same, once there are so many lines: what is captured is written a little later.
    ///
    /// # Errors
    /// If they do not come.
    pub fn until_fields(&self, shown: &str, fields: &[&str], least: usize) -> Result<Vec<String>> {
        command::until("the capture", PATIENCE, || {
            let lines = self.fields(shown, fields)?;
            let count = lines.len();
            ensure!(count >= least, "tshark finds {count} frames of `{shown}`");
            Ok(lines)
        })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
        let _ = std::fs::remove_file(&self.path);
    }
}
