//! §3.1: invocation and environment.

use crate::fixture::{Fixture, run};
use serde_json::json;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

#[test]
fn cni01_every_verb_is_known_and_any_other_is_code_4() {
    let f = Fixture::new();
    let config = f.config("1.1.0", json!({"cni.dev/valid-attachments": []}));
    assert_eq!(f.call("ADD", "a", &config).code, Some(0));
    for verb in ["DEL", "GC", "STATUS"] {
        f.call(verb, "a", &config).silent();
    }
    assert!(f.call("VERSION", "a", &config).result()["supportedVersions"].is_array());
    for verb in ["add", "UPDATE", "ADD "] {
        assert!(f.call(verb, "a", &config).error(4).contains("CNI_COMMAND"));
    }
}

#[test]
fn cni02_directory_path_and_terminal_are_not_assumed() {
    // Every call of this test suite runs in `/` with an empty environment and pipes; here without even a PATH or a home.
    let f = Fixture::new();
    assert_eq!(f.add("a").code, Some(0));
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    std::fs::create_dir(&gone).unwrap();
    let output = Command::new("/bin/sh")
        .args([
            "-c",
            "rmdir \"$PWD\" && exec \"$0\"",
            env!("CARGO_BIN_EXE_sluice-cni"),
        ])
        .current_dir(&gone)
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn cni03_each_verb_demands_the_variables_it_needs_and_no_others() {
    let f = Fixture::new();
    let config = f.config("1.1.0", json!({"cni.dev/valid-attachments": []}));
    let netns = f.netns("a");
    let without = |verb: &str, name: &str| {
        f.call_with(verb, "a", &config, &[("CNI_NETNS", &netns), (name, "")])
    };
    for verb in ["ADD", "CHECK"] {
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            assert!(without(verb, name).error(4).contains(name), "{verb} {name}");
        }
    }
    for name in ["CNI_CONTAINERID", "CNI_IFNAME"] {
        assert!(without("DEL", name).error(4).contains(name));
    }
    without("DEL", "CNI_NETNS").silent();
    assert!(without("GC", "CNI_PATH").error(4).contains("CNI_PATH"));
    without("STATUS", "CNI_PATH").silent();
    assert_eq!(
        without("ADD", "CNI_PATH").code,
        Some(0),
        "no delegate needs it"
    );
}

#[test]
fn cni04_missing_variables_are_named_together() {
    let said = run(&BTreeMap::from([("CNI_COMMAND", "ADD")]), b"{}").error(4);
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        assert!(said.contains(name), "{said}");
    }
}

#[test]
fn cni05_container_id_and_network_name_are_identifiers() {
    let f = Fixture::new();
    let config = f.config("1.1.0", json!({}));
    for id in ["-a", ".a", "_a", "a/b", "a b", "a\u{e9}", "../../etc"] {
        let netns = f.netns("x");
        let said = f.call_with("ADD", id, &config, &[("CNI_NETNS", &netns)]);
        assert!(said.error(4).contains("CNI_CONTAINERID"), "{id}");
    }
    for name in ["-a", ".a", "a/b", "a b", ".."] {
        assert!(
            f.call("ADD", "a", &f.config("1.1.0", json!({"name": name})))
                .error(7)
                .contains(name)
        );
    }
    let long = format!("0{}", "aZ9_.-".repeat(10));
    assert_eq!(f.add(&long).code, Some(0));
}

#[test]
fn cni06_an_interface_name_that_cannot_be_is_code_4_and_one_in_use_is_an_error() {
    let f = Fixture::new();
    let config = f.config("1.1.0", json!({}));
    let netns = f.netns("a");
    let named = |name: &str| {
        f.call_with(
            "ADD",
            "a",
            &config,
            &[("CNI_NETNS", &netns), ("CNI_IFNAME", name)],
        )
    };
    for name in [".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-bytes-ab"] {
        assert!(named(name).error(4).contains("CNI_IFNAME"), "{name}");
    }
    f.node
        .state()
        .taken
        .insert((netns.clone(), "fifteen-bytes-a".into()));
    named("fifteen-bytes-a").error(103);
    f.assert_empty();
    named("fifteen-bytes-b").result();
}

#[test]
fn cni07_unknown_arguments_are_ignored_only_on_request() {
    let f = Fixture::new();
    let (config, netns) = (f.config("1.1.0", json!({})), f.netns("a"));
    let with = |args: &str| {
        f.call_with(
            "ADD",
            "a",
            &config,
            &[("CNI_NETNS", &netns), ("CNI_ARGS", args)],
        )
    };
    let said = with("K8S_POD_NAME=web;COLOUR=blue;SHAPE=round").error(4);
    assert!(said.contains("COLOUR, SHAPE"), "{said}");
    assert!(
        with("IgnoreUnknown=0;COLOUR=blue")
            .error(4)
            .contains("COLOUR")
    );
    assert!(with("COLOUR").error(4).contains("COLOUR"));
    f.assert_empty();
    with("IgnoreUnknown=1;COLOUR=blue;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web").result();
    assert_eq!(f.links(), ["shop/web"]);
}

#[test]
fn cni08_the_own_namespace_is_refused_before_anything_is_done() {
    let f = Fixture::new();
    let config = f.config("1.1.0", json!({}));
    let own = |more: (&str, &str)| {
        f.call_with(
            "ADD",
            "a",
            &config,
            &[("CNI_NETNS", "/proc/self/ns/net"), more],
        )
    };
    own(("CNI_NETNS_OVERRIDE", "")).error(8);
    own(("CNI_NETNS_OVERRIDE", "0")).error(8);
    f.assert_empty();
    own(("CNI_NETNS_OVERRIDE", "true")).result();
    f.call_with("DEL", "a", &config, &[("CNI_NETNS", "/proc/self/ns/net")])
        .silent();
    f.assert_empty();
}

#[test]
fn cni08_a_namespace_that_cannot_be_opened_is_an_error_on_add_and_none_on_del() {
    let f = Fixture::new();
    let config = f.config("1.1.0", json!({}));
    let nowhere = [("CNI_NETNS", "/nonexistent/netns")];
    assert!(
        f.call_with("ADD", "a", &config, &nowhere)
            .error(8)
            .contains("/nonexistent/netns")
    );
    f.call_with("DEL", "a", &config, &nowhere).silent();
}

#[test]
fn cni09_without_a_command_it_says_what_it_is() {
    let said = run(&BTreeMap::new(), b"");
    assert_eq!((said.code, said.text.as_str()), (Some(0), ""));
    assert!(said.stderr.contains("sluice-cni") && said.stderr.contains("0.3.0, 0.3.1, 0.4.0"));
}

#[test]
fn c09_version_needs_neither_input_nor_other_variables() {
    let output = Command::new(env!("CARGO_BIN_EXE_sluice-cni"))
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        assert!(
            said["supportedVersions"]
                .as_array()
                .unwrap()
                .contains(&json!(version))
        );
    }
}
