//! Rows I-01…I-12 and C-18 through the binary: our own pool, Debian's `host-local`, and an external driver.

use crate::fixture::Fixture;
use serde_json::json;
use sluice_cni::verbs::node::NodeError;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Where Debian's containernetworking-plugins are.
pub(crate) const REFERENCE: &str = "/usr/lib/cni";

/// Puts a program where delegates are found; returns the directory.
pub(crate) fn plugin(f: &Fixture, name: &str, script: &str) -> String {
    let dir = f.path("bin");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join(name), script).unwrap();
    std::fs::set_permissions(dir.join(name), PermissionsExt::from_mode(0o755)).unwrap();
    dir.to_str().unwrap().to_owned()
}

#[test]
fn i01_without_ranges_the_nodes_pod_cidrs_count_and_may_not_move_under_pods() {
    let f = Fixture::new();
    let ipam = json!({"ipam": {"type": "sluice", "dataDir": f.path("data")}});
    let config = f.config("1.1.0", ipam);
    let added = f.call("ADD", "a", &config).result();
    assert_eq!(added["ips"][0]["address"], "10.1.0.2/32");
    assert_eq!(added["ips"][1]["address"], "fd00::2/128");
    f.node.state().subnets = vec!["10.2.0.0/24".into()];
    let said = f.call("ADD", "b", &config).error(7);
    assert!(
        said.contains("pod CIDRs changed") && said.contains("10.1.0.2"),
        "{said}"
    );
    f.call("DEL", "a", &config).silent();
    assert_eq!(f.call("ADD", "b", &config).address(), "10.2.0.2/32");
}

#[test]
fn i03_subnets_without_room_are_code_7() {
    let f = Fixture::new();
    for subnet in ["10.1.0.0/31", "10.1.0.0/32", "10.1.0.7/24", "nonsense"] {
        let ipam = json!({"ipam": {"type": "sluice", "dataDir": f.path("data"), "subnet": subnet}});
        f.call("ADD", "a", &f.config("1.1.0", ipam)).error(7);
    }
    f.assert_empty();
}

#[test]
fn i08_a_namespaces_pool_is_used_and_an_empty_one_is_an_error() {
    let f = Fixture::new();
    let pools = json!({"blue": [[{"subnet": "10.3.0.0/24"}]], "empty": []});
    let ipam = json!({"type": "sluice", "dataDir": f.path("data"), "subnet": "10.1.0.0/24", "pools": pools});
    let config = f.config("1.1.0", json!({"ipam": ipam}));
    for (namespace, pool) in [("shop", "blue"), ("lab", "empty"), ("typo", "bleu")] {
        f.node.state().pools.insert(namespace.into(), pool.into());
    }
    let add = |id: &str, namespace: &str| {
        let netns = f.netns(id);
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={id}");
        f.call_with(
            "ADD",
            id,
            &config,
            &[("CNI_NETNS", &netns), ("CNI_ARGS", &args)],
        )
    };
    assert_eq!(add("a", "shop").address(), "10.3.0.2/32");
    assert_eq!(add("b", "default").address(), "10.1.0.2/32");
    assert!(add("c", "lab").error(7).contains("empty"));
    let typo = add("d", "typo").error(7);
    assert!(typo.contains("bleu") && typo.contains("blue"), "{typo}");
    // While nobody knows which pool it is, no address of another one is given.
    f.node.state().refuse_pool = Some(NodeError::Late("which pool?".into()));
    add("e", "shop").error(11);
    assert_eq!(f.held(), ["10.1.0.2", "10.3.0.2"]);
}

