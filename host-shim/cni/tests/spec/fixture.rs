//! A node made of memory, and the binary in front of it.

use serde_json::{Value, json};
use sluice_cni::config::Wiring;
use sluice_cni::env::PodName;
use sluice_cni::rpc;
use sluice_cni::server::Server;
use sluice_cni::verbs::Verbs;
use sluice_cni::verbs::node::{Defaults, Health, Link, Made, Node, NodeError};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// What the node of memory has, and how it misbehaves.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) links: BTreeMap<String, Link>,
    /// Interfaces that are in namespaces without our doing.
    pub(crate) taken: BTreeSet<(String, String)>,
    pub(crate) health: Health,
    /// What the next attach fails with.
    pub(crate) refuse: Option<NodeError>,
    pub(crate) refuse_detach: Option<NodeError>,
    pub(crate) refuse_pool: Option<NodeError>,
    /// How long an attach takes.
    pub(crate) delay: Duration,
    /// What CHECK finds missing, for how many looks.
    pub(crate) missing: Vec<String>,
    pub(crate) missing_looks: usize,
    pub(crate) subnets: Vec<String>,
    pub(crate) pools: BTreeMap<String, String>,
    pub(crate) node_pools: BTreeMap<String, Vec<String>>,
    pub(crate) attached: usize,
}

/// The node, shared with the test.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Mutex<State>>);

impl Memory {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Node for Memory {
    fn defaults(&self) -> Defaults {
        let state = self.state();
        Defaults {
            subnets: state.subnets.clone(),
            pools: state.node_pools.clone(),
            mtu: 1450,
            wiring: Wiring::Veth,
            gateway4: "169.254.1.1".parse().unwrap(),
            gateway6: "fe80::1".parse().unwrap(),
        }
    }

    fn attach(&self, name: &str, link: &Link) -> Result<Vec<Made>, NodeError> {
        thread::sleep(self.state().delay);
        let mut state = self.state();
        if let Some(error) = state.refuse.take() {
            return Err(error);
        }
        let place = (link.netns.clone(), link.ifname.clone());
        let is_taken = state.taken.contains(&place) && link.adopt.is_none();
        if is_taken
            || state
                .links
                .values()
                .any(|l| (l.netns.clone(), l.ifname.clone()) == place)
        {
            return Err(NodeError::Exists(link.ifname.clone()));
        }
        assert!(
            !state.links.contains_key(name),
            "the verbs choose names that are free"
        );
        for other in state.links.values() {
            let twice = link
                .addresses
                .iter()
                .find(|ip| other.addresses.contains(ip));
            assert_eq!(twice, None, "an address was given twice");
        }
        state.attached += 1;
        let number = state.attached;
        state.links.insert(name.into(), link.clone());
        let mac = link.mac.unwrap_or([2, 0x53, 0x4c, 1, 0, 16]);
        let made = |name: String, in_pod| Made {
            name,
            mac,
            mtu: link.mtu,
            in_pod,
        };
        let host = link.adopt.clone().unwrap_or_else(|| format!("slv{number}"));
        Ok(vec![
            made(link.ifname.clone(), true),
            made(host, false),
            made(format!("slt{number}"), false),
        ])
    }

    fn detach(&self, name: &str, _link: &Link) -> Result<(), NodeError> {
        let mut state = self.state();
        if let Some(error) = state.refuse_detach.take() {
            return Err(error);
        }
        state.links.remove(name);
        Ok(())
    }

    fn missing(&self, name: &str, _link: &Link) -> Result<Vec<String>, NodeError> {
        let mut state = self.state();
        if !state.links.contains_key(name) {
            return Ok(vec!["the node's link".into()]);
        }
        if state.missing_looks == 0 {
            return Ok(Vec::new());
        }
        state.missing_looks -= 1;
        Ok(state.missing.clone())
    }

    fn is_alive(&self, link: &Link) -> bool {
        Path::new(&link.netns).exists()
    }

    fn health(&self) -> Health {
        self.state().health.clone()
    }

    fn pool_of(&self, pod: &PodName) -> Result<Option<String>, NodeError> {
        let mut state = self.state();
        if let Some(error) = state.refuse_pool.take() {
            return Err(error);
        }
        Ok(state.pools.get(&pod.namespace).cloned())
    }
}

/// A call of the binary.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) text: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Said {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// A success that prints a result.
    #[track_caller]
    pub(crate) fn result(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.json()
    }

    /// A success that prints nothing.
    #[track_caller]
    pub(crate) fn silent(&self) {
        assert_eq!((self.code, self.text.as_str()), (Some(0), ""), "{self:?}");
    }

    /// A failure with this code; returns what it says.
    #[track_caller]
    pub(crate) fn error(&self, code: u32) -> String {
        assert_ne!(self.code, Some(0), "{self:?}");
        let object = self.json();
        assert_eq!(object["code"], code, "{self:?}");
        assert!(object["cniVersion"].is_string(), "{self:?}");
        let details = object["details"].as_str().unwrap_or_default();
        format!("{} {details}", object["msg"].as_str().expect("a message"))
    }

    pub(crate) fn address(&self) -> String {
        self.result()["ips"][0]["address"]
            .as_str()
            .unwrap()
            .to_owned()
    }
}

