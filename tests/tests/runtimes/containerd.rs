//! containerd and runc: pods made through the CRI, as a kubelet makes them.

use crate::cri::PortMapping;
use crate::runtime::{skipped, start};
use serde_json::Value;
use sluice_tests::cni::CniLab;
use sluice_tests::command;
use sluice_tests::lab::Wiring;
use std::fs;
use std::time::Duration;

#[test]
fn two_pods_of_containerd_reach_each_other_and_are_what_the_result_says() {
    if skipped("two_pods_of_containerd_reach_each_other_and_are_what_the_result_says") {
        return;
    }
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let mut containerd = start(&lab).expect("containerd");
        let web = containerd.pod("web", Vec::new()).expect("a pod");
        let shop = containerd.pod("shop", Vec::new()).expect("a pod");
        for pod in [&web, &shop] {
            assert_eq!(
                pod.addresses().expect("eth0"),
                pod.ips,
                "the status has the pod's addresses"
            );
            let of_result: Vec<String> = pod.result["Interfaces"]["eth0"]["IPConfigs"]
                .as_array()
                .expect("a result")
                .iter()
                .map(|ip| ip["IP"].as_str().unwrap_or_default().to_owned())
                .collect();
            assert_eq!(of_result, pod.ips);
            let shown = pod.run(&["ip", "link", "show", "eth0"]).expect("eth0");
            let mac = pod.result["Interfaces"]["eth0"]["Mac"]
                .as_str()
                .expect("a MAC");
            assert!(shown.contains(mac), "{shown}");
        }
        command::until("an answered ping", Duration::from_secs(30), || {
            for ip in &shop.ips {
                web.run(&["ping", "-n", "-c", "1", "-W", "1", ip])?;
            }
            Ok(())
        })
        .expect("pods reach each other");
        // The node knows the pods by their Kubernetes names.
        let links = lab
            .lab
            .sluice(&["link", "list", "-o", "json"])
            .expect("links");
        assert!(
            links.contains("shop/web") && links.contains("shop/shop"),
            "{links}"
        );
        for pod in [web, shop] {
            containerd.cri.stop(&pod.id).expect("stopped");
            // Stops it once more, which is no failure.
            containerd.remove(&pod.id).expect("removed");
        }
        assert_eq!(lab.left().expect("a look"), [""; 0]);
    }
}

#[test]
fn c04_a_pod_of_containerd_is_removed_while_the_node_is_away() {
    if skipped("c04_a_pod_of_containerd_is_removed_while_the_node_is_away") {
        return;
    }
    let mut lab = CniLab::start(Wiring::Veth).expect("a node");
    let mut containerd = start(&lab).expect("containerd");
    let pod = containerd.pod("web", Vec::new()).expect("a pod");
    let node = lab.lab.node().expect("a node");
    node.signal(nix::sys::signal::Signal::SIGKILL);
    node.wait().expect("its end");
    lab.lab.forget_node();
    containerd.remove(&pod.id).expect("removed without a node");
    assert!(
        !lab.held().expect("a look").is_empty(),
        "nobody could free the address yet"
    );
    lab.lab.start_node().expect("a node again");
    let status = lab.lab.status().expect("a status");
    assert_eq!(status["cni"]["cni_deferred_del_total"], 1);
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn b03_host_ports_of_containerd_reach_the_node_and_do_not_clash() {
    if skipped("b03_host_ports_of_containerd_reach_the_node_and_do_not_clash") {
        return;
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let mut containerd = start(&lab).expect("containerd");
    let port = PortMapping {
        protocol: 0,
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    };
    let first = containerd.pod("first", vec![port.clone()]).expect("a pod");
    let second = containerd.pod("second", vec![port]);
    let said = format!("{:#}", second.err().expect("the port is taken"));
    assert!(said.contains("host port 8080/tcp"), "{said}");
    let record = lab
        .lab
        .run_dir()
        .join(format!("attachments/sluice/{}@eth0", first.id));
    let record: Value = serde_json::from_slice(&fs::read(record).expect("a record")).expect("json");
    assert_eq!(record["link"]["ports"][0]["hostPort"], 8080);
    assert_eq!(
        record["link"]["bandwidth"]["egress"]["bits_per_second"],
        100_000_000
    );
    containerd.remove(&first.id).expect("removed");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}