#[test]
fn i08_pools_of_the_node_stand_beside_its_pod_cidrs() {
    let f = Fixture::new();
    f.node.state().pools.insert("shop".into(), "blue".into());
    let blue = ["10.3.0.0/24", "fd03::/64"].map(Into::into);
    f.node.state().node_pools.insert("blue".into(), blue.into());
    let ipam = json!({"ipam": {"type": "sluice", "dataDir": f.path("data")}});
    let config = f.config("1.1.0", ipam);
    let add = |id: &str, namespace: &str| {
        let netns = f.netns(id);
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={id}");
        let variables = [("CNI_NETNS", netns.as_str()), ("CNI_ARGS", &args)];
        f.call_with("ADD", id, &config, &variables)
    };
    let result = add("a", "shop").result();
    assert_eq!(result["ips"][0]["address"], "10.3.0.2/32");
    assert_eq!(result["ips"][1]["address"], "fd03::2/128");
    // An address of a pool is none that the pod CIDRs have moved away from.
    assert_eq!(add("b", "default").address(), "10.1.0.2/32");
    f.call("DEL", "a", &config).silent();
    f.call("DEL", "b", &config).silent();
    f.assert_empty();
    // A pool that is taken away from under its pods is noticed.
    add("c", "shop").result();
    f.node.state().node_pools.clear();
    assert!(add("d", "default").error(7).contains("pod CIDRs changed"));
    add("e", "shop").error(7);
}

#[test]
fn i09_a_fixed_address_in_use_is_an_error_and_not_another_address() {
    let f = Fixture::new();
    let fixed = f.config("1.1.0", json!({"runtimeConfig": {"ips": ["10.1.0.77/24"]}}));
    assert_eq!(f.call("ADD", "a", &fixed).address(), "10.1.0.77/32");
    assert!(f.call("ADD", "b", &fixed).error(102).contains("a eth0"));
    assert_eq!(f.links().len(), 1);
}

#[test]
fn i10_a_store_that_host_local_wrote_is_taken_over_and_given_back() {
    let f = Fixture::new();
    std::fs::create_dir_all(f.path("data/net")).unwrap();
    std::fs::write(f.path("data/net/10.1.0.2"), "theirs\r\neth0").unwrap();
    std::fs::write(f.path("data/net/last_reserved_ip.0"), "10.1.0.2").unwrap();
    assert_eq!(f.add("a").address(), "10.1.0.3/32");
    assert_eq!(
        std::fs::read(f.path("data/net/10.1.0.3")).unwrap(),
        b"a\r\neth0"
    );
    f.del("theirs").silent();
    assert_eq!(f.held(), ["10.1.0.3"]);
}

/// What every source of addresses has to do, driven through ADD and DEL.
fn any_source_keeps_its_word(f: &Fixture, kind: &str, path: &str) {
    let sets = json!([[{"subnet": "10.1.0.0/29"}], [{"subnet": "fd00::/125"}]]);
    let ipam = json!({"type": kind, "dataDir": f.path("data"), "ranges": sets});
    let call = |verb: &str, id: &str| {
        let netns = f.netns(id);
        let config = f.config("1.0.0", json!({"ipam": ipam}));
        f.call_with(
            verb,
            id,
            &config,
            &[("CNI_NETNS", &netns), ("CNI_PATH", path)],
        )
    };
    // I-11: both families, in order; I-03: no network, gateway or broadcast address.
    let ids = ["a", "b", "c", "d", "e"];
    let given: Vec<String> = ids
        .iter()
        .map(|id| {
            let result = call("ADD", id).result();
            let ips = [0, 1].map(|n| result["ips"][n]["address"].as_str().unwrap().to_owned());
            ips.join(" ")
        })
        .collect();
    assert_eq!(given[0], "10.1.0.2/32 fd00::2/128");
    assert_eq!(given[4], "10.1.0.6/32 fd00::6/128");
    // I-04: the sixth fails and holds nothing.
    let sixth = call("ADD", "late");
    assert_ne!(sixth.code, Some(0));
    assert!(
        sixth.json()["msg"].as_str().unwrap().contains("no"),
        "{sixth:?}"
    );
    call("DEL", "late").silent();
    assert_eq!(f.links().len(), 5);
    // C-18: DEL reaches it; the freed address is the only one left.
    call("DEL", "b").silent();
    assert_eq!(call("ADD", "late").address(), "10.1.0.3/32");
    for id in ids.iter().chain(&["late"]) {
        call("DEL", id).silent();
        call("DEL", id).silent();
    }
    f.assert_empty();
}

#[test]
fn c18_our_own_pool_keeps_the_word_of_a_source() {
    any_source_keeps_its_word(&Fixture::new(), "sluice", "/nonexistent");
}

#[test]
fn c18_debians_host_local_keeps_the_word_of_a_source() {
    if !Path::new(REFERENCE).join("host-local").exists() {
        eprintln!(
            "SKIP: c18_debians_host_local: needs {REFERENCE}/host-local (containernetworking-plugins)"
        );
        return;
    }
    any_source_keeps_its_word(&Fixture::new(), "host-local", REFERENCE);
}

