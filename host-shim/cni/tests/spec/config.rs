//! §3.11: configuration and capabilities.

use crate::fixture::Fixture;
use serde_json::json;

#[test]
fn cni16_reserved_keys_are_the_runtimes_and_not_kept_from_one_call_to_the_next() {
    let f = Fixture::new();
    let supplied = json!({"runtimeConfig": {"mac": "02:00:00:00:00:09"}});
    f.call("ADD", "a", &f.config("1.1.0", supplied)).result();
    f.add("b").result();
    let state = f.node.state();
    assert_eq!(state.links["a:eth0"].mac, Some([2, 0, 0, 0, 0, 9]));
    assert_eq!(state.links["b:eth0"].mac, None);
}

#[test]
fn cni61_types_are_names_and_only_declared_capabilities_count() {
    let f = Fixture::new();
    f.call(
        "ADD",
        "a",
        &f.config("1.1.0", json!({"type": "/opt/sluice-cni"})),
    )
    .error(7);
    let netns = f.netns("a");
    let ipam = f.config("1.1.0", json!({"ipam": {"type": "../../bin/sh"}}));
    f.call_with(
        "ADD",
        "a",
        &ipam,
        &[("CNI_NETNS", &netns), ("CNI_PATH", "/usr/bin")],
    )
    .error(7);
    f.assert_empty();
    let supplied = json!({
        "capabilities": {"mac": true},
        "runtimeConfig": {"mac": "02:00:00:00:00:09", "ips": ["10.1.0.77"]},
    });
    let said = f.call("ADD", "a", &f.config("1.1.0", supplied));
    assert_eq!(said.address(), "10.1.0.2/32");
    assert_eq!(said.result()["interfaces"][0]["mac"], "02:00:00:00:00:09");
}

#[test]
fn c12_every_capability_reaches_the_link() {
    let f = Fixture::new();
    let supplied = json!({
        "capabilities": {
            "portMappings": true, "bandwidth": true, "mac": true, "ips": true, "dns": true,
            "aliases": true, "ipRanges": true,
        },
        "runtimeConfig": {
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 1000, "ingressBurst": 2000, "egressRate": 3000, "egressBurst": 4000},
            "mac": "02:00:00:00:00:09",
            "ips": ["10.7.0.77/24"],
            "dns": {"servers": ["10.96.0.10"], "searches": ["svc"]},
            "aliases": ["web"],
            "ipRanges": [[{"subnet": "10.7.0.0/24"}]],
        },
    });
    let ipam =
        json!({"type": "sluice", "dataDir": f.path("data"), "ranges": [[{"subnet": "fd00::/64"}]]});
    let mut config = f.config("1.1.0", supplied);
    config["ipam"] = ipam;
    let result = f.call("ADD", "a", &config).result();
    assert_eq!(
        (&result["ips"][0]["address"], &result["ips"][1]["address"]),
        (&json!("10.7.0.77/32"), &json!("fd00::2/128"))
    );
    assert_eq!(
        result["dns"],
        json!({"nameservers": ["10.96.0.10"], "search": ["svc"]})
    );
    let link = f.node.state().links["a:eth0"].clone();
    assert_eq!(link.ports[0].host_port, 8080);
    let (ingress, egress) = (
        link.bandwidth.ingress.unwrap(),
        link.bandwidth.egress.unwrap(),
    );
    assert_eq!((ingress.bits_per_second, ingress.burst_bits), (1000, 2000));
    assert_eq!((egress.bits_per_second, egress.burst_bits), (3000, 4000));
    assert_eq!(
        (link.mac, link.aliases),
        (Some([2, 0, 0, 0, 0, 9]), vec!["web".to_owned()])
    );
}

#[test]
fn cni62_it_works_anywhere_in_a_chain() {
    let f = Fixture::new();
    let before = json!({"cniVersion": "1.1.0", "interfaces": [{"name": "dummy0"}], "ips": []});
    let first = f
        .call(
            "ADD",
            "a",
            &f.config("1.1.0", json!({"prevResult": before})),
        )
        .result();
    assert_eq!(first["interfaces"][0]["name"], "dummy0");
    let mut after = first;
    after["interfaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "ifb0"}));
    f.call(
        "CHECK",
        "a",
        &f.config("1.1.0", json!({"prevResult": after})),
    )
    .silent();
    f.call("DEL", "a", &f.config("1.1.0", json!({"prevResult": after})))
        .silent();
    f.assert_empty();
}

#[test]
fn cni63_well_known_keys_keep_their_meaning() {
    let f = Fixture::new();
    let keys = json!({"ipMasq": false, "dns": {"domain": "example.org"}});
    let result = f.call("ADD", "a", &f.config("1.1.0", keys)).result();
    assert_eq!(result["dns"]["domain"], "example.org");
    assert!(!f.node.state().links["a:eth0"].ip_masq);
}

#[test]
fn cni64_args_cni_ips_win_over_the_ip_argument() {
    let f = Fixture::new();
    let netns = f.netns("a");
    let variables = [("CNI_NETNS", netns.as_str()), ("CNI_ARGS", "IP=10.1.0.50")];
    let both = f.config("1.1.0", json!({"args": {"cni": {"ips": ["10.1.0.60"]}}}));
    assert_eq!(
        f.call_with("ADD", "a", &both, &variables).address(),
        "10.1.0.60/32"
    );
    f.del("a").silent();
    let argument = f.config("1.1.0", json!({}));
    assert_eq!(
        f.call_with("ADD", "a", &argument, &variables).address(),
        "10.1.0.50/32"
    );
}
