//! §3.2 and §3.3: input, output, errors and versions.

use crate::fixture::{Fixture, run};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

const STATUS: [(&str, &str); 1] = [("CNI_COMMAND", "STATUS")];

fn refused(config: &Value) -> u64 {
    let said = run(&BTreeMap::from(STATUS), config.to_string().as_bytes());
    assert_ne!(said.code, Some(0));
    said.json()["code"].as_u64().unwrap()
}

#[test]
fn cni10_each_fault_of_the_configuration_has_its_code() {
    for input in ["", "{", "[]", "5", "{\"name\": 5}"] {
        run(&BTreeMap::from(STATUS), input.as_bytes()).error(6);
    }
    assert_eq!(refused(&json!({"cniVersion": "banana", "name": "n"})), 6);
    assert_eq!(refused(&json!({"cniVersion": 1, "name": "n"})), 6);
    assert_eq!(refused(&json!({"cniVersion": "1.1.0"})), 7);
    assert_eq!(
        refused(&json!({"cniVersion": "1.1.0", "name": "n", "mtu": 5})),
        7
    );
    let f = Fixture::new();
    let said = f
        .call("ADD", "a", &f.config("1.1.0", json!({"wiring": "ipvlan"})))
        .error(2);
    assert!(said.contains("wiring") && said.contains("ipvlan"), "{said}");
}

#[test]
fn cni10_input_that_cannot_be_read_is_code_5() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sluice-cni"));
    let directory = std::fs::File::open("/").unwrap();
    let output = child
        .env_clear()
        .envs(STATUS)
        .stdin(directory)
        .output()
        .unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["code"], 5, "{said}");
}

#[test]
fn cni11_success_is_exit_0_and_failure_is_not() {
    let f = Fixture::new();
    assert_eq!(f.add("a").code, Some(0));
    assert_eq!(f.add("a").code, Some(1));
}

#[test]
fn cni12_an_error_is_an_object_on_standard_output_in_the_callers_version() {
    let f = Fixture::without_node();
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let said = f.call("ADD", "a", &f.config(version, json!({})));
        said.error(11);
        assert_eq!(said.json()["cniVersion"], version);
        assert!(said.json()["details"].is_string());
    }
    assert_eq!(
        said_version(&json!({"cniVersion": "9.9.9", "name": "n"})),
        "1.1.0"
    );
}

fn said_version(config: &Value) -> Value {
    run(&BTreeMap::from(STATUS), config.to_string().as_bytes()).json()["cniVersion"].clone()
}

#[test]
fn cni13_the_plugins_own_codes_begin_at_100() {
    let f = Fixture::new();
    f.add("a");
    f.add("a").error(103);
    f.node.state().subnets.clear();
    let small =
        json!({"ipam": {"type": "sluice", "dataDir": f.path("data"), "subnet": "10.9.0.0/30"}});
    f.call("ADD", "b", &f.config("1.1.0", small.clone()))
        .result();
    let said = f.call("ADD", "c", &f.config("1.1.0", small));
    assert!(
        said.error(101)
            .contains("no addresses available in range set 10.9.0.1-10.9.0.2")
    );
}

#[test]
fn cni14_standard_output_carries_the_result_and_nothing_else() {
    let f = Fixture::new();
    let added = f.add("a");
    assert_eq!(added.text.trim().lines().count(), 1);
    let config = f.config(
        "1.1.0",
        json!({"prevResult": added.result(), "cni.dev/valid-attachments": [
            {"containerID": "a", "ifname": "eth0"}]}),
    );
    for verb in ["CHECK", "GC", "STATUS", "DEL"] {
        f.call(verb, "a", &config).silent();
    }
}

