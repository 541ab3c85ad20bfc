//! A node whose tunnel is Open vSwitch's userspace datapath: its own daemons on private sockets, one pod, and flows that do
//! what a node does between its pod and the tunnel.

use crate::command::{self, Running};
use crate::netns::Netns;
use crate::underlay::{Underlay, node4, pods_of, vtep};
use anyhow::{Context as _, Result};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Where Debian's openvswitch-common has it.
pub const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// What the pod takes for its gateway.
const GATEWAY: &str = "02:00:00:00:bb:01";

/// The node; its daemons end with it.
#[derive(Debug)]
pub struct OpenVswitch {
    // Order matters: the switch ends before its database, and both before their namespace.
    switch: Option<Running>,
    database: Option<Running>,
    pub pod: Netns,
    pub v4: String,
    pub v6: String,
    number: u8,
    node: Netns,
    directory: PathBuf,
}

impl OpenVswitch {
    /// Node `number`, which reaches the pods of node `peer` through a tunnel of this kind (`vxlan`, `geneve`) and port.
    ///
    /// # Errors
    /// If a daemon does not start or a command fails.
    pub fn new(
        underlay: &Underlay,
        (number, peer): (u8, u8),
        (kind, port): (&str, u16),
        mtu: u16,
    ) -> Result<Self> {
        let node = Netns::new("ovs")?;
        let directory = std::env::temp_dir().join(node.name());
        std::fs::create_dir_all(&directory)?;
        let mut this = Self {
            switch: None,
            database: None,
            pod: Netns::new("ovs-pod")?,
            v4: format!("10.244.{number}.2"),
            v6: format!("fd00:244:0:{number:x}::2"),
            number,
            node,
            directory,
        };
        underlay.attach(&this.node, number)?;
        this.start().with_context(|| this.logs())?;
        this.underlay_bridge(number)?;
        this.wire_pod(number, mtu)?;
        this.tunnel(number, peer, (kind, port))
            .with_context(|| this.logs())?;
        Ok(this)
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// What its daemons said last.
    pub fn logs(&self) -> String {
        let read = |name| std::fs::read_to_string(self.directory.join(name)).unwrap_or_default();
        let text = read("switch.log");
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn start(&mut self) -> Result<()> {
        let (conf, sock) = (self.file("conf.db"), self.file("db.sock"));
        command::run(&["ovsdb-tool", "create", &conf, SCHEMA])?;
        let database = [
            "ovsdb-server".into(),
            conf,
            format!("--remote=punix:{sock}"),
            format!("--unixctl={}", self.file("db.ctl")),
            format!("--log-file={}", self.file("db.log")),
        ];
        self.database = Some(self.daemon(&database)?);
        command::until("Open vSwitch's database", Duration::from_secs(30), || {
            self.vsctl("--no-wait init")
        })?;
        let switch = [
            "ovs-vswitchd".into(),
            format!("unix:{sock}"),
            // No kernel datapath: this is about formats, not about a module.
            "--disable-system".into(),
            format!("--unixctl={}", self.file("switch.ctl")),
            format!("--log-file={}", self.file("switch.log")),
        ];
        self.switch = Some(self.daemon(&switch)?);
        Ok(())
    }

    fn daemon(&self, words: &[String]) -> Result<Running> {
        let (program, arguments) = words.split_first().context("a program")?;
        let mut command = self.node.command(program);
        command
            .args(arguments)
            .envs(self.environment())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Running::start(program, &mut command)
    }

    fn environment(&self) -> [(&'static str, &Path); 3] {
        ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"].map(|name| (name, self.directory.as_path()))
    }

    fn vsctl(&self, words: &str) -> Result<()> {
        let db = format!("--db=unix:{}", self.file("db.sock"));
        let mut all = vec!["ovs-vsctl", "--timeout=10", &db];
        all.extend(words.split(' '));
        self.node.run(&all).map(drop)
    }

    fn flow(&self, flow: &str) -> Result<()> {
        command::run(&["ovs-ofctl", "add-flow", &self.bridge(), flow]).map(drop)
    }

    fn bridge(&self) -> String {
        format!("unix:{}", self.file("br-int.mgmt"))
    }

    fn on_node(&self, words: &str) -> Result<()> {
        self.node
            .run(&words.split(' ').collect::<Vec<_>>())
            .map(drop)
    }

    /// The card becomes a port, and its address the bridge's: so the userspace datapath sees what comes in.
    fn underlay_bridge(&self, number: u8) -> Result<()> {
        self.vsctl(
            "add-br br-phy -- set bridge br-phy datapath_type=netdev -- add-port br-phy eth0",
        )?;
        self.on_node("ip addr flush dev eth0")?;
        let address = node4(number);
        self.on_node(&format!("ip addr add {address}/24 dev br-phy"))?;
        self.on_node("ip link set br-phy up")
    }

    fn wire_pod(&self, number: u8, mtu: u16) -> Result<()> {
        let name = self.pod.name();
        self.on_node(&format!(
            "ip link add pod0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {name}"
        ))?;
        self.on_node("ip link set pod0 up")?;
        let pod = |words: &str| self.pod.run(&words.split(' ').collect::<Vec<_>>());
        // The userspace datapath reads what is on the wire, and nobody completes checksums there.
        pod("ethtool -K eth0 tx off")?;
        pod(&format!("ip addr add {}/24 dev eth0", self.v4))?;
        pod(&format!("ip addr add {}/64 dev eth0 nodad", self.v6))?;
        pod("ip link set eth0 up")?;
        for (gateway, family) in [
            (format!("10.244.{number}.1"), "-4"),
            (format!("fd00:244:0:{number:x}::1"), "-6"),
        ] {
            pod(&format!(
                "ip neigh add {gateway} lladdr {GATEWAY} dev eth0 nud permanent"
            ))?;
            pod(&format!("ip {family} route add default via {gateway}"))?;
        }
        Ok(())
    }

    fn tunnel(&self, number: u8, peer: u8, (kind, port): (&str, u16)) -> Result<()> {
        self.vsctl("add-br br-int -- set bridge br-int datapath_type=netdev fail_mode=secure -- add-port br-int pod0")?;
        let (local, remote) = (node4(number), node4(peer));
        self.vsctl(&format!(
            "add-port br-int tun0 -- set interface tun0 type={kind} options:remote_ip={remote} options:local_ip={local} options:key=1 options:dst_port={port}"
        ))?;
        self.steer(peer, "")
    }

    /// Tells the receiver a number with each packet: in a Geneve option of that class and type.
    ///
    /// # Errors
    /// If the switch does not take it.
    pub fn tell_by_option(&self, peer: u8, (class, kind): (u16, u8), told: u32) -> Result<()> {
        let option = format!("{{class={class:#x},type={kind:#x},len=4}}->tun_metadata0");
        command::run(&["ovs-ofctl", "add-tlv-map", &self.bridge(), &option])?;
        self.steer(peer, &format!("set_field:{told:#x}->tun_metadata0,"))
    }

    /// Flows between the pod and the tunnel, which do what a router does, and `first` to what goes out.
    fn steer(&self, peer: u8, first: &str) -> Result<()> {
        let shown = self
            .pod
            .run(&["cat", "/sys/class/net/eth0/address"])
            .context("the pod's MAC")?;
        let pod_mac = shown.trim();
        let (own, theirs) = (vtep(self.number), vtep(peer));
        let [range4, range6] = pods_of(peer);
        for (here, there) in [
            (
                format!("ip,nw_dst={}", self.v4),
                format!("ip,nw_dst={range4}"),
            ),
            (
                format!("ipv6,ipv6_dst={}", self.v6),
                format!("ipv6,ipv6_dst={range6}"),
            ),
        ] {
            self.flow(&format!(
                "{here},actions=dec_ttl,mod_dl_src:{GATEWAY},mod_dl_dst:{pod_mac},output:pod0"
            ))?;
            self.flow(&format!(
                "{there},actions={first}dec_ttl,mod_dl_src:{own},mod_dl_dst:{theirs},output:tun0"
            ))?;
        }
        Ok(())
    }
}

impl Drop for OpenVswitch {
    fn drop(&mut self) {
        for daemon in [&mut self.switch, &mut self.database] {
            if let Some(mut running) = daemon.take() {
                running.stop(Duration::from_secs(5));
            }
        }
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("{} stays behind: {error}", self.directory.display());
        }
    }
}
