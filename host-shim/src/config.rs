//! What the operator asked of a node: one JSON or YAML file, read and checked once.
//!
//! Unknown fields are refused by name. What comes out needs no further check by anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_cni::capability::{Bandwidth, PortMapping};
use sluice_contract::limits;

use crate::announce::config::AnnounceConfig;
use crate::cluster::config::{PolicyConfig, ServicesConfig, SourceConfig};
use crate::cluster::tenants::RatesConfig;
use crate::hostlink::config::HostLinkConfig;
use crate::hostlink::policy::HostPolicyConfig;
use crate::uplink::config::UplinkConfig;
use crate::wiring::Mode;

/// Where the appliance runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// KVM where `/dev/kvm` can be used, else a process.
    #[default]
    Auto,
    /// sluice-vmm on KVM.
    Kvm,
    /// The appliance as a process of its own, without a virtual machine.
    Process,
    /// QEMU without KVM: slow, works anywhere.
    Tcg,
    /// Started by other means: it listens on the ports socket and connects to the control socket.
    External,
}

/// What is left when the daemon ends in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnStop {
    /// Nothing: the appliance ends, all links and files go.
    #[default]
    TearDown,
    /// Everything: the appliance keeps running and the next daemon takes over.
    Leave,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For a person.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

/// A pod, and how it is to be linked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodConfig {
    /// `namespace/name`, or any other name that is its own.
    pub name: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Its addresses, at most one prefix length each: /32 and /128 are understood.
    pub addresses: Vec<IpAddr>,
    /// Name of its interface.
    #[serde(default = "eth0")]
    pub interface: String,
    /// How its interface reaches the node; the node's `wiring` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wiring: Option<Mode>,
    /// Its MAC address, like `02:00:00:00:00:01`; derived from the link id unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Its MTU; the node's `mtu` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// The host's end of its interface, if another CNI plugin made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopt: Option<String>,
    /// The pod of the cluster that it is, if its name does not say: `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Ports of the node that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<PortMapping>,
    /// How much it may send and be sent.
    #[serde(default, skip_serializing_if = "is_unlimited")]
    pub bandwidth: Bandwidth,
}

fn is_unlimited(bandwidth: &Bandwidth) -> bool {
    *bandwidth == Bandwidth::default()
}

fn eth0() -> String {
    "eth0".into()
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Sockets, state and logs.
    #[serde(default = "run_dir")]
    pub run_dir: PathBuf,
    /// The appliance image.
    pub image: PathBuf,
    /// sluice-vmm; looked for beside sluice-node and in PATH unless given.
    #[serde(default = "vmm")]
    pub vmm: PathBuf,
    /// sluice-process, for `process`; looked for in the same places.
    #[serde(default = "process")]
    pub process: PathBuf,
    /// sluice-trunk, which moves frames for QEMU; looked for in the same places.
    #[serde(default = "trunk")]
    pub trunk: PathBuf,
    /// QEMU, for `tcg`.
    #[serde(default = "qemu")]
    pub qemu: PathBuf,
    #[serde(default)]
    pub isolation: Isolation,
    /// The KVM device.
    #[serde(default = "kvm")]
    pub kvm: PathBuf,
    /// Guest RAM.
    #[serde(default = "memory_mib")]
    pub memory_mib: u32,
    /// How pods are wired unless they say otherwise.
    #[serde(default)]
    pub wiring: Mode,
    /// The MTU of pods unless they say otherwise. Unless given: the uplink's less what the tunnel adds, as of when a pod is
    /// linked; 1500 without an uplink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    #[serde(default)]
    pub on_stop: OnStop,
    #[serde(default)]
    pub log: LogFormat,
    /// Pods that exist before the daemon does.
    #[serde(default)]
    pub pods: Vec<PodConfig>,
    /// The way to other nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<UplinkConfig>,
    /// The way from the node itself to pods and Services.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_link: Option<HostLinkConfig>,
    /// Whom the node tells what it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce: Option<AnnounceConfig>,
    /// Pods that a container runtime adds.
    #[serde(default)]
    pub cni: CniConfig,
    /// This node's name in the cluster; the host's unless given.
    #[serde(default = "node_name")]
    pub node_name: String,
    /// How many packets and new connections pods may send and be sent that do not say it themselves; no limits unless given.
    #[serde(default)]
    pub pod_rates: RatesConfig,
    /// Where Pods, Services and policies come from. Without a source there is no policy, and no Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceConfig>,
    #[serde(default)]
    pub policy: PolicyConfig,
    /// How the source's NodePolicies are applied to this node itself.
    #[serde(default)]
    pub host_policy: HostPolicyConfig,
    #[serde(default)]
    pub services: ServicesConfig,
    /// Where a node with a source answers `/healthz` and `/livez`, as kube-proxy does; 0: nowhere.
    #[serde(default = "health_port")]
    pub health_port: u16,
}

