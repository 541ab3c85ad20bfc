//! `sluice-node` and `sluice` as processes: what they bring up, keep, and leave. Needs root and network namespaces.
//!
//! The appliance is `external`: this test plays the guest on the control socket. The path through a real machine is shown in the lab.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panic")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sluice_contract::report::RejectReason;
use sluice_contract::{Key, LinkId, VERSION};
use sluice_host::api::{self, Request};
use sluice_host::control::testing::Guest;
use sluice_host::node::report::LinkReport;
use sluice_host::wiring::netlink::{Netlink, Redirect};
use sluice_host::wiring::testing::{Namespace, namespaces};

/// A node in a namespace of its own, with two pods.
struct Lab {
    host: Namespace,
    pods: [Namespace; 2],
    dir: PathBuf,
    wiring: &'static str,
}

impl Lab {
    fn new(name: &str, wiring: &'static str) -> Option<Self> {
        let [host, a, b] = namespaces()?;
        let dir = std::env::temp_dir().join(format!("sluice-node-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Some(Self {
            host,
            pods: [a, b],
            dir,
            wiring,
        })
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    fn pod(&self, index: usize) -> Value {
        let address = format!("10.77.0.{}", index + 2);
        json!({"name": format!("default/{index}"), "netns": self.pods[index].path, "addresses": [address]})
    }

    fn start(&self, pods: &[Value]) -> Daemon {
        self.start_logging(pods, Stdio::piped)
    }

    /// The same, with this for a standard error.
    fn start_logging(&self, pods: &[Value], log: impl Fn() -> Stdio + Sync) -> Daemon {
        self.start_with(&json!({"pods": pods}), log)
    }

    /// The same with more in its configuration.
    fn start_with(&self, more: &Value, log: impl Fn() -> Stdio + Sync) -> Daemon {
        let mut config = json!({
            "run_dir": self.run_dir(), "image": "none", "isolation": "external", "wiring": self.wiring,
        });
        let all = config.as_object_mut().unwrap();
        all.extend(more.as_object().unwrap().clone());
        let path = self.dir.join("node.json");
        fs::write(&path, config.to_string()).unwrap();
        let start = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-node"));
            command.arg("--config").arg(&path).stderr(log()).spawn()
        };
        Daemon(self.host.run(start))
    }

    fn socket(&self) -> PathBuf {
        self.run_dir().join("node.sock")
    }

