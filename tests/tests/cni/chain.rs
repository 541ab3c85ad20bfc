//! Together with Debian's own plugins.

use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab, REFERENCE, addresses, ping};
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::path::Path;

#[test]
fn chained_before_debians_portmap_and_bandwidth() {
    need!(
        "chained_before_debians_portmap_and_bandwidth",
        Root,
        Kvm,
        Tool("ip"),
        Tool("iptables")
    );
    if !Path::new(REFERENCE).join("portmap").exists() {
        return need::skip(
            "chained_before_debians_portmap_and_bandwidth",
            "needs containernetworking-plugins",
        );
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let add = Call::new("ADD", "a", path.to_str().expect("path"));
    let first = lab
        .call(&add, &lab.config("1.0.0", &Value::Null))
        .expect("starts")
        .result()
        .expect("ours");
    let theirs = |name: &str, previous: &Value| {
        json!({
            "cniVersion": "1.0.0", "name": "sluice", "type": name, "prevResult": previous,
            "backend": "iptables", "snat": true,
            "runtimeConfig": {
                "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
                "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 8_000_000},
            },
        })
    };
    let mut result = first.clone();
    for name in ["portmap", "bandwidth"] {
        let said = lab
            .call_reference(name, &add, &theirs(name, &result))
            .expect("starts");
        match said.result() {
            Ok(next) => result = next,
            Err(error) => {
                // What this kernel does not have (tbf, iptables modules) is not ours to prove.
                need::skip(&format!("chained before {name}"), &format!("{error:#}"));
            }
        }
    }
    assert_eq!(
        result["ips"], first["ips"],
        "the chain hands our addresses on"
    );
    let check = json!({"prevResult": result});
    lab.call(
        &Call {
            verb: "CHECK",
            ..add
        },
        &lab.config("1.0.0", &check),
    )
    .expect("starts")
    .result()
    .expect("whole, whatever they changed");
    for name in ["bandwidth", "portmap"] {
        let del = Call { verb: "DEL", ..add };
        let said = lab
            .call_reference(name, &del, &theirs(name, &result))
            .expect("starts");
        if let Err(error) = said.result() {
            need::skip(&format!("DEL of {name}"), &format!("{error:#}"));
        }
    }
    lab.del("a", add.netns)
        .expect("del")
        .result()
        .expect("success");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c11_chained_after_debians_bridge_and_ptp_their_interfaces_are_taken_over() {
    let test = "c11_chained_after_debians_bridge_and_ptp_their_interfaces_are_taken_over";
    if !need::met(test, &[Root, Kvm, Tool("ip"), Tool("ping")]) {
        return;
    }
    if !Path::new(REFERENCE).join("ptp").exists() {
        return need::skip(test, "needs containernetworking-plugins");
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let (other, _) = lab.add("other", &Value::Null).expect("a pod");
    for (n, kind) in ["bridge", "ptp"].into_iter().enumerate() {
        let netns = Netns::new(kind).expect("a namespace");
        let path = netns.path();
        let add = Call::new("ADD", kind, path.to_str().expect("path"));
        let del = Call { verb: "DEL", ..add };
        let theirs = json!({
            "cniVersion": "1.0.0", "name": "chained", "type": kind, "bridge": "cni0", "isGateway": true,
            "ipam": {
                "type": "host-local", "dataDir": lab.path("theirs"),
                "ranges": [[{"subnet": format!("10.22.{n}.0/24")}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        let previous = lab
            .call_reference(kind, &add, &theirs)
            .expect("starts")
            .result()
            .expect("theirs");
        let mut config = lab.config("1.0.0", &json!({"prevResult": previous}));
        config.as_object_mut().expect("an object").remove("ipam");
        let result = lab
            .call(&add, &config)
            .expect("starts")
            .result()
            .expect("ours");
        let before = previous["interfaces"].as_array().expect("interfaces").len();
        for index in 0..before {
            for key in ["name", "mac", "sandbox"] {
                assert_eq!(
                    result["interfaces"][index][key],
                    previous["interfaces"][index][key]
                );
            }
        }
        assert_eq!(
            addresses(&netns, "eth0").expect("eth0"),
            [format!("10.22.{n}.2/32")]
        );
        ping(&netns, "10.88.0.2").expect("it reaches a pod of ours");
        ping(&other, &format!("10.22.{n}.2")).expect("and is reached");
        config["prevResult"] = result;
        lab.call(
            &Call {
                verb: "CHECK",
                ..add
            },
            &config,
        )
        .expect("starts")
        .result()
        .expect("whole");
        lab.call(&del, &config)
            .expect("starts")
            .result()
            .expect("success");
        lab.call_reference(kind, &del, &theirs)
            .expect("starts")
            .result()
            .expect("success");
        assert!(netns.run(&["ip", "link", "show", "eth0"]).is_err());
    }
    lab.del("other", "")
        .expect("del")
        .result()
        .expect("success");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}
