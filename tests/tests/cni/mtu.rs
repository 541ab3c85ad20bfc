//! The MTU of pods where nobody says one.

use serde_json::{Value, json};
use sluice_tests::cni::CniLab;
use sluice_tests::command;
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::underlay::{Underlay, node4, node6, pods_of, vtep};
use std::time::Duration;

fn of_link(netns: &Netns, name: &str) -> Value {
    let shown = netns.run(&["ip", "-j", "link", "show", name]).expect(name);
    let shown: Value = serde_json::from_str(&shown).expect("json");
    shown[0]["mtu"].clone()
}

#[test]
fn m01_m04_the_result_names_what_the_uplink_leaves_as_of_each_add() {
    need!(
        "m01_m04_the_result_names_what_the_uplink_leaves_as_of_each_add",
        Root,
        Kvm,
        Tool("ip")
    );
    let underlay = Underlay::new(1500).expect("a wire");
    let mut lab = CniLab::prepare(Wiring::Veth, "auto").expect("a node");
    underlay.attach(&lab.lab.host, 1).expect("a card");
    let change = |config: &mut Value| {
        // One peer over each family: the wider tunnel counts.
        let peer = |number, address: String| json!({"address": address, "mac": vtep(number), "pods": pods_of(number)});
        config["uplink"] = json!({
            "interface": "eth0", "pods": ["10.88.0.0/16"],
            "peers": [peer(2, node4(2)), peer(3, node6(3))],
        });
        config["host_link"] = json!({"addresses": [node4(1)], "routes": ["10.88.0.0/16"]});
        config.as_object_mut().and_then(|all| all.remove("mtu"));
    };
    lab.lab.change_config(change).expect("a configuration");
    lab.lab.start_node_only().expect("a node");
    let host = &lab.lab.host;
    let mut pods = Vec::new();
    for (card, expected) in [("1500", 1430), ("1400", 1330), ("9000", 8930)] {
        host.run(&["ip", "link", "set", "eth0", "mtu", card])
            .expect("a change");
        command::until("the host link's MTU", Duration::from_secs(20), || {
            let now = (
                of_link(host, "sluice0"),
                lab.lab.status()?["pod_mtu"].clone(),
            );
            anyhow::ensure!(now == (json!(expected), json!(expected)), "{now:?}");
            Ok(())
        })
        .expect("the new MTU");
        let (pod, result) = lab.add(&format!("of-{card}"), &Value::Null).expect("a pod");
        assert_eq!(result["interfaces"][0]["mtu"], expected);
        assert_eq!(of_link(&pod, "eth0"), expected);
        pods.push((pod, expected));
    }
    for (pod, expected) in &pods {
        assert_eq!(
            of_link(pod, "eth0"),
            *expected,
            "a pod that is there keeps its own"
        );
    }
}
