//! Death and return of a node that follows a cluster, and what it weighs.

use crate::Prober;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_tests::command;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::policy::{self, FRIENDS_ONLY};
use std::time::{Duration, Instant};

fn kill_node(lab: &mut Lab) {
    let node = lab.node().expect("a node");
    node.signal(Signal::SIGKILL);
    node.wait().expect("its end");
    lab.forget_node();
}

#[test]
fn p07_policy_fails_closed_while_nobody_knows_the_cluster_and_traffic_fails_static() {
    need!(
        "p07_policy_fails_closed_while_nobody_knows_the_cluster_and_traffic_fails_static",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let plan = Plan {
        pods: 3,
        ..Plan::default()
    };
    let mut lab = policy::prepare(&plan).expect("a lab");
    let friend = "apiVersion: v1\nkind: Pod\nmetadata: {name: pod-2, namespace: default, labels: {role: friend}}\n";
    policy::write(&lab, "objects.yaml", policy::OBJECTS).expect("objects");
    policy::write(&lab, "friend.yaml", friend).expect("a friend");
    policy::write(&lab, "friends-only.yaml", FRIENDS_ONLY).expect("a policy");
    lab.start_node().expect("a node");
    let _server = lab.serve(1).expect("a server");
    let address = lab.pods[1].v4.to_string();
    policy::until(&lab.pods[2], &address, 7000, true).expect("a friend is let in");
    let stranger = Prober::start(&lab.pods[0].netns, address.clone());

    // A daemon that cannot learn anything: the appliance goes on with what it has.
    kill_node(&mut lab);
    let away = lab.manifests().with_extension("away");
    std::fs::rename(lab.manifests(), &away).expect("manifests away");
    lab.start_node_only().expect("a new daemon");
    policy::until(&lab.pods[2], &address, 7000, true)
        .expect("a friend is let in by the last tables");
    let status = lab.status().expect("a status");
    assert_eq!(status["healthy"], false);
    assert_eq!(status["cluster"]["in_sync"], false);
    assert_eq!(status["machine"]["adopted"], true);

    // A new appliance has no tables and nobody to give it any: nothing passes.
    let vmm = status["machine"]["pid"].as_i64().expect("a VMM");
    let vmm = i32::try_from(vmm).expect("a pid");
    kill(Pid::from_raw(vmm), Signal::SIGKILL).expect("the VMM's end");
    command::until("another VMM", policy::PATIENCE, || {
        let pid = lab.status()?["machine"]["pid"].as_i64();
        anyhow::ensure!(pid.is_some_and(|pid| pid != i64::from(vmm)), "not yet");
        Ok(())
    })
    .expect("another VMM");
    policy::until(&lab.pods[2], &address, 7000, false).expect("nothing passes");

    std::fs::rename(&away, lab.manifests()).expect("manifests back");
    policy::until(&lab.pods[2], &address, 7000, true).expect("a friend again");
    lab.healthy(Duration::from_secs(60))
        .expect("a healthy node");
    stranger.goes_on(3);
    let (tried, reached) = stranger.end();
    assert_eq!(reached, 0, "of {tried} attempts of a stranger");
}

#[test]
fn daemon_with_five_thousand_pods_is_small() {
    need!(
        "daemon_with_five_thousand_pods_is_small",
        Root,
        Kvm,
        Tool("ip")
    );
    let mut lab = policy::prepare(&Plan::default()).expect("a lab");
    let mut text = String::from(policy::OBJECTS);
    for n in 0..5_000 {
        text += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, namespace: ns{}, labels: {{app: a{}}}}}\n\
             status: {{podIP: 10.1.{}.{}}}\n",
            n % 50,
            n % 250,
            n / 250,
            n % 250 + 1
        );
    }
    policy::write(&lab, "objects.yaml", &text).expect("manifests");
    let start = Instant::now();
    lab.start_node().expect("a node");
    let took = start.elapsed();
    let status = lab.status().expect("a status");
    assert_eq!(status["cluster"]["objects"]["Pod"], 5_002);
    assert_eq!(
        status["cluster"]["rows"]["identities"], 5_004,
        "two addresses of each pod here"
    );
    let pid = lab.node().expect("a node").pid();
    let process = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let of = |name: &str| {
        let mut lines = process.lines();
        let line = lines.find(|line| line.starts_with(name));
        line.expect("its memory")
    };
    // Its own: how much of the program's file is in memory depends on who read it before.
    let line = of("RssAnon");
    println!(
        "healthy after {} ms with 5 000 pods; {line}, {} with the program",
        took.as_millis(),
        of("VmRSS")
    );
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|it| it.parse().ok())
        .expect("KiB");
    assert!(kib < 60 * 1024, "{line}");
}
