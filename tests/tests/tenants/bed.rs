//! One node of ours with pods of two namespaces, a node of the kernel's as its peer, and a stranger on the underlay.

use crate::objects::{CLIENTS_ONLY, SHOP, pod};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sluice_tests::cni::{Call, CniLab};
use sluice_tests::command::{self, Running};
use sluice_tests::lab::{Lab, Plan, program};
use sluice_tests::load::Outcome;
use sluice_tests::netns::Netns;
use sluice_tests::policy;
use sluice_tests::traffic::{PORT, at, load, serve, serve_at};
use sluice_tests::underlay::{Flannel, Peer, Underlay, node4, node6};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How long each flood lasts: longer than what is measured beside it.
const SECONDS: u32 = 30;
const OUTSIDE: u8 = 200;
const TUNNEL: u16 = 8472;
const HEALTH: u16 = 10_256;
/// Idle connections to the health port.
const IDLE: usize = 64;

/// Pods in the order of the configuration.
const PODS: [&str; 5] = [
    "shop/client",
    "shop/server",
    "shop/third",
    "aaa/one",
    "aaa/two",
];

/// The stranger's address.
pub(crate) fn outside() -> String {
    node4(OUTSIDE)
}

/// Everything that runs. The node ends before the wire.
#[derive(Debug)]
pub(crate) struct Bed {
    _servers: Vec<Running>,
    cni: CniLab,
    theirs: Flannel,
    outside: Netns,
    _underlay: Underlay,
}

const fn peer(number: u8) -> Peer {
    Peer {
        number,
        six: false,
        direct: false,
    }
}

impl Bed {
    /// Starts the node and the servers.
    pub(crate) fn start() -> Result<Self> {
        let underlay = Underlay::new(1500)?;
        let outside = Netns::new("outside")?;
        underlay.attach(&outside, OUTSIDE)?;
        let theirs = Flannel::new(&underlay, 2, &peer(1))?;
        let mut cni = CniLab::of(node(&underlay)?)?;
        cni.lab.start_node()?;
        let servers = vec![
            cni.lab.serve(1)?,
            serve(&outside)?,
            serve_at(&outside, 53)?,
            echo(&cni.lab.pods[4].netns)?,
        ];
        Ok(Self {
            _servers: servers,
            cni,
            theirs,
            outside,
            _underlay: underlay,
        })
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.cni.lab
    }

    pub(crate) fn write(&self, file: &str, text: &str) -> Result<()> {
        policy::write(self.lab(), file, text)
    }

    /// So many requests a second from the other namespace's client.
    pub(crate) fn requests(&self, address: &str, port: u16, rate: u32) -> Result<Outcome> {
        let (to, rate) = (at(address, port), rate.to_string());
        let client = &self.lab().pods[0].netns;
        load(client, &["paced", &to, "--rate", &rate, "--time", "8"])
    }

