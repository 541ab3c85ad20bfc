//! The node's taint: whether the cluster may give this node pods, through a real daemon and a server that speaks as the API does.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sluice_tests::cni::CniLab;
use sluice_tests::command;
use sluice_tests::kubernetes::{ApiServer, NODES};
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// The pods' network and somebody else's.
const BOTH: [&str; 2] = ["example.org/disk", "sluice.dev/agent-not-ready"];

fn taints(api: &ApiServer) -> Vec<String> {
    let node = api.object(NODES, "/here");
    let all = node["spec"]["taints"].as_array().cloned();
    let key = |taint: &Value| taint["key"].as_str().unwrap_or_default().to_owned();
    all.unwrap_or_default().iter().map(key).collect()
}

fn until(api: &ApiServer, what: &str, wanted: &[&str]) {
    command::until(what, PATIENCE, || {
        let now = taints(api);
        anyhow::ensure!(now == wanted, "the taints are {now:?}");
        Ok(())
    })
    .expect(what);
}

#[test]
fn p13_the_taint_goes_when_the_node_forwards_and_comes_back_when_it_is_long_dead() {
    need!(
        "p13_the_taint_goes_when_the_node_forwards_and_comes_back_when_it_is_long_dead",
        Root,
        Kvm,
        Tool("ip")
    );
    let mut lab = CniLab::prepare(Wiring::Veth, "auto").expect("a lab");
    let api = ApiServer::start(&lab.lab).expect("a server");
    let registered = BOTH.map(|key| json!({"key": key, "effect": "NoSchedule"}));
    let node = json!({
        "kind": "Node", "apiVersion": "v1", "metadata": {"name": "here"},
        "spec": {"podCIDRs": ["10.88.0.0/24"], "taints": registered},
    });
    api.put(NODES, &node);
    let vmm = lab.path("vmm");
    let real = program("sluice-vmm").canonicalize().expect("the VMM");
    symlink(&real, &vmm).expect("a link");
    lab.lab
        .change_config(|config| {
            config["node_name"] = json!("here");
            config["vmm"] = json!(vmm);
        })
        .expect("a configuration");
    assert_eq!(taints(&api), BOTH);
    api.forbid("/api/v1/nodes/here", true);
    lab.lab.start_node().expect("a node");
    let problem = |wanted: bool| {
        command::until("what the status says of the taint", PATIENCE, || {
            let problems = lab.lab.status()?["problems"].to_string();
            let is_said = problems.contains("taint of the Node object cannot be changed");
            anyhow::ensure!(is_said == wanted, "the problems are {problems}");
            Ok(())
        })
        .expect("what the status says of the taint");
    };
    problem(true);
    api.forbid("/api/v1/nodes/here", false);
    until(&api, "a node that takes pods", &BOTH[..1]);
    problem(false);

    let pid = || -> Option<i32> {
        let status = lab.lab.status().ok()?;
        status["machine"]["pid"].as_i64()?.try_into().ok()
    };
    std::fs::remove_file(&vmm).expect("no more VMM");
    let dead = Instant::now();
    kill(Pid::from_raw(pid().expect("a VMM")), Signal::SIGKILL).expect("killed");
    until(&api, "a node that takes none", &BOTH);
    assert!(
        dead.elapsed() > Duration::from_secs(10),
        "a guest that comes back soon is worth no taint: {:?}",
        dead.elapsed()
    );
    symlink(&real, &vmm).expect("a link");
    until(&api, "a node that takes pods again", &BOTH[..1]);
    // An end in order takes the links with it.
    let node = lab.lab.node().expect("a node");
    node.stop(Duration::from_secs(10));
    assert_eq!(taints(&api), BOTH);
    lab.lab.forget_node();
}
