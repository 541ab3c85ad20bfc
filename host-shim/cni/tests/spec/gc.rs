//! §3.7: GC.

use crate::fixture::{Fixture, Said};
use serde_json::{Value, json};
use sluice_cni::config::Config;
use sluice_cni::env::Environment;
use sluice_cni::verbs::node::NodeError;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

fn listed(ids: &[&str]) -> Value {
    ids.iter()
        .map(|id| json!({"containerID": id, "ifname": "eth0"}))
        .collect()
}

fn gc(f: &Fixture, ids: &[&str]) -> Said {
    f.call(
        "GC",
        "",
        &f.config("1.1.0", json!({"cni.dev/valid-attachments": listed(ids)})),
    )
}

/// Five attachments; the namespaces of those named are gone.
fn five(gone: &[&str]) -> Fixture {
    let f = Fixture::new();
    for id in ["a", "b", "c", "d", "e"] {
        f.add(id).result();
    }
    for id in gone {
        std::fs::remove_file(f.netns(id)).unwrap();
    }
    f
}

#[test]
fn cni41_both_names_of_the_list_are_read_and_its_absence_frees_nothing() {
    let f = five(&["a", "b", "c", "d", "e"]);
    f.call("GC", "", &f.config("1.1.0", json!({}))).error(7);
    f.call(
        "GC",
        "",
        &f.config("1.1.0", json!({"cni.dev/valid-attachments": null})),
    )
    .error(7);
    assert_eq!(f.held().len(), 5);
    let older = json!({"cni.dev/attachments": listed(&["a", "b", "c", "d"])});
    f.call("GC", "", &f.config("1.1.0", older)).silent();
    assert_eq!(f.held().len(), 4);
    let both =
        json!({"cni.dev/valid-attachments": listed(&["a"]), "cni.dev/attachments": listed(&[])});
    f.call("GC", "", &f.config("1.1.0", both)).silent();
    assert_eq!(f.links(), ["a:eth0"]);
}

#[test]
fn cni42_c07_stale_ones_go_live_ones_stay_and_one_failure_does_not_stop_the_rest() {
    let f = five(&["b", "d"]);
    f.node.state().refuse_detach = Some(NodeError::Failed("the kernel refused".into()));
    let said = gc(&f, &["a", "c", "e"]).error(107);
    assert!(
        said.contains("1 stale") && said.contains("b eth0") && said.contains("the kernel refused")
    );
    assert_eq!(f.links().len(), 4, "d is gone all the same");
    gc(&f, &["a", "c", "e"]).silent();
    assert_eq!(f.links(), ["a:eth0", "c:eth0", "e:eth0"]);
    assert_eq!(f.held(), ["10.1.0.2", "10.1.0.4", "10.1.0.6"]);
}

#[test]
fn i06_a_live_pod_that_is_not_listed_goes_only_at_the_second_look_a_minute_later() {
    let f = five(&[]);
    gc(&f, &[]).silent();
    assert_eq!(f.held().len(), 5, "an empty list is not believed at once");
    let config = Config::from_value(f.config("1.1.0", json!({}))).unwrap();
    let env = Environment::read(|name| match name {
        "CNI_COMMAND" => Some("GC".into()),
        "CNI_PATH" => Some("/nonexistent".into()),
        _ => None,
    });
    let look = |valid: &[&str], after: u64| {
        let valid: BTreeSet<_> = serde_json::from_value(listed(valid)).unwrap();
        let at = Instant::now() + Duration::from_secs(after);
        f.verbs
            .as_ref()
            .unwrap()
            .gc_at(env.as_ref().unwrap(), &config, &valid, at)
            .unwrap();
        f.held().len()
    };
    assert_eq!(look(&["a"], 30), 5);
    assert_eq!(
        look(&["b"], 61),
        2,
        "a was listed in between, b is listed now"
    );
    assert_eq!(look(&["b"], 130), 1);
}

#[test]
fn cni43_gc_reaches_the_delegate_and_a_delegate_without_gc_is_no_failure() {
    let f = Fixture::new();
    let log = f.path("log");
    let script = format!(
        "#!/bin/sh\ncat >> {}\necho $CNI_COMMAND >> {}\n",
        log.display(),
        log.display()
    );
    let path = crate::ipam::plugin(&f, "modern", &script);
    let old = "#!/bin/sh\necho '{\"code\": 4, \"msg\": \"unknown CNI_COMMAND: GC\"}'\nexit 1\n";
    crate::ipam::plugin(&f, "old", old);
    let with = |name: &str| {
        let keys = json!({"ipam": {"type": name}, "cni.dev/valid-attachments": listed(&["x"])});
        f.call_with("GC", "", &f.config("1.1.0", keys), &[("CNI_PATH", &path)])
    };
    with("modern").silent();
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(
        log.ends_with("GC\n") && log.contains("\"containerID\":\"x\""),
        "{log}"
    );
    with("old").silent();
}

#[test]
fn cni44_another_network_is_not_touched() {
    let f = five(&["a", "b", "c", "d", "e"]);
    let other = json!({"name": "other", "cni.dev/valid-attachments": []});
    f.call("GC", "", &f.config("1.1.0", other)).silent();
    assert_eq!((f.links().len(), f.held().len()), (5, 5));
}

#[test]
fn cni45_gc_beside_adds_and_dels_breaks_none_of_them() {
    let f = Fixture::new();
    f.node.state().delay = Duration::from_millis(5);
    std::thread::scope(|scope| {
        let churn = |seed: usize| {
            let f = &f;
            move || {
                for round in 0..4 {
                    let id = format!("pod-{seed}-{round}");
                    f.add(&id).result();
                    f.del(&id).silent();
                }
            }
        };
        let churning: Vec<_> = (0..4).map(|seed| scope.spawn(churn(seed))).collect();
        while !churning
            .iter()
            .all(std::thread::ScopedJoinHandle::is_finished)
        {
            gc(&f, &[]).silent();
        }
    });
    f.assert_empty();
}
