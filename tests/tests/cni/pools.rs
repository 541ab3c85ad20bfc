//! Where addresses come from when a cluster says it: the node's object, and the annotations of pods and namespaces.

use super::text;
use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab};
use sluice_tests::command;
use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::time::Duration;

const MANIFEST: &str = "
apiVersion: v1
kind: Node
metadata: {name: here}
spec: {podCIDRs: [10.90.0.0/24, 'fd90::/64']}
---
apiVersion: v1
kind: Namespace
metadata:
  name: shop
  annotations: {sluice.dev/address-pool: blue}
---
apiVersion: v1
kind: Pod
metadata:
  name: special
  namespace: shop
  annotations: {sluice.dev/address-pool: green}
---
apiVersion: v1
kind: Namespace
metadata:
  name: lost
  annotations: {sluice.dev/address-pool: grey}
";

#[test]
fn i01_i08_annotations_choose_a_pool_and_the_node_object_has_the_others() {
    need!(
        "i01_i08_annotations_choose_a_pool_and_the_node_object_has_the_others",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    let mut lab = CniLab::prepare(Wiring::Veth, "auto").expect("a lab");
    let manifests = lab.lab.manifests();
    std::fs::create_dir_all(&manifests).expect("a directory");
    std::fs::write(manifests.join("all.yaml"), MANIFEST).expect("manifests");
    lab.lab
        .change_config(|config| {
            config["node_name"] = json!("here");
            config["source"] = json!({"directory": manifests});
            config["cni"]["pod_cidrs"] = json!([]);
            config["cni"]["pools"] = json!({
                "blue": ["10.91.0.0/24", "fd91::/64"],
                "green": ["10.92.0.0/24"],
            });
        })
        .expect("a configuration");
    lab.lab.start_node().expect("a node");
    let add = |namespace: &str, pod: &str| {
        let netns = Netns::new(pod).expect("a namespace");
        let path = netns.path();
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod}");
        let call = Call {
            args: &args,
            ..Call::new("ADD", pod, path.to_str().expect("path"))
        };
        let said = lab.call(&call, &lab.config("1.1.0", &Value::Null));
        (netns, said.expect("the plugin starts"))
    };
    let ips = |result: &Value| [0, 1].map(|n| text(&result["ips"][n]["address"]));
    let (usual, said) = add("default", "usual");
    assert_eq!(
        ips(&said.result().expect("success")),
        ["10.90.0.2/32", "fd90::2/128"]
    );
    let (blue, said) = add("shop", "web");
    assert_eq!(
        ips(&said.result().expect("success")),
        ["10.91.0.2/32", "fd91::2/128"]
    );
    let (_green, said) = add("shop", "special");
    assert_eq!(ips(&said.result().expect("success")), ["10.92.0.2/32", ""]);
    let (_grey, said) = add("lost", "pod");
    let (code, words) = said.error().expect("an error");
    assert_eq!(code, 7, "{words}");
    assert!(
        words.contains("grey") && words.contains("blue, green"),
        "{words}"
    );
    // They are one network all the same.
    for (from, to) in [(&usual, "10.91.0.2"), (&blue, "fd90::2")] {
        command::until("an answered ping", Duration::from_secs(30), || {
            from.run(&["ping", "-n", "-c", "1", "-W", "1", to])
        })
        .expect("an answer");
    }
    for pod in ["usual", "web", "special", "pod"] {
        lab.del(pod, "").expect("del").result().expect("success");
    }
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}
