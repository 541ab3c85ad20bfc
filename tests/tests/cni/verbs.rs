//! ADD, DEL and CHECK on a node: what is there afterwards, what is named as missing, and that nothing is left.

use super::{of, text};
use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab, addresses, ping};
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;

#[test]
fn c01_w02_a_pod_has_what_the_result_says_in_both_wirings() {
    need!(
        "c01_w02_a_pod_has_what_the_result_says_in_both_wirings",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let (a, of_a) = lab.add("a", &Value::Null).expect("a pod");
        let (b, of_b) = lab.add("b", &Value::Null).expect("a pod");
        let said: Vec<String> = of_a["ips"]
            .as_array()
            .expect("ips")
            .iter()
            .map(|ip| text(&ip["address"]))
            .collect();
        assert_eq!(addresses(&a, "eth0").expect("eth0"), said);
        assert_eq!(said, ["10.88.0.2/32", "fd88::2/128"]);
        let link: Value =
            serde_json::from_str(&a.run(&["ip", "-j", "link", "show"]).expect("links"))
                .expect("json");
        let names: Vec<String> = link
            .as_array()
            .expect("links")
            .iter()
            .map(|l| text(&l["ifname"]))
            .collect();
        assert_eq!(names, ["lo", "eth0"], "exactly one new interface");
        assert_eq!(link[1]["address"], of_a["interfaces"][0]["mac"]);
        assert_eq!(link[1]["operstate"], "UP");
        assert_eq!(link[1]["mtu"], of_a["interfaces"][0]["mtu"]);
        let routes = a.run(&["ip", "route"]).expect("routes");
        assert!(routes.contains("default via 169.254.1.1"), "{routes}");
        for ip in of_b["ips"].as_array().expect("ips") {
            let to = text(&ip["address"]);
            ping(&a, to.split('/').next().expect("an address")).expect("pod reaches pod");
        }
        for (id, netns) in [("a", &a), ("b", &b)] {
            lab.del(id, netns.path().to_str().expect("path"))
                .expect("del")
                .result()
                .expect("success");
            assert!(netns.run(&["ip", "link", "show", "eth0"]).is_err());
        }
        assert_eq!(lab.left().expect("a look"), [""; 0]);
    }
}

