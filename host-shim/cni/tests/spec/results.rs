//! §3.9 and §3.10: ordering, and results per version.

use crate::fixture::Fixture;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

#[test]
fn cni51_c14_64_parallel_adds_have_64_addresses_and_64_dels_leave_nothing() {
    let f = Fixture::new();
    let parallel = |work: &(dyn Fn(usize) -> String + Sync)| -> Vec<String> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..64).map(|n| scope.spawn(move || work(n))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    };
    let given = parallel(&|n| f.add(&format!("c{n}")).address());
    assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), 64);
    parallel(&|n| {
        f.del(&format!("c{n}")).silent();
        f.add(&format!("d{n}")).address()
    });
    parallel(&|n| {
        f.del(&format!("d{n}")).silent();
        String::new()
    });
    f.assert_empty();
}

#[test]
fn cni51_calls_of_one_attachment_wait_for_each_other() {
    let f = Fixture::new();
    f.node.state().delay = Duration::from_millis(200);
    std::thread::scope(|scope| {
        let adds: Vec<_> = (0..3).map(|_| scope.spawn(|| f.add("a").code)).collect();
        let codes: Vec<_> = adds
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        assert_eq!(codes.iter().filter(|code| **code == Some(0)).count(), 1);
    });
    assert_eq!(f.held().len(), 1);
}

#[test]
fn cni52_the_namespace_is_the_runtimes_it_is_neither_made_nor_removed() {
    let f = Fixture::new();
    let netns = f.netns("a");
    f.add("a").result();
    f.del("a").silent();
    assert!(std::path::Path::new(&netns).exists());
}

#[test]
fn cni53_del_works_with_a_changed_or_minimal_configuration() {
    let f = Fixture::new();
    let added = json!({"mtu": 9000, "runtimeConfig": {"mac": "02:00:00:00:00:09"}});
    f.call("ADD", "a", &f.config("1.1.0", added)).result();
    let minimal = json!({
        "cniVersion": "0.3.1", "name": "net", "type": "sluice-cni", "runDir": f.path("run"),
    });
    f.call("DEL", "a", &minimal).silent();
    f.assert_empty();
    // Nor do faults that came with the change matter to it.
    f.add("a").result();
    let faulty = json!({"mtu": "big", "wiring": "x", "runtimeConfig": {"portMappings": 5}});
    f.call("DEL", "a", &f.config("1.1.0", faulty)).silent();
    f.assert_empty();
}

fn dual(f: &Fixture, version: &str) -> Value {
    let ranges = json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]);
    let keys = json!({"ipam": {"type": "sluice", "dataDir": f.path("data"), "ranges": ranges}});
    f.call("ADD", &format!("v{version}"), &f.config(version, keys))
        .result()
}

fn keys(object: &Value) -> Vec<&str> {
    object
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn cni54_c10_results_of_0_3_say_the_family_of_each_address() {
    let f = Fixture::new();
    for version in ["0.3.0", "0.3.1"] {
        let result = dual(&f, version);
        assert_eq!(keys(&result), ["cniVersion", "interfaces", "ips", "routes"]);
        assert_eq!(keys(&result["interfaces"][0]), ["mac", "name", "sandbox"]);
        assert_eq!(
            (&result["ips"][0]["version"], &result["ips"][1]["version"]),
            (&json!("4"), &json!("6"))
        );
        assert_eq!(
            keys(&result["ips"][0]),
            ["address", "gateway", "interface", "version"]
        );
        assert_eq!(keys(&result["routes"][0]), ["dst", "gw"]);
    }
}

#[test]
fn cni55_0_4_has_the_same_shape_and_check() {
    let f = Fixture::new();
    let result = dual(&f, "0.4.0");
    assert_eq!(result["ips"][0]["version"], "4");
    let ranges = json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]);
    let ipam = json!({"type": "sluice", "dataDir": f.path("data"), "ranges": ranges});
    let config = f.config("0.4.0", json!({"prevResult": result, "ipam": ipam}));
    f.call("CHECK", "v0.4.0", &config).silent();
    f.call("DEL", "v0.4.0", &config).silent();
    f.assert_empty();
}

#[test]
fn cni56_c10_from_1_0_on_the_family_is_derived() {
    let f = Fixture::new();
    let result = dual(&f, "1.0.0");
    assert_eq!(keys(&result["ips"][0]), ["address", "gateway", "interface"]);
    assert!(result["interfaces"][0].get("mtu").is_none());
}

#[test]
fn cni57_c10_1_1_has_the_mtu() {
    let f = Fixture::new();
    let result = dual(&f, "1.1.0");
    assert_eq!(result["interfaces"][0]["mtu"], 1450);
    assert!(result["ips"][0].get("version").is_none());
}

#[test]
fn cni58_before_0_3_there_is_one_address_per_family() {
    let f = Fixture::new();
    for version in ["0.1.0", "0.2.0"] {
        let result = dual(&f, version);
        assert_eq!(keys(&result), ["cniVersion", "ip4", "ip6"]);
        assert_eq!(
            result["ip4"]["routes"],
            json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}])
        );
        assert_eq!(result["ip6"]["gateway"], "fe80::1");
    }
}

#[test]
fn cni59_the_pods_interface_has_a_sandbox_the_hosts_have_none_and_indices_hold() {
    let f = Fixture::new();
    let result = f.add("a").result();
    let interfaces = result["interfaces"].as_array().unwrap();
    let index = usize::try_from(result["ips"][0]["interface"].as_u64().unwrap()).unwrap();
    assert_eq!(interfaces[index]["sandbox"], f.netns("a"));
    assert!(
        interfaces
            .iter()
            .skip(1)
            .all(|interface| interface.get("sandbox").is_none())
    );
    assert!(interfaces.len() > 1);
}

#[test]
fn cni60_what_is_empty_is_omitted_and_addresses_have_their_prefix() {
    let f = Fixture::new();
    let result = f.add("a").result();
    assert!(result.get("dns").is_none());
    assert_eq!(result["ips"][0]["address"], "10.1.0.2/32");
    let dns = json!({"dns": {"nameservers": ["10.96.0.10"], "search": ["svc.local"]}});
    let result = f.call("ADD", "b", &f.config("1.1.0", dns.clone())).result();
    assert_eq!(result["dns"], dns["dns"]);
}

#[test]
fn a_call_that_needs_no_node_takes_a_few_milliseconds() {
    let mut took: Vec<Duration> = (0..21)
        .map(|_| {
            let started = Instant::now();
            crate::fixture::run(&[("CNI_COMMAND", "VERSION")].into(), b"");
            started.elapsed()
        })
        .collect();
    took.sort();
    println!("VERSION: p50 {:?}, least {:?}", took[10], took[0]);
}
