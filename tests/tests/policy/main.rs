//! Policy and Services in a running node on KVM: files come and go, and pods feel it.

mod dns;
mod flows;
mod host;
mod kubernetes;
mod modes;
mod names;
mod restart;

use sluice_tests::command;
use sluice_tests::lab::{Plan, Wiring};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::policy::{self, FRIENDS_ONLY};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

#[test]
fn n01_p14_policy_files_decide_who_may_connect_and_a_typo_changes_nothing() {
    need!(
        "n01_p14_policy_files_decide_who_may_connect_and_a_typo_changes_nothing",
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

/// Connects again and again in the background.
struct Prober {
    stop: Arc<AtomicBool>,
    tried: Arc<AtomicU32>,
    thread: std::thread::JoinHandle<u32>,
}

impl Prober {
    fn start(netns: &Netns, address: String) -> Self {
        let (stop, tried) = (Arc::<AtomicBool>::default(), Arc::<AtomicU32>::default());
        let name = netns.name().to_owned();
        let (ended, count) = (stop.clone(), tried.clone());
        let thread = std::thread::spawn(move || {
            let mut reached = 0;
            while !ended.load(Ordering::Relaxed) {
                let connect = format!("exec 3<>/dev/tcp/{address}/7000");
                let status = std::process::Command::new("ip")
                    .args([
                        "netns", "exec", &name, "timeout", "0.1", "bash", "-c", &connect,
                    ])
                    .stderr(std::process::Stdio::null())
                    .status();
                reached += u32::from(status.is_ok_and(|it| it.success()));
                count.fetch_add(1, Ordering::Relaxed);
            }
            reached
        });
        Self {
            stop,
            tried,
            thread,
        }
    }

    /// Waits for so many more attempts.
    fn goes_on(&self, more: u32) {
        let before = self.tried.load(Ordering::Relaxed);
        command::until("attempts", policy::PATIENCE, || {
            let now = self.tried.load(Ordering::Relaxed);
            anyhow::ensure!(now >= before + more, "{} of {more}", now - before);
            Ok(())
        })
        .expect("attempts");
    }

    /// Attempts and connections.
    fn end(self) -> (u32, u32) {
        self.stop.store(true, Ordering::Relaxed);
        let reached = self.thread.join().expect("attempts");
        (self.tried.load(Ordering::Relaxed), reached)
    }
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
    command::until("the manifests", policy::PATIENCE, || {
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
        prober.goes_on(3);
        let (tried, reached) = prober.end();
        assert_eq!(reached, 0, "of {tried} attempts in round {round}");
        lab.sluice(&["link", "del", "default/late"])
            .expect("no link");

        // One that may: its first connection after the ADD comes about, because all was in force when it returned.
        let free = Netns::new("free").expect("a namespace");
        let path = free.path().to_string_lossy().into_owned();
        add("default/free", &path, "10.244.0.201").expect("a link");
        let connect = format!("exec 3<>/dev/tcp/{address}/7000");
        free.run(&["timeout", "20", "bash", "-c", &connect])
            .expect("the first connection");
        lab.sluice(&["link", "del", "default/free"])
            .expect("no link");
    }
}
