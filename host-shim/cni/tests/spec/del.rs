//! §3.5: DEL.

use crate::fixture::{Fixture, IN_TIME, within};
use serde_json::json;
use sluice_cni::plugin::{ACCEPTED_DEL, OVERALL};
use sluice_cni::verbs::node::{Health, NodeError};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[test]
fn cni29_del_removes_the_link_and_frees_the_address_even_without_namespace() {
    let f = Fixture::new();
    f.add("a").result();
    std::fs::remove_file(f.netns("a")).unwrap();
    f.del("a").silent();
    f.assert_empty();
}

#[test]
fn cni30_del_succeeds_again_and_for_what_never_was() {
    let f = Fixture::new();
    f.add("a").result();
    for _ in 0..3 {
        f.del("a").silent();
    }
    f.del("never-added").silent();
    f.assert_empty();
}

#[test]
fn cni31_del_succeeds_without_a_previous_result() {
    let f = Fixture::new();
    for (n, version) in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
        .iter()
        .enumerate()
    {
        let (id, config) = (format!("c{n}"), f.config(version, json!({})));
        f.call("ADD", &id, &config).result();
        f.call("DEL", &id, &config).silent();
    }
    f.assert_empty();
}

#[test]
fn cni32_del_without_namespace_frees_all_there_is() {
    let f = Fixture::new();
    f.add("a").result();
    let config = f.config("1.1.0", json!({}));
    f.call_with("DEL", "a", &config, &[("CNI_NETNS", "")])
        .silent();
    f.assert_empty();
}

#[test]
fn cni33_a_del_fails_only_if_something_is_left_and_then_frees_it_the_next_time() {
    let f = Fixture::new();
    f.add("a").result();
    f.node.state().refuse_detach = Some(NodeError::Failed("the kernel refused".into()));
    assert!(f.del("a").error(105).contains("the kernel refused"));
    assert_eq!(f.held().len(), 1, "an address in use is not free");
    f.del("a").silent();
    f.assert_empty();
}

#[test]
fn cni34_the_delegate_is_told_and_its_failure_returned() {
    let f = Fixture::new();
    let script = "#!/bin/sh\ncat > /dev/null\n[ $CNI_COMMAND = ADD ] && \
                  echo '{\"cniVersion\": \"1.1.0\", \"ips\": [{\"address\": \"10.5.0.9/24\"}]}' && exit 0\n\
                  echo '{\"code\": 140, \"msg\": \"cannot free\"}'\nexit 1\n";
    let path = crate::ipam::plugin(&f, "stubborn", script);
    let (netns, config) = (
        f.netns("a"),
        f.config("1.1.0", json!({"ipam": {"type": "stubborn"}})),
    );
    let variables = [("CNI_NETNS", netns.as_str()), ("CNI_PATH", path.as_str())];
    f.call_with("ADD", "a", &config, &variables).result();
    assert!(
        f.call_with("DEL", "a", &config, &variables)
            .error(140)
            .contains("cannot free")
    );
}

#[test]
fn c04_a_del_without_node_succeeds_is_kept_on_disk_and_carried_out_later() {
    let mut f = Fixture::new();
    f.add("a").result();
    f.add("b").result();
    f.stop();
    within(IN_TIME, || f.del("a")).silent();
    assert!(f.path("state/deferred/net/a@eth0").exists());
    assert_eq!(f.held().len(), 2);
    f.start();
    assert_eq!(
        (f.links(), f.held()),
        (vec!["b:eth0".to_owned()], vec!["10.1.0.3".to_owned()])
    );
    assert!(!f.path("state/deferred/net/a@eth0").exists());
    let counters = &f.verbs.as_ref().unwrap().counters;
    assert_eq!(counters.deferred_dels.load(Ordering::Relaxed), 1);
    assert_eq!(counters.report()["cni_deferred_del_total"], 1);
}

#[test]
fn c04_a_del_that_a_node_did_not_hear_is_carried_out_while_it_runs() {
    let f = Fixture::new();
    for id in ["a", "b"] {
        f.add(id).result();
    }
    // As if the node had been too busy to answer: nobody listens where this DEL asks.
    let deaf = f.config("1.1.0", json!({"runDir": f.path("nowhere")}));
    f.call("DEL", "a", &deaf).silent();
    let started = Instant::now();
    while f.links() != ["b:eth0"] || f.path("state/deferred/net/a@eth0").exists() {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(f.held(), ["10.1.0.3"]);
}

#[test]
fn c04_a_kept_del_does_not_hit_the_next_attachment_of_the_same_name() {
    let mut f = Fixture::new();
    let first = f.add("a").address();
    f.stop();
    f.del("a").silent();
    f.start();
    // podman starts a stopped container again under its old id.
    let second = f.add("a").address();
    assert_ne!(first, second);
    f.stop();
    f.start();
    assert_eq!(f.links(), ["a:eth0"]);
}

#[test]
fn c04_a_del_to_a_node_that_hangs_is_kept_within_two_seconds() {
    let f = Fixture::without_node();
    let hanging = f.hang(false);
    let said = f.del("a");
    said.silent();
    // What a machine that is busy with something else adds is not the plugin's.
    assert!(
        ACCEPTED_DEL < IN_TIME && said.took < OVERALL,
        "{:?}",
        said.took
    );
    assert!(f.path("state/deferred/net/a@eth0").exists());
    hanging.join().unwrap();
}

#[test]
fn c04_while_the_appliance_is_down_del_works_at_once() {
    let f = Fixture::new();
    f.add("a").result();
    f.node.state().health = Health::Unavailable("gone".into());
    within(IN_TIME, || f.del("a")).silent();
    f.assert_empty();
}

#[test]
fn c15_a_call_that_died_with_the_node_is_undone_at_its_next_start() {
    let mut f = Fixture::new();
    f.add("a").result();
    f.stop();
    let path = f.path("run/attachments/net/a@eth0");
    let record = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        record.replace("\"complete\":true", "\"complete\":false"),
    )
    .unwrap();
    f.start();
    f.assert_empty();
}

#[test]
fn c03_a_del_can_be_kept_only_if_the_disk_takes_it() {
    let f = Fixture::without_node();
    std::fs::write(f.path("state"), "in the way").unwrap();
    assert!(f.del("a").error(5).contains("cannot be kept"));
}
