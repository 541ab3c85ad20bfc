//! The node's own policy in a running node: pods lose what a NodePolicy denies of the node's ports, and never its SSH.

use crate::Prober;
use anyhow::ensure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sluice_tests::command;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::policy::{self, PATIENCE, connects, until};
use sluice_tests::traffic;

/// The node's own, in both families.
const NODE: [&str; 2] = ["192.168.77.1", "fd77::1"];
const SSH: u16 = 22;
const FILE: &str = "node-policy.yaml";

const CLOSED: &str = "\
apiVersion: sluice.dev/v1alpha1
kind: NodePolicy
metadata: {name: workers}
spec:
  nodeSelector: {}
";
/// The first pod may.
const CLIENTS: &str = "\
apiVersion: sluice.dev/v1alpha1
kind: NodePolicy
metadata: {name: workers}
spec:
  nodeSelector: {}
  ingress:
  - from:
    - namespaceSelector: {}
      podSelector: {matchLabels: {role: client}}
    ports: [{port: 7000}]
";

/// A node with a host link whose programs listen at 7000 and 22.
fn start() -> (Lab, Vec<command::Running>) {
    let mut lab = policy::prepare(&Plan::default()).expect("a lab");
    for (address, whole) in NODE.into_iter().zip(["32", "128"]) {
        let address = format!("{address}/{whole}");
        let words = ["ip", "address", "add", &address, "dev", "lo"];
        lab.host.run(&words).expect("an address");
    }
    lab.change_config(|config| {
        config["node_name"] = json!("here");
        let routes = ["10.244.0.0/16", "fd00:244::/48", "10.96.0.0/16"];
        config["host_link"] = json!({"addresses": NODE, "routes": routes});
    })
    .expect("a configuration");
    policy::write(&lab, "objects.yaml", policy::OBJECTS).expect("objects");
    lab.start_node().expect("a node");
    let servers = vec![
        traffic::serve(&lab.host).expect("a server"),
        traffic::serve_at(&lab.host, SSH).expect("a server at SSH's port"),
        lab.serve(1).expect("a server"),
    ];
    (lab, servers)
}

/// The node has this many NodePolicies, and its appliance too.
fn settled(lab: &Lab, policies: u64) {
    command::until("the policies in force", PATIENCE, || {
        let status = lab.status()?;
        let count = &status["cluster"]["objects"]["NodePolicy"];
        ensure!(*count == policies, "{count} are taken in");
        ensure!(status["control"]["settled"] == true, "not in force");
        Ok(())
    })
    .expect("the policies in force");
}

fn from_node(lab: &Lab, address: &str) -> bool {
    let connect = format!("exec 3<>/dev/tcp/{address}/7000");
    let words = ["timeout", "20", "bash", "-c", &connect];
    let output = lab.host.output(&words).expect("an attempt");
    output.status.success()
}

/// What must hold whatever policies say.
fn failsafe_holds(lab: &Lab) {
    for address in NODE {
        for pod in &lab.pods {
            until(pod, address, SSH, true).expect("SSH");
        }
    }
    for address in lab.pods[1].addresses() {
        assert!(
            from_node(lab, &address),
            "the node does not reach {address}"
        );
    }
}

fn trace(lab: &Lab, port: u16) -> Value {
    let to = format!("node:here:{port}/tcp");
    let answer = lab.sluice(&["policy", "trace", "pod-0", &to, "-o", "json"]);
    serde_json::from_str(&answer.expect("an answer")).expect("JSON")
}

