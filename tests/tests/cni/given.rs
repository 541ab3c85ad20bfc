//! What the configuration and the runtime say of a pod is what it gets; without an appliance nobody gets anything.

use super::of;
use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab};
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::time::Duration;

#[test]
fn w10_sysctls_mac_mtu_and_fixed_address_are_the_pods() {
    need!(
        "w10_sysctls_mac_mtu_and_fixed_address_are_the_pods",
        Root,
        Kvm,
        Tool("ip")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let keys = json!({
        "mtu": 1400,
        "sysctl": {"net.ipv4.conf.IFNAME.arp_notify": "1", "net/ipv4/ip_local_port_range": "20000 30000"},
        "runtimeConfig": {"mac": "02:00:00:00:00:09", "ips": ["10.88.0.77/24"]},
    });
    let (netns, result) = lab.add("a", &keys).expect("a pod");
    let shown = netns.run(&["ip", "addr", "show", "eth0"]).expect("eth0");
    for part in ["mtu 1400", "02:00:00:00:00:09", "10.88.0.77/32"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let sysctl = |name: &str| netns.run(&["cat", name]).expect("sysctl");
    assert_eq!(
        sysctl("/proc/sys/net/ipv4/conf/eth0/arp_notify").trim(),
        "1"
    );
    assert_eq!(
        sysctl("/proc/sys/net/ipv4/ip_local_port_range").trim(),
        "20000\t30000"
    );
    let path = netns.path();
    let mut check = keys.clone();
    check["prevResult"] = result;
    let call = Call::new("CHECK", "a", path.to_str().expect("path"));
    of(call, &lab, &check).result().expect("whole");
    netns
        .run(&[
            "sh",
            "-c",
            "echo 0 > /proc/sys/net/ipv4/conf/eth0/arp_notify",
        ])
        .expect("written");
    assert!(
        of(call, &lab, &check)
            .error()
            .expect("changed")
            .1
            .contains("arp_notify")
    );
}

#[test]
fn c04_c05_c08_without_an_appliance_add_fails_del_works_and_status_says_so() {
    need!(
        "c04_c05_c08_without_an_appliance_add_fails_del_works_and_status_says_so",
        Root,
        Tool("ip")
    );
    let mut lab = CniLab::prepare(Wiring::Veth, "external").expect("a node");
    // Never healthy: nobody brings an appliance.
    lab.lab.start_node_only().expect("a daemon");
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let call = |verb| {
        of(
            Call::new(verb, "a", path.to_str().expect("path")),
            &lab,
            &Value::Null,
        )
    };
    let added = call("ADD");
    assert_eq!(added.error().expect("refused").0, 11);
    assert!(added.took < Duration::from_secs(2), "{:?}", added.took);
    let deleted = call("DEL");
    deleted.result().expect("success");
    assert!(deleted.took < Duration::from_secs(2), "{:?}", deleted.took);
    assert_eq!(call("STATUS").error().expect("refused").0, 50);
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}
