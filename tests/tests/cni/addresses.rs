//! Addresses of a delegate, of several networks, and of pods that are gone.

use super::{of, text};
use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab, REFERENCE, addresses, ping};
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::path::Path;

#[test]
fn c18_c19_host_local_as_delegate_and_two_attachments_of_one_pod() {
    let host_local = Path::new(REFERENCE).join("host-local");
    need!(
        "c18_c19_host_local_as_delegate_and_two_attachments_of_one_pod",
        Root,
        Kvm,
        Tool("ip")
    );
    if !host_local.exists() {
        return need::skip(
            "c18_c19_host_local_as_delegate",
            "needs containernetworking-plugins",
        );
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let ipam = json!({"ipam": {
        "type": "host-local", "dataDir": lab.path("networks"), "ranges": [[{"subnet": "10.99.0.0/24"}]],
    }});
    let config = lab.config("1.0.0", &ipam);
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let first = Call::new("ADD", "a", path.to_str().expect("path"));
    let second = Call {
        ifname: "net1",
        ..first
    };
    let of_first = lab
        .call(&first, &config)
        .expect("starts")
        .result()
        .expect("eth0");
    lab.call(&second, &config)
        .expect("starts")
        .result()
        .expect("net1");
    assert_eq!(of_first["ips"][0]["address"], "10.99.0.2/32");
    assert_eq!(addresses(&netns, "net1").expect("net1"), ["10.99.0.3/32"]);
    lab.call(
        &Call {
            verb: "DEL",
            ..first
        },
        &config,
    )
    .expect("starts")
    .result()
    .expect("success");
    assert_eq!(
        addresses(&netns, "net1").expect("net1 stays"),
        ["10.99.0.3/32"]
    );
    assert_eq!(lab.held().expect("a look"), ["10.99.0.3"]);
    lab.call(
        &Call {
            verb: "DEL",
            ..second
        },
        &config,
    )
    .expect("starts")
    .result()
    .expect("success");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c07_gc_frees_the_stale_and_the_rest_keep_their_traffic() {
    need!(
        "c07_gc_frees_the_stale_and_the_rest_keep_their_traffic",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let mut pods = Vec::new();
    for id in ["a", "b", "c", "d", "e"] {
        pods.push(lab.add(id, &Value::Null).expect("a pod"));
    }
    // The sandboxes of d and e are gone, and nobody told us.
    pods.truncate(3);
    let valid: Vec<Value> = ["a", "b", "c"]
        .map(|id| json!({"containerID": id, "ifname": "eth0"}))
        .to_vec();
    let keys = json!({"cni.dev/valid-attachments": valid});
    of(Call::new("GC", "", ""), &lab, &keys)
        .result()
        .expect("success");
    assert_eq!(lab.left().expect("a look").len(), 3 * (2 + 2 + 1 + 1));
    for (netns, _) in &pods {
        for (_, result) in &pods {
            let to = text(&result["ips"][0]["address"]);
            ping(netns, to.split('/').next().expect("an address")).expect("traffic goes on");
        }
    }
}