    /// Adds a pod of the other namespace through the CNI plugin; how long ADD took.
    pub(crate) fn add(&self, when: &str) -> Result<Duration> {
        let name = format!("late-{}", when.replace(' ', "-"));
        self.write(&format!("{name}.yaml"), &pod(&name))?;
        command::until("the pod's object", policy::PATIENCE, || {
            let listed = self.lab().status()?["cluster"]["objects"]["Pod"].clone();
            ensure!(listed.as_u64() > Some(5), "{listed} pods");
            Ok(())
        })?;
        let netns = Netns::new(&name)?;
        let path = netns.path();
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name}");
        let mut call = Call::new("ADD", &name, path.to_str().context("path")?);
        call.args = &args;
        let config = self.cni.config("1.1.0", &json!({}));
        let said = self.cni.call(&call, &config)?;
        said.result()?;
        let server = self.lab().pods[1].v4.to_string();
        command::until("an answer to the new pod", policy::PATIENCE, || {
            netns
                .run(&["ping", "-n", "-c", "1", "-W", "1", &server])
                .map(drop)
        })?;
        call.verb = "DEL";
        self.cni.call(&call, &config)?.result()?;
        policy::remove(self.lab(), &format!("{name}.yaml"))?;
        Ok(said.took)
    }

    /// Denies the third pod and allows it again; how long the denial took.
    pub(crate) fn policy_takes_force(&self) -> Result<Duration> {
        let (third, server) = (&self.lab().pods[2], self.lab().pods[1].v4.to_string());
        policy::until(third, &server, PORT, true)?;
        self.write("clients-only.yaml", CLIENTS_ONLY)?;
        let took = policy::until(third, &server, PORT, false)?;
        policy::remove(self.lab(), "clients-only.yaml")?;
        policy::until(third, &server, PORT, true)?;
        Ok(took)
    }

    /// Starts all floods.
    pub(crate) fn floods(&self) -> Result<Vec<Running>> {
        let pods = &self.lab().pods;
        let (one, two) = (&pods[3], &pods[4]);
        let (stranger, own, peer) = (outside(), node4(1), at(&node4(2), TUNNEL));
        let of = |netns: &Netns, words: &[&str]| flood(netns, words);
        let (first, second) = (one.v4.to_string(), two.v4.to_string());
        Ok(vec![
            of(
                &one.netns,
                &["ports", &first, &at(&stranger, 53), "--rate", "2000"],
            )?,
            of(
                &one.netns,
                &["ports", &first, &at(&second, 7001), "--rate", "2000"],
            )?,
            of(
                &two.netns,
                &[
                    "fragments",
                    &second,
                    &at(&pods[1].v4.to_string(), 9),
                    "--rate",
                    "1000",
                ],
            )?,
            of(
                &self.outside,
                &[
                    "too-big",
                    &stranger,
                    &at(&own, 0),
                    "--peer",
                    &peer,
                    "--rate",
                    "500",
                ],
            )?,
            self.idle_connections()?,
        ])
    }

    /// Connections to the health port that ask for nothing, opened again as they are closed.
    fn idle_connections(&self) -> Result<Running> {
        let open = format!(
            "end=$((SECONDS+{SECONDS})); while [ $SECONDS -lt $end ]; do for i in $(seq {IDLE}); do \
             exec {{fd}}<>/dev/tcp/{}/{HEALTH}; done 2>/dev/null; sleep 0.5; done",
            node4(1)
        );
        // The shell's open files bound it: each round replaces what the node has closed.
        let mut command = self.outside.command("bash");
        command.args(["-c", &format!("ulimit -n 1024; {open}")]);
        Running::start("bash", command.stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// A load balancer asks whether the node is well, and is answered.
    pub(crate) fn health_is_answered(&self) -> Result<()> {
        let ask = format!(
            "exec 3<>/dev/tcp/{}/{HEALTH}; printf 'GET /healthz HTTP/1.1\\r\\nHost: node\\r\\n\\r\\n' >&3; \
             read -t 5 -u 3 line; echo \"$line\"",
            node4(1)
        );
        let began = Instant::now();
        // The peer is another source than the one that holds the idle connections.
        let answer = self
            .theirs
            .node
            .run(&["timeout", "6", "bash", "-c", &ask])?;
        println!(
            "health: {} after {} ms",
            answer.trim(),
            began.elapsed().as_millis()
        );
        ensure!(
            answer.contains("200"),
            "the health port answered {answer:?}"
        );
        Ok(())
    }

    /// Packets of full size to a pod of the other node arrive.
    pub(crate) fn remote_pod_is_reached_at_full_size(&self) -> Result<()> {
        let client = &self.lab().pods[0].netns;
        let words = [
            "ping",
            "-n",
            "-c",
            "100",
            "-i",
            "0.02",
            "-W",
            "2",
            "-M",
            "do",
            "-s",
            "1422",
            &self.theirs.v4,
        ];
        let output = client.output(&words)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text
            .lines()
            .find(|it| it.contains("received"))
            .unwrap_or_default();
        println!("remote pod: {line}");
        let received = line.split(", ").nth(1).and_then(|it| it.split(' ').next());
        let received: u32 = received
            .and_then(|it| it.parse().ok())
            .context("no summary")?;
        ensure!(received >= 99, "{text}");
        Ok(())
    }

    /// What the node reports, for a failure.
    pub(crate) fn words(&self) -> String {
        let of = |words: &[&str]| self.lab().sluice(words).unwrap_or_default();
        format!(
            "{}\n{}\n{}",
            self.lab().log_tail(),
            of(&["status"]),
            of(&["drops"])
        )
    }
}

fn node(underlay: &Underlay) -> Result<Lab> {
    let own = [node4(1), node6(1)];
    let plan = Plan {
        pods: PODS.len(),
        number: 1,
        mtu: 1450,
        pod_cidrs: vec!["10.244.1.128/25".into()],
        node_addresses: own.to_vec(),
        ..Plan::default()
    };
    let tunnel = json!({"protocol": "vxlan", "port": TUNNEL});
    let lab = underlay.node(&plan, &tunnel, &[peer(2)])?;
    std::fs::create_dir_all(lab.manifests())?;
    lab.change_config(|config| {
        let routes = [
            "10.244.0.0/16",
            "fd00:244::/48",
            "10.96.0.0/16",
            "fd00:96::/112",
        ];
        config["host_link"] = json!({"addresses": own, "routes": routes});
        config["node_name"] = json!("node-1");
        config["source"] = json!({"directory": lab.manifests()});
        // What an operator lists: the addresses of others and of the stranger are none of these.
        config["services"] = json!({"external_addresses": ["100.64.0.0/16"]});
        for (index, name) in PODS.iter().enumerate() {
            config["pods"][index]["pod"] = json!(name);
        }
    })?;
    policy::write(&lab, "shop.yaml", SHOP)?;
    let out = ["ip", "route", "replace", "default", "via", &node4(OUTSIDE)];
    lab.host.run(&out)?;
    Ok(lab)
}

fn echo(netns: &Netns) -> Result<Running> {
    let mut command = netns.command(program("sluice-load"));
    Running::start("sluice-load", command.args(["echo"]).stdout(Stdio::null()))
}

fn flood(netns: &Netns, words: &[&str]) -> Result<Running> {
    let mut command = netns.command(program("sluice-load"));
    command
        .arg("flood")
        .args(words)
        .args(["--time", &SECONDS.to_string()]);
    Running::start("sluice-load", command.stdout(Stdio::null()))
}
