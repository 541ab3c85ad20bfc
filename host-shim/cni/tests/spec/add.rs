//! §3.4: ADD.

use crate::fixture::{Fixture, IN_TIME, within};
use serde_json::json;
use sluice_cni::plugin::OVERALL;
use sluice_cni::verbs::node::{Health, NodeError};
use std::thread;
use std::time::Duration;

#[test]
fn cni22_add_makes_the_interface_in_the_namespace() {
    let f = Fixture::new();
    let added = f.add("a").result();
    let netns = f.netns("a");
    let link = f.node.state().links["a:eth0"].clone();
    assert_eq!(
        (link.netns.as_str(), link.ifname.as_str(), link.mtu),
        (netns.as_str(), "eth0", 1450)
    );
    assert_eq!(added["interfaces"][0]["name"], "eth0");
    assert_eq!(added["interfaces"][0]["sandbox"], netns);
    assert_eq!(added["ips"][0]["address"], "10.1.0.2/32");
    assert_eq!(
        added["routes"],
        json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}])
    );
}

#[test]
fn cni23_an_interface_that_is_there_is_an_error_and_stays() {
    let f = Fixture::new();
    let netns = f.netns("a");
    f.node.state().taken.insert((netns, "eth0".into()));
    assert!(f.add("a").error(103).contains("eth0"));
    f.assert_empty();
    assert_eq!(f.node.state().taken.len(), 1);
}

#[test]
fn cni24_what_a_plugin_before_us_said_is_handed_on() {
    let f = Fixture::new();
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "other0", "mac": "02:00:00:00:00:07", "sandbox": "/run/netns/x"}],
        "ips": [{"address": "192.0.2.5/24", "gateway": "192.0.2.1", "interface": 0}],
        "routes": [{"dst": "192.0.2.128/25"}],
        "dns": {"nameservers": ["192.0.2.53"]},
        "theirs": {"a": [1]},
    });
    let added = f
        .call(
            "ADD",
            "a",
            &f.config("1.0.0", json!({"prevResult": previous})),
        )
        .result();
    assert_eq!(added["interfaces"][0], previous["interfaces"][0]);
    assert_eq!(added["ips"][0], previous["ips"][0]);
    assert_eq!(added["routes"][0], previous["routes"][0]);
    assert_eq!(
        (&added["dns"], &added["theirs"]),
        (&previous["dns"], &previous["theirs"])
    );
    assert_eq!(
        (
            &added["interfaces"][1]["name"],
            &added["ips"][1]["interface"]
        ),
        (&json!("eth0"), &json!(1))
    );
}

#[test]
fn c11_chained_after_bridge_the_interface_is_taken_over_and_only_ours_changes() {
    let f = Fixture::new();
    let netns = f.netns("a");
    f.node.state().taken.insert((netns.clone(), "eth0".into()));
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [
            {"name": "cni0", "mac": "02:00:00:00:00:01"},
            {"name": "veth123", "mac": "02:00:00:00:00:02"},
            {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": netns},
        ],
        "ips": [{"address": "10.22.0.5/16", "gateway": "10.22.0.1", "interface": 2}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.22.0.1"}],
    });
    let mut config = f.config("1.0.0", json!({"prevResult": previous}));
    config.as_object_mut().unwrap().remove("ipam");
    let added = f.call("ADD", "a", &config).result();
    let link = f.node.state().links["a:eth0"].clone();
    assert_eq!(
        (link.adopt.as_deref(), link.addresses),
        (Some("veth123"), vec!["10.22.0.5".parse().unwrap()])
    );
    assert_eq!(added["interfaces"][0], previous["interfaces"][0]);
    assert_eq!(added["interfaces"][2]["mac"], "02:00:00:00:00:03");
    assert_eq!(
        added["ips"],
        json!([{"address": "10.22.0.5/32", "gateway": "169.254.1.1", "interface": 2}])
    );
    assert_eq!(
        added["routes"],
        json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}])
    );
    f.call("DEL", "a", &config).silent();
    f.assert_empty();
}

#[test]
fn cni25_a_delegate_that_fails_is_told_del_before_the_failure_is_returned() {
    let f = Fixture::new();
    let log = f.path("log");
    let script = format!(
        "#!/bin/sh\ncat > /dev/null\necho $CNI_COMMAND >> {}\n[ $CNI_COMMAND = DEL ] && exit 0\n\
         echo '{{\"cniVersion\": \"1.0.0\", \"code\": 142, \"msg\": \"lease server away\"}}'\nexit 1\n",
        log.display()
    );
    let path = crate::ipam::plugin(&f, "bad-ipam", &script);
    let netns = f.netns("a");
    let config = f.config("1.0.0", json!({"ipam": {"type": "bad-ipam"}}));
    let said = f.call_with(
        "ADD",
        "a",
        &config,
        &[("CNI_NETNS", &netns), ("CNI_PATH", &path)],
    );
    assert!(said.error(142).contains("lease server away"));
    let log = std::fs::read_to_string(log).unwrap();
    assert_eq!(log.lines().take(2).collect::<Vec<_>>(), ["ADD", "DEL"]);
    assert!(f.links().is_empty());
}