/// kube-proxy's.
fn health_port() -> u16 {
    10256
}

/// What the CNI plugin finds here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CniConfig {
    /// Subnets of this node's pods, one per family, for networks whose configuration names no range; those of the Node object
    /// unless given.
    pub pod_cidrs: Vec<String>,
    /// Subnets by name, one per family, for pods and namespaces that ask for them by the annotation `sluice.dev/address-pool`.
    pub pools: BTreeMap<String, Vec<String>>,
    /// The node's own addresses: where host ports are served.
    pub node_addresses: Vec<IpAddr>,
    /// What must survive a restart: DELs that came while no node was there.
    pub state_dir: PathBuf,
}

impl Default for CniConfig {
    fn default() -> Self {
        let state_dir = "/var/lib/sluice".into();
        Self {
            pod_cidrs: Vec::new(),
            pools: BTreeMap::new(),
            node_addresses: Vec::new(),
            state_dir,
        }
    }
}

fn run_dir() -> PathBuf {
    "/run/sluice".into()
}

fn vmm() -> PathBuf {
    "sluice-vmm".into()
}

fn process() -> PathBuf {
    "sluice-process".into()
}

fn trunk() -> PathBuf {
    "sluice-trunk".into()
}

fn qemu() -> PathBuf {
    "qemu-system-x86_64".into()
}

fn kvm() -> PathBuf {
    "/dev/kvm".into()
}

fn memory_mib() -> u32 {
    64
}

