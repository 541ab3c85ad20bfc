//! The contenders of one node: two pods and what carries frames between them.

use super::{Candidate, Extent, Family, Topology, nft, objects, until_link, words};
use crate::bridge::Bridge;
use crate::command::Running;
use crate::lab::{Lab, Plan, Pod, Wiring, program};
use crate::need::Need;
use crate::netns::Netns;
use anyhow::{Context as _, Result, bail};

const BASE: &str = "bridge";
/// Services of the contenders that have any.
pub(super) const SERVICES: usize = 1000;

/// Measures them.
///
/// # Errors
/// As [`super::run`].
pub fn run(extent: Extent) -> Result<()> {
    let kernel = |name| (name, Family::Kernel);
    let mut all = vec![
        Candidate::new(
            kernel(BASE),
            "veth pairs on a kernel bridge; no Services, no policy, no connection tracking",
            KernelBridge::new,
        ),
        Candidate::new(
            kernel("routed + nft 1000"),
            "veth pairs that the host routes between, with 1 000 Services as kube-proxy's nftables mode writes them",
            || Routed::new(SERVICES),
        ),
        Candidate::new(
            ("tap forwarder", Family::Floor),
            "the floor: taps as eth0, one thread moves frames between them and looks at nothing",
            Forwarded::new,
        ),
    ];
    let sluice = [
        ("sluice kvm tap", "kvm", Wiring::Tap),
        ("sluice kvm veth", "kvm", Wiring::Veth),
        ("sluice process tap", "process", Wiring::Tap),
        ("sluice process veth", "process", Wiring::Veth),
    ];
    for (name, isolation, wiring) in sluice {
        if extent.few && wiring == Wiring::Veth {
            continue;
        }
        all.push(Candidate::new(
            (name, Family::Sluice),
            about(isolation),
            move || Sluice::new(isolation, wiring),
        ));
    }
    super::run(("node", "One node, pod to pod"), all, BASE, extent)
}

/// A line about Sluice in this isolation.
pub(super) fn about(isolation: &str) -> &'static str {
    match isolation {
        "kvm" => "Sluice, its appliance in a KVM microVM, with 1 000 Services from manifests",
        _ => "Sluice, its appliance in a process of its own, with 1 000 Services from manifests",
    }
}

/// Whether this isolation can be had here.
pub(super) fn can_isolate(isolation: &str) -> Result<()> {
    match Need::Kvm.missing() {
        Some(reason) if isolation == "kvm" => bail!(reason),
        _ => Ok(()),
    }
}

#[derive(Debug)]
struct KernelBridge(Bridge);

impl KernelBridge {
    fn new() -> Result<Self> {
        let bridge = Bridge::new(2)?;
        anyhow::ensure!(bridge.pods.len() == 2, "two pods");
        Ok(Self(bridge))
    }
}

impl Topology for KernelBridge {
    fn client(&self) -> &Netns {
        &self.0.pods[0].0
    }
    fn server(&self) -> &Netns {
        &self.0.pods[1].0
    }
    fn address(&self) -> String {
        self.0.pods[1].1.to_string()
    }
}

/// Pods on subnets of their own, so that all traffic between them passes the host's hooks.
#[derive(Debug)]
struct Routed {
    pods: [Netns; 2],
    _host: Netns,
    services: usize,
}

impl Routed {
    fn new(services: usize) -> Result<Self> {
        let host = Netns::new("routed")?;
        let pods = [Netns::new("routed-pod-1")?, Netns::new("routed-pod-2")?];
        words(&host, "sysctl -qw net.ipv4.ip_forward=1")?;
        for (number, pod) in (1..).zip(&pods) {
            let name = pod.name();
            words(
                &host,
                &format!("ip link add pod{number} type veth peer name eth0 netns {name}"),
            )?;
            words(
                &host,
                &format!("ip addr add 10.244.{number}.1/24 dev pod{number}"),
            )?;
            words(&host, &format!("ip link set pod{number} up"))?;
            words(
                pod,
                &format!("ip addr add {}/24 dev eth0", Self::pod(number)),
            )?;
            words(pod, "ip link set eth0 up")?;
            words(pod, &format!("ip route add default via 10.244.{number}.1"))?;
        }
        nft::serve(&host, services, &Self::pod(2))?;
        Ok(Self {
            pods,
            _host: host,
            services,
        })
    }

    fn pod(number: u8) -> String {
        format!("10.244.{number}.2")
    }
}

impl Topology for Routed {
    fn client(&self) -> &Netns {
        &self.pods[0]
    }
    fn server(&self) -> &Netns {
        &self.pods[1]
    }
    fn address(&self) -> String {
        Self::pod(2)
    }
    fn service(&self) -> Option<String> {
        Some(objects::target(self.services))
    }
}

/// Pods whose `eth0` are taps of one process.
#[derive(Debug)]
struct Forwarded {
    // Ends before the namespaces.
    _process: Running,
    pods: [Netns; 2],
}

impl Forwarded {
    fn new() -> Result<Self> {
        let pods = [Netns::new("tap-pod-1")?, Netns::new("tap-pod-2")?];
        let mut command = std::process::Command::new(program("sluice-lab"));
        command
            .arg("forward")
            .args(pods.each_ref().map(Netns::path));
        let mut process = Running::start("the tap forwarder", &mut command)?;
        for (number, pod) in (1..).zip(&pods) {
            until_link(pod, "eth0", &mut process)?;
            words(
                pod,
                &format!("ip addr add {}/24 dev eth0", Self::pod(number)),
            )?;
            words(pod, "ip link set eth0 up")?;
        }
        Ok(Self {
            _process: process,
            pods,
        })
    }

    fn pod(number: u8) -> String {
        format!("10.245.0.{number}")
    }
}

impl Topology for Forwarded {
    fn client(&self) -> &Netns {
        &self.pods[0]
    }
    fn server(&self) -> &Netns {
        &self.pods[1]
    }
    fn address(&self) -> String {
        Self::pod(2)
    }
}

#[derive(Debug)]
struct Sluice {
    // The node ends before its pods' namespaces.
    _lab: Lab,
    client: Pod,
    server: Pod,
}

impl Sluice {
    fn new(isolation: &str, wiring: Wiring) -> Result<Self> {
        can_isolate(isolation)?;
        let mut lab = Lab::prepare(&Plan {
            isolation: isolation.to_owned(),
            wiring,
            ..Plan::default()
        })?;
        let server = lab.pods.get(1).context("two pods")?.v4.to_string();
        objects::give(&lab, SERVICES, &server)?;
        lab.start_node()?;
        let server = lab.pods.pop().context("two pods")?;
        let client = lab.pods.pop().context("two pods")?;
        Ok(Self {
            _lab: lab,
            client,
            server,
        })
    }
}

impl Topology for Sluice {
    fn client(&self) -> &Netns {
        &self.client.netns
    }
    fn server(&self) -> &Netns {
        &self.server.netns
    }
    fn address(&self) -> String {
        self.server.v4.to_string()
    }
    fn service(&self) -> Option<String> {
        Some(objects::target(SERVICES))
    }
}
