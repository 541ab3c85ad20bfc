//! The yardstick: the same pods over a kernel bridge with veth pairs, in namespaces of their own.

use crate::netns::Netns;
use anyhow::Result;
use std::net::Ipv4Addr;

/// Two pods and a bridge.
#[derive(Debug)]
pub struct Bridge {
    pub pods: Vec<(Netns, Ipv4Addr)>,
    _host: Netns,
}

impl Bridge {
    /// Builds it.
    ///
    /// # Errors
    /// If a namespace, pair or bridge cannot be made.
    pub fn new(pods: u8) -> Result<Self> {
        let host = Netns::new("bridge")?;
        host.run(&[
            "ip",
            "link",
            "add",
            "br0",
            "type",
            "bridge",
            "forward_delay",
            "0",
        ])?;
        host.run(&["ip", "link", "set", "br0", "up"])?;
        let pods = (0..pods)
            .map(|index| join(&host, index))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { pods, _host: host })
    }
}

fn join(host: &Netns, index: u8) -> Result<(Netns, Ipv4Addr)> {
    let pod = Netns::new(&format!("bridge-pod-{index}"))?;
    let port = format!("port{index}");
    let address = Ipv4Addr::new(10, 245, 0, index + 2);
    let add = [
        "ip", "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns",
    ];
    host.run(&[&add[..], &[pod.name()]].concat())?;
    host.run(&["ip", "link", "set", &port, "master", "br0", "up"])?;
    pod.run(&["ip", "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
    pod.run(&["ip", "link", "set", "eth0", "up"])?;
    Ok((pod, address))
}