#[test]
fn n21_a_node_policy_closes_ports_of_the_node_to_pods_and_never_its_ssh() {
    need!(
        "n21_a_node_policy_closes_ports_of_the_node_to_pods_and_never_its_ssh",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let (mut lab, _servers) = start();
    let (client, other) = (&lab.pods[0], &lab.pods[1]);
    for address in NODE {
        until(client, address, 7000, true).expect("open without a policy");
    }
    failsafe_holds(&lab);
    assert_eq!(trace(&lab, 7000)["accepted"], true);

    policy::write(&lab, FILE, CLOSED).expect("a policy");
    let took = until(client, NODE[0], 7000, false).expect("closed");
    println!("closed {} ms after the file was written", took.as_millis());
    settled(&lab, 1);
    assert!(!connects(client, NODE[1], 7000).expect("an attempt"));
    assert!(!connects(other, NODE[0], 7000).expect("an attempt"));
    failsafe_holds(&lab);
    let answer = trace(&lab, 7000);
    let side = &answer["sides"][1];
    assert_eq!(
        (&answer["accepted"], &side["pod"], &side["rule"]),
        (
            &json!(false),
            &json!("node here"),
            &json!("default-deny ingress by NodePolicy workers")
        ),
        "{answer:#}"
    );
    let ssh = trace(&lab, SSH);
    assert_eq!(
        (&ssh["accepted"], &ssh["sides"][1]["rule"]),
        (
            &json!(true),
            &json!("NodePolicy host_policy.failsafe ingress[0]")
        ),
        "{ssh:#}"
    );
    let listed = lab.sluice(&["policy", "list"]).expect("a list");
    let line = listed.lines().find(|it| it.starts_with("NodePolicy"));
    assert!(
        line.is_some_and(|it| it.contains("workers") && it.contains("the node")),
        "{listed}"
    );
    let shown = lab.sluice(&["policy", "show", "node:here"]).expect("rules");
    assert!(
        shown.contains("22/TCP") && shown.contains("what no rule accepts is denied"),
        "{shown}"
    );

    // Another appliance has it from its first packet on.
    let machine = || lab.status().expect("a status")["machine"]["pid"].as_i64();
    let vmm = machine().expect("a VMM");
    let prober = Prober::start(&client.netns, NODE[0].into());
    prober.goes_on(3);
    let pid = Pid::from_raw(i32::try_from(vmm).expect("a pid"));
    kill(pid, Signal::SIGKILL).expect("killed");
    command::until("another VMM", PATIENCE, || {
        ensure!(machine().is_some_and(|it| it != vmm), "not yet");
        Ok(())
    })
    .expect("another VMM");
    failsafe_holds(&lab);
    prober.goes_on(3);
    let (tried, reached) = prober.end();
    assert_eq!(reached, 0, "of {tried} attempts");

    policy::write(&lab, FILE, CLIENTS).expect("a policy");
    for address in NODE {
        until(client, address, 7000, true).expect("open to clients");
    }
    settled(&lab, 1);
    assert!(!connects(other, NODE[0], 7000).expect("an attempt"));

    // A mistake is told by file and field, and changes nothing.
    let broken = CLIENTS.replace("    - namespaceSelector: {}\n      podS", "    - podS");
    policy::write(&lab, FILE, &broken).expect("a mistake");
    let found = command::until("a report of the mistake", PATIENCE, || {
        let status = lab.status()?;
        ensure!(status["cluster"]["errors"] == 1, "not yet");
        Ok(status["cluster"]["findings"][0].to_string())
    });
    let found = found.expect("a report");
    assert!(
        found.contains(FILE) && found.contains("spec.ingress[0].from[0]"),
        "{found}"
    );
    assert!(connects(client, NODE[0], 7000).expect("an attempt"));
    assert!(!connects(other, NODE[0], 7000).expect("an attempt"));

    policy::remove(&lab, FILE).expect("no policy");
    for address in NODE {
        until(other, address, 7000, true).expect("open again");
    }
    lab.healthy(PATIENCE).expect("a healthy node");
}

#[test]
fn n21_an_audited_node_policy_lets_pass_and_says_so() {
    need!(
        "n21_an_audited_node_policy_lets_pass_and_says_so",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let mut lab = policy::prepare(&Plan::default()).expect("a lab");
    let own = format!("{}/32", NODE[0]);
    let words = ["ip", "address", "add", &own, "dev", "lo"];
    lab.host.run(&words).expect("an address");
    lab.change_config(|config| {
        config["node_name"] = json!("here");
        config["host_link"] = json!({"addresses": [NODE[0]], "routes": ["10.244.0.0/16"]});
        config["host_policy"] = json!({"mode": "audit"});
    })
    .expect("a configuration");
    policy::write(&lab, "objects.yaml", policy::OBJECTS).expect("objects");
    policy::write(&lab, FILE, CLOSED).expect("a policy");
    lab.start_node().expect("a node");
    let _server = traffic::serve(&lab.host).expect("a server");
    until(&lab.pods[0], NODE[0], 7000, true).expect("it passes");
    command::until("the line in the log", PATIENCE, || {
        let log = std::fs::read_to_string(lab.log_path())?;
        let line = log.lines().find(|line| line.contains("policy would deny"));
        let line = line.ok_or_else(|| anyhow::anyhow!("not yet"))?;
        for word in ["node here", "ingress", "7000", "NodePolicy workers"] {
            ensure!(line.contains(word), "no {word} in {line}");
        }
        Ok(())
    })
    .expect("it is told");
    assert_eq!(
        lab.status().expect("a status")["cluster"]["host_policy_mode"],
        "audit"
    );
}
