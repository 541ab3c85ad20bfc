//! A router of somebody else's making: BIRD in a namespace, which learns routes by BGP and puts them into the kernel's table.

use crate::command::{self, Running};
use crate::netns::Netns;
use anyhow::{Context as _, Result, ensure};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// Its autonomous system, and that of the nodes.
pub const OWN_ASN: u32 = 64_513;
pub const NODES_ASN: u32 = 4_200_000_001;

/// The running daemon; it ends with this.
#[derive(Debug)]
pub struct Bird {
    // It ends before its files go.
    daemon: Option<Running>,
    directory: PathBuf,
    netns: String,
}

impl Bird {
    /// Awaits sessions from neighbors, given as addresses. With a password only those who have it too get one.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(netns: &Netns, neighbors: &[&str], password: Option<&str>) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("{}-bird", netns.name()));
        std::fs::create_dir_all(&directory)?;
        let mut bird = Self {
            daemon: None,
            directory,
            netns: netns.name().to_owned(),
        };
        let log = bird.directory.join("bird.log").display().to_string();
        let mut config = format!(
            "log \"{log}\" all;\nrouter id 192.0.2.254;\nprotocol device {{ scan time 1; }}\n\
             protocol kernel {{ merge paths on; ipv4 {{ import none; export where source = RTS_BGP; }}; }}\n\
             protocol kernel {{ merge paths on; ipv6 {{ import none; export where source = RTS_BGP; }}; }}\n"
        );
        for (index, neighbor) in neighbors.iter().enumerate() {
            let signed = password.map_or_else(String::new, |it| format!("password \"{it}\";"));
            writeln!(
                config,
                "protocol bgp node{index} {{ local as {OWN_ASN}; neighbor {neighbor} as {NODES_ASN}; passive on; \
                 debug {{ states, routes, events }}; {signed} \
                 ipv4 {{ import all; export none; }}; ipv6 {{ import all; export none; }}; }}"
            )?;
        }
        std::fs::write(bird.file("bird.conf"), config)?;
        let mut command = netns.command("bird");
        let (conf, socket) = (bird.file("bird.conf"), bird.file("bird.ctl"));
        command
            .args(["-f", "-c", &conf, "-s", &socket])
            .stdout(Stdio::null());
        bird.daemon = Some(Running::start("bird", &mut command)?);
        command::until("BIRD", Duration::from_secs(20), || {
            bird.ask(&["show", "status"]).map(drop)
        })?;
        Ok(bird)
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// What its command line says.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn ask(&self, words: &[&str]) -> Result<String> {
        let socket = self.file("bird.ctl");
        command::run(&[&["birdc", "-s", &socket], words].concat())
    }

    /// What it has noted so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("bird.log")).unwrap_or_default()
    }

    /// The next hops that the kernel has for a route, in order; none without the route.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn ways(&self, netns: &Netns, route: &str) -> Result<Vec<String>> {
        ensure!(netns.name() == self.netns, "another's namespace");
        let family = if route.contains(':') { "-6" } else { "-4" };
        let text = netns.run(&["ip", "-j", family, "route", "show", "proto", "bird", route])?;
        let routes: Vec<serde_json::Value> =
            serde_json::from_str(&text).with_context(|| text.clone())?;
        let mut ways: Vec<String> = routes
            .iter()
            .flat_map(|route| {
                let several = route["nexthops"].as_array().into_iter().flatten();
                several
                    .chain([route])
                    .filter_map(|it| it["gateway"].as_str())
            })
            .map(str::to_owned)
            .collect();
        ways.sort();
        Ok(ways)
    }
}

impl Drop for Bird {
    fn drop(&mut self) {
        drop(self.daemon.take());
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("{} stays behind: {error}", self.directory.display());
        }
    }
}