#[test]
fn cni26_a_second_add_of_one_attachment_is_an_error_and_the_first_stays() {
    let f = Fixture::new();
    let first = f.add("a").result();
    let before = (f.links(), f.held());
    assert!(f.add("a").error(103).contains("already"));
    assert_eq!((f.links(), f.held()), before);
    assert_eq!(f.held(), ["10.1.0.2"]);
    let config = f.config("1.1.0", json!({"prevResult": first}));
    f.call("CHECK", "a", &config).silent();
}

#[test]
fn cni26_c19_another_interface_or_network_of_one_container_is_another_attachment() {
    let f = Fixture::new();
    let netns = f.netns("a");
    let eth0 = f.add("a").address();
    let config = f.config("1.1.0", json!({}));
    let second = [("CNI_NETNS", netns.as_str()), ("CNI_IFNAME", "net1")];
    let net1 = f.call_with("ADD", "a", &config, &second).address();
    let ipam = json!({"type": "sluice", "dataDir": f.path("data"), "subnet": "10.2.0.0/24"});
    let other = f.config("1.1.0", json!({"name": "other", "ipam": ipam}));
    let third = [("CNI_NETNS", netns.as_str()), ("CNI_IFNAME", "net2")];
    f.call_with("ADD", "a", &other, &third).result();
    assert_ne!(eth0, net1);
    assert_eq!(f.links().len(), 3);
    f.call_with("DEL", "a", &config, &second).silent();
    assert_eq!(f.links(), ["a:eth0", "a:net2"]);
    assert_eq!(f.held(), [eth0.trim_end_matches("/32")]);
}

#[test]
fn cni27_c15_an_add_that_fails_at_any_step_leaves_nothing_and_its_del_succeeds() {
    let f = Fixture::new();
    for (error, code) in [
        (NodeError::Down("gone".into()), 11),
        (NodeError::Late("5s".into()), 11),
        (NodeError::Exists("eth0".into()), 103),
        (NodeError::Netns("gone".into()), 8),
        (NodeError::Full("4079".into()), 11),
        (NodeError::Config("mtu".into()), 7),
        (NodeError::Failed("tc".into()), 105),
    ] {
        f.node.state().refuse = Some(error);
        f.add("a").error(code);
        f.assert_empty();
        f.del("a").silent();
    }
    let twice = json!({"runtimeConfig": {"ips": ["10.9.9.9"]}});
    f.call("ADD", "a", &f.config("1.1.0", twice)).error(7);
    f.assert_empty();
    std::fs::remove_dir_all(f.path("run/attachments")).unwrap();
    std::fs::write(f.path("run/attachments"), "in the way").unwrap();
    f.add("a").error(5);
    f.assert_empty();
}

#[test]
fn c15_an_add_whose_caller_is_gone_is_taken_back() {
    let f = Fixture::new();
    f.node.state().delay = Duration::from_millis(300);
    let netns = f.netns("a");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_sluice-cni"))
        .env_clear()
        .envs([
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "a"),
            ("CNI_IFNAME", "eth0"),
        ])
        .env("CNI_NETNS", &netns)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let config = f.config("1.1.0", json!({})).to_string();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), config.as_bytes()).unwrap();
    while f.held().is_empty() {
        thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // The DEL waits for the ADD that is under way, whose result nobody hears.
    f.del("a").silent();
    f.assert_empty();
}

#[test]
fn cni28_nothing_depends_on_getting_the_last_result_back() {
    let f = Fixture::new();
    f.add("a").result();
    f.call(
        "DEL",
        "a",
        &f.config("1.1.0", json!({"prevResult": {"cniVersion": "1.1.0"}})),
    )
    .silent();
    f.assert_empty();
}

#[test]
fn c05_while_the_appliance_is_down_add_says_try_again_and_leaves_nothing() {
    let f = Fixture::new();
    f.node.state().health = Health::Unavailable("The appliance is not connected".into());
    let said = within(IN_TIME, || f.add("a"));
    assert!(said.error(11).contains("not connected"));
    f.assert_empty();
}

#[test]
fn c05_while_the_node_is_down_add_says_try_again_in_time() {
    let f = Fixture::without_node();
    let said = within(IN_TIME, || f.add("a"));
    assert!(said.error(11).contains("cannot be reached"));
}

#[test]
fn c20_a_node_that_hangs_is_cut_at_five_seconds() {
    let f = Fixture::without_node();
    let hanging = f.hang(false);
    let said = f.add("a");
    said.error(11);
    let waited = Duration::from_secs(4)..OVERALL;
    assert!(waited.contains(&said.took), "{:?}", said.took);
    hanging.join().unwrap();
}

#[test]
fn c13_the_pod_is_known_by_name_before_its_link_exists() {
    let f = Fixture::new();
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=a";
    let config = f.config("1.1.0", json!({}));
    let netns = f.netns("a");
    f.call_with(
        "ADD",
        "a",
        &config,
        &[("CNI_NETNS", &netns), ("CNI_ARGS", args)],
    )
    .result();
    let pod = f.node.state().links["shop/web"].pod.clone().unwrap();
    assert_eq!(
        (pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_str()),
        ("shop", "web", "u-1")
    );
    // The next sandbox of the pod comes before the last is gone.
    let netns = f.netns("b");
    f.call_with(
        "ADD",
        "b",
        &config,
        &[("CNI_NETNS", &netns), ("CNI_ARGS", args)],
    )
    .result();
    assert_eq!(f.links(), ["b:eth0", "shop/web"]);
}
