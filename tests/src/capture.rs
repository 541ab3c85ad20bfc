//! Captures, read by dissectors that nobody here wrote.

use crate::command;
use crate::netns::Netns;
use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

/// Captures on an interface until it is dropped; the file goes with it.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Child,
    path: PathBuf,
}

impl Capture {
    /// Begins; frames are captured when this returns.
    ///
    /// # Errors
    /// If tcpdump does not start.
    pub fn start(netns: &Netns, interface: &str, filter: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{}-{interface}.pcap", netns.name()));
        // Another capture's file must not be taken for this one's.
        let _ = std::fs::remove_file(&path);
        let mut command = netns.command("tcpdump");
        command.args(["-Uni", interface, "-s", "256", "-w"]);
        command.arg(&path).arg(filter);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let capture = Self {
            tcpdump: command.spawn().context("tcpdump")?,
            path,
        };
        command::until("tcpdump", Duration::from_secs(5), || {
            ensure!(capture.path.metadata()?.len() >= 24, "no header yet");
            Ok(())
        })?;
        Ok(capture)
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
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
        let _ = std::fs::remove_file(&self.path);
    }
}
