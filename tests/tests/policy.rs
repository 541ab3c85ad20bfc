//! Policy and Services in a running node on KVM: files come and go, and pods feel it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_tests::command;
use sluice_tests::lab::{Lab, Plan, Wiring};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::policy::{self, FRIENDS_ONLY};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[test]
fn n01_policy_files_decide_who_may_connect_and_a_typo_changes_nothing() {
    need!(
        "n01_policy_files_decide_who_may_connect_and_a_typo_changes_nothing",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let plan = Plan {
            wiring,
            ..Plan::default()
        };
        let lab = policy::start(&plan).expect("a node");
        println!("{}", policy::policy_file_decides(&lab).expect("policy"));
        println!("{}", policy::typo_changes_nothing(&lab).expect("typo"));
    }
}

#[test]
fn s01_cluster_ip_leads_to_a_pod_through_a_running_node() {
    need!(
        "s01_cluster_ip_leads_to_a_pod_through_a_running_node",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let lab = policy::start(&Plan::default()).expect("a node");
    println!(
        "{}",
        policy::service_leads_to_its_pod(&lab).expect("a Service")
    );
    // The pod behind the Service is protected by its policy on that way as well.
    let _server = lab.serve(1).expect("a server");
    policy::write(&lab, "friends-only.yaml", FRIENDS_ONLY).expect("a policy");
    let client = &lab.pods[0];
    policy::until(client, policy::SERVICE[0], 80, false).expect("denied behind the Service");
    policy::remove(&lab, "friends-only.yaml").expect("no policy");
    policy::until(client, policy::SERVICE[0], 80, true).expect("reached again");
}

/// Connects again and again in the background; says whether any connection came about.
struct Prober {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(u32, u32)>,
}

impl Prober {
    fn start(netns: &Netns, address: String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (name, ended) = (netns.name().to_owned(), stop.clone());
        let thread = std::thread::spawn(move || {
            let (mut tried, mut reached) = (0, 0);
            while !ended.load(Ordering::Relaxed) {
                let connect = format!("exec 3<>/dev/tcp/{address}/7000");
                let status = std::process::Command::new("ip")
                    .args([
                        "netns", "exec", &name, "timeout", "0.1", "bash", "-c", &connect,
                    ])
                    .stderr(std::process::Stdio::null())
                    .status();
                tried += 1;
                reached += u32::from(status.is_ok_and(|it| it.success()));
            }
            (tried, reached)
        });
        Self { stop, thread }
    }

    /// Attempts and connections.
    fn end(self) -> (u32, u32) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("attempts")
    }
}

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
    command::until("another VMM", Duration::from_secs(10), || {
        let pid = lab.status()?["machine"]["pid"].as_i64();
        anyhow::ensure!(pid.is_some_and(|pid| pid != i64::from(vmm)), "not yet");
        Ok(())
    })
    .expect("another VMM");
    policy::until(&lab.pods[2], &address, 7000, false).expect("nothing passes");

    std::fs::rename(&away, lab.manifests()).expect("manifests back");
    policy::until(&lab.pods[2], &address, 7000, true).expect("a friend again");
    lab.healthy(Duration::from_secs(20))
        .expect("a healthy node");
    let (tried, reached) = stranger.end();
    assert!(tried > 5, "{tried} attempts");
    assert_eq!(reached, 0, "of {tried} attempts of a stranger");
}

#[test]
fn n20_no_frame_of_a_new_pod_comes_before_its_policy() {
    need!(
        "n20_no_frame_of_a_new_pod_comes_before_its_policy",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let lab = policy::start(&Plan::default()).expect("a node");
    let _server = lab.serve(1).expect("a server");
    let isolated = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: no-way-out, namespace: default}
spec: {podSelector: {matchLabels: {role: late}}, policyTypes: [Egress]}
---
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: default, labels: {role: late}}
---
apiVersion: v1
kind: Pod
metadata: {name: free, namespace: default, labels: {role: free}}
";
    policy::write(&lab, "late.yaml", isolated).expect("manifests");
    command::until("the manifests", Duration::from_secs(10), || {
        anyhow::ensure!(lab.status()?["cluster"]["objects"]["Pod"] == 4, "not yet");
        Ok(())
    })
    .expect("the manifests");
    let address = lab.pods[1].v4.to_string();
    for round in 0..5 {
        let late = Netns::new("late").expect("a namespace");
        let prober = Prober::start(&late, address.clone());
        let path = late.path().to_string_lossy().into_owned();
        let add = |name: &str, netns: &str, ip: &str| {
            lab.sluice(&["link", "add", name, "--netns", netns, "--address", ip])
        };
        add("default/late", &path, "10.244.0.200").expect("a link");
        std::thread::sleep(Duration::from_millis(300));
        let (tried, reached) = prober.end();
        assert!(tried > 0);
        assert_eq!(reached, 0, "of {tried} attempts in round {round}");
        lab.sluice(&["link", "del", "default/late"])
            .expect("no link");

        // One that may: its first connection after the ADD comes about, because all was in force when it returned.
        let free = Netns::new("free").expect("a namespace");
        let path = free.path().to_string_lossy().into_owned();
        add("default/free", &path, "10.244.0.201").expect("a link");
        let connect = format!("exec 3<>/dev/tcp/{address}/7000");
        free.run(&["timeout", "2", "bash", "-c", &connect])
            .expect("the first connection");
        lab.sluice(&["link", "del", "default/free"])
            .expect("no link");
    }
}

#[test]
fn p14_daemon_with_five_thousand_pods_is_small_and_says_so() {
    need!(
        "p14_daemon_with_five_thousand_pods_is_small_and_says_so",
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
    let line = process
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .expect("its memory");
    println!(
        "healthy after {} ms with 5 000 pods; {line}",
        took.as_millis()
    );
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|it| it.parse().ok())
        .expect("KiB");
    assert!(kib < 60 * 1024, "{line}");
}