#[test]
fn i12_an_external_driver_keeps_the_word_of_a_source() {
    // The example driver is built with the tests, beside them.
    let dir = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .join("../examples");
    let dir = dir.canonicalize().unwrap();
    assert!(
        dir.join("ipam-driver").exists(),
        "{} has no ipam-driver",
        dir.display()
    );
    any_source_keeps_its_word(&Fixture::new(), "ipam-driver", dir.to_str().unwrap());
}

#[test]
fn c18_host_local_and_our_pool_understand_each_others_store() {
    if !Path::new(REFERENCE).join("host-local").exists() {
        eprintln!("SKIP: c18_host_local_and_our_pool: needs {REFERENCE}/host-local");
        return;
    }
    let f = Fixture::new();
    let of = |kind: &str| {
        let ipam = json!({"type": kind, "dataDir": f.path("data"), "ranges": [[{"subnet": "10.1.0.0/29"}]]});
        f.config("1.0.0", json!({"ipam": ipam}))
    };
    let call = |verb: &str, id: &str, kind: &str| {
        let netns = f.netns(id);
        f.call_with(
            verb,
            id,
            &of(kind),
            &[("CNI_NETNS", &netns), ("CNI_PATH", REFERENCE)],
        )
    };
    assert_eq!(call("ADD", "a", "host-local").address(), "10.1.0.2/32");
    assert_eq!(call("ADD", "b", "sluice").address(), "10.1.0.3/32");
    assert_eq!(call("ADD", "c", "host-local").address(), "10.1.0.4/32");
    assert_eq!(f.held().len(), 3);
    // Each frees what the other gave: the records are removed, so only the store knows.
    f.node.state().links.clear();
    let mut f = f;
    f.stop();
    std::fs::remove_dir_all(f.path("run/attachments")).unwrap();
    f.start();
    let del = |id: &str, kind: &str| {
        let ipam = json!({"type": kind, "dataDir": f.path("data"), "ranges": [[{"subnet": "10.1.0.0/29"}]]});
        let config = f.config("1.0.0", json!({"ipam": ipam}));
        f.call_with("DEL", id, &config, &[("CNI_PATH", REFERENCE)])
            .silent();
    };
    del("a", "sluice");
    del("b", "host-local");
    del("c", "host-local");
    f.assert_empty();
}

#[test]
fn c18_gc_cleans_the_store_of_a_host_local_that_has_no_gc() {
    if !Path::new(REFERENCE).join("host-local").exists() {
        eprintln!("SKIP: c18_gc_cleans_the_store_of_a_host_local: needs {REFERENCE}/host-local");
        return;
    }
    let f = Fixture::new();
    let ipam = json!({"type": "host-local", "dataDir": f.path("data"), "ranges": [[{"subnet": "10.1.0.0/29"}]]});
    let mut config = f.config("1.0.0", json!({"ipam": ipam}));
    for id in ["a", "b"] {
        let netns = f.netns(id);
        let variables = [("CNI_NETNS", netns.as_str()), ("CNI_PATH", REFERENCE)];
        f.call_with("ADD", id, &config, &variables).result();
    }
    std::fs::remove_file(f.netns("b")).unwrap();
    config["cniVersion"] = json!("1.1.0");
    config["cni.dev/valid-attachments"] = json!([{"containerID": "a", "ifname": "eth0"}]);
    f.call_with("GC", "", &config, &[("CNI_PATH", REFERENCE)])
        .silent();
    assert_eq!(
        (f.links(), f.held()),
        (vec!["a:eth0".to_owned()], vec!["10.1.0.2".to_owned()])
    );
}

#[test]
fn cni03_a_delegate_needs_the_path() {
    let f = Fixture::new();
    let netns = f.netns("a");
    let config = f.config("1.0.0", json!({"ipam": {"type": "host-local"}}));
    let said = f.call_with(
        "ADD",
        "a",
        &config,
        &[("CNI_NETNS", &netns), ("CNI_PATH", "")],
    );
    assert!(said.error(4).contains("CNI_PATH"));
    assert!(f.links().is_empty());
}
