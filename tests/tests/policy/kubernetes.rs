//! A node that follows the Kubernetes API: what is applied there comes to traffic, and what the API does wrong does not.

use crate::Prober;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sluice_tests::command;
use sluice_tests::kubernetes::{ApiServer, NODES, PODS, POLICIES, SERVICES, SLICES};
use sluice_tests::lab::{Lab, Plan, Pod};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::policy::{SERVICE, connects};
use std::time::{Duration, Instant};

/// Longer than the longest pause between two attempts of the source.
const PATIENCE: Duration = Duration::from_secs(90);

fn pod(lab: &Lab, at: usize, role: &str) -> Value {
    let pod = &lab.pods[at];
    let [v4, v6] = pod.addresses();
    json!({"metadata": {"name": pod.name, "namespace": "default", "labels": {"role": role}},
        "spec": {"nodeName": "here", "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]}})
}

fn service() -> Value {
    json!({"metadata": {"name": "server", "namespace": "default"},
        "spec": {"clusterIP": SERVICE[0], "clusterIPs": SERVICE, "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80, "targetPort": 7000}]}})
}

fn slice(family: &str, address: &str) -> Value {
    let name = format!("server-{}", family.to_lowercase());
    json!({"metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "server"}},
        "addressType": family, "ports": [{"port": 7000}],
        "endpoints": [{"addresses": [address], "nodeName": "here", "conditions": {"ready": true}}]})
}

fn friends_only() -> Value {
    json!({"metadata": {"name": "friends-only", "namespace": "default"},
        "spec": {"podSelector": {"matchLabels": {"role": "server"}}, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": "friend"}}}]}]}})
}

#[track_caller]
fn until(what: &str, pod: &Pod, address: &str, port: u16, accepted: bool) {
    let start = Instant::now();
    command::until(what, PATIENCE, || {
        anyhow::ensure!(connects(pod, address, port)? == accepted, "not yet");
        Ok(())
    })
    .expect(what);
    println!("{what}: after {} ms", start.elapsed().as_millis());
}

fn is_followed(lab: &Lab, wanted: bool) {
    command::until("what the status says of the API", PATIENCE, || {
        let lost = lab.status()?["cluster"]["lost"].clone();
        anyhow::ensure!(lost.is_null() == wanted, "it says {lost}");
        Ok(())
    })
    .expect("what the status says of the API");
}

#[test]
fn p07_n22_traffic_follows_the_api_and_what_is_known_stays_while_it_is_away() {
    need!(
        "p07_n22_traffic_follows_the_api_and_what_is_known_stays_while_it_is_away",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let plan = Plan {
        pods: 3,
        ..Plan::default()
    };
    let mut lab = Lab::prepare(&plan).expect("a lab");
    let api = ApiServer::start(&lab).expect("a server");
    lab.change_config(|config| config["node_name"] = json!("here"))
        .expect("a name");
    api.put(NODES, &json!({"metadata": {"name": "here"}}));
    for (at, role) in ["stranger", "server", "friend"].into_iter().enumerate() {
        api.put(PODS, &pod(&lab, at, role));
    }
    let [v4, v6] = lab.pods[1].addresses();
    api.put(SERVICES, &service());
    api.put(SLICES, &slice("IPv4", &v4));
    api.put(SLICES, &slice("IPv6", &v6));
    lab.start_node().expect("a node");
    let _server = lab.serve(1).expect("a server");
    let (stranger, friend) = (&lab.pods[0], &lab.pods[2]);
    for address in SERVICE {
        until("the Service", stranger, address, 80, true);
    }

    api.put(POLICIES, &friends_only());
    until("denied by a new policy", stranger, &v4, 7000, false);
    assert!(!connects(stranger, SERVICE[1], 80).expect("an attempt"));
    until("a friend", friend, &v6, 7000, true);

    // Nobody answers, and the appliance dies as well: another one has the same tables.
    let prober = Prober::start(&stranger.netns, v4.clone());
    api.go_away(true);
    is_followed(&lab, false);
    until("a friend without the API", friend, SERVICE[0], 80, true);
    let machine = || lab.status().expect("a status")["machine"]["pid"].as_i64();
    let vmm = machine().expect("a VMM");
    kill(
        Pid::from_raw(i32::try_from(vmm).expect("a pid")),
        Signal::SIGKILL,
    )
    .expect("killed");
    command::until("another VMM", PATIENCE, || {
        anyhow::ensure!(machine().is_some_and(|it| it != vmm), "not yet");
        Ok(())
    })
    .expect("another VMM");
    until(
        "a friend through another appliance",
        friend,
        SERVICE[0],
        80,
        true,
    );
    let (tried, reached) = prober.end();
    assert!(tried > 0);
    assert_eq!(reached, 0, "of {tried} attempts of a stranger");

    // What happened meanwhile follows, though the first word of it is cut off.
    api.delete(POLICIES, "default/friends-only");
    api.break_off("/networkpolicies?watch");
    api.go_away(false);
    until("accepted without the policy", stranger, &v4, 7000, true);
    is_followed(&lab, true);
    assert_eq!(api.faults_left(), 0);

    // History is forgotten: 410, and the list alone says that there is a policy again.
    api.rewrite(POLICIES, &[friends_only()]);
    until("denied by a list", stranger, &v4, 7000, false);
    api.rewrite(POLICIES, &[]);
    until("accepted by a list", stranger, &v4, 7000, true);

    api.delete(SERVICES, "default/server");
    for address in SERVICE {
        until("no Service", stranger, address, 80, false);
    }
    api.put(SERVICES, &service());
    for address in SERVICE {
        until("the Service again", stranger, address, 80, true);
    }
    api.rewrite(SLICES, &[slice("IPv4", &v4)]);
    until("no endpoint", stranger, SERVICE[1], 80, false);
    until("the other endpoint", stranger, SERVICE[0], 80, true);
    lab.healthy(PATIENCE).expect("a healthy node");
}
