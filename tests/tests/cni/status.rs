//! STATUS while the way to other nodes is cut.

use super::of;
use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab};
use sluice_tests::command;
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::underlay::{Underlay, pods_of, vtep};
use std::time::Duration;

#[test]
fn c08_a_lost_uplink_is_51_until_it_is_back() {
    need!(
        "c08_a_lost_uplink_is_51_until_it_is_back",
        Root,
        Kvm,
        Tool("ip")
    );
    let underlay = Underlay::new(1500).expect("a wire");
    let mut lab = CniLab::prepare(Wiring::Veth, "auto").expect("a node");
    underlay.attach(&lab.lab.host, 1).expect("a card");
    let uplink = json!({
        "interface": "eth0", "tunnel": {"mac": vtep(1)}, "pods": pods_of(1), "peers": [],
    });
    lab.lab.configure_uplink(&uplink).expect("a configuration");
    lab.lab.start_node().expect("a node");
    let status = || of(Call::new("STATUS", "", ""), &lab, &Value::Null);
    let set = |netns: &sluice_tests::netns::Netns, name: &str, to: &str| {
        netns
            .run(&["ip", "link", "set", name, to])
            .expect("a change")
    };
    let until = |what: &str, code: Option<u64>| {
        command::until(what, Duration::from_secs(20), || {
            let said = status();
            let now = if said.success {
                None
            } else {
                Some(said.error()?)
            };
            anyhow::ensure!(now.as_ref().map(|(code, _)| *code) == code, "{now:?}");
            Ok(now.map(|(_, text)| text).unwrap_or_default())
        })
        .expect(what)
    };
    until("a node that is well", None);
    // The far end of the cable, then the card itself.
    for (netns, name) in [(&underlay.netns, "port1"), (&lab.lab.host, "eth0")] {
        set(netns, name, "down");
        let said = until("limited availability", Some(51));
        assert!(said.contains("uplink eth0 is down"), "{said}");
        set(netns, name, "up");
        until("a node that is well again", None);
    }
}
