//! Where the plugin is placed, and that it goes again.

use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab, call_plugin};
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;

#[test]
fn c16_p11_install_places_the_plugin_once_the_node_forwards_and_uninstall_leaves_nothing() {
    let test =
        "c16_p11_install_places_the_plugin_once_the_node_forwards_and_uninstall_leaves_nothing";
    if !need::met(test, &[Root, Kvm, Tool("ip")]) {
        return;
    }
    let mut lab = CniLab::prepare(Wiring::Veth, "auto").expect("a node");
    let (bin, conf) = (lab.path("bin"), lab.path("net.d"));
    let state = lab.path("state");
    let run = |lab: &CniLab, verb: &str| {
        let (bin, conf, state) = (
            bin.to_string_lossy(),
            conf.to_string_lossy(),
            state.to_string_lossy(),
        );
        let words = [
            verb,
            "--bin-dir",
            &bin,
            "--conf-dir",
            &conf,
            "--state-dir",
            &state,
        ];
        lab.lab.sluice(&words)
    };
    let said = run(&lab, "install")
        .expect_err("nobody forwards")
        .to_string();
    assert!(said.contains("does not forward"), "{said}");
    assert!(!conf.exists() && !bin.exists());
    lab.lab.start_node().expect("a node");
    let said = run(&lab, "install").expect("installed");
    assert!(said.contains("there and back"), "{said}");
    assert_eq!(
        lab.left().expect("a look"),
        [""; 0],
        "the self-test leaves nothing"
    );
    let list: Value =
        serde_json::from_slice(&std::fs::read(conf.join("10-sluice.conflist")).expect("a list"))
            .expect("json");
    let mut config = list["plugins"][0].clone();
    config["cniVersion"] = list["cniVersion"].clone();
    config["name"] = list["name"].clone();
    config["ipam"]["dataDir"] = json!(lab.path("networks"));
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let call = Call::new("ADD", "a", path.to_str().expect("path"));
    let mut plugin = std::process::Command::new(bin.join("sluice-cni"));
    call_plugin(&mut plugin, &call, &config)
        .expect("starts")
        .result()
        .expect("a pod");
    let said = run(&lab, "uninstall")
        .expect_err("a pod is attached")
        .to_string();
    assert!(said.contains("1 pods are attached"), "{said}");
    lab.del("a", "").expect("del").result().expect("success");
    run(&lab, "uninstall").expect("removed");
    for dir in [&bin, &conf] {
        assert_eq!(std::fs::read_dir(dir).expect("a folder").count(), 0);
    }
}