fn node_name() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().to_lowercase()
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("Cannot read the configuration {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("The configuration {path} is not understood: {reason}")]
    Parse { path: PathBuf, reason: String },
    #[error("pods[{pod}].{field}: {reason}")]
    Pod {
        pod: String,
        field: &'static str,
        reason: String,
    },
    #[error("{field}: {reason}")]
    Field { field: &'static str, reason: String },
}

/// Smallest MTU that IPv6 allows (RFC 8200 §5).
pub const MTU_MIN: u16 = 1280;
/// Largest MTU of a tap.
pub const MTU_MAX: u16 = 65_521;
/// Longest interface name (IFNAMSIZ without the end).
const NAME_MAX: usize = 15;

impl Config {
    /// Reads a file; `.yaml` and `.yml` are YAML, all others JSON.
    ///
    /// # Errors
    /// When it cannot be read, is not understood, or asks for the impossible.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        let is_yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
        Self::parse(&text, is_yaml).map_err(|error| match error {
            ConfigError::Parse { reason, .. } => ConfigError::Parse {
                path: path.into(),
                reason,
            },
            error => error,
        })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(text: &str, is_yaml: bool) -> Result<Self, ConfigError> {
        let refused = |reason| ConfigError::Parse {
            path: PathBuf::new(),
            reason,
        };
        let mut config: Self = if is_yaml {
            serde_yaml_ng::from_str(text).map_err(|e| refused(e.to_string()))?
        } else {
            serde_json::from_str(text).map_err(|e| refused(e.to_string()))?
        };
        let has_host_link = config.host_link.is_some();
        if let Some(uplink) = config.uplink.as_mut().filter(|_| has_host_link) {
            uplink.choose_snat_ports();
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let refuse = |field, reason: String| Err(ConfigError::Field { field, reason });
        if let Some(mtu) = self.mtu
            && !(MTU_MIN..=MTU_MAX).contains(&mtu)
        {
            let reason = format!("{mtu} is not within {MTU_MIN}..={MTU_MAX}");
            return refuse("mtu", reason);
        }
        if !(16..=65_536).contains(&self.memory_mib) {
            return refuse(
                "memory_mib",
                format!("{} is not within 16..=65536", self.memory_mib),
            );
        }
        let pools = self.cni.pools.iter();
        let own = ("cni.pod_cidrs", &self.cni.pod_cidrs);
        let subnets = pools
            .map(|(_, subnets)| ("cni.pools", subnets))
            .chain([own]);
        for (field, subnets) in subnets.filter(|(_, subnets)| !subnets.is_empty()) {
            let plan = sluice_ipam::Plan::of_subnets(subnets.iter().map(String::as_str));
            if let Err(error) = plan {
                return refuse(field, error.to_string());
            }
        }
        if let Some(Err((field, reason))) = self.source.as_ref().map(SourceConfig::check) {
            return refuse(field, reason);
        }
        if let Err((field, reason)) = self.policy.check().and_then(|()| self.host_policy.check()) {
            return refuse(field, reason);
        }
        if let Some(Err((field, reason))) = self.uplink.as_ref().map(UplinkConfig::check) {
            return refuse(field, reason);
        }
        if let Err((field, reason)) = self.services.check(self.uplink.as_ref()) {
            return refuse(field, reason);
        }
        if let Some(Err((field, reason))) = self.host_link.as_ref().map(HostLinkConfig::check) {
            return refuse(field, reason);
        }
        if let Some(Err((field, reason))) = self.announce.as_ref().map(AnnounceConfig::check) {
            return refuse(field, reason);
        }
        if self.announce.is_some() && self.uplink.is_none() {
            return refuse("announce", "without an uplink nobody can be told".into());
        }
        let mut names = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for pod in &self.pods {
            let name = pod.name.clone();
            let taken = |field, reason: String| {
                Err(ConfigError::Pod {
                    pod: name.clone(),
                    field,
                    reason,
                })
            };
            pod.check()?;
            if !names.insert(&pod.name) {
                return taken("name", "another pod has it".into());
            }
            if let Some(address) = pod.addresses.iter().find(|a| !addresses.insert(**a)) {
                return taken("addresses", format!("{address} is given twice"));
            }
        }
        Ok(())
    }

    /// The MTU of pods that nothing else decides.
    pub const PLAIN_MTU: u16 = 1500;
}

impl PodConfig {
    /// Checks what can be checked without looking at the system.
    ///
    /// # Errors
    /// The field that cannot be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refuse = |field, reason: String| {
            Err(ConfigError::Pod {
                pod: self.name.clone(),
                field,
                reason,
            })
        };
        if self.name.is_empty() || self.name.len() > 253 || self.name.contains(char::is_control) {
            return refuse("name", "must have 1 to 253 printable characters".into());
        }
        let count = self.addresses.len();
        if count == 0 || count > limits::LINK_ADDRESSES {
            let most = limits::LINK_ADDRESSES;
            return refuse(
                "addresses",
                format!("{count} addresses; a pod has 1 to {most}"),
            );
        }
        let unusable = |a: &&IpAddr| a.is_loopback() || a.is_multicast() || a.is_unspecified();
        if let Some(address) = self.addresses.iter().find(unusable) {
            return refuse("addresses", format!("{address} cannot be a pod's"));
        }
        let interface = &self.interface;
        let odd = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if interface.is_empty() || interface.len() > NAME_MAX || interface.contains(odd) {
            return refuse("interface", format!("{interface:?} is no interface name"));
        }
        if self
            .mtu
            .is_some_and(|mtu| !(MTU_MIN..=MTU_MAX).contains(&mtu))
        {
            return refuse("mtu", format!("not within {MTU_MIN}..={MTU_MAX}"));
        }
        if self.host_ports.len() > crate::node::ports::MOST {
            return refuse(
                "host_ports",
                format!("more than {}", crate::node::ports::MOST),
            );
        }
        match self.mac.as_deref().map(parse_mac) {
            Some(None) => refuse(
                "mac",
                "is no unicast MAC address like 02:00:00:00:00:01".into(),
            ),
            _ => Ok(()),
        }
    }
}