#[test]
fn cni15_unknown_fields_are_tolerated_and_reach_the_delegate_unchanged() {
    let f = Fixture::new();
    let delegate = f.path("bin/echo-ipam");
    std::fs::create_dir_all(f.path("bin")).unwrap();
    let (seen, answer) = (
        f.path("seen"),
        r#"{"cniVersion":"1.1.0","ips":[{"address":"10.5.0.9/24"}]}"#,
    );
    let script = format!("#!/bin/sh\ncat > {}\necho '{answer}'\n", seen.display());
    std::fs::write(&delegate, script).unwrap();
    std::fs::set_permissions(
        &delegate,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let config = f.config(
        "1.1.0",
        json!({"ipam": {"type": "echo-ipam", "theirs": [1, {"deep": null}]}, "unknown": {"a": 1}}),
    );
    let netns = f.netns("a");
    let path = f.path("bin").to_str().unwrap().to_owned();
    let said = f.call_with(
        "ADD",
        "a",
        &config,
        &[("CNI_NETNS", &netns), ("CNI_PATH", &path)],
    );
    assert_eq!(said.address(), "10.5.0.9/32");
    let read: Value = serde_json::from_slice(&std::fs::read(&seen).unwrap()).unwrap();
    assert_eq!(read, config);
}

#[test]
fn cni17_an_absent_version_is_0_1_0_and_an_unknown_one_code_1() {
    let f = Fixture::new();
    let mut config = f.config("", json!({}));
    config.as_object_mut().unwrap().remove("cniVersion");
    let added = f.call("ADD", "a", &config).result();
    assert_eq!(
        (&added["cniVersion"], &added["ip4"]["ip"]),
        (&json!("0.1.0"), &json!("10.1.0.2/32"))
    );
    for version in ["0.0.1", "1.2.0", "2.0.0"] {
        let said = f.call("ADD", "b", &f.config(version, json!({}))).error(1);
        assert!(said.contains(version) && said.contains("1.1.0"), "{said}");
    }
}

#[test]
fn cni18_version_answers_while_standard_input_stays_open() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sluice-cni"))
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take().unwrap();
    assert!(child.wait().unwrap().success());
    drop(stdin);
}

#[test]
fn cni19_the_answer_is_in_exactly_the_version_asked_for() {
    let f = Fixture::new();
    for (n, version) in [
        "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
    ]
    .iter()
    .enumerate()
    {
        let added = f
            .call("ADD", &format!("c{n}"), &f.config(version, json!({})))
            .result();
        assert_eq!(added["cniVersion"], *version);
    }
}

#[test]
fn cni20_verbs_that_the_version_does_not_have_are_code_1() {
    let f = Fixture::new();
    for version in ["0.1.0", "0.3.0", "0.3.1"] {
        f.call("CHECK", "a", &f.config(version, json!({"prevResult": {}})))
            .error(1);
    }
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let config = f.config(version, json!({"cni.dev/valid-attachments": []}));
        f.call("GC", "a", &config).error(1);
        f.call("STATUS", "a", &config).error(1);
    }
}

#[test]
fn cni21_unknown_optional_fields_of_any_version_do_not_break_it() {
    let f = Fixture::new();
    for (n, version) in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].iter().enumerate() {
        let config = f.config(
            version,
            json!({"disableGC": true, "loadOnlyInlinedPlugins": true, "cniVersions": ["1.1.0"], "x": 1}),
        );
        f.call("ADD", &format!("c{n}"), &config).result();
    }
}

#[test]
fn c20_input_that_never_ends_is_cut() {
    let started = std::time::Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sluice-cni"))
        .env_clear()
        .envs(STATUS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"{").unwrap();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["code"], 5);
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[test]
fn what_is_wrong_with_a_configuration_is_said_by_its_key_and_with_what_to_do() {
    let f = Fixture::new();
    let add = |config: &Value| f.call("ADD", "a", config);
    let list =
        json!({"cniVersion": "1.0.0", "name": "net", "plugins": [f.config("1.0.0", json!({}))]});
    let said = add(&list).error(7);
    assert!(
        said.contains("list of plugins") && said.contains("`name`"),
        "{said}"
    );
    let said = add(&f.config("1.0.0", json!({"mtu": "big"}))).error(6);
    assert!(said.contains("mtu"), "{said}");
    let ranges = json!({"ipam": {"type": "sluice", "ranges": [[{"subnet": 5}]]}});
    let said = add(&f.config("1.0.0", ranges)).error(6);
    assert!(said.contains("ranges[0][0].subnet"), "{said}");
    let tiny =
        json!({"ipam": {"type": "sluice", "dataDir": f.path("data"), "subnet": "10.1.0.0/30"}});
    let tiny = f.config("1.0.0", tiny);
    add(&tiny).result();
    let said = f.call("ADD", "b", &tiny).error(101);
    assert!(
        said.contains("1 of 1 used") && said.contains("more ranges"),
        "{said}"
    );
    let f = Fixture::without_node();
    let said = f.call("ADD", "a", &f.config("1.0.0", json!({}))).error(11);
    assert!(said.contains("is sluice-node running"), "{said}");
}
