//! The node as the CNI verbs see it: links by name, their interfaces, and whether the appliance is there.

pub mod command;
pub mod install;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use sluice_cni::config::Wiring;
use sluice_cni::env::PodName;
use sluice_cni::server::Server;
use sluice_cni::verbs::Verbs;
use sluice_cni::verbs::node::{Defaults, Health, Link, Made, Node as CniNode, NodeError};
use sluice_contract::Mac;
use sluice_contract::row::NodeRow;
use sluice_model::object::Name;

use crate::api::with_causes;
use crate::config::PodConfig;
use crate::control::NotInForce;
use crate::node::links::LinkError;
use crate::node::{self, Node};
use crate::wiring::netlink::Netlink;
use crate::wiring::netns::{Netns, is_out_of_means};
use crate::wiring::{LinkSpec, Mode};

/// Serves the CNI plugin until the server is dropped.
///
/// # Errors
/// When the records cannot be read or the socket cannot be made.
pub fn start(node: &Arc<Node>) -> io::Result<Server> {
    let config = node.config();
    let (run_dir, state_dir) = (&config.run_dir, &config.cni.state_dir);
    let verbs = Verbs::start(Host(node.clone()), run_dir, state_dir)?;
    node.count_cni(verbs.counters.clone());
    Server::start(verbs, run_dir)
}

/// The node behind the verbs.
#[derive(Debug)]
pub struct Host(Arc<Node>);

impl CniNode for Host {
    fn defaults(&self) -> Defaults {
        let (config, row) = (self.0.config(), NodeRow::default());
        let own = config.cni.pod_cidrs.clone();
        let subnets = match self.0.cluster() {
            Some(cluster) if own.is_empty() => cluster.own_pod_cidrs(),
            _ => own,
        };
        Defaults {
            subnets,
            pools: config.cni.pools.clone(),
            mtu: self.0.pod_mtu(),
            wiring: match config.wiring {
                Mode::Veth => Wiring::Veth,
                Mode::Tap => Wiring::Tap,
            },
            gateway4: row.gateway4.into(),
            gateway6: row.gateway6.into(),
        }
    }

    fn attach(&self, name: &str, link: &Link) -> Result<Vec<Made>, NodeError> {
        let pod = PodConfig {
            name: name.into(),
            netns: PathBuf::from(&link.netns),
            addresses: link.addresses.clone(),
            interface: link.ifname.clone(),
            // What another plugin made is a pair, whatever the network says.
            wiring: Some(if link.adopt.is_some() {
                Mode::Veth
            } else {
                mode(link.wiring)
            }),
            mac: link.mac.map(|mac| Mac(mac).to_string()),
            mtu: Some(link.mtu),
            adopt: link.adopt.clone(),
            pod: (link.pod.as_ref()).map(|pod| format!("{}/{}", pod.namespace, pod.name)),
            host_ports: link.ports.clone(),
            bandwidth: link.bandwidth,
        };
        let added = self.0.add_link(pod).map_err(|error| told(&error))?;
        let spec = added.saved.spec();
        let finished = set_sysctls(link).and_then(|()| made(&spec));
        finished.inspect_err(|_| {
            if let Err(error) = self.0.remove_link(name) {
                tracing::error!(name, %error, "a link that was not finished is left");
            }
        })
    }

    fn detach(&self, name: &str, _link: &Link) -> Result<(), NodeError> {
        match self.0.remove_link(name) {
            Ok(_) | Err(node::NodeError::Link(LinkError::Unknown(_))) => Ok(()),
            Err(error) => Err(told(&error)),
        }
    }

    fn missing(&self, name: &str, link: &Link) -> Result<Vec<String>, NodeError> {
        let Ok(found) = self.0.link(name) else {
            return Ok(vec!["the node's link".into()]);
        };
        let mut missing = found.saved.spec().missing().map_err(|e| failed(&e))?;
        if let Some(problem) = self.0.appliance_problem() {
            missing.push(format!("the appliance ({problem})"));
        } else if let Some(problem) = self.0.link_problem(&found) {
            missing.push(format!("the appliance's link and policy ({problem})"));
        }
        for (key, value) in &link.sysctl {
            match read_sysctl(link, key) {
                Ok(now) if now.split_whitespace().eq(value.split_whitespace()) => {}
                _ => missing.push(format!("sysctl {key}={value}")),
            }
        }
        Ok(missing)
    }

    fn is_alive(&self, link: &Link) -> bool {
        let found = || -> io::Result<bool> {
            let mut pod = Netns::open(Path::new(&link.netns))?.run(Netlink::open)?;
            Ok(pod.interface(&link.ifname)?.is_some())
        };
        // Who cannot look has not seen that it is gone.
        found().unwrap_or_else(|error| is_out_of_means(&error))
    }