/// A run of the product without a machine.
#[derive(Debug)]
pub(crate) struct Fixture {
    dir: tempfile::TempDir,
    pub(crate) node: Memory,
    pub(crate) verbs: Option<Arc<Verbs<Memory>>>,
    server: Option<Server>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let mut fixture = Self::without_node();
        fixture.start();
        fixture
    }

    /// Nobody listens yet.
    pub(crate) fn without_node() -> Self {
        let state = State {
            links: BTreeMap::new(),
            taken: BTreeSet::new(),
            health: Health::Ready,
            refuse: None,
            refuse_detach: None,
            refuse_pool: None,
            delay: Duration::ZERO,
            missing: Vec::new(),
            missing_looks: 0,
            subnets: vec!["10.1.0.0/24".into(), "fd00::/64".into()],
            pools: BTreeMap::new(),
            node_pools: BTreeMap::new(),
            attached: 0,
        };
        Self {
            dir: tempfile::tempdir().unwrap(),
            node: Memory(Arc::new(Mutex::new(state))),
            verbs: None,
            server: None,
        }
    }

    pub(crate) fn start(&mut self) {
        let verbs = Verbs::start(self.node.clone(), &self.path("run"), &self.path("state"));
        self.verbs = Some(verbs.unwrap());
        let server = Server::start(self.verbs.clone().unwrap(), &self.path("run"));
        self.server = Some(server.unwrap());
    }

    pub(crate) fn stop(&mut self) {
        self.server = None;
        self.verbs = None;
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path that stands for a namespace.
    pub(crate) fn netns(&self, name: &str) -> String {
        let path = self.path(&format!("netns-{name}"));
        std::fs::write(&path, "").unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The configuration of network `net` in this version, with these keys beside the usual.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "keys are written in place by every caller"
    )]
    pub(crate) fn config(&self, version: &str, keys: Value) -> Value {
        let mut config = json!({
            "cniVersion": version,
            "name": "net",
            "type": "sluice-cni",
            "runDir": self.path("run"),
            "stateDir": self.path("state"),
            "ipam": {
                "type": "sluice",
                "dataDir": self.path("data"),
                "ranges": [[{"subnet": "10.1.0.0/24"}]],
            },
        });
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    pub(crate) fn call(&self, verb: &str, container: &str, config: &Value) -> Said {
        let netns = match verb {
            "ADD" | "CHECK" => self.netns(container),
            _ => self
                .path(&format!("netns-{container}"))
                .to_str()
                .unwrap()
                .to_owned(),
        };
        self.call_with(verb, container, config, &[("CNI_NETNS", &netns)])
    }

    /// The same with variables of its own; an empty value removes one.
    pub(crate) fn call_with(
        &self,
        verb: &str,
        container: &str,
        config: &Value,
        variables: &[(&str, &str)],
    ) -> Said {
        let mut all = BTreeMap::from([
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", container),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/nonexistent"),
        ]);
        all.extend(variables.iter().copied());
        run(&all, config.to_string().as_bytes())
    }

    pub(crate) fn add(&self, container: &str) -> Said {
        self.call("ADD", container, &self.config("1.1.0", json!({})))
    }

    pub(crate) fn del(&self, container: &str) -> Said {
        self.call("DEL", container, &self.config("1.1.0", json!({})))
    }

    pub(crate) fn links(&self) -> Vec<String> {
        self.node.state().links.keys().cloned().collect()
    }

    /// The addresses that the store on disk says are held.
    pub(crate) fn held(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path("data/net")) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut held: Vec<String> = names
            .filter(|name| name.parse::<std::net::IpAddr>().is_ok())
            .collect();
        held.sort();
        held
    }

    /// Nothing is left of any attachment.
    #[track_caller]
    pub(crate) fn assert_empty(&self) {
        assert_eq!((self.links(), self.held()), (vec![], vec![]));
        let records = self
            .verbs
            .as_ref()
            .map(|verbs| verbs.records().all(None).len());
        assert_eq!(records.unwrap_or_default(), 0);
    }

    /// Somebody listens on the node's socket and never answers.
    pub(crate) fn hang(&self, accepts: bool) -> thread::JoinHandle<()> {
        std::fs::create_dir_all(self.path("run")).unwrap();
        let path = self.path("run").join(rpc::SOCKET);
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = rpc::Lines::new(&stream, rpc::LINE);
            let _request = lines.next(None);
            if accepts {
                rpc::answer(&stream, rpc::Body::Accepted(true)).unwrap();
            }
            let _until_the_caller_is_gone = lines.next(None);
        })
    }
}

/// Of a call that is not to wait for a node (rows C-04, C-05).
pub(crate) const IN_TIME: Duration = Duration::from_secs(2);

/// What a call says that takes less than `limit`. A machine that is busy with something else may delay a few of them, a call that
/// waits for something is slow each time.
pub(crate) fn within(limit: Duration, call: impl Fn() -> Said) -> Said {
    let started = Instant::now();
    loop {
        let said = call();
        if said.took < limit {
            return said;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{said:?}");
    }
}

/// Runs the binary.
pub(crate) fn run(variables: &BTreeMap<&str, &str>, input: &[u8]) -> Said {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-cni"));
    command
        .env_clear()
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.envs(variables.iter().filter(|(_, value)| !value.is_empty()));
    let started = Instant::now();
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    // It may be refused before it has read.
    let _not_read = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    Said {
        code: output.status.code(),
        text: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        took: started.elapsed(),
    }
}