    fn status(&self) -> Value {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match api::ask(&self.socket(), &Request::Status) {
                Ok(status) => return status,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks until the answer is as it should become.
    fn eventually(&self, good: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.status();
            if good(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{status:#}");
        }
    }

    fn sluice(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command
            .arg("--run-dir")
            .arg(self.run_dir())
            .args(arguments)
            .output()
            .unwrap()
    }

    fn assert_nothing_is_left(&self) {
        let alone = BTreeSet::from(["lo".to_owned()]);
        for namespace in [&self.host, &self.pods[0], &self.pods[1]] {
            assert_eq!(namespace.interfaces(), alone);
        }
        let files: Vec<_> = fs::read_dir(self.run_dir())
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        assert!(files.is_empty(), "{files:?}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end: exit status and log.
    fn end(mut self) -> (Option<i32>, String) {
        let mut log = String::new();
        self.0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        (self.0.wait().unwrap().code(), log)
    }

    fn stop(self) -> String {
        self.signal(Signal::SIGTERM);
        let (code, log) = self.end();
        assert_eq!(code, Some(0), "{log}");
        log
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already gone when the test went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Plays the guest until the node closes the channel, and returns it.
fn guest_on(run_dir: &Path, mut guest: Guest) -> JoinHandle<Guest> {
    let mut stream = UnixStream::connect(run_dir.join("control.sock")).unwrap();
    std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut chunk) {
            guest.receive(&chunk[..n]);
            if stream
                .write_all(&std::mem::take(&mut guest.output))
                .is_err()
            {
                break;
            }
        }
        guest
    })
}

fn settled(status: &Value) -> bool {
    status["control"]["settled"] == true
}

fn link_keys(guest: &Guest) -> Vec<u16> {
    let id = |key: &Key| match key {
        Key::Link(id) => Some(id.raw()),
        _ => None,
    };
    guest.rows.keys().filter_map(id).collect()
}

#[test]
fn p11_node_brings_pods_up_and_leaves_nothing() {
    for wiring in ["veth", "tap"] {
        let Some(lab) = Lab::new(&format!("up-{wiring}"), wiring) else {
            return;
        };
        let daemon = lab.start(&[lab.pod(0), lab.pod(1)]);
        lab.status();
        let guest = guest_on(&lab.run_dir(), Guest::default());
        let status = lab.eventually(settled);
        assert_eq!(status["links"].as_array().unwrap().len(), 2);
        assert_eq!(status["links"][0]["wiring"], wiring);
        assert!(lab.pods.iter().all(|p| p.interfaces().contains("eth0")));
        let shown = lab.sluice(&["status"]);
        // Nobody serves the trunk here, and the exit status says so.
        assert_eq!(shown.status.code(), Some(1));
        let text = String::from_utf8(shown.stdout).unwrap();
        assert!(
            text.contains("does not serve the trunk") && text.contains("default/1"),
            "{text}"
        );
        daemon.stop();
        assert_eq!(link_keys(&guest.join().unwrap()), [16, 17]);
        lab.assert_nothing_is_left();
        assert_eq!(lab.sluice(&["status"]).status.code(), Some(3));
    }
}

#[test]
fn p04_links_survive_a_killed_daemon_and_the_guest_is_never_told_of_fewer() {
    for wiring in ["veth", "tap"] {
        let Some(lab) = Lab::new(&format!("kill-{wiring}"), wiring) else {
            return;
        };
        let daemon = lab.start(&[lab.pod(0), lab.pod(1)]);
        lab.status();
        let guest = guest_on(&lab.run_dir(), Guest::default());
        lab.eventually(settled);
        daemon.signal(Signal::SIGKILL);
        daemon.end();
        let guest = guest.join().unwrap();
        assert!(lab.pods.iter().all(|p| p.interfaces().contains("eth0")));

        let daemon = lab.start(&[lab.pod(0), lab.pod(1)]);
        lab.status();
        let guest = guest_on(&lab.run_dir(), guest);
        let status = lab.eventually(settled);
        assert_eq!(status["control"]["generation"], 2);
        let log = daemon.stop();
        assert_eq!(log.matches("link attached again").count(), 2, "{log}");
        assert_eq!(link_keys(&guest.join().unwrap()), [16, 17]);
        lab.assert_nothing_is_left();
    }
}

/// How the host would send to an address: the address it would send from, or why it cannot.
fn way_to(host: &Namespace, to: &str) -> Result<String, io::ErrorKind> {
    let to: std::net::IpAddr = to.parse().unwrap();
    let any = match to.is_ipv4() {
        true => "0.0.0.0:0",
        false => "[::]:0",
    };
    host.run(|| {
        let socket = std::net::UdpSocket::bind(any)?;
        let way = socket.connect((to, 53));
        Ok(way
            .and_then(|()| socket.local_addr())
            .map(|own| own.ip().to_string())
            .map_err(|error| error.kind()))
    })
}

#[test]
fn without_the_tap_the_host_sends_nothing_to_pods_and_services_by_its_other_routes() {
    // By family: the node, another address of the host's with the default route, a pod elsewhere, a Service, outside.
    const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
    const INSIDE: [&str; 4] = ["10.244.9.9", "10.96.0.1", "fd44:9::9", "fd96::1"];
    const OUTSIDE: [&str; 2] = ["203.0.113.5", "2001:db8:5::5"];
    let Some(lab) = Lab::new("guard", "tap") else {
        return;
    };
    let ip = |arguments: &str| {
        lab.host.run(|| {
            let mut command = Command::new("ip");
            let done = command.args(arguments.split(' ')).status()?;
            assert!(done.success(), "ip {arguments}");
            Ok(())
        });
    };
    for command in [
        "link set lo up",
        "link add card type veth peer name far",
        "link set far up",
        "link set card up",
        "addr add 192.0.2.1/24 dev card",
        "addr add 2001:db8::1/64 dev card nodad",
        "route add default via 192.0.2.254",
        "route add default via 2001:db8::fe",
    ] {
        ip(command);
    }
    let routes = || {
        let list = |family| {
            lab.host.run(|| {
                Command::new("ip")
                    .args([family, "route", "show", "type", "unreachable"])
                    .output()
            })
        };
        ["-4", "-6"].map(|family| String::from_utf8(list(family).stdout).unwrap())
    };
    let unreachable = Err(io::ErrorKind::HostUnreachable);
    let config = |on_stop: &str, ranges: &[&str]| json!({"on_stop": on_stop, "host_link": {"addresses": NODE, "routes": ranges}});
    let ranges = ["10.244.0.0/16", "10.96.0.0/12", "fd44::/16", "fd96::/112"];
    for on_stop in ["leave", "tear_down"] {
        let daemon = lab.start_with(&config(on_stop, &ranges), Stdio::piped);
        lab.status();
        for to in INSIDE {
            let own = NODE[usize::from(to.contains(':'))];
            assert_eq!(way_to(&lab.host, to).as_deref(), Ok(own), "{to} by the tap");
        }
        daemon.signal(Signal::SIGKILL);
        daemon.end();
        // The appliance goes on without its daemon, and so does the way to it.
        assert!(lab.host.interfaces().contains("sluice0"));
        for to in INSIDE {
            let own = NODE[usize::from(to.contains(':'))];
            assert_eq!(
                way_to(&lab.host, to).as_deref(),
                Ok(own),
                "{to} after a kill"
            );
        }
        ip("link del sluice0");
        for to in INSIDE {
            assert_eq!(way_to(&lab.host, to), unreachable, "{to} without the tap");
        }
        for (to, own) in OUTSIDE.into_iter().zip(NODE) {
            assert_eq!(way_to(&lab.host, to).as_deref(), Ok(own), "{to}");
        }
        // A range that is no longer the cluster's is given back.
        let daemon = lab.start_with(&config(on_stop, &ranges[1..]), Stdio::piped);
        lab.status();
        assert_eq!(way_to(&lab.host, INSIDE[1]).as_deref(), Ok(NODE[0]));
        let [four, six] = routes();
        assert_eq!(
            (four.lines().count(), six.lines().count()),
            (1, 2),
            "{four}{six}"
        );
        daemon.stop();
        let stays = lab.host.interfaces().contains("sluice0");
        assert_eq!(stays, on_stop == "leave");
    }
    assert_eq!(way_to(&lab.host, INSIDE[1]).as_deref(), Ok(NODE[0]));
    assert_eq!(routes().concat(), "");
    ip("link del card");
    lab.assert_nothing_is_left();
}

/// What there is of the node's own taps and of what hangs on them.
#[derive(Debug, PartialEq, Eq)]
struct Ways {
    taps: Vec<u32>,
    /// Of what comes in on the uplink's tap, and how many of what comes in on the card.
    redirects: Vec<Redirect>,
    of_card: usize,
    routes: [String; 2],
    rules: String,
    neighbors: String,
}

fn ways(host: &Namespace) -> Ways {
    let ip = |arguments: &str| {
        let output = host.run(|| Command::new("ip").args(arguments.split(' ')).output());
        String::from_utf8(output.stdout).unwrap()
    };
    let (taps, redirects, of_card) = host.run(|| {
        let mut netlink = Netlink::open()?;
        let [uplink, own] = [netlink.index("sluplink")?, netlink.index("sluice0")?];
        let card = netlink.index("card")?;
        let redirects = netlink.redirects(uplink)?;
        let of_card = netlink.redirects(card)?;
        let to_us = of_card
            .iter()
            .filter(|it| it.to == uplink && it.set().is_some());
        Ok((vec![uplink, own], redirects, to_us.count()))
    });
    Ways {
        taps,
        redirects,
        of_card,
        // Whether the tap has a carrier is for the appliance's process, of which there is none here.
        routes: ["-4", "-6"]
            .map(|family| ip(&format!("{family} route show dev sluice0")).replace(" linkdown", "")),
        rules: ip("rule show"),
        neighbors: ip("neigh show dev sluice0"),
    }
}

#[test]
fn p04_uplink_and_host_link_survive_a_killed_daemon_and_the_next_changes_what_is_wrong_alone() {
    let Some(lab) = Lab::new("ways", "veth") else {
        return;
    };
    let ip = |arguments: &str| {
        let done = lab
            .host
            .run(|| Command::new("ip").args(arguments.split(' ')).status());
        assert!(done.success(), "ip {arguments}");
    };
    for command in [
        "link set lo up",
        "link add card type veth peer name far",
        "link set far up",
        "link set card up",
        "addr add 192.0.2.1/24 dev card",
    ] {
        ip(command);
    }
    let mut pod = lab.pod(0);
    pod["host_ports"] = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
    let config = |ranges: &[&str], on_stop: &str| {
        json!({
            "pods": [pod],
            "on_stop": on_stop,
            "uplink": {"interface": "card", "pods": ["10.77.0.0/24"]},
            "host_link": {"addresses": ["192.0.2.1"], "routes": ranges},
        })
    };
    let ranges = ["10.77.0.0/16", "10.96.0.0/12"];
    let daemon = lab.start_with(&config(&ranges, "leave"), Stdio::piped);
    lab.status();
    let before = ways(&lab.host);
    assert!(
        before.of_card > 10 && before.redirects.len() == 1,
        "{before:#?}"
    );
    assert!(before.rules.contains("dport 8080"), "{before:#?}");
    assert_eq!(
        before.routes[0].matches("src 192.0.2.1").count(),
        2,
        "{before:#?}"
    );
    daemon.signal(Signal::SIGKILL);
    daemon.end();
    assert_eq!(ways(&lab.host), before);

    // At no moment of the next daemon's start is any of it missing.
    let watched = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut looks = 0;
            while watched.load(Ordering::Acquire) {
                let now = ways(&lab.host);
                assert!(now.of_card >= before.of_card, "{now:#?}");
                let now = Ways {
                    of_card: before.of_card,
                    ..now
                };
                assert_eq!(now, before);
                looks += 1;
            }
            looks
        });
        let daemon = lab.start_with(&config(&ranges, "leave"), Stdio::piped);
        lab.status();
        daemon.stop();
        watched.store(false, Ordering::Release);
        assert!(watch.join().unwrap() > 3);
    });
    assert_eq!(ways(&lab.host), before);

