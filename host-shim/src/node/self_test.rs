//! Whether the node forwards: a pod of its own asks for its gateway, and only the appliance can answer.
//!
//! The frame travels the whole way there and back: interface, tap, trunk, appliance, trunk, tap, interface.

use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use sluice_contract::row::NodeRow;

use super::{Node, NodeError, cannot};
use crate::config::PodConfig;

/// The self-test's own address: link-local, and no pod's (RFC 3927 §2.1 keeps the first 256 for later use).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 9);
const NAME: &str = "sluice/self-test";
/// How long the answer may take.
const PATIENCE: Duration = Duration::from_secs(2);

impl Node {
    /// Sends a frame through the appliance and back; returns how long that took.
    ///
    /// # Errors
    /// The step that failed, or that no answer came.
    pub fn self_test(&self) -> Result<Duration, NodeError> {
        let gateway = NodeRow::default();
        std::thread::scope(|scope| {
            let test = || {
                unshare(CloneFlags::CLONE_NEWNET)
                    .map_err(|error| cannot("make a namespace for the self-test")(error.into()))?;
                let thread = nix::unistd::gettid();
                let pid = std::process::id();
                // No pod of the cluster: it has no identity, and policy lets it do nothing but ask for its gateway.
                self.link_pod(
                    PodConfig {
                        name: NAME.into(),
                        netns: PathBuf::from(format!("/proc/{pid}/task/{thread}/ns/net")),
                        addresses: vec![IpAddr::V4(ADDRESS)],
                        interface: "eth0".into(),
                        wiring: None,
                        mac: None,
                        mtu: None,
                        adopt: None,
                        pod: None,
                        host_ports: Vec::new(),
                        bandwidth: Default::default(),
                    },
                    false,
                )?;
                let answered = ask(gateway.gateway4, &gateway.gateway_mac.to_string());
                self.remove_link(NAME)?;
                answered.map_err(cannot("get an answer of the appliance"))
            };
            let thread = std::thread::Builder::new().name("self-test".into());
            let thread = thread
                .spawn_scoped(scope, test)
                .map_err(cannot("start the self-test"))?;
            let died = || Err(cannot("finish the self-test")(io::ErrorKind::Other.into()));
            thread.join().unwrap_or_else(|_| died())
        })
    }
}

/// Makes the kernel ask who has `gateway`, and waits until it knows that `mac` has.
fn ask(gateway: Ipv4Addr, mac: &str) -> io::Result<Duration> {
    let started = Instant::now();
    // The discard port: the datagram itself is nobody's.
    UdpSocket::bind((ADDRESS, 0))?.send_to(b"sluice", (gateway, 9))?;
    loop {
        let known = std::fs::read_to_string("/proc/thread-self/net/arp")?;
        let is_answer = |line: &str| {
            let mut words = line.split_whitespace();
            words.next() == Some(&gateway.to_string()) && words.nth(2) == Some(mac)
        };
        if known.lines().any(is_answer) {
            return Ok(started.elapsed());
        }
        if started.elapsed() >= PATIENCE {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