/// A unicast MAC address from its usual text.
pub fn parse_mac(text: &str) -> Option<sluice_contract::Mac> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let mac = sluice_contract::Mac(bytes);
    (parts.next().is_none() && !mac.is_group() && bytes != [0; 6]).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str =
        r#"{"name": "default/a", "netns": "/n", "addresses": ["10.0.0.1", "fd00::1"]}"#;

    fn with_pods(pods: &str) -> Result<Config, ConfigError> {
        Config::parse(&format!(r#"{{"image": "i", "pods": [{pods}]}}"#), false)
    }

    #[test]
    fn the_shortest_configuration_has_sensible_defaults() {
        let config = Config::parse(r#"{"image": "/i"}"#, false).unwrap();
        assert_eq!(config.run_dir, Path::new("/run/sluice"));
        assert_eq!(
            (config.isolation, config.wiring),
            (Isolation::Auto, Mode::Veth)
        );
        assert_eq!((config.mtu, config.memory_mib), (None, 64));
        assert_eq!(config.on_stop, OnStop::TearDown);
    }

    #[test]
    fn source_is_read_from_json_and_yaml_and_there_is_none_unless_given() {
        assert_eq!(Config::parse("image: i", true).unwrap().source, None);
        let directory = Config::parse("image: i\nsource: {directory: /m}\n", true).unwrap();
        let json = r#"{"image": "i", "source": {"directory": "/m"}}"#;
        assert_eq!(directory, Config::parse(json, false).unwrap());
        let kubernetes = "image: i\nnode_name: n1\nsource: {kubernetes: {kubeconfig: /k}}\npolicy: {established: kept}\n";
        let config = Config::parse(kubernetes, true).unwrap();
        assert_eq!(config.node_name, "n1");
        let source = config.source.unwrap();
        assert_eq!(source.kubernetes.unwrap().kubeconfig, Some("/k".into()));
    }

    #[test]
    fn yaml_and_json_say_the_same() {
        let yaml =
            "image: i\npods:\n- name: default/a\n  netns: /n\n  addresses: [10.0.0.1, 'fd00::1']\n";
        assert_eq!(Config::parse(yaml, true).unwrap(), with_pods(POD).unwrap());
    }

    #[test]
    fn unknown_fields_and_impossible_values_are_refused_by_name() {
        let pod = |change: &str, to: &str| POD.replace(change, to);
        let cases = [
            (with_pods(&pod("\"netns\"", "\"netnss\"")), "netnss"),
            (Config::parse(r#"{"image": "i", "mut": 1}"#, false), "mut"),
            (
                Config::parse(r#"{"image": "i", "isolation": "hypervisor"}"#, false),
                "hypervisor",
            ),
            (
                Config::parse(r#"{"image": "i", "source": {"directroy": "/m"}}"#, false),
                "directroy",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "services": {"external_addresses": ["192.0.2.1"]}}"#,
                    false,
                ),
                "services.external_addresses: \"192.0.2.1\" is no range of addresses",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "services": {"cidrs": ["10.96.0.0/12", "::/0"]}}"#,
                    false,
                ),
                "services.cidrs: \"::/0\" is every address there is",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "services": {"node_endpoints": ["exporter"]}}"#,
                    false,
                ),
                "services.node_endpoints: \"exporter\" is no Service",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "services": {"forwarding": "dsr"}}"#,
                    false,
                ),
                "services.forwarding: dsr cannot be had: the node has no uplink",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "uplink": {"interface": "e"}, "services": {"forwarding": "dsr"}}"#,
                    false,
                ),
                "dsr cannot be had: a vxlan tunnel has no place",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "uplink": {"interface": "e", "direct": "same-subnet", "tunnel": {"protocol": "geneve"}}, "services": {"forwarding": "dsr"}}"#,
                    false,
                ),
                "uplink.direct has to be never",
            ),
            (
                Config::parse(r#"{"image": "i", "source": {}}"#, false),
                "source: names neither",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "source": {"directory": "/m", "kubernetes": {}}}"#,
                    false,
                ),
                "source: names a directory and kubernetes",
            ),
            (
                Config::parse(
                    r#"{"image": "i", "policy": {"established": "maybe"}}"#,
                    false,
                ),
                "maybe",
            ),
            (
                Config::parse(r#"{"image": "i", "mtu": 100}"#, false),
                "mtu: 100",
            ),
            (
                Config::parse(r#"{"image": "i", "memory_mib": 1}"#, false),
                "memory_mib: 1",
            ),
            (
                with_pods(&format!("{POD},{POD}")),
                "pods[default/a].name: another",
            ),
            (
                with_pods(&format!("{POD},{}", pod("/a", "/b"))),
                "10.0.0.1 is given twice",
            ),
            (with_pods(&pod("10.0.0.1", "127.0.0.1")), "127.0.0.1 cannot"),
            (
                with_pods(&pod("\"10.0.0.1\", \"fd00::1\"", "")),
                "0 addresses",
            ),
            (
                with_pods(&pod("}", ", \"mac\": \"ff:00:00:00:00:01\"}")),
                "mac",
            ),
            (
                with_pods(&pod("}", ", \"interface\": \"a/b\"}")),
                "interface",
            ),
            (with_pods(&pod("}", ", \"mtu\": 1000}")), "mtu"),
        ];
        for (outcome, part) in cases {
            let text = outcome.unwrap_err().to_string();
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
    }

    #[test]
    fn mac_addresses_are_read_exactly() {
        assert_eq!(
            parse_mac("02:0a:00:00:00:ff"),
            Some(sluice_contract::Mac([2, 10, 0, 0, 0, 255]))
        );
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "01:00:00:00:00:00",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