    // What is broken by hand is whole again, and a range that is no longer the cluster's is given back.
    ip("link set sluice0 down");
    lab.host.run(|| {
        let mut netlink = Netlink::open()?;
        let card = netlink.index("card")?;
        netlink.unredirect(card)
    });
    let daemon = lab.start_with(&config(&ranges[1..], "tear_down"), Stdio::piped);
    lab.status();
    let now = ways(&lab.host);
    assert_eq!((now.of_card, &now.taps), (before.of_card, &before.taps));
    assert_eq!(
        now.routes[0].matches("src 192.0.2.1").count(),
        1,
        "{now:#?}"
    );
    daemon.stop();
    let left = lab.host.run(|| {
        let mut netlink = Netlink::open()?;
        let card = netlink.index("card")?;
        netlink.redirects(card)
    });
    assert_eq!(left, []);
    let rules = lab
        .host
        .run(|| Command::new("ip").args(["rule", "show"]).output());
    assert!(!String::from_utf8(rules.stdout).unwrap().contains("8080"));
    ip("link del card");
    lab.assert_nothing_is_left();
}

#[test]
fn pod_that_left_the_configuration_loses_its_link_and_a_broken_link_is_made_anew() {
    let Some(lab) = Lab::new("change", "veth") else {
        return;
    };
    let daemon = lab.start(&[lab.pod(0), lab.pod(1)]);
    lab.status();
    daemon.signal(Signal::SIGKILL);
    daemon.end();
    lab.host.run(|| {
        let mut host = Netlink::open()?;
        let index = host.index("slv16")?;
        host.delete(index)
    });
    let daemon = lab.start(&[lab.pod(0)]);
    let status = lab.status();
    assert_eq!(status["links"].as_array().unwrap().len(), 1);
    assert!(lab.pods[0].interfaces().contains("eth0"));
    assert!(!lab.pods[1].interfaces().contains("eth0"));
    daemon.stop();
    lab.assert_nothing_is_left();
}