#[test]
fn w09_a_pod_whose_loopback_was_down_reaches_itself() {
    need!(
        "w09_a_pod_whose_loopback_was_down_reaches_itself",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    let lab = CniLab::start(Wiring::Tap).expect("a node");
    let netns = Netns::new("fresh").expect("a namespace");
    netns
        .run(&["ip", "link", "set", "lo", "down"])
        .expect("as the kernel makes it");
    let path = netns.path();
    let call = Call::new("ADD", "fresh", path.to_str().expect("path"));
    of(call, &lab, &Value::Null).result().expect("success");
    for own in ["127.0.0.1", "::1"] {
        ping(&netns, own).expect("loopback");
    }
}

#[test]
fn c02_an_interface_in_use_stays_as_it_is() {
    need!(
        "c02_an_interface_in_use_stays_as_it_is",
        Root,
        Kvm,
        Tool("ip")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let (netns, _) = lab.add("a", &Value::Null).expect("a pod");
    let before = netns.run(&["ip", "-o", "addr"]).expect("a look");
    let path = netns.path();
    let path = path.to_str().expect("path");
    for id in ["a", "another"] {
        let (code, said) = of(Call::new("ADD", id, path), &lab, &Value::Null)
            .error()
            .expect("refused");
        assert_eq!(code, 103, "{said}");
    }
    assert_eq!(netns.run(&["ip", "-o", "addr"]).expect("a look"), before);
    assert_eq!(
        lab.left().expect("a look").len(),
        2 + 2 + 1 + 1,
        "two interfaces, two addresses, a link, a record"
    );
}

#[test]
fn c03_del_succeeds_in_every_odd_situation() {
    need!(
        "c03_del_succeeds_in_every_odd_situation",
        Root,
        Kvm,
        Tool("ip")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let (netns, _) = lab.add("a", &Value::Null).expect("a pod");
        let path = netns.path();
        drop(netns);
        for path in [path.to_str().expect("path"), "", "/nonexistent"] {
            assert_eq!(
                lab.del("a", path).expect("del").result().expect("success"),
                Value::Null
            );
        }
        lab.del("never", "")
            .expect("del")
            .result()
            .expect("success");
        let (netns, _) = lab.add("b", &Value::Null).expect("a pod");
        netns.run(&["ip", "link", "del", "eth0"]).expect("gone");
        lab.del("b", netns.path().to_str().expect("path"))
            .expect("del")
            .result()
            .expect("success");
        assert_eq!(lab.left().expect("a look"), [""; 0]);
    }
}

/// Takes something away, given the pod and the result of its ADD.
type Damage<'a> = &'a dyn Fn(&Netns, &Value);

#[test]
fn c06_whatever_is_taken_away_is_named_by_check() {
    need!(
        "c06_whatever_is_taken_away_is_named_by_check",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tc")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let damages: [(&str, Damage<'_>); 7] = [
        ("the pod's address 10.88.0.", &|pod, result| {
            let address = text(&result["ips"][0]["address"]);
            pod.run(&["ip", "addr", "del", &address, "dev", "eth0"])
                .expect("del");
        }),
        ("the pod's default route via 169.254.1.1", &|pod, _| {
            pod.run(&["ip", "route", "del", "default"]).expect("del");
        }),
        ("the state UP", &|pod, _| {
            pod.run(&["ip", "link", "set", "eth0", "down"])
                .expect("down");
        }),
        ("the pod's interface eth0", &|pod, _| {
            pod.run(&["ip", "link", "del", "eth0"]).expect("del");
        }),
        ("the host's interface slt", &|_, result| {
            let tap = text(&result["interfaces"][2]["name"]);
            lab.lab
                .host
                .run(&["ip", "link", "set", &tap, "down"])
                .expect("down");
            lab.lab
                .host
                .run(&["ip", "tuntap", "del", "dev", &tap, "mode", "tap"])
                .ok();
            lab.lab.host.run(&["ip", "link", "del", &tap]).ok();
        }),
        ("the redirect of slv", &|_, result| {
            let veth = text(&result["interfaces"][1]["name"]);
            lab.lab
                .host
                .run(&["tc", "qdisc", "del", "dev", &veth, "clsact"])
                .expect("del");
        }),
        ("the node's link", &|_, _| {
            let links = lab
                .lab
                .sluice(&["link", "list", "-o", "json"])
                .expect("links");
            let links: Value = serde_json::from_str(&links).expect("json");
            lab.lab
                .sluice(&["link", "del", &text(&links[0]["pod"])])
                .expect("del");
        }),
    ];
    for (index, (missing, damage)) in damages.into_iter().enumerate() {
        let id = format!("c{index}");
        let (netns, result) = lab.add(&id, &Value::Null).expect("a pod");
        let path = netns.path();
        let path = path.to_str().expect("path");
        let keys = json!({"prevResult": result});
        of(Call::new("CHECK", &id, path), &lab, &keys)
            .result()
            .expect("whole right after ADD");
        damage(&netns, &result);
        let (code, said) = of(Call::new("CHECK", &id, path), &lab, &keys)
            .error()
            .expect("damaged");
        assert_eq!(code, 106);
        assert!(said.contains(missing), "{missing}: {said}");
        lab.del(&id, path).expect("del").result().expect("success");
    }
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c15_a_fault_at_any_step_of_wiring_leaves_nothing() {
    need!(
        "c15_a_fault_at_any_step_of_wiring_leaves_nothing",
        Root,
        Kvm,
        Tool("ip")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let netns = Netns::new("faulty").expect("a namespace");
        let path = netns.path();
        let path = path.to_str().expect("path");
        let refused = |keys: &Value, netns: &str| {
            let said = of(Call::new("ADD", "a", netns), &lab, keys)
                .error()
                .expect("refused");
            assert_eq!(lab.left().expect("a look"), [""; 0], "{said:?}");
            said
        };
        // Not a namespace; names on the host in the way; a route that cannot be; a sysctl that is not there.
        let file = lab.path("file");
        std::fs::write(&file, "").expect("a file");
        assert_eq!(refused(&Value::Null, file.to_str().expect("path")).0, 8);
        lab.lab
            .host
            .run(&["ip", "link", "add", "slt16", "type", "bridge"])
            .expect("in the way");
        let in_the_way = of(Call::new("ADD", "a", path), &lab, &Value::Null)
            .error()
            .expect("refused");
        assert_eq!(in_the_way.0, 103, "{in_the_way:?}");
        lab.lab
            .host
            .run(&["ip", "link", "del", "slt16"])
            .expect("out of the way");
        let (code, said) = refused(
            &json!({"sysctl": {"net.ipv4.conf.eth0.no_such": "1"}}),
            path,
        );
        assert!(
            code == 7 && said.contains("no_such") && said.contains("does not have it"),
            "{said}"
        );
        assert!(netns.run(&["ip", "link", "show", "eth0"]).is_err());
        of(Call::new("ADD", "a", path), &lab, &Value::Null)
            .result()
            .expect("nothing is in the way");
        lab.del("a", path).expect("del").result().expect("success");
    }
}