    fn health(&self) -> Health {
        match self.0.appliance_problem() {
            Some(problem) => Health::Unavailable(problem),
            None => match (self.lost_uplink(), self.0.refused_rows()) {
                (Some(lost), _) => Health::Degraded(lost),
                (None, 0) => Health::Ready,
                (None, count) => Health::Degraded(format!("the appliance refused {count} rows")),
            },
        }
    }

    fn pool_of(&self, pod: &PodName) -> Result<Option<String>, NodeError> {
        // Without a cluster there is nobody to ask for a pool.
        let Some(cluster) = self.0.cluster() else {
            return Ok(None);
        };
        let pod = Name::new(&pod.namespace, &pod.name);
        self.0.await_pod(&pod).map_err(|error| told(&error))?;
        Ok(cluster.address_pool(&pod))
    }
}

impl Host {
    /// Whether the way to other nodes is cut, and how.
    fn lost_uplink(&self) -> Option<String> {
        let name = &self.0.config().uplink.as_ref()?.interface;
        match Netlink::open().and_then(|mut host| host.interface(name)) {
            Ok(Some(card)) if card.up && card.carrier => None,
            Ok(Some(_)) => Some(format!("the uplink {name} is down")),
            Ok(None) => Some(format!("the uplink {name} is gone")),
            Err(error) => Some(format!("the uplink {name} cannot be looked at: {error}")),
        }
    }
}

fn mode(wiring: Wiring) -> Mode {
    match wiring {
        Wiring::Veth => Mode::Veth,
        Wiring::Tap => Mode::Tap,
    }
}

fn failed(error: &dyn std::error::Error) -> NodeError {
    let cause = error.source().map(|cause| format!(": {cause}"));
    NodeError::Failed(format!("{error}{}", cause.unwrap_or_default()))
}

/// The node's errors as the verbs tell them apart.
fn told(error: &node::NodeError) -> NodeError {
    let text = with_causes(error);
    match error {
        node::NodeError::NotInForce(NotInForce::Late(_)) | node::NodeError::NotKnown(_) => {
            NodeError::Late(text)
        }
        node::NodeError::Config(_) => NodeError::Config(text),
        node::NodeError::Link(LinkError::NoId) => NodeError::Full(text),
        node::NodeError::Link(LinkError::NameTaken(_)) => NodeError::Exists(text),
        node::NodeError::Wiring(wiring) => {
            if wiring.source.kind() == io::ErrorKind::AlreadyExists {
                NodeError::Exists(text)
            } else if wiring.step.contains("namespace") {
                NodeError::Netns(text)
            } else {
                NodeError::Failed(text)
            }
        }
        _ => NodeError::Failed(text),
    }
}

fn made(spec: &LinkSpec) -> Result<Vec<Made>, NodeError> {
    let (mac, mtu) = (spec.mac.0, spec.mtu);
    let pod = Made {
        name: spec.interface.clone(),
        mac,
        mtu,
        in_pod: true,
    };
    let mut all = vec![pod];
    if spec.mode == Mode::Veth {
        let mut host = Netlink::open().map_err(|e| failed(&e))?;
        for name in [spec.veth_name(), spec.tap_name()] {
            let found = host.interface(&name).map_err(|e| failed(&e))?;
            let mac = found.map(|interface| interface.mac.0).unwrap_or_default();
            all.push(Made {
                name,
                mac,
                mtu,
                in_pod: false,
            });
        }
    }
    Ok(all)
}

/// `net.ipv4.conf.eth0.rp_filter` below `/proc/sys`. With slashes, names may have dots (as `sysctl` has it); `IFNAME` stands
/// for the pod's interface.
fn sysctl_path(link: &Link, key: &str) -> PathBuf {
    let key = if key.contains('/') {
        key.to_owned()
    } else {
        key.replace('.', "/")
    };
    let parts = key
        .split('/')
        .map(|part| if part == "IFNAME" { &link.ifname } else { part });
    parts.fold(PathBuf::from("/proc/sys"), |path, part| path.join(part))
}

fn set_sysctls(link: &Link) -> Result<(), NodeError> {
    if link.sysctl.is_empty() {
        return Ok(());
    }
    let netns = Netns::open(Path::new(&link.netns)).map_err(|e| NodeError::Netns(e.to_string()))?;
    for (key, value) in &link.sysctl {
        let path = sysctl_path(link, key);
        netns.run(|| fs::write(&path, value)).map_err(|error| {
            let why = match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                Errno::ENOENT => "this kernel does not have it".into(),
                Errno::EACCES | Errno::EPERM | Errno::EROFS => {
                    format!("the node may not set it ({error})")
                }
                _ => error.to_string(),
            };
            NodeError::Config(format!("sysctl {key}={value}: {why}"))
        })?;
    }
    Ok(())
}

fn read_sysctl(link: &Link, key: &str) -> io::Result<String> {
    let path = sysctl_path(link, key);
    Netns::open(Path::new(&link.netns))?.run(|| fs::read_to_string(&path))
}