#[test]
fn c15_failure_in_the_middle_of_the_start_leaves_nothing_and_names_the_pod() {
    let Some(lab) = Lab::new("middle", "veth") else {
        return;
    };
    let mut bad = lab.pod(1);
    bad["netns"] = json!("/nowhere/pod");
    let (code, log) = lab.start(&[lab.pod(0), bad]).end();
    assert_eq!(code, Some(1));
    assert!(
        log.contains("Pod default/1: Link 17: cannot open the namespace: No such file"),
        "{log}"
    );
    lab.assert_nothing_is_left();
}

#[test]
fn links_are_added_and_removed_by_request_once_the_guest_agrees() {
    let Some(lab) = Lab::new("request", "tap") else {
        return;
    };
    let daemon = lab.start(&[]);
    lab.status();
    let refused = Key::Link(LinkId::new(17).unwrap());
    let mut guest = Guest::default();
    guest.refuses.insert(refused, RejectReason::Taken);
    let guest = guest_on(&lab.run_dir(), guest);
    let netns = [0, 1].map(|i| lab.pods[i].path.to_str().unwrap().to_owned());
    let add = |name: &str, netns: &str, address: &str| {
        lab.sluice(&[
            "-o",
            "json",
            "link",
            "add",
            name,
            "--netns",
            netns,
            "--address",
            address,
        ])
    };
    let added = add("default/a", &netns[0], "10.77.0.2");
    let link: LinkReport = serde_json::from_slice(&added.stdout).unwrap();
    assert_eq!(
        (link.id, link.pod.as_str(), added.status.code()),
        (16, "default/a", Some(0))
    );
    assert!(lab.pods[0].interfaces().contains("eth0"));

    for (name, address, reason) in [
        (
            "default/b",
            "10.77.0.3",
            "Link 17 is not in force: something else has the same address",
        ),
        ("default/a", "10.77.0.3", "named default/a is there already"),
        (
            "default/b",
            "10.77.0.2",
            "10.77.0.2 is the address of default/a",
        ),
        ("default/b", "127.0.0.1", "127.0.0.1 cannot be a pod's"),
    ] {
        let output = add(name, &netns[1], address);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(1) && text.contains(reason),
            "{text}"
        );
        assert!(!lab.pods[1].interfaces().contains("eth0"), "{reason}");
    }
    assert_eq!(
        lab.sluice(&["link", "del", "default/b"]).status.code(),
        Some(1)
    );
    assert_eq!(
        lab.sluice(&["link", "del", "default/a"]).status.code(),
        Some(0)
    );
    assert!(!lab.pods[0].interfaces().contains("eth0"));
    assert_eq!(lab.sluice(&["link", "list"]).status.code(), Some(0));
    assert_eq!(lab.sluice(&["drops"]).status.code(), Some(0));
    daemon.stop();
    assert_eq!(link_keys(&guest.join().unwrap()), [] as [u16; 0]);
    lab.assert_nothing_is_left();
}

#[test]
fn a_log_whose_reader_is_stuck_or_gone_stops_neither_the_daemon_nor_new_links() {
    for reader in ["stuck", "gone"] {
        let Some(lab) = Lab::new(&format!("log-{reader}"), "tap") else {
            return;
        };
        let (read_end, mut write_end) = io::pipe().unwrap();
        let size = fcntl(&write_end, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        // Not a byte more fits.
        write_end
            .write_all(&vec![b'.'; usize::try_from(size).unwrap()])
            .unwrap();
        let read_end = (reader == "stuck").then_some(read_end);
        let daemon = lab.start_logging(&[], || write_end.try_clone().unwrap().into());
        lab.status();
        let _guest = guest_on(&lab.run_dir(), Guest::default());
        lab.eventually(settled);
        let netns = lab.pods[0].path.to_str().unwrap();
        let begin = Instant::now();
        let added = lab.sluice(&[
            "link",
            "add",
            "default/a",
            "--netns",
            netns,
            "--address",
            "10.77.0.2",
        ]);
        assert_eq!(added.status.code(), Some(0), "{reader}: {added:?}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{reader}");
        daemon.signal(Signal::SIGTERM);
        let mut child = daemon;
        assert_eq!(child.0.wait().unwrap().code(), Some(0), "{reader}");
        drop(read_end);
        lab.assert_nothing_is_left();
    }
}

#[test]
fn guest_of_another_version_makes_the_node_unwell_with_both_numbers() {
    let Some(lab) = Lab::new("version", "veth") else {
        return;
    };
    let daemon = lab.start(&[]);
    lab.status();
    let guest = Guest {
        version: VERSION + 1,
        ..Guest::default()
    };
    let guest = guest_on(&lab.run_dir(), guest);
    let status = lab.eventually(|s| s["control"]["problem"].is_string());
    let problem = status["control"]["problem"].as_str().unwrap();
    assert!(
        problem.contains(&format!("version {}", VERSION + 1)),
        "{problem}"
    );
    assert!(
        problem.contains(&format!("version {VERSION}:")),
        "{problem}"
    );
    assert_eq!(lab.sluice(&["status"]).status.code(), Some(1));
    daemon.stop();
    assert!(guest.join().unwrap().rows.is_empty());
}

#[test]
fn run_directory_has_one_daemon() {
    let Some(lab) = Lab::new("lock", "veth") else {
        return;
    };
    let daemon = lab.start(&[]);
    lab.status();
    let (code, log) = lab.start(&[]).end();
    assert_eq!(code, Some(1));
    assert!(log.contains("Another sluice-node uses"), "{log}");
    assert_eq!(lab.status()["links"], json!([]));
    daemon.stop();
    lab.assert_nothing_is_left();
}

#[test]
fn wrong_configuration_is_refused_with_status_two() {
    let dir = std::env::temp_dir();
    let path = dir.join(format!("sluice-wrong-{}.json", std::process::id()));
    fs::write(&path, r#"{"image": "i", "isolatoin": "kvm"}"#).unwrap();
    let run = |arguments: &[&str]| -> io::Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-node"));
        command.arg("--config").arg(&path).args(arguments).output()
    };
    let output = run(&[]).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("isolatoin")
    );
    fs::write(&path, r#"{"image": "i"}"#).unwrap();
    let output = run(&["--check"]).unwrap();
    let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(checked["isolation"], "auto");
    fs::remove_file(&path).unwrap();
}

#[test]
fn example_configuration_is_understood() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/two-pods/node.json"
    );
    let config = sluice_host::config::Config::read(Path::new(path)).unwrap();
    assert_eq!(config.pods.len(), 2);
}
